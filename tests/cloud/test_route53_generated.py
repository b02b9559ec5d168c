"""Tests of gateway.cloud.route53 with generated input: what is in a hosted zone was written by anybody."""

from __future__ import annotations

import ipaddress
import uuid

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.route53 import _is_node_record, _record_address, _unescape_name

checked = settings(deadline=None, max_examples=100)
addresses = st.ip_addresses().map(str)
identifiers = st.uuids().map(str)


def records(identifier: st.SearchStrategy[str], value: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, object]]:
    """What a listing has, as somebody might have made it."""
    return st.fixed_dictionaries(
        {"Name": st.just("gw.example.com."), "Type": st.sampled_from(["A", "AAAA", "CNAME", "TXT"])},
        optional={
            "SetIdentifier": identifier,
            "MultiValueAnswer": st.booleans(),
            "ResourceRecords": st.lists(st.fixed_dictionaries({"Value": value}), max_size=2),
        },
    )


class RecordTests(SynchronousTestCase):
    @checked
    @given(records(identifiers | st.text(max_size=40) | identifiers.map(str.upper), addresses | st.text(max_size=20)))
    @example({"Name": "", "Type": "A", "SetIdentifier": "{" + "a" * 32 + "}", "MultiValueAnswer": True})
    def test_whose_it_is(self, record: dict[str, object]) -> None:
        """A node's is known by its identifier as a node writes it; an address is one, or there is none."""
        if _is_node_record(record):
            self.assertEqual(str(uuid.UUID(str(record["SetIdentifier"]))), record["SetIdentifier"])
            self.assertIn(record["Type"], ("A", "AAAA"))
            self.assertIs(record["MultiValueAnswer"], True)
        found = _record_address(record)
        if found:
            self.assertEqual(str(ipaddress.ip_address(found)), found)

    @checked
    @given(identifiers, addresses)
    def test_what_a_node_writes(self, identifier: str, address: str) -> None:
        record = {
            "Name": "gw.example.com.",
            "Type": "A" if "." in address else "AAAA",
            "SetIdentifier": identifier,
            "MultiValueAnswer": True,
            "ResourceRecords": [{"Value": address}],
        }
        self.assertTrue(_is_node_record(record))
        self.assertEqual(ipaddress.ip_address(_record_address(record)), ipaddress.ip_address(address))


class NameTests(SynchronousTestCase):
    @checked
    @given(st.text(st.characters(codec="latin-1"), max_size=20))
    def test_escapes(self, name: str) -> None:
        """Every character may be written as its octal number."""
        name = name.replace("\\", "")
        escaped = "".join(f"\\{ord(character):03o}" for character in name)
        self.assertEqual(_unescape_name(escaped + "."), name.rstrip(".").lower())
        self.assertEqual(_unescape_name(name), name.rstrip(".").lower())
