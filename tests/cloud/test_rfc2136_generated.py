"""Tests of gateway.cloud.rfc2136 with generated input: a note may be anybody's text."""

from __future__ import annotations

import ipaddress
import uuid
from types import SimpleNamespace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.rfc2136 import _note_record, _parse_note

checked = settings(deadline=None, max_examples=100)
NODE_ID = "0b0f6c0e-3a52-4a0f-8a7e-5a2f6d9c1b11"


class NoteTests(SynchronousTestCase):
    @checked
    @given(st.uuids().map(str), st.ip_addresses().map(str))
    def test_go_round(self, node_id: str, address: str) -> None:
        found = _parse_note(_note_record(node_id, address))
        self.assertEqual(found, (node_id, str(ipaddress.ip_address(address))))

    @checked
    @given(st.lists(st.binary(max_size=30) | st.just(NODE_ID.encode()) | st.sampled_from([b" ", b"::1"]), max_size=4))
    @example([NODE_ID.encode(), b" ", b"192.0.2.7\n"])
    @example([NODE_ID.encode(), b" \xff\xff"])
    @example([NODE_ID.upper().encode(), b" 192.0.2.7"])
    def test_anything(self, strings: list[bytes]) -> None:
        """It is a node's, whole and as a node writes it, or it is nobody's."""
        found = _parse_note(SimpleNamespace(strings=strings))
        if found is not None:
            node_id, address = found
            self.assertEqual(str(uuid.UUID(node_id)), node_id)
            self.assertEqual(str(ipaddress.ip_address(address)), address)
            self.assertTrue(b"".join(strings).startswith(node_id.encode() + b" "))
