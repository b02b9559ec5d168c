"""Tests of gateway.net.endpoints."""

from __future__ import annotations

import errno
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
from twisted.internet.error import CannotListenError
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
    async def test_binds_every_endpoint(self) -> None:
        ports = await endpoints.listen("listen", ["tcp:0:interface=127.0.0.1"] * 2, Factory(), reactor)
        self.assertEqual(len({port.getHost().port for port in ports}), 2)
        await endpoints.stop_listening(ports)
        self.assertEqual(ports, [])

    async def test_closes_bound_ports_if_one_is_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with socket.create_server(("127.0.0.1", 0)) as probe:
                free = probe.getsockname()[1]
            wanted = [f"tcp:{free}:interface=127.0.0.1", f"tcp:{port}:interface=127.0.0.1"]
            with self.assertRaisesRegex(ConfigError, f"--listen: tcp:{port}:.* in use"):
                await endpoints.listen("listen", wanted, Factory(), reactor)
            # Ports are closed in the next reactor iteration.
            await deferLater(reactor, 0)
            socket.create_server(("127.0.0.1", free)).close()

    async def test_refuses_invalid_endpoint_strings(self) -> None:
        for description in (
            *("", "tcp", "tcp:", "tcp:x", "nonsense:1", "tcp:1:2:3:4:5", "ssl:0:privateKey=/no/such"),
            *("tcp:99999", "tcp:-1", "systemd:domain=INET:index=0", "haproxy:tcp:x", "unix:/no/such/folder/x"),
        ):
            with self.assertRaisesRegex(ConfigError, "--backend: ") as caught:
                await endpoints.listen("backend", [description], Factory(), reactor)
            self.assertEqual(len(str(caught.exception).splitlines()), 1)

    async def test_haproxy_endpoints_use_the_proxied_factory(self) -> None:
        bound, factory, proxied_factory = MemoryReactorClock(), Factory(), Factory()
        descriptions = ["tcp:1:backlog=1024", "haproxy:tcp:2:backlog=1024"]
        await endpoints.listen("listen", descriptions, factory, bound, proxied_factory)
        await endpoints.listen("backend", descriptions, factory, bound)
        factories = [server[1] for server in bound.tcpServers]
        self.assertEqual([factories[0], factories[2]], [factory, factory])
        self.assertEqual([factories[1].wrappedFactory, factories[3].wrappedFactory], [proxied_factory, factory])

    async def test_ssl_endpoints_use_our_tls_factory(self) -> None:
        pem, bound, factory = self.mktemp(), MemoryReactorClock(), Factory()
        trustme.CA().issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        await endpoints.listen("listen", [f"ssl:1:privateKey={pem}:backlog=1024"], factory, bound)
        self.assertIsInstance(bound.tcpServers[0][1], TLSFactory)
        self.assertIs(bound.tcpServers[0][1].wrappedFactory, factory)

    async def test_proxy_header_is_read_before_tls(self) -> None:
        pem, authority = self.mktemp(), self.mktemp()
        ca = trustme.CA()
        ca.issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        ca.cert_pem.write_to_path(authority)
        gauges: dict[str, Any] = {}
        reloader, metrics = CertificateReloader(gauges), Metrics()
        header_errors = ProxyHeaderErrors(metrics, lambda: 1.0)
        for kind in ("ssl", "mtls"):
            options = f":clientCAs={authority}" if kind == "mtls" else ""
            bound, factory, proxied_factory = MemoryReactorClock(), Factory(), Factory()
            descriptions = [f"{prefix}{kind}:1:privateKey={pem}:backlog=1024{options}" for prefix in ("haproxy:", "")]
            await endpoints.listen(
                "backend",
                descriptions,
                factory,
                bound,
                proxied_factory,
                certificate_reloader=reloader,
                header_errors=header_errors,
            )
            outer, plain = (server[1] for server in bound.tcpServers)
            self.assertIsInstance(outer, ProxyProtocolFactory)
            self.assertIs(outer.header_errors, header_errors)
            self.assertIsInstance(outer.wrappedFactory, TLSFactory)
            self.assertIs(outer.wrappedFactory.wrappedFactory, proxied_factory)
            self.assertIs(plain.wrappedFactory, factory)
        self.assertEqual(len(reloader._certificates), 4)
        self.assertIn("certificate_expires", gauges)
        self.assertIs(reloader.for_peers(), reloader._certificates[2][1])

    async def test_refuses_invalid_tls_endpoint_strings(self) -> None:
        for description, problem in [
            (
                "ssl:0:privateKey=/no/such",
                "^--listen: ssl:0:privateKey=/no/such: /no/such cannot be read: No such file",
            ),
            ("mtls:0:privateKey=/no/such", "clientCAs=FILE is missing.*example mtls:8443:.*:clientCAs=ca.pem:backlog"),
            ("haproxy:mtls:0", "clientCAs=FILE is missing.*example haproxy:mtls:8443:"),
            ("haproxy:haproxy:tcp:0", "haproxy: is given twice"),
        ]:
            with self.assertRaisesRegex(ConfigError, problem):
                await endpoints.listen("listen", [description], Factory(), reactor)

    async def test_names_files_that_cannot_be_used(self) -> None:
        """The endpoint string itself is valid."""
        key, chain = self.mktemp(), self.mktemp()
        trustme.CA().issue_cert("a.example", key_type=trustme.KeyType.RSA).private_key_pem.write_to_path(key)
        trustme.CA().issue_cert("a.example").cert_chain_pems[0].write_to_path(chain)
        description = f"ssl:0:privateKey={key}:certKey={chain}"
        with self.assertRaises(ConfigError) as caught:
            await endpoints.listen("listen", [description], Factory(), reactor)
        self.assertRegex(
            str(caught.exception),
            f"^--listen: {description}: {chain} and {key} cannot be used: the key is of another kind than that of the",
        )

    async def test_names_the_escapes_of_an_address(self) -> None:
        for description, escaped in (
            ("tcp6:8080:interface=::1", r"tcp6:8080:interface=\:\:1"),
            ("tcp:8080:interface=::1:backlog=4096", r"tcp:8080:interface=\:\:1:backlog=4096"),
            ("haproxy:tcp6:8080:interface=2001:db8::7", r"haproxy:tcp6:8080:interface=2001\:db8\:\:7"),
            ("tcp6:8080:backlog=4096:interface=::", r"tcp6:8080:backlog=4096:interface=\:\:"),
            ("tcp6:8080:interface=::1:reuseport=yes", r"tcp6:8080:interface=\:\:1:reuseport=yes"),
            ("tcp6:8080:interface=[::1]:backlog=1", r"tcp6:8080:interface=\:\:1:backlog=1"),
        ):
            with self.assertRaises(ConfigError) as caught:
                await endpoints.listen("listen", [description], Factory(), reactor)
            self.assertEqual(
                str(caught.exception),
                f"--listen: {description!r} is not a valid endpoint: each colon of an address needs a backslash; "
                f"write '{escaped}'",
            )
        for description in (r"tcp6:0:interface=\:\:1", "tcp:8080:interface=127.0.0.1:x:y", "tcp:8080", "unix:/a:b"):
            self.assertIsNone(endpoints._escape_address(description))

    async def test_errors_do_not_name_functions(self) -> None:
        for description in ("tcp:8080:interfce=127.0.0.1", "tcp:1:2:3:4:5", "ssl:1:nonsense=1", "unix:/a:b:c:d:e"):
            with self.assertRaises(ConfigError) as caught:
                await endpoints.listen("listen", [description], Factory(), reactor)
            self.assertNotIn("()", str(caught.exception))

    async def test_names_the_remedy_of_a_port_that_cannot_be_bound(self) -> None:
        class Unable(MemoryReactorClock):
            def listenTCP(self, port: int, *_: object, **__: object) -> Any:
                raise CannotListenError("", port, OSError(self.errno, os.strerror(self.errno)))

            def listenUNIX(self, *_: object, **__: object) -> Any:
                raise CannotListenError("", "/x", OSError(self.errno, os.strerror(self.errno)))

        for number, description, end in (
            (errno.EACCES, "tcp:443", "Permission denied; a port below 1024 needs the capability CAP_NET_BIND_SERVICE"),
            (errno.EACCES, "unix:/x/y", "Permission denied; let this user write to its folder$"),
            (errno.ENOENT, "unix:/x/y", "No such file or directory$"),
            (errno.EADDRINUSE, "tcp:443", "Address already in use; choose another port, or stop the process"),
            (errno.EADDRNOTAVAIL, "tcp:443", "Cannot assign requested address; interface= must be an address of this"),
            (errno.ENOBUFS, "tcp:443", "No buffer space available$"),
        ):
            unable = Unable()
            unable.errno = number
            with self.assertRaisesRegex(ConfigError, f"^--listen: {description} cannot be bound: {end}"):
                await endpoints.listen("listen", [description], Factory(), unable)

    def test_warns_of_small_backlog(self) -> None:
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
    """Send a greeting and close the connection."""

    def connectionMade(self) -> None:
        self.transport.write(self.factory.greeting)
        self.transport.loseConnection()


