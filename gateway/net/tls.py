"""TLS endpoints whose idle connections use as little memory as possible.

    ssl:8443:privateKey=key.pem:certKey=chain.pem
    mtls:8443:privateKey=key.pem:certKey=chain.pem:clientCAs=ca.pem    clients present certificates;
                                                                      required=no: or none

The protocol between socket and connection is Twisted's TLSMemoryBIOProtocol, and ``ssl:`` takes the parameters of
Twisted's ``ssl:``. The difference is the state of a connection: the ``ssl`` module of Python, with the OpenSSL of
Python, in place of pyOpenSSL with the OpenSSL that it bundles. Newer versions of OpenSSL use more memory per connection
(benchmarks/tls.py).

    bytes from the socket -> bio_write … recv -> plaintext received
    bytes for the socket  <- bio_read …  send <- plaintext to send

The memory BIOs of OpenSSL grow with the data that they hold and never shrink, so :class:`MemoryBIOConnection` passes
data in chunks. A handshake is limited in time and bytes; so is what OpenSSL itself sends to a peer that does not read.

A TLS record costs CPU however few bytes it carries, and records such as KeyUpdate carry none. So each record has a
cost, which the bytes that it carries pay for: see :data:`RECORD_COST`.

Failed handshakes are counted by reason. Port scanners cause them all day, so only failures about certificates are
logged: these keep out clients that should connect.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from cryptography import x509
from OpenSSL import SSL, crypto
from service_identity import VerificationError
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import (
    IListeningPort,
    IOpenSSLServerConnectionCreator,
    IProtocolFactory,
    IProtocolNegotiationFactory,
    IStreamServerEndpoint,
    ITransport,
)
from twisted.internet.protocol import connectionDone
from twisted.internet.tcp import Port, Server
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.metrics import Metrics
from gateway.net.certificates import Certificates
from gateway.net.errors import TLSError
from gateway.util.log import LogLimiter
from gateway.util.timers import Timer, TimerWheel


def describe_tls_error(e: BaseException | None) -> str:
    """Describe in one line why TLS with a server failed. Returns an empty string if ``e`` is not a TLS error."""
    if isinstance(e, VerificationError):
        return "its certificate is not for the host in this url"
    if not isinstance(e, SSL.Error):
        return ""
    errors = e.args[0] if e.args else ()
    reason = errors[-1][2] if isinstance(errors, (list, tuple)) and errors else "connection closed"
    if reason == "certificate verify failed":
        return (
            "its certificate has expired or is not valid yet, or no trusted CA has signed it "
            f"({reason}); is SSL_CERT_FILE required?"
        )
    return f"TLS failed ({reason})"


#: minimum time between two log lines about failed handshakes, in seconds
LOG_INTERVAL = 60.0
#: maximum number of distinct hosts counted between two log lines
MAX_HOSTS = 1000

#: reasons that are logged, and their explanation
_LOGGED_REASONS = {
    "no_certificate": "the client has no certificate",
    "unknown_ca": "its certificate is not signed by a CA in the file clientCAs",
    "certificate_expired": "its certificate has expired, or is not valid yet",
    "certificate": "its certificate is invalid ({detail})",
    "refused_by_client": "the client rejects the certificate of this node ({detail})",
}
#: verification error of OpenSSL (X509_V_ERR_…, openssl-verification-options(1)) -> reason
_VERIFY_REASONS = {
    2: "unknown_ca",  # unable to get the issuer's certificate
    18: "unknown_ca",  # self-signed
    19: "unknown_ca",  # self-signed, in the chain
    20: "unknown_ca",  # unable to get the issuer's certificate locally
    21: "unknown_ca",  # unable to verify the first certificate
    9: "certificate_expired",  # not valid yet
    10: "certificate_expired",
}


def to_tls_error(e: ssl.SSLError) -> TLSError:
    """Convert an error of Python's ``ssl`` module to the one that pyOpenSSL raises."""
    if isinstance(e, ssl.SSLCertVerificationError):
        return TLSError(e.verify_message, _VERIFY_REASONS.get(e.verify_code, "certificate"))
    return TLSError(e.reason or str(e))


