"""Install the servers that the benchmarks compare with; those that cannot be installed are left out.

    python -m benchmarks.install

They are listed in setup.cfg, as the extra ``bench``; ws is installed if npm is available.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys

from benchmarks.measure import CHECKOUT
from benchmarks.peers.ws import MODULES


def wanted() -> list[str]:
    """Return the requirements of the extra ``bench``."""
    config = configparser.ConfigParser()
    config.read(CHECKOUT / "setup.cfg")
    lines = config["options.extras_require"]["bench"].splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    requirements = wanted()
    # Installing all at once is faster, but fails if one of them fails.
    succeeded = subprocess.run([*pip, *requirements], stderr=subprocess.DEVNULL).returncode == 0
    commands = {} if succeeded else {requirement: [*pip, requirement] for requirement in requirements}
    if npm := shutil.which("npm"):
        options = ("--silent", "--no-audit", "--no-fund", "--prefix", str(MODULES))
        commands["ws"] = [npm, "install", *options, "ws@8", "bufferutil"]
    for name, command in commands.items():
        if subprocess.run(command).returncode:
            print(f"{name} cannot be installed: the benchmarks leave it out", file=sys.stderr)


if __name__ == "__main__":
    main()
