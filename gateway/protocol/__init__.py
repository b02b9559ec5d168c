"""Sans-I/O: bytes to values and back. Nothing here imports Twisted."""
