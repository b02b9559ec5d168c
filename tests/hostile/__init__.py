"""Hostile programs, and what a node does about them: ``python -m tests.hostile`` prints a table."""
