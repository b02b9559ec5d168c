"""Attacks on a real node, and the node's reactions: ``python -m tests.hostile`` prints a table."""
