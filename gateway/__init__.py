"""A WebSocket gateway node: backends call clients, by client id, through the fleet that holds them."""

__version__ = "0.1.0"
