"""Tests of gateway.clients.table: awake and parked sessions, and the idle detector."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.auth.interface import AuthMethod, Identity
from gateway.clients.interface import IParkingOwner, Session, SessionInfo, UnparkedSession
from gateway.clients.table import (
    BUSY_WINDOW,
    IDLE_CHECK_BATCH,
    IDLE_CHECK_INTERVAL,
    PARK_RETRY_INTERVAL,
    IdleDetector,
    SessionTable,
)
from gateway.metrics import Metrics
from gateway.registry.interface import SessionKey
from tests.builders.frames import build_frame, close_frame, text_frame
from tests.builders.sockets import (
    connection_end,
    fill_send_buffer,
    read_available,
    read_close_code,
    read_frames,
    small_buffer_pair,
)
from tests.fakes.clients import FakeNode, build_settings
from tests.fakes.parked import ParkingNode

PARTIAL = text_frame(b"split")[:-2]


class NoParkingTest(SynchronousTestCase):
    """Without parking"""

    def test_interface(self) -> None:
        table = SessionTable(
            *(lambda client_id, generation, payload: 1, lambda client, code: None, lambda client: None),
            settings=build_settings(),
            metrics=Metrics(),
        )
        verifyObject(IParkingOwner, table)
        node = ParkingNode()
        self.addCleanup(node.close)
        verifyObject(IParkingOwner, node.table)

    def test_empty_table(self) -> None:
        table: Any = FakeNode().sessions._table
        table.start()
        self.assertEqual(
            (len(table), table.client_ids(), list(table.session_infos()), table.parked_count()), (0, [], [], 0)
        )
        self.assertEqual((table.session_info("a"), table.generation("a"), table.get("a")), (None, 0, None))
        self.assertEqual(table.send("a", b"{}", 0), 0)
        self.assertNotIn("a", table)
        table.stop()

    def test_awake(self) -> None:
        node = FakeNode()
        client = node.connect("a")
        table: Any = node.sessions._table
        node.advance(10)
        self.assertEqual((len(table), table.client_ids(), table.parked_count()), (1, ["a"], 0))
        self.assertIs(table.get("a").connection, client.protocol)
        self.assertEqual(table.send("a", b"{}", 1), 1)
        table.on_idle(table.get("a"))
        self.assertEqual(node.clock.getDelayedCalls(), [])


class SessionTableTestCase(SynchronousTestCase):
    """A client that is parked."""

    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.node = ParkingNode(**self.options)
        self.addCleanup(self.node.close)
        self.table = self.node.table
        self.pair = small_buffer_pair()
        self.client_end = self.node.connect("a", self.pair)

    def assert_parked(self, *client_ids: str) -> None:
        self.assertEqual(sorted(self.node.parked.fds), sorted(client_ids))
        self.assertFalse(set(client_ids) & set(self.table.awake))


class AwakeAndParkedTest(SessionTableTestCase):
    """Queries do not depend on whether a session is parked"""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.node.connect("b")
        self.other.send(PARTIAL)
        self.node.step()
        self.assert_parked("a")

    def test_all_sessions(self) -> None:
        self.assertEqual((len(self.table), self.table.parked_count()), (2, 1))
        self.assertEqual(sorted(self.table.client_ids()), ["a", "b"])
        self.assertTrue("a" in self.table and "b" in self.table and "c" not in self.table)
        self.assertEqual(
            sorted(self.table.session_infos(), key=lambda one: one.client_id),
            [SessionInfo("a", 1, 1001.0, "unix"), SessionInfo("b", 2, 1002.0, "unix")],
        )
        self.assert_parked("a")

    def test_iteration_while_sessions_are_closed(self) -> None:
        infos = self.table.session_infos()
        first = next(infos)
        self.node.sessions.close("a" if first.client_id == "b" else "b", 4003, "go")
        self.assertEqual(list(infos), [])

    def test_iteration_while_sessions_are_parked(self) -> None:
        infos = self.table.session_infos()
        self.other.send(text_frame(b"split")[-2:])
        self.node.advance(2)
        self.assert_parked("a", "b")
        self.assertEqual(sorted(info.client_id for info in infos), ["a", "b"])

    def test_generation_and_send(self) -> None:
        for client_id, client_end, generation in (("a", self.client_end, 1), ("b", self.other, 2)):
            self.assertEqual(self.table.generation(client_id), generation)
            self.assertEqual(self.table.send(client_id, b"x", generation), generation)
            self.assertEqual(self.table.send(client_id, b"y", 0), generation)
            self.assertEqual(self.table.send(client_id, b"no", 3), 0)
            self.node.step()
            self.assertEqual(read_frames(client_end), [(1, b"x"), (1, b"y")])
        self.assert_parked("a")

    def test_get(self) -> None:
        """It wakes the session."""
        for client_id in "ab":
            client = self.table.get(client_id)
            self.assertEqual((client.client_id, client.connection.state), (client_id, 3))
            self.assertIs(self.table.get(client_id), client)
        self.assertEqual(self.table.parked_count(), 0)


class ParkTest(SessionTableTestCase):
    """When a session is parked"""

    options = {"park_after": 5}

    def test_after_a_while(self) -> None:
        self.assertEqual(self.table.parked_count(), 0)
        self.node.advance(4)
        self.client_end.send(text_frame(b"{}"))
        self.node.advance(4.5)
        self.assertEqual(self.table.parked_count(), 0)
        self.node.advance(1)
        self.assert_parked("a")

    def test_session_that_was_removed(self) -> None:
        client = self.table.awake["a"]
        self.node.sessions.close("a", 4003, "go")
        self.assertEqual(close_code_later(self), 4003)
        self.assertTrue(self.table._park(client))
        self.assertEqual(len(self.table), 0)

    def test_session_that_was_replaced(self) -> None:
        """It must not touch the socket of the newer one."""
        older = Session("a", "unix", 1, connection=self.table.awake["a"].connection)
        self.assertTrue(self.table._park(older))
        self.assertEqual((self.table.parked_count(), self.table.awake["a"].connection.state), (0, 3))

    def test_paused(self) -> None:
        client = self.table.awake["a"]
        client.idle_before_park = 0.0
        client.paused = True
        self.node.advance(2)
        self.assertIn("a", self.table.awake)
        client.paused = False
        self.node.advance(IDLE_CHECK_INTERVAL)
        self.assert_parked("a")

    def test_busy_connection(self) -> None:
        client = self.table.awake["a"]
        client.idle_before_park = 0.0
        self.client_end.send(build_frame(1, b"one", fin=False))
        self.node.advance(2)
        self.assertIn("a", self.table.awake)
        # The message is complete: it is checked in the next iteration.
        self.client_end.send(build_frame(0, b""))
        self.node.step()
        self.assert_parked("a")

    def test_connection_that_is_not_parkable(self) -> None:
        """It is not checked again and again."""
        node = FakeNode()
        self.node.table.add(Session("b", "unix", 9, connection=node.connect("b").protocol))
        self.assertEqual(len(self.table._idle_detector._new), 0)
        del self.table.awake["b"]

    def test_epoll_is_full(self) -> None:
        # It would be pinged, and dropped, meanwhile.
        self.node.sessions._keepalive.stop()
        """fs.epoll.max_user_watches: such a session stays awake, and nothing is lost."""
        client = self.table.awake["a"]
        parking: Any = self.node.parked
        epoll, parking._epoll = parking._epoll, FullEpoll(parking._epoll)
        client.idle_before_park = 0.0
        self.node.advance(2)
        self.assertEqual((self.table.parked_count(), list(self.table.awake)), (0, ["a"]))
        self.assertIs(self.table.awake["a"], client)
        self.assertEqual(parking._epoll.refused, 1)
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)
        self.client_end.send(text_frame(b"one"))
        self.node.step()
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertEqual(self.node.sessions.send("a", b"two"), 1)
        self.node.step()
        self.assertEqual(read_frames(self.client_end), [(1, b"two")])
        self.assertEqual(self.node.metrics.closed, {})
        parking._epoll = epoll
        self.node.advance(PARK_RETRY_INTERVAL + 3)
        self.assert_parked("a")


class FullEpoll:
    """An epoll that accepts no more file descriptors."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll
        self.refused = 0

    def register(self, fd: int, events: int) -> None:
        self.refused += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def close_code_later(case: SessionTableTestCase) -> int | None:
    case.node.step()
    return read_close_code(case.client_end)


