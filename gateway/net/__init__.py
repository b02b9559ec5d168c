"""Sockets: endpoints, accepting, the PROXY protocol, TLS, and transports taken from Twisted and given back."""
