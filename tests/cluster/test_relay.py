"""Tests of gateway.cluster.relay."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Any

from gateway.cluster import relay as relay_module
from gateway.cluster.relay import CLOSE_TIMEOUT
from gateway.net.transport import set_protocol
from tests.builders.socket_relays import SocketRelaysCase, read_available, tcp_pair, wait_readable
from tests.builders.sockets import connection_end, fill_send_buffer, is_ready, small_buffer_pair

BIG = bytes(range(256)) * 4096


class ForwardingTest(SocketRelaysCase):
    """Bytes sent at one end arrive at the other."""

    def test_spliced_in_the_next_iteration(self) -> None:
        client, node, _ = self.start_buffered()
        self.assertEqual((self.relays.count(), self.spliced_fds()), (1, []))
        self.reactor.advance(0)
        self.assertEqual((self.relays.count(), len(self.spliced_fds())), (1, 1))
        self.assertEqual(self.metrics.relayed, 1)
        # No transport of Twisted is left.
        self.assertEqual(self.reactor.readers, {self.relays})
        self.assertEqual(self.reactor.writers, set())
        self.assertEqual((self.relays._buffered, self.reactor.getDelayedCalls()), ({}, []))
        self.assertEqual((connection_end(client), connection_end(node)), ("open", "open"))

    def test_both_ways(self) -> None:
        client, node = self.start_spliced()
        client.send(b"to the node")
        node.send(b"to the client")
        self.step(1)
        self.assertEqual((node.recv(99), client.recv(99)), (b"to the node", b"to the client"))

    def test_tcp(self) -> None:
        client, node = self.start_spliced(client=tcp_pair("::1"), node=tcp_pair())
        for sender, receiver in ((client, node), (node, client)):
            sender.send(b"said")
            client_fd, node_fd = self.spliced_fds()[0]
            wait_readable(client_fd if sender is client else node_fd)
            self.step(1)
            wait_readable(receiver.fileno())
            self.assertEqual(receiver.recv(99), b"said")

    def test_early_data_comes_first(self) -> None:
        client, node, _ = self.start_buffered(to_client=b"101 ", to_node=b"early ")
        # Also before data that arrives while the relay is not spliced yet.
        client.send(b"one ")
        node.send(b"eins ")
        self.step(1)
        client.send(b"two")
        node.send(b"zwei")
        self.step()
        self.assertEqual((read_available(client), read_available(node)), (b"101 eins zwei", b"early one two"))

    def test_large_both_ways(self) -> None:
        for pair in (socket.socketpair, tcp_pair):
            client, node = self.start_spliced(client=pair(), node=pair())
            self.assertEqual(self.pump(client, node, BIG), BIG)
            self.assertEqual(self.pump(node, client, BIG, step=5000), BIG)

    def test_thousands_of_relays(self) -> None:
        pairs = [self.start_spliced(f"client-{number}", "N") for number in range(2000)]
        self.assertEqual(self.relays.count(), 2000)
        for number, (client, node) in enumerate(pairs):
            client.send(b"c%d" % number)
            node.send(b"n%d" % number)
        self.step(20)
        for number, (client, node) in enumerate(pairs):
            self.assertEqual((client.recv(99), node.recv(99)), (b"n%d" % number, b"c%d" % number))
        for client, _ in pairs[::2]:
            client.close()
        for _, node in pairs[1::2]:
            node.close()
        self.step(20)
        for client, node in pairs:
            (node if client.fileno() < 0 else client).close()
        self.step(20)
        self.assertEqual((self.relays.count(), self.relays.endpoints(), self.relays._by_client), (0, [], {}))
        self.assertEqual((self.relays._close_timers, self.relays._unsent), ({}, {}))

    def test_unsent_data_of_the_transports(self) -> None:
        """A transport's first write is sent in the next iteration, and may not be complete then."""
        local, remote = small_buffer_pair()
        client_transport, _ = self.transport((local, remote), None)
        size = fill_send_buffer(local.fileno())
        node_transport, node = self.transport(None, None)
        relay = self.relays.create("a", "N")
        set_protocol(client_transport, relay.client)
        set_protocol(node_transport, relay.node)
        relay.start(b"101 ", b"")
        node.send(b"behind")
        self.step(2)
        self.assertEqual(len(self.spliced_fds()), 1)
        self.assertEqual(len(read_available(remote)), size)
        self.step()
        self.assertEqual(read_available(remote), b"101 behind")


