"""Tests of gateway.clients.parked: rows, parking and waking, keep-alive, and addresses."""

from __future__ import annotations

import gc
import os
import socket
import sys

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.interfaces import IReadDescriptor
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from gateway.clients.expiry import EXPIRED_REASON
from gateway.clients.interface import IParkingOwner, SessionInfo
from gateway.clients.parked import AddressColumn
from tests.builders.frames import build_frame, text_frame
from tests.builders.sockets import (
    connection_end,
    fill_send_buffer,
    read_available,
    read_frames,
    small_buffer_pair,
    tcp_pair,
    wait_readable,
)
from tests.fakes.parked import ParkedSessionsTestCase


class ParkTest(ParkedSessionsTestCase):
    """park(), session_info(), wake()"""

    def test_interfaces(self) -> None:
        verifyObject(IReadDescriptor, self.parked)
        verifyObject(IParkingOwner, self.owner)
        self.assertEqual(self.parked.logPrefix(), "parking")

    def test_unknown_client(self) -> None:
        self.assertEqual(len(self.parked), 0)
        self.assertIsNone(self.parked.session_info("a"))
        self.assertEqual(self.parked.send("a", b"{}"), 0)
        self.parked.doRead()

    def test_session_info(self) -> None:
        self.fixture.park("a", address="192.0.2.1:4711", generation=7, connected_at=1000.5)
        self.fixture.park("b", address="[2001:db8::1]:80", generation=8, connected_at=2000.5)
        self.assertEqual(self.parked.session_info("a"), SessionInfo("a", 7, 1000.5, "192.0.2.1:4711"))
        self.assertEqual(self.parked.session_info("b"), SessionInfo("b", 8, 2000.5, "[2001:db8::1]:80"))
        self.assertEqual(len(self.parked), 2)

    def test_wake(self) -> None:
        client_end = self.fixture.park("a")
        fd = self.fixture.fd()
        self.parked.wake("a")
        unparked = self.assert_woken()
        self.assertEqual((unparked.fd, unparked.family), (fd, socket.AF_UNIX))
        self.assertEqual(self.fixture.metrics.woken, 1)
        self.assertIsNone(self.parked.session_info("a"))
        # The socket works in both directions.
        os.write(unparked.fd, b"there")
        client_end.send(b"here")
        self.assertEqual((client_end.recv(9), os.read(unparked.fd, 9)), (b"there", b"here"))

    def test_values_survive(self) -> None:
        """From a session to its row, and to another session."""
        values = {
            "address": "[::ffff:192.0.2.1]:65535",
            "generation": (1 << 62) + 1,
            "connected_at": 1763885644.123456,
            "consecutive_bad": 5,
            "tat": 1000000.25,
            "pinged_at": 999990.125,
        }
        self.fixture.park("a", tcp_pair(), heard_at=999980.0625, **values)
        for _ in range(2):
            self.parked.wake("a")
            unparked = self.assert_woken()
            client = unparked.session
            self.assertEqual({name: getattr(client, name) for name in values}, values)
            self.assertEqual((client.client_id, client.claimed, client.connection), ("a", True, None))
            self.assertEqual((unparked.last_received_at, unparked.previously_received_at), (999980.0625, 999980.0625))
            self.assertEqual(unparked.family, socket.AF_INET)
            self.parked.park(client, self.owner.unparked.pop().fd, unparked.family, unparked.last_received_at)

    def test_row_is_reset_for_the_next_session(self) -> None:
        """File descriptors are reused."""
        self.fixture.park("a", fd=200, consecutive_bad=7, tat=1e9, pinged_at=1e9, address="fe80::1%eth0", generation=9)
        self.parked.wake("a")
        os.close(self.owner.unparked.pop().fd)
        self.assertEqual(self.parked._addresses._strings, {})
        self.fixture.park("b", fd=200)
        self.assertEqual(self.parked.session_info("b"), SessionInfo("b", 7, 1000.5, "192.0.2.1:4711"))
        self.parked.wake("b")
        client = self.assert_woken().session
        self.assertEqual((client.consecutive_bad, client.tat, client.pinged_at), (0, 0.0, 0.0))

    def test_columns_grow(self) -> None:
        """For a file descriptor far above those before."""
        near = self.fixture.park("a")
        far = self.fixture.park("b", fd=5000, address="[2001:db8::1]:80")
        further = self.fixture.park("c", fd=11000, address="unix")
        for client_id, client_end in (("a", near), ("b", far), ("c", further)):
            client_end.send(text_frame(client_id.encode()))
            self.assertEqual(self.parked.send(client_id, b"you"), 7)
            self.assertEqual(read_frames(client_end), [(1, b"you")])
        self.fixture.step()
        self.assertEqual(sorted(self.owner.payloads), [b"a", b"b", b"c"])
        addresses = [self.parked.session_info(client_id).address for client_id in "abc"]  # type: ignore[union-attr]
        self.assertEqual(addresses, ["192.0.2.1:4711", "[2001:db8::1]:80", "unix"])
        self.assertEqual(self.fixture.fd("c"), 11000)

    def test_no_object_per_session(self) -> None:
        """The garbage collector has nothing to traverse."""
        pairs = [socket.socketpair() for _ in range(50)]
        self.fixture.park("first")
        gc.collect()
        before = len(gc.get_objects())
        for number, pair in enumerate(pairs):
            self.fixture.park(f"c{number}", pair)
        gc.collect()
        self.assertLess(len(gc.get_objects()) - before, 10)

    def test_stop(self) -> None:
        peers = [self.fixture.park(client_id) for client_id in "abc"]
        self.parked.stop()
        self.assertEqual(sorted(client.client_id for client in self.owner.lost_sessions), ["a", "b", "c"])
        self.assertEqual([connection_end(client_end) for client_end in peers], ["end"] * 3)
        self.assertEqual(self.fixture.reactor.readers, set())
        self.assertEqual(len(self.parked), 0)
        self.assertEqual(self.parked.send("a", b"{}"), 0)
        self.addCleanup(setattr, self.fixture, "close", lambda: None)
        self.patch(self.parked, "stop", lambda: None)

    def test_reactor_stops(self) -> None:
        """It calls connectionLost() on all readers."""
        self.fixture.park("a")
        self.parked.connectionLost(None)  # type: ignore[arg-type]
        self.assertIn("a", self.parked.fds)


