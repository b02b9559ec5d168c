"""Keep the records of a fleet by signed DNS updates (RFC 2136, RFC 8945): BIND, Knot, PowerDNS.

An address record does not name its node. So there is a note, a TXT record, for each node:

    gw.example.com             A    192.0.2.7
    gw.example.com             A    192.0.2.8
    _wsgateway.gw.example.com  TXT  "0b0f6c0e-… 192.0.2.7"
    _wsgateway.gw.example.com  TXT  "7d1c52aa-… 192.0.2.8"

    -> UPDATE  prerequisite: the name has no CNAME; add the address and the note      announce
    -> QUERY   the notes                                                              withdraw
    -> UPDATE  prerequisite: the notes are unchanged; delete the notes of the nodes,  withdraw
               and the addresses that no other note has

The server applies updates atomically and one after the other. Adding never removes a record, and a withdrawal is based
on all notes; if they have changed since the query, it starts again.

The key file is as tsig-keygen writes it and BIND's named.conf has it:

    key "wsgateway" {
            algorithm hmac-sha256;
            secret "c2VjcmV0IG9mIHRoZSBmbGVldA==";
    };

Comments are those of named.conf: ``//`` and ``#`` to the end of the line, and ``/* */``. Anything else is refused.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import random
import re
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.update
from twisted.internet.defer import Deferred
from zope.interface import implementer

from gateway.cloud.errors import KeyFileError, NameServiceError
from gateway.cloud.registrar import INameService
from gateway.util.files import FileError, FileTooLargeError, read_bounded
from gateway.util.log import one_line
from gateway.util.threads import DaemonThreadPool

#: bytes
MAX_KEY_FILE_SIZE = 2**16

KEY_ALGORITHMS = frozenset({"hmac-md5", "hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512"})

_KEY_FILE_HINT = 'write key "NAME" { algorithm hmac-sha256; secret "BASE64"; }; as tsig-keygen does'

_BLANK_OR_COMMENT = re.compile(r"(?:\s|//[^\n]*|\#[^\n]*|/\*.*?\*/)+", re.DOTALL)
_TOKEN = re.compile(r'"([^"\\\n]*)"|([{};])|((?:[A-Za-z0-9._+=-]|/(?![/*]))+)')
#: labels of 1 to 63 letters, digits, hyphens and underscores
_KEY_NAME = re.compile(r"(?=.{1,253}\.?\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


@attrs.frozen
class TsigKey:
    """A TSIG key. ``secret`` is decoded from base64."""

    name: str
    algorithm: str
    secret: bytes = attrs.field(repr=False)


def read_key_file(path: str) -> TsigKey:
    """Read the key in a file. Raises :class:`KeyFileError`."""
    try:
        content = read_bounded(path, MAX_KEY_FILE_SIZE)
    except FileTooLargeError as e:
        raise KeyFileError(f"{e}; {_KEY_FILE_HINT}") from None
    except FileError as e:
        raise KeyFileError(str(e)) from None
    try:
        return parse_key(content.decode("ascii"))
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is not ASCII; {_KEY_FILE_HINT}") from None
    except KeyFileError as e:
        raise KeyFileError(f"{path}: {e}; {_KEY_FILE_HINT}") from None


def parse_key(text: str) -> TsigKey:
    """Parse a text that contains exactly one key. Raises :class:`KeyFileError`."""
    tokens = _tokenize(text)
    if [kind for kind, _ in tokens] != ["word", "word", "{", "word", "word", ";", "word", "word", ";", "}", ";"]:
        raise KeyFileError("expected one key with algorithm and secret")
    words = [word for kind, word in tokens if kind == "word"]
    values = {words[2]: words[3], words[4]: words[5]}
    if words[0] != "key" or values.keys() != {"algorithm", "secret"}:
        raise KeyFileError("expected one key with algorithm and secret")
    name, algorithm = words[1], values["algorithm"].lower().rstrip(".")
    if not _KEY_NAME.fullmatch(name):
        raise KeyFileError("the name of the key is not a domain name")
    if algorithm not in KEY_ALGORITHMS:
        raise KeyFileError(f"the algorithm of the key is not one of {', '.join(sorted(KEY_ALGORITHMS))}")
    try:
        secret = base64.b64decode(values["secret"], validate=True)
    except binascii.Error:
        raise KeyFileError("the secret of the key is not base64") from None
    if not secret:
        raise KeyFileError("the secret of the key is empty")
    return TsigKey(name.rstrip(".").lower(), algorithm, secret)


def _tokenize(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) pairs: ``("word", text)`` for a word, quoted or not, and ``("{", "{")`` for a delimiter."""
    tokens = []
    position = 0
    while position < len(text):
        if skipped := _BLANK_OR_COMMENT.match(text, position):
            position = skipped.end()
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise KeyFileError(f"syntax error in line {text.count(chr(10), 0, position) + 1}")
        quoted, delimiter, bare = match.groups()
        tokens.append((delimiter, delimiter) if delimiter else ("word", bare if quoted is None else quoted))
        position = match.end()
    return tokens


