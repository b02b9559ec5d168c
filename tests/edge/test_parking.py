"""Tests of gateway.clients.parked: the rows, how they come and go, and keep-alive."""

from __future__ import annotations

import gc
import os
import socket

from twisted.internet.interfaces import IReadDescriptor
from zope.interface.verify import verifyObject

from gateway.clients.interface import IKeeper, Presence
from gateway.clients.keepalive import EXPIRED
from tests.edge.fakes import frame, text
from tests.edge.parked import LotTest, arrived, frames, narrow_pair, over, stuff, take, tcp_pair


class RowTest(LotTest):
    """park(), presence(), generation(), wake()"""

    def test_interfaces(self) -> None:
        verifyObject(IReadDescriptor, self.parking)
        verifyObject(IKeeper, self.keeper)
        self.assertEqual(self.parking.logPrefix(), "parking")

    def test_nobody(self) -> None:
        self.assertEqual(len(self.parking), 0)
        self.assertIsNone(self.parking.presence("a"))
        self.assertEqual(self.parking.send("a", b"{}"), 0)
        self.parking.doRead()

    def test_presence(self) -> None:
        self.lot.park("a", address="192.0.2.1:4711", generation=7, connected_at=1000.5)
        self.lot.park("b", address="[2001:db8::1]:80", generation=8, connected_at=2000.5)
        self.assertEqual(self.parking.presence("a"), Presence("a", 7, 1000.5, "192.0.2.1:4711"))
        self.assertEqual(self.parking.presence("b"), Presence("b", 8, 2000.5, "[2001:db8::1]:80"))
        self.assertEqual(len(self.parking), 2)

    def test_wake(self) -> None:
        there = self.lot.park("a")
        fd = self.lot.fd()
        self.parking.wake("a")
        leaver = self.assert_woken()
        self.assertEqual((leaver.fd, leaver.family), (fd, socket.AF_UNIX))
        self.assertEqual(self.lot.metrics.woken, 1)
        self.assertIsNone(self.parking.presence("a"))
        # The socket is whole, in both directions.
        os.write(leaver.fd, b"there")
        there.send(b"here")
        self.assertEqual((there.recv(9), os.read(leaver.fd, 9)), (b"there", b"here"))

    def test_values_survive(self) -> None:
        """From a client's record to its row, to another record, and again."""
        values = {
            "address": "[::ffff:192.0.2.1]:65535",
            "generation": (1 << 62) + 1,
            "connected_at": 1763885644.123456,
            "bad": 5,
            "full_at": 1000000.25,
            "pinged_at": 999990.125,
        }
        self.lot.park("a", tcp_pair(), heard_at=999980.0625, **values)
        for _ in range(2):
            self.parking.wake("a")
            leaver = self.assert_woken()
            client = leaver.client
            self.assertEqual({name: getattr(client, name) for name in values}, values)
            self.assertEqual((client.client_id, client.claimed, client.connection), ("a", True, None))
            self.assertEqual((leaver.heard_at, leaver.heard_before), (999980.0625, 999980.0625))
            self.assertEqual(leaver.family, socket.AF_INET)
            self.parking.park(client, self.keeper.leavers.pop().fd, leaver.family, leaver.heard_at)

    def test_a_row_is_new_to_who_comes_next(self) -> None:
        """A file descriptor is used again, and again."""
        self.lot.park("a", fd=200, bad=7, full_at=1e9, pinged_at=1e9, address="fe80::1%eth0", generation=9)
        self.parking.wake("a")
        os.close(self.keeper.leavers.pop().fd)
        self.assertEqual(self.parking._addresses._others, {})
        self.lot.park("b", fd=200)
        self.assertEqual(self.parking.presence("b"), Presence("b", 7, 1000.5, "192.0.2.1:4711"))
        self.parking.wake("b")
        client = self.assert_woken().client
        self.assertEqual((client.bad, client.full_at, client.pinged_at), (0, 0.0, 0.0))

    def test_columns_grow(self) -> None:
        """A number far beyond those before."""
        near = self.lot.park("a")
        far = self.lot.park("b", fd=5000, address="[2001:db8::1]:80")
        further = self.lot.park("c", fd=11000, address="unix")
        for client_id, there in (("a", near), ("b", far), ("c", further)):
            there.send(text(client_id.encode()))
            self.assertEqual(self.parking.send(client_id, b"you"), 7)
            self.assertEqual(frames(there), [(1, b"you")])
        self.lot.step()
        self.assertEqual(sorted(self.keeper.payloads), [b"a", b"b", b"c"])
        addresses = [self.parking.presence(client_id).address for client_id in "abc"]  # type: ignore[union-attr]
        self.assertEqual(addresses, ["192.0.2.1:4711", "[2001:db8::1]:80", "unix"])
        self.assertEqual(self.lot.fd("c"), 11000)

    def test_no_object_for_each(self) -> None:
        """The garbage collector has nothing to walk."""
        pairs = [socket.socketpair() for _ in range(50)]
        self.lot.park("first")
        gc.collect()
        before = len(gc.get_objects())
        for number, pair in enumerate(pairs):
            self.lot.park(f"c{number}", pair)
        gc.collect()
        self.assertLess(len(gc.get_objects()) - before, 10)

    def test_stop(self) -> None:
        peers = [self.lot.park(client_id) for client_id in "abc"]
        self.parking.stop()
        self.assertEqual(sorted(client.client_id for client in self.keeper.gone), ["a", "b", "c"])
        self.assertEqual([over(there) for there in peers], ["end"] * 3)
        self.assertEqual(self.lot.reactor.readers, set())
        self.assertEqual(len(self.parking), 0)
        self.assertEqual(self.parking.send("a", b"{}"), 0)
        self.addCleanup(setattr, self.lot, "close", lambda: None)
        self.patch(self.parking, "stop", lambda: None)

    def test_the_reactor_ends(self) -> None:
        """It tells whatever it watches."""
        self.lot.park("a")
        self.parking.connectionLost(None)  # type: ignore[arg-type]
        self.assertIn("a", self.parking.fds)


