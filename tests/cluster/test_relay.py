"""Tests of gateway.cluster.relay: bytes between two sockets, both ways, until either ends."""

from __future__ import annotations

import os
import select
import socket
from typing import Any

from gateway.cluster import relay as relay_module
from gateway.cluster.relay import END_TIMEOUT
from gateway.net.transport import succeed
from tests.cluster.relayed_pairs import RelaysTest, arrived, take, tcp_pair
from tests.edge.parked import narrow_pair, over, stuff

BIG = bytes(range(256)) * 4096


class BytesTest(RelaysTest):
    """What is said at one end is heard at the other."""

    def test_becomes_two_rows_at_once(self) -> None:
        client, node, _ = self.begin()
        self.assertEqual((self.relays.count(), self.rows()), (1, []))
        self.reactor.advance(0)
        self.assertEqual((self.relays.count(), len(self.rows())), (1, 1))
        self.assertEqual(self.metrics.relayed, 1)
        # Nothing of Twisted's is left.
        self.assertEqual(self.reactor.readers, {self.relays})
        self.assertEqual(self.reactor.writers, set())
        self.assertEqual((self.relays._pipes, self.reactor.getDelayedCalls()), ({}, []))
        self.assertEqual((over(client), over(node)), ("open", "open"))

    def test_both_ways(self) -> None:
        client, node = self.relay()
        client.send(b"to the node")
        node.send(b"to the client")
        self.step(1)
        self.assertEqual((node.recv(99), client.recv(99)), (b"to the node", b"to the client"))

    def test_tcp(self) -> None:
        client, node = self.relay(client=tcp_pair("::1"), node=tcp_pair())
        for sender, receiver in ((client, node), (node, client)):
            sender.send(b"said")
            near, far = self.rows()[0]
            arrived(near if sender is client else far)
            self.step(1)
            arrived(receiver.fileno())
            self.assertEqual(receiver.recv(99), b"said")

    def test_what_came_before_comes_first(self) -> None:
        client, node, _ = self.begin(to_client=b"101 ", to_node=b"early ")
        # Also of what comes while it is not yet two rows.
        client.send(b"one ")
        node.send(b"eins ")
        self.step(1)
        client.send(b"two")
        node.send(b"zwei")
        self.step()
        self.assertEqual((take(client), take(node)), (b"101 eins zwei", b"early one two"))

    def test_large_both_ways(self) -> None:
        for pair in (socket.socketpair, tcp_pair):
            client, node = self.relay(client=pair(), node=pair())
            self.assertEqual(self.pump(client, node, BIG), BIG)
            self.assertEqual(self.pump(node, client, BIG, step=5000), BIG)

    def test_thousands(self) -> None:
        pairs = [self.relay(f"client-{number}", "N") for number in range(2000)]
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
        self.assertEqual((self.relays.count(), self.relays.pairs(), self.relays._relays), (0, [], {}))
        self.assertEqual((self.relays._endings, self.relays._unsent), ({}, {}))

    def test_what_was_not_sent_when_it_became_rows(self) -> None:
        """A transport's first write leaves only in the next turn, and may not leave then."""
        here, there = narrow_pair()
        client_transport, _ = self.transport((here, there), None)
        size = stuff(here.fileno())
        node_transport, node = self.transport(None, None)
        pipe = self.relays.begin("a", "N")
        succeed(client_transport, pipe.client)
        succeed(node_transport, pipe.node)
        pipe.go(b"101 ", b"")
        node.send(b"behind")
        self.step(2)
        self.assertEqual(len(self.rows()), 1)
        self.assertEqual(len(take(there)), size)
        self.step()
        self.assertEqual(take(there), b"101 behind")


