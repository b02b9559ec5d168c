"""From a Twisted transport with an Autobahn protocol to a bare socket, and back.

    detach      an open connection on which nothing is going on -> the file descriptor of its socket
    adopt       a file descriptor -> a transport and a protocol in its open state
    settle      an open connection that is not to be parked -> the reactor itself, from among the newcomers
    hand_over   an open connection -> its transport, with another protocol
    take        a transport -> the file descriptor of its socket, and what it had not sent

The only place that knows the inside of either: neither has a way to give up a connection without ending it, nor to
begin with one that is open.
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

#: Twisted's transports whose socket carries the bytes as they are, without TLS
_PLAIN_TRANSPORTS = (tcp.Server, unix.Server, tcp.Client)
_LINGER_ZERO = struct.pack("ii", 1, 0)


def unsent_bytes(transport: Any) -> float:
    """How many bytes a transport holds that the kernel has not taken; infinity where it does not tell."""
    # No interface of Twisted's says so. Its wrappers, such as TLS, hand these attributes on.
    try:
        return float(len(transport.dataBuffer) - transport.offset + transport._tempDataLen)
    except AttributeError:
        return math.inf


def socket_fd(transport: Any) -> int:
    """The file descriptor of a connection, -1 where it has none."""
    try:
        return int(transport.getHandle().fileno())
    except (AttributeError, OSError):
        return -1


def plain_transport(transport: Any) -> Any:
    """The transport whose socket carries a connection's bytes as they are, or ``None`` if there is no such: with TLS
    the state of a connection is not in its socket."""
    if type(transport) is ProxyProtocolWrapper:
        transport = transport.transport
    return transport if isinstance(transport, _PLAIN_TRANSPORTS) and not transport.TLS else None


def release_to_reactor(transport: Any) -> None:
    """Leave the transport of a connection that is open to the reactor, if it is among the newcomers."""
    while isinstance(transport, ProtocolWrapper):
        transport = transport.transport
    newcomers = getattr(transport, "reactor", None)
    if isinstance(newcomers, HandshakePoller):
        newcomers.release(transport)


def flush(transport: Any) -> bool:
    """Write what a transport holds; whether the kernel took all of it."""
    if unsent_bytes(transport):
        # An error is found again by the reactor, which knows what to do about it.
        transport.doWrite()
    return not unsent_bytes(transport)


def write_now(transport: Any, data: bytes) -> None:
    """Write at once what the kernel takes, and leave the rest to the transport.

    By itself a transport writes nothing before the reactor's next turn, and asks the kernel three more questions first.
    """
    if (
        plain_transport(transport) is transport
        and transport.connected
        and not transport.disconnecting
        and not unsent_bytes(transport)
    ):
        written = transport.writeSomeData(data)
        # An error is found again by the reactor, which knows what to do about it.
        if isinstance(written, int):
            if written == len(data):
                return
            data = data[written:]
    transport.write(data)


def is_between_messages(protocol: Any) -> bool:
    """Whether an open connection is between two messages in what Autobahn has read of it."""
    return protocol.current_frame is None and not protocol.inside_message


def detach_idle(protocol: Any) -> tuple[int, int] | None:
    """Take the socket from a connection: its file descriptor and its address family.

    ``None``, and nothing is changed, unless it is open, between two messages, and all that was sent has left. After it
    the protocol is of no more use. The caller looks at what this cannot see: timers, producers, pauses.
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
    """Take its socket from a bare transport, which may be in a wrapper; neither is of use any more."""
    transport.unregisterProducer()
    transport.stopReading()
    transport.stopWriting()
    family = transport.socket.family
    fd = transport.socket.detach()
    transport.connected, transport.disconnected = 0, 1
    # What refers to each other is told to forget it, or all this would have to wait for the garbage collector; and a
    # transport without a socket takes itself for one that is lost.
    del transport.protocol, transport.socket, transport.fileno
    connector = vars(transport).pop("connector", None)
    if connector is not None:
        connector.transport = connector.factory = None
    if wrapper is not transport:
        wrapper.transport = wrapper.wrappedProtocol = None
    return fd, int(family)


def swap_protocol(protocol: Any, successor: Any) -> bytes:
    """Give the transport of a connection that has just opened to another protocol, ``successor``; returns what was read
    and not handled yet. After it ``protocol``, which Autobahn may still be busy with, is of no more use."""
    transport, unread = protocol.transport, protocol.data
    transport.unregisterProducer()
    protocol.factory.countConnections -= 1
    protocol.__dict__.clear()
    protocol.state = protocol.STATE_CLOSED
    set_protocol(transport, successor)
    return bytes(unread)


def set_protocol(transport: Any, protocol: Any) -> None:
    """Let a transport have another protocol from now on."""
    if isinstance(transport, ProtocolWrapper):
        transport.wrappedProtocol = protocol
    else:
        transport.protocol = protocol
    protocol.makeConnection(transport)


def can_detach(transport: Any) -> bool:
    """Whether :func:`take` can take the socket of a transport: it has no TLS, and is not being closed."""
    inner = plain_transport(transport)
    return inner is not None and not (
        not inner.connected
        or inner.disconnecting
        or inner._aborting
        or inner._writeDisconnecting
        or inner._writeDisconnected
    )


def detach_socket(transport: Any) -> tuple[int, bytes]:
    """Take the socket of a transport that is :func:`takeable`: its file descriptor, and what was written to the
    transport and has not left. Not to be called while the transport is reading or writing."""
    inner = plain_transport(transport)
    waiting = b"".join((inner.dataBuffer[inner.offset :], *inner._tempDataBuffer))
    fd, _ = _release_socket(transport, inner)
    return fd, waiting


def adopt_socket(reactor: Any, factory: Any, fd: int, family: int) -> Any:
    """Make a transport for a socket, and a protocol of ``factory`` in its open state."""
    # Not by adoptStreamConnection: that needs a second file descriptor, and there may be none.
    skt = socket.socket(family, socket.SOCK_STREAM, fileno=fd)
    try:
        peer = skt.getpeername()
    except OSError:
        # It was reset. What came before that is still to be handled; then the reactor finds its end.
        peer = ("", 0)
    protocol = factory.buildProtocol(None)
    protocol.already_open = True
    protocol.openHandshakeTimeout = 0
    kind: Any = unix.Server if family == socket.AF_UNIX else tcp.Server
    transport = kind(skt, protocol, peer, None, 0, reactor)
    transport.repstr = f"<{type(protocol).__name__} on {fd}>"
    protocol.makeConnection(transport)
    protocol.state = protocol.STATE_OPEN
    return protocol


def reset_socket(fd: int) -> None:
    """Close a socket so that the other side sees a reset."""
    try:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    except OSError:
        pass
    os.close(fd)


def half_close_socket(fd: int) -> None:
    """Say on a socket that nothing more will be sent: what was sent arrives, and then the end."""
    # Not by a duplicate: there may be no file for one. What the family is does not matter here.
    skt = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)
    try:
        skt.shutdown(socket.SHUT_WR)
    except OSError:
        # It was reset.
        pass
    finally:
        skt.detach()
