"""Tests of gateway.agent.tls, with a server that requires a client certificate."""

from __future__ import annotations

import os
from typing import Any

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import Certificate, PrivateCertificate
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.agent import tls_of_files

CA = trustme.CA()
OTHER_CA = trustme.CA()


class TLSClient(Protocol):
    """Records the serial number that the server sends, or the reason of the disconnection."""

    factory: Any

    def connectionMade(self) -> None:
        self.transport.write(b"hello")

    def dataReceived(self, data: bytes) -> None:
        serial: Any = self.transport.getPeerCertificate().to_cryptography().serial_number
        self.factory.received.callback(serial)
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self.factory.received.called:
            self.factory.received.errback(reason)


class TLSServer(Protocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.gone.callback(None)


class FilesTestCase(SynchronousTestCase):
    def write_file(self, content: bytes) -> str:
        path: str = self.mktemp()
        with open(path, "wb") as file:
            file.write(content)
        return path


class ClientCertificateTests(TestCase, FilesTestCase):
    async def connect_and_get_serial(self, **files: str) -> int:
        """Connect; return the serial number of the client certificate that the server received."""
        issued = CA.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
        roots = Certificate.loadPEM(CA.cert_pem.bytes())
        server: Any = Factory.forProtocol(TLSClient)
        server.received = Deferred()
        port = reactor.listenSSL(0, server, PrivateCertificate.loadPEM(issued).options(roots), interface="127.0.0.1")
        client: Any = Factory.forProtocol(TLSServer)
        client.gone = Deferred()
        endpoint = HostnameEndpoint(reactor, "localhost", port.getHost().port)
        try:
            await wrapClientTLS(tls_of_files(**files)("localhost"), endpoint).connect(client)
            serial: int = await server.received
            return serial
        finally:
            await client.gone
            await port.stopListening()

    async def test_chain_and_key_in_two_files(self) -> None:
        between = CA.create_child_ca()
        issued = between.issue_cert("robot-7")
        chain = self.write_file(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        key = self.write_file(issued.private_key_pem.bytes())
        serial = Certificate.loadPEM(issued.cert_chain_pems[0].bytes()).serialNumber()
        ca_file = self.write_file(CA.cert_pem.bytes())
        self.assertEqual(await self.connect_and_get_serial(ca_file=ca_file, certificate=chain, key=key), serial)

    async def test_chain_and_key_in_one_file(self) -> None:
        issued = CA.issue_cert("robot-7")
        path = self.write_file(issued.private_key_and_cert_chain_pem.bytes())
        serial = Certificate.loadPEM(issued.cert_chain_pems[0].bytes()).serialNumber()
        self.assertEqual(
            await self.connect_and_get_serial(ca_file=self.write_file(CA.cert_pem.bytes()), certificate=path), serial
        )


class LoadTests(FilesTestCase):
    def setUp(self) -> None:
        self.issued = CA.issue_cert("robot-7")
        self.path = self.write_file(self.issued.private_key_and_cert_chain_pem.bytes())

    def test_defaults(self) -> None:
        tls_of_files()("localhost")

    def test_files_are_read_each_time(self) -> None:
        tls = tls_of_files(certificate=self.path)
        tls("localhost")
        os.remove(self.path)
        self.assertRaises(FileNotFoundError, tls, "localhost")

    def test_invalid_files(self) -> None:
        key = load_pem_private_key(self.issued.private_key_pem.bytes(), None)
        encrypted = self.write_file(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        )
        others = self.write_file(OTHER_CA.issue_cert("robot-7").private_key_pem.bytes())
        nothing = self.write_file(b"nothing")
        alone = self.write_file(self.issued.cert_chain_pems[0].bytes())
        for files, problem in (
            ({"ca_file": nothing}, f"{nothing} has no PEM certificate"),
            ({"certificate": nothing}, f"{nothing} has no PEM certificate"),
            ({"certificate": alone}, f"{alone} has no usable key"),
            ({"certificate": self.path, "key": encrypted}, f"{encrypted} has no usable key: .* not encrypted"),
            ({"certificate": self.path, "key": others}, f"{others} does not match the certificate in {self.path}"),
            ({"key": self.path}, "key is given without certificate"),
        ):
            with self.assertRaisesRegex(ValueError, problem):
                tls_of_files(**files)("localhost")
