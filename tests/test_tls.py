"""TLS endpoints: their strings, their files, and what goes through them, against OpenSSL's own client side."""

from __future__ import annotations

import random
import ssl
from typing import Any

import trustme
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.internet.endpoints import quoteStringArgument
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHandshakeListener, IProtocolNegotiationFactory, ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from gateway import tls
from gateway.tls import PIECE, Certificates, Connection, TLSFactory, split

_CA = trustme.CA()
_LEAF = _CA.create_child_ca().issue_cert("node.example")
_KEY = _LEAF.private_key_pem.bytes()
_CHAIN = [pem.bytes() for pem in _LEAF.cert_chain_pems]


class Files(SynchronousTestCase):
    def file(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def certificates(self, **options: Any) -> Certificates:
        return Certificates(self.file(_KEY), self.file(b"".join(_CHAIN)), **options)


class Split(SynchronousTestCase):
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
            self.assertEqual(split(description), parts)

    @given(
        st.lists(st.text().filter(lambda text: "=" not in text)),
        st.lists(st.tuples(st.text("abc", min_size=1), st.text())),
    )
    def test_what_twisted_quotes(self, texts: list[str], pairs: list[tuple[str, str]]) -> None:
        quoted = [quoteStringArgument(text) for text in texts]
        quoted += [f"{name}={quoteStringArgument(value)}" for name, value in pairs]
        self.assertEqual(split(":".join(["ssl", *quoted])), ["ssl", *texts, *pairs])


class Endpoint(Files):
    def test_it_listens_as_it_is_told(self) -> None:
        key, chain, extra = self.file(_KEY), self.file(_CHAIN[0]), self.file(b"".join(_CHAIN[1:]))
        reactor, factory = MemoryReactorClock(), Factory()
        description = rf"ssl:8443:interface=\:\:1:backlog=4096:privateKey={key}:certKey={chain}:extraCertChain={extra}"
        self.assertTrue(tls.is_tls(description))
        self.successResultOf(tls.endpoint(reactor, description).listen(factory))
        ((port, tls_factory, backlog, interface),) = reactor.tcpServers
        self.assertEqual((port, backlog, interface), (8443, 4096, "::1"))
        self.assertIs(tls_factory.wrappedFactory, factory)

    def test_defaults_are_twisteds(self) -> None:
        together = self.file(_KEY + b"".join(_CHAIN))
        reactor = MemoryReactorClock()
        self.successResultOf(tls.endpoint(reactor, f"ssl:1:{together}").listen(Factory()))
        ((_, _, backlog, interface),) = reactor.tcpServers
        self.assertEqual((backlog, interface), (50, ""))
        with self.assertRaisesRegex(FileNotFoundError, "server.pem"):
            tls.endpoint(reactor, "ssl:1")

    def test_what_will_not_do(self) -> None:
        key, chain = self.file(_KEY), self.file(b"".join(_CHAIN))
        for rest, problem in [
            ("", "invalid literal"),
            (f"x:{key}:{chain}", "invalid literal"),
            (f"1:{key}:{chain}:backlog=x", "invalid literal"),
            (f"1:{key}:{chain}:colour=red", "ssl: got an unexpected .*colour"),
            (f"1:{key}:{chain}:privateKey={key}", "ssl: got multiple values .*privateKey"),
            (f"1:{key}:{chain}:SSLv3_METHOD", "sslmethod=SSLv3_METHOD is none of TLS_METHOD"),
            ("1:/no/such", "/no/such"),
            (f"1:{key}:/no/such", "/no/such"),
            (f"1:{key}:{chain}:extraCertChain=/no/such", "/no/such"),
            (f"1:{key}:{chain}:dhParameters=/no/such", "/no/such"),
            (f"1:{key}:{key}", f"{key} cannot be used: "),
            (f"1:{key}:{chain}:extraCertChain={key}", f"{key} has no certificate"),
            (f"1:{chain}:{chain}:extraCertChain={chain}", f"{chain} cannot be used: "),
            (f"1:{key}:{chain}:dhParameters={key}", f"{key} cannot be used: "),
        ]:
            with self.assertRaisesRegex((ValueError, TypeError, OSError), problem, msg=rest):
                tls.endpoint(MemoryReactorClock(), f"ssl:{rest}")


class Echo(Protocol):
    """Sends back what comes; keeps what happened."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: Failure | None = None
        self.answers = True

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self.answers:
            self.transport.write(data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost = reason


class Pair:
    """A server on a transport in memory, and a client that is OpenSSL's."""

    def __init__(
        self, certificates: Certificates, protocol: Any = Echo, step: Any = lambda: 1 << 20, **versions: Any
    ) -> None:
        self.transport = StringTransport()
        self.step = step
        factory = TLSFactory(certificates, False, Factory.forProtocol(protocol), MemoryReactorClock())
        self.wrapper: Any = factory.buildProtocol(None)
        self.server: Any = self.wrapper.wrappedProtocol
        self.wrapper.makeConnection(self.transport)
        context = ssl.create_default_context(cadata=_CA.cert_pem.bytes().decode())
        for name, value in versions.items():
            if name == "alpn":
                context.set_alpn_protocols(value)
            else:
                setattr(context, name, value)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.incoming, self.outgoing, server_hostname="node.example")
        self.received = b""

    def move(self) -> None:
        """Bring what each has said to the other, until neither says more."""
        while True:
            to_server = self.outgoing.read()
            at = 0
            while at < len(to_server):
                size = self.step()
                self.wrapper.dataReceived(to_server[at : at + size])
                at += size
            to_client = self.transport.value()
            self.transport.clear()
            self.incoming.write(to_client)
            if not to_server and not to_client:
                return
            self.read()

    def read(self) -> None:
        try:
            if self.client.version() is None:
                self.client.do_handshake()
            while data := self.client.read(65536):
                self.received += data
        except ssl.SSLWantReadError:
            pass

    def shake_hands(self) -> None:
        self.read()
        self.move()
        assert self.wrapper._handshakeDone

    def say(self, data: bytes) -> None:
        self.client.write(data)
        self.move()


