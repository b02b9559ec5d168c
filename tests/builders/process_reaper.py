"""The end of servers that tests start, however the process that started them ends: a SIGKILL too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

#: $1: the folder. Waits until nobody holds the other end of its standard input.
_PROGRAM = 'cat >/dev/null; exec 2>/dev/null; kill -9 "$(cat "$1/running")"; rm -rf "$1"'


class ProcessReaper:
    """Kills the process whose pid is in the file ``running`` of a folder, and removes that folder, when this process
    ends, or at :meth:`reap`."""

    def __init__(self, folder: Path) -> None:
        self._pipe: int | None
        reading, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            ["sh", "-c", _PROGRAM, "reaper", str(folder)], stdin=reading, start_new_session=True
        )
        os.close(reading)

    def reap(self) -> None:
        """Do it now."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        self._process.wait()
