"""Certificate files of TLS endpoints: load keys, certificates and client CAs at start, and reload them on SIGHUP.

Open connections keep the certificates that they were opened with. New connections use the latest files. If a file
cannot be used, the error is logged and the previous certificates of its endpoint stay in use.
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

from gateway.net.errors import FileContentError

#: value of ``sslmethod``, as Twisted names them -> maximum version; the minimum is TLS 1.2
_MAX_VERSIONS = {
    "TLS_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLS_SERVER_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "SSLv23_METHOD": ssl.TLSVersion.MAXIMUM_SUPPORTED,
    "TLSv1_2_METHOD": ssl.TLSVersion.TLSv1_2,
}
#: time before its expiry at which a certificate is warned of, in seconds
EXPIRY_WARNING_WINDOW = 14 * 86400

#: seconds
_DAY = 86400
_DATE_FORMAT = "%Y-%m-%d %H:%M UTC"
#: from Python 3.10 on, if OpenSSL supports it
_PARTIAL_CHAIN = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN

_log = Logger()


class Certificates:
    """Certificates of one endpoint, and the TLS context of its new connections."""

    #: protocols offered by ALPN
    alpn_protocols: list[str] = []

    #: TLS context of new connections
    context: ssl.SSLContext
    #: the certificate of the server, then its intermediate certificates
    chain: list[x509.Certificate]
    #: content of the file with the private key
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
        """Load PEM files, given by their paths.

        ``chain`` contains the certificate of the server and its intermediate certificates, which can also be in
        ``extra_chain``. Without ``chain`` they are in the file of the key. With ``client_cas`` clients are asked for a
        certificate signed by one of these CAs; unless ``required``, a client may present none.

        Raises ``FileContentError`` or ``OSError`` if a file cannot be used, and ``ValueError`` for another ``method``.
        """
        if method not in _MAX_VERSIONS:
            raise ValueError(f"sslmethod={method} is not one of {', '.join(_MAX_VERSIONS)}")
        self._method = method
        self._key_path = key
        #: path of the file with the certificate of the server
        self.certificate_path = chain or key
        self._extra_chain = extra_chain
        self._dh_parameters = dh_parameters
        self._client_cas = client_cas
        self._client_certificate_required = required
        self.load()

    @property
    def is_mutual(self) -> bool:
        """Whether clients are asked for a certificate."""
        return bool(self._client_cas)

    @property
    def expires_at(self) -> float:
        """Expiry time of the server's certificate, in seconds since 1970."""
        return self.chain[0].not_valid_after_utc.timestamp()

    @property
    def valid_from(self) -> float:
        """Time from which the server's certificate is valid, in seconds since 1970."""
        return self.chain[0].not_valid_before_utc.timestamp()

    def load(self) -> None:
        """Read the files again, for new connections. If that raises, nothing changes."""
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
        # Use what was just read, since the files may be replaced meanwhile. OpenSSL wants the chain in one file.
        with _memory_file(b"\n".join(contents)) as chain_path, _memory_file(key) as key_path:
            names = dict.fromkeys([*paths, self._key_path])
            _load_files(names, context.load_cert_chain, chain_path, key_path, _refuse_password)
        return chain

    def _request_client_certificates(self, context: ssl.SSLContext) -> None:
        authorities = _parse_certificates(self._client_cas, _read_file(self._client_cas))
        der = b"".join(authority.public_bytes(Encoding.DER) for authority in authorities)
        _load_files([self._client_cas], context.load_verify_locations, cadata=der)
        context.verify_mode = ssl.CERT_REQUIRED if self._client_certificate_required else ssl.CERT_OPTIONAL
        # Trust every CA in the file, including intermediate CAs.
        context.verify_flags |= _PARTIAL_CHAIN
        # A ticket would let a client resume a session without verification of its certificate. The tickets of TLS 1.2
        # stay enabled: without them OpenSSL would store sessions, which cannot be disabled from Python. tls.py
        # therefore checks the certificate of a resumed session.
        context.num_tickets = 0

    def set_alpn_protocols(self, alpn_protocols: list[str]) -> None:
        """Offer protocols by ALPN. A client that supports none of them is accepted as well."""
        self.alpn_protocols = alpn_protocols
        self.context.set_alpn_protocols(alpn_protocols)


