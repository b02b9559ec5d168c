"""Autobahn's server protocol, slimmed: settings and initial state on the class, no logging.

Autobahn copies every setting to each connection, formats all of them for a debug line, which is most of the cost of an
opening handshake, and logs a line for each misbehaving client. It also gives each connection about fifty attributes
that stay at their initial value in nearly all of them, a queue, a UTF-8 validator, counters, and two Deferreds that the
gateway does not use.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from autobahn.twisted.websocket import WebSocketServerProtocol
from autobahn.websocket.protocol import TrafficStats, WebSocketProtocol
from twisted.internet.interfaces import ISSLTransport


class NullLogger:
    """Replace Autobahn's logger; discard every event."""

    def _ignore(self, *args: object, **kwargs: object) -> None:
        pass

    trace = debug = info = warn = error = critical = failure = _ignore


class NullDeferred:
    """Replace the Deferreds that Autobahn fires when a connection opens and closes."""

    def callback(self, result: object) -> None:
        pass


class LazyAttribute:
    """Descriptor of an attribute that is created on first access, for each connection."""

    def __init__(self, factory: type) -> None:
        self._factory = factory

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, connection: Any, owner: type) -> Any:
        if connection is None:
            return self
        value = connection.__dict__[self._name] = self._factory()
        return value


def initial_attributes() -> dict[str, Any]:
    """Return the attributes that the installed Autobahn sets on each server connection in ``_connectionMade()``."""
    connection = WebSocketServerProtocol.__new__(WebSocketServerProtocol)
    preset = {
        "factory": SimpleNamespace(isServer=True),
        "log": NullLogger(),
        "CONFIG_ATTRS": [],
        "trackTimings": False,
        "openHandshakeTimeout": 0,
    }
    vars(connection).update(preset)
    WebSocketProtocol._connectionMade(connection)
    return {name: value for name, value in vars(connection).items() if name not in preset}


class SlimServerProtocol(WebSocketServerProtocol):  # type: ignore[misc]
    """Autobahn's server protocol with its settings and initial attributes on the class.

    Mutable initial attributes are created for each connection on first access.
    """

    log = NullLogger()

    # Every name of Autobahn's CONFIG_ATTRS; the list itself is empty, so that Autobahn copies none of them.
    CONFIG_ATTRS: list[str] = []
    logOctets = False
    logFrames = False
    trackTimings = False
    utf8validateIncoming = True
    applyMask = True
    maxFramePayloadSize = 0
    maxMessagePayloadSize = 2**20
    autoFragmentSize = 0
    failByDrop = False
    echoCloseCodeReason = False
    openHandshakeTimeout: float = 5
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

    # Set on a connection during the opening handshake only; drop_handshake_attributes() falls back to these.
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
    # Shared by all connections, since the gateway does not read it.
    trafficStats = TrafficStats()
    _transport_details = None

    def __init__(self) -> None:
        """Skip Autobahn's constructor, which only sets attributes that are on this class."""

    def _connectionMade(self) -> None:
        self.factory.countConnections += 1
        if self.openHandshakeTimeout > 0:
            self.openHandshakeTimeoutCall = self.factory._batched_timer.call_later(
                self.openHandshakeTimeout, self.onOpenHandshakeTimeout
            )

    def succeedHandshake(self, res: object) -> None:
        """Open the connection, and shrink its ``__dict__`` if it has TLS: such a connection is never parked."""
        super().succeedHandshake(res)
        if ISSLTransport.providedBy(self.transport):
            self.drop_handshake_attributes()

    def drop_handshake_attributes(self) -> None:
        """Drop attributes that only the opening handshake needs, and those that are identical with the class's."""
        cls = type(self)
        # A new dict, since one that has had many items stays large.
        self.__dict__ = {
            name: value
            for name, value in vars(self).items()
            if name not in _HANDSHAKE_ATTRIBUTES and value is not getattr(cls, name, _MISSING)
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
    if _name not in vars(SlimServerProtocol):
        if not (_value is None or isinstance(_value, (bool, int, float, str, bytes))):
            _value = LazyAttribute(type(_value))
            _value.__set_name__(SlimServerProtocol, _name)
        setattr(SlimServerProtocol, _name, _value)
