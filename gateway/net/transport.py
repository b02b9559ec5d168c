"""Detach sockets from Twisted transports and Autobahn protocols, and adopt them back.

    detach_idle          an idle open connection -> the file descriptor of its socket
    adopt_socket         a file descriptor -> a transport, and a protocol in its open state
    release_to_reactor   an open connection that is not parked -> from the handshake poller to the reactor
    swap_protocol        an open connection -> its transport, with another protocol
    detach_socket        a transport -> the file descriptor of its socket, and its unsent bytes

The only module that uses private attributes of either: neither can give up a connection without closing it, nor start
with one that is open.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from typing import Any

from twisted.internet import tcp, unix
from twisted.protocols.policies import ProtocolWrapper

from gateway.net.accept import HandshakePoller
from gateway.net.proxy_protocol import ProxyProtocolWrapper

#: Twisted's transports whose socket carries the bytes unchanged, unless they use TLS
_PLAIN_TRANSPORTS = (tcp.Server, unix.Server, tcp.Client)
_LINGER_ZERO = struct.pack("ii", 1, 0)


def unsent_bytes(transport: Any) -> float:
    """Return how many bytes a transport holds that the kernel has not taken; infinity if it does not tell."""
    # No interface of Twisted has this. Its wrappers, such as TLS, pass these attributes through.
    try:
        return float(len(transport.dataBuffer) - transport.offset + transport._tempDataLen)
    except AttributeError:
        return math.inf


def socket_fd(transport: Any) -> int:
    """Return the file descriptor of a transport, -1 if it has none."""
    try:
        return int(transport.getHandle().fileno())
    except (AttributeError, OSError):
        return -1


def plain_transport(transport: Any) -> Any:
    """Return the transport whose socket carries a connection's bytes unchanged, or ``None`` if there is none.

    With TLS the state of a connection is not in its socket.
    """
    if type(transport) is ProxyProtocolWrapper:
        transport = transport.transport
    return transport if isinstance(transport, _PLAIN_TRANSPORTS) and not transport.TLS else None


def release_to_reactor(transport: Any) -> None:
    """Move the transport of an open connection from the handshake poller, if it is there, to the reactor."""
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    poller = getattr(transport, "reactor", None)
    if isinstance(poller, HandshakePoller):
        poller.release(transport)


def flush(transport: Any) -> bool:
    """Write the unsent bytes of a transport. Returns whether the kernel took all of them."""
    if unsent_bytes(transport):
        # The reactor meets an error again, and handles it.
        transport.doWrite()
    return not unsent_bytes(transport)


def write_now(transport: Any, data: bytes) -> None:
    """Write at once as many bytes as the kernel takes, and leave the rest to the transport.

    By itself a transport writes nothing before the next reactor iteration, and makes three more system calls first.
    """
    if (
        plain_transport(transport) is transport
        and transport.connected
        and not transport.disconnecting
        and not unsent_bytes(transport)
    ):
        written = transport.writeSomeData(data)
        # Else it is an error: the reactor meets it again, and handles it.
        if isinstance(written, int):
            if written == len(data):
                return
            data = data[written:]
    transport.write(data)


def is_between_messages(protocol: Any) -> bool:
    """Return whether Autobahn has parsed no part of a message that is incomplete."""
    return protocol.current_frame is None and not protocol.inside_message


def detach_idle(protocol: Any) -> tuple[int, int] | None:
    """Detach the socket of an open connection: its file descriptor and address family.

    Returns ``None``, and detaches nothing, unless the transport is plain and not closing, the connection is between two
    messages, and the kernel takes all unsent bytes. After success the protocol must not be used any more. The caller
    checks what is not visible here: timers, producers, pauses.
    """
    wrapper = protocol.transport
    transport = plain_transport(wrapper)
    if transport is None or not transport.connected or transport.disconnecting or transport._aborting:
        return None
    if protocol.data or not is_between_messages(protocol) or not flush(transport):
        return None
    fd, family = _release_socket(wrapper, transport)
    protocol.factory.countConnections -= 1
    protocol.__dict__.clear()
    protocol.state = protocol.STATE_CLOSED
    return fd, family


def _release_socket(wrapper: Any, transport: Any) -> tuple[int, int]:
    """Detach the socket of a plain transport, and unlink the transport and its wrapper, if any. Neither can be used any
    more."""
    transport.unregisterProducer()
    transport.stopReading()
    transport.stopWriting()
    family = transport.socket.family
    fd = transport.socket.detach()
    transport.connected, transport.disconnected = 0, 1
    # Break the reference cycles, so that nothing waits for the garbage collector. A transport without a socket behaves
    # as one that is lost.
    del transport.protocol, transport.socket, transport.fileno
    connector = vars(transport).pop("connector", None)
    if connector is not None:
        connector.transport = connector.factory = None
    if wrapper is not transport:
        wrapper.transport = wrapper.wrappedProtocol = None
    return fd, int(family)


def swap_protocol(protocol: Any, successor: Any) -> bytes:
    """Give the transport of a connection that has just opened to ``successor``.

    Returns the bytes that ``protocol`` has read and not handled. ``protocol`` must not be used any more; Autobahn may
    still be running it further up the stack.
    """
    transport, unread = protocol.transport, protocol.data
    transport.unregisterProducer()
    protocol.factory.countConnections -= 1
    protocol.__dict__.clear()
    protocol.state = protocol.STATE_CLOSED
    set_protocol(transport, successor)
    return bytes(unread)


def set_protocol(transport: Any, protocol: Any) -> None:
    """Replace the protocol of a transport, and connect the new one."""
    if isinstance(transport, ProtocolWrapper):
        transport.wrappedProtocol = protocol
    else:
        transport.protocol = protocol
    protocol.makeConnection(transport)


def can_detach(transport: Any) -> bool:
    """Return whether :func:`detach_socket` may be called: the transport has no TLS, and is not closing."""
    inner = plain_transport(transport)
    return inner is not None and not (
        not inner.connected
        or inner.disconnecting
        or inner._aborting
        or inner._writeDisconnecting
        or inner._writeDisconnected
    )


def detach_socket(transport: Any) -> tuple[int, bytes]:
    """Detach the socket of a transport: its file descriptor, and the unsent bytes.

    :func:`can_detach` must be true. Must not be called while the transport is reading or writing.
    """
    inner = plain_transport(transport)
    unsent = b"".join((inner.dataBuffer[inner.offset :], *inner._tempDataBuffer))
    fd, _ = _release_socket(transport, inner)
    return fd, unsent


def adopt_socket(reactor: Any, factory: Any, fd: int, family: int) -> Any:
    """Build a transport for a socket, and a protocol of ``factory`` in its open state; return the protocol."""
    # Not by adoptStreamConnection: it needs a second file descriptor, and there may be none left.
    skt = socket.socket(family, socket.SOCK_STREAM, fileno=fd)
    try:
        peer = skt.getpeername()
    except OSError:
        # The connection was reset. Bytes received before that must still be handled; then the reactor meets the reset.
        peer = ("", 0)
    protocol = factory.buildProtocol(None)
    protocol.already_open = True
    protocol.openHandshakeTimeout = 0
    transport_class: Any = unix.Server if family == socket.AF_UNIX else tcp.Server
    transport = transport_class(skt, protocol, peer, None, 0, reactor)
    transport.repstr = f"<{type(protocol).__name__} on {fd}>"
    protocol.makeConnection(transport)
    protocol.state = protocol.STATE_OPEN
    return protocol


def reset_socket(fd: int) -> None:
    """Close a socket with a reset (RST); without a free file descriptor, close it normally."""
    try:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    except OSError:
        pass
    os.close(fd)


def half_close_socket(fd: int) -> None:
    """Shut down the sending side of a socket, after the bytes already sent. Does nothing after a reset."""
    # Not by a duplicate: there may be no file descriptor left for one. The family does not matter here.
    skt = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)
    try:
        skt.shutdown(socket.SHUT_WR)
    except OSError:
        # The connection was reset.
        pass
    finally:
        skt.detach()
