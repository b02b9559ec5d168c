"""Authentication between nodes: the cluster secret, signed requests, and TLS.

The secret is shared by all nodes of a fleet, and never sent:

--cluster-secret-file FILE        the content of the file, without surrounding white space
a sqlite: registry without it     the content of PATH.secret beside the database, where the other nodes of this machine
                                  find it too; created when a node first has something to sign

Each request to a peer carries a short-lived signature made with the secret, which is accepted once:

-> Authorization: Wsgateway-Peer v1.<from>.<to>.<expires>.<nonce>.<mac>

``from`` and ``to`` are node_ids, ``expires`` is in whole seconds since 1970, the nonce has 32 hexadecimal digits. The
mac is HMAC-SHA256, in hexadecimal, of these lines, joined by a line feed:

    v1.<from>.<to>.<expires>.<nonce>
    the HTTP method
    the request target: the path, and the query if there is one, as the receiving node sees it
    the client_id     both empty unless the connection
    its address       is a client's

So a recorded signature cannot be used again, nor at another node, nor for another request, nor later. It does not
authenticate the node that receives the request: TLS (a wss peer URL) does.

Over TLS, a node is verified by the host in its peer URL, a name or an address, against the CAs that the platform
trusts; ``SSL_CERT_FILE`` in the environment names a file of other ones, such as the CA of the fleet. Twisted requires
TLS 1.2 or newer.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Callable
from typing import Any

from OpenSSL import crypto
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger

from gateway.cluster.errors import PeerAuthenticationError, WrongNodeError
from gateway.net.certificates import Certificates
from gateway.settings import ConfigError, Settings

#: the shortest secret, in bytes
MIN_SECRET_SIZE = 16
#: the largest secret file, in bytes
MAX_SECRET_SIZE = 2**16

_SECRET_OPTION = "cluster-secret-file"


class ClusterSecret:
    """The cluster secret, read from a file and kept in memory. Calling it returns the secret for verification."""

    _log = Logger()

    def __init__(self, path: str, *, create_if_missing: bool) -> None:
        """With ``create_if_missing`` the file need not exist, and is created by the first signature.

        Raises :class:`~gateway.settings.ConfigError` if the file cannot be read or has an invalid size.
        """
        self._path = path
        self._secret = b""
        if create_if_missing:
            self()
        else:
            self._secret = self._read()

    @classmethod
    def from_settings(cls, settings: Settings) -> ClusterSecret:
        """Return the secret that these settings configure.

        Raises :class:`~gateway.settings.ConfigError` if there is none, or its file is invalid.
        """
        if settings.cluster_secret_file:
            return cls(settings.cluster_secret_file, create_if_missing=False)
        kind, _, path = settings.registry.partition(":")
        if kind != "sqlite":
            raise ConfigError(
                _SECRET_OPTION, "is needed with a registry on a server, since its nodes are on several machines"
            )
        return cls(f"{path}.secret", create_if_missing=True)

    def __call__(self) -> bytes:
        """Return the secret for the verification of signatures: empty if no node has created it yet.

        Raises :class:`~gateway.settings.ConfigError` for an invalid file.
        """
        if not self._secret:
            with contextlib.suppress(FileNotFoundError):
                self._secret = self._read(may_be_missing=True)
        return self._secret

    def get_or_create(self) -> bytes:
        """Return the secret for signing, and create it if there is none.

        Raises :class:`~gateway.settings.ConfigError` for a file that is invalid, or cannot be created.
        """
        if not self():
            try:
                self._create()
            except OSError as e:
                problem = f"{self._path} cannot be created: {e.strerror or e}; name the file of a secret by this option"
                raise ConfigError(_SECRET_OPTION, problem) from None
            self._secret = self._read()
        return self._secret

    @property
    def is_loaded(self) -> bool:
        """Whether the file has been read."""
        return bool(self._secret)

    def reload(self) -> None:
        """Read the file again, if it has been read before. Raises :class:`~gateway.settings.ConfigError` and keeps the
        old secret if that fails."""
        if self._secret:
            self._secret = self._read()

    def _read(self, *, may_be_missing: bool = False) -> bytes:
        try:
            with open(self._path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(MAX_SECRET_SIZE + 1)
        except OSError as e:
            if may_be_missing and isinstance(e, FileNotFoundError):
                raise
            raise ConfigError(_SECRET_OPTION, f"{self._path} cannot be read: {e.strerror or e}") from None
        secret = content.strip()
        if len(content) > MAX_SECRET_SIZE or len(secret) < MIN_SECRET_SIZE:
            size = f"more than {MAX_SECRET_SIZE}" if len(content) > MAX_SECRET_SIZE else len(secret)
            allowed = f"{MIN_SECRET_SIZE} to {MAX_SECRET_SIZE}, such as those of `openssl rand -hex 32`"
            raise ConfigError(_SECRET_OPTION, f"{self._path} has {size} bytes; a secret has {allowed}")
        if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
            self._log.warn(
                "the cluster secret in {path} can be read by other users than its owner; chmod 600 it", path=self._path
            )
        return secret

    def _create(self) -> None:
        """Create the file atomically with a new secret, unless another node does so at the same time."""
        temporary = f"{self._path}.{os.getpid()}-{os.urandom(4).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(os.urandom(32).hex().encode() + b"\n")
                file.flush()
                os.fsync(fd)
            # Unlike a rename, a link never replaces an existing file.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self._path)
        finally:
            os.unlink(temporary)


SCHEME = "Wsgateway-Peer"
#: how long a signature is valid, in seconds
SIGNATURE_LIFETIME = 30
#: a signature that expires later than this is rejected, in seconds
MAX_SIGNATURE_LIFETIME = 60
#: how long the nonces of accepted signatures are kept, in seconds
NONCE_WINDOW = 60
#: the most nonces kept
MAX_NONCES = 2**18

#: text of :class:`WrongNodeError` for a request to another node: that node no longer listens at this address
WRONG_NODE = "it is meant for another node than this one"

_AUTHORIZATION = re.compile(
    r"(?i:Wsgateway-Peer) +(v1\.([0-9A-Za-z-]{1,64})\.([0-9A-Za-z-]{1,64})\.([0-9]{1,15})\.([0-9a-f]{32}))"
    r"\.([0-9a-f]{64})"
)


class PeerAuth:
    """Signs requests of this node to its peers, and verifies theirs."""

    def __init__(
        self, node_id: str, secret: ClusterSecret | Callable[[], bytes], wall_clock: Callable[[], float] = time.time
    ) -> None:
        """``secret`` returns an empty value if there is no secret yet. ``wall_clock`` is in seconds since 1970."""
        self._node_id = node_id
        self._secret = secret
        self._signing_secret = secret.get_or_create if isinstance(secret, ClusterSecret) else secret
        self._wall_clock = wall_clock
        #: nonce -> when it was received, the oldest first
        self._nonces: dict[str, float] = {}

    def sign(self, to: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """Return the value of the ``Authorization`` header for one request to the node ``to``.

        Raises :class:`~gateway.settings.ConfigError` if the secret cannot be read or created.
        """
        signed = f"v1.{self._node_id}.{to}.{int(self._wall_clock()) + SIGNATURE_LIFETIME}.{os.urandom(16).hex()}"
        return f"{SCHEME} {signed}.{_mac(self._signing_secret(), signed, method, target, client_id, address)}"

    def verify(self, header: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """Return the node_id of the sender of a request with that ``Authorization`` header.

        Raises :class:`~gateway.cluster.errors.PeerAuthenticationError` if the signature is not valid.
        """
        match = _AUTHORIZATION.fullmatch(header)
        if match is None or "\n" in target + client_id + address:
            raise PeerAuthenticationError(f"the Authorization is not {SCHEME} v1.from.to.expires.nonce.mac")
        signed, sender, to, expires, nonce, mac = match.groups()
        if sender == self._node_id:
            raise PeerAuthenticationError("it was signed by this node itself")
        now = self._wall_clock()
        if not now <= int(expires) < now + MAX_SIGNATURE_LIFETIME:
            raise PeerAuthenticationError(
                "it has expired, or expires too late: the clocks of the two nodes must agree to some seconds"
            )
        try:
            secret = self._secret()
        except ConfigError:
            raise PeerAuthenticationError("this node cannot read its own cluster secret") from None
        if not secret:
            raise PeerAuthenticationError(
                "this node has no cluster secret: the nodes of one machine share one beside their registry"
            )
        if not hmac.compare_digest(_mac(secret, signed, method, target, client_id, address), mac):
            raise PeerAuthenticationError("the signature is wrong: the cluster secrets differ")
        # Only a node of this fleet is told so.
        if to != self._node_id:
            raise WrongNodeError(WRONG_NODE)
        self._check_nonce(nonce, now)
        return sender

    def _check_nonce(self, nonce: str, now: float) -> None:
        nonces = self._nonces
        while nonces:
            oldest = next(iter(nonces))
            if nonces[oldest] + NONCE_WINDOW > now:
                break
            del nonces[oldest]
        if nonce in nonces:
            raise PeerAuthenticationError("its nonce was used before")
        if len(nonces) >= MAX_NONCES:
            # A nonce that is dropped early could be used again.
            raise PeerAuthenticationError(
                f"there were more than {MAX_NONCES} requests of nodes within {NONCE_WINDOW} s"
            )
        nonces[nonce] = now


def _mac(secret: bytes, *lines: str) -> str:
    text = "\n".join(lines).encode(errors="surrogatepass")
    return hmac.new(secret, text, hashlib.sha256).hexdigest()


#: the most hosts whose options are cached
MAX_HOSTS = 256


class PeerTLS:
    """TLS options for connections to other nodes."""

    def __init__(
        self, trust_root: Any = None, own_certificates: Callable[[], Certificates | None] = lambda: None
    ) -> None:
        """``trust_root`` (Twisted's ``IOpenSSLTrustRoot``) verifies the certificates of peers; the default is the
        platform's. ``own_certificates`` returns the certificates that this node presents to peers that request one."""
        self._trust_root = trust_root
        self._own_certificates = own_certificates
        #: host -> its cached options
        self._options: dict[str, Any] = {}

    def options(self, host: str) -> Any:
        """Return the TLS options for a host (Twisted's ``IOpenSSLClientConnectionCreator``).

        Raises ``ValueError`` for an invalid host name.
        """
        # Cached, since reading the CAs of the platform takes most of the time.
        options = self._options.get(host)
        if options is None:
            if len(self._options) >= MAX_HOSTS:
                self._options.clear()
            options = optionsForClientTLS(
                host, trustRoot=self._trust_root, extraCertificateOptions=_certificate_options(self._own_certificates())
            )
            self._options[host] = options
        return options

    def reload(self) -> None:
        """Read the trusted CAs and this node's certificates again, for new connections."""
        self._options.clear()


def _certificate_options(certificates: Certificates | None) -> dict[str, Any]:
    if certificates is None:
        return {}
    leaf, *others = (crypto.X509.from_cryptography(certificate) for certificate in certificates.chain)
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, certificates.key)
    return {"privateKey": key, "certificate": leaf, "extraCertChain": others or None}