class InventoryTest(SocketRelaysCase):
    """The public methods."""

    def test_endpoints(self) -> None:
        self.start_spliced("a", "M")
        self.start_spliced("b", "N")
        self.start_buffered("c", "M")
        self.assertEqual(sorted(self.relays.endpoints()), [("a", "M"), ("b", "N"), ("c", "M")])
        self.assertEqual(sorted(self.relays.client_ids()), ["a", "b", "c"])
        self.assertEqual(self.relays.count(), 3)

    def test_close(self) -> None:
        for rows in (True, False):
            client, node, _ = self.start_buffered("a", "N", to_client=b"" if rows else b"first, ")
            other, _ = self.start_spliced("b", "N")
            if rows:
                self.reactor.advance(0)
            # Bytes sent just before still arrive.
            node.send(b"close")
            client.send(b"bye")
            if not rows:
                self.reactor.step(1)
            self.assertTrue(self.relays.close("a"))
            self.step(4)
            self.assertEqual(read_available(client), b"close" if rows else b"first, close")
            self.assertEqual(read_available(node), b"bye")
            self.assertEqual(
                (connection_end(client), connection_end(node), connection_end(other)), ("end", "end", "open")
            )
            client.send(b"swallowed")
            self.step()
            client.close()
            node.close()
            self.step(4)
            self.assertEqual(self.relays.client_ids(), ["b"])
            self.relays.close("b")
            self.advance(CLOSE_TIMEOUT + 0.5)
            self.assertEqual(self.relays.count(), 0)
        self.assertFalse(self.relays.close("a"))

    def test_close_all_to_a_node(self) -> None:
        ends = [self.start_spliced(f"{node}{number}", node) for number in range(3) for node in "MN"]
        pending = self.start_buffered("M9", "M")
        self.relays.close_all_to("M")
        self.step(4)
        for number, (client, node) in enumerate(ends):
            self.assertEqual(
                (connection_end(client), connection_end(node)), ("open", "open") if number % 2 else ("end", "end")
            )
        self.assertEqual(connection_end(pending[0]), "end")
        self.advance(CLOSE_TIMEOUT + 0.5)
        self.assertEqual(sorted(self.relays.client_ids()), ["N0", "N1", "N2"])

    def test_newer_relay_of_the_same_client(self) -> None:
        """The node closes the older one; if it does not, it is closed here."""
        client, node = self.start_spliced("a", "M")
        newer, newer_node = self.start_spliced("a", "N")
        self.assertEqual(self.pump(node, client, b"4001"), b"4001")
        self.assertEqual(self.relays.count(), 2)
        self.advance(CLOSE_TIMEOUT + 0.5)
        self.assertEqual((connection_end(client), connection_end(newer)), ("end", "open"))
        self.assertEqual(self.relays.endpoints(), [("a", "N")])
        self.relays.close("a")
        self.step()
        self.assertEqual((connection_end(newer), connection_end(newer_node)), ("end", "end"))

    def test_newer_relay_before_the_older_is_spliced(self) -> None:
        older = self.start_buffered("a", "M")
        self.start_buffered("a", "N")
        self.step()
        self.assertEqual(len(self.spliced_fds()), 2)
        self.advance(CLOSE_TIMEOUT + 0.5)
        self.assertEqual(connection_end(older[0]), "end")
        self.assertEqual(self.relays.endpoints(), [("a", "N")])

    def test_stop(self) -> None:
        ends = [*self.start_spliced("a"), *self.start_buffered("b")[:2]]
        before = len(os.listdir("/proc/self/fd"))
        self.relays.stop()
        self.step()
        self.assertEqual([connection_end(end) for end in ends], ["end"] * 4)
        # Four sockets and the epoll.
        self.assertEqual(len(os.listdir("/proc/self/fd")), before - 5)
        self.assertEqual((self.relays.count(), self.reactor.getDelayedCalls()), (0, []))
        self.relays = relay_module.SocketRelays(self.reactor, self.metrics)


