"""Faults under load, and what they do to clients and calls: ``make chaos``."""
