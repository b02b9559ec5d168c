"""What has gone wrong with TLS to another server, in words.

Why TLS was not to be had with a client: by a word that is counted, and now and then by a line in the log.

Who looks for open ports makes TLS fail all day, and that is only counted. The log tells of certificates: what is wrong
there keeps out who should come in.

The state of a connection with TLS: OpenSSL's, in memory, by the ``ssl`` module of Python.

    bytes from the socket -> bio_write … recv -> what the client said
    bytes for the socket  <- bio_read …  send <- what it is told

What OpenSSL reads from and writes to grows with what goes through it, and never shrinks; so that passes in pieces.

A record of TLS is work, whatever it carries, and it need not carry more than a byte, or may be of the kind that carries
nothing at all, such as a KeyUpdate. So each has its price, which what it carries pays: see :data:`RECORD`.

TLS endpoints, whose idle connections hold as little as can be.

    ssl:8443:privateKey=key.pem:certKey=chain.pem
    mtls:8443:privateKey=key.pem:certKey=chain.pem:clientCAs=ca.pem      clients have certificates, too;
                                                                        required=no: or have none

The protocol between sockets and connections is Twisted's. What is different from its own ``ssl:``, which takes the same
parameters, is what holds the state of a connection: the ``ssl`` module of Python, on the OpenSSL that Python has, where
Twisted has pyOpenSSL, on one that comes with it; the newer an OpenSSL is, the more it keeps (benchmarks/tls.py).

That state is in tls_connection.py. A handshake is bounded in time and in bytes, and so are what OpenSSL says of its own
accord to who does not read, and the records of TLS that carry next to nothing.
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
    """Why TLS was not to be had with a server, in a line; an empty text if it is not TLS that failed."""
    if isinstance(e, VerificationError):
        return "its certificate is not for the host in this url"
    if not isinstance(e, SSL.Error):
        return ""
    errors = e.args[0] if e.args else ()
    reason = errors[-1][2] if isinstance(errors, (list, tuple)) and errors else "it ended"
    if reason == "certificate verify failed":
        return f"its certificate has ended, or is of no CA that is trusted here ({reason}); is SSL_CERT_FILE needed?"
    return f"TLS failed ({reason})"


#: the log tells of failures once in so many seconds
LOG_INTERVAL = 60.0
#: so many addresses are told apart between two lines
MAX_HOSTS = 1000

#: what the log tells of, and how
_LOGGED_REASONS = {
    "no_certificate": "the client has no certificate",
    "unknown_ca": "its certificate is of no CA in the file clientCAs",
    "certificate_expired": "its certificate has ended, or has not begun",
    "certificate": "its certificate will not do ({detail})",
    "refused_by_client": "the client does not take this node's certificate ({detail})",
}
#: what OpenSSL found wrong with a certificate (X509_V_ERR_…, openssl-verification-options(1))
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
    """An error of Python's OpenSSL, as one of pyOpenSSL."""
    if isinstance(e, ssl.SSLCertVerificationError):
        return TLSError(e.verify_message, _VERIFY_REASONS.get(e.verify_code, "certificate"))
    return TLSError(e.reason or str(e))


