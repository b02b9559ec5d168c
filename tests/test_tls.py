"""TLS endpoints: their strings, their files, and what goes through them, against OpenSSL's own client side."""

from __future__ import annotations

import random
import ssl

from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.endpoints import TCP4ServerEndpoint, quoteStringArgument, serverFromString
from twisted.internet.interfaces import IHandshakeListener, IProtocolNegotiationFactory, ISSLTransport
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from gateway.net import tls
from gateway.net.proxy_protocol import ProxyProtocolEndpoint
from gateway.net.tls import CHUNK_SIZE, MemoryBIOConnection, TLSFactory, split_description
from tests.tls_pair import CA, CHAIN, KEY, EchoProtocol, FilesTestCase, TLSPair, only_version


class SplitDescriptionTests(SynchronousTestCase):
    def test_parts(self) -> None:
        for description, parts in [
            ("ssl:1", ["ssl", "1"]),
            ("ssl:1:interface=::1", ["ssl", "1", ("interface", ""), "", "1"]),
            (r"ssl:1:interface=\:\:1", ["ssl", "1", ("interface", "::1")]),
            (r"ssl:a\=b:c=d=e:\\", ["ssl", "a=b", ("c", "d=e"), "\\"]),
            ("ssl:", ["ssl", ""]),
            ("ssl:=:=a", ["ssl", ("", ""), ("", "a")]),
            ("ssl:a\\", ["ssl", "a"]),
        ]:
            self.assertEqual(split_description(description), parts)

    @settings(deadline=None)
    @given(
        st.lists(st.text().filter(lambda text: "=" not in text)),
        st.lists(st.tuples(st.text("abc", min_size=1), st.text())),
    )
    def test_what_twisted_quotes(self, texts: list[str], pairs: list[tuple[str, str]]) -> None:
        quoted = [quoteStringArgument(text) for text in texts]
        quoted += [f"{name}={quoteStringArgument(value)}" for name, value in pairs]
        self.assertEqual(split_description(":".join(["ssl", *quoted])), ["ssl", *texts, *pairs])


