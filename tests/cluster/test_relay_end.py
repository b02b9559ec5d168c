"""Tests of gateway.cluster.relay: a side that does not read, and how either side ends."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

from gateway.cluster import relay as relay_module
from gateway.cluster.relay import CLOSE_TIMEOUT
from tests.cluster.relayed_pairs import SocketRelaysCase, read_available, tcp_pair, wait_readable
from tests.edge.parked import connection_end, is_ready, small_buffer_pair

BIG = bytes(range(256)) * 4096


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
            # Nothing turns in the meantime.
            self.assertEqual(self.relays._epoll.poll(0, 10), [])
            # The other direction is not concerned.
            self.assertEqual(self.pump(node, client, b"meanwhile"), b"meanwhile")
            # It goes on where it stopped.
            received = 0
            while received < sent:
                self.step(1)
                received += len(read_available(node))
            self.assertEqual(received, sent)
            self.assertEqual(self.relays._unsent, {})
            self.assertEqual(self.pump(client, node, b"on"), b"on")

    def stuck(self) -> tuple[socket.socket, socket.socket]:
        """A relay whose client takes nothing, while its node has said more."""
        client, node = self.start_spliced(client=small_buffer_pair(), node=socket.socketpair())
        self.said = 0
        for _ in range(100):
            try:
                self.said += node.send(BIG[:50_000])
            except BlockingIOError:
                break
            self.step(1)
        self.step()
        self.assertEqual(len(self.relays._unsent), 1)
        return client, node

    def test_sender_is_lost_while_nothing_is_taken(self) -> None:
        client, node = self.stuck()
        node.close()
        self.step()
        self.assertEqual(self.relays._epoll.poll(0, 10), [])
        self.assertEqual(self.relays.count(), 1)
        self.advance(CLOSE_TIMEOUT + 0.5)
        self.assertEqual((self.relays.count(), self.relays._unsent), (0, {}))
        read_available(client)
        self.assertEqual(connection_end(client), "end")

    def test_sender_is_lost_and_the_rest_is_taken_in_time(self) -> None:
        client, node = self.stuck()
        node.close()
        self.step()
        received = 0
        for _ in range(200):
            received += len(read_available(client))
            self.step(1)
        self.assertEqual(received, self.said)
        self.assertEqual(connection_end(client), "end")
        client.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)

    def test_asked_to_end_while_nothing_is_taken(self) -> None:
        """What was read arrives, and then the end."""
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
    """Either side ends."""

    def assert_closed(self, *kinds: Any) -> Any:
        for pair in kinds or (socket.socketpair, tcp_pair):
            for first in (0, 1):
                before = self.fds()
                both = self.start_spliced(client=pair(), node=pair())
                ((*fds,),) = self.fds() - before
                yield both[first], both[1 - first], fds[first]

    def test_the_last_bytes_arrive_and_the_end(self) -> None:
        for one, other, fd in self.assert_closed():
            one.send(BIG[:30_000])
            one.close()
            wait_readable(fd)
            self.assert_received(other, BIG[:30_000])
            other.close()
            self.let_close()
            self.assertEqual(self.relays.count(), 0)

    def let_close(self) -> None:
        """Take turns until nothing comes any more."""
        for _ in range(100):
            self.step(1)
            if not self.relays.count():
                break
            is_ready(self.relays.fileno(), select.POLLIN, 0.05)

    def test_half_closed(self) -> None:
        """Who has said all may still hear."""
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

    def test_no_reset_destroys_what_is_on_its_way(self) -> None:
        """The node closes with bytes of the client's unread at this end: the client reads its last words all the same."""
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

    def test_other_side_does_not_end(self) -> None:
        for one, other, fd in self.assert_closed():
            one.close()
            wait_readable(fd)
            self.step()
            self.assertEqual(self.relays.count(), 1)
            # It does not turn meanwhile, and swallows what comes.
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

    def test_both_at_once(self) -> None:
        client, node = self.start_spliced()
        client.close()
        node.close()
        self.step()
        self.assertEqual(self.relays.count(), 0)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_before_it_is_two_rows(self) -> None:
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
    """The same where it stays with Twisted."""

    def setUp(self) -> None:
        super().setUp()
        self.patch(self.relays, "splice", lambda *args: False)

    def test_half_closed(self) -> None:
        """Twisted takes that for the end, as it does of a client that is not relayed."""
        for one, other, _ in self.assert_closed():
            one.send(b"all")
            one.shutdown(socket.SHUT_WR)
            self.assert_received(other, b"all")
            other.close()
            self.assert_received(one, b"")
            self.let_close()
            self.assertEqual(self.relays.count(), 0)
