"""Twisted plugin for ``twistd wsgateway``."""

from twisted.application.service import ServiceMaker

wsgateway = ServiceMaker(
    "wsgateway",
    "gateway.tap",
    "A WebSocket gateway node: backends call connected clients by client id.",
    "wsgateway",
)
