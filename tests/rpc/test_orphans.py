"""Tests for :mod:`gateway.rpc.orphans`."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.metrics import Metrics
from gateway.registry.errors import RegistryUnavailableError
from gateway.registry.interface import Location, SessionKey
from gateway.rpc.handoff import HANDOFF_TIMEOUT, HandoffTracker
from gateway.rpc.interface import IOrphanedRows
from gateway.rpc.orphans import LOG_INTERVAL, MAX_IN_PROGRESS, MAX_WAITING, OrphanedRows
from tests.builders.dispatcher import remote_location
from tests.fakes.rpc import FakeClientSessions, FakeRegistry

KEY = SessionKey("x", 7)


class OrphanedRowsTests(SynchronousTestCase):
    """The registry has the row of generation 7 of client x, which is not connected here."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.sessions = FakeClientSessions()
        self.registry = FakeRegistry()
        self.registry.result = remote_location("this-node")
        self.handoffs = HandoffTracker(self.clock)
        self.orphaned_rows = OrphanedRows(
            node_id="this-node",
            sessions=self.sessions,
            registry=self.registry,  # type: ignore[arg-type]
            handoffs=self.handoffs,
            clock=self.clock,
            metrics=self.metrics,
        )

    def assert_released(self, expected: bool, key: SessionKey = KEY) -> None:
        """Check the row, and assert whether it is released."""
        self.registry.released.clear()
        self.assertIs(self.successResultOf(self.orphaned_rows.check(key)), expected)
        self.assertEqual(self.registry.released, [key] if expected else [])
        self.assertEqual(len(self.orphaned_rows), 0)

    def test_interface(self) -> None:
        verifyObject(IOrphanedRows, self.orphaned_rows)

    def test_row_without_a_session(self) -> None:
        with capturedLogs() as logs:
            self.assert_released(True)
            self.assert_released(True)
            self.clock.advance(LOG_INTERVAL)
            self.assert_released(True)
        self.assertEqual(self.metrics.orphaned_rows, 3)
        self.assertEqual([log["log_level"] for log in logs], [LogLevel.warn] * 2)
        self.assertIn("'x', which is not connected to this node (1 more", logs[1]["log_format"].format(**logs[1]))

    def test_row_that_is_not_this_session(self) -> None:
        for row in (
            None,
            remote_location("other-node"),
            remote_location("this-node", generation=6),
            remote_location("this-node", generation=8),
        ):
            self.registry.result = row
            self.assert_released(False)
        self.assertEqual(self.metrics.orphaned_rows, 0)

    def test_session_is_open(self) -> None:
        """A newer one, too: its claim has replaced the row, or the audit restores it."""
        for generation in (7, 8):
            self.sessions.generations["x"] = generation
            self.assert_released(False)
        self.assertEqual(self.registry.queries, [])

    def test_older_session_is_claimed_again(self) -> None:
        self.sessions.generations["x"] = 6
        self.assert_released(True)
        self.assertEqual(self.sessions.restored, [KEY])

    def test_claim_in_progress(self) -> None:
        """The row may be that of the claim, whose outcome is not known yet."""
        self.sessions.claiming["x"] = []
        self.assert_released(False)
        self.sessions.generations["x"] = 6
        self.assert_released(False)
        self.assertEqual((self.registry.queries, self.sessions.claiming), ([], {"x": []}))
        self.sessions.finish_claim("x")
        self.assert_released(True)

    def test_registry_is_writing(self) -> None:
        """The row is removed, or replaced, without this."""
        self.registry.writing.add(KEY)
        self.assert_released(False)
        self.assertEqual(self.registry.queries, [])

    def test_handoff(self) -> None:
        """The row of the closed connection is kept until the client has had time to connect elsewhere."""
        self.handoffs.start(KEY)
        self.handoffs.disconnected(KEY)
        self.assert_released(False)
        self.clock.advance(HANDOFF_TIMEOUT)
        self.assert_released(True)

    def test_what_happens_during_the_look_up(self) -> None:
        def connect() -> None:
            self.sessions.generations["x"] = 7

        def claim() -> None:
            self.sessions.claiming["x"] = []

        def write() -> None:
            self.registry.writing.add(KEY)

        for event in (connect, claim, write):
            found: Deferred[Location | None] = Deferred()
            self.registry.result = found
            checked = self.orphaned_rows.check(KEY)
            event()
            found.callback(remote_location("this-node"))
            self.assertIs(self.successResultOf(checked), False)
            self.sessions.generations.clear()
            self.sessions.claiming.clear()
            self.registry.writing.clear()
        self.assertEqual(self.registry.released, [])

    def test_registry_is_unavailable(self) -> None:
        self.registry.result = RegistryUnavailableError("away")
        self.assert_released(False)
        self.registry.result = remote_location("this-node")
        self.registry.release_result = RegistryUnavailableError("away; the release is queued")
        self.assertIs(self.successResultOf(self.orphaned_rows.check(KEY)), False)
        self.registry.release_result = ZeroDivisionError()
        self.assertIs(self.successResultOf(self.orphaned_rows.check(KEY)), False)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(self.metrics.orphaned_rows, 0)

    def test_one_check_of_a_row_at_a_time(self) -> None:
        self.registry.release_result = Deferred()
        checks = [self.orphaned_rows.check(KEY) for _ in range(3)]
        checks[0].addErrback(lambda _: None).cancel()
        self.assertEqual((self.registry.queries, self.registry.released), (["x"], [KEY]))
        self.assertNoResult(checks[1])
        self.registry.release_result.callback(None)
        self.assertEqual([self.successResultOf(check) for check in checks], [None, True, True])

    def test_bounds(self) -> None:
        self.registry.result = Deferred()
        checks = [self.orphaned_rows.check(SessionKey(f"c{number}", 7)) for number in range(MAX_IN_PROGRESS)]
        self.assertIs(self.successResultOf(self.orphaned_rows.check(KEY)), False)
        checks += [self.orphaned_rows.check(SessionKey("c0", 7)) for _ in range(MAX_WAITING - 1)]
        self.assertIs(self.successResultOf(self.orphaned_rows.check(SessionKey("c0", 7))), False)
        self.assertNoResult(checks[-1])
        self.assertEqual((len(self.registry.queries), len(self.orphaned_rows)), (MAX_IN_PROGRESS,) * 2)
