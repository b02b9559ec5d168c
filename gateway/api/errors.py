"""Errors of the backend endpoint.

* :exc:`BadRequestError` (a ``ValueError``)
* :exc:`RemoteNodeError`
"""

from __future__ import annotations


class BadRequestError(ValueError):
    """Raised for an invalid part of a request. ``word`` is the ``error`` of the response, the text its ``message``."""

    def __init__(self, word: str, message: str) -> None:
        self.word = word
        super().__init__(message)


class RemoteNodeError(Exception):
    """Raised if the node that holds a client cannot be reached, or fails to disconnect it."""
