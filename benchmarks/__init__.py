"""Benchmarks that compare a node with other servers in one run: ``python -m benchmarks.NAME --help``."""
