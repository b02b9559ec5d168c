"""Tests of gateway.clients.parked: what is got is what was set."""

from __future__ import annotations

import sys

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.clients.parked import AddressColumn

ORDINARY = (
    "192.0.2.1:4711",
    "0.0.0.0:0",
    "255.255.255.255:65535",
    "127.0.0.1:1",
    "[::]:0",
    "[::1]:65535",
    "[2001:db8::1]:4711",
    "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
    "[::ffff:192.0.2.1]:80",
    "unix",
)
#: what looks like an ordinary one, and would come back as another
OTHERS = (
    "",
    ":",
    ":80",
    "unix:80",
    "host:80",
    "192.0.2.1",
    "192.0.2.1:",
    "192.0.2.1:080",
    "192.0.2.1:65536",
    "192.0.2.1:-1",
    "192.0.2.1: 80",
    "192.0.2.1:8_0",
    "192.0.2.1:\u0661",
    "192.0.2.1 x:80",
    "192.0.2.01:80",
    "192.0.513:80",
    "1:80",
    "0x7f.1:80",
    "[2001:DB8::1]:80",
    "[2001:db8:0:0::1]:80",
    "[2001:db8::1:80",
    "[2001:db8::1)]:80",
    "[fe80::1%eth0]:80",
    "2001:db8::1:80",
    "[192.0.2.1]:80",
    "\0:80",
    "h\u00f6st:80",
    "x" * 300,
    "1.2.3.4:" + "1" * 5000,
)


class AddressColumnTest(SynchronousTestCase):
    def setUp(self) -> None:
        self.addresses = AddressColumn()
        self.addresses.grow(100)

    def test_round_trip(self) -> None:
        for index, address in enumerate(ORDINARY + OTHERS):
            self.addresses.set(index, address)
            self.assertEqual(self.addresses.get(index), address)
        for index, address in enumerate(ORDINARY + OTHERS):
            self.assertEqual(self.addresses.get(index), address)

    def test_only_what_is_odd_is_kept_as_text(self) -> None:
        for address in ORDINARY:
            self.addresses.set(3, address)
            self.assertEqual(self.addresses._strings, {}, address)
        self.addresses.set(3, "[fe80::1%eth0]:80")
        self.assertEqual(len(self.addresses._strings), 1)

    def test_one_after_the_other(self) -> None:
        """Nothing of the one before is left."""
        for before in ORDINARY + OTHERS:
            for address in ("192.0.2.1:4711", "[2001:db8::1]:80", "unix", "host:80"):
                self.addresses.set(3, before)
                self.addresses.set(3, address)
                self.assertEqual(self.addresses.get(3), address)
        self.addresses.set(3, "unix")
        self.assertEqual(self.addresses._strings, {})

    def test_clear(self) -> None:
        """A text takes no memory for longer than it is needed."""
        self.addresses.set(3, "host:80")
        self.addresses.set(4, "host:81")
        self.addresses.clear(3)
        self.addresses.clear(5)
        self.assertEqual(self.addresses._strings, {4: "host:81"})
        self.addresses.set(3, "192.0.2.1:80")
        self.assertEqual((self.addresses.get(3), self.addresses.get(4)), ("192.0.2.1:80", "host:81"))

    def test_grow(self) -> None:
        """What is there stays, and there is never less room."""
        for index, address in enumerate(ORDINARY + OTHERS):
            self.addresses.set(index, address)
        for size in (5000, 100, 0):
            self.addresses.grow(size)
        self.addresses.set(4999, "[2001:db8::1]:80")
        for index, address in enumerate(ORDINARY + OTHERS):
            self.assertEqual(self.addresses.get(index), address)
        self.assertEqual(self.addresses.get(4999), "[2001:db8::1]:80")

    def test_ipv6_alone_takes_the_memory_of_ipv6(self) -> None:
        for index in range(100):
            self.addresses.set(index, f"192.0.2.{index}:80")
        self.assertEqual(len(self.addresses._ipv6), 0)
        self.addresses.set(10, "[2001:db8::1]:80")
        self.assertLess(len(self.addresses._ipv6), 300)
        self.addresses.set(5, "[2001:db8::2]:80")
        self.assertEqual((self.addresses.get(10), self.addresses.get(5)), ("[2001:db8::1]:80", "[2001:db8::2]:80"))

    def test_few_bytes(self) -> None:
        self.addresses.grow(10000)
        for index in range(10000):
            self.addresses.set(index, f"10.1.{index // 250}.{index % 250}:4711")
        self.assertLess(sum(map(sys.getsizeof, (self.addresses._packed, self.addresses._ipv6))), 9 * 10000 * 1.2)

    ports = st.integers(0, 65535)

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 20),
                st.one_of(
                    st.builds("{}:{}".format, st.ip_addresses(v=4), ports),
                    st.builds("[{}]:{}".format, st.ip_addresses(v=6), ports),
                    st.text(alphabet="0123456789.:[]abcfx% u", max_size=20),
                    st.text(max_size=10),
                    st.sampled_from(ORDINARY + OTHERS),
                ),
            ),
            max_size=30,
        )
    )
    @example([(0, "[::1]:1"), (20, "[::2]:2"), (0, "unix")])
    def test_generated(self, pairs: list[tuple[int, str]]) -> None:
        """As a dict would do it."""
        addresses, expected = AddressColumn(), dict(pairs)
        for index, address in pairs:
            addresses.grow(index + 1)
            addresses.set(index, address)
        self.assertEqual({index: addresses.get(index) for index in expected}, expected)
