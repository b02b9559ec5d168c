"""The mutants, at least one for each check."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed

from gateway.clients.table import SessionTable
from gateway.cluster.membership import Membership
from gateway.cluster.peer_client import PeerClient
from gateway.protocol.errors import ErrorKind, RpcError
from gateway.registry.generations import GenerationFloor
from gateway.rpc import dispatcher as dispatcher_module
from gateway.rpc.dispatcher import Dispatcher
from gateway.rpc.ordering import ClientQueue
from gateway.rpc.orphans import OrphanedRows
from gateway.rpc.pending import PendingCalls
from gateway.rpc.remote import FailureReason, RemoteDelivery
from tests.simulation.fleet import Options
from tests.simulation.mutants import Mutant

#: a small fleet with drains, moves and reconnects
_MOVES = Options(1, clients=20, minutes=0.4, is_calm=True, fault_interval=1.0)
#: the same, with many messages to few clients
_DENSE = Options(1, clients=6, minutes=0.4, rate=400.0, is_calm=True, fault_interval=0.7)
#: and with connections that are lost
_LOSSES = Options(
    1,
    clients=20,
    minutes=0.4,
    is_calm=False,
    fault_interval=1.0,
    kinds=("cut_connection", "client_reconnects", "cut_peers", "storm", "drain"),
)
_DATABASE = Options(
    1,
    clients=20,
    minutes=0.5,
    is_calm=False,
    fault_interval=2.0,
    kinds=("fail_over", "clock_step", "client_leaves"),
)


def _forget_some_deadlines(original: Any) -> Any:
    def fail(self: Any, owner: Any, id: bytes, error: RpcError) -> bool:
        if error.kind is ErrorKind.TIMEOUT and id[-2:-1] in b"01234567":
            self.discard(self._calls[id])
            return False
        return bool(original(self, owner, id, error))

    return fail


def _match_in_order(original: Any) -> Any:
    def resolve(self: Any, owner: Any, id: bytes, reply: Any) -> bool:
        first = next(iter(self._owners.get(owner, ())), id)
        return bool(original(self, owner, first, reply))

    return resolve


def _lost_is_not_sent(original: Any) -> Any:
    return lambda client_id: RpcError(ErrorKind.CONNECTION_LOST, client_id, sent=False)


def _repeat_after_a_loss(original: Any) -> Any:
    def call_completed(self: Any, call: Any, result: Any) -> None:
        is_lost = isinstance(result, RpcError) and result.kind is ErrorKind.CONNECTION_LOST
        if is_lost and call.origin is not None and call.error_kind is None:
            self._retry(call, FailureReason.NOT_HERE)
        else:
            original(self, call, result)

    return call_completed


def _no_fence(original: Any) -> Any:
    def fence(self: Any, location: Any) -> Deferred[None]:
        return succeed(None)

    return fence


def _skip_the_queue(original: Any) -> Any:
    def init(self: Any, **options: Any) -> None:
        original(self, **options)
        self._queues = {}

    return init


def _put_in_front(original: Any) -> Any:
    return lambda self, message: self.waiting.appendleft(message)


def _do_nothing(original: Any) -> Any:
    return lambda self, *arguments, **options: None


def _release_nothing(original: Any) -> Any:
    async def check(self: Any, key: Any) -> bool:
        return False

    return check


def _reap_nothing(original: Any) -> Any:
    async def reap(self: Any) -> None:
        self._reaping = False

    return reap


def _drop_the_unsent_rest(original: Any) -> Any:
    def wake(self: Any, unparked: Any) -> Any:
        unparked.unsent = b""
        return original(self, unparked)

    return wake


def _never_ahead(original: Any) -> Any:
    return lambda self, now, tolerance=0: False


def _no_handoff(original: Any) -> Any:
    return lambda self, key, handoff=False: original(self, key)


def _close_with_calls_in_flight(original: Any) -> Any:
    return lambda self, key: 0


MUTANTS = (
    Mutant(
        "forget-some-deadlines",
        "the wheel forgets some of the calls whose deadline has passed",
        "a",
        PendingCalls,
        "fail",
        _forget_some_deadlines,
        _MOVES,
    ),
    Mutant(
        "match-in-order",
        "a response completes the oldest call of its connection, instead of the one whose id it has",
        "b",
        PendingCalls,
        "resolve",
        _match_in_order,
        _MOVES,
    ),
    Mutant(
        "lost-is-not-sent",
        "a call whose connection was lost promises that the client did not get it",
        "c",
        dispatcher_module,
        "_connection_lost",
        _lost_is_not_sent,
        _LOSSES,
    ),
    Mutant(
        "repeat-after-a-loss",
        "a call is sent again after the connection to its node was lost, though the client may have got it",
        "d",
        RemoteDelivery,
        "call_completed",
        _repeat_after_a_loss,
        # What it violates first is c.
        attrs.evolve(_LOSSES, stop_at_violation=False),
    ),
    Mutant(
        "drop-the-unsent-rest",
        "a session that wakes because the kernel took a part of a frame does not send the rest",
        "d",
        SessionTable,
        "wake",
        _drop_the_unsent_rest,
        Options(1, clients=10, minutes=0.5, rate=300.0, is_calm=False, fault_interval=0.7, kinds=("slow_reader",)),
    ),
    Mutant(
        "no-fence",
        "after a miss, messages go elsewhere while older ones are still on their way back",
        "e",
        PeerClient,
        "fence",
        _no_fence,
        _DENSE,
    ),
    Mutant(
        "skip-the-queue",
        "a message to a client that has just connected here overtakes those that wait for it",
        "e",
        Dispatcher,
        "__init__",
        _skip_the_queue,
        _DENSE,
    ),
    Mutant(
        "last-come-first-served",
        "a message that has to wait is put before those that wait already",
        "e",
        ClientQueue,
        "add",
        _put_in_front,
        _DENSE,
    ),
    Mutant(
        "orphaned-rows-stay",
        "rows of clients that are not connected are never released",
        "f",
        OrphanedRows,
        "_check",
        _release_nothing,
        _DATABASE,
    ),
    Mutant(
        "dead-nodes-stay",
        "the rows of nodes whose leases have expired are not removed",
        "f",
        Membership,
        "_reap",
        _reap_nothing,
        Options(1, clients=20, minutes=0.4, is_calm=False, fault_interval=3.0, kinds=("kill", "power_off")),
    ),
    Mutant(
        "generations-follow-the-clock",
        "a generation is the database's time, even if that was set back",
        "g",
        GenerationFloor,
        "is_ahead_of",
        _never_ahead,
        _DATABASE,
    ),
    Mutant(
        "queues-stay",
        "the queue of a client is kept when it is empty",
        "h",
        RemoteDelivery,
        "_drop",
        _do_nothing,
        _MOVES,
    ),
    Mutant(
        "no-handoff",
        "calls to a client that was told to go do not wait for its next connection",
        "i",
        Dispatcher,
        "begin_goaway",
        _no_handoff,
        _MOVES,
    ),
    Mutant(
        "close-with-calls-in-flight",
        "a client that was told to go is disconnected before it has answered",
        "i",
        Dispatcher,
        "calls_in_flight_on",
        _close_with_calls_in_flight,
        _MOVES,
    ),
)
