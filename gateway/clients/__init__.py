"""Clients of this node: their opening handshakes, and their sessions, parked and awake."""
