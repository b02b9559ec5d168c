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
import math
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
from gateway.util.timers import Timer, Timers


def explain_tls(e: BaseException | None) -> str:
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
TELL_EVERY = 60.0
#: so many addresses are told apart between two lines
MAX_HOSTS = 1000

#: what the log tells of, and how
_TOLD = {
    "no_certificate": "the client has no certificate",
    "unknown_ca": "its certificate is of no CA in the file clientCAs",
    "certificate_expired": "its certificate has ended, or has not begun",
    "certificate": "its certificate will not do ({detail})",
    "refused_by_client": "the client does not take this node's certificate ({detail})",
}
#: what OpenSSL found wrong with a certificate (X509_V_ERR_…, openssl-verification-options(1))
_VERIFIED = {
    2: "unknown_ca",  # unable to get the issuer's certificate
    18: "unknown_ca",  # self-signed
    19: "unknown_ca",  # self-signed, in the chain
    20: "unknown_ca",  # unable to get the issuer's certificate locally
    21: "unknown_ca",  # unable to verify the first certificate
    9: "certificate_expired",  # not valid yet
    10: "certificate_expired",
}
#: a part of OpenSSL's reason -> word; the first that fits
_REASONS = {
    "DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_HAS_ENDED": "certificate_expired",
    "ALERT_UNKNOWN_CA": "refused_by_client",
    "ALERT_BAD_CERTIFICATE": "refused_by_client",
    "ALERT_UNSUPPORTED_CERTIFICATE": "refused_by_client",
    "ALERT_CERTIFICATE": "refused_by_client",
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "ALERT_PROTOCOL_VERSION": "version",
    "NO_SHARED_CIPHER": "version",
    "HTTP_REQUEST": "not_tls",
    "HTTPS_PROXY_REQUEST": "not_tls",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "RECORD_LAYER_FAILURE": "not_tls",
    "PACKET_LENGTH_TOO_LONG": "not_tls",
    "TOO_MANY_RECORDS": "records",
}


class TLSError(SSL.Error):
    """TLS cannot go on. ``word`` is one of few, ``detail`` OpenSSL's own."""

    def __init__(self, detail: str, word: str = "") -> None:
        super().__init__([("SSL routines", "", detail)])
        self.detail = detail
        self.word = word or next((word for part, word in _REASONS.items() if part in detail), "other")


def of(e: ssl.SSLError) -> TLSError:
    """An error of Python's OpenSSL, as one of pyOpenSSL."""
    if isinstance(e, ssl.SSLCertVerificationError):
        return TLSError(e.verify_message, _VERIFIED.get(e.verify_code, "certificate"))
    return TLSError(e.reason or str(e))


class Failures:
    """Counts them for the endpoints of an option, and tells of some in the log."""

    _log = Logger()

    def __init__(self, option: str, metrics: Metrics, seconds: Callable[[], float]) -> None:
        self._option = option
        self._metrics = metrics
        self._seconds = seconds
        self._told_at = -math.inf
        self._untold = 0
        self._hosts: set[str] = set()

    def add(self, address: object, word: str, detail: str = "") -> None:
        """TLS failed with who is at that address."""
        self._metrics.tls_failures[word] += 1
        if word not in _TOLD:
            return
        host = str(getattr(address, "host", "here"))
        now = self._seconds()
        if now - self._told_at < TELL_EVERY:
            self._untold += 1
            if len(self._hosts) < MAX_HOSTS:
                self._hosts.add(host)
            return
        self._log.warn(
            "--{option}: TLS failed with {host}: {why} ({untold} times more since this was last said, with {hosts} "
            "addresses)",
            option=self._option,
            host=host,
            why=_TOLD[word].format(detail=" ".join(detail.split())),
            untold=self._untold,
            hosts=len(self._hosts),
        )
        self._told_at, self._untold, self._hosts = now, 0, set()


#: so many bytes go to or from OpenSSL at once
PIECE = 4096
#: so many bytes a handshake may have from the client, the certificates that vouch for its own included
MAX_HANDSHAKE = 32768
#: so many bytes OpenSSL may say after it that are no answer to anything said here, such as that it will not renegotiate
MAX_UNASKED = 4096
#: The most bytes that a record of TLS carries.
MAX_RECORD = 16384
#: So many bytes a record has to carry, on average; and so many more one that carries none would have to.
RECORD, NOTHING = 32, 512
#: A client is lent so many bytes, and again so many in a second: enough for 500 records of a byte in each second, and
#: for 2,000 at once; or for 30 KeyUpdates, and 120 at once.
LENT, LENT_PER_SECOND = 65536, 16384

