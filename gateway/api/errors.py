"""Errors of requests from backends."""

from __future__ import annotations


class BadRequestError(ValueError):
    """Something in a request that cannot be used. ``word`` names it; the text says what would be right."""

    def __init__(self, word: str, message: str) -> None:
        self.word = word
        super().__init__(message)


class RemoteNodeError(Exception):
    """The client is connected to another node, which could not be asked, or could not do it."""
