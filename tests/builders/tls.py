"""TLS server and client in memory, for tests of TLS endpoints. The client is OpenSSL."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Callable
from typing import Any

import trustme
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.net.certificates import Certificates
from gateway.net.tls import TLSFactory

CA = trustme.CA()
LEAF = CA.create_child_ca().issue_cert("node.example")
KEY = LEAF.private_key_pem.bytes()
CHAIN = [pem.bytes() for pem in LEAF.cert_chain_pems]


class FilesTestCase(SynchronousTestCase):
    def write_file(self, content: bytes) -> str:
        path = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path

    def certificates(self, **options: Any) -> Certificates:
        return Certificates(self.write_file(KEY), self.write_file(b"".join(CHAIN)), **options)


class EchoProtocol(Protocol):
    """Echo and record received bytes, and record the reason of the end."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: Failure | None = None
        self.echoes = True

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        if self.echoes:
            self.transport.write(data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost = reason


class TLSPair:
    """A TLS server on a memory transport, and an OpenSSL client."""

    def __init__(
        self,
        certificates: Certificates,
        protocol: Any = EchoProtocol,
        next_chunk_size: Callable[[], int] = lambda: 1 << 20,
        configure: Callable[[ssl.SSLContext], None] = lambda context: None,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """``next_chunk_size`` returns the sizes of the chunks in which the server receives the client's bytes.
        ``configure`` can change the default context of the client; it is not called if ``context`` is given."""
        self.transport = StringTransport()
        self.next_chunk_size = next_chunk_size
        self.clock = MemoryReactorClock()
        factory = TLSFactory(certificates, Factory.forProtocol(protocol), self.clock)
        self.wrapper: Any = factory.buildProtocol(None)
        self.server: Any = self.wrapper.wrappedProtocol
        self.wrapper.makeConnection(self.transport)
        if context is None:
            context = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
            configure(context)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.incoming, self.outgoing, server_hostname="node.example", session=session)
        self.received = b""

    def exchange(self) -> None:
        """Deliver bytes in both directions until there are none left."""
        while True:
            to_server = self.outgoing.read()
            at = 0
            while at < len(to_server):
                size = self.next_chunk_size()
                self.wrapper.dataReceived(to_server[at : at + size])
                at += size
            to_client = self.transport.value()
            self.transport.clear()
            self.incoming.write(to_client)
            if not to_server and not to_client:
                return
            self.client_read()

    def client_read(self) -> None:
        try:
            if self.client.version() is None:
                self.client.do_handshake()
            while data := self.client.read(65536):
                self.received += data
        except ssl.SSLWantReadError:
            pass

    def handshake(self) -> None:
        self.client_read()
        self.exchange()
        assert self.wrapper._handshakeDone

    def send(self, data: bytes) -> None:
        self.client.write(data)
        self.exchange()


def only_version(version: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
    """Make a ``configure`` function that restricts a client to one TLS version."""

    def configure(context: ssl.SSLContext) -> None:
        with warnings.catch_warnings():
            # Python warns of deprecated versions.
            warnings.simplefilter("ignore")
            if version < ssl.TLSVersion.TLSv1_2:
                context.set_ciphers("DEFAULT@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version

    return configure


def combined_certificates() -> Certificates:
    """Load certificates from a temporary file, which is then removed."""
    with LEAF.private_key_and_cert_chain_pem.tempfile() as path:
        return Certificates(path)
