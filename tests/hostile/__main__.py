"""``python -m tests.hostile [NAME ...]``: run all attacks, or the named ones, against real nodes; then print a table.

For each attack: its description, the node's reaction, the latency of a well-behaved client's calls as a multiple of
the baseline, and the growth of memory and open files. The exit status is 1 if a call failed, a response was wrong, or
memory or files exceeded their limit. The table is also written to build/hostile.rst.
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
            parser.error(f"{name} is not one of {', '.join(ATTACKS)}")

    def print_row(row: AttackResult) -> None:
        sys.stdout.write(line(row) + "\n")
        sys.stdout.flush()

    rows = all_of([ATTACKS[name] for name in given.names or ATTACKS], print_row)
    path = CHECKOUT / "build" / "hostile.rst"
    path.parent.mkdir(exist_ok=True)
    path.write_text(fragment(rows))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
