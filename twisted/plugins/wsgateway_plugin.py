"""Makes ``twistd wsgateway`` known to twistd."""

from twisted.application.service import ServiceMaker

wsgateway = ServiceMaker(
    "wsgateway",
    "gateway.tap",
    "A WebSocket gateway node: backends call connected clients by their id.",
    "wsgateway",
)