class AskedTest(RelaysTest):
    """What others ask of it."""

    def test_who_is_there(self) -> None:
        self.relay("a", "M")
        self.relay("b", "N")
        self.begin("c", "M")
        self.assertEqual(sorted(self.relays.pairs()), [("a", "M"), ("b", "N"), ("c", "M")])
        self.assertEqual(sorted(self.relays.client_ids()), ["a", "b", "c"])
        self.assertEqual(self.relays.count(), 3)

    def test_end_one(self) -> None:
        for rows in (True, False):
            client, node, _ = self.begin("a", "N", to_client=b"" if rows else b"first, ")
            other, _ = self.relay("b", "N")
            if rows:
                self.reactor.advance(0)
            # What was said just before arrives.
            node.send(b"close")
            client.send(b"bye")
            if not rows:
                self.reactor.step(1)
            self.assertTrue(self.relays.end("a"))
            self.step(4)
            self.assertEqual(take(client), b"close" if rows else b"first, close")
            self.assertEqual(take(node), b"bye")
            self.assertEqual((over(client), over(node), over(other)), ("end", "end", "open"))
            client.send(b"swallowed")
            self.step()
            client.close()
            node.close()
            self.step(4)
            self.assertEqual(self.relays.client_ids(), ["b"])
            self.relays.end("b")
            self.advance(END_TIMEOUT + 0.5)
            self.assertEqual(self.relays.count(), 0)
        self.assertFalse(self.relays.end("a"))

    def test_end_all_of_a_node(self) -> None:
        ends = [self.relay(f"{node}{number}", node) for number in range(3) for node in "MN"]
        pending = self.begin("M9", "M")
        self.relays.end_all("M")
        self.step(4)
        for number, (client, node) in enumerate(ends):
            self.assertEqual((over(client), over(node)), ("open", "open") if number % 2 else ("end", "end"))
        self.assertEqual(over(pending[0]), "end")
        self.advance(END_TIMEOUT + 0.5)
        self.assertEqual(sorted(self.relays.client_ids()), ["N0", "N1", "N2"])

    def test_newer_relay_of_the_same_client(self) -> None:
        """The node closes the older one; if it does not, it is closed here."""
        client, node = self.relay("a", "M")
        newer, newer_node = self.relay("a", "N")
        self.assertEqual(self.pump(node, client, b"4001"), b"4001")
        self.assertEqual(self.relays.count(), 2)
        self.advance(END_TIMEOUT + 0.5)
        self.assertEqual((over(client), over(newer)), ("end", "open"))
        self.assertEqual(self.relays.pairs(), [("a", "N")])
        self.relays.end("a")
        self.step()
        self.assertEqual((over(newer), over(newer_node)), ("end", "end"))

    def test_newer_one_before_the_older_is_two_rows(self) -> None:
        older = self.begin("a", "M")
        self.begin("a", "N")
        self.step()
        self.assertEqual(len(self.rows()), 2)
        self.advance(END_TIMEOUT + 0.5)
        self.assertEqual(over(older[0]), "end")
        self.assertEqual(self.relays.pairs(), [("a", "N")])

    def test_stop(self) -> None:
        ends = [*self.relay("a"), *self.begin("b")[:2]]
        before = len(os.listdir("/proc/self/fd"))
        self.relays.stop()
        self.step()
        self.assertEqual([over(end) for end in ends], ["end"] * 4)
        # Four sockets and the epoll.
        self.assertEqual(len(os.listdir("/proc/self/fd")), before - 5)
        self.assertEqual((self.relays.count(), self.reactor.getDelayedCalls()), (0, []))
        self.relays = relay_module.Relays(self.reactor, self.metrics)


def renumbered(own: socket.socket, fd: int) -> socket.socket:
    """The same socket by that number."""
    with own:
        return socket.socket(fileno=os.dup2(own.fileno(), fd))


class TroubleTest(RelaysTest):
    """What must not end all the others."""

    def test_number_goes_to_another_relay(self) -> None:
        """An event of a socket that was closed since is not taken for the next one's that has its number."""
        client, node = self.relay("a")
        (row,) = self.rows()
        pairs = narrow_pair(), socket.socketpair()
        self.relays._events = [(row[1], select.EPOLLHUP), (row[0], select.EPOLLHUP | select.EPOLLIN)]
        self.relays._close(row[0])
        moved = [(renumbered(here, fd), there) for fd, (here, there) in zip(row, pairs, strict=True)]
        newer, newer_node, pipe = self.begin("b", client=moved[0], node=moved[1])
        stuff(pipe.client.transport.fileno())
        pipe.client.transport.write(b"waits")
        self.reactor.advance(0)
        self.assertEqual(self.rows(), [row])
        # Its node is not read: an end of it would be taken for what it is.
        self.assertEqual(len(self.relays._unsent), 1)
        self.relays.doRead()
        self.assertEqual((self.relays._events, self.relays._endings), ([], {}))
        take(newer)
        self.step()
        self.assertEqual(take(newer), b"waits")
        self.assertEqual(self.pump(newer_node, newer, b"on"), b"on")
        self.assertEqual((over(client), over(node)), ("end", "end"))

    def test_an_error_ends_one_relay(self) -> None:
        client, node = self.relay("a")
        other, other_node = self.relay("b")
        near, _ = self.rows()[0]
        self.patch(self.relays, "_read", self._boom(near, self.relays._read))
        client.send(b"x")
        other.send(b"y")
        self.step(1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertNotIn("open", (over(client), over(node)))
        self.assertEqual(other_node.recv(9), b"y")
        self.assertIn(self.relays, self.reactor.readers)

    def _boom(self, bad: int, read: Any) -> Any:
        def reading(fd: int) -> None:
            if fd == bad:
                raise ZeroDivisionError
            read(fd)

        return reading

    def test_kernel_watches_no_more_files(self) -> None:
        """Then it stays with Twisted."""

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
        client, node = self.relay()
        self.assertEqual((self.rows(), self.relays.count()), ([], 1))
        client.send(b"not looked at here")
        self.assertEqual(self.relays._epoll.poll(0, 9), [])
        self.step()
        self.assertEqual(take(node), b"not looked at here")
        self.assertEqual(self.pump(client, node, b"said"), b"said")
        self.assertEqual(self.pump(node, client, BIG), BIG)
        node.close()
        self.step(4)
        self.assertEqual(over(client), "end")

    def test_turns_are_short(self) -> None:
        """A turn that has taken long enough leaves the rest for the next one."""
        pairs = [self.relay(str(number)) for number in range(5)]
        for client, _ in pairs:
            client.send(b"x")
        clock = iter(range(100))
        self.patch(self.relays, "_seconds", lambda: next(clock) * relay_module.LONGEST_TURN * 0.6)
        self.relays.doRead()
        heard = [bool(take(node)) for _, node in pairs]
        self.assertEqual(sum(heard), 1)
        for _ in range(5):
            self.relays.doRead()
        self.assertTrue(all(was or take(node) for was, (_, node) in zip(heard, pairs, strict=True)))
