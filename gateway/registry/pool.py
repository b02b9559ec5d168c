"""A pool of one connection, as a lane wants it: what is raised in its thread takes nothing of the connection along."""

from __future__ import annotations

import traceback
from typing import Any, Protocol, TypeVar, cast

from twisted.internet.defer import Deferred

from gateway.registry.lane import Work

T = TypeVar("T")


class Errors(Protocol):
    """What a database's errors mean."""

    def retryable(self, error: BaseException | None) -> bool:
        """Whether an error may be gone at the next try."""

    def explain(self, error: BaseException | None) -> str:
        """One line for a log, or an empty text for an error that is no database's."""


class Pool:
    """A dialect and its pool of ``adbapi``'s."""

    def __init__(self, errors: Errors, pool: Any) -> None:
        self._pool = pool
        self._afresh = False
        self.retryable = errors.retryable
        self.explain = errors.explain
        self._connect = pool.connectionFactory
        pool.connectionFactory = _contained(self._connection)

    def _connection(self, pool: Any) -> Any:
        """Called in the pool's thread for each job. What is raised here leaves no connection behind."""
        connection = self._connect(pool)
        if self._afresh:
            connection.reconnect()
        return connection

    def run(self, work: Work[T], afresh: bool) -> Deferred[T]:
        """Carry out work in the pool's thread."""
        self._afresh = afresh
        return cast("Deferred[T]", self._pool.runWithConnection(_contained(work)))

    def close(self) -> None:
        """Disconnect; nothing must be running."""
        self._pool.close()


def _contained(work: Work[T]) -> Work[T]:
    """Let an exception leave its thread without the variables of the frames that it came through: a cursor among them,
    or a connection, would be freed in the reactor's thread."""

    def contained(connection: Any) -> T:
        try:
            return work(connection)
        except BaseException as e:
            error: BaseException | None = e
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise

    return contained
