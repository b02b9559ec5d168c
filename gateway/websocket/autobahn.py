"""Autobahn's server protocol with its settings and its first state on the class, and without its log.

It copies its settings to each connection otherwise, which is memory, and prints them, which is most of the time that an
opening handshake takes; and it writes a line for each bad client. It also gives each connection about fifty attributes
that stay as they are in nearly all of them, a queue, a validator, counters, and two Deferreds for which nobody waits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from autobahn.twisted.websocket import WebSocketServerProtocol
from autobahn.websocket.protocol import TrafficStats, WebSocketProtocol
from twisted.internet.interfaces import ISSLTransport

from gateway.websocket.limits import HANDSHAKE_TIMEOUT


class NullLogger:
    """Stands where Autobahn has a logger."""

    def _ignore(self, *args: object, **kwargs: object) -> None:
        pass

    trace = debug = info = warn = error = critical = failure = _ignore


class NullDeferred:
    """Stands where Autobahn has a Deferred for whoever waits for a connection to open, or to end."""

    def callback(self, result: object) -> None:
        """Nobody is told."""


class LazyAttribute:
    """An attribute that a connection gets when it is first asked for."""

    def __init__(self, factory: type) -> None:
        self._factory = factory

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, connection: Any, owner: type) -> Any:
        if connection is None:
            return self
        made = connection.__dict__[self._name] = self._factory()
        return made


def initial_attributes() -> dict[str, Any]:
    """What Autobahn, as it is installed, sets on each server connection when it begins."""
    connection = WebSocketServerProtocol.__new__(WebSocketServerProtocol)
    given = {
        "factory": SimpleNamespace(isServer=True),
        "log": NullLogger(),
        "CONFIG_ATTRS": [],
        "trackTimings": False,
        "openHandshakeTimeout": 0,
    }
    vars(connection).update(given)
    WebSocketProtocol._connectionMade(connection)
    return {name: value for name, value in vars(connection).items() if name not in given}


class SlimServerProtocolBase(WebSocketServerProtocol):  # type: ignore[misc]
    """What each connection begins with is on the class; what can change in itself is made when it is needed."""

    # What is of use in an opening handshake alone is here for afterwards.
    peer: str | None = None
    websocket_version = 13
    websocket_protocols: Any = ()
    websocket_extensions: Any = ()
    websocket_extensions_in_use: Any = ()
    websocket_protocol_in_use = None
    http_response_data = None
    _wskey = ""
    inside_message = False
    current_frame: Any = None

    is_open = is_closed = NullDeferred()
    # Counted for all connections together: nobody reads it.
    trafficStats = TrafficStats()
    _transport_details = None
    openHandshakeTimeout: float

    def __init__(self) -> None:
        """Autobahn's has nothing else to do than to make what is on the class here."""

    def _connectionMade(self) -> None:
        self.factory.countConnections += 1
        if self.openHandshakeTimeout > 0:
            self.openHandshakeTimeoutCall = self.factory._batched_timer.call_later(
                self.openHandshakeTimeout, self.onOpenHandshakeTimeout
            )

    def succeedHandshake(self, res: object) -> None:
        """Open the connection. If it has TLS, and so will keep this object, let the object become small."""
        super().succeedHandshake(res)
        if ISSLTransport.providedBy(self.transport):
            self.drop_handshake_attributes()

    def drop_handshake_attributes(self) -> None:
        """Keep no attribute that is of no use once a connection is open, nor one that is as on the class."""
        kind = type(self)
        # A dict that has had many items stays large.
        self.__dict__ = {
            name: value
            for name, value in vars(self).items()
            if name not in _HANDSHAKE_ATTRIBUTES and value is not getattr(kind, name, _MISSING)
        }


_MISSING = object()
_HANDSHAKE_ATTRIBUTES = frozenset(
    {
        "peer",
        "websocket_version",
        "websocket_protocols",
        "websocket_extensions",
        "websocket_extensions_in_use",
        "websocket_protocol_in_use",
        "http_response_data",
        "_wskey",
    }
)

for _name, _value in initial_attributes().items():
    if _name not in vars(SlimServerProtocolBase):
        if not (_value is None or isinstance(_value, (bool, int, float, str, bytes))):
            _value = LazyAttribute(type(_value))
            _value.__set_name__(SlimServerProtocolBase, _name)
        setattr(SlimServerProtocolBase, _name, _value)


class SlimServerProtocol(SlimServerProtocolBase):
    """Each name of Autobahn's CONFIG_ATTRS is here, so that it need not copy any."""

    log = NullLogger()

    CONFIG_ATTRS: list[str] = []
    logOctets = False
    logFrames = False
    trackTimings = False
    utf8validateIncoming = True
    applyMask = True
    maxFramePayloadSize = 0
    maxMessagePayloadSize = 1048576
    autoFragmentSize = 0
    failByDrop = False
    echoCloseCodeReason = False
    openHandshakeTimeout = HANDSHAKE_TIMEOUT
    tcpNoDelay = True
    autoPingInterval = 0
    autoPingTimeout = 0
    autoPingSize = 12
    autoPingRestartOnAnyTraffic = True
    versions = [13]
    webStatus = False
    requireMaskedClientFrames = True
    maskServerFrames = False
    perMessageCompressionAccept = staticmethod(lambda offers: None)
    serveFlashSocketPolicy = False
    flashSocketPolicy = ""
    allowedOrigins: list[str] = []
    allowedOriginsPatterns: list[object] = []
    allowNullOrigin = False
    maxConnections = 0
    trustXForwardedFor = 0