class UnparkTest(ParkedSessionsTestCase):
    """A socket that has left the table is not read there any more"""

    def test_no_event_after_it_was_woken(self) -> None:
        client_end = self.fixture.park("a")
        self.parked.wake("a")
        unparked = self.assert_woken()
        # A duplicate keeps the socket open after its fd is closed: then it could not be unregistered any more.
        duplicate = os.dup(unparked.fd)
        self.addCleanup(os.close, duplicate)
        client_end.send(text_frame(b"{}"))
        self.assertEqual(self.parked._epoll.poll(0), [])
        os.close(unparked.fd)
        unparked.fd = os.dup(duplicate)
        client_end.send(text_frame(b"{}"))
        client_end.shutdown(socket.SHUT_WR)
        self.assertEqual(self.parked._epoll.poll(0), [])
        self.assertEqual(self.owner.messages, [])

    def test_no_event_of_the_previous_socket_with_that_fd(self) -> None:
        client_end = self.fixture.park("a", fd=300)
        self.parked.wake("a")
        duplicate = os.dup(300)
        self.addCleanup(os.close, duplicate)
        os.close(self.owner.unparked.pop().fd)
        self.fixture.park("b", fd=300)
        client_end.send(text_frame(b"from a"))
        self.fixture.step()
        self.assertEqual(self.owner.messages, [])
        self.assertIn("b", self.parked.fds)

    def park_two(self) -> tuple[socket.socket, socket.socket]:
        """Park two sessions that are readable in one iteration, in any order."""
        peers = self.fixture.park("a"), self.fixture.park("b")
        for client_end in peers:
            client_end.send(text_frame(b"one"))
        return peers

    def test_woken_by_a_message_of_another_in_the_same_iteration(self) -> None:
        self.park_two()
        self.owner.on_message = lambda client_id, payload: self.parked.wake("b" if client_id == "a" else "a")
        self.fixture.step()
        # The first one to be read woke the other, whose bytes remain for its protocol.
        self.assertEqual(len(self.owner.messages), 1)
        unparked = self.assert_woken()
        self.assertNotEqual(unparked.session.client_id, self.owner.messages[0][0])
        self.assertEqual(os.read(unparked.fd, 100), text_frame(b"one"))

    def test_lost_by_a_message_of_another_in_the_same_iteration(self) -> None:
        """It is closed, and its file descriptor is reused, before its event is handled."""
        peers = dict(zip("ab", self.park_two(), strict=True))

        def lose_the_other(client_id: str, payload: bytes) -> None:
            other = "b" if client_id == "a" else "a"
            fd = self.fixture.fd(other)
            peers[other].close()
            self.assertEqual(self.parked.send(other, b"x" * 100000), 0)
            server_end, client_end = socket.socketpair()
            self.assertEqual(os.dup2(server_end.detach(), fd), fd)
            self.addCleanup(os.close, fd)
            self.addCleanup(client_end.close)
            client_end.send(b"a secret of somebody else")

        self.owner.on_message = lose_the_other
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), 1)
        self.assertEqual(
            [client.client_id for client in self.owner.lost_sessions], [*({"a", "b"} - {self.owner.messages[0][0]})]
        )
        self.assertEqual(self.owner.unparked, [])

    def test_fd_is_parked_again_in_the_same_iteration(self) -> None:
        """The event is that of the previous socket: the one that has its file descriptor now is not readable."""
        self.park_two()

        def replace_the_other(client_id: str, payload: bytes) -> None:
            other = "b" if client_id == "a" else "a"
            if other in self.parked.fds:
                self.parked.wake(other)
                number = self.owner.unparked.pop().fd
                os.close(number)
                self.fixture.park("c", fd=number)

        self.owner.on_message = replace_the_other
        self.fixture.step()
        self.assertEqual(len(self.owner.messages), 1)
        self.assertEqual(self.owner.lost_sessions, [])
        self.assertIn("c", self.parked.fds)