def greet(greeting: bytes) -> Factory:
    factory = Factory.forProtocol(GreetingProtocol)
    factory.greeting = greeting
    return factory


async def read(host: str, port: int) -> bytes:
    """Connect, from a new port so that the kernel may choose another listening socket, and return the greeting."""
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

    async def test_two_sockets_share_a_port_with_reuseport(self) -> None:
        for kind, interface, host in [("tcp", "127.0.0.1", "127.0.0.1"), ("tcp6", r"\:\:1", "::1")]:
            options = f"interface={interface}:backlog=1024"
            first = await self.listening(f"{kind}:0:{options}:reuseport=yes", greet(b"first"))
            port = first.getHost().port
            second = await self.listening(f"{kind}:{port}:reuseport=yes:{options}", greet(b"second"))
            self.assertEqual((second.getHost().host, second.getHost().port), (host, port))
            self.assertEqual({await read(host, port) for _ in range(50)}, {b"first", b"second"})
            # A socket without reuseport cannot use the port.
            await self.refused(f"{kind}:{port}:{options}:reuseport=no", "in use")
            await second.stopListening()
            self.assertEqual({await read(host, port) for _ in range(20)}, {b"first"})

    async def test_reuseport_keeps_the_backlog(self) -> None:
        port = await self.listening("tcp:0:interface=127.0.0.1:backlog=1:reuseport=yes")
        with mock.patch.object(endpoints._log, "warn") as warn:
            endpoints._warn_of_small_inherited_backlog("listen", "fd:3", port.fileno())
        self.assertEqual(warn.call_args.kwargs["backlog"], 1)

    async def test_tls_and_proxy_protocol_support_reuseport(self) -> None:
        pem, port = self.mktemp(), 0
        trustme.CA().issue_cert("node.example").private_key_and_cert_chain_pem.write_to_path(pem)
        for kind, options in [
            ("haproxy:ssl", f":privateKey={pem}"),
            ("ssl", f":privateKey={pem}"),
            ("haproxy:tcp", ""),
        ] * 2:
            listening = await self.listening(f"{kind}:{port}:interface=127.0.0.1:backlog=1024:reuseport=yes{options}")
            port = listening.getHost().port
        self.assertIsInstance(listening.factory.wrappedFactory, Factory)

    async def test_refuses_invalid_reuseport(self) -> None:
        for description, problem in [
            ("tcp:0:reuseport=maybe", "reuseport must be yes or no"),
            ("tcp:0:reuseport=yes:reuseport=yes", "reuseport must be yes or no"),
            ("unix:/x:reuseport=yes", "reuseport is only supported by tcp:"),
            ("haproxy:unix:/x:reuseport=yes", "reuseport is only supported by tcp:"),
            ("fd:3:reuseport=yes", "reuseport is only supported by tcp:"),
            ("tcp:99999:reuseport=yes", "is not a valid endpoint"),
            ("tcp6:0:interface=2001\\:db8\\:\\:1:reuseport=yes", "cannot be bound"),
        ]:
            await self.refused(description, problem)

    async def test_inherited_socket(self) -> None:
        for family, host in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]:
            with socket.create_server((host, 0), family=family, backlog=2000) as inherited:
                for greeting in (b"first", b"second"):
                    with mock.patch.object(endpoints._log, "warn") as warn:
                        port = await self.listening(f"fd:{os.dup(inherited.fileno())}", greet(greeting))
                    warn.assert_not_called()
                    address = inherited.getsockname()
                    self.assertEqual((port.getHost().host, port.getHost().port), address[:2])
                self.assertIn(await read(*address[:2]), {b"first", b"second"})
                # The other port is still listening.
                await port.stopListening()
                self.assertEqual(await read(*address[:2]), b"first")

    async def test_inherited_socket_behind_a_proxy(self) -> None:
        proxied_factory = greet(b"behind")
        with socket.create_server(("127.0.0.1", 0)) as inherited:
            description = f"haproxy:fd:{os.dup(inherited.fileno())}"
            ports = await endpoints.listen("listen", [description], Factory(), reactor, proxied_factory)
            self.addCleanup(lambda: Deferred.fromCoroutine(endpoints.stop_listening(ports)))
            self.assertIs(ports[0].factory.wrappedFactory, proxied_factory)

    async def test_warns_of_small_backlog_of_an_inherited_socket(self) -> None:
        patched = mock.patch.object(endpoints._log, "warn")
        with socket.create_server(("127.0.0.1", 0), backlog=100) as inherited, patched as warn:
            await self.listening(f"fd:{os.dup(inherited.fileno())}")
        self.assertEqual(warn.call_args.kwargs["backlog"], 100)

    async def test_refuses_file_descriptors_that_are_not_listening_sockets(self) -> None:
        with socket.socket() as silent, open(os.devnull) as file, socket.socket(socket.AF_UNIX) as local:
            local.bind("\0wsgateway-test-listening")
            local.listen()
            for description, problem in [
                (f"fd:{silent.fileno()}", "does not listen"),
                (f"haproxy:fd:{silent.fileno()}", "does not listen"),
                (f"fd:{file.fileno()}", "is not a socket"),
                (f"fd:{local.fileno()}", "is not a TCP socket"),
                ("fd:999999999", "file descriptor 999999999 is not open"),
                *[(f"fd:{number}", "number of an open file") for number in ("", "x", "-1", "3:4", "9999999999")],
            ]:
                await self.refused(description, problem)

    async def test_systemd_sockets(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=2000) as inherited:
            given = ListenFDs([os.dup(inherited.fileno())], ["clients"])
            with mock.patch.object(_SystemdParser, "_sddaemon", given):
                await self.refused("systemd:domain=INET6:index=0", "the socket has domain=INET$")
                await self.refused("systemd:domain=INET:name=other", "systemd passed no such socket")
                port = await self.listening("systemd:domain=INET:name=clients", greet(b"here"))
            self.assertEqual(port.getHost().port, inherited.getsockname()[1])
            self.assertEqual(await read(*inherited.getsockname()), b"here")

    async def test_shared_ports_on_all_addresses_are_exposed(self) -> None:
        with socket.create_server(("0.0.0.0", 0)) as inherited:
            ports = [await self.listening(f"fd:{os.dup(inherited.fileno())}")]
            ports.append(await self.listening("tcp:0:reuseport=yes"))
            for port in ports:
                self.assertEqual(endpoints.exposed_address(port), f"0.0.0.0:{port.getHost().port}")


