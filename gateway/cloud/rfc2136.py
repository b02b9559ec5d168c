"""The file of a TSIG key (RFC 8945), as tsig-keygen writes it and BIND's named.conf has it:

    key "wsgateway" {
            algorithm hmac-sha256;
            secret "c2VjcmV0IG9mIHRoZSBmbGVldA==";
    };

Comments are those of named.conf: ``//`` and ``#`` to the end of the line, and ``/* */``. Anything else is refused.

The records of a fleet on a name server that takes signed updates (RFC 2136, RFC 8945): BIND, Knot, PowerDNS.

An address does not say which node has it. So beside the records of the name there is a note for each node:

    gw.example.com             A    192.0.2.7
    gw.example.com             A    192.0.2.8
    _wsgateway.gw.example.com  TXT  "0b0f6c0e-… 192.0.2.7"
    _wsgateway.gw.example.com  TXT  "7d1c52aa-… 192.0.2.8"

    -> UPDATE  if the name has no CNAME: add the address and the note                 announce
    -> QUERY   the notes                                                              withdraw
    -> UPDATE  if the notes are still just these: delete some of them, and            withdraw
               the addresses that no other note has

The server carries out an update as a whole or not at all, and one after the other: adding never takes anything away,
and who withdraws has seen every note. Where the notes have changed meanwhile, he reads them again.
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
from gateway.util.log import one_line
from gateway.util.threads import DaemonThreadPool

#: the most bytes of a file that are read
MAX_KEY_FILE_SIZE = 65536

KEY_ALGORITHMS = frozenset({"hmac-md5", "hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512"})

_KEY_FILE_HINT = 'write key "NAME" { algorithm hmac-sha256; secret "BASE64"; }; as tsig-keygen does'

_BLANK_OR_COMMENT = re.compile(r"(?:\s|//[^\n]*|\#[^\n]*|/\*.*?\*/)+", re.DOTALL)
_TOKEN = re.compile(r'"([^"\\\n]*)"|([{};])|((?:[A-Za-z0-9._+=-]|/(?![/*]))+)')
#: of letters, digits, hyphens and underscores, each label of at most 63
_KEY_NAME = re.compile(r"(?=.{1,253}\.?\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


@attrs.frozen
class TsigKey:
    """A key. ``secret`` is what the base64 of the file stands for."""

    name: str
    algorithm: str
    secret: bytes = attrs.field(repr=False)


def read_key_file(path: str) -> TsigKey:
    """The key in this file. Raises :class:`KeyFileError`."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_KEY_FILE_SIZE + 1)
    except (OSError, ValueError) as e:
        raise KeyFileError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(content) > MAX_KEY_FILE_SIZE:
        raise KeyFileError(f"{path} has more than {MAX_KEY_FILE_SIZE} bytes; {_KEY_FILE_HINT}")
    try:
        return parse_key(content.decode("ascii"))
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} has bytes that are no ASCII; {_KEY_FILE_HINT}") from None
    except KeyFileError as e:
        raise KeyFileError(f"{path}: {e}; {_KEY_FILE_HINT}") from None


def parse_key(text: str) -> TsigKey:
    """The one key in this text. Raises :class:`KeyFileError`."""
    tokens = _tokenize(text)
    if [kind for kind, _ in tokens] != ["word", "word", "{", "word", "word", ";", "word", "word", ";", "}", ";"]:
        raise KeyFileError("it is not one key, with its algorithm and its secret")
    words = [word for kind, word in tokens if kind == "word"]
    values = {words[2]: words[3], words[4]: words[5]}
    if words[0] != "key" or values.keys() != {"algorithm", "secret"}:
        raise KeyFileError("it is not one key, with its algorithm and its secret")
    name, algorithm = words[1], values["algorithm"].lower().rstrip(".")
    if not _KEY_NAME.fullmatch(name):
        raise KeyFileError("the name of its key is no domain name")
    if algorithm not in KEY_ALGORITHMS:
        raise KeyFileError(f"the algorithm of its key is none of {', '.join(sorted(KEY_ALGORITHMS))}")
    try:
        secret = base64.b64decode(values["secret"], validate=True)
    except binascii.Error:
        raise KeyFileError("the secret of its key is no base64") from None
    if not secret:
        raise KeyFileError("the secret of its key is empty")
    return TsigKey(name.rstrip(".").lower(), algorithm, secret)


