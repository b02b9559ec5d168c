"""Run one attack in a separate process: ``python -m tests.hostile.attacker NAME SECONDS MANY``, the target on stdin.

It has a lower priority than the well-behaved pair on the same core, so that it slows them down only through the node.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from tests.hostile import attacks
from tests.hostile.attack import ATTACKS, Size, Target

#: niceness of attackers
NICENESS = 5


def lower_priority() -> None:
    """Run at a lower priority, on the core that the node does not use."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[min(1, len(cores) - 1)]])
    os.nice(NICENESS)


def main() -> None:
    attacks.load()
    name, seconds, many = sys.argv[1:]
    target = json.loads(sys.stdin.read())
    target["secret"] = target["secret"].encode()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lower_priority()
    seen = ATTACKS[name].run(Target(**target), Size(int(many), float(seconds)))
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main()