class PortAddressTests(SynchronousTestCase):
    def test_exposed_address(self) -> None:
        for address, exposed in [
            (IPv4Address("TCP", "127.0.0.1", 1), ""),
            (IPv4Address("TCP", "127.9.9.9", 1), ""),
            (IPv6Address("TCP", "::1", 1), ""),
            (UNIXAddress("/x"), ""),
            (IPv4Address("TCP", "0.0.0.0", 1), "0.0.0.0:1"),
            (IPv6Address("TCP", "::", 1), ":::1"),
            (IPv4Address("TCP", "10.0.0.1", 1), "10.0.0.1:1"),
            (IPv6Address("TCP", "fe80::1%eth0", 1), "fe80::1%eth0:1"),
        ]:
            self.assertEqual(endpoints.exposed_address(FakePort(address)), exposed)

    def test_port_url(self) -> None:
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

    def test_loopback_url(self) -> None:
        for description, address, url in [
            ("tcp:1", IPv4Address("TCP", "127.0.0.1", 1), "ws://127.0.0.1:1"),
            ("ssl:1", IPv4Address("TCP", "127.9.9.9", 1), "wss://127.9.9.9:1"),
            ("tcp6:1", IPv6Address("TCP", "::1", 1), "ws://[::1]:1"),
            ("fd:3", IPv4Address("TCP", "127.0.0.1", 1), "ws://127.0.0.1:1"),
            ("haproxy:tcp:1", IPv4Address("TCP", "127.0.0.1", 1), ""),
            ("tcp:1", IPv4Address("TCP", "0.0.0.0", 1), ""),
            ("tcp6:1", IPv6Address("TCP", "::", 1), ""),
            ("tcp:1", IPv4Address("TCP", "10.0.0.1", 1), ""),
            ("unix:/x", UNIXAddress("/x"), ""),
        ]:
            self.assertEqual(endpoints.loopback_url(description, FakePort(address)), url)


