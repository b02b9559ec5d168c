"""Signals: taken over from twistd, which would end with the signal's status, and without a drain.

They are handled in the reactor; a second SIGTERM or SIGINT ends the process at once, whatever the reactor does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

#: those of which a second one ends the process
_LAST = (signal.SIGTERM, signal.SIGINT)


def handle(reactor: Any, handlers: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Call a handler in the reactor's turn for each signal; to be called in its main thread, once it runs."""
    times = dict.fromkeys(handlers, 0)

    def handler(signum: int, frame: FrameType | None) -> None:
        received = signal.Signals(signum)
        times[received] += 1
        if received in _LAST and sum(times.get(each, 0) for each in _LAST) > 1:
            os._exit(1)
        reactor.callFromThread(handlers[received])

    for signum in handlers:
        signal.signal(signum, handler)