class EndpointTests(FilesTestCase):
    def test_it_listens_as_it_is_told(self) -> None:
        key, chain, extra = self.write_file(KEY), self.write_file(CHAIN[0]), self.write_file(b"".join(CHAIN[1:]))
        reactor, factory = MemoryReactorClock(), Factory()
        description = rf"ssl:8443:interface=\:\:1:backlog=4096:privateKey={key}:certKey={chain}:extraCertChain={extra}"
        self.assertTrue(tls.is_tls(description))
        self.successResultOf(tls.parse_endpoint(reactor, description).listen(factory))
        ((port, tls_factory, backlog, interface),) = reactor.tcpServers
        self.assertEqual((port, backlog, interface), (8443, 4096, "::1"))
        self.assertIs(tls_factory.wrappedFactory, factory)

    def test_defaults_are_twisteds(self) -> None:
        together = self.write_file(KEY + b"".join(CHAIN))
        reactor = MemoryReactorClock()
        self.successResultOf(tls.parse_endpoint(reactor, f"ssl:1:{together}").listen(Factory()))
        ((_, _, backlog, interface),) = reactor.tcpServers
        self.assertEqual((backlog, interface), (50, ""))
        with self.assertRaisesRegex(FileNotFoundError, "server.pem"):
            tls.parse_endpoint(reactor, "ssl:1")

    def test_with_certificates_of_clients(self) -> None:
        pem, authority = self.write_file(KEY + b"".join(CHAIN)), self.write_file(CA.cert_pem.bytes())
        for rest, mode in [
            (f":clientCAs={authority}", ssl.CERT_REQUIRED),
            (f":clientCAs={authority}:required=yes", ssl.CERT_REQUIRED),
            (f":required=no:clientCAs={authority}", ssl.CERT_OPTIONAL),
        ]:
            self.assertTrue(tls.is_tls(f"mtls:1:{pem}{rest}"))
            endpoint = tls.parse_endpoint(MemoryReactorClock(), f"mtls:1:{pem}{rest}")
            self.assertEqual(endpoint.certificates.context.verify_mode, mode)
        self.assertEqual(self.certificates().context.verify_mode, ssl.CERT_NONE)
        for rest, problem in [
            ("", "clientCAs=FILE is missing"),
            (":clientCAs=", "clientCAs=FILE is missing"),
            (":clientCAs=/no/such", "/no/such"),
            (f":clientCAs={self.write_file(KEY)}", "has no certificate"),
            (f":clientCAs={authority}:required=maybe", "required is yes or no"),
            (f":clientCAs={authority}:colour=red", "mtls: got an unexpected .*colour"),
        ]:
            with self.assertRaisesRegex((ValueError, TypeError, OSError), problem, msg=rest):
                tls.parse_endpoint(MemoryReactorClock(), f"mtls:1:{pem}{rest}")

    def test_in_any_program_of_twisted(self) -> None:
        pem, authority = self.write_file(KEY + b"".join(CHAIN)), self.write_file(CA.cert_pem.bytes())
        reactor = MemoryReactorClock()
        description = f"mtls:8443:privateKey={pem}:clientCAs={authority}:interface=127.0.0.1:backlog=1024"
        self.successResultOf(serverFromString(reactor, description).listen(Factory()))
        ((port, factory, backlog, interface),) = reactor.tcpServers
        self.assertIsInstance(factory, TLSFactory)
        self.assertEqual((port, backlog, interface), (8443, 1024, "127.0.0.1"))
        with self.assertRaisesRegex(ValueError, "clientCAs=FILE is missing"):
            serverFromString(reactor, f"mtls:8443:privateKey={pem}")

    def test_something_between(self) -> None:
        pem, reactor, wrapped = self.write_file(KEY + b"".join(CHAIN)), MemoryReactorClock(), []
        endpoint = tls.parse_endpoint(
            reactor, f"ssl:1:{pem}", lambda tcp: wrapped.append(tcp) or ProxyProtocolEndpoint(tcp)
        )
        self.successResultOf(endpoint.listen(Factory()))
        self.assertIsInstance(wrapped[0], TCP4ServerEndpoint)
        self.assertIsInstance(reactor.tcpServers[0][1].wrappedFactory, TLSFactory)

    def test_what_will_not_do(self) -> None:
        key, chain = self.write_file(KEY), self.write_file(b"".join(CHAIN))
        for rest, problem in [
            ("", "invalid literal"),
            (f"x:{key}:{chain}", "invalid literal"),
            (f"1:{key}:{chain}:backlog=x", "invalid literal"),
            (f"1:{key}:{chain}:colour=red", "ssl: got an unexpected .*colour"),
            (f"1:{key}:{chain}:clientCAs={chain}", "mtls: does"),
            (f"1:{key}:{chain}:privateKey={key}", "ssl: got multiple values .*privateKey"),
            (f"1:{key}:{chain}:SSLv3_METHOD", "sslmethod=SSLv3_METHOD is none of TLS_METHOD"),
            ("1:/no/such", "/no/such"),
            (f"1:{key}:/no/such", "/no/such"),
            (f"1:{key}:{chain}:extraCertChain=/no/such", "/no/such"),
            (f"1:{key}:{chain}:dhParameters=/no/such", "/no/such"),
            (f"1:{key}:{key}", f"{key} has no certificate"),
            (f"1:{key}:{chain}:extraCertChain={key}", f"{key} has no certificate"),
            (f"1:{chain}:{chain}:extraCertChain={chain}", f"{chain} cannot be used: "),
            (f"1:{key}:{chain}:dhParameters={key}", f"{key} cannot be used: "),
        ]:
            with self.assertRaisesRegex((ValueError, TypeError, OSError), problem, msg=rest):
                tls.parse_endpoint(MemoryReactorClock(), f"ssl:{rest}")


