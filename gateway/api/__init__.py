"""Backend endpoint: HTTP API and WebSockets for backends, operators and other nodes."""
