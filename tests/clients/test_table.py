"""Tests of gateway.clients.table: the clients of a node, whether they are awake or parked.

Tests of gateway.clients.table: when awake connections are looked at.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

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
from tests.fakes.clients import FakeNode, build_frame, build_settings, close_frame, text_frame
from tests.fakes.parked import (
    ParkingNode,
    connection_end,
    fill_send_buffer,
    read_available,
    read_close_code,
    read_frames,
    small_buffer_pair,
)

PARTIAL = text_frame(b"split")[:-2]


class NoParkingTest(SynchronousTestCase):
    """All stay awake"""

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

    def test_of_nobody(self) -> None:
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
    """Stands on a client that is parked."""

    options: dict[str, Any] = {}

    def setUp(self) -> None:
        self.node = ParkingNode(**self.options)
        self.addCleanup(self.node.close)
        self.table = self.node.table
        self.pair = small_buffer_pair()
        self.there = self.node.connect("a", self.pair)

    def assert_parked(self, *client_ids: str) -> None:
        self.assertEqual(sorted(self.node.parked.fds), sorted(client_ids))
        self.assertFalse(set(client_ids) & set(self.table.awake))


class AwakeAndParkedTest(SessionTableTestCase):
    """Who asks need not know which is which"""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.node.connect("b")
        self.other.send(PARTIAL)
        self.node.step()
        self.assert_parked("a")

    def test_all_of_them(self) -> None:
        self.assertEqual((len(self.table), self.table.parked_count()), (2, 1))
        self.assertEqual(sorted(self.table.client_ids()), ["a", "b"])
        self.assertTrue("a" in self.table and "b" in self.table and "c" not in self.table)
        self.assertEqual(
            sorted(self.table.session_infos(), key=lambda one: one.client_id),
            [SessionInfo("a", 1, 1001.0, "unix"), SessionInfo("b", 2, 1002.0, "unix")],
        )
        self.assert_parked("a")

    def test_some_who_leave_meanwhile(self) -> None:
        presences = self.table.session_infos()
        first = next(presences)
        self.node.sessions.close("a" if first.client_id == "b" else "b", 4003, "go")
        self.assertEqual(list(presences), [])

    def test_some_who_are_parked_meanwhile(self) -> None:
        presences = self.table.session_infos()
        self.other.send(text_frame(b"split")[-2:])
        self.node.advance(2)
        self.assert_parked("a", "b")
        self.assertEqual(sorted(one.client_id for one in presences), ["a", "b"])

    def test_generation_and_send(self) -> None:
        for client_id, there, generation in (("a", self.there, 1), ("b", self.other, 2)):
            self.assertEqual(self.table.generation(client_id), generation)
            self.assertEqual(self.table.send(client_id, b"x", generation), generation)
            self.assertEqual(self.table.send(client_id, b"y", 0), generation)
            self.assertEqual(self.table.send(client_id, b"no", 3), 0)
            self.node.step()
            self.assertEqual(read_frames(there), [(1, b"x"), (1, b"y")])
        self.assert_parked("a")

    def test_get(self) -> None:
        """Who wants to do anything else to it wakes it."""
        for client_id in "ab":
            client = self.table.get(client_id)
            self.assertEqual((client.client_id, client.connection.state), (client_id, 3))
            self.assertIs(self.table.get(client_id), client)
        self.assertEqual(self.table.parked_count(), 0)


class ParkTest(SessionTableTestCase):
    """When a connection is parked"""

    options = {"park_after": 5}

    def test_after_a_while(self) -> None:
        self.assertEqual(self.table.parked_count(), 0)
        self.node.advance(4)
        self.there.send(text_frame(b"{}"))
        self.node.advance(4.5)
        self.assertEqual(self.table.parked_count(), 0)
        self.node.advance(1)
        self.assert_parked("a")

    def test_a_record_that_is_no_longer_in_the_table(self) -> None:
        client = self.table.awake["a"]
        self.node.sessions.close("a", 4003, "go")
        self.assertEqual(close_code_later(self), 4003)
        self.assertTrue(self.table._park(client))
        self.assertEqual(len(self.table), 0)

    def test_a_record_that_another_took_the_place_of(self) -> None:
        """Whatever it refers to is not its own any more."""
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

    def test_busy_with_something(self) -> None:
        client = self.table.awake["a"]
        client.idle_before_park = 0.0
        self.there.send(build_frame(1, b"one", fin=False))
        self.node.advance(2)
        self.assertIn("a", self.table.awake)
        # It is whole again, and looked at in the next turn.
        self.there.send(build_frame(0, b""))
        self.node.step()
        self.assert_parked("a")

    def test_a_connection_that_can_never_be(self) -> None:
        """It is not looked at for ever."""
        node = FakeNode()
        self.node.table.add(Session("b", "unix", 9, connection=node.connect("b").protocol))
        self.assertEqual(len(self.table._idle_detector._new), 0)
        del self.table.awake["b"]

    def test_the_kernel_watches_no_more_files(self) -> None:
        """fs.epoll.max_user_watches: whoever finds no place stays awake, and nothing is lost."""
        client = self.table.awake["a"]
        parking: Any = self.node.parked
        epoll, parking._epoll = parking._epoll, FullEpoll(parking._epoll)
        client.idle_before_park = 0.0
        self.node.advance(2)
        self.assertEqual((self.table.parked_count(), list(self.table.awake)), (0, ["a"]))
        self.assertIs(self.table.awake["a"], client)
        self.assertEqual(parking._epoll.refused, 1)
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)
        self.there.send(text_frame(b"one"))
        self.node.step()
        self.assertEqual(self.node.handler.messages, [b"one"])
        self.assertEqual(self.node.sessions.send("a", b"two"), 1)
        self.node.step()
        self.assertEqual(read_frames(self.there), [(1, b"two")])
        self.assertEqual(self.node.metrics.closed, {})
        parking._epoll = epoll
        self.node.advance(PARK_RETRY_INTERVAL + 3)
        self.assert_parked("a")


class FullEpoll:
    """An epoll that takes no further files."""

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
    return read_close_code(case.there)


class WakeTest(SessionTableTestCase):
    """wake(), lost()"""

    def test_the_record_is_whole(self) -> None:
        self.there.send(PARTIAL)
        self.node.step()
        client = self.table.awake["a"]
        self.assertEqual((client.client_id, client.generation, client.connected_at), ("a", 1, 1001.0))
        self.assertEqual(
            (client.address, client.claimed, client.consecutive_bad, client.paused), ("unix", True, 0, False)
        )
        self.assertIs(client.connection._session, client)
        self.assertEqual(client.connection.last_received_at, self.node.clock.seconds())

    def test_unsent_before_the_answers_to_unread(self) -> None:
        size = fill_send_buffer(self.node.parked.fds["a"])
        # A message and a part of one: the answer is gathered, and cannot be written.
        self.node.handler.on_message = lambda payload: self.node.sessions.send("a", b"re " + payload)
        self.there.send(
            text_frame(b"one")
            + build_frame(9, b"p")
            + build_frame(1, b"two", fin=False)
            + build_frame(0, b"")
            + text_frame(b"three")
        )
        self.node.step()
        self.assertEqual(len(self.there.recv(size)), size)
        self.node.advance(2)
        expected = [(1, b"re one"), (10, b"p"), (1, b"re two"), (1, b"re three")]
        self.assertEqual(read_frames(self.there), expected)
        self.assert_parked("a")

    def test_lingers_if_it_is_busy(self) -> None:
        """To wake it and park it again for each message would take far longer than the message."""
        pieces = build_frame(1, b"one", fin=False) + build_frame(0, b"")
        self.there.send(pieces)
        self.node.step()
        self.assertIn("a", self.table.awake)
        woken = self.node.metrics.woken
        for _ in range(10):
            self.node.advance(BUSY_WINDOW - 0.25)
            self.there.send(pieces)
            self.node.step()
        self.assertEqual(self.node.metrics.woken, woken)
        self.node.advance(BUSY_WINDOW + IDLE_CHECK_INTERVAL)
        self.assert_parked("a")
        self.assertEqual(len(self.node.handler.messages), 11)

    def test_does_not_linger_if_it_was_silent(self) -> None:
        self.node.advance(BUSY_WINDOW)
        self.there.send(build_frame(1, b"one", fin=False) + build_frame(0, b""))
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
        self.there.close()
        self.node.step()
        self.assertEqual(self.node.metrics.closed, {"1006": 1})
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertEqual(self.node.handler.connection_events, [("connected", "a", 1), ("disconnected", "a", 1)])
        self.assertEqual((len(self.table), self.table.awake), (0, {}))

    def test_end_and_pause_of_another_connection(self) -> None:
        """They are fenced by its generation."""
        self.table.close_session("a", 2, 1008, "no")
        self.table.pause_session("a", 2)
        self.table.close_session("b", 1, 1008, "no")
        self.table.pause_session("b", 1)
        self.node.advance(2)
        self.assertEqual(read_available(self.there), b"")
        self.assertEqual((self.node.metrics.paused_clients, len(self.table)), (0, 1))

    def test_end(self) -> None:
        self.table.close_session("a", 1, 1008, "so")
        self.node.step()
        self.assertEqual(read_available(self.there), b"\x88\x04\x03\xf0so")
        self.there.send(close_frame(1008))
        self.node.step()
        self.assertEqual(connection_end(self.there), "end")

    def test_pause(self) -> None:
        self.table.pause_session("a", 1)
        self.assertTrue(self.table.awake["a"].paused)
        self.assertEqual(self.node.metrics.paused_clients, 1)
        self.node.advance(2)
        self.assert_parked("a")

    def test_stop(self) -> None:
        other = self.node.connect("b")
        other.send(PARTIAL)
        self.node.step()
        self.table.stop()
        self.assertEqual(connection_end(self.there), "end")
        self.assertEqual(self.node.registry.released, [("a", 1)])
        self.assertNotIn(self.node.parked, self.node.reactor.readers)
        self.patch(self.node.sessions, "stop", lambda: None)

    def test_nothing_is_left(self) -> None:
        """Many that come, are parked and woken, and go."""
        for number in range(100):
            there = self.node.connect(f"c{number % 7}", socket.socketpair())
            there.send(PARTIAL)
            self.node.step()
            there.send(text_frame(b"split")[-2:])
            if number % 3:
                self.node.advance(2)
            there.close()
            self.node.step()
        self.there.close()
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
        # The sweep's.
        self.assertEqual(len(self.node.clock.getDelayedCalls()), 1)


class RenewTest(SynchronousTestCase):
    """renew()"""

    def test_no_token_outlasts_a_certificate(self) -> None:
        """Awake or parked, until that very connection is gone."""
        node = ParkingNode()
        self.addCleanup(node.close)
        node.connect()
        generation = node.table.generation("a")
        for wished, cap, until in ((2000.0, 0.0, 2000.0), (2000.0, 1500.0, 1500.0), (1000.0, 1500.0, 1000.0)):
            self.until(node, wished, cap, until)
        self.until(node, 0.0, 1500.0, 1500.0)
        self.until(node, 0.0, 0.0, 0.0)
        self.assertFalse(node.table.renew("a", generation - 1, 1.0))
        self.assertFalse(node.table.renew("a", 0, 1.0))
        self.assertFalse(node.table.renew("b", 0, 1.0))

    def until(self, node: ParkingNode, wished: float, cap: float, until: float) -> None:
        client = node.table.get("a")
        client.max_expires_at = cap
        node.table.add(client)
        generation = client.generation
        self.assertTrue(node.table.renew("a", generation, wished))
        self.assertEqual(node.table.awake["a"].expires_at, until)
        node.step()
        self.assertEqual(node.sessions.parked_count(), 1)
        self.assertTrue(node.table.renew("a", generation, wished))
        self.assertEqual(node.table.get("a").expires_at, until)
        node.table._max_expires_at.clear()

    def test_forgotten(self) -> None:
        node = ParkingNode()
        self.addCleanup(node.close)
        there = node.connect()
        client = node.table.get("a")
        client.max_expires_at = 5.0
        node.table.add(client)
        self.assertEqual(len(node.table._max_expires_at), 1)
        there.close()
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
        """Who was looked at meanwhile."""
        self.checked.clear()
        self.clock.advance(seconds)
        return list(self.checked)

    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def test_in_the_next_turn(self) -> None:
        self.detector.watch(self.one)
        self.detector.watch(self.two)
        self.detector.watch(self.one)
        self.assertEqual(self.checked, [])
        self.assertEqual(self.timers(), 1)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)
        self.assertEqual(self.advance(10), [])

    def test_later_again(self) -> None:
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

    def test_many_are_looked_at_in_slices(self) -> None:
        clients = [Session(f"c{number}", "unix") for number in range(IDLE_CHECK_BATCH * 2 + 1)]
        self.busy = {client.client_id for client in clients}
        for client in clients:
            self.detector.watch(client)
        self.advance(0)
        turns: list[int] = []
        look = self.detector._recheck_busy

        def turn() -> None:
            before = len(self.checked)
            look()
            turns.append(len(self.checked) - before)

        self.detector._recheck_busy = turn  # type: ignore[method-assign]
        self.advance(IDLE_CHECK_INTERVAL)
        self.busy.clear()
        self.advance(IDLE_CHECK_INTERVAL)
        # The first one was set before.
        self.assertEqual(turns, [IDLE_CHECK_BATCH, 1, IDLE_CHECK_BATCH, IDLE_CHECK_BATCH, 1])
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

    def test_rested(self) -> None:
        """It is looked at in the next turn again, if it waits to be."""
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

    def test_rested_while_it_lingers(self) -> None:
        """Its time is not up."""
        self.busy = {"one"}
        self.one.idle_before_park = 1.0
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.on_idle(self.one)
        self.assertEqual(self.advance(0), [])
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_watched_again(self) -> None:
        """It is looked at once, not twice."""
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

    def test_watched_while_they_are_looked_at(self) -> None:
        """One that is woken meanwhile is not forgotten."""
        self.detector = IdleDetector(self.clock, lambda client: (self.park(client), self.again(client))[0])
        self.detector.watch(self.one)
        self.assertEqual(self.advance(0), ["one", "two"])
        self.assertEqual(self.timers(), 0)

    def again(self, session: Session) -> None:
        if session is self.one:
            self.detector.watch(self.two)

    def test_parked_while_the_others_are_looked_at(self) -> None:
        self.busy = {"one", "two"}
        self.detector = IdleDetector(self.clock, lambda client: (self.detector.discard(self.two), self.park(client))[1])
        self.detector.watch(self.one)
        self.clock.advance(0)
        self.detector.watch(self.two)
        self.clock.advance(0)
        self.assertIn("one", self.advance(IDLE_CHECK_INTERVAL))
        self.assertEqual(self.advance(IDLE_CHECK_INTERVAL), ["one"])

    def test_error(self) -> None:
        """The others do not suffer; it is looked at again, like one that is busy."""
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
