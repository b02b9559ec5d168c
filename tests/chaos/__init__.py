"""Inject faults into a fleet under load, and check clients and calls: ``make chaos``."""