def _tokenize(text: str) -> list[tuple[str, str]]:
    """What is in the text, as (kind, text): ``word``, with or without quotation marks, or a sign, which is its kind."""
    tokens = []
    at = 0
    while at < len(text):
        if skipped := _BLANK_OR_COMMENT.match(text, at):
            at = skipped.end()
            continue
        match = _TOKEN.match(text, at)
        if match is None:
            raise KeyFileError(f"line {text.count(chr(10), 0, at) + 1} has something that does not belong there")
        quoted, sign, bare = match.groups()
        tokens.append((sign, sign) if sign else ("word", bare if quoted is None else quoted))
        at = match.end()
    return tokens


T = TypeVar("T")

#: the label of the notes, before the name
NOTE_LABEL = "_wsgateway"
#: seconds for one question and its answer, and for a withdrawal in which the notes keep changing
REQUEST_TIMEOUT, WITHDRAW_TIMEOUT = 4.0, 8.0
#: how many addresses of a server are tried
_MAX_ADDRESSES = 2
#: so many nodes are withdrawn by one update: a message has 65,535 bytes, and the notes that were read are in it as well
MAX_NODES_PER_UPDATE = 100

_NOTE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}) (\S{2,45})")

#: what somebody must see to: the server's answer -> in his words
_PERMANENT_RCODES = {
    dns.rcode.REFUSED: "{server} does not let this key do it: allow it to update (and to ask for) {name} and "
    "{label}.{name}",
    dns.rcode.NOTAUTH: "{server} is not in charge of the zone {zone}, or does not take updates for it",
    dns.rcode.NOTZONE: "{server} says that {name} is not in the zone {zone}",
    dns.rcode.NOTIMP: "{server} does not take updates",
    dns.rcode.YXRRSET: "{name} is a CNAME, beside which there can be no addresses: remove it",
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
    dns.tsig.PeerBadKey: "it has no key of that name and algorithm (BADKEY)",
    dns.tsig.PeerBadSignature: "its key of that name has another secret (BADSIG)",
}


@attrs.frozen
class UpdateServer:
    """Where updates are sent, and what they are about. ``host`` is a name or an address."""

    host: str
    port: int
    zone: str
    name: str
    key_file: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _NotesChangedError(Exception):
    """The notes are not those any more that were read."""