class WakeTest(SessionTableTestCase):
    """wake(), connection_lost(), close_session(), pause_session()"""

    def test_session_is_complete(self) -> None:
        self.client_end.send(PARTIAL)
        self.node.step()
        client = self.table.awake["a"]
        self.assertEqual((client.client_id, client.generation, client.connected_at), ("a", 1, 1001.0))
        self.assertEqual(
            (client.address, client.claimed, client.consecutive_bad, client.paused), ("unix", True, 0, False)
        )
        self.assertIs(client.connection._session, client)
        self.assertEqual(client.connection.last_received_at, self.node.clock.seconds())

    def test_unsent_bytes_before_responses_to_unread_bytes(self) -> None:
        size = fill_send_buffer(self.node.parked.fds["a"])
        # A message and a part of one: the response is corked, and cannot be written.
        self.node.handler.on_message = lambda payload: self.node.sessions.send("a", b"re " + payload)
        self.client_end.send(
            text_frame(b"one")
            + build_frame(9, b"p")
            + build_frame(1, b"two", fin=False)
            + build_frame(0, b"")
            + text_frame(b"three")
        )
        self.node.step()
        self.assertEqual(len(self.client_end.recv(size)), size)
        self.node.advance(2)
        expected = [(1, b"re one"), (10, b"p"), (1, b"re two"), (1, b"re three")]
        self.assertEqual(read_frames(self.client_end), expected)
        self.assert_parked("a")

    def test_stays_awake_if_it_is_busy(self) -> None:
        """To wake and park it for each message would take far longer than the message."""
        pieces = build_frame(1, b"one", fin=False) + build_frame(0, b"")
        self.client_end.send(pieces)
        self.node.step()
        self.assertIn("a", self.table.awake)
        woken = self.node.metrics.woken
        for _ in range(10):
            self.node.advance(BUSY_WINDOW - 0.25)
            self.client_end.send(pieces)
            self.node.step()
        self.assertEqual(self.node.metrics.woken, woken)
        self.node.advance(BUSY_WINDOW + IDLE_CHECK_INTERVAL)
        self.assert_parked("a")
        self.assertEqual(len(self.node.handler.messages), 11)

    def test_parked_at_once_if_it_was_silent(self) -> None:
        self.node.advance(BUSY_WINDOW)
        self.client_end.send(build_frame(1, b"one", fin=False) + build_frame(0, b""))
        self.node.step()
        self.assert_parked("a")
        self.assertEqual((self.node.handler.messages, self.node.metrics.woken), ([b"one"], 1))

    def test_found_to_be_lost(self) -> None:
        self.node.advance(BUSY_WINDOW)
        self.patch(self.table, "_build_connection", self.fail_to_adopt)
        self.assertIsNone(self.table.get("a"))
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1), ("disconnected", "a", 1)])
        self.assertEqual(len(self.table), 0)

    def fail_to_adopt(self, unparked: UnparkedSession) -> None:
        os.close(unparked.fd)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    def test_lost(self) -> None:
        self.client_end.close()
        self.node.step()
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1), ("disconnected", "a", 1)])
        self.assertEqual((len(self.table), self.table.awake), (0, {}))

    def test_close_and_pause_of_another_generation(self) -> None:
        """They are fenced by the generation."""
        self.table.close_session(SessionKey("a", 2), 1008, "no")
        self.table.pause_session(SessionKey("a", 2))
        self.table.close_session(SessionKey("b", 1), 1008, "no")
        self.table.pause_session(SessionKey("b", 1))
        self.node.advance(2)
        self.assertEqual(read_available(self.client_end), b"")
        self.assertEqual((self.node.metrics.paused_clients, len(self.table)), (0, 1))

    def test_close_session(self) -> None:
        self.table.close_session(SessionKey("a", 1), 1008, "so")
        self.node.step()
        self.assertEqual(read_available(self.client_end), b"\x88\x04\x03\xf0so")
        self.client_end.send(close_frame(1008))
        self.node.step()
        self.assertEqual(connection_end(self.client_end), "end")

    def test_pause_session(self) -> None:
        self.table.pause_session(SessionKey("a", 1))
        self.assertTrue(self.table.awake["a"].paused)
        self.assertEqual(self.node.metrics.paused_clients, 1)
        self.node.advance(2)
        self.assert_parked("a")

    def test_stop(self) -> None:
        other = self.node.connect("b")
        other.send(PARTIAL)
        self.node.step()
        self.table.stop()
        self.assertEqual(connection_end(self.client_end), "end")
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertNotIn(self.node.parked, self.node.reactor.readers)
        self.patch(self.node.sessions, "stop", lambda: None)

    def test_nothing_is_left(self) -> None:
        """After many sessions were opened, parked, woken and closed."""
        for number in range(100):
            client_end = self.node.connect(f"c{number % 7}", socket.socketpair())
            client_end.send(PARTIAL)
            self.node.step()
            client_end.send(text_frame(b"split")[-2:])
            if number % 3:
                self.node.advance(2)
            client_end.close()
            self.node.step()
        self.client_end.close()
        self.node.advance(2)
        self.assertEqual(
            (len(self.table), self.table._idle_detector._new, self.table._idle_detector._busy), (0, {}, {})
        )
        self.assertEqual(self.node.reactor.readers, {self.node.parked})
        self.assertEqual(self.node.reactor.writers, set())
        self.assertEqual(len(self.node.handler.messages), 100)
        self.assertEqual(len(self.node.registry.released), 101)
        self.assertEqual(len(self.node.handler.connection_events), 202)
        self.assertEqual(self.node.factory.countConnections, 0)
        # The timer of the sweep.
        self.assertEqual(len(self.node.clock.getDelayedCalls()), 1)


