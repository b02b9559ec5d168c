"""TLS endpoints, whose idle connections hold as little as can be.

    ssl:8443:privateKey=key.pem:certKey=chain.pem
    mtls:8443:privateKey=key.pem:certKey=chain.pem:clientCAs=ca.pem      clients have certificates, too;
                                                                        required=no: or have none

The protocol between sockets and connections is Twisted's. What is different from its own ``ssl:``, which takes the same
parameters, is what holds the state of a connection: the ``ssl`` module of Python, on the OpenSSL that Python has, where
Twisted has pyOpenSSL, on one that comes with it; the newer an OpenSSL is, the more it keeps (benchmarks/tls.py).

What OpenSSL reads from and writes to grows with what goes through it, and never shrinks; so that passes in pieces. A
handshake is bounded in time and in bytes, and so is what OpenSSL says of its own accord to who does not read.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from OpenSSL import SSL, crypto
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
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.certificates import Certificates
from gateway.edge.timers import Timer, Timers

#: so many bytes go to or from OpenSSL at once
PIECE = 4096
#: how long a TLS handshake may take, in seconds: a little longer than a client's opening handshake, of which it is a
#: part, so that it is that which ends, and is counted
HANDSHAKE_TIME = 5.25
#: so many bytes a handshake may have from the client, the certificates that vouch for its own included
MAX_HANDSHAKE = 32768
#: so many bytes OpenSSL may say after it that are no answer to anything said here, such as that it will not renegotiate
MAX_UNASKED = 4096

_T = TypeVar("_T")


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
    parse = _mtls if kind == "mtls" else _ssl
    try:
        address, certificates = parse(*positional, **named)
    except TypeError as e:
        raise TypeError(str(e).replace("_ssl()", f"{kind}:").replace("_mtls()", f"{kind}:")) from None
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


def _ssl(
    port: str,
    privateKey: str = "server.pem",
    certKey: str = "",
    sslmethod: str = "TLS_METHOD",
    interface: str = "",
    backlog: str = "50",
    extraCertChain: str = "",
    dhParameters: str = "",
) -> tuple[tuple[int, int, str], Certificates]:
    address = int(port), int(backlog), interface
    return address, Certificates(privateKey, certKey, extraCertChain, sslmethod, dhParameters)


def _mtls(
    port: str,
    privateKey: str = "server.pem",
    certKey: str = "",
    sslmethod: str = "TLS_METHOD",
    interface: str = "",
    backlog: str = "50",
    extraCertChain: str = "",
    dhParameters: str = "",
    clientCAs: str = "",
    required: str = "yes",
) -> tuple[tuple[int, int, str], Certificates]:
    if not clientCAs:
        raise ValueError("clientCAs=FILE is missing: the CAs of the clients' certificates, as PEM")
    if required not in ("yes", "no"):
        raise ValueError("required is yes or no")
    address = int(port), int(backlog), interface
    own = Certificates(
        privateKey, certKey, extraCertChain, sslmethod, dhParameters, clientCAs, required=required == "yes"
    )
    return address, own


@implementer(IOpenSSLServerConnectionCreator)
class _Connections:
    """Makes connections of what was read last of some files."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Any:
        """The state of a new connection."""
        return Connection(self._certificates.context)


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """TLS on another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, certificates: Certificates, clock: Any) -> None:
        self.certificates = certificates
        self._wrapped = wrapped
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, with a factory for what is within TLS."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self.certificates.speak([name.decode("ascii") for name in factory.acceptableProtocols()])
        listening: Deferred[IListeningPort] = self._wrapped.listen(TLSFactory(self.certificates, factory, self._clock))
        return listening


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
        self.abortConnection()  # type: ignore[no-untyped-call]

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()  # type: ignore[no-untyped-call]
        if self._handshakeDone:
            self._forget_timer()

    def _forget_timer(self) -> None:
        timer, self._shaking = self._shaking, None
        if timer is not None:
            timer.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone."""
        self._forget_timer()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]


class TLSFactory(TLSMemoryBIOFactory):
    """Puts TLS between a transport and a protocol."""

    protocol = TLSProtocol

    def __init__(self, certificates: Certificates, wrapped: IProtocolFactory, clock: Any) -> None:
        super().__init__(_Connections(certificates), False, wrapped, clock)
        self.timers = Timers(clock)

    def buildProtocol(self, addr: Any) -> Any:
        """Make the protocol of a connection; ``None``, as of the factory within, drops it."""
        within = self.wrappedFactory.buildProtocol(addr)
        return None if within is None else self.protocol(self, within)  # type: ignore[no-untyped-call]

    def registerProtocol(self, p: object) -> None:
        """Twisted keeps a list of its connections, at which nobody looks."""

    def unregisterProtocol(self, p: object) -> None:
        """See there."""


class Connection:
    """Stands where Twisted has a pyOpenSSL connection in memory, as far as it asks for one; raises what that raises."""

    __slots__ = ("_ahead", "_incoming", "_left", "_outgoing", "_shaken", "_tls", "_unread")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: what came, and was not given to OpenSSL yet
        self._unread = b""
        #: what was read before it was asked for
        self._ahead = b""
        #: whether the handshake is over
        self._shaken = False
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
        self._incoming.write(self._unread[:size])
        self._unread = self._unread[size:]

    # What is not.

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        self._reading(self._tls.do_handshake)
        self._shaken, self._left = True, MAX_UNASKED

    def recv(self, size: int) -> bytes:
        """What the other side said."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        data = self._reading(self._tls.read, size)
        if not data:
            raise SSL.ZeroReturnError
        return data

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
            while data := self._reading(self._tls.read, PIECE):
                self._ahead += data
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
            raise SSL.Error([("SSL routines", "", "the other side asks too much")])

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


def verified_certificate(transport: Any) -> bytes | None:
    """The certificate (DER) of the other side of a transport, if one was asked for by one of these endpoints, and
    verified; else ``None``."""
    connection = getattr(transport, "_tlsConnection", None)
    return connection.verified_certificate() if isinstance(connection, Connection) else None


def _raise_as_pyopenssl(e: ssl.SSLError) -> NoReturn:
    if isinstance(e, ssl.SSLWantReadError):
        raise SSL.WantReadError from None
    if isinstance(e, ssl.SSLZeroReturnError):
        raise SSL.ZeroReturnError from None
    if isinstance(e, ssl.SSLEOFError):
        raise SSL.SysCallError(-1, "Unexpected EOF") from None
    raise SSL.Error([("SSL routines", "", e.reason or str(e))]) from None