class TLSHandshakeErrors:
    """Count failed TLS handshakes of the endpoints of an option, and log failures about certificates."""

    _log = Logger()

    def __init__(self, option: str, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._option = option
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock, LOG_INTERVAL)
        self._hosts: set[str] = set()

    def record(self, address: object, reason: str, detail: str = "") -> None:
        """Record a failed handshake with the client at ``address``."""
        self._metrics.tls_failures[reason] += 1
        if reason not in _LOGGED_REASONS:
            return
        host = str(getattr(address, "host", "this machine"))
        suppressed = self._log_limiter.allow()
        if suppressed is None:
            if len(self._hosts) < MAX_HOSTS:
                self._hosts.add(host)
            return
        self._log.warn(
            "--{option}: TLS failed with {host}: {reason} ({suppressed} more times since this was last logged, from "
            "{hosts} addresses)",
            option=self._option,
            host=host,
            reason=_LOGGED_REASONS[reason].format(detail=" ".join(detail.split())),
            suppressed=suppressed,
            hosts=len(self._hosts),
        )
        self._hosts = set()


#: bytes passed to or from OpenSSL at once
CHUNK_SIZE = 2**12
#: maximum size of a handshake received from the client, with its certificate chain, in bytes
MAX_HANDSHAKE_SIZE = 2**15
#: maximum number of bytes that OpenSSL may send on its own after the handshake, such as refusals to renegotiate
MAX_UNSOLICITED_SIZE = 2**12
#: maximum size of the plaintext of a TLS record, in bytes
MAX_RECORD_SIZE = 2**14
#: plaintext that a record must carry on average, in bytes; less is charged to the credit of the client
RECORD_COST = 32
#: bytes charged in addition for a record without plaintext
EMPTY_RECORD_COST = 512
#: maximum credit of a client, in bytes: 2,000 records of one byte at once, or 120 KeyUpdates
MAX_CREDIT = 2**16
#: credit that a client regains per second, in bytes: 500 records of one byte, or 30 KeyUpdates
CREDIT_PER_SECOND = 2**14

#: plaintext collected from several records before it is delivered, in bytes
MAX_READ_SIZE = 2**15

#: shared by all connections, since a read completes before another one starts
_read_buffer = memoryview(bytearray(MAX_READ_SIZE + MAX_RECORD_SIZE))
_LENGTH_FIELD = struct.Struct("!H")
_T = TypeVar("_T")