class SweepTest(ParkedSessionsTestCase):
    """sweep()"""

    def sweep(self, slices: int = 1, spare: bool = False, wall_time: float = 0.0) -> None:
        self.parked.sweep(slices, self.fixture.now, 50.0, 20.0, spare, wall_time)

    def test_expired(self) -> None:
        """Including sessions that were active just now, but not those without expiry."""
        for client_id, until in (("never", 0.0), ("soon", 1000.5), ("late", 5e9), ("over", 900.0)):
            self.fixture.park(client_id, expires_at=until)
        self.sweep(wall_time=999.0)
        close_args = (7, 1008, EXPIRED_REASON)
        self.assertEqual(self.owner.closed, [("over", *close_args)])
        self.sweep(wall_time=1000.9)
        self.assertEqual(len(self.owner.closed), 1)
        self.sweep(spare=True, wall_time=1001.0)
        self.assertEqual(self.owner.closed[1:], [("soon", *close_args)])
        self.sweep(wall_time=4e9)
        self.assertEqual(len(self.owner.closed), 2)
        self.assertEqual(self.fixture.metrics.expired, 2)
        self.assertEqual([unparked.session.expires_at for unparked in self.owner.unparked], [900, 1001])

    def test_renewed(self) -> None:
        self.fixture.park("a", expires_at=1000.0)
        self.parked.renew("a", 2000.0)
        self.sweep(wall_time=1999.0)
        self.assertEqual(self.owner.closed, [])
        self.parked.renew("a", 1500.0)
        self.sweep(wall_time=1999.0)
        self.assertEqual(len(self.owner.closed), 1)

    def test_silent(self) -> None:
        client_end = self.fixture.park("a", tcp_pair())
        self.fixture.reactor.advance(49.75)
        self.sweep()
        self.assertEqual(read_available(client_end), b"")
        self.fixture.reactor.advance(0.25)
        self.sweep()
        wait_readable(client_end.fileno())
        # Without a payload, like Autobahn's.
        self.assertEqual(read_available(client_end), b"\x89\x00")
        self.fixture.reactor.advance(19.75)
        self.sweep()
        self.assertEqual(connection_end(client_end), "open")
        self.fixture.reactor.advance(0.25)
        self.sweep()
        wait_readable(client_end.fileno())
        self.assertEqual(connection_end(client_end), "reset")
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["a"])
        self.assertEqual(self.fixture.metrics.ping_timeouts, 1)
        self.assertEqual(len(self.parked), 0)

    def test_any_byte_counts(self) -> None:
        client_end = self.fixture.park("a")
        for sign in (build_frame(10, b""), text_frame(b"{}"), build_frame(9, b"")):
            self.fixture.reactor.advance(50)
            self.sweep()
            self.assertEqual(read_frames(client_end), [(9, b"")])
            self.fixture.reactor.advance(19)
            client_end.send(sign)
            self.fixture.step()
            read_available(client_end)
            self.fixture.reactor.advance(49)
            self.sweep()
            self.assertEqual(read_available(client_end), b"")
            self.assertIn("a", self.parked.fds)
        self.assertEqual(self.fixture.metrics.ping_timeouts, 0)

    def test_forgive(self) -> None:
        client_end = self.fixture.park("a")
        for _ in range(2):
            self.fixture.reactor.advance(100)
            self.sweep(spare=True)
        self.assertIn("a", self.parked.fds)
        self.assertEqual(read_frames(client_end), [(9, b"")])
        self.sweep()
        self.assertNotIn("a", self.parked.fds)

    def test_pinged_before_it_was_parked(self) -> None:
        """The timeout continues from the ping."""
        client_end = self.fixture.park("a", heard_at=self.fixture.now - 60, pinged_at=self.fixture.now - 10)
        self.sweep()
        self.assertEqual(read_available(client_end), b"")
        self.fixture.reactor.advance(10)
        self.sweep()
        self.assertEqual(connection_end(client_end), "end")

    def test_slices(self) -> None:
        """Each row is checked once in a round, also when the table has grown."""
        for number in range(20):
            self.fixture.park(f"c{number}")
        for size in (None, 3000):
            if size:
                self.fixture.park("far", fd=size)
                # The round in progress.
                for _ in range(10):
                    self.sweep(10)
            self.fixture.reactor.advance(1000)
            pinged = []
            for _ in range(10):
                before = self.pinged()
                self.sweep(10, spare=True)
                pinged.append(self.pinged() - before)
            self.assertEqual(sum(pinged), len(self.parked) if size is None else 1)
            self.assertEqual(self.pinged(), len(self.parked))

    def pinged(self) -> int:
        pinged_at, ids = self.parked._pinged_at, self.parked._client_ids
        return sum(at > 0 for at, client_id in zip(pinged_at, ids, strict=True) if client_id)

    def test_empty_table(self) -> None:
        self.sweep()
        self.sweep(25)

    def test_ping_that_the_kernel_does_not_take(self) -> None:
        """The others are pinged nevertheless."""
        self.fixture.park("a", small_buffer_pair())
        fill_send_buffer(self.fixture.fd("a"))
        self.fixture.park("gone").close()
        client_end = self.fixture.park("b")
        self.fixture.reactor.advance(50)
        self.sweep()
        self.assert_woken(unsent=b"\x89\x00")
        self.assertEqual([client.client_id for client in self.owner.lost_sessions], ["gone"])
        self.assertEqual(read_frames(client_end), [(9, b"")])

    def test_error_of_one_session(self) -> None:
        """The others are pinged nevertheless."""
        peers = []
        for client_id in "abc":
            self.fixture.park(f"full {client_id}", small_buffer_pair())
            fill_send_buffer(self.fixture.fd(f"full {client_id}"))
            peers.append(self.fixture.park(client_id))
        self.patch(self.owner, "wake", lambda unparked: (self.owner.unparked.append(unparked), 1 / 0))
        self.fixture.reactor.advance(50)
        self.sweep()
        self.assertEqual([read_frames(client_end) for client_end in peers], [[(9, b"")]] * 3)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


