"""Sans-I/O codecs: frames, opening handshakes, JSON-RPC messages, URIs, and their errors. No module imports Twisted."""
