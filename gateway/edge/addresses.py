"""A column of addresses: ``host:port`` of each parked client, in a few bytes.

As texts they would be the largest part of a parked connection.
"""

from __future__ import annotations

import socket
from array import array

#: what a number stands for; its lower 48 bits are the address and port, or the port
_IPV4, _IPV6, _UNIX, _OTHER = 1 << 48, 2 << 48, 3 << 48, 4 << 48
_PORT, _REST = 0xFFFF, (1 << 48) - 1
_IPV6_SIZE = 16


class Addresses:
    """Addresses by number. What is got is what was set, to the letter."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        #: for IPv6 alone, and only as long as the highest number of one
        self._ipv6 = bytearray()
        #: what is neither, such as a link-local address with its interface
        self._others: dict[int, str] = {}

    def grow(self, size: int) -> None:
        """Make room for so many."""
        self._numbers.extend(array("Q", bytes(8 * max(0, size - len(self._numbers)))))

    def set(self, index: int, address: str) -> None:
        """Keep one."""
        self.clear(index)
        self._numbers[index] = self._encode(index, address)
        if self.get(index) != address:
            self._numbers[index] = _OTHER
            self._others[index] = address

    def get(self, index: int) -> str:
        """The one that was set last."""
        number = self._numbers[index]
        kind = number & ~_REST
        if kind == _IPV4:
            return f"{socket.inet_ntoa((number >> 16 & 0xFFFFFFFF).to_bytes(4, 'big'))}:{number & _PORT}"
        if kind == _IPV6:
            host = bytes(self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE])
            return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{number & _PORT}"
        return "unix" if kind == _UNIX else self._others[index]

    def clear(self, index: int) -> None:
        """Forget one."""
        if self._others:
            self._others.pop(index, None)

    def _encode(self, index: int, address: str) -> int:
        if address == "unix":
            return _UNIX
        host, _, port = address.rpartition(":")
        try:
            number = int(port) & _PORT
            if host[:1] != "[":
                return _IPV4 | int.from_bytes(socket.inet_aton(host), "big") << 16 | number
            packed = socket.inet_pton(socket.AF_INET6, host[1:-1])
        except (ValueError, OSError):
            return _UNIX
        missing = (index + 1) * _IPV6_SIZE - len(self._ipv6)
        if missing > 0:
            # In steps, since addresses come in the order of their numbers.
            self._ipv6.extend(bytes(missing + len(self._ipv6) // 8))
        self._ipv6[index * _IPV6_SIZE : (index + 1) * _IPV6_SIZE] = packed
        return _IPV6 | number
