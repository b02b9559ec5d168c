"""Nodes among themselves: heartbeat and lease, drain."""
