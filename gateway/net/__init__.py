"""Network I/O: endpoints, accept throttling, PROXY protocol, TLS, HTTP requests, and detaching sockets from Twisted."""