def renumbered(own: socket.socket, fd: int) -> socket.socket:
    """Give a socket that file descriptor."""
    with own:
        return socket.socket(fileno=os.dup2(own.fileno(), fd))


class ErrorTest(SocketRelaysCase):
    """Errors of one relay must not affect the others."""

    def test_reused_file_descriptor(self) -> None:
        """A pending event of a closed socket is not handled as one of the next socket with its number."""
        client, node = self.start_spliced("a")
        (row,) = self.spliced_fds()
        pairs = small_buffer_pair(), socket.socketpair()
        self.relays._pending_events = [(row[1], select.EPOLLHUP), (row[0], select.EPOLLHUP | select.EPOLLIN)]
        self.relays._close_now(row[0])
        moved = [(renumbered(local, fd), remote) for fd, (local, remote) in zip(row, pairs, strict=True)]
        newer, newer_node, relay = self.start_buffered("b", client=moved[0], node=moved[1])
        fill_send_buffer(relay.client.transport.fileno())
        relay.client.transport.write(b"waits")
        self.reactor.advance(0)
        self.assertEqual(self.spliced_fds(), [row])
        # The new relay's node is not read: an end of it would be handled.
        self.assertEqual(len(self.relays._unsent), 1)
        self.relays.doRead()
        self.assertEqual((self.relays._pending_events, self.relays._close_timers), ([], {}))
        read_available(newer)
        self.step()
        self.assertEqual(read_available(newer), b"waits")
        self.assertEqual(self.pump(newer_node, newer, b"on"), b"on")
        self.assertEqual((connection_end(client), connection_end(node)), ("end", "end"))

    def test_error_closes_one_relay(self) -> None:
        client, node = self.start_spliced("a")
        other, other_node = self.start_spliced("b")
        client_fd, _ = self.spliced_fds()[0]
        self.patch(self.relays, "_read", self._raise_for(client_fd, self.relays._read))
        client.send(b"x")
        other.send(b"y")
        self.step(1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertNotIn("open", (connection_end(client), connection_end(node)))
        self.assertEqual(other_node.recv(9), b"y")
        self.assertIn(self.relays, self.reactor.readers)

    def _raise_for(self, bad: int, read: Any) -> Any:
        def reading(fd: int) -> None:
            if fd == bad:
                raise ZeroDivisionError
            read(fd)

        return reading

    def test_kernel_watches_no_more_files(self) -> None:
        """The relay stays a buffered one."""

        class Full:
            def __init__(self, epoll: Any) -> None:
                self.epoll = epoll
                self.calls = 0

            def register(self, fd: int, events: int) -> None:
                self.calls += 1
                if self.calls == 2:
                    raise OSError(28, "No space left on device")
                self.epoll.register(fd, events)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.epoll, name)

        self.relays._epoll = Full(self.relays._epoll)  # type: ignore[assignment]
        client, node = self.start_spliced()
        self.assertEqual((self.spliced_fds(), self.relays.count()), ([], 1))
        client.send(b"not looked at here")
        self.assertEqual(self.relays._epoll.poll(0, 9), [])
        self.step()
        self.assertEqual(read_available(node), b"not looked at here")
        self.assertEqual(self.pump(client, node, b"said"), b"said")
        self.assertEqual(self.pump(node, client, BIG), BIG)
        node.close()
        self.step(4)
        self.assertEqual(connection_end(client), "end")

    def test_iteration_time_is_bounded(self) -> None:
        """An iteration whose time is up leaves the other events for the next one."""
        pairs = [self.start_spliced(str(number)) for number in range(5)]
        for client, _ in pairs:
            client.send(b"x")
        clock = iter(range(100))
        self.patch(self.relays, "_clock", lambda: next(clock) * relay_module.MAX_ITERATION_TIME * 0.6)
        self.relays.doRead()
        received = [bool(read_available(node)) for _, node in pairs]
        self.assertEqual(sum(received), 1)
        for _ in range(5):
            self.relays.doRead()
        self.assertTrue(all(was or read_available(node) for was, (_, node) in zip(received, pairs, strict=True)))


