"""The state of a connection with TLS: OpenSSL's, in memory, by the ``ssl`` module of Python.

    bytes from the socket -> bio_write … recv -> what the client said
    bytes for the socket  <- bio_read …  send <- what it is told

What OpenSSL reads from and writes to grows with what goes through it, and never shrinks; so that passes in pieces.

A record of TLS is work, whatever it carries, and it need not carry more than a byte, or may be of the kind that carries
nothing at all, such as a KeyUpdate. So each has its price, which what it carries pays: see :data:`RECORD`.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from cryptography import x509
from OpenSSL import SSL, crypto

from gateway import tls_failures
from gateway.tls_failures import TLSError

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
    raise tls_failures.of(e) from None