class ConnectionTests(FilesTestCase):
    """What goes through, in pieces of any size."""

    def test_a_handshake_and_an_echo(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = TLSPair(self.certificates(), configure=only_version(version))
            pair.handshake()
            self.assertEqual(pair.client.version(), version.name.replace("_", "."))
            pair.send(b"hello")
            self.assertEqual(pair.received, b"hello")
            self.assertTrue(ISSLTransport.providedBy(pair.wrapper))

    def test_messages_of_any_size_in_pieces_of_any_size(self) -> None:
        chance = random.Random(7)
        for most in (3, 1000, CHUNK_SIZE, CHUNK_SIZE + 1, 70000):
            pair = TLSPair(self.certificates(), next_chunk_size=lambda most=most: chance.randint(1, most))
            pair.handshake()
            sent = b""
            for size in (1, 100, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 16384, 16385, 100000):
                data = chance.randbytes(size)
                pair.send(data)
                sent += data
            self.assertEqual(pair.server.received, sent)
            self.assertEqual(pair.received, sent)

    def test_the_server_may_write_before_the_handshake_is_over(self) -> None:
        class Hasty(EchoProtocol):
            def connectionMade(self) -> None:
                self.transport.write(b"welcome" * 2000)

        pair = TLSPair(self.certificates(), protocol=Hasty)
        pair.handshake()
        self.assertEqual(pair.received, b"welcome" * 2000)

    def test_what_openssl_is_given_and_gives_is_in_pieces(self) -> None:
        """What its buffers have once held they keep."""
        pair = TLSPair(self.certificates())
        pair.handshake()
        connection = pair.wrapper._tlsConnection
        pair.server.echoes = False
        largest = [0, 0]
        incoming, outgoing = connection._incoming_bio, connection._outgoing_bio

        class Watched:
            def __init__(self, bio: ssl.MemoryBIO, index: int) -> None:
                self.bio, self.index = bio, index

            @property
            def pending(self) -> int:
                return self.bio.pending

            def write(self, data: bytes) -> int:
                largest[self.index] = max(largest[self.index], self.bio.pending + len(data))
                return self.bio.write(data)

            def read(self, size: int) -> bytes:
                largest[self.index] = max(largest[self.index], self.bio.pending)
                return self.bio.read(size)

        connection._incoming_bio, connection._outgoing_bio = Watched(incoming, 0), Watched(outgoing, 1)
        pair.send(bytes(1000000))
        self.assertEqual(len(pair.server.received), 1000000)
        pair.server.transport.write(bytes(1000000))
        pair.exchange()
        self.assertEqual(len(pair.received), 1000000)
        self.assertEqual(largest[0], CHUNK_SIZE)
        # A piece as a record of TLS.
        self.assertLess(CHUNK_SIZE, largest[1])
        self.assertLess(largest[1], CHUNK_SIZE + 100)

    def test_the_handshake_is_told_of(self) -> None:
        done = []

        @implementer(IHandshakeListener)
        class Listener(EchoProtocol):
            def handshakeCompleted(self) -> None:
                done.append(self.transport.negotiatedProtocol)
                self.assertion = self.transport.getPeerCertificate()

        pair = TLSPair(self.certificates(), protocol=Listener)
        pair.handshake()
        self.assertEqual(done, [None])
        self.assertIsNone(pair.server.assertion)

    def test_protocols_are_offered(self) -> None:
        @implementer(IProtocolNegotiationFactory)
        class Speaking(Factory):
            protocol = EchoProtocol

            def acceptableProtocols(self) -> list[bytes]:
                return [b"http/1.1"]

        path, reactor = self.write_file(KEY + b"".join(CHAIN)), MemoryReactorClock()
        endpoint = tls.parse_endpoint(reactor, f"ssl:1:{path}")
        self.successResultOf(endpoint.listen(Speaking()))
        certificates = endpoint.certificates
        for _ in range(2):
            for offered, chosen in [(["h2", "http/1.1"], b"http/1.1"), (["h2"], None)]:
                pair = TLSPair(
                    certificates, configure=lambda context, offered=offered: context.set_alpn_protocols(offered)
                )
                pair.handshake()
                self.assertEqual(pair.wrapper.negotiatedProtocol, chosen)
            certificates.load()


class PyOpenSSLTests(FilesTestCase):
    def test_nothing_is_written_yet(self) -> None:
        connection = MemoryBIOConnection(self.certificates().context)
        self.assertRaises(SSL.WantReadError, connection.bio_read, 10)
        self.assertRaises(SSL.WantReadError, connection.do_handshake)
        self.assertRaises(SSL.WantReadError, connection.send, b"x")
        self.assertEqual(connection.get_alpn_proto_negotiated(), b"")
