"""``python -m tests.hostile [NAME ...]``: all attacks, or those that are named, against real nodes; then a table.

For each: what it was, what the node did, the latency of a well-behaved client's calls during it as a multiple of the
usual one, and what the node had more of. The exit status is 1 if a call failed, an answer was wrong, or memory or files
went beyond what they may. The table is written to build/hostile.rst as well.
"""

from __future__ import annotations

import argparse
import sys

from tests.hostile import attacks
from tests.hostile.attack import ATTACKS
from tests.hostile.report import AttackResult, all_of, fragment, line
from tests.integration.fleet import CHECKOUT


def main() -> int:
    attacks.load()
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ATTACKS))
    given = parser.parse_args()
    for name in given.names:
        if name not in ATTACKS:
            parser.error(f"{name} is none of {', '.join(ATTACKS)}")

    def say(row: AttackResult) -> None:
        sys.stdout.write(line(row) + "\n")
        sys.stdout.flush()

    rows = all_of([ATTACKS[name] for name in given.names or ATTACKS], say)
    path = CHECKOUT / "build" / "hostile.rst"
    path.parent.mkdir(exist_ok=True)
    path.write_text(fragment(rows))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