class CertificateReloader:
    """Reload the certificates of all endpoints of a node, and warn of those that expire or are not valid yet."""

    def __init__(
        self,
        gauges: dict[str, tuple[str, Callable[[], float]]],
        wall_clock: Callable[[], float] = time.time,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """``gauges`` gets a gauge with the first certificate. ``wall_clock`` returns seconds since 1970.
        ``on_reload`` is called after each reload."""
        self._on_reload = on_reload
        self._gauges = gauges
        self._wall_clock = wall_clock
        self._certificates: list[tuple[str, Certificates]] = []

    def add(self, option: str, certificates: Certificates) -> None:
        """Add the certificates of an endpoint that was given by ``option``."""
        self._certificates.append((option, certificates))
        self._gauges["certificate_expires"] = (
            "Expiry time of the endpoint certificate that expires first, in seconds since 1970.",
            self.first_expiry,
        )
        self._warn_of_validity(option, certificates)

    def reload(self) -> bool:
        """Read all files again.

        Returns whether there are certificates and all were loaded. Certificates that cannot be loaded keep their
        previous content, and the error is logged.
        """
        succeeded = bool(self._certificates)
        for option, certificates in self._certificates:
            try:
                certificates.load()
            except (OSError, ValueError) as e:
                _log.error(
                    "--{option}: {problem}; the previous content stays in effect",
                    option=option,
                    problem=describe_file_error(e),
                )
                succeeded = False
            self._warn_of_validity(option, certificates)
        self._on_reload()
        return succeeded

    def first_expiry(self) -> float:
        """Return the earliest expiry time, in seconds since 1970."""
        return min(certificates.expires_at for _, certificates in self._certificates)

    def for_peers(self) -> Certificates | None:
        """Return the certificates that this node presents to peers: of the first mutual TLS ``--backend`` endpoint."""
        return next((item for option, item in self._certificates if option == "backend" and item.is_mutual), None)

    def _warn_of_validity(self, option: str, certificates: Certificates) -> None:
        now, path = self._wall_clock(), certificates.certificate_path
        if certificates.valid_from > now:
            date = certificates.chain[0].not_valid_before_utc.strftime(_DATE_FORMAT)
            text = (
                "--{option}: the certificate in {path} is not valid before {date}, and clients refuse it until then; "
                "use one that is valid, or correct the clock of this machine"
            )
            _log.warn(text, option=option, path=path, date=date)
        remaining = certificates.expires_at - now
        if remaining > EXPIRY_WARNING_WINDOW:
            return
        date = certificates.chain[0].not_valid_after_utc.strftime(_DATE_FORMAT)
        text = "--{option}: the certificate in {path} expires in {days} days, on {date}; renew it, then send SIGHUP"
        if remaining <= 0:
            text = "--{option}: the certificate in {path} expired on {date}; renew it, then send SIGHUP"
        _log.warn(text, option=option, path=path, days=int(remaining // _DAY), date=date)


def describe_file_error(e: Exception) -> str:
    """Describe an error of a file in one line that names the file."""
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
        _log.warn("the private key in {path} can be read by all users of this machine; chmod o-r it", path=path)
    return content


def _parse_certificates(path: str, content: bytes) -> list[x509.Certificate]:
    """Parse the certificates in a file. Raises ``FileContentError`` if there is none, or one cannot be read."""
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise FileContentError(f"{path} has no certificate")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise FileContentError(f"{path} cannot be used: a certificate in it cannot be read") from None


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """Provide content as a file in memory, by its path."""
    with open(os.memfd_create("tls"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _load_files(paths: Iterable[str], load: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let OpenSSL read files. Raises ``FileContentError`` with their names, which OpenSSL's errors lack."""
    try:
        load(*args, **kwargs)
    except _EncryptedKeyError:
        raise FileContentError(f"{' and '.join(paths)} cannot be used: the key is encrypted; it must not be") from None
    except ssl.SSLError as e:
        reason = _OPENSSL_REASONS.get(e.reason or "", e.reason or str(e))
        raise FileContentError(f"{' and '.join(paths)} cannot be used: {reason}") from None


#: reason of OpenSSL -> explanation
_OPENSSL_REASONS = {
    "KEY_VALUES_MISMATCH": "the key does not match the certificate",
    # OpenSSL keeps one certificate for each kind of key, and finds none for this kind.
    "NO_CERTIFICATE_ASSIGNED": "the key is of another kind than that of the certificate, such as RSA instead of EC",
    "KEY_TYPE_MISMATCH": "the key is of another kind than that of the certificate, such as RSA instead of EC",
    "NO_START_LINE": "it contains no such object in PEM format",
}


class _EncryptedKeyError(Exception):
    """The private key is encrypted."""


def _refuse_password() -> NoReturn:
    # Without a callback OpenSSL would prompt on the terminal and wait.
    raise _EncryptedKeyError
