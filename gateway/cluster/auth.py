"""The secret that the nodes of a fleet share: by it they know each other (credentials.py). It is never sent.

--cluster-secret-file FILE        what is in the file, without the white space around it
a sqlite: registry without it     what is in the file PATH.secret beside the database, where the other nodes of this
                                  machine find it too; it is made when a node first has something to prove

How nodes prove themselves to each other: a short-lived signature under the cluster secret, once for each request.

-> Authorization: Wsgateway-Peer v1.<from>.<to>.<expires>.<nonce>.<mac>

``from`` and ``to`` are node_ids, ``expires`` is in whole seconds since 1970, the nonce has 32 hexadecimal digits. The
mac is HMAC-SHA256, in hexadecimal, of these lines, joined by a line feed:

    v1.<from>.<to>.<expires>.<nonce>
    the HTTP method
    the request target: the path, and the query if there is one, as this node is asked for it
    the client_id     both empty unless the connection
    its address       is a client's

Whoever records one cannot use it again, nor at another node, nor for another request, nor later. It does not say
anything of the node that is asked: that is what TLS (a wss peer url) is for.

How TLS is spoken with other nodes: whom to trust, and what this node shows them.

A node is verified by the host in its peer url, a name or an address, against the CAs that the platform trusts;
``SSL_CERT_FILE`` in the environment names a file of others, such as a fleet's own. TLS 1.2 or newer is Twisted's rule.
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

from gateway.cluster.errors import PeerAuthenticationError
from gateway.net.certificates import Certificates
from gateway.settings import ConfigError, Settings

#: a secret has at least so many bytes, and its file at most
MIN_SECRET_SIZE, MAX_SECRET_SIZE = 16, 65536

_SECRET_OPTION = "cluster-secret-file"


class ClusterSecret:
    """The secret of one file, kept in memory once it was read. Calling it gives the secret to check others by."""

    _log = Logger()

    def __init__(self, path: str, *, create_if_missing: bool) -> None:
        """``made_here``: it may not be there yet, and is made when it is needed to sign.

        Raises :class:`~gateway.settings.ConfigError`.
        """
        self._path = path
        self._secret = b""
        if create_if_missing:
            self()
        else:
            self._secret = self._read()

    @classmethod
    def from_settings(cls, settings: Settings) -> ClusterSecret:
        """The secret that a node with these settings has. Raises :class:`~gateway.settings.ConfigError`."""
        if settings.cluster_secret_file:
            return cls(settings.cluster_secret_file, create_if_missing=False)
        kind, _, path = settings.registry.partition(":")
        if kind != "sqlite":
            raise ConfigError(
                _SECRET_OPTION, "is needed with a registry on a server, since its nodes are on several machines"
            )
        return cls(f"{path}.secret", create_if_missing=True)

    def __call__(self) -> bytes:
        """The secret, to check what another node has signed: empty where no node has made one yet.

        Raises :class:`~gateway.settings.ConfigError` for a file that will not do.
        """
        if not self._secret:
            with contextlib.suppress(FileNotFoundError):
                self._secret = self._read(may_be_missing=True)
        return self._secret

    def get_or_create(self) -> bytes:
        """The secret, to sign with: it is made if there is none.

        Raises :class:`~gateway.settings.ConfigError` for a file that will not do, or cannot be made.
        """
        if not self():
            try:
                self._create()
            except OSError as e:
                problem = f"{self._path} cannot be made: {e.strerror or e}; give the file of a secret by this option"
                raise ConfigError(_SECRET_OPTION, problem) from None
            self._secret = self._read()
        return self._secret

    def reload(self) -> None:
        """Read the file again, if it was read before; the old secret stays if that fails, with ``ConfigError``."""
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
            found = f"more than {MAX_SECRET_SIZE}" if len(content) > MAX_SECRET_SIZE else len(secret)
            problem = f"{self._path} has {found} bytes; a secret has {MIN_SECRET_SIZE} to {MAX_SECRET_SIZE}, such as those of "
            raise ConfigError(_SECRET_OPTION, f"{problem}`openssl rand -hex 32`")
        if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
            self._log.warn(
                "the cluster secret in {path} can be read by others than its owner; chmod 600 it", path=self._path
            )
        return secret

    def _create(self) -> None:
        """Put a new secret there, whole at once, unless another node does so at the same time."""
        made = f"{self._path}.{os.getpid()}-{os.urandom(4).hex()}"
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(os.urandom(32).hex().encode() + b"\n")
                file.flush()
                os.fsync(fd)
            # Unlike a rename, this fails where there is one already.
            with contextlib.suppress(FileExistsError):
                os.link(made, self._path)
        finally:
            os.unlink(made)


SCHEME = "Wsgateway-Peer"
#: for how long a signature is good, in seconds; it is refused if it says that it is so for more than the second
SIGNATURE_LIFETIME, MAX_SIGNATURE_LIFETIME = 30, 60
#: for how long the nonces of those that were good are remembered, in seconds; and how many at most
NONCE_WINDOW, MAX_NONCES = 60, 262144

#: what :class:`NotAPeer` says of a request for another node: whoever was at this address before is there no more
WRONG_NODE = "it is meant for another node than this one"

_AUTHORIZATION = re.compile(
    r"(?i:Wsgateway-Peer) +(v1\.([0-9A-Za-z-]{1,64})\.([0-9A-Za-z-]{1,64})\.([0-9]{1,15})\.([0-9a-f]{32}))"
    r"\.([0-9a-f]{64})"
)


class PeerAuth:
    """Signs what this node asks of others, and checks what others ask of it."""

    def __init__(
        self, node_id: str, secret: ClusterSecret | Callable[[], bytes], wall_clock: Callable[[], float] = time.time
    ) -> None:
        """``now`` is in seconds since 1970. ``secret`` gives an empty one where there is none yet."""
        self._node_id = node_id
        self._secret = secret
        self._signing_secret = secret.get_or_create if isinstance(secret, ClusterSecret) else secret
        self._wall_clock = wall_clock
        #: when each was seen, the oldest first
        self._nonces: dict[str, float] = {}

    def sign(self, to: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """The value of the ``Authorization`` header of one request to the node ``to``. Raises
        :class:`~gateway.settings.ConfigError` when the secret cannot be read, or made."""
        signed = f"v1.{self._node_id}.{to}.{int(self._wall_clock()) + SIGNATURE_LIFETIME}.{os.urandom(16).hex()}"
        return f"{SCHEME} {signed}.{_mac(self._signing_secret(), signed, method, target, client_id, address)}"

    def verify(self, header: str, method: str, target: str, client_id: str = "", address: str = "") -> str:
        """The node_id of the node that signed a request with that ``Authorization`` header. Raises
        :class:`NotAPeer`."""
        found = _AUTHORIZATION.fullmatch(header)
        if found is None or "\n" in target + client_id + address:
            raise PeerAuthenticationError(f"the Authorization is not {SCHEME} v1.from.to.expires.nonce.mac")
        signed, sender, to, expires, nonce, mac = found.groups()
        if to != self._node_id:
            raise PeerAuthenticationError(WRONG_NODE)
        if sender == self._node_id:
            raise PeerAuthenticationError("it is this node's own")
        now = self._wall_clock()
        if not now <= int(expires) < now + MAX_SIGNATURE_LIFETIME:
            raise PeerAuthenticationError(
                "it is not of this time: the clocks of the two nodes are to agree to some seconds"
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
            raise PeerAuthenticationError("it was used before")
        if len(nonces) >= MAX_NONCES:
            # To forget one early would let it be used again.
            raise PeerAuthenticationError(f"more than {MAX_NONCES} requests of nodes came within {NONCE_WINDOW} s")
        nonces[nonce] = now


def _mac(secret: bytes, *lines: str) -> str:
    text = "\n".join(lines).encode(errors="surrogatepass")
    return hmac.new(secret, text, hashlib.sha256).hexdigest()


#: of so many hosts it is remembered how TLS is spoken with them
MAX_HOSTS = 256


class PeerTLS:
    """What TLS connections to other nodes are made of."""

    def __init__(
        self, trust_root: Any = None, own_certificates: Callable[[], Certificates | None] = lambda: None
    ) -> None:
        """``trust_root`` (Twisted's ``IOpenSSLTrustRoot``) vouches for the others' certificates; by default who the
        platform trusts. ``own`` gives what this node shows to those that ask for a certificate."""
        self._trust_root = trust_root
        self._own_certificates = own_certificates
        #: host -> how TLS is spoken with it
        self._options: dict[str, Any] = {}

    def options(self, host: str) -> Any:
        """How TLS is spoken with a host (Twisted's ``IOpenSSLClientConnectionCreator``). Raises ``ValueError`` for what
        is no name."""
        # To read what the platform trusts takes longer than all the rest.
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
        """Read anew whom to trust, and what to show, for connections from now on."""
        self._options.clear()


def _certificate_options(certificates: Certificates | None) -> dict[str, Any]:
    if certificates is None:
        return {}
    leaf, *others = (crypto.X509.from_cryptography(certificate) for certificate in certificates.chain)
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, certificates.key)
    return {"privateKey": key, "certificate": leaf, "extraCertChain": others or None}
