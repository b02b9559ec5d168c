"""What :mod:`gateway.agent` is made of."""
