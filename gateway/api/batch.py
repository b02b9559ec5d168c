"""The answers to a batch, which are one message (JSON-RPC 2.0, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gateway.rpc import jsonrpc


class Batch:
    """The answers to a batch, sent as one array, in the order of what they answer, when the last is there."""

    __slots__ = ("_answers", "_complete", "_missing", "_send")

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._answers: list[bytes] = []
        self._missing = 0
        self._complete = False

    def slot(self) -> Callable[[bytes], None]:
        """Where to put the next message's answer."""
        self._answers.append(b"")
        self._missing += 1
        return partial(self._put, len(self._answers) - 1)

    def complete(self) -> None:
        """There are no more messages."""
        self._complete = True
        self._send_if_done()

    def _put(self, index: int, answer: bytes) -> None:
        self._answers[index] = answer
        self._missing -= 1
        self._send_if_done()

    def _send_if_done(self) -> None:
        if self._complete and not self._missing and self._answers:
            self._send(jsonrpc.encode_batch(self._answers))
