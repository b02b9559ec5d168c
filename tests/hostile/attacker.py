"""One attack, in a process of its own: ``python -m tests.hostile.attacker NAME SECONDS MANY``, the target on stdin.

The well-behaved go before it where both want the same core, so that it does not slow them down by itself.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from tests.hostile import attacks
from tests.hostile.attack import ATTACKS, Size, Target

#: how nice attackers are to the well-behaved
NICENESS = 5


def lower_priority() -> None:
    """Let others go first, on the core that is not the node's."""
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
