"""Tests of gateway.cloud.rfc2136, with a real BIND and with generated input."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import shutil
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dns.name
import dns.tsig
import dns.update
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from gateway.cloud import rfc2136
from gateway.cloud.errors import KeyFileError, NameServiceError
from gateway.cloud.rfc2136 import Rfc2136NameService, TsigKey, UpdateServer, _note_record, _parse_note, parse_key
from tests.builders import bind
from tests.builders.ports import free_port

NAME = "gw.example.com"
NOTES = f"_wsgateway.{NAME}"


def node_id() -> str:
    return str(uuid.uuid4())


class Rfc2136TestCase(TestCase):
    """Tests with a real BIND."""

    def setUp(self) -> None:
        self.bind = bind.server()
        self.bind.remove_records(NAME)

    def service(self, **more: Any) -> Rfc2136NameService:
        from twisted.internet import reactor

        values = {"host": "127.0.0.1", "port": self.bind.port, "zone": bind.ZONE, "name": NAME}
        server = UpdateServer(**{**values, "key_file": str(self.bind.key_file), **more})
        service = Rfc2136NameService(reactor, server, ttl=30)
        self.addCleanup(service.close)
        return service

    @inlineCallbacks
    def failure(self, request: Deferred[Any], *, permanent: bool) -> Any:
        """Return the text of the failure, which must be one line."""
        with self.assertRaises(NameServiceError) as raised:
            yield request
        error = raised.exception
        self.assertNotIn("\n", str(error))
        self.assertEqual((error.permanent, error.throttled), (permanent, False), str(error))
        return str(error)


class RecordTests(Rfc2136TestCase):
    @inlineCallbacks
    def test_announce_and_withdraw(self) -> Any:
        service, a, b = self.service(), node_id(), node_id()
        self.assertEqual((yield service.announced()), {})
        yield service.announce(a, "192.0.2.1")
        yield service.announce(b, "2001:db8::2")
        yield service.announce(a, "192.0.2.1")
        self.assertEqual((yield service.announced()), {a: "192.0.2.1", b: "2001:db8::2"})
        self.assertEqual(self.bind.lookup(NAME), {"192.0.2.1"})
        self.assertEqual(self.bind.lookup(NAME, "AAAA"), {"2001:db8::2"})
        self.assertEqual(self.bind.ttl(NAME), 30)
        yield service.withdraw(frozenset([a, node_id()]))
        self.assertEqual((yield service.announced()), {b: "2001:db8::2"})
        yield service.withdraw(frozenset([a]))
        yield service.withdraw(frozenset([b]))
        self.assertEqual((yield service.announced()), {})
        self.assertEqual([self.bind.lookup(*what) for what in ((NAME,), (NAME, "AAAA"), (NOTES, "TXT"))], [set()] * 3)

    @inlineCallbacks
    def test_shared_address_is_removed_with_its_last_node(self) -> Any:
        service, a, b, c = self.service(), node_id(), node_id(), node_id()
        for node, address in ((a, "192.0.2.1"), (b, "192.0.2.1"), (c, "192.0.2.3")):
            yield service.announce(node, address)
        yield service.withdraw(frozenset([a]))
        self.assertEqual(self.bind.lookup(NAME), {"192.0.2.1", "192.0.2.3"})
        yield service.withdraw(frozenset([b]))
        self.assertEqual(self.bind.lookup(NAME), {"192.0.2.3"})

    @inlineCallbacks
    def test_concurrent_updates_lose_nothing(self) -> Any:
        services = [self.service() for _ in range(4)]
        # Two nodes for each address: one stays, one is withdrawn.
        stay = {node_id(): f"192.0.2.{number}" for number in range(1, 9)}
        go = {node_id(): f"192.0.2.{number}" for number in range(5, 13)}
        yield gatherResults([services[0].announce(*node) for node in go.items()], consumeErrors=True)
        changes = [services[i % 4].announce(*node) for i, node in enumerate(stay.items())]
        changes += [services[i % 4].withdraw(frozenset([node])) for i, node in enumerate(go)]
        yield gatherResults(changes, consumeErrors=True)
        self.assertEqual((yield services[0].announced()), stay)
        self.assertEqual(self.bind.lookup(NAME), set(stay.values()))

    @inlineCallbacks
    def test_withdraw_in_several_updates(self) -> Any:
        self.patch(rfc2136, "MAX_NODES_PER_UPDATE", 3)
        service, stays = self.service(), node_id()
        gone = {node_id(): f"192.0.2.{number}" for number in range(1, 9)}
        yield gatherResults([service.announce(*node) for node in gone.items()], consumeErrors=True)
        # An address is removed with its last node.
        yield service.announce(stays, "192.0.2.8")
        self.assertEqual((yield service.withdraw(frozenset(gone))), frozenset(gone))
        self.assertEqual((yield service.announced()), {stays: "192.0.2.8"})
        self.assertEqual(self.bind.lookup(NAME), {"192.0.2.8"})
        self.assertEqual((yield service.withdraw(frozenset(gone))), frozenset())

    @inlineCallbacks
    def test_note_added_during_withdraw(self) -> Any:
        service, a, b = self.service(), node_id(), node_id()
        yield service.announce(a, "192.0.2.1")
        key = rfc2136.read_key_file(str(self.bind.key_file))
        signing = dns.tsig.Key(key.name, key.secret, dns.tsig.HMAC_SHA256)
        read = service._query(signing, dns.name.from_text(NOTES), dns.rdatatype.TXT)
        yield service.announce(b, "192.0.2.1")
        self.assertRaises(rfc2136._NotesChangedError, service._withdraw_notes, signing, {a}, read)
        self.assertEqual((yield service.announced()), {a: "192.0.2.1", b: "192.0.2.1"})

    @inlineCallbacks
    def test_notes_that_keep_changing_fail_the_withdraw(self) -> Any:
        service, a = self.service(), node_id()
        yield service.announce(a, "192.0.2.1")
        self.patch(rfc2136, "WITHDRAW_TIMEOUT", 0.0)
        self.patch(
            service,
            "_query",
            lambda *_: [rfc2136._note_record(a, "192.0.2.1"), rfc2136._note_record(node_id(), "192.0.2.2")],
        )
        problem = yield self.failure(service.withdraw(frozenset([a])), permanent=False)
        self.assertIn(f"the records of {NOTES} keep changing", problem)

    @inlineCallbacks
    def test_records_not_made_by_nodes_stay(self) -> Any:
        service, a = self.service(), node_id()
        update = self.bind.update()
        update.add(dns.name.from_text(NAME), 60, "A", "192.0.2.9")
        for text in ("by hand", f'"{node_id()} nonsense"', f'"{a.upper()} 192.0.2.9"'):
            update.add(dns.name.from_text(NOTES), 60, "TXT", text)
        self.bind.send(update)
        yield service.announce(a, "192.0.2.1")
        self.assertEqual((yield service.announced()), {a: "192.0.2.1"})
        yield service.withdraw(frozenset([a]))
        self.assertEqual(self.bind.lookup(NAME), {"192.0.2.9"})
        self.assertEqual(len(self.bind.lookup(NOTES, "TXT")), 3)

    @inlineCallbacks
    def test_address_deleted_by_hand(self) -> Any:
        service, a = self.service(), node_id()
        yield service.announce(a, "192.0.2.1")
        update = self.bind.update()
        update.delete(dns.name.from_text(NAME))
        self.bind.send(update)
        self.assertEqual((yield service.announced()), {a: ""})
        yield service.announce(a, "192.0.2.1")
        self.assertEqual((yield service.announced()), {a: "192.0.2.1"})

    @inlineCallbacks
    def test_second_address_of_server_and_name_equal_to_zone(self) -> Any:
        self.bind.remove_records("_wsgateway.example.com")
        # The first address refuses connections.
        result = [(None, None, None, None, (address, self.bind.port)) for address in ("127.0.0.99", "127.0.0.1")]
        self.patch(socket, "getaddrinfo", lambda *_, **__: result)
        service, a = self.service(host="ns.example.com", name=bind.ZONE), node_id()
        yield service.announce(a, "192.0.2.1")
        self.assertEqual(self.bind.lookup(bind.ZONE), {"192.0.2.1"})
        yield service.withdraw(frozenset([a]))
        self.assertEqual(self.bind.lookup(bind.ZONE), set())


class FailureTests(Rfc2136TestCase):
    @inlineCallbacks
    def announcing(self, *, permanent: bool, **more: Any) -> Any:
        request = self.service(**more).announce(node_id(), "192.0.2.1")
        problem = yield self.failure(request, permanent=permanent)
        self.assertEqual(self.bind.lookup(NAME), set())
        return problem

    def key(self, name: str, secret: bytes = b"another secret") -> str:
        path = self.bind.folder / f"{name}-{node_id()}"
        bind.write_key(path, name, secret)
        return str(path)

    @inlineCallbacks
    def test_unknown_key(self) -> Any:
        problem = yield self.announcing(key_file=self.key("stranger"), permanent=True)
        self.assertIn("it has no key with that name and algorithm (BADKEY)", problem)

    @inlineCallbacks
    def test_wrong_secret(self) -> Any:
        path = self.key("wsgateway")
        problem = yield self.announcing(key_file=path, permanent=True)
        self.assertIn(f"does not accept the key in {path}: its key with that name has another secret (BADSIG)", problem)

    @inlineCallbacks
    def test_unauthorized_key(self) -> Any:
        problem = yield self.announcing(key_file=str(self.bind.unauthorized_key_file), permanent=True)
        self.assertIn("refuses this key: allow it to update and to query gw.example.com", problem)

    @inlineCallbacks
    def test_missing_key_file_is_read_again(self) -> Any:
        path = self.bind.folder / f"moving-{node_id()}"
        service, a = self.service(key_file=str(path)), node_id()
        problem = yield self.failure(service.announce(a, "192.0.2.1"), permanent=True)
        self.assertIn(f"{path} cannot be read", problem)
        path.write_bytes(self.bind.key_file.read_bytes())
        yield service.announce(a, "192.0.2.1")

    @inlineCallbacks
    def test_unknown_zone(self) -> Any:
        for method in ("announce", "withdraw"):
            service = self.service(zone="example.org", name="gw.example.org")
            args: Any = (node_id(), "192.0.2.1") if method == "announce" else (frozenset([node_id()]),)
            problem = yield self.failure(getattr(service, method)(*args), permanent=True)
            self.assertIn("example.org", problem)

    @inlineCallbacks
    def test_name_outside_the_zone(self) -> Any:
        problem = yield self.announcing(name="gw.example.org", permanent=True)
        self.assertIn("says that gw.example.org is not in the zone example.com", problem)

    @inlineCallbacks
    def test_name_in_a_child_zone(self) -> Any:
        self.addCleanup(self.bind.remove_records, "apart.example.com")
        update = self.bind.update()
        update.add(dns.name.from_text("apart.example.com"), 60, "NS", "ns.example.com.")
        self.bind.send(update)
        problem = yield self.failure(self.service(name="gw.apart.example.com").announced(), permanent=True)
        self.assertIn("is not authoritative for the zone example.com", problem)

    @inlineCallbacks
    def test_name_is_a_cname(self) -> Any:
        update = self.bind.update()
        update.add(dns.name.from_text(NAME), 60, "CNAME", "ns.example.com.")
        self.bind.send(update)
        request = self.service().announce(node_id(), "192.0.2.1")
        problem = yield self.failure(request, permanent=True)
        self.assertIn("gw.example.com is a CNAME", problem)
        self.assertEqual(self.bind.lookup(NOTES, "TXT"), set())

    @inlineCallbacks
    def test_clocks_differ(self) -> Any:
        now = time.time
        self.patch(time, "time", lambda: now() - 4000)
        problem = yield self.announcing(permanent=True)
        self.assertIn("the clocks of 127.0.0.1:", problem)

    @inlineCallbacks
    def test_unknown_host(self) -> Any:
        def resolve(*args: Any, **kwargs: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        self.patch(socket, "getaddrinfo", resolve)
        request = self.service(host="ns.example.com").announce(node_id(), "192.0.2.1")
        problem = yield self.failure(request, permanent=False)
        self.assertEqual(problem, f"ns.example.com:{self.bind.port} cannot be reached: Name or service not known")

    @inlineCallbacks
    def test_server_restart(self) -> Any:
        self.bind = bind.BindServer()
        self.addCleanup(self.bind.close)
        service, a, b = self.service(), node_id(), node_id()
        yield service.announce(a, "192.0.2.1")
        self.bind.kill()
        problem = yield self.failure(service.announce(b, "192.0.2.2"), permanent=False)
        self.assertIn("cannot be reached: Connection refused", problem)
        self.bind.start()
        yield service.announce(b, "192.0.2.2")
        self.assertEqual((yield service.announced()), {a: "192.0.2.1", b: "192.0.2.2"})

    @inlineCallbacks
    def test_server_timeout(self) -> Any:
        self.patch(rfc2136, "REQUEST_TIMEOUT", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            problem = yield self.announcing(port=port, permanent=False)
        self.assertEqual(problem, f"127.0.0.1:{port} did not respond within 0.1 s")

    @inlineCallbacks
    def answered_by(self, answer: Any, *, permanent: bool = False) -> Any:
        """Return the text of the failure for a server that sends ``answer(request)``."""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                connection, _ = server.accept()
                with connection:
                    question = connection.recv(65536)
                    connection.sendall(answer(question))
                    with contextlib.suppress(ConnectionResetError):
                        # Until the client has read it.
                        connection.recv(1)

            thread = threading.Thread(target=serve)
            thread.start()
            problem = yield self.announcing(port=server.getsockname()[1], permanent=permanent)
            thread.join()
        return problem

    @inlineCallbacks
    def test_invalid_responses(self) -> Any:
        problem = yield self.answered_by(lambda question: b"\0\x04junk")
        self.assertIn("sent an invalid response", problem)
        problem = yield self.answered_by(lambda question: b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 20000)
        self.assertIn("sent an invalid response", problem)

    @inlineCallbacks
    def test_unsigned_response(self) -> Any:
        # Responses to an update of example.com (RFC 2136, section 2.2): NOERROR, REFUSED, NXRRSET.
        for rcode in (0, 5, 8):
            rest = bytes([0xA8, rcode]) + b"\0\1\0\0\0\0\0\0" + b"\7example\3com\0" + b"\0\6\0\1"
            problem = yield self.answered_by(
                lambda query, rest=rest: (2 + len(rest)).to_bytes(2, "big") + query[2:4] + rest
            )
            self.assertIn("sent an invalid response", problem)

    @inlineCallbacks
    def test_zone_that_the_server_cannot_load(self) -> Any:
        service = self.service(zone="broken.example", name="gw.broken.example")
        for request in (service.announce(node_id(), "192.0.2.1"), service.announced()):
            problem = yield self.failure(request, permanent=False)
            self.assertIn("answered SERVFAIL for the zone broken.example", problem)

    @inlineCallbacks
    def test_connection_closed_without_response(self) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)

            thread = threading.Thread(target=serve)
            thread.start()
            problem = yield self.announcing(port=server.getsockname()[1], permanent=False)
            thread.join()
        self.assertIn("closed the connection without a response", problem)

    @inlineCallbacks
    def test_connection_refused(self) -> Any:
        problem = yield self.announcing(port=free_port(), permanent=False)
        self.assertIn("cannot be reached: Connection refused", problem)


GOOD = 'key "wsgateway" {\n\talgorithm hmac-sha256;\n\tsecret "c2VjcmV0";\n};\n'

labels = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=20)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
#: whitespace and comments between two words
blanks = st.sampled_from([" ", "\n", "\t", " # a comment\n", "// another {\n", "/* one\n more */", "\r\n"])


class ParseTests(SynchronousTestCase):
    def refused(self, text: str) -> str:
        return str(self.assertRaises(KeyFileError, parse_key, text))

    def test_format_of_tsig_keygen(self) -> None:
        self.assertEqual(parse_key(GOOD), TsigKey("wsgateway", "hmac-sha256", b"secret"))

    def test_output_of_tsig_keygen(self) -> None:
        program = shutil.which("tsig-keygen", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        for algorithm in sorted(rfc2136.KEY_ALGORITHMS):
            written = subprocess.run([program, "-a", algorithm, "gw.example.com"], capture_output=True, check=True)
            key = parse_key(written.stdout.decode())
            self.assertEqual((key.name, key.algorithm), ("gw.example.com", algorithm))
            self.assertGreaterEqual(len(key.secret), 16)

    def test_secret_first_and_no_quotes(self) -> None:
        self.assertEqual(
            parse_key("key Gw. { secret c2VjcmV0; algorithm HMAC-SHA512; };"), TsigKey("gw", "hmac-sha512", b"secret")
        )

    def test_errors_name_the_problem(self) -> None:
        for text, problem in (
            ("", "expected one key"),
            (GOOD + GOOD, "expected one key"),
            (GOOD.replace("};", "}"), "expected one key"),
            (GOOD.replace("algorithm", "secret"), "expected one key"),
            (GOOD.replace("key ", "zone "), "expected one key"),
            (GOOD.replace("wsgateway", "a..b"), "not a domain name"),
            (GOOD.replace("wsgateway", "a" * 64), "not a domain name"),
            (GOOD.replace("wsgateway", ""), "not a domain name"),
            (GOOD.replace("sha256", "sha3"), "the algorithm of the key is not one of hmac-md5, hmac-sha1"),
            (GOOD.replace("c2VjcmV0", "c2VjcmV"), "not base64"),
            (GOOD.replace("c2VjcmV0", "c2Vj cmV0"), "not base64"),
            (GOOD.replace("c2VjcmV0", ""), "is empty"),
            (GOOD.replace("};", "/* };"), "syntax error in line 4"),
            (GOOD.replace("hmac", "$mac"), "syntax error in line 2"),
            (GOOD.replace('c2VjcmV0"', "c2VjcmV0"), "syntax error in line 3"),
        ):
            self.assertIn(problem, self.refused(text), text)

    def test_secret_is_not_in_repr_or_errors(self) -> None:
        self.assertNotIn("secret'", repr(parse_key(GOOD)))
        self.assertNotIn("c2VjcmV0", self.refused(GOOD.replace("sha256", "sha3")))

    @given(
        names,
        st.sampled_from(sorted(rfc2136.KEY_ALGORITHMS)),
        st.binary(min_size=1, max_size=64),
        st.lists(blanks, min_size=11, max_size=11),
    )
    def test_any_key_with_any_whitespace_and_comments(
        self, name: str, algorithm: str, secret: bytes, between: list[str]
    ) -> None:
        words = [
            "key",
            f'"{name}"',
            "{",
            "algorithm",
            algorithm,
            ";",
            "secret",
            f'"{base64.b64encode(secret).decode()}"',
        ]
        text = "".join(blank + word for blank, word in zip(between, [*words, " ;", "}", ";"], strict=True))
        self.assertEqual(parse_key(text), TsigKey(name, algorithm, secret))

    @given(st.text() | st.text(alphabet='key{};"#/* \nalgorithmsecret-'))
    def test_any_text_is_parsed_or_refused(self, text: str) -> None:
        try:
            parse_key(text)
        except KeyFileError as e:
            self.assertTrue(str(e).isprintable())

    @given(st.data())
    def test_incomplete_key_is_refused(self, data: st.DataObject) -> None:
        words = GOOD.split()
        words.pop(data.draw(st.integers(0, len(words) - 1)))
        self.refused(" ".join(words))


class ReadTests(SynchronousTestCase):
    def refused(self, content: bytes) -> str:
        path = Path(self.mktemp())
        path.write_bytes(content)
        error = str(self.assertRaises(KeyFileError, rfc2136.read_key_file, str(path)))
        self.assertTrue(error.startswith(str(path)))
        return error

    def test_read_file(self) -> None:
        path = Path(self.mktemp())
        path.write_text(GOOD)
        self.assertEqual(rfc2136.read_key_file(str(path)).name, "wsgateway")

    def test_unreadable_file(self) -> None:
        for path, problem in (
            ("/no/such/file", "No such file or directory"),
            ("/", "Is a directory"),
            ("a\0b", "null"),
        ):
            self.assertIn(
                f"cannot be read: {problem}",
                str(self.assertRaises(KeyFileError, rfc2136.read_key_file, path)).replace("embedded ", ""),
            )

    def test_invalid_file(self) -> None:
        self.assertIn("not ASCII", self.refused(b"\xff"))
        self.assertIn("has more than 65536 bytes", self.refused(b" " * 65537))
        self.assertIn('write key "NAME" {', self.refused(b"nonsense"))


checked = settings(deadline=None, max_examples=100)
NODE_ID = "0b0f6c0e-3a52-4a0f-8a7e-5a2f6d9c1b11"


class NoteTests(SynchronousTestCase):
    @checked
    @given(st.uuids().map(str), st.ip_addresses().map(str))
    def test_round_trip(self, node_id: str, address: str) -> None:
        result = _parse_note(_note_record(node_id, address))
        self.assertEqual(result, (node_id, str(ipaddress.ip_address(address))))

    @checked
    @given(st.lists(st.binary(max_size=30) | st.just(NODE_ID.encode()) | st.sampled_from([b" ", b"::1"]), max_size=4))
    @example([NODE_ID.encode(), b" ", b"192.0.2.7\n"])
    @example([NODE_ID.encode(), b" \xff\xff"])
    @example([NODE_ID.upper().encode(), b" 192.0.2.7"])
    def test_any_record(self, strings: list[bytes]) -> None:
        """A record is a note exactly as a node writes it, or it is ignored."""
        result = _parse_note(SimpleNamespace(strings=strings))
        if result is not None:
            node_id, address = result
            self.assertEqual(str(uuid.UUID(node_id)), node_id)
            self.assertEqual(str(ipaddress.ip_address(address)), address)
            self.assertTrue(b"".join(strings).startswith(node_id.encode() + b" "))
