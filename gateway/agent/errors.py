"""Public exceptions of the agent, and the reason why it stopped.

Exception
 +-- AgentError              raised by a handler: the error object of its response
 +-- CallFailed              a call or notification of this side failed
      +-- RpcFailed          the response is an error object
      +-- NotConnected       nothing was sent
      +-- ConnectionLost     the connection was lost before the response
      +-- CallTimedOut       no response in time

Each ``CallFailed`` has ``sent``: ``False`` guarantees that the other side did not get the call, so that it may be
repeated; ``True`` means that it may have.
"""

from __future__ import annotations

import attrs


class AgentError(Exception):
    """Raise this in a handler to answer the call with this error object (JSON-RPC 2.0, section 5.1).

    ``data`` is any value that msgspec can encode as JSON; omitted if ``None``.
    """

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.data = data


class CallFailed(Exception):
    """A call or notification failed. Base class of the four below."""

    #: whether the other side may have got the call
    sent = True


class RpcFailed(CallFailed):
    """The response to the call is an error object.

    ``gateway`` is whether the error is the gateway's own, not that of the other side. Only then does ``sent`` in
    ``data`` count: the other side may write any error object.
    """

    def __init__(self, code: int, message: str, data: object = None, *, gateway: bool = False) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.data = data
        self.gateway = gateway
        self.sent = not (gateway and isinstance(data, dict) and data.get("sent") is False)


class NotConnected(CallFailed):
    """There is no connection; nothing was sent."""

    sent = False


class ConnectionLost(CallFailed):
    """The connection was lost before the response arrived; the call may have been executed."""


class CallTimedOut(CallFailed):
    """No response arrived within the timeout; the call may have been executed, or may still be."""


@attrs.frozen
class Stopped:
    """Why an agent stopped.

    ``code`` is the close code or the HTTP status after which it gave up; ``None`` after :meth:`Agent.stop`, or after an
    internal error.
    """

    code: int | None
    reason: str
