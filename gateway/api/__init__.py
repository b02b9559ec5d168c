"""Where backends and operators arrive: HTTP and a WebSocket, on the backend endpoint."""