class StopListeningTests(SynchronousTestCase):
    def test_waits_until_each_port_is_closed(self) -> None:
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
        # Endpoints that need a thread or name resolution do not finish binding in this reactor.
        for problem in failures:
            self.assertIsInstance(problem, ConfigError, f"{description!r}: {problem!r}")
            self.assertTrue(str(problem).startswith("--backend: "))
            self.assertEqual(len(str(problem).splitlines()), 1, problem)

    @settings(deadline=None, max_examples=200)
    @given(st.lists(endpoint_parts, max_size=9).map("".join) | st.text(max_size=12))
    @example("tcp:8080:reuseport=yes:reuseport=no")
    @example("haproxy:haproxy:tcp:0")
    @example("fd:0\x00")
    def test_any_endpoint_string(self, description: str) -> None:
        if description.startswith(("fd:", "haproxy:fd:", "unix:", "haproxy:unix:", "systemd:")):
            # These would use file descriptors of the test process.
            description = "x" + description
        self.listen(description)

    @settings(deadline=None, max_examples=60)
    @given(st.text(max_size=6) | st.integers().map(str), st.sampled_from(["fd:", "haproxy:fd:"]))
    def test_file_descriptors_that_are_not_open(self, number: str, kind: str) -> None:
        if number.strip().isdecimal() and int(number) < 100_000:
            number = "1" + number.zfill(6)
        self.listen(kind + number)