class HandedOverTest(LotTest):
    """A socket that has left the table is not read there any more"""

    def test_no_event_after_it_was_woken(self) -> None:
        there = self.lot.park("a")
        self.parking.wake("a")
        leaver = self.assert_woken()
        # What keeps the socket open after its number is closed: then it could not be unregistered any more.
        duplicate = os.dup(leaver.fd)
        self.addCleanup(os.close, duplicate)
        there.send(text(b"{}"))
        self.assertEqual(self.parking._epoll.poll(0), [])
        os.close(leaver.fd)
        leaver.fd = os.dup(duplicate)
        there.send(text(b"{}"))
        there.shutdown(socket.SHUT_WR)
        self.assertEqual(self.parking._epoll.poll(0), [])
        self.assertEqual(self.keeper.messages, [])

    def test_no_event_of_who_had_the_number_before(self) -> None:
        there = self.lot.park("a", fd=300)
        self.parking.wake("a")
        duplicate = os.dup(300)
        self.addCleanup(os.close, duplicate)
        os.close(self.keeper.leavers.pop().fd)
        self.lot.park("b", fd=300)
        there.send(text(b"from a"))
        self.lot.step()
        self.assertEqual(self.keeper.messages, [])
        self.assertIn("b", self.parking.fds)

    def both(self) -> tuple[socket.socket, socket.socket]:
        """Two that are handled in one turn, in whatever order."""
        peers = self.lot.park("a"), self.lot.park("b")
        for there in peers:
            there.send(text(b"one"))
        return peers

    def test_woken_by_a_message_of_another_in_the_same_turn(self) -> None:
        self.both()
        self.keeper.on_message = lambda client_id, payload: self.parking.wake("b" if client_id == "a" else "a")
        self.lot.step()
        # The first one to be read woke the other, whose bytes are left for its new owner.
        self.assertEqual(len(self.keeper.messages), 1)
        leaver = self.assert_woken()
        self.assertNotEqual(leaver.client.client_id, self.keeper.messages[0][0])
        self.assertEqual(os.read(leaver.fd, 100), text(b"one"))

    def test_lost_by_a_message_of_another_in_the_same_turn(self) -> None:
        """It is closed, and its number given to somebody else, before its event is looked at."""
        peers = dict(zip("ab", self.both(), strict=True))

        def lose_the_other(client_id: str, payload: bytes) -> None:
            other = "b" if client_id == "a" else "a"
            fd = self.lot.fd(other)
            peers[other].close()
            self.assertEqual(self.parking.send(other, b"x" * 100000), 0)
            here, there = socket.socketpair()
            self.assertEqual(os.dup2(here.detach(), fd), fd)
            self.addCleanup(os.close, fd)
            self.addCleanup(there.close)
            there.send(b"a secret of somebody else")

        self.keeper.on_message = lose_the_other
        self.lot.step()
        self.assertEqual(len(self.keeper.messages), 1)
        self.assertEqual(
            [client.client_id for client in self.keeper.gone], [*({"a", "b"} - {self.keeper.messages[0][0]})]
        )
        self.assertEqual(self.keeper.leavers, [])

    def test_parked_again_in_the_same_turn(self) -> None:
        """The event is that of another socket: there is nothing to be read from the one that has its number now."""
        self.both()

        def replace_the_other(client_id: str, payload: bytes) -> None:
            other = "b" if client_id == "a" else "a"
            if other in self.parking.fds:
                self.parking.wake(other)
                number = self.keeper.leavers.pop().fd
                os.close(number)
                self.lot.park("c", fd=number)

        self.keeper.on_message = replace_the_other
        self.lot.step()
        self.assertEqual(len(self.keeper.messages), 1)
        self.assertEqual(self.keeper.gone, [])
        self.assertIn("c", self.parking.fds)


