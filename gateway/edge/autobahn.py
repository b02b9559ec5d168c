"""Autobahn's server protocol with its settings on the class, and without its log.

It copies its settings to each connection otherwise, which is memory, and prints them, which is most of the time that an
opening handshake takes; and it writes a line for each bad client.
"""

from __future__ import annotations

from autobahn.twisted.websocket import WebSocketServerProtocol

from gateway.edge.opening_limits import OPENING_TIME


class SilentLog:
    """Stands where Autobahn has a logger."""

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    trace = debug = info = warn = error = critical = failure = _nothing


class QuietServerProtocol(WebSocketServerProtocol):  # type: ignore[misc]
    """Each name of Autobahn's CONFIG_ATTRS is here, so that it need not copy any."""

    log = SilentLog()

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
    openHandshakeTimeout = OPENING_TIME
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