class Through(Files):
    """What goes through, in pieces of any size."""

    def test_a_handshake_and_an_echo(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = Pair(self.certificates(), minimum_version=version, maximum_version=version)
            pair.shake_hands()
            self.assertEqual(pair.client.version(), version.name.replace("_", "."))
            pair.say(b"hello")
            self.assertEqual(pair.received, b"hello")
            self.assertTrue(ISSLTransport.providedBy(pair.wrapper))

    def test_messages_of_any_size_in_pieces_of_any_size(self) -> None:
        chance = random.Random(7)
        for most in (3, 1000, PIECE, PIECE + 1, 70000):
            pair = Pair(self.certificates(), step=lambda most=most: chance.randint(1, most))
            pair.shake_hands()
            sent = b""
            for size in (1, 100, PIECE - 1, PIECE, PIECE + 1, 16384, 16385, 100000):
                data = chance.randbytes(size)
                pair.say(data)
                sent += data
            self.assertEqual(pair.server.received, sent)
            self.assertEqual(pair.received, sent)

    def test_the_server_may_write_before_the_handshake_is_over(self) -> None:
        class Hasty(Echo):
            def connectionMade(self) -> None:
                self.transport.write(b"welcome" * 2000)

        pair = Pair(self.certificates(), protocol=Hasty)
        pair.shake_hands()
        self.assertEqual(pair.received, b"welcome" * 2000)

    def test_what_openssl_is_given_and_gives_is_in_pieces(self) -> None:
        """What its buffers have once held they keep."""
        pair = Pair(self.certificates())
        pair.shake_hands()
        connection = pair.wrapper._tlsConnection
        pair.server.answers = False
        largest = [0, 0]
        incoming, outgoing = connection._incoming, connection._outgoing

        class Watched:
            def __init__(self, bio: ssl.MemoryBIO, index: int) -> None:
                self.bio, self.index = bio, index

            def write(self, data: bytes) -> int:
                largest[self.index] = max(largest[self.index], self.bio.pending + len(data))
                return self.bio.write(data)

            def read(self, size: int) -> bytes:
                largest[self.index] = max(largest[self.index], self.bio.pending)
                return self.bio.read(size)

        connection._incoming, connection._outgoing = Watched(incoming, 0), Watched(outgoing, 1)
        pair.say(bytes(1000000))
        self.assertEqual(len(pair.server.received), 1000000)
        pair.server.transport.write(bytes(1000000))
        pair.move()
        self.assertEqual(len(pair.received), 1000000)
        self.assertEqual(largest[0], PIECE)
        # A piece as a record of TLS.
        self.assertLess(PIECE, largest[1])
        self.assertLess(largest[1], PIECE + 100)

    def test_the_handshake_is_told_of(self) -> None:
        done = []

        @implementer(IHandshakeListener)
        class Listener(Echo):
            def handshakeCompleted(self) -> None:
                done.append(self.transport.negotiatedProtocol)
                self.assertion = self.transport.getPeerCertificate()

        pair = Pair(self.certificates(), protocol=Listener)
        pair.shake_hands()
        self.assertEqual(done, [None])
        self.assertIsNone(pair.server.assertion)

    def test_the_certificate_of_a_client(self) -> None:
        certificates = self.certificates()
        certificates._context.load_verify_locations(cadata=_CA.cert_pem.bytes().decode())
        certificates._context.verify_mode = ssl.CERT_REQUIRED
        pair = Pair(certificates)
        _CA.issue_cert("robot-7").configure_cert(pair.client.context)
        pair.client = pair.client.context.wrap_bio(pair.incoming, pair.outgoing, server_hostname="node.example")
        pair.shake_hands()
        pair.say(b"hello")
        extension = pair.wrapper.getPeerCertificate().to_cryptography().extensions
        self.assertIn("robot-7", str(list(extension)))


class End(Files):
    def pair(self, **versions: Any) -> Pair:
        pair = Pair(self.certificates(), **versions)
        pair.shake_hands()
        return pair

    def lose(self, pair: Pair, reason: Exception) -> None:
        pair.wrapper.connectionLost(Failure(reason))

    def test_the_server_ends_it(self) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            pair = self.pair(minimum_version=version, maximum_version=version)
            pair.server.transport.write(b"good-bye")
            pair.server.transport.loseConnection()
            self.assertFalse(pair.transport.disconnecting)
            pair.move()
            self.assertEqual(pair.received, b"good-bye")
            # The client answers, and only then is the transport closed.
            pair.client.unwrap()
            pair.wrapper.dataReceived(pair.outgoing.read())
            self.assertTrue(pair.transport.disconnecting)
            self.lose(pair, ConnectionDone())
            self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_the_client_ends_it(self) -> None:
        pair = self.pair()
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)
        pair.incoming.write(pair.transport.value())
        pair.client.unwrap()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionDone))

    def test_what_comes_with_the_end_is_not_lost(self) -> None:
        pair = self.pair()
        pair.client.write(b"last words")
        with self.assertRaises(ssl.SSLWantReadError):
            pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, b"last words")

    def test_what_was_on_its_way_when_the_server_ended_it(self) -> None:
        class Ending(Echo):
            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.transport.loseConnection()

        pair = Pair(self.certificates(), protocol=Ending)
        pair.shake_hands()
        pair.server.answers = False
        # Two records in one segment, and more behind them.
        pair.client.write(b"first")
        pair.client.write(b"second")
        pair.wrapper.dataReceived(pair.outgoing.read())
        pair.client.write(b"third")
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertEqual(pair.server.received, b"firstsecondthird")
        self.assertFalse(pair.transport.disconnecting)
        pair.incoming.write(pair.transport.value())
        pair.client.unwrap()
        pair.wrapper.dataReceived(pair.outgoing.read())
        self.assertTrue(pair.transport.disconnecting)

    def test_a_connection_that_breaks_off(self) -> None:
        pair = self.pair()
        self.lose(pair, ConnectionLost())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_one_that_ends_without_a_word_of_tls(self) -> None:
        """Twisted has it that bytes may be missing."""
        pair = self.pair()
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(ConnectionLost))

    def test_it_is_aborted(self) -> None:
        pair = self.pair()
        pair.wrapper.abortConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)
        pair.wrapper.dataReceived(b"more")
        self.assertEqual(pair.server.received, b"")

    def test_garbage_instead_of_a_handshake(self) -> None:
        pair = Pair(self.certificates())
        pair.wrapper.dataReceived(b"GET / HTTP/1.1\r\n\r\n")
        self.assertTrue(pair.transport.disconnecting)
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_garbage_after_it(self) -> None:
        pair = self.pair()
        pair.wrapper.dataReceived(b"\x17\x03\x03\x00\x20" + bytes(32))
        self.assertTrue(pair.transport.disconnecting)
        self.assertEqual(pair.server.received, b"")
        self.lose(pair, ConnectionDone())
        self.assertTrue(pair.server.lost.check(SSL.Error))

    def test_an_end_in_the_handshake(self) -> None:
        pair = Pair(self.certificates())
        pair.read()
        pair.wrapper.dataReceived(pair.outgoing.read()[:100])
        self.lose(pair, ConnectionDone())
        self.assertIsNotNone(pair.server.lost)

    def test_closing_before_the_handshake_is_over(self) -> None:
        pair = Pair(self.certificates())
        pair.wrapper.loseConnection()
        self.assertTrue(pair.transport.disconnected or pair.transport.disconnecting)

    def test_old_versions_are_refused(self) -> None:
        self.assertEqual(self.certificates()._context.minimum_version, ssl.TLSVersion.TLSv1_2)
        pair = Pair(self.certificates(method="TLSv1_2_METHOD"))
        pair.shake_hands()
        self.assertEqual(pair.client.version(), "TLSv1.2")


