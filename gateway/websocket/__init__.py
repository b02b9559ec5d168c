"""WebSocket connections on Autobahn: the server side for clients, backends and peers, and the client side."""
