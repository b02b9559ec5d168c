"""What the methods of an agent raise, and what its callers get."""

from __future__ import annotations

import attrs


class AgentError(Exception):
    """Raised by a handler: the caller gets this very error object (JSON-RPC 2.0, section 5.1).

    ``data`` is anything that msgspec can encode as JSON; left out when ``None``.
    """

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.data = data


class CallFailed(Exception):
    """A call or notification did not get through, or got no result. The base of the four below."""


class RpcFailed(CallFailed):
    """The other side answered with an error object."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.data = data


class NotConnected(CallFailed):
    """There is no connection: nothing was sent."""


class ConnectionLost(CallFailed):
    """The connection ended before the response came: the call may have been carried out."""


class CallTimedOut(CallFailed):
    """No response came in time: the call may have been carried out, or still may be."""


@attrs.frozen
class Stopped:
    """Why an agent stopped.

    ``code`` is the close code or the HTTP status after which it gave up, ``None`` if it was told to stop.
    """

    code: int | None
    reason: str
