"""Where clients arrive: the opening handshake, the connections, and what they may use."""
