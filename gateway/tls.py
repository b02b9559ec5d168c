"""TLS endpoints, ``ssl:8443:privateKey=key.pem:certKey=chain.pem``, whose idle connections hold as little as can be.

The protocol between sockets and connections is Twisted's. What is different from its own ``ssl:``, which takes the same
parameters, is what holds the state of a connection: the ``ssl`` module of Python, on the OpenSSL that Python has, where
Twisted has pyOpenSSL, on one that comes with it; the newer an OpenSSL is, the more it keeps (benchmarks/tls.py).

What OpenSSL reads from and writes to grows with what goes through it, and never shrinks; so that passes in pieces.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
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
)
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from zope.interface import implementer

#: so many bytes go to or from OpenSSL at once
PIECE = 4096

#: what ``sslmethod`` may be, as Twisted names them -> the highest version; TLS 1.2 is the lowest
_METHODS = {
    "TLS_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLS_SERVER_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "SSLv23_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLSv1_2_METHOD": ssl.TLSVersion.TLSv1_2,
}

_T = TypeVar("_T")


def is_tls(description: str) -> bool:
    """Whether an endpoint string is for this module."""
    return description.startswith("ssl:")


def endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """The endpoint of an ``ssl:`` string.

    Raises ``ValueError``, ``TypeError`` or ``OSError`` for one that will not do, and for files that will not.
    """
    _, *positional = split(description)
    try:
        given = dict(part for part in positional if isinstance(part, tuple))
        return _endpoint(reactor, *(part for part in positional if isinstance(part, str)), **given)
    except TypeError as e:
        raise TypeError(str(e).replace("_endpoint()", "ssl:")) from None


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


def _endpoint(
    reactor: Any,
    port: str,
    privateKey: str = "server.pem",
    certKey: str = "",
    sslmethod: str = "TLS_METHOD",
    interface: str = "",
    backlog: str = "50",
    extraCertChain: str = "",
    dhParameters: str = "",
) -> IStreamServerEndpoint:
    wrapped = TCP4ServerEndpoint(reactor, int(port), int(backlog), interface)
    certificates = Certificates(privateKey, certKey, extraCertChain, sslmethod, dhParameters)
    return TLSEndpoint(wrapped, certificates, reactor)


@implementer(IOpenSSLServerConnectionCreator)
class Certificates:
    """The context of new connections, made of files."""

    #: what is offered by ALPN
    protocols: list[str] = []

    def __init__(
        self, key: str, chain: str = "", extra_chain: str = "", method: str = "TLS_METHOD", dh_parameters: str = ""
    ) -> None:
        """Of PEM files: ``chain`` has the server's certificate and those that vouch for it, as far as they are not in
        ``extra_chain``; without it they are in the file of the key.

        Raises ``ValueError`` or ``OSError``.
        """
        if method not in _METHODS:
            raise ValueError(f"sslmethod={method} is none of {', '.join(_METHODS)}")
        self._method = method
        self._key = key
        self._chain = chain or key
        self._extra_chain = extra_chain
        self._dh_parameters = dh_parameters
        self.load()

    def load(self) -> None:
        """Read the files, for connections from now on. If that raises, all stays as it is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = _METHODS[self._method]
        _load(context.load_cert_chain, self._chain, self._key, extra=self._extra_chain)
        if self._dh_parameters:
            _load(context.load_dh_params, self._dh_parameters)
        if self.protocols:
            context.set_alpn_protocols(self.protocols)
        self._context = context

    def speak(self, protocols: list[str]) -> None:
        """Offer these protocols by ALPN. A client that asks for none of them is served all the same."""
        self.protocols = protocols
        self._context.set_alpn_protocols(protocols)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> Any:
        """The state of a new connection."""
        return Connection(self._context)


def _load(load: Callable[..., None], *paths: str, extra: str = "") -> None:
    """Let OpenSSL read files, with a problem that names them."""
    # OpenSSL's errors have no name.
    contents = {path: _read(path) for path in (*paths, extra) if path}
    try:
        if not extra:
            load(*paths)
            return
        if b"-----BEGIN CERTIFICATE-----" not in contents[extra]:
            raise ValueError(f"{extra} has no certificate")
        # OpenSSL wants a chain in one file; this one is never on a disk.
        chain, *others = paths
        with open(os.memfd_create("chain"), "wb") as together:
            together.write(contents[chain] + b"\n" + contents[extra])
            together.flush()
            load(f"/proc/self/fd/{together.fileno()}", *others)
    except ssl.SSLError as e:
        raise ValueError(f"{' and '.join(contents)} cannot be used: {e.reason or e}") from None


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@implementer(IStreamServerEndpoint)
class TLSEndpoint:
    """TLS on another endpoint."""

    def __init__(self, wrapped: IStreamServerEndpoint, certificates: Certificates, clock: Any) -> None:
        self._wrapped = wrapped
        self._certificates = certificates
        self._clock = clock

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, with a factory for what is within TLS."""
        if IProtocolNegotiationFactory.providedBy(factory):
            self._certificates.speak([name.decode("ascii") for name in factory.acceptableProtocols()])
        listening: Deferred[IListeningPort] = self._wrapped.listen(
            TLSFactory(self._certificates, False, factory, self._clock)
        )
        return listening


class TLSFactory(TLSMemoryBIOFactory):
    """Puts TLS between a transport and a protocol."""

    #: not the one that gathers what is written in a turn of the reactor: that is done already by whoever writes here
    protocol = TLSMemoryBIOProtocol

    def registerProtocol(self, p: object) -> None:
        """Twisted keeps a list of its connections, at which nobody looks."""

    def unregisterProtocol(self, p: object) -> None:
        """See there."""


class Connection:
    """Stands where Twisted has a pyOpenSSL connection in memory, as far as it asks for one; raises what that raises."""

    __slots__ = ("_ahead", "_incoming", "_outgoing", "_tls", "_unread")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: what came, and was not given to OpenSSL yet
        self._unread = b""
        #: what was read before it was asked for
        self._ahead = b""

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
            try:
                return step(*args)
            except ssl.SSLWantReadError:
                if not self._unread:
                    raise SSL.WantReadError from None
                self._feed(PIECE)
            except ssl.SSLError as e:
                _raise_as_pyopenssl(e)

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
