"""Authentication of clients, authorization of backends, and origins of browsers."""