class TicketIdentityTest(SynchronousTestCase):
    """ticket_identity()"""

    def test_awake_and_parked(self) -> None:
        node = ParkingNode()
        self.addCleanup(node.close)
        for client_id, method, expires_at in (("a", AuthMethod.JWT, node.wall_time + 60), ("b", AuthMethod.NONE, 0.0)):
            node.connect(client_id)
            session = node.table.get(client_id)
            session.ticket_method, session.expires_at = method, expires_at
            expected = Identity(client_id, expires_at) if method else None
            for parked in (False, True):
                self.assertEqual(client_id in node.parked.fds, parked)
                identity = node.table.ticket_identity(client_id, session.generation)
                self.assertEqual(identity, expected)
                self.assertEqual(AuthMethod.NONE if identity is None else identity.method, method)
                for generation in (0, session.generation + 1):
                    self.assertIsNone(node.table.ticket_identity(client_id, generation))
                node.advance(2)
            # Woken again, it still has the method.
            self.assertEqual(node.table.get(client_id).ticket_method, method)
        self.assertIsNone(node.table.ticket_identity("c", 1))
        self.assertIsNone(node.table.ticket_identity("c", 0))


class RenewTest(SynchronousTestCase):
    """renew()"""

    def test_limited_by_the_certificate(self) -> None:
        """Awake or parked, until that connection is closed."""
        node = ParkingNode()
        self.addCleanup(node.close)
        node.connect()
        generation = node.table.generation("a")
        for requested, limit, expected in ((2000.0, 0.0, 2000.0), (2000.0, 1500.0, 1500.0), (1000.0, 1500.0, 1000.0)):
            self.check_renewal(node, requested, limit, expected)
        self.check_renewal(node, 0.0, 1500.0, 1500.0)
        self.check_renewal(node, 0.0, 0.0, 0.0)
        self.assertFalse(node.table.renew(SessionKey("a", generation - 1), 1.0))
        self.assertFalse(node.table.renew(SessionKey("a", 0), 1.0))
        self.assertFalse(node.table.renew(SessionKey("b", 0), 1.0))

    def check_renewal(self, node: ParkingNode, requested: float, limit: float, expected: float) -> None:
        client = node.table.get("a")
        client.max_expires_at = limit
        node.table.add(client)
        generation = client.generation
        self.assertTrue(node.table.renew(SessionKey("a", generation), requested))
        self.assertEqual(node.table.awake["a"].expires_at, expected)
        node.step()
        self.assertEqual(node.sessions.parked_count(), 1)
        self.assertTrue(node.table.renew(SessionKey("a", generation), requested))
        self.assertEqual(node.table.get("a").expires_at, expected)
        node.table._max_expires_at.clear()

    def test_forgotten(self) -> None:
        node = ParkingNode()
        self.addCleanup(node.close)
        client_end = node.connect()
        client = node.table.get("a")
        client.max_expires_at = 5.0
        node.table.add(client)
        self.assertEqual(len(node.table._max_expires_at), 1)
        client_end.close()
        node.step()
        self.assertEqual((node.sessions.count(), node.table._max_expires_at), (0, {}))


class IdleDetectorTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.checked: list[str] = []
        self.busy: set[str] = set()
        self.detector = IdleDetector(self.clock, self.park)
        self.one, self.two = Session("one", "unix"), Session("two", "unix")

    def park(self, session: Session) -> bool:
        self.checked.append(session.client_id)
        if session.client_id == "broken":
            raise ZeroDivisionError
        return session.client_id not in self.busy

    def advance(self, seconds: float) -> list[str]:
        """Advance the clock; returns the sessions that were checked."""
        self.checked.clear()
        self.clock.advance(seconds)
        return list(self.checked)

    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def test_checked_in_the_next_iteration(self) -> None:
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.detector.watch(self.one)
        self.assertEqual(self.checked, [])
        self.assertEqual(self.timers(), 1)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)
        self.assertEqual(self.advance(10), [])

    def test_rechecked_later(self) -> None:
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.assertEqual(self.advance(0), ["one", "two"])
        for _ in range(3):
            self.assertEqual(self.advance(IDLE_CHECK_INTERVAL - 0.01), [])
            self.assertEqual(self.advance(0.01), ["one"])
        self.busy.clear()
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])
        self.assertEqual(self.timers(), 0)

    def test_rechecked_in_batches(self) -> None:
        clients = [Session(f"c{number}", "unix") for number in range(IDLE_CHECK_BATCH * 2 + 1)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.detector.watch(client)
        self.advance(0)
        batches: list[int] = []
        recheck = self.detector._recheck_busy

        def counted_recheck() -> None:
            before = len(self.checked)
            recheck()
            batches.append(len(self.checked) - before)

        self.detector._recheck_busy = counted_recheck  # type: ignore[method-assign]
        self.advance(IDLE_CHECK_INTERVAL)
        self.busy.clear()
        self.advance(IDLE_CHECK_INTERVAL)
        # The first timer was set before the callback was replaced.
        self.assertEqual(batches, [IDLE_CHECK_BATCH, 1, IDLE_CHECK_BATCH, IDLE_CHECK_BATCH, 1])
        self.assertEqual(self.timers(), 0)

    def test_one_timer_for_all(self) -> None:
        clients = [Session(f"c{number}", "unix") for number in range(20)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.detector.watch(client)
            self.clock.advance(0)
        self.assertEqual(self.timers(), 1)
        self.assertEqual(len(self.advance(IDLE_CHECK_INTERVAL)), 20)
        self.assertEqual(self.timers(), 1)

    def test_on_idle(self) -> None:
        """A busy session is checked in the next iteration."""
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.detector.on_idle(self.two)
        self.assertEqual(self.advance(0), ["one"])
        self.busy.clear()
        self.detector.on_idle(self.one)
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(0), ["one"])
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(10), [])
        self.assertEqual(self.timers(), 0)

    def test_on_idle_before_its_delay_has_passed(self) -> None:
        """It is not checked earlier."""
        self.busy = {"one"}
        self.one.idle_before_park = 1.0
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(0), [])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_watched_again(self) -> None:
        """It is checked once, not twice."""
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.one)
        self.assertEqual(self.advance(0), ["one"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_discard(self) -> None:
        self.busy = {"two"}
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.detector.discard(self.one)
        self.detector.discard(self.one)
        self.assertEqual(self.advance(0), ["two"])
        self.detector.discard(self.two)
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), [])
        self.detector.on_idle(self.two)
        self.assertEqual(self.advance(10), [])
        self.assertEqual(self.timers(), 0)

    def test_watched_during_the_check(self) -> None:
        """A session that is woken meanwhile is not forgotten."""
        self.detector = IdleDetector(self.clock, lambda client: (self.park(client), self.again(client))[0])
        self.detector.watch(self.one)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)

    def again(self, session: Session) -> None:
        if session is self.one:
            self.detector.watch(self.two)

    def test_parked_during_the_check(self) -> None:
        self.busy = {"one", "two"}
        self.detector = IdleDetector(self.clock, lambda client: (self.detector.discard(self.two), self.park(client))[1])
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.two)
        self.clock.advance(0)
        self.assertIn("one", self.advance(IDLE_CHECK_INTERVAL))
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_error(self) -> None:
        """The others are checked; it is rechecked like a busy one."""
        broken = Session("broken", "unix")
        for client in (broken, self.one):
            self.detector.watch(client)
        self.assertEqual(self.advance(0), ["broken", "one"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["broken"])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["broken"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_stop(self) -> None:
        self.busy = {"one"}
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.two)
        self.assertEqual(self.timers(), 2)
        self.detector.stop()
        self.detector.stop()
        self.assertEqual(self.timers(), 0)