#: So many bytes are gathered from records, if they are there, before they are handed on.
GATHERED = 32768

#: where they are gathered, for all connections: nothing else happens meanwhile
_gathered = memoryview(bytearray(GATHERED + MAX_RECORD))
_LENGTH = struct.Struct("!H")
_T = TypeVar("_T")


class Connection:
    """Stands where Twisted has a pyOpenSSL connection in memory, as far as it asks for one; raises what that raises."""

    __slots__ = (
        "_ahead", "_begun", "_failed", "_incoming", "_left", "_outgoing", "_room", "_seconds", "_shaken", "_since",
        "_skip", "_tls", "_unread",
    )  # fmt: skip

    def __init__(self, context: ssl.SSLContext, seconds: Callable[[], float] = time.monotonic) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: what came, and was not given to OpenSSL yet
        self._unread = b""
        #: what was read before it was asked for
        self._ahead = b""
        #: whether the handshake is over
        self._shaken = False
        #: why there is no more, if that was found when there was something yet
        self._failed: SSL.Error | None = None
        #: the beginning of a record's header, and how much of a record is to come before the next one
        self._begun, self._skip = b"", 0
        #: what the client has to spend on records, and since when it is lent more
        self._room, self._since = LENT, 0.0
        self._seconds = seconds
        #: how many bytes of a handshake may yet come; after it, how many may yet go out that nobody asked for
        self._left = MAX_HANDSHAKE

    # What is encrypted.

    def bio_write(self, data: bytes) -> int:
        """Bytes came from the other side."""
        self._unread += data
        return len(data)

    def bio_read(self, size: int) -> bytes:
        """The bytes that are to go to the other side."""
        data = self._outgoing.read(size)
        if not data:
            raise SSL.WantReadError
        return data

    def bio_shutdown(self) -> None:
        """No more will come."""
        self._feed(len(self._unread))
        self._incoming.write_eof()

    def _feed(self, size: int) -> None:
        piece, self._unread = self._unread[:size], self._unread[size:]
        records = self._count(piece)
        if self._shaken:
            self._room -= NOTHING * records
        self._incoming.write(piece)

    def _count(self, piece: bytes) -> int:
        """How many records begin in the next bytes. Each has a type, a version and a length first (RFC 8446, 5.1)."""
        piece, at, records = self._begun + piece, self._skip, 0
        while at + 5 <= len(piece):
            at += 5 + _LENGTH.unpack_from(piece, at + 3)[0]
            records += 1
        self._begun, self._skip = piece[at:], max(0, at - len(piece))
        return records

    # What is not.

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        self._reading(self._tls.do_handshake)
        if self._tls.session_reused and self._has_ended():
            raise TLSError("CERTIFICATE_HAS_ENDED")
        self._shaken, self._left = True, MAX_UNASKED
        self._since = self._seconds()

    def _has_ended(self) -> bool:
        # A ticket of TLS 1.2 has the client's certificate in it, at which OpenSSL does not look again.
        certificate = self.verified_certificate()
        return certificate is not None and (
            x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp() < time.time()
        )

    def recv(self, size: int) -> bytes:
        """What the other side said."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        # All that there is, in one: whoever gets it has as much to do with a byte as with a thousand.
        there, most = 0, min(size, GATHERED)
        while there < most:
            try:
                there += self._read(there)
            except SSL.Error as e:
                if not there:
                    raise
                self._failed = e
                break
        return bytes(_gathered[:there])

    def _read(self, at: int) -> int:
        """Read what one record carries to a place where others may be before it; its size. Raises ZeroReturnError at
        the end of all."""
        # What typeshed says of it is for a call without a buffer.
        read: Callable[..., int] = self._tls.read  # type: ignore[assignment]
        size = self._reading(read, MAX_RECORD, _gathered[at : at + MAX_RECORD])
        if not size:
            raise SSL.ZeroReturnError
        room = self._room + NOTHING - RECORD + size
        self._room = room if room < LENT else LENT
        return size

    def send(self, data: bytes) -> int:
        """Say something; how much of it was taken."""
        try:
            return self._tls.write(data[:PIECE])
        except ssl.SSLError as e:
            _raise_as_pyopenssl(e)

    def shutdown(self) -> bool:
        """Say that nothing more will be said; whether the other side has said so, too."""
        # Python looks for the other side's word at once, and what it said before would be in the way of that.
        with contextlib.suppress(SSL.Error):
            while size := self._read(0):
                self._ahead += _gathered[:size]
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as e:
            _raise_as_pyopenssl(e)
        return True

    def _reading(self, step: Callable[..., _T], *args: Any) -> _T:
        while True:
            said = self._outgoing.pending
            try:
                return step(*args)
            except ssl.SSLWantReadError:
                # OpenSSL has gone through all records that it was given.
                if self._room < 0:
                    self._lend()
                if not self._unread:
                    raise SSL.WantReadError from None
            except ssl.SSLError as e:
                _raise_as_pyopenssl(e)
            finally:
                if self._shaken:
                    self._spend(self._outgoing.pending - said)
            if not self._shaken:
                self._spend(min(PIECE, len(self._unread)))
            self._feed(PIECE)

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise TLSError("the other side asks too much")

    def _lend(self) -> None:
        now = self._seconds()
        self._room = min(LENT, self._room + int((now - self._since) * LENT_PER_SECOND))
        self._since = now
        if self._room < 0:
            raise TLSError("TOO_MANY_RECORDS")

    # What else there is to ask.

    def verified_certificate(self) -> bytes | None:
        """The other side's certificate (DER); ``None`` unless it was asked for one, and has one that was verified."""
        return self._tls.getpeercert(binary_form=True) if self._tls.context.verify_mode else None

    def get_alpn_proto_negotiated(self) -> bytes:
        """The protocol that was chosen, or nothing."""
        return (self._tls.selected_alpn_protocol() or "").encode("ascii")

    def get_peer_certificate(self) -> crypto.X509 | None:
        """The other side's certificate, if it was asked for one."""
        certificate = self._tls.getpeercert(binary_form=True)
        return None if certificate is None else crypto.load_certificate(crypto.FILETYPE_ASN1, certificate)

    def get_context(self) -> Any:
        """What Twisted would now set on a context of pyOpenSSL is set on ours already."""
        return self

    def _nothing(self, *args: object) -> None:
        pass

    set_accept_state = set_app_data = set_alpn_protos = set_alpn_select_callback = _nothing


