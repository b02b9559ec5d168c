"""Servers that the benchmarks compare with, most of them a minimal gateway on one library.

Start one with ``python -m benchmarks.peers.NAME PORT``.
"""
