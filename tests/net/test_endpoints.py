"""Endpoints: bound, checked, named.

Tests of gateway.net.endpoints with generated input: an endpoint string is bound, or what is wrong with it is said.
"""

from __future__ import annotations

import os
import socket
from typing import Any
from unittest import mock

import trustme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import _SystemdParser
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactorClock
from twisted.python.systemd import ListenFDs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.metrics import Metrics
from gateway.net import endpoints
from gateway.net.certificates import CertificateReloader
from gateway.net.proxy_protocol import ProxyHeaderErrors, ProxyProtocolFactory
from gateway.net.tls import TLSFactory
from gateway.settings import ConfigError


class FakePort:
    def __init__(self, address: object) -> None:
        self._address = address

    def getHost(self) -> object:
        return self._address


class ListenTests(TestCase):
    async def test_all_are_bound(self) -> None:
        ports = await endpoints.listen("listen", ["tcp:0:interface=127.0.0.1"] * 2, Factory(), reactor)
        self.assertEqual(len({port.getHost().port for port in ports}), 2)
        await endpoints.stop_listening(ports)
        self.assertEqual(ports, [])

    async def test_one_that_is_taken_closes_the_others(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with socket.create_server(("127.0.0.1", 0)) as probe:
                free = probe.getsockname()[1]
            wanted = [f"tcp:{free}:interface=127.0.0.1", f"tcp:{port}:interface=127.0.0.1"]
            with self.assertRaisesRegex(ConfigError, f"--listen: tcp:{port}:.* in use"):
                await endpoints.listen("listen", wanted, Factory(), reactor)
            # Ports close in the reactor's next turn.
            await deferLater(reactor, 0)
            socket.create_server(("127.0.0.1", free)).close()

    async def test_what_is_no_endpoint(self) -> None:
        for description in (
            *("", "tcp", "tcp:", "tcp:x", "nonsense:1", "tcp:1:2:3:4:5", "ssl:0:privateKey=/no/such"),
            *("tcp:99999", "tcp:-1", "systemd:domain=INET:index=0", "haproxy:tcp:x", "unix:/no/such/folder/x"),
        ):
            with self.assertRaisesRegex(ConfigError, "--backend: ") as caught:
                await endpoints.listen("backend", [description], Factory(), reactor)
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    async def test_those_with_the_proxy_protocol_may_have_a_factory_of_their_own(self) -> None:
        bound, factory, behind_proxy = MemoryReactorClock(), Factory(), Factory()
        descriptions = ["tcp:1:backlog=1024", "haproxy:tcp:2:backlog=1024"]
        await endpoints.listen("listen", descriptions, factory, bound, behind_proxy)
        await endpoints.listen("backend", descriptions, factory, bound)
        factories = [server[1] for server in bound.tcpServers]
        self.assertEqual([factories[0], factories[2]], [factory, factory])
        self.assertEqual([factories[1].wrappedFactory, factories[3].wrappedFactory], [behind_proxy, factory])

    async def test_tls_is_ours(self) -> None:
        pem, bound, factory = self.mktemp(), MemoryReactorClock(), Factory()
        trustme.CA().issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        await endpoints.listen("listen", [f"ssl:1:privateKey={pem}:backlog=1024"], factory, bound)
        self.assertIsInstance(bound.tcpServers[0][1], TLSFactory)
        self.assertIs(bound.tcpServers[0][1].wrappedFactory, factory)

    async def test_tls_behind_the_proxy_protocol(self) -> None:
        """Its header comes first."""
        pem, authority = self.mktemp(), self.mktemp()
        ca = trustme.CA()
        ca.issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        ca.cert_pem.write_to_path(authority)
        gauges: dict[str, Any] = {}
        renewals, metrics = CertificateReloader(gauges), Metrics()
        bad_headers = ProxyHeaderErrors(metrics, lambda: 1.0)
        for kind in ("ssl", "mtls"):
            more = f":clientCAs={authority}" if kind == "mtls" else ""
            bound, factory, behind_proxy = MemoryReactorClock(), Factory(), Factory()
            described = [f"{before}{kind}:1:privateKey={pem}:backlog=1024{more}" for before in ("haproxy:", "")]
            await endpoints.listen(
                "backend",
                described,
                factory,
                bound,
                behind_proxy,
                certificate_reloader=renewals,
                header_errors=bad_headers,
            )
            outer, plain = (server[1] for server in bound.tcpServers)
            self.assertIsInstance(outer, ProxyProtocolFactory)
            self.assertIs(outer.header_errors, bad_headers)
            self.assertIsInstance(outer.wrappedFactory, TLSFactory)
            self.assertIs(outer.wrappedFactory.wrappedFactory, behind_proxy)
            self.assertIs(plain.wrappedFactory, factory)
        self.assertEqual(len(renewals._certificates), 4)
        self.assertIn("certificate_expires", gauges)
        self.assertIs(renewals.for_peers(), renewals._certificates[2][1])

    async def test_what_is_wrong_with_one_of_tls(self) -> None:
        for description, problem in [
            ("ssl:0:privateKey=/no/such", "write for example ssl:8443:privateKey=key.pem:certKey=cert.pem:backlog"),
            ("mtls:0:privateKey=/no/such", "clientCAs=FILE is missing.*example mtls:8443:.*:clientCAs=ca.pem:backlog"),
            ("haproxy:mtls:0", "clientCAs=FILE is missing.*example haproxy:mtls:8443:"),
            ("haproxy:haproxy:tcp:0", "haproxy: is there twice"),
        ]:
            with self.assertRaisesRegex(ConfigError, problem):
                await endpoints.listen("listen", [description], Factory(), reactor)

    def test_a_short_backlog_is_warned_of(self) -> None:
        for description, warned in [
            ("tcp:0:interface=127.0.0.1", True),
            ("tcp:0:interface=127.0.0.1:backlog=100", True),
            ("tcp:0:interface=127.0.0.1:backlog=1024", False),
            ("tcp:0:reuseport=yes:backlog=1000", True),
            ("unix:/x", False),
            ("mtls:0:clientCAs=ca.pem", True),
            ("haproxy:tcp6:0", True),
            ("haproxy:ssl:0:backlog=4096", False),
            ("haproxy:mtls:0:backlog=100", True),
        ]:
            with mock.patch.object(endpoints._log, "warn") as warn:
                endpoints._warn_of_small_backlog("listen", description)
            self.assertEqual(warn.called, warned, description)


class GreetingProtocol(Protocol):
    """Says its name, and ends."""

    def connectionMade(self) -> None:
        self.transport.write(self.factory.greeting)
        self.transport.loseConnection()


def greet(greeting: bytes) -> Factory:
    factory = Factory.forProtocol(GreetingProtocol)
    factory.greeting = greeting
    return factory


async def read(host: str, port: int) -> bytes:
    """What is said to who connects; each time from a port that the kernel spreads to another of those who listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.connect((host, port))
        connection.setblocking(False)
        while True:
            try:
                return connection.recv(100)
            except BlockingIOError:
                await deferLater(reactor, 0)


class SharedPortTests(TestCase):
    async def listening(self, description: str, factory: Any = None) -> Any:
        ports = await endpoints.listen("listen", [description], factory or Factory(), reactor)
        self.addCleanup(lambda: Deferred.fromCoroutine(endpoints.stop_listening(ports)))
        return ports[0]

    async def refused(self, description: str, problem: str) -> None:
        with self.assertRaisesRegex(ConfigError, problem) as caught:
            await endpoints.listen("listen", [description], Factory(), reactor)
        self.assertTrue(str(caught.exception).startswith("--listen: "))
        self.assertEqual(len(str(caught.exception).splitlines()), 1)

    async def test_two_that_reuse_it(self) -> None:
        for kind, interface, host in [("tcp", "127.0.0.1", "127.0.0.1"), ("tcp6", r"\:\:1", "::1")]:
            options = f"interface={interface}:backlog=1024"
            first = await self.listening(f"{kind}:0:{options}:reuseport=yes", greet(b"first"))
            port = first.getHost().port
            second = await self.listening(f"{kind}:{port}:reuseport=yes:{options}", greet(b"second"))
            self.assertEqual((second.getHost().host, second.getHost().port), (host, port))
            self.assertEqual({await read(host, port) for _ in range(50)}, {b"first", b"second"})
            # Who does not say so does not take part.
            await self.refused(f"{kind}:{port}:{options}:reuseport=no", "in use")
            await second.stopListening()
            self.assertEqual({await read(host, port) for _ in range(20)}, {b"first"})

    async def test_the_queue_is_as_long_as_was_asked_for(self) -> None:
        port = await self.listening("tcp:0:interface=127.0.0.1:backlog=1:reuseport=yes")
        with mock.patch.object(endpoints._log, "warn") as warn:
            endpoints._warn_of_small_inherited_backlog("listen", "fd:3", port.fileno())
        self.assertEqual(warn.call_args.kwargs["backlog"], 1)

    async def test_tls_and_the_proxy_protocol_reuse_it_too(self) -> None:
        pem, port = self.mktemp(), 0
        trustme.CA().issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        for kind, options in [
            ("haproxy:ssl", f":privateKey={pem}"),
            ("ssl", f":privateKey={pem}"),
            ("haproxy:tcp", ""),
        ] * 2:
            listens = await self.listening(f"{kind}:{port}:interface=127.0.0.1:backlog=1024:reuseport=yes{options}")
            port = listens.getHost().port
        self.assertIsInstance(listens.factory.wrappedFactory, Factory)

    async def test_what_cannot_be_reused(self) -> None:
        for description, problem in [
            ("tcp:0:reuseport=maybe", "reuseport is yes or no"),
            ("tcp:0:reuseport=yes:reuseport=yes", "reuseport is yes or no"),
            ("unix:/x:reuseport=yes", "reuseport is for tcp:"),
            ("haproxy:unix:/x:reuseport=yes", "reuseport is for tcp:"),
            ("fd:3:reuseport=yes", "reuseport is for tcp:"),
            ("tcp:99999:reuseport=yes", "is no endpoint"),
            ("tcp6:0:interface=2001\\:db8\\:\\:1:reuseport=yes", "cannot be listened on"),
        ]:
            await self.refused(description, problem)

    async def test_an_inherited_socket(self) -> None:
        for family, host in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]:
            with socket.create_server((host, 0), family=family, backlog=2000) as inherited:
                for greeting in (b"first", b"second"):
                    with mock.patch.object(endpoints._log, "warn") as warn:
                        port = await self.listening(f"fd:{os.dup(inherited.fileno())}", greet(greeting))
                    warn.assert_not_called()
                    address = inherited.getsockname()
                    self.assertEqual((port.getHost().host, port.getHost().port), address[:2])
                self.assertIn(await read(*address[:2]), {b"first", b"second"})
                # It is still there for the others.
                await port.stopListening()
                self.assertEqual(await read(*address[:2]), b"first")

    async def test_an_inherited_socket_behind_a_proxy(self) -> None:
        behind = greet(b"behind")
        with socket.create_server(("127.0.0.1", 0)) as inherited:
            description = f"haproxy:fd:{os.dup(inherited.fileno())}"
            ports = await endpoints.listen("listen", [description], Factory(), reactor, behind)
            self.addCleanup(lambda: Deferred.fromCoroutine(endpoints.stop_listening(ports)))
            self.assertIs(ports[0].factory.wrappedFactory, behind)

    async def test_a_short_queue_of_an_inherited_socket_is_warned_of(self) -> None:
        patched = mock.patch.object(endpoints._log, "warn")
        with socket.create_server(("127.0.0.1", 0), backlog=100) as inherited, patched as warn:
            await self.listening(f"fd:{os.dup(inherited.fileno())}")
        self.assertEqual(warn.call_args.kwargs["backlog"], 100)

    async def test_files_that_are_no_listening_sockets(self) -> None:
        with socket.socket() as silent, open(os.devnull) as file, socket.socket(socket.AF_UNIX) as local:
            local.bind("\0wsgateway-test-listening")
            local.listen()
            for description, problem in [
                (f"fd:{silent.fileno()}", "does not listen"),
                (f"haproxy:fd:{silent.fileno()}", "does not listen"),
                (f"fd:{file.fileno()}", "is no socket"),
                (f"fd:{local.fileno()}", "no TCP socket"),
                ("fd:999999999", "file 999999999 is not open"),
                *[(f"fd:{number}", "number of an open file") for number in ("", "x", "-1", "3:4", "9999999999")],
            ]:
                await self.refused(description, problem)

    async def test_sockets_of_systemd(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=2000) as inherited:
            given = ListenFDs([os.dup(inherited.fileno())], ["clients"])
            with mock.patch.object(_SystemdParser, "_sddaemon", given):
                await self.refused("systemd:domain=INET6:index=0", "the socket is one of domain=INET$")
                await self.refused("systemd:domain=INET:name=other", "systemd passed no such socket on")
                port = await self.listening("systemd:domain=INET:name=clients", greet(b"here"))
            self.assertEqual(port.getHost().port, inherited.getsockname()[1])
            self.assertEqual(await read(*inherited.getsockname()), b"here")

    async def test_others_than_this_machine_may_reach_it(self) -> None:
        with socket.create_server(("0.0.0.0", 0)) as inherited:
            ports = [await self.listening(f"fd:{os.dup(inherited.fileno())}")]
            ports.append(await self.listening("tcp:0:reuseport=yes"))
            for port in ports:
                self.assertEqual(endpoints.exposed_address(port), f"0.0.0.0:{port.getHost().port}")


class PortAddressTests(SynchronousTestCase):
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
            self.assertEqual(endpoints.exposed_address(FakePort(address)), beyond)

    def test_urls(self) -> None:
        for description, address, url, certain in [
            ("tcp:1", IPv4Address("TCP", "127.0.0.1", 1), "ws://127.0.0.1:1", True),
            ("ssl:1", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", True),
            ("tcp6:1", IPv6Address("TCP", "::1", 1), "ws://[::1]:1", True),
            ("tcp:1", IPv4Address("TCP", "0.0.0.0", 1), f"ws://{socket.getfqdn()}:1", False),
            ("haproxy:tcp:1", IPv4Address("TCP", "10.0.0.1", 1), "ws://10.0.0.1:1", False),
            ("mtls:1", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", True),
            ("haproxy:ssl:1", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", False),
            ("haproxy:mtls:1", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", False),
            ("ssl:1:reuseport=yes", IPv4Address("TCP", "10.0.0.1", 1), "wss://10.0.0.1:1", False),
            ("tcp:1:reuseport=no", IPv4Address("TCP", "10.0.0.1", 1), "ws://10.0.0.1:1", True),
            ("fd:3", IPv6Address("TCP", "::1", 1), "ws://[::1]:1", False),
            ("haproxy:fd:3", IPv4Address("TCP", "10.0.0.1", 1), "ws://10.0.0.1:1", False),
            ("systemd:domain=INET:index=0", IPv4Address("TCP", "10.0.0.1", 1), "ws://10.0.0.1:1", False),
            ("unix:/x", UNIXAddress("/x"), "", False),
        ]:
            self.assertEqual(endpoints.port_url(description, FakePort(address)), (url, certain))


class StopListeningTests(SynchronousTestCase):
    def test_waits_for_each(self) -> None:
        stopped: Deferred[None] = Deferred()
        port = mock.Mock(stopListening=lambda: stopped)
        closing = Deferred.fromCoroutine(endpoints.stop_listening([port]))
        self.assertNoResult(closing)
        stopped.callback(None)
        self.successResultOf(closing)


endpoint_parts = st.sampled_from(
    [*("tcp", "tcp6", "ssl", "haproxy", "fd", "systemd", "unix", "mtls", ":", ":", ":", "=", "\\", "\\:", "0", "8080")]
    + [*("99999", "-1", "port=1", "interface=127.0.0.1", "interface=\\:\\:1", "reuseport=yes", "reuseport=no")]
    + [*("reuseport=", "backlog=x", "backlog=1", "privateKey=/none", "certKey=", "domain=INET", "index=0", "\n", "é")]
)


class GeneratedDescriptionTests(SynchronousTestCase):
    def listen(self, description: str) -> None:
        bound = Deferred.fromCoroutine(
            endpoints.listen("backend", [description], Factory(), MemoryReactorClock())  # type: ignore[arg-type]
        )
        failures: list[BaseException] = []
        bound.addErrback(lambda failure: failures.append(failure.value))
        # Those that need a thread or a name are not bound in this reactor.
        for problem in failures:
            self.assertIsInstance(problem, ConfigError, f"{description!r}: {problem!r}")
            self.assertTrue(str(problem).startswith("--backend: "))
            self.assertEqual(len(str(problem).splitlines()), 1, problem)

    @settings(deadline=None, max_examples=200)
    @given(st.lists(endpoint_parts, max_size=9).map("".join) | st.text(max_size=12))
    @example("tcp:8080:reuseport=yes:reuseport=no")
    @example("haproxy:haproxy:tcp:0")
    @example("fd:0\x00")
    def test_anything(self, description: str) -> None:
        if description.startswith(("fd:", "haproxy:fd:", "unix:", "haproxy:unix:", "systemd:")):
            # These would take files of the tests' own.
            description = "x" + description
        self.listen(description)

    @settings(deadline=None, max_examples=60)
    @given(st.text(max_size=6) | st.integers().map(str), st.sampled_from(["fd:", "haproxy:fd:"]))
    def test_no_such_file(self, number: str, kind: str) -> None:
        if number.strip().isdecimal() and int(number) < 100_000:
            number = "1" + number.zfill(6)
        self.listen(kind + number)