def _raise_as_pyopenssl(e: ssl.SSLError) -> NoReturn:
    if isinstance(e, ssl.SSLWantReadError):
        raise SSL.WantReadError from None
    if isinstance(e, ssl.SSLZeroReturnError):
        raise SSL.ZeroReturnError from None
    if isinstance(e, ssl.SSLEOFError):
        raise SSL.SysCallError(-1, "Unexpected EOF") from None
    raise of(e) from None


#: how long a TLS handshake may take, in seconds: a little longer than a client's opening handshake, of which it is a
#: part, so that it is that which ends, and is counted
HANDSHAKE_TIME = 5.25


def is_tls(description: str) -> bool:
    """Whether an endpoint string is for this module."""
    return description.startswith(("ssl:", "mtls:"))


def endpoint(
    reactor: Any, description: str, wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp
) -> TLSEndpoint:
    """The endpoint of an ``ssl:`` or ``mtls:`` string. ``wrap`` puts something between TCP and TLS.

    Raises ``ValueError``, ``TypeError`` or ``OSError`` for one that will not do, and for files that will not.
    """
    kind, *parts = split(description)
    given = dict(part for part in parts if isinstance(part, tuple))
    return parsed(str(kind), reactor, [part for part in parts if isinstance(part, str)], given, wrap)


def parsed(
    kind: str,
    reactor: Any,
    positional: Iterable[str],
    named: Mapping[str, str],
    wrap: Callable[[IStreamServerEndpoint], IStreamServerEndpoint] = lambda tcp: tcp,
) -> TLSEndpoint:
    """The same, of a string that was taken apart."""
    given = dict(named)
    if kind == "ssl" and not given.keys().isdisjoint(("clientCAs", "required")):
        raise TypeError("ssl: asks for no client certificates; mtls: does")
    authorities, required = _of_clients(given) if kind == "mtls" else ("", True)
    try:
        address, files = _parameters(*positional, **given)
    except TypeError as e:
        raise TypeError(str(e).replace("_parameters()", f"{kind}:")) from None
    certificates = Certificates(*files, authorities, required=required)
    return TLSEndpoint(wrap(TCP4ServerEndpoint(reactor, *address)), certificates, reactor)


