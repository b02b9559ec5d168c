"""WebSocket connections on Autobahn, for clients, backends and peers alike."""