@implementer(INameService)
class Rfc2136NameService:
    """The records of a name. ``ttl`` is in seconds. The key is read anew for each request."""

    def __init__(self, reactor: Any, server: UpdateServer, *, ttl: int) -> None:
        self._server = server
        self._ttl = ttl
        self._zone = dns.name.from_text(server.zone)
        self._name = dns.name.from_text(server.name)
        self._notes_name = dns.name.from_text(f"{NOTE_LABEL}.{server.name}")
        self._thread_pool = DaemonThreadPool(reactor, "rfc2136", 2)

    def announce(self, node_id: str, address: str) -> Deferred[None]:
        """See :class:`INameService`."""
        return self._run(lambda key: self._announce(key, node_id, address))

    def withdraw(self, node_ids: frozenset[str]) -> Deferred[frozenset[str]]:
        """See :class:`INameService`."""
        return self._run(lambda key: self._withdraw(key, node_ids))

    def announced(self) -> Deferred[dict[str, str]]:
        """See :class:`INameService`."""
        return self._run(self._announced)

    def close(self) -> Deferred[None]:
        """See :class:`INameService`."""
        return self._thread_pool.close()

    # What is done in a thread.

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
            raise NameServiceError(f"the clocks of {server} and of this machine differ", permanent=True) from None
        except dns.tsig.PeerError as e:
            problem = (
                f"{server} does not accept the key in {server.key_file}: {_KEY_ERRORS.get(type(e)) or one_line(e)}"
            )
            raise NameServiceError(problem, permanent=True) from None
        except dns.exception.Timeout:
            raise NameServiceError(f"{server} does not answer within {REQUEST_TIMEOUT:g} s") from None
        except dns.exception.DNSException as e:
            raise NameServiceError(f"{server} gives no proper answer: {one_line(e)}") from None
        except EOFError:
            raise NameServiceError(f"{server} closes the connection instead of answering") from None
        except OSError as e:
            raise NameServiceError(f"{server} cannot be reached: {e.strerror or e}") from None

    def _announce(self, key: dns.tsig.Key, node_id: str, address: str) -> None:
        update = dns.update.UpdateMessage(self._zone, keyring=key)
        # Without this a server ignores addresses beside a CNAME, and says nothing.
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
                    problem = f"the notes at {NOTE_LABEL}.{self._server.name} keep changing while they are read"
                    raise NameServiceError(problem) from None
                # Whoever else withdraws now is read again at another moment.
                time.sleep(random.uniform(0.0, 0.1))

    def _withdraw_notes(
        self, key: dns.tsig.Key, node_ids: frozenset[str], records: list[dns.rdata.Rdata]
    ) -> frozenset[str]:
        of_these = [(record, note) for record in records if (note := _parse_note(record)) and note[0] in node_ids]
        # Not more than a message has room for.
        goes = dict(of_these[:MAX_NODES_PER_UPDATE])
        if not goes:
            return frozenset()
        stays = {note[1] for record in records if record not in goes and (note := _parse_note(record))}
        update = dns.update.UpdateMessage(self._zone, keyring=key)
        update.present(self._notes_name, *records)
        for record in goes:
            update.delete(self._notes_name, record)
        for address in {address for _, address in goes.values()} - stays:
            update.delete(self._name, _address_record(address))
        self._send_update(update)
        withdrawn = frozenset(node_id for node_id, _ in goes.values())
        if len(of_these) == len(goes):
            return withdrawn
        return withdrawn | self._withdraw_notes(key, node_ids, [record for record in records if record not in goes])

    def _announced(self, key: dns.tsig.Key) -> dict[str, str]:
        notes = [
            note for record in self._query(key, self._notes_name, dns.rdatatype.TXT) if (note := _parse_note(record))
        ]
        there: set[str] = set()
        for kind in {_address_record(address).rdtype for _, address in notes}:
            there.update(record.to_text() for record in self._query(key, self._name, kind))
        return {node_id: address if address in there else "" for node_id, address in notes}

    def _query(self, key: dns.tsig.Key, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> list[dns.rdata.Rdata]:
        """The records of a kind that a name has."""
        query = dns.message.make_query(name, rdtype, flags=0)
        query.use_tsig(key)
        answer = self._exchange(query)
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise self._rcode_error(answer.rcode())
        if not answer.flags & dns.flags.AA:
            raise self._rcode_error(dns.rcode.NOTAUTH)
        rrset = answer.get_rrset(dns.message.ANSWER, name, dns.rdataclass.IN, rdtype)
        return list(rrset) if rrset is not None else []

    def _send_update(self, update: dns.update.UpdateMessage) -> None:
        rcode = self._exchange(update).rcode()
        if rcode == dns.rcode.NXRRSET:
            raise _NotesChangedError
        if rcode != dns.rcode.NOERROR:
            raise self._rcode_error(rcode)

    def _exchange(self, message: dns.message.Message) -> dns.message.Message:
        """Ask the server, at the first of its addresses that answers."""
        answer = self._exchange_unverified(message)
        if not answer.had_tsig:
            # Newer versions of dnspython see to it themselves.
            raise NameServiceError(f"{self._server} gives no proper answer: it is not signed")
        return answer

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
        return NameServiceError(f"{server} answers {dns.rcode.to_text(rcode)} for the zone {server.zone}")


def _resolve(server: UpdateServer) -> list[str]:
    found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    return addresses[:_MAX_ADDRESSES]


def _address_record(address: str) -> dns.rdata.Rdata:
    kind = dns.rdatatype.A if ipaddress.ip_address(address).version == 4 else dns.rdatatype.AAAA
    return dns.rdata.from_text(dns.rdataclass.IN, kind, address)


def _note_record(node_id: str, address: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.TXT, f'"{node_id} {address}"')


def _parse_note(record: Any) -> tuple[str, str] | None:
    """The node and the address of a note; ``None`` for a text that no node wrote."""
    match = _NOTE.fullmatch(b"".join(record.strings).decode("ascii", "replace"))
    if match is None:
        return None
    try:
        return match[1], str(ipaddress.ip_address(match[2]))
    except ValueError:
        return None