class Loading(Files):
    def test_a_chain_in_two_files(self) -> None:
        """The client knows the root alone."""
        certificates = Certificates(self.file(_KEY), self.file(_CHAIN[0]), self.file(b"".join(_CHAIN[1:])))
        Pair(certificates).shake_hands()
        with self.assertRaises(ssl.SSLCertVerificationError):
            Pair(Certificates(self.file(_KEY), self.file(_CHAIN[0]))).shake_hands()

    def test_new_files_are_for_new_connections(self) -> None:
        path = self.file(_KEY + b"".join(_CHAIN))
        certificates = Certificates(path)
        before = Pair(certificates)
        before.shake_hands()
        other = trustme.CA()
        with open(path, "wb") as file:
            file.write(other.issue_cert("node.example").private_key_and_cert_chain_pem.bytes())
        certificates.load()
        before.say(b"still here")
        self.assertEqual(before.received, b"still here")
        with self.assertRaises(ssl.SSLCertVerificationError):
            Pair(certificates).shake_hands()
        # What cannot be used changes nothing.
        context = certificates._context
        with open(path, "wb") as file:
            file.write(b"rubbish")
        self.assertRaises(ValueError, certificates.load)
        self.assertIs(certificates._context, context)

    def test_protocols_are_offered(self) -> None:
        @implementer(IProtocolNegotiationFactory)
        class Speaking(Factory):
            protocol = Echo

            def acceptableProtocols(self) -> list[bytes]:
                return [b"http/1.1"]

        path, reactor = self.file(_KEY + b"".join(_CHAIN)), MemoryReactorClock()
        endpoint = tls.endpoint(reactor, f"ssl:1:{path}")
        self.successResultOf(endpoint.listen(Speaking()))
        certificates = endpoint._certificates
        for _ in range(2):
            for offered, chosen in [(["h2", "http/1.1"], b"http/1.1"), (["h2"], None)]:
                pair = Pair(certificates, alpn=offered)
                pair.shake_hands()
                self.assertEqual(pair.wrapper.negotiatedProtocol, chosen)
            certificates.load()


class OfPyOpenSSL(Files):
    def test_nothing_is_written_yet(self) -> None:
        connection = Connection(self.certificates()._context)
        self.assertRaises(SSL.WantReadError, connection.bio_read, 10)
        self.assertRaises(SSL.WantReadError, connection.do_handshake)
        self.assertRaises(SSL.WantReadError, connection.send, b"x")
        self.assertEqual(connection.get_alpn_proto_negotiated(), b"")