class BackpressureTest(SocketRelaysCase):
    """A side that does not read."""

    def test_sender_is_not_read(self) -> None:
        for pair in (socket.socketpair, tcp_pair):
            client, node = self.start_spliced(client=pair(), node=pair())
            sent = 0
            for _ in range(2000):
                try:
                    sent += client.send(BIG[:100_000])
                except BlockingIOError:
                    if not is_ready(client.fileno(), select.POLLOUT, 0.01):
                        break
                self.step(1)
            kept = sum(map(len, self.relays._unsent.values()))
            self.assertTrue(0 < kept <= relay_module.READ_SIZE, kept)
            # There are no events meanwhile.
            self.assertEqual(self.relays._epoll.poll(0, 10), [])
            # The other direction is not affected.
            self.assertEqual(self.pump(node, client, b"meanwhile"), b"meanwhile")
            # It continues where it stopped.
            received = 0
            while received < sent:
                self.step(1)
                received += len(read_available(node))
            self.assertEqual(received, sent)
            self.assertEqual(self.relays._unsent, {})
            self.assertEqual(self.pump(client, node, b"on"), b"on")

    def stuck(self) -> tuple[socket.socket, socket.socket]:
        """Start a relay whose client reads nothing, with more bytes from its node than fit."""
        client, node = self.start_spliced(client=small_buffer_pair(), node=socket.socketpair())
        self.sent = 0
        for _ in range(100):
            try:
                self.sent += node.send(BIG[:50_000])
            except BlockingIOError:
                break
            self.step(1)
        self.step()
        self.assertEqual(len(self.relays._unsent), 1)
        return client, node

    def test_sender_is_lost_while_the_receiver_does_not_read(self) -> None:
        client, node = self.stuck()
        node.close()
        self.step()
        self.assertEqual(self.relays._epoll.poll(0, 10), [])
        self.assertEqual(self.relays.count(), 1)
        self.advance(CLOSE_TIMEOUT + 0.5)
        self.assertEqual((self.relays.count(), self.relays._unsent), (0, {}))
        read_available(client)
        self.assertEqual(connection_end(client), "end")

    def test_sender_is_lost_and_the_receiver_reads_the_rest(self) -> None:
        client, node = self.stuck()
        node.close()
        self.step()
        received = 0
        for _ in range(200):
            received += len(read_available(client))
            self.step(1)
        self.assertEqual(received, self.sent)
        self.assertEqual(connection_end(client), "end")
        client.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)

    def test_closed_while_the_receiver_does_not_read(self) -> None:
        """The bytes that were read arrive, and then the end."""
        client, node = self.stuck()
        ((_, unsent),) = self.relays._unsent.items()
        self.relays.close("a")
        received = b""
        for _ in range(20):
            received += read_available(client)
            self.step(1)
        self.assertTrue(received.endswith(unsent))
        self.assertEqual(connection_end(client), "end")
        client.close()
        node.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)

    def test_receiver_is_lost(self) -> None:
        client, node = self.stuck()
        client.close()
        self.step()
        self.assertEqual(self.relays._unsent, {})
        self.assertEqual(connection_end(node), "end")
        node.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)