def split(description: str) -> list[str | tuple[str, str]]:
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


def _of_clients(named: dict[str, str]) -> tuple[str, bool]:
    """Takes those of ``mtls:`` alone: the CAs of clients' certificates, and whether each must have one."""
    authorities, required = named.pop("clientCAs", ""), named.pop("required", "yes")
    if not authorities:
        raise ValueError("clientCAs=FILE is missing: the CAs of the clients' certificates, as PEM")
    if required not in ("yes", "no"):
        raise ValueError("required is yes or no")
    return authorities, required == "yes"


@implementer(IOpenSSLServerConnectionCreator)
class _Connections:
    """Makes connections of what was read last of some files."""

    def __init__(self, certificates: Certificates, clock: Any) -> None:
        self._certificates = certificates
        self._seconds = clock.seconds

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Any:
        """The state of a new connection."""
        return Connection(self._certificates.context, self._seconds)


class _Transport(Server):
    """One of Twisted's that reads less at once: the smallest records of TLS are hundreds of times the work of others of
    the same size, and all that was read is done in one turn of the reactor."""

    bufferSize = 32768


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """TLS on another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, certificates: Certificates, clock: Any) -> None:
        self.certificates = certificates
        #: who is told of connections with which TLS failed
        self.failures: Failures | None = None
        self._wrapped = wrapped
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, with a factory for what is within TLS."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self.certificates.speak([name.decode("ascii") for name in factory.acceptableProtocols()])
        within = TLSFactory(self.certificates, factory, self._clock, self.failures)
        listening: Deferred[IListeningPort] = self._wrapped.listen(within)
        return listening.addCallback(_reading_little)


def _reading_little(port: Any) -> Any:
    # What is known here of Twisted's ports: this is what they make for each connection.
    if isinstance(port, Port) and port.transport is Server:
        port.transport = _Transport
    return port


class TLSProtocol(TLSMemoryBIOProtocol):
    """TLS between a transport and a protocol. Not the kind that gathers what is written in a turn of the reactor: that
    is done already by whoever writes here."""

    factory: TLSFactory
    _shaking: Timer | None = None

    def makeConnection(self, transport: ITransport) -> None:
        """The transport is there, and the handshake begins."""
        self._shaking = self.factory.timers.call_later(HANDSHAKE_TIME, self._too_slow)
        super().makeConnection(transport)  # type: ignore[no-untyped-call]

    def _too_slow(self) -> None:
        self._shaking = None
        self._failed("timeout")
        self.abortConnection()  # type: ignore[no-untyped-call]

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()  # type: ignore[no-untyped-call]
        if self._handshakeDone:
            self._forget_timer()

    def _forget_timer(self) -> None:
        timer, self._shaking = self._shaking, None
        if timer is not None:
            timer.cancel()

    def _tlsShutdownFinished(self, reason: Failure | None) -> None:
        problem = None if reason is None or self._lostTLSConnection else reason.value
        # After the handshake an error is the end of a connection like any other, unless it was ended here.
        if isinstance(problem, TLSError) and (not self._handshakeDone or problem.word == "records"):
            self._failed(problem.word, problem.detail)
        super()._tlsShutdownFinished(reason)  # type: ignore[no-untyped-call]

    def _failed(self, word: str, detail: str = "") -> None:
        if self.factory.failures is not None:
            self.factory.failures.add(self.getPeer(), word, detail)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self._forget_timer()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class TLSFactory(TLSMemoryBIOFactory):
    """Puts TLS between a transport and a protocol."""

    protocol = TLSProtocol

    def __init__(
        self, certificates: Certificates, wrapped: IProtocolFactory, clock: Any, failures: Failures | None = None
    ) -> None:
        super().__init__(_Connections(certificates, clock), False, wrapped, clock)
        self.timers = Timers(clock)
        self.failures = failures

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
    return connection.verified_certificate() if isinstance(connection, Connection) else None
