"""The peers: a tiny gateway each, as one would write it with that library: ``python -m benchmarks.peers.NAME PORT``."""