class TLSHandshakeErrors:
    """Counts them for the endpoints of an option, and tells of some in the log."""

    _log = Logger()

    def __init__(self, option: str, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._option = option
        self._metrics = metrics
        self._log_limiter = LogLimiter(clock, LOG_INTERVAL)
        self._hosts: set[str] = set()

    def record(self, address: object, reason: str, detail: str = "") -> None:
        """TLS failed with who is at that address."""
        self._metrics.tls_failures[reason] += 1
        if reason not in _LOGGED_REASONS:
            return
        host = str(getattr(address, "host", "here"))
        untold = self._log_limiter.allow()
        if untold is None:
            if len(self._hosts) < MAX_HOSTS:
                self._hosts.add(host)
            return
        self._log.warn(
            "--{option}: TLS failed with {host}: {why} ({untold} times more since this was last said, with {hosts} "
            "addresses)",
            option=self._option,
            host=host,
            why=_LOGGED_REASONS[reason].format(detail=" ".join(detail.split())),
            untold=untold,
            hosts=len(self._hosts),
        )
        self._hosts = set()


#: so many bytes go to or from OpenSSL at once
CHUNK_SIZE = 4096
#: so many bytes a handshake may have from the client, the certificates that vouch for its own included
MAX_HANDSHAKE_SIZE = 32768
#: so many bytes OpenSSL may say after it that are no answer to anything said here, such as that it will not renegotiate
MAX_UNSOLICITED_SIZE = 4096
#: The most bytes that a record of TLS carries.
MAX_RECORD_SIZE = 16384
#: So many bytes a record has to carry, on average; and so many more one that carries none would have to.
RECORD_COST, EMPTY_RECORD_COST = 32, 512
#: A client is lent so many bytes, and again so many in a second: enough for 500 records of a byte in each second, and
#: for 2,000 at once; or for 30 KeyUpdates, and 120 at once.
MAX_CREDIT, CREDIT_PER_SECOND = 65536, 16384

#: So many bytes are gathered from records, if they are there, before they are handed on.
MAX_READ_SIZE = 32768

#: where they are gathered, for all connections: nothing else happens meanwhile
_read_buffer = memoryview(bytearray(MAX_READ_SIZE + MAX_RECORD_SIZE))
_LENGTH_FIELD = struct.Struct("!H")
_T = TypeVar("_T")


class MemoryBIOConnection:
    """Stands where Twisted has a pyOpenSSL connection in memory, as far as it asks for one; raises what that raises."""

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
        #: what came, and was not given to OpenSSL yet
        self._pending_input = b""
        #: what was read before it was asked for
        self._read_ahead = b""
        #: whether the handshake is over
        self._handshake_done = False
        #: why there is no more, if that was found when there was something yet
        self._deferred_error: SSL.Error | None = None
        #: the beginning of a record's header, and how much of a record is to come before the next one
        self._partial_header, self._bytes_to_next_record = b"", 0
        #: what the client has to spend on records, and since when it is lent more
        self._record_credit, self._credited_at = MAX_CREDIT, 0.0
        self._clock = clock
        #: how many bytes of a handshake may yet come; after it, how many may yet go out that nobody asked for
        self._byte_budget = MAX_HANDSHAKE_SIZE

    # What is encrypted.

    def bio_write(self, data: bytes) -> int:
        """Bytes came from the other side."""
        self._pending_input += data
        return len(data)

    def bio_read(self, size: int) -> bytes:
        """The bytes that are to go to the other side."""
        data = self._outgoing_bio.read(size)
        if not data:
            raise SSL.WantReadError
        return data

    def bio_shutdown(self) -> None:
        """No more will come."""
        self._feed_openssl(len(self._pending_input))
        self._incoming_bio.write_eof()

    def _feed_openssl(self, size: int) -> None:
        piece, self._pending_input = self._pending_input[:size], self._pending_input[size:]
        records = self._count_records(piece)
        if self._handshake_done:
            self._record_credit -= EMPTY_RECORD_COST * records
        self._incoming_bio.write(piece)

    def _count_records(self, data: bytes) -> int:
        """How many records begin in the next bytes. Each has a type, a version and a length first (RFC 8446, 5.1)."""
        data, at, records = self._partial_header + data, self._bytes_to_next_record, 0
        while at + 5 <= len(data):
            at += 5 + _LENGTH_FIELD.unpack_from(data, at + 3)[0]
            records += 1
        self._partial_header, self._bytes_to_next_record = data[at:], max(0, at - len(data))
        return records

    # What is not.

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        self._run(self._ssl_object.do_handshake)
        if self._ssl_object.session_reused and self._certificate_expired():
            raise TLSError("CERTIFICATE_HAS_ENDED")
        self._handshake_done, self._byte_budget = True, MAX_UNSOLICITED_SIZE
        self._credited_at = self._clock()

    def _certificate_expired(self) -> bool:
        # A ticket of TLS 1.2 has the client's certificate in it, at which OpenSSL does not look again.
        certificate = self.verified_certificate()
        return certificate is not None and (
            x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp() < time.time()
        )

    def recv(self, size: int) -> bytes:
        """What the other side said."""
        if self._read_ahead:
            data, self._read_ahead = self._read_ahead, b""
            return data
        failed, self._deferred_error = self._deferred_error, None
        if failed is not None:
            raise failed
        # All that there is, in one: whoever gets it has as much to do with a byte as with a thousand.
        there, most = 0, min(size, MAX_READ_SIZE)
        while there < most:
            try:
                there += self._read_record(there)
            except SSL.Error as e:
                if not there:
                    raise
                self._deferred_error = e
                break
        return bytes(_read_buffer[:there])

    def _read_record(self, offset: int) -> int:
        """Read what one record carries to a place where others may be before it; its size. Raises ZeroReturnError at
        the end of all."""
        # What typeshed says of it is for a call without a buffer.
        read: Callable[..., int] = self._ssl_object.read  # type: ignore[assignment]
        size = self._run(read, MAX_RECORD_SIZE, _read_buffer[offset : offset + MAX_RECORD_SIZE])
        if not size:
            raise SSL.ZeroReturnError
        room = self._record_credit + EMPTY_RECORD_COST - RECORD_COST + size
        self._record_credit = room if room < MAX_CREDIT else MAX_CREDIT
        return size

    def send(self, data: bytes) -> int:
        """Say something; how much of it was taken."""
        try:
            return self._ssl_object.write(data[:CHUNK_SIZE])
        except ssl.SSLError as e:
            _raise_as_pyopenssl(e)

    def shutdown(self) -> bool:
        """Say that nothing more will be said; whether the other side has said so, too."""
        # Python looks for the other side's word at once, and what it said before would be in the way of that.
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
            said = self._outgoing_bio.pending
            try:
                return step(*args)
            except ssl.SSLWantReadError:
                # OpenSSL has gone through all records that it was given.
                if self._record_credit < 0:
                    self._refill_credit()
                if not self._pending_input:
                    raise SSL.WantReadError from None
            except ssl.SSLError as e:
                _raise_as_pyopenssl(e)
            finally:
                if self._handshake_done:
                    self._spend_bytes(self._outgoing_bio.pending - said)
            if not self._handshake_done:
                self._spend_bytes(min(CHUNK_SIZE, len(self._pending_input)))
            self._feed_openssl(CHUNK_SIZE)

    def _spend_bytes(self, size: int) -> None:
        self._byte_budget -= size
        if self._byte_budget < 0:
            raise TLSError("the other side asks too much")

    def _refill_credit(self) -> None:
        now = self._clock()
        self._record_credit = min(MAX_CREDIT, self._record_credit + int((now - self._credited_at) * CREDIT_PER_SECOND))
        self._credited_at = now
        if self._record_credit < 0:
            raise TLSError("TOO_MANY_RECORDS")

    # What else there is to ask.

    def verified_certificate(self) -> bytes | None:
        """The other side's certificate (DER); ``None`` unless it was asked for one, and has one that was verified."""
        return self._ssl_object.getpeercert(binary_form=True) if self._ssl_object.context.verify_mode else None

    def get_alpn_proto_negotiated(self) -> bytes:
        """The protocol that was chosen, or nothing."""
        return (self._ssl_object.selected_alpn_protocol() or "").encode("ascii")

    def get_peer_certificate(self) -> crypto.X509 | None:
        """The other side's certificate, if it was asked for one."""
        certificate = self._ssl_object.getpeercert(binary_form=True)
        return None if certificate is None else crypto.load_certificate(crypto.FILETYPE_ASN1, certificate)

    def get_context(self) -> Any:
        """What Twisted would now set on a context of pyOpenSSL is set on ours already."""
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


#: how long a TLS handshake may take, in seconds: a little longer than a client's opening handshake, of which it is a
#: part, so that it is that which ends, and is counted
HANDSHAKE_TIMEOUT = 5.25


def is_tls(description: str) -> bool:
    """Whether an endpoint string is for this module."""
    return description.startswith(("ssl:", "mtls:"))


def parse_endpoint(
    reactor: Any, description: str, wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp
) -> TLSEndpoint:
    """The endpoint of an ``ssl:`` or ``mtls:`` string. ``wrap`` puts something between TCP and TLS.

    Raises ``ValueError``, ``TypeError`` or ``OSError`` for one that will not do, and for files that will not.
    """
    kind, *parts = split_description(description)
    given = dict(part for part in parts if isinstance(part, tuple))
    return make_endpoint(str(kind), reactor, [part for part in parts if isinstance(part, str)], given, wrap)


def make_endpoint(
    kind: str,
    reactor: Any,
    arguments: Iterable[str],
    keyword_arguments: Mapping[str, str],
    wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp,
) -> TLSEndpoint:
    """The same, of a string that was taken apart."""
    given = dict(keyword_arguments)
    if kind == "ssl" and not given.keys().isdisjoint(("clientCAs", "required")):
        raise TypeError("ssl: asks for no client certificates; mtls: does")
    authorities, required = _pop_client_options(given) if kind == "mtls" else ("", True)
    try:
        address, files = _parameters(*arguments, **given)
    except TypeError as e:
        raise TypeError(str(e).replace("_parameters()", f"{kind}:")) from None
    certificates = Certificates(*files, authorities, required=required)
    return TLSEndpoint(wrap(TCP4ServerEndpoint(reactor, *address)), certificates, reactor)


def split_description(description: str) -> list[str | tuple[str, str]]:
    """The parts of an endpoint string: texts, and pairs of a name and a text. ``\\`` takes a character as it is."""
    parts: list[str | tuple[str, str]] = []
    name: str | None = None
    text = ""
    characters = iter(description)
    for character in characters:
        if character == ":":
            parts.append(text if name is None else (name, text))
            name, text = None, ""
        elif character == "=" and name is None:
            name, text = text, ""
        else:
            text += next(characters, "") if character == "\\" else character
    parts.append(text if name is None else (name, text))
    return parts


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
    """Those of both kinds: where to listen, and the files."""
    return (int(port), int(backlog), interface), (privateKey, certKey, extraCertChain, sslmethod, dhParameters)


def _pop_client_options(options: dict[str, str]) -> tuple[str, bool]:
    """Takes those of ``mtls:`` alone: the CAs of clients' certificates, and whether each must have one."""
    authorities, required = options.pop("clientCAs", ""), options.pop("required", "yes")
    if not authorities:
        raise ValueError("clientCAs=FILE is missing: the CAs of the clients' certificates, as PEM")
    if required not in ("yes", "no"):
        raise ValueError("required is yes or no")
    return authorities, required == "yes"


@implementer(IOpenSSLServerConnectionCreator)
class _ConnectionCreator:
    """Makes connections of what was read last of some files."""

    def __init__(self, certificates: Certificates, clock: Any) -> None:
        self._certificates = certificates
        self._clock = clock.seconds

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Any:
        """The state of a new connection."""
        return MemoryBIOConnection(self._certificates.context, self._clock)


class _SmallReadTransport(Server):
    """One of Twisted's that reads less at once: the smallest records of TLS are hundreds of times the work of others of
    the same size, and all that was read is done in one turn of the reactor."""

    bufferSize = 32768


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """TLS on another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, certificates: Certificates, clock: Any) -> None:
        self.certificates = certificates
        #: who is told of connections with which TLS failed
        self.handshake_errors: TLSHandshakeErrors | None = None
        self._wrapped = wrapped
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, with a factory for what is within TLS."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self.certificates.set_alpn_protocols([name.decode("ascii") for name in factory.acceptableProtocols()])
        within = TLSFactory(self.certificates, factory, self._clock, self.handshake_errors)
        listening: Deferred[IListeningPort] = self._wrapped.listen(within)
        return listening.addCallback(_limit_read_size)


def _limit_read_size(port: Any) -> Any:
    # What is known here of Twisted's ports: this is what they make for each connection.
    if isinstance(port, Port) and port.transport is Server:
        port.transport = _SmallReadTransport
    return port


class TLSProtocol(TLSMemoryBIOProtocol):
    """TLS between a transport and a protocol. Not the kind that gathers what is written in a turn of the reactor: that
    is done already by whoever writes here."""

    factory: TLSFactory
    _handshake_timer: Timer | None = None

    def makeConnection(self, transport: ITransport) -> None:
        """The transport is there, and the handshake begins."""
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
        problem = None if reason is None or self._lostTLSConnection else reason.value
        # After the handshake an error is the end of a connection like any other, unless it was ended here.
        if isinstance(problem, TLSError) and (not self._handshakeDone or problem.reason == "records"):
            self._record_error(problem.reason, problem.detail)
        super()._tlsShutdownFinished(reason)  # type: ignore[no-untyped-call]

    def _record_error(self, reason: str, detail: str = "") -> None:
        if self.factory.handshake_errors is not None:
            self.factory.handshake_errors.record(self.getPeer(), reason, detail)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self._cancel_handshake_timer()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class TLSFactory(TLSMemoryBIOFactory):
    """Puts TLS between a transport and a protocol."""

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
        """Make the protocol of a connection; ``None``, as of the factory within, drops it."""
        within = self.wrappedFactory.buildProtocol(addr)
        return None if within is None else self.protocol(self, within)  # type: ignore[no-untyped-call]

    def registerProtocol(self, p: object) -> None:
        """Twisted keeps a list of its connections, at which nobody looks."""

    def unregisterProtocol(self, p: object) -> None:
        """See there."""


def verified_certificate(transport: Any) -> bytes | None:
    """The certificate (DER) of the other side of a transport, if one was asked for by one of these endpoints, and
    verified; else ``None``."""
    connection = getattr(transport, "_tlsConnection", None)
    return connection.verified_certificate() if isinstance(connection, MemoryBIOConnection) else None
