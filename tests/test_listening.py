"""Endpoints: bound, checked, named."""

import socket
from unittest import mock

import trustme
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway import listening
from gateway.settings import ConfigError
from gateway.tls import TLSFactory


class Port:
    def __init__(self, address: object) -> None:
        self._address = address

    def getHost(self) -> object:
        return self._address


class Listen(TestCase):
    async def test_all_are_bound(self) -> None:
        ports = await listening.listen("listen", ["tcp:0:interface=127.0.0.1"] * 2, Factory(), reactor)
        self.assertEqual(len({port.getHost().port for port in ports}), 2)
        await listening.close(ports)
        self.assertEqual(ports, [])

    async def test_one_that_is_taken_closes_the_others(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with socket.create_server(("127.0.0.1", 0)) as probe:
                free = probe.getsockname()[1]
            wanted = [f"tcp:{free}:interface=127.0.0.1", f"tcp:{port}:interface=127.0.0.1"]
            with self.assertRaisesRegex(ConfigError, f"--listen: tcp:{port}:.* in use"):
                await listening.listen("listen", wanted, Factory(), reactor)
            # Ports close in the reactor's next turn.
            await deferLater(reactor, 0)
            socket.create_server(("127.0.0.1", free)).close()

    async def test_what_is_no_endpoint(self) -> None:
        for description in (
            *("", "tcp", "tcp:", "tcp:x", "nonsense:1", "tcp:1:2:3:4:5", "ssl:0:privateKey=/no/such"),
            *("tcp:99999", "tcp:-1", "systemd:domain=INET:index=0", "haproxy:tcp:x", "unix:/no/such/folder/x"),
        ):
            with self.assertRaisesRegex(ConfigError, "--backend: ") as caught:
                await listening.listen("backend", [description], Factory(), reactor)
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    async def test_those_with_the_proxy_protocol_may_have_a_factory_of_their_own(self) -> None:
        bound, factory, behind_proxy = MemoryReactorClock(), Factory(), Factory()
        descriptions = ["tcp:1:backlog=1024", "haproxy:tcp:2:backlog=1024"]
        await listening.listen("listen", descriptions, factory, bound, behind_proxy)
        await listening.listen("backend", descriptions, factory, bound)
        factories = [server[1] for server in bound.tcpServers]
        self.assertEqual([factories[0], factories[2]], [factory, factory])
        self.assertEqual([factories[1].wrappedFactory, factories[3].wrappedFactory], [behind_proxy, factory])

    async def test_tls_is_ours(self) -> None:
        pem, bound, factory = self.mktemp(), MemoryReactorClock(), Factory()
        trustme.CA().issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        await listening.listen("listen", [f"ssl:1:privateKey={pem}:backlog=1024"], factory, bound)
        self.assertIsInstance(bound.tcpServers[0][1], TLSFactory)
        self.assertIs(bound.tcpServers[0][1].wrappedFactory, factory)

    def test_a_short_backlog_is_warned_of(self) -> None:
        for description, warned in [
            ("tcp:0:interface=127.0.0.1", True),
            ("tcp:0:interface=127.0.0.1:backlog=100", True),
            ("tcp:0:interface=127.0.0.1:backlog=1024", False),
            ("unix:/x", False),
        ]:
            with mock.patch.object(listening._log, "warn") as warn:
                listening._warn_of_backlog("listen", description)
            self.assertEqual(warn.called, warned, description)


class Addresses(SynchronousTestCase):
    def test_beyond_loopback(self) -> None:
        for address, beyond in [
            (IPv4Address("TCP", "127.0.0.1", 1), ""),
            (IPv4Address("TCP", "127.9.9.9", 1), ""),
            (IPv6Address("TCP", "::1", 1), ""),
            (UNIXAddress("/x"), ""),
            (IPv4Address("TCP", "0.0.0.0", 1), "0.0.0.0:1"),
            (IPv6Address("TCP", "::", 1), ":::1"),
            (IPv4Address("TCP", "10.0.0.1", 1), "10.0.0.1:1"),
            (IPv6Address("TCP", "fe80::1%eth0", 1), "fe80::1%eth0:1"),
        ]:
            self.assertEqual(listening.beyond_loopback(Port(address)), beyond)

    def test_urls(self) -> None:
        for description, address, url, certain in [
            ("tcp:1", IPv4Address("TCP", "127.0.0.1", 1), "ws://127.0.0.1:1", True),
            ("ssl:1", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", True),
            ("tcp6:1", IPv6Address("TCP", "::1", 1), "ws://[::1]:1", True),
            ("tcp:1", IPv4Address("TCP", "0.0.0.0", 1), f"ws://{socket.getfqdn()}:1", False),
            ("haproxy:tcp:1", IPv4Address("TCP", "10.0.0.1", 1), "ws://10.0.0.1:1", False),
            ("unix:/x", UNIXAddress("/x"), "", False),
        ]:
            self.assertEqual(listening.url_of(description, Port(address)), (url, certain))


class Close(SynchronousTestCase):
    def test_waits_for_each(self) -> None:
        stopped: Deferred[None] = Deferred()
        port = mock.Mock(stopListening=lambda: stopped)
        closing = Deferred.fromCoroutine(listening.close([port]))
        self.assertNoResult(closing)
        stopped.callback(None)
        self.successResultOf(closing)
