"""A gateway on ws, Node's WebSocket server: ``python -m benchmarks.peers.ws PORT`` becomes ``node ws.cjs PORT``.

``python -m benchmarks.install`` installs ws, and bufferutil, which ws recommends, in ``MODULES`` if npm is available.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MODULES = Path(sys.prefix) / "share" / "npm"


def main() -> None:
    node = shutil.which("node")
    if node is None:
        sys.exit("node is not installed")
    if not (MODULES / "node_modules" / "ws").exists():
        sys.exit("the npm package ws is not installed")
    os.environ["NODE_PATH"] = str(MODULES / "node_modules")
    os.execv(node, [node, str(Path(__file__).with_suffix(".cjs")), sys.argv[1]])


if __name__ == "__main__":
    main()
