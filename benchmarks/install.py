"""Install what the benchmarks compare with; what does not install is left out.

    python -m benchmarks.install

What they are is in setup.cfg, as the extra ``bench``; and ws, where Node and npm are.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys

from benchmarks.measure import CHECKOUT
from benchmarks.peers.ws import MODULES


def wanted() -> list[str]:
    """The requirements of the extra."""
    config = configparser.ConfigParser()
    config.read(CHECKOUT / "setup.cfg")
    lines = config["options.extras_require"]["bench"].splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    every = wanted()
    # All at once is quicker; one that does not install would take the others with it.
    together = subprocess.run([*pip, *every], stderr=subprocess.DEVNULL).returncode == 0
    commands = {} if together else {requirement: [*pip, requirement] for requirement in every}
    if npm := shutil.which("npm"):
        options = ("--silent", "--no-audit", "--no-fund", "--prefix", str(MODULES))
        commands["ws"] = [npm, "install", *options, "ws@8", "bufferutil"]
    for name, command in commands.items():
        if subprocess.run(command).returncode:
            print(f"{name} does not install: the benchmarks go on without it", file=sys.stderr)


if __name__ == "__main__":
    main()
