"""The files of TLS endpoints: a key, certificates, the CAs of clients; read when a node starts, and again at a SIGHUP.

Connections that are open keep what they began with; new ones get what was read last. Of a file that cannot be used the
log says so, and what was read before stays.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from twisted.logger import Logger

#: what ``sslmethod`` may be, as Twisted names them -> the highest version; TLS 1.2 is the lowest
_MAX_VERSIONS = {
    "TLS_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLS_SERVER_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "SSLv23_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLSv1_2_METHOD": ssl.TLSVersion.TLSv1_2,
}
#: so many seconds before its end the log warns of a certificate
EXPIRY_WARNING_WINDOW = 14 * 86400

_DAY = 86400
#: ssl.VERIFY_X509_PARTIAL_CHAIN, which Python has from 3.10 on where OpenSSL does
_PARTIAL_CHAIN = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN

_log = Logger()


class Certificates:
    """The context of new connections of one endpoint, made of files."""

    #: what is offered by ALPN
    alpn_protocols: list[str] = []

    #: of the connections from now on
    context: ssl.SSLContext
    #: the server's own certificate, then those that vouch for it
    chain: list[x509.Certificate]
    #: the key, as it is in its file
    key: bytes

    def __init__(
        self,
        key: str,
        chain: str = "",
        extra_chain: str = "",
        method: str = "TLS_METHOD",
        dh_parameters: str = "",
        client_cas: str = "",
        *,
        required: bool = True,
    ) -> None:
        """Of PEM files: ``chain`` has the server's certificate and those that vouch for it, as far as they are not in
        ``extra_chain``; without it they are in the file of the key. With ``client_cas`` clients are asked for a
        certificate that one of these has signed; if it is not ``required``, they may have none.

        Raises ``ValueError`` or ``OSError``.
        """
        if method not in _MAX_VERSIONS:
            raise ValueError(f"sslmethod={method} is none of {', '.join(_MAX_VERSIONS)}")
        self._method = method
        self._key_path = key
        #: the file with the server's certificate
        self.certificate_path = chain or key
        self._extra_chain = extra_chain
        self._dh_parameters = dh_parameters
        self._client_cas = client_cas
        self._client_certificate_required = required
        self.load()

    @property
    def is_mutual(self) -> bool:
        """Whether clients are asked for certificates."""
        return bool(self._client_cas)

    @property
    def expires_at(self) -> float:
        """When the server's certificate ends, in seconds since 1970."""
        return self.chain[0].not_valid_after_utc.timestamp()

    def load(self) -> None:
        """Read the files, for connections from now on. If that raises, all stays as it is."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = _MAX_VERSIONS[self._method]
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        key = _read_key(self._key_path)
        chain = self._load_chain(context, key)
        if self._dh_parameters:
            _load_files([self._dh_parameters], context.load_dh_params, self._dh_parameters)
        if self._client_cas:
            self._request_client_certificates(context)
        if self.alpn_protocols:
            context.set_alpn_protocols(self.alpn_protocols)
        self.context, self.chain, self.key = context, chain, key

    def _load_chain(self, context: ssl.SSLContext, key: bytes) -> list[x509.Certificate]:
        paths = [self.certificate_path, *filter(None, [self._extra_chain])]
        contents = [key if path == self._key_path else _read_file(path) for path in paths]
        chain = [
            certificate
            for path, content in zip(paths, contents, strict=True)
            for certificate in _parse_certificates(path, content)
        ]
        # What was read, not what is there now, since files may be being replaced. OpenSSL wants a chain in one file.
        with _memory_file(b"\n".join(contents)) as together, _memory_file(key) as own:
            names = dict.fromkeys([*paths, self._key_path])
            _load_files(names, context.load_cert_chain, together, own, _refuse_password)
        return chain

    def _request_client_certificates(self, context: ssl.SSLContext) -> None:
        authorities = _parse_certificates(self._client_cas, _read_file(self._client_cas))
        given = b"".join(authority.public_bytes(Encoding.DER) for authority in authorities)
        _load_files([self._client_cas], context.load_verify_locations, cadata=given)
        context.verify_mode = ssl.CERT_REQUIRED if self._client_certificate_required else ssl.CERT_OPTIONAL
        # Whoever is in the file is trusted, be it a CA that another one has signed.
        context.verify_flags |= _PARTIAL_CHAIN
        # A ticket would let a client come back without its certificate being looked at. Those of TLS 1.2 have to do all
        # the same (tls_connection.py): in their stead OpenSSL would keep sessions, which Python cannot tell it not to.
        context.num_tickets = 0

    def set_alpn_protocols(self, alpn_protocols: list[str]) -> None:
        """Offer these protocols by ALPN. A client that asks for none of them is served all the same."""
        self.alpn_protocols = alpn_protocols
        self.context.set_alpn_protocols(alpn_protocols)


class CertificateReloader:
    """The certificates of all endpoints of a node."""

    def __init__(
        self,
        gauges: dict[str, tuple[str, Callable[[], float]]],
        wall_clock: Callable[[], float] = time.time,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """``gauges`` gets one when there is a certificate. ``wall_clock`` gives seconds since 1970. ``on_reload`` is
        called when the files were read again."""
        self._on_reload = on_reload
        self._gauges = gauges
        self._wall_clock = wall_clock
        self._certificates: list[tuple[str, Certificates]] = []

    def add(self, option: str, certificates: Certificates) -> None:
        """There is an endpoint with these; ``option`` is the one that it was given by."""
        self._certificates.append((option, certificates))
        self._gauges["certificate_expires"] = (
            "When the certificate of an endpoint that ends first does so, in seconds since 1970.",
            self.first_expiry,
        )
        self._warn_if_expiring(option, certificates)

    def reload(self) -> bool:
        """Read all files again, and say whether there are some and all were taken. What cannot be used stays as it was,
        and the log says why."""
        taken = bool(self._certificates)
        for option, certificates in self._certificates:
            try:
                certificates.load()
            except (OSError, ValueError) as e:
                _log.error("--{option}: {problem}; the old ones stay", option=option, problem=describe_file_error(e))
                taken = False
            self._warn_if_expiring(option, certificates)
        self._on_reload()
        return taken

    def first_expiry(self) -> float:
        """When the first of them ends, in seconds since 1970."""
        return min(certificates.expires_at for _, certificates in self._certificates)

    def for_peers(self) -> Certificates | None:
        """Those that this node shows to other nodes: of the first ``--backend`` that asks for certificates itself."""
        return next((own for option, own in self._certificates if option == "backend" and own.is_mutual), None)

    def _warn_if_expiring(self, option: str, certificates: Certificates) -> None:
        left = certificates.expires_at - self._wall_clock()
        if left > EXPIRY_WARNING_WINDOW:
            return
        until = certificates.chain[0].not_valid_after_utc.strftime("%Y-%m-%d %H:%M UTC")
        text = "--{option}: the certificate in {path} ends in {days} days, on {until}; renew it, then send a SIGHUP"
        if left <= 0:
            text = "--{option}: the certificate in {path} has ended on {until}; renew it, then send a SIGHUP"
        _log.warn(text, option=option, path=certificates.certificate_path, days=int(left // _DAY), until=until)


def describe_file_error(e: Exception) -> str:
    """What is wrong with a file, in a line that names it."""
    if isinstance(e, OSError) and e.filename:
        return f"{e.filename} cannot be read: {e.strerror or e}"
    return " ".join(str(e).split())


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_key(path: str) -> bytes:
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        content = file.read()
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        _log.warn("the private key in {path} can be read by anybody on this machine; chmod o-r it", path=path)
    return content


def _parse_certificates(path: str, content: bytes) -> list[x509.Certificate]:
    """The certificates in a file, of which there is at least one. Raises ``ValueError``."""
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise ValueError(f"{path} has no certificate")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ValueError(f"{path} cannot be used: a certificate in it cannot be read") from None


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """The path of a file with that content, which is never on a disk."""
    with open(os.memfd_create("tls"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _load_files(paths: Iterable[str], load: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let OpenSSL read files, with a problem that names them: its own have no name."""
    try:
        load(*args, **kwargs)
    except _EncryptedKeyError:
        raise ValueError(f"{' and '.join(paths)} cannot be used: the key is encrypted; it must not be") from None
    except ssl.SSLError as e:
        why = _OPENSSL_REASONS.get(e.reason or "", e.reason or str(e))
        raise ValueError(f"{' and '.join(paths)} cannot be used: {why}") from None


#: what OpenSSL says -> what that means
_OPENSSL_REASONS = {
    "KEY_VALUES_MISMATCH": "the key is not that of the certificate",
    "NO_START_LINE": "there is no such thing in PEM in it",
}


class _EncryptedKeyError(Exception):
    """OpenSSL wants a password."""


def _refuse_password() -> NoReturn:
    # Or it would ask at the terminal, and wait.
    raise _EncryptedKeyError
