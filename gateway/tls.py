"""TLS endpoints, whose idle connections hold as little as can be.

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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from gateway.certificates import Certificates
from gateway.edge.timers import Timer, Timers
from gateway.tls_connection import Connection
from gateway.tls_failures import Failures, TLSError

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