T = TypeVar("T")

#: the label of the notes, below the name
NOTE_LABEL = "_wsgateway"
#: seconds for one request
REQUEST_TIMEOUT = 4.0
#: seconds for one withdrawal while the notes keep changing
WITHDRAW_TIMEOUT = 8.0
#: addresses of a server that are tried
_MAX_ADDRESSES = 2
#: nodes withdrawn by one update: a message has at most 65,535 bytes, and it repeats all notes as a prerequisite
MAX_NODES_PER_UPDATE = 100

_NOTE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}) (\S{2,45})")

#: response codes that need a change of the configuration -> text for the operator
_PERMANENT_RCODES = {
    dns.rcode.REFUSED: "{server} refuses this key: allow it to update and to query {name} and {label}.{name}",
    dns.rcode.NOTAUTH: "{server} is not authoritative for the zone {zone}, or does not accept updates for it",
    dns.rcode.NOTZONE: "{server} says that {name} is not in the zone {zone}",
    dns.rcode.NOTIMP: "{server} does not support updates",
    dns.rcode.YXRRSET: "{name} is a CNAME and cannot have address records: remove it",
}

_TSIG_ALGORITHMS = {
    "hmac-md5": dns.tsig.HMAC_MD5,
    "hmac-sha1": dns.tsig.HMAC_SHA1,
    "hmac-sha224": dns.tsig.HMAC_SHA224,
    "hmac-sha256": dns.tsig.HMAC_SHA256,
    "hmac-sha384": dns.tsig.HMAC_SHA384,
    "hmac-sha512": dns.tsig.HMAC_SHA512,
}

_KEY_ERRORS = {
    dns.tsig.PeerBadKey: "it has no key with that name and algorithm (BADKEY)",
    dns.tsig.PeerBadSignature: "its key with that name has another secret (BADSIG)",
}


@attrs.frozen
class UpdateServer:
    """Where updates are sent, and for which zone and name. ``host`` is a name or an address."""

    host: str
    port: int
    zone: str
    name: str
    key_file: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _NotesChangedError(Exception):
    """The notes have changed since they were read."""


