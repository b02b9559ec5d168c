#!/bin/sh
# trial: a delayed call that a SynchronousTestCase leaves on the reactor fails the next asynchronous test instead.
#
# Version:   Twisted 26.10.0 (PyPI), CPython 3.11
# Behavior:  The check for a clean reactor belongs to twisted.trial.unittest.TestCase. A SynchronousTestCase skips it, so a
#            test that leaves a delayed call passes, and whichever TestCase runs next in that process fails with
#            DirtyReactorAggregateError. With --jobs the victim changes from run to run.
# Guess:     the check is per test: the test that leaves the call fails, or, without the check, no test does.
# Source:    twisted/trial/_asynctest.py (TestCase._cleanUp, _deferRunCleanups), twisted/trial/util.py (_Janitor)
# Output:
#            test_leaves_a_call ... [OK]
#            test_does_nothing ... [ERROR]
#
# To find the culprit, run the failing module after each module of synchronous tests that precedes it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check Twisted==26.10.0
cat >"$folder/test_order.py" <<'PYTHON'
from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase, TestCase


class ATests(SynchronousTestCase):
    def test_leaves_a_call(self):
        reactor.callLater(60, lambda: None)


class BTests(TestCase):
    def test_does_nothing(self):
        pass
PYTHON
cd "$folder"
"$folder/venv/bin/python" -m twisted.trial test_order >"$folder/log" 2>&1 || true
sed -n 's/^ *\(test_[a-z_]*\) \.\.\. *\(\[[A-Z]*\]\)$/\1 ... \2/p' "$folder/log" >"$folder/output"
cat "$folder/output"
diff - "$folder/output" <<'EXPECTED'
test_leaves_a_call ... [OK]
test_does_nothing ... [ERROR]
EXPECTED