class SweepTest(LotTest):
    """sweep()"""

    def sweep(self, slices: int = 1, spare: bool = False, today: float = 0.0) -> None:
        self.parking.sweep(slices, self.lot.now, 50.0, 20.0, spare, today)

    def test_expired(self) -> None:
        """Even those that were heard of just now; not those whose tokens are good for ever."""
        for client_id, until in (("never", 0.0), ("soon", 1000.5), ("late", 5e9), ("over", 900.0)):
            self.lot.park(client_id, until=until)
        self.sweep(today=999.0)
        why = (7, 1008, EXPIRED)
        self.assertEqual(self.keeper.ends, [("over", *why)])
        self.sweep(today=1000.9)
        self.assertEqual(len(self.keeper.ends), 1)
        self.sweep(spare=True, today=1001.0)
        self.assertEqual(self.keeper.ends[1:], [("soon", *why)])
        self.sweep(today=4e9)
        self.assertEqual(len(self.keeper.ends), 2)
        self.assertEqual(self.lot.metrics.expired, 2)
        self.assertEqual([leaver.client.until for leaver in self.keeper.leavers], [900, 1001])

    def test_renewed(self) -> None:
        self.lot.park("a", until=1000.0)
        self.parking.renew("a", 2000.0)
        self.sweep(today=1999.0)
        self.assertEqual(self.keeper.ends, [])
        self.parking.renew("a", 1500.0)
        self.sweep(today=1999.0)
        self.assertEqual(len(self.keeper.ends), 1)

    def test_silent(self) -> None:
        there = self.lot.park("a", tcp_pair())
        self.lot.reactor.advance(49.75)
        self.sweep()
        self.assertEqual(take(there), b"")
        self.lot.reactor.advance(0.25)
        self.sweep()
        arrived(there.fileno())
        # As Autobahn's own: without a payload.
        self.assertEqual(take(there), b"\x89\x00")
        self.lot.reactor.advance(19.75)
        self.sweep()
        self.assertEqual(over(there), "open")
        self.lot.reactor.advance(0.25)
        self.sweep()
        arrived(there.fileno())
        self.assertEqual(over(there), "reset")
        self.assertEqual([client.client_id for client in self.keeper.gone], ["a"])
        self.assertEqual(self.lot.metrics.ping_timeouts, 1)
        self.assertEqual(len(self.parking), 0)

    def test_any_byte_is_a_sign_of_life(self) -> None:
        there = self.lot.park("a")
        for sign in (frame(10, b""), text(b"{}"), frame(9, b"")):
            self.lot.reactor.advance(50)
            self.sweep()
            self.assertEqual(frames(there), [(9, b"")])
            self.lot.reactor.advance(19)
            there.send(sign)
            self.lot.step()
            take(there)
            self.lot.reactor.advance(49)
            self.sweep()
            self.assertEqual(take(there), b"")
            self.assertIn("a", self.parking.fds)
        self.assertEqual(self.lot.metrics.ping_timeouts, 0)

    def test_spared(self) -> None:
        there = self.lot.park("a")
        for _ in range(2):
            self.lot.reactor.advance(100)
            self.sweep(spare=True)
        self.assertIn("a", self.parking.fds)
        self.assertEqual(frames(there), [(9, b"")])
        self.sweep()
        self.assertNotIn("a", self.parking.fds)

    def test_pinged_before_it_was_parked(self) -> None:
        """The time goes on from where it was."""
        there = self.lot.park("a", heard_at=self.lot.now - 60, pinged_at=self.lot.now - 10)
        self.sweep()
        self.assertEqual(take(there), b"")
        self.lot.reactor.advance(10)
        self.sweep()
        self.assertEqual(over(there), "end")

    def test_slices(self) -> None:
        """Each is looked at once in a round, and the rounds go on when the table has grown."""
        for number in range(20):
            self.lot.park(f"c{number}")
        for size in (None, 3000):
            if size:
                self.lot.park("far", fd=size)
                # The round that was begun.
                for _ in range(10):
                    self.sweep(10)
            self.lot.reactor.advance(1000)
            pinged = []
            for _ in range(10):
                before = self.pinged()
                self.sweep(10, spare=True)
                pinged.append(self.pinged() - before)
            self.assertEqual(sum(pinged), len(self.parking) if size is None else 1)
            self.assertEqual(self.pinged(), len(self.parking))

    def pinged(self) -> int:
        pinged_at, ids = self.parking._pinged_at, self.parking._ids
        return sum(at > 0 for at, client_id in zip(pinged_at, ids, strict=True) if client_id)

    def test_of_nobody(self) -> None:
        self.sweep()
        self.sweep(25)

    def test_ping_that_the_kernel_does_not_take(self) -> None:
        """The others are pinged all the same."""
        self.lot.park("a", narrow_pair())
        stuff(self.lot.fd("a"))
        self.lot.park("gone").close()
        there = self.lot.park("b")
        self.lot.reactor.advance(50)
        self.sweep()
        self.assert_woken(unsent=b"\x89\x00")
        self.assertEqual([client.client_id for client in self.keeper.gone], ["gone"])
        self.assertEqual(frames(there), [(9, b"")])

    def test_an_error_with_one(self) -> None:
        """The others are pinged all the same."""
        peers = []
        for client_id in "abc":
            self.lot.park(f"full {client_id}", narrow_pair())
            stuff(self.lot.fd(f"full {client_id}"))
            peers.append(self.lot.park(client_id))
        self.patch(self.keeper, "wake", lambda leaver: (self.keeper.leavers.append(leaver), 1 / 0))
        self.lot.reactor.advance(50)
        self.sweep()
        self.assertEqual([frames(there) for there in peers], [[(9, b"")]] * 3)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