class CloseTest(SocketRelaysCase):
    """Either side closes."""

    def assert_closed(self, *kinds: Any) -> Any:
        for pair in kinds or (socket.socketpair, tcp_pair):
            for first in (0, 1):
                before = self.fds()
                both = self.start_spliced(client=pair(), node=pair())
                ((*fds,),) = self.fds() - before
                yield both[first], both[1 - first], fds[first]

    def test_last_bytes_and_end_arrive(self) -> None:
        for one, other, fd in self.assert_closed():
            one.send(BIG[:30_000])
            one.close()
            wait_readable(fd)
            self.assert_received(other, BIG[:30_000])
            other.close()
            self.let_close()
            self.assertEqual(self.relays.count(), 0)

    def let_close(self) -> None:
        """Run iterations until no more bytes arrive."""
        for _ in range(100):
            self.step(1)
            if not self.relays.count():
                break
            is_ready(self.relays.fileno(), select.POLLIN, 0.05)

    def test_half_closed(self) -> None:
        """A side that has sent its end can still receive."""
        for one, other, _ in self.assert_closed():
            one.send(b"all")
            one.shutdown(socket.SHUT_WR)
            self.assert_received(other, b"all")
            other.send(b"the answer")
            other.close()
            self.assert_received(one, b"the answer")
            self.let_close()
            self.assertEqual(self.relays.count(), 0)

    def assert_received(self, receiver: socket.socket, expected: bytes) -> None:
        received = b""
        for _ in range(100):
            self.step(1)
            if is_ready(receiver.fileno(), select.POLLIN, 0.05):
                data = receiver.recv(1 << 20)
                if not data:
                    self.assertEqual(received, expected)
                    return
                received += data
        self.fail(f"no end after {received[:99]!r}")

    def test_no_reset_with_bytes_in_flight(self) -> None:
        """The node closes while bytes of the client are unread here: the client still gets the node's last bytes."""
        client, node = self.start_spliced(client=tcp_pair(), node=tcp_pair())
        ((near, far),) = self.fds()
        node.send(b"last words")
        node.shutdown(socket.SHUT_WR)
        wait_readable(far)
        client.send(BIG[:200_000])
        wait_readable(near)
        for _ in range(20):
            self.step(1)
        node.close()
        for _ in range(20):
            client.setblocking(False)
            try:
                client.send(b"more")
            except OSError:
                break
            self.step(1)
        wait_readable(client.fileno())
        self.assertEqual(client.recv(99), b"last words")
        self.assertEqual(client.recv(99), b"")

    def test_other_side_does_not_close(self) -> None:
        for one, other, fd in self.assert_closed():
            one.close()
            wait_readable(fd)
            self.step()
            self.assertEqual(self.relays.count(), 1)
            # There are no busy events meanwhile, and its input is discarded.
            self.assertEqual(self.relays._epoll.poll(0, 10), [])
            for _ in range(5):
                other.send(b"still there")
                is_ready(self.relays.fileno(), select.POLLIN, 0.05)
                self.step()
            self.advance(CLOSE_TIMEOUT + 0.5)
            self.assertEqual(self.relays.count(), 0)

    def test_reset(self) -> None:
        for one, other, fd in self.assert_closed(tcp_pair):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.send(b"last")
            wait_readable(fd)
            self.step(1)
            one.close()
            self.assert_received(other, b"last")
            other.close()
            self.let_close()
            self.assertEqual(self.relays.count(), 0)

    def test_both_close_at_once(self) -> None:
        client, node = self.start_spliced()
        client.close()
        node.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_closed_before_it_is_spliced(self) -> None:
        for first in (0, 1):
            both = self.start_buffered(to_client=b"to the client", to_node=b"to the node")[:2]
            both[first].send(b", said")
            both[first].close()
            self.step(6)
            self.assertEqual(read_available(both[1 - first]), (b"to the node, said", b"to the client, said")[first])
            self.assertEqual(connection_end(both[1 - first]), "end")
            both[1 - first].close()
            self.step(3)
            self.assertEqual(self.relays.count(), 0)


class BufferedCloseTest(CloseTest):
    """The same for a relay that stays a buffered one."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(self.relays, "splice", lambda *args: False)

    def test_half_closed(self) -> None:
        """Twisted closes the connection, as it does for a client that is not relayed."""
        for one, other, _ in self.assert_closed():
            one.send(b"all")
            one.shutdown(socket.SHUT_WR)
            self.assert_received(other, b"all")
            other.close()
            self.assert_received(one, b"")
            self.let_close()
            self.assertEqual(self.relays.count(), 0)