ORDINARY = (
    "192.0.2.1:4711",
    "0.0.0.0:0",
    "255.255.255.255:65535",
    "127.0.0.1:1",
    "[::]:0",
    "[::1]:65535",
    "[2001:db8::1]:4711",
    "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
    "[::ffff:192.0.2.1]:80",
    "unix",
)
#: similar to usual addresses, but packing would change them
OTHERS = (
    "",
    ":",
    ":80",
    "unix:80",
    "host:80",
    "192.0.2.1",
    "192.0.2.1:",
    "192.0.2.1:080",
    "192.0.2.1:65536",
    "192.0.2.1:-1",
    "192.0.2.1: 80",
    "192.0.2.1:8_0",
    "192.0.2.1:\u0661",
    "192.0.2.1 x:80",
    "192.0.2.01:80",
    "192.0.513:80",
    "1:80",
    "0x7f.1:80",
    "[2001:DB8::1]:80",
    "[2001:db8:0:0::1]:80",
    "[2001:db8::1:80",
    "[2001:db8::1)]:80",
    "[fe80::1%eth0]:80",
    "2001:db8::1:80",
    "[192.0.2.1]:80",
    "\0:80",
    "h\u00f6st:80",
    "x" * 300,
    "1.2.3.4:" + "1" * 5000,
)


class AddressColumnTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.addresses = AddressColumn()
        self.addresses.grow(100)

    def test_round_trip(self) -> None:
        for index, address in enumerate(ORDINARY + OTHERS):
            self.addresses.set(index, address)
            self.assertEqual(self.addresses.get(index), address)
        for index, address in enumerate(ORDINARY + OTHERS):
            self.assertEqual(self.addresses.get(index), address)

    def test_only_unusual_addresses_are_stored_as_strings(self) -> None:
        for address in ORDINARY:
            self.addresses.set(3, address)
            self.assertEqual(self.addresses._strings, {}, address)
        self.addresses.set(3, "[fe80::1%eth0]:80")
        self.assertEqual(len(self.addresses._strings), 1)

    def test_overwrite(self) -> None:
        """Nothing of the previous address remains."""
        for before in ORDINARY + OTHERS:
            for address in ("192.0.2.1:4711", "[2001:db8::1]:80", "unix", "host:80"):
                self.addresses.set(3, before)
                self.addresses.set(3, address)
                self.assertEqual(self.addresses.get(3), address)
        self.addresses.set(3, "unix")
        self.assertEqual(self.addresses._strings, {})

    def test_clear(self) -> None:
        """A string does not take memory for longer than needed."""
        self.addresses.set(3, "host:80")
        self.addresses.set(4, "host:81")
        self.addresses.clear(3)
        self.addresses.clear(5)
        self.assertEqual(self.addresses._strings, {4: "host:81"})
        self.addresses.set(3, "192.0.2.1:80")
        self.assertEqual((self.addresses.get(3), self.addresses.get(4)), ("192.0.2.1:80", "host:81"))

    def test_grow(self) -> None:
        """Existing addresses remain, and the column never shrinks."""
        for index, address in enumerate(ORDINARY + OTHERS):
            self.addresses.set(index, address)
        for size in (5000, 100, 0):
            self.addresses.grow(size)
        self.addresses.set(4999, "[2001:db8::1]:80")
        for index, address in enumerate(ORDINARY + OTHERS):
            self.assertEqual(self.addresses.get(index), address)
        self.assertEqual(self.addresses.get(4999), "[2001:db8::1]:80")

    def test_only_ipv6_takes_memory_for_ipv6(self) -> None:
        for index in range(100):
            self.addresses.set(index, f"192.0.2.{index}:80")
        self.assertEqual(len(self.addresses._ipv6), 0)
        self.addresses.set(10, "[2001:db8::1]:80")
        self.assertLess(len(self.addresses._ipv6), 300)
        self.addresses.set(5, "[2001:db8::2]:80")
        self.assertEqual((self.addresses.get(10), self.addresses.get(5)), ("[2001:db8::1]:80", "[2001:db8::2]:80"))

    def test_few_bytes(self) -> None:
        self.addresses.grow(10000)
        for index in range(10000):
            self.addresses.set(index, f"10.1.{index // 250}.{index % 250}:4711")
        self.assertLess(sum(map(sys.getsizeof, (self.addresses._packed, self.addresses._ipv6))), 9 * 10000 * 1.2)

    ports = st.integers(0, 65535)

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 20),
                st.one_of(
                    st.builds("{}:{}".format, st.ip_addresses(v=4), ports),
                    st.builds("[{}]:{}".format, st.ip_addresses(v=6), ports),
                    st.text(alphabet="0123456789.:[]abcfx% u", max_size=20),
                    st.text(max_size=10),
                    st.sampled_from(ORDINARY + OTHERS),
                ),
            ),
            max_size=30,
        )
    )
    @example([(0, "[::1]:1"), (20, "[::2]:2"), (0, "unix")])
    def test_generated(self, pairs: list[tuple[int, str]]) -> None:
        """Compared with a dict."""
        addresses, expected = AddressColumn(), dict(pairs)
        for index, address in pairs:
            addresses.grow(index + 1)
            addresses.set(index, address)
        self.assertEqual({index: addresses.get(index) for index in expected}, expected)