@implementer(INameService)
class Rfc2136NameService:
    """Keep the records of a name by dynamic updates.

    ``ttl`` is in seconds. The key file is read for each request.
    """

    def __init__(self, reactor: Any, server: UpdateServer, *, ttl: int) -> None:
        self._server = server
        self._ttl = ttl
        self._zone = dns.name.from_text(server.zone)
        self._name = dns.name.from_text(server.name)
        self._notes_name = dns.name.from_text(f"{NOTE_LABEL}.{server.name}")
        self._thread_pool = DaemonThreadPool(reactor, "rfc2136", 2)

    def announce(self, node_id: str, address: str) -> Deferred[None]:
        return self._run(lambda key: self._announce(key, node_id, address))

    def withdraw(self, node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        return self._run(lambda key: self._withdraw(key, node_ids))

    def announced(self) -> Deferred[dict[str, str]]:
        return self._run(self._announced)

    def close(self) -> Deferred[None]:
        return self._thread_pool.close()

    # Run in a thread.

    def _run(self, work: Callable[[dns.tsig.Key], T]) -> Deferred[T]:
        return self._thread_pool.run(lambda: self._with_translated_errors(work))

    def _with_translated_errors(self, work: Callable[[dns.tsig.Key], T]) -> T:
        server = self._server
        try:
            key = read_key_file(server.key_file)
            return work(dns.tsig.Key(key.name, key.secret, _TSIG_ALGORITHMS[key.algorithm]))
        except KeyFileError as e:
            raise NameServiceError(f"key-file= {e}", permanent=True) from None
        except dns.tsig.PeerBadTime:
            raise NameServiceError(f"the clocks of {server} and this machine differ", permanent=True) from None
        except dns.tsig.PeerError as e:
            problem = (
                f"{server} does not accept the key in {server.key_file}: {_KEY_ERRORS.get(type(e)) or one_line(e)}"
            )
            raise NameServiceError(problem, permanent=True) from None
        except dns.exception.Timeout:
            raise NameServiceError(f"{server} did not respond within {REQUEST_TIMEOUT:g} s") from None
        except dns.exception.DNSException as e:
            raise NameServiceError(f"{server} sent an invalid response: {one_line(e)}") from None
        except EOFError:
            raise NameServiceError(f"{server} closed the connection without a response") from None
        except OSError as e:
            raise NameServiceError(f"{server} cannot be reached: {e.strerror or e}") from None

    def _announce(self, key: dns.tsig.Key, node_id: str, address: str) -> None:
        update = dns.update.UpdateMessage(self._zone, keyring=key)
        # Without this prerequisite a server silently ignores addresses beside a CNAME.
        update.absent(self._name, dns.rdatatype.CNAME)
        update.add(self._name, self._ttl, _address_record(address))
        update.add(self._notes_name, self._ttl, _note_record(node_id, address))
        self._send_update(update)

    def _withdraw(self, key: dns.tsig.Key, node_ids: frozenset[str]) -> frozenset[str]:
        end = time.monotonic() + WITHDRAW_TIMEOUT
        while True:
            try:
                return self._withdraw_notes(key, node_ids, self._query(key, self._notes_name, dns.rdatatype.TXT))
            except _NotesChangedError:
                if time.monotonic() > end:
                    problem = f"the records of {NOTE_LABEL}.{self._server.name} keep changing during the withdrawal"
                    raise NameServiceError(problem) from None
                # Jitter: another node may be withdrawing at the same time.
                time.sleep(random.uniform(0.0, 0.1))

    def _withdraw_notes(
        self, key: dns.tsig.Key, node_ids: frozenset[str], records: list[dns.rdata.Rdata]
    ) -> frozenset[str]:
        matching = [(record, note) for record in records if (note := _parse_note(record)) and note[0] in node_ids]
        removed = dict(matching[:MAX_NODES_PER_UPDATE])
        if not removed:
            return frozenset()
        kept_addresses = {note[1] for record in records if record not in removed and (note := _parse_note(record))}
        update = dns.update.UpdateMessage(self._zone, keyring=key)
        update.present(self._notes_name, *records)
        for record in removed:
            update.delete(self._notes_name, record)
        for address in {address for _, address in removed.values()} - kept_addresses:
            update.delete(self._name, _address_record(address))
        self._send_update(update)
        withdrawn = frozenset(node_id for node_id, _ in removed.values())
        if len(matching) == len(removed):
            return withdrawn
        return withdrawn | self._withdraw_notes(key, node_ids, [record for record in records if record not in removed])

    def _announced(self, key: dns.tsig.Key) -> dict[str, str]:
        notes = [
            note for record in self._query(key, self._notes_name, dns.rdatatype.TXT) if (note := _parse_note(record))
        ]
        addresses: set[str] = set()
        for rdtype in {_address_record(address).rdtype for _, address in notes}:
            addresses.update(record.to_text() for record in self._query(key, self._name, rdtype))
        return {node_id: address if address in addresses else "" for node_id, address in notes}

    def _query(self, key: dns.tsig.Key, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> list[dns.rdata.Rdata]:
        """Return the records of a name that have the given type."""
        query = dns.message.make_query(name, rdtype, flags=0)
        query.use_tsig(key)
        response = self._exchange(query)
        if response.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise self._rcode_error(response.rcode())
        if not response.flags & dns.flags.AA:
            raise self._rcode_error(dns.rcode.NOTAUTH)
        rrset = response.get_rrset(dns.message.ANSWER, name, dns.rdataclass.IN, rdtype)
        return list(rrset) if rrset is not None else []

    def _send_update(self, update: dns.update.UpdateMessage) -> None:
        rcode = self._exchange(update).rcode()
        if rcode == dns.rcode.NXRRSET:
            raise _NotesChangedError
        if rcode != dns.rcode.NOERROR:
            raise self._rcode_error(rcode)

    def _exchange(self, message: dns.message.Message) -> dns.message.Message:
        """Send a request to the first address of the server that responds; require a signed response."""
        response = self._exchange_unverified(message)
        if not response.had_tsig:
            # Newer versions of dnspython check this themselves.
            raise NameServiceError(f"{self._server} sent an invalid response: it is not signed")
        return response

    def _exchange_unverified(self, message: dns.message.Message) -> dns.message.Message:
        server = self._server
        addresses = _resolve(server)
        problem: Exception | None = None
        for address in addresses:
            try:
                return dns.query.tcp(message, address, REQUEST_TIMEOUT / len(addresses), server.port)
            except (OSError, dns.exception.Timeout) as e:
                problem = e
        raise problem or OSError(f"{server.host} has no address")

    def _rcode_error(self, rcode: dns.rcode.Rcode) -> NameServiceError:
        server = self._server
        if rcode in _PERMANENT_RCODES:
            return NameServiceError(
                _PERMANENT_RCODES[rcode].format(server=server, zone=server.zone, name=server.name, label=NOTE_LABEL),
                permanent=True,
            )
        return NameServiceError(f"{server} answered {dns.rcode.to_text(rcode)} for the zone {server.zone}")


def _resolve(server: UpdateServer) -> list[str]:
    results = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in results))
    return addresses[:_MAX_ADDRESSES]


def _address_record(address: str) -> dns.rdata.Rdata:
    rdtype = dns.rdatatype.A if ipaddress.ip_address(address).version == 4 else dns.rdatatype.AAAA
    return dns.rdata.from_text(dns.rdataclass.IN, rdtype, address)


def _note_record(node_id: str, address: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.TXT, f'"{node_id} {address}"')


def _parse_note(record: Any) -> tuple[str, str] | None:
    """Return (node_id, address) of a note; ``None`` for a TXT record that was not made by a node."""
    match = _NOTE.fullmatch(b"".join(record.strings).decode("ascii", "replace"))
    if match is None:
        return None
    try:
        return match[1], str(ipaddress.ip_address(match[2]))
    except ValueError:
        return None