class MemoryBIOConnection:
    """State of a TLS connection in memory BIOs.

    Implements the part of ``OpenSSL.SSL.Connection`` that Twisted's TLSMemoryBIOProtocol uses, and raises its
    exceptions.
    """

    __slots__ = (
        "_byte_budget",
        "_bytes_to_next_record",
        "_clock",
        "_credited_at",
        "_deferred_error",
        "_handshake_done",
        "_incoming_bio",
        "_outgoing_bio",
        "_partial_header",
        "_pending_input",
        "_read_ahead",
        "_record_credit",
        "_ssl_object",
    )  # fmt: skip

    def __init__(self, context: ssl.SSLContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._incoming_bio = ssl.MemoryBIO()
        self._outgoing_bio = ssl.MemoryBIO()
        self._ssl_object = context.wrap_bio(self._incoming_bio, self._outgoing_bio, server_side=True)
        #: received bytes that were not passed to OpenSSL yet
        self._pending_input = b""
        #: plaintext that was read before recv() was called
        self._read_ahead = b""
        self._handshake_done = False
        #: error to raise by the next recv(), found after plaintext that was returned first
        self._deferred_error: SSL.Error | None = None
        #: received part of the header of the next record
        self._partial_header = b""
        #: bytes of the current record that are still to be received
        self._bytes_to_next_record = 0
        #: remaining credit for small records, in bytes
        self._record_credit = MAX_CREDIT
        #: when the credit was last refilled
        self._credited_at = 0.0
        self._clock = clock
        #: remaining bytes that the client may send in the handshake; after it, that OpenSSL may send on its own
        self._byte_budget = MAX_HANDSHAKE_SIZE

    # Ciphertext.

    def bio_write(self, data: bytes) -> int:
        """Receive ciphertext from the socket."""
        self._pending_input += data
        return len(data)

    def bio_read(self, size: int) -> bytes:
        """Return ciphertext to write to the socket. Raises ``WantReadError`` if there is none."""
        data = self._outgoing_bio.read(size)
        if not data:
            raise SSL.WantReadError
        return data

    def bio_shutdown(self) -> None:
        """Receive the end of the connection."""
        self._feed_openssl(len(self._pending_input))
        self._incoming_bio.write_eof()

    def _feed_openssl(self, size: int) -> None:
        chunk, self._pending_input = self._pending_input[:size], self._pending_input[size:]
        records = self._count_records(chunk)
        if self._handshake_done:
            self._record_credit -= EMPTY_RECORD_COST * records
        self._incoming_bio.write(chunk)

    def _count_records(self, data: bytes) -> int:
        """Count records that begin in the next bytes. A header is type, version and length (RFC 8446, section 5.1)."""
        data, at, records = self._partial_header + data, self._bytes_to_next_record, 0
        while at + 5 <= len(data):
            at += 5 + _LENGTH_FIELD.unpack_from(data, at + 3)[0]
            records += 1
        self._partial_header, self._bytes_to_next_record = data[at:], max(0, at - len(data))
        return records

    # Plaintext.

    def do_handshake(self) -> None:
        """Continue the handshake. Raises ``WantReadError`` if it needs more bytes from the client."""
        self._run(self._ssl_object.do_handshake)
        if self._ssl_object.session_reused and self._certificate_expired():
            raise TLSError("CERTIFICATE_HAS_ENDED")
        self._handshake_done, self._byte_budget = True, MAX_UNSOLICITED_SIZE
        self._credited_at = self._clock()

    def _certificate_expired(self) -> bool:
        # A TLS 1.2 ticket contains the client's certificate, which OpenSSL does not verify again.
        certificate = self.verified_certificate()
        return certificate is not None and (
            x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp() < time.time()
        )

    def recv(self, size: int) -> bytes:
        """Return received plaintext, of as many records as are available."""
        if self._read_ahead:
            data, self._read_ahead = self._read_ahead, b""
            return data
        error, self._deferred_error = self._deferred_error, None
        if error is not None:
            raise error
        # Deliver all records at once: the cost of a delivery hardly depends on its size.
        length = 0
        max_length = min(size, MAX_READ_SIZE)
        while length < max_length:
            try:
                length += self._read_record(length)
            except SSL.Error as e:
                if not length:
                    raise
                self._deferred_error = e
                break
        return bytes(_read_buffer[:length])

    def _read_record(self, offset: int) -> int:
        """Read the plaintext of one record into the read buffer at ``offset``; return its size.

        Raises ``ZeroReturnError`` at the end of the connection.
        """
        # The type in typeshed is that of a call without a buffer.
        read: Callable[..., int] = self._ssl_object.read  # type: ignore[assignment]
        size = self._run(read, MAX_RECORD_SIZE, _read_buffer[offset : offset + MAX_RECORD_SIZE])
        if not size:
            raise SSL.ZeroReturnError
        credit = self._record_credit + EMPTY_RECORD_COST - RECORD_COST + size
        self._record_credit = credit if credit < MAX_CREDIT else MAX_CREDIT
        return size

    def send(self, data: bytes) -> int:
        """Encrypt plaintext, at most one chunk; return how many bytes were accepted."""
        try:
            return self._ssl_object.write(data[:CHUNK_SIZE])
        except ssl.SSLError as e:
            _raise_as_pyopenssl(e)

    def shutdown(self) -> bool:
        """Send close_notify. Returns whether the client has sent it, too."""
        # Python's unwrap() reads the client's close_notify at once, and fails on plaintext that precedes it.
        with contextlib.suppress(SSL.Error):
            while size := self._read_record(0):
                self._read_ahead += _read_buffer[:size]
        try:
            self._ssl_object.unwrap()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as e:
            _raise_as_pyopenssl(e)
        return True

    def _run(self, step: Callable[..., _T], *args: Any) -> _T:
        while True:
            pending_before = self._outgoing_bio.pending
            try:
                return step(*args)
            except ssl.SSLWantReadError:
                # OpenSSL has processed all records passed to it.
                if self._record_credit < 0:
                    self._refill_credit()
                if not self._pending_input:
                    raise SSL.WantReadError from None
            except ssl.SSLError as e:
                _raise_as_pyopenssl(e)
            finally:
                if self._handshake_done:
                    self._spend_bytes(self._outgoing_bio.pending - pending_before)
            if not self._handshake_done:
                self._spend_bytes(min(CHUNK_SIZE, len(self._pending_input)))
            self._feed_openssl(CHUNK_SIZE)

    def _spend_bytes(self, size: int) -> None:
        self._byte_budget -= size
        if self._byte_budget < 0:
            raise TLSError("too many bytes in the handshake, or of responses to requests of TLS itself")

    def _refill_credit(self) -> None:
        now = self._clock()
        self._record_credit = min(MAX_CREDIT, self._record_credit + int((now - self._credited_at) * CREDIT_PER_SECOND))
        self._credited_at = now
        if self._record_credit < 0:
            raise TLSError("TOO_MANY_RECORDS")

    # Properties of the connection.

    def verified_certificate(self) -> bytes | None:
        """Return the client certificate (DER), or ``None`` if none was requested or presented."""
        return self._ssl_object.getpeercert(binary_form=True) if self._ssl_object.context.verify_mode else None

    def get_alpn_proto_negotiated(self) -> bytes:
        """Return the protocol chosen by ALPN, or an empty string."""
        return (self._ssl_object.selected_alpn_protocol() or "").encode("ascii")

    def get_peer_certificate(self) -> crypto.X509 | None:
        """Return the client certificate, or ``None``."""
        certificate = self._ssl_object.getpeercert(binary_form=True)
        return None if certificate is None else crypto.load_certificate(crypto.FILETYPE_ASN1, certificate)

    def get_context(self) -> Any:
        """Return an object with the setters that Twisted calls on a pyOpenSSL context, which do nothing here."""
        return self

    def _ignore(self, *args: object) -> None:
        pass

    set_accept_state = set_app_data = set_alpn_protos = set_alpn_select_callback = _ignore


def _raise_as_pyopenssl(e: ssl.SSLError) -> NoReturn:
    if isinstance(e, ssl.SSLWantReadError):
        raise SSL.WantReadError from None
    if isinstance(e, ssl.SSLZeroReturnError):
        raise SSL.ZeroReturnError from None
    if isinstance(e, ssl.SSLEOFError):
        raise SSL.SysCallError(-1, "Unexpected EOF") from None
    raise to_tls_error(e) from None


#: timeout of a TLS handshake, in seconds: slightly more than that of the opening handshake, of which it is a part, so
#: that the timeout of the opening handshake applies and is counted
HANDSHAKE_TIMEOUT = 5.25


def is_tls(description: str) -> bool:
    """Return whether an endpoint string is one of TLS."""
    return description.startswith(("ssl:", "mtls:"))


def parse_endpoint(
    reactor: Any,
    description: str,
    wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp,
    handshake_errors: TLSHandshakeErrors | None = None,
) -> TLSEndpoint:
    """Parse an ``ssl:`` or ``mtls:`` endpoint string.

    ``wrap`` can add a layer between TCP and TLS. ``handshake_errors`` records failed handshakes.

    Raises ``ValueError``, ``TypeError`` or ``OSError`` if the string is invalid or a file cannot be used.
    """
    kind, *fields = split_description(description)
    keyword_arguments = dict(field for field in fields if isinstance(field, tuple))
    arguments = [field for field in fields if isinstance(field, str)]
    return make_endpoint(str(kind), reactor, arguments, keyword_arguments, wrap, handshake_errors)


def make_endpoint(
    kind: str,
    reactor: Any,
    arguments: Iterable[str],
    keyword_arguments: Mapping[str, str],
    wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp,
    handshake_errors: TLSHandshakeErrors | None = None,
) -> TLSEndpoint:
    """Make a TLS endpoint from the split fields of an endpoint string, like :func:`parse_endpoint`."""
    options = dict(keyword_arguments)
    if kind == "ssl" and not options.keys().isdisjoint(("clientCAs", "required")):
        raise TypeError("ssl: does not ask for client certificates; use mtls:")
    authorities, required = _pop_client_options(options) if kind == "mtls" else ("", True)
    try:
        address, files = _parameters(*arguments, **options)
    except TypeError as e:
        raise TypeError(str(e).replace("_parameters()", f"{kind}:")) from None
    certificates = Certificates(*files, authorities, required=required)
    return TLSEndpoint(wrap(TCP4ServerEndpoint(reactor, *address)), certificates, reactor, handshake_errors)


def split_description(description: str) -> list[str | tuple[str, str]]:
    """Split an endpoint string at colons, into strings and ``(name, value)`` pairs. ``\\`` escapes a character."""
    fields: list[str | tuple[str, str]] = []
    name: str | None = None
    text = ""
    characters = iter(description)
    for character in characters:
        if character == ":":
            fields.append(text if name is None else (name, text))
            name, text = None, ""
        elif character == "=" and name is None:
            name, text = text, ""
        else:
            text += next(characters, "") if character == "\\" else character
    fields.append(text if name is None else (name, text))
    return fields


def _parameters(
    port: str,
    privateKey: str = "server.pem",
    certKey: str = "",
    sslmethod: str = "TLS_METHOD",
    interface: str = "",
    backlog: str = "50",
    extraCertChain: str = "",
    dhParameters: str = "",
) -> tuple[tuple[int, int, str], tuple[str, str, str, str, str]]:
    """Take the parameters of both kinds of endpoint; return those of the TCP endpoint, and the files."""
    return (int(port), int(backlog), interface), (privateKey, certKey, extraCertChain, sslmethod, dhParameters)


def _pop_client_options(options: dict[str, str]) -> tuple[str, bool]:
    """Remove the options of ``mtls:``; return the path of the client CAs, and whether a certificate is required."""
    authorities, required = options.pop("clientCAs", ""), options.pop("required", "yes")
    if not authorities:
        raise ValueError("clientCAs=FILE is missing: the CAs of the clients' certificates, as PEM")
    if required not in ("yes", "no"):
        raise ValueError("required must be yes or no")
    return authorities, required == "yes"


@implementer(IOpenSSLServerConnectionCreator)
class _ConnectionCreator:
    """Make the state of new connections, with the current TLS context."""

    def __init__(self, certificates: Certificates, clock: Any) -> None:
        self._certificates = certificates
        self._clock = clock.seconds

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Any:
        return MemoryBIOConnection(self._certificates.context, self._clock)


class _SmallReadTransport(Server):
    """Transport that reads fewer bytes at once than Twisted's.

    All bytes read are processed in one reactor iteration, and in the smallest TLS records the same number of bytes
    takes hundreds of times the CPU time.
    """

    #: bytes
    bufferSize = 2**15


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """Add TLS to another endpoint."""

    def __init__(
        self,
        wrapped: IStreamServerEndpoint,
        certificates: Certificates,
        clock: Any,
        handshake_errors: TLSHandshakeErrors | None = None,
    ) -> None:
        self.certificates = certificates
        self._wrapped = wrapped
        self._clock = clock
        self._handshake_errors = handshake_errors

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen. ``factory`` makes the protocols that receive the plaintext."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self.certificates.set_alpn_protocols([name.decode("ascii") for name in factory.acceptableProtocols()])
        tls_factory = TLSFactory(self.certificates, factory, self._clock, self._handshake_errors)
        listening: Deferred[IListeningPort] = self._wrapped.listen(tls_factory)
        return listening.addCallback(_limit_read_size)


def _limit_read_size(port: Any) -> Any:
    # Relies on Twisted's ports: ``transport`` is the class of the transport of each connection.
    if isinstance(port, Port) and port.transport is Server:
        port.transport = _SmallReadTransport
    return port


class TLSProtocol(TLSMemoryBIOProtocol):
    """TLS between a transport and a protocol.

    The base is not Twisted's BufferingTLSTransport, which collects the writes of a reactor iteration: the protocols of
    a node already do that (util/cork.py).
    """

    factory: TLSFactory
    _handshake_timer: Timer | None = None

    def makeConnection(self, transport: ITransport) -> None:
        """Start the handshake."""
        self._handshake_timer = self.factory.timer_wheel.call_later(HANDSHAKE_TIMEOUT, self._handshake_timed_out)
        super().makeConnection(transport)  # type: ignore[no-untyped-call]

    def _handshake_timed_out(self) -> None:
        self._handshake_timer = None
        self._record_error("timeout")
        self.abortConnection()  # type: ignore[no-untyped-call]

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()  # type: ignore[no-untyped-call]
        if self._handshakeDone:
            self._cancel_handshake_timer()

    def _cancel_handshake_timer(self) -> None:
        timer, self._handshake_timer = self._handshake_timer, None
        if timer is not None:
            timer.cancel()

    def _tlsShutdownFinished(self, reason: Failure | None) -> None:
        error = None if reason is None or self._lostTLSConnection else reason.value
        # After the handshake an error is an ordinary end of the connection, unless it was closed for its records.
        if isinstance(error, TLSError) and (not self._handshakeDone or error.reason == "records"):
            self._record_error(error.reason, error.detail)
        super()._tlsShutdownFinished(reason)  # type: ignore[no-untyped-call]

    def _record_error(self, reason: str, detail: str = "") -> None:
        if self.factory.handshake_errors is not None:
            self.factory.handshake_errors.record(self.getPeer(), reason, detail)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._cancel_handshake_timer()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class TLSFactory(TLSMemoryBIOFactory):
    """Wrap the protocols of a factory in TLS."""

    protocol = TLSProtocol

    def __init__(
        self,
        certificates: Certificates,
        wrapped: IProtocolFactory,
        clock: Any,
        handshake_errors: TLSHandshakeErrors | None = None,
    ) -> None:
        super().__init__(_ConnectionCreator(certificates, clock), False, wrapped, clock)
        self.timer_wheel = TimerWheel(clock)
        self.handshake_errors = handshake_errors

    def buildProtocol(self, addr: Any) -> Any:
        """Make the protocol of a connection, or return ``None`` to drop it if the wrapped factory does."""
        wrapped = self.wrappedFactory.buildProtocol(addr)
        return None if wrapped is None else self.protocol(self, wrapped)  # type: ignore[no-untyped-call]

    def registerProtocol(self, p: object) -> None:
        """Do nothing: Twisted keeps a dict of all connections, which is not used here."""

    def unregisterProtocol(self, p: object) -> None:
        pass


def verified_certificate(transport: Any) -> bytes | None:
    """Return the client certificate (DER) of a transport of these endpoints, or ``None`` if none was verified."""
    connection = getattr(transport, "_tlsConnection", None)
    return connection.verified_certificate() if isinstance(connection, MemoryBIOConnection) else None
