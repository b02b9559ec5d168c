"""Kill servers started by tests when the test process ends, even by SIGKILL."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

#: $1 is the folder. Waits until the write end of its standard input is closed.
_PROGRAM = 'cat >/dev/null; exec 2>/dev/null; kill -9 "$(cat "$1/running")"; rm -rf "$1"'


class ProcessReaper:
    """Kill the process whose pid is in the file ``running`` of a folder, and remove the folder, when this process ends.

    :meth:`reap` does so at once.
    """

    def __init__(self, folder: Path) -> None:
        self._pipe: int | None
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            ["sh", "-c", _PROGRAM, "reaper", str(folder)], stdin=read_end, start_new_session=True
        )
        os.close(read_end)

    def reap(self) -> None:
        """Kill the process and remove the folder."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        self._process.wait()
