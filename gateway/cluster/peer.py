"""One other node: the link to it, opened when somebody needs it, kept, and opened again.

nobody needs it               no link
somebody asks for it          an attempt; who asks meanwhile waits with him
the attempt failed            who waits is told why; who asks within a time that grows is told so at once
the link is open              until it breaks, or the node is gone
"""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway._agent.policy import Ended, Refused
from gateway._agent.waiters import Waiters
from gateway.cluster.credentials import OTHER_NODE
from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.link import Link
from gateway.edge.interface import CLOSE_GOING_AWAY
from gateway.telemetry.metrics import Metrics

#: how long nothing is attempted after a failure, in seconds: at first, and at most
FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0
#: a link that broke sooner, in seconds, has failed like one that did not open
STABLE = 2.0
#: how often at most it is logged that a node cannot be reached, in seconds
LOG_EVERY = 30.0

_NORMAL = (1000, CLOSE_GOING_AWAY)
_SECRET = "; have both nodes the same --cluster-secret-file, and clocks that agree?"


class Peer:
    """The way to one node."""

    _log = Logger()

    def __init__(
        self,
        node_id: str,
        *,
        clock: IReactorTime,
        metrics: Metrics,
        open: Callable[[str, str], tuple[Link, Deferred[None]]],
        opened: Callable[[str, Link], None],
        ended: Callable[[str, Link], None],
    ) -> None:
        """``open`` makes a link to a node by its node_id and its url, and opens it. ``opened`` and ``ended`` are told
        of each link that was open."""
        self.node_id = node_id
        #: how often in succession it was not among the nodes that are live
        self.absent = 0
        self.link: Link | None = None
        self._clock = clock
        self._metrics = metrics
        self._open = open
        self._tell_opened = opened
        self._tell_ended = ended
        self._url = ""
        self._attempt: Deferred[None] | None = None
        self._waiters: Waiters[None] = Waiters()
        self._opened_at = 0.0
        self._failures = 0
        self._problem: PeerUnreachable | None = None
        self._not_before = -math.inf
        self._logged_at = -math.inf

    @property
    def idle(self) -> bool:
        """Whether there is neither a link nor an attempt."""
        return self.link is None and self._attempt is None

    def connect(self, url: str) -> Deferred[None]:
        """Have a link open to the node, which is reached by that url. Fails with ``PeerUnreachable``, not sent; at once
        for a while after a failure. Cancelling it only stops the wait."""
        if self.link is not None:
            return succeed(None)
        if self._attempt is None and self._problem is not None and self._clock.seconds() < self._not_before:
            return fail(self._problem)
        waiter = self._waiters.wait()
        if self._attempt is None:
            self._begin(url)
        return waiter

    def _begin(self, url: str) -> None:
        self._url = url
        try:
            link, attempt = self._open(self.node_id, url)
        except Exception:  # noqa: BLE001 (what is wrong with a url, or with the secret)
            self._not_opened(Failure())
            return
        self._attempt = attempt
        attempt.addCallbacks(self._opened, self._not_opened, callbackArgs=(link,))
        attempt.addErrback(lambda failure: self._log.failure("error in opening a link", failure))

    def _opened(self, _: None, link: Link) -> None:
        self._attempt = None
        self.link = link
        self._opened_at = self._clock.seconds()
        if self._problem is not None:
            self._log.info("node {node} at {url} is linked again", node=self.node_id, url=self._url)
        link.closing.addCallback(self._ended, link)
        self._tell_opened(self.node_id, link)
        self._waiters.fire(None)

    def _not_opened(self, failure: Failure) -> None:
        self._attempt = None
        problem = explain(failure)
        if not failure.check(CancelledError):
            self._failed(problem, failure.check(ConnectionRefusedError) is not None or OTHER_NODE in problem)
        self._waiters.fail(self._problem or PeerUnreachable(problem))

    def _ended(self, ended: Ended, link: Link) -> None:
        self.link = None
        if ended.code not in _NORMAL:
            self._failed(f"the link broke: {ended.code} {ascii(ended.reason)[1:-1]}", False)
        if self._clock.seconds() - self._opened_at >= STABLE:
            self._failures = 0
            self._not_before = -math.inf
        self._tell_ended(self.node_id, link)

    def _failed(self, problem: str, refused: bool) -> None:
        self._metrics.link_failures += 1
        self._problem = PeerUnreachable(f"node {self.node_id} at {self._url}: {problem}", refused=refused)
        now = self._clock.seconds()
        self._not_before = now + min(FIRST_WAIT * 2**self._failures, LONGEST_WAIT)
        self._failures = min(self._failures + 1, 16)
        if now - self._logged_at >= LOG_EVERY:
            self._logged_at = now
            url = ascii(self._url)[1:-1]
            text = "node {node} at {url} cannot be asked: {problem}"
            self._log.warn(text, node=self.node_id, url=url, problem=problem)

    def stop(self) -> Link | None:
        """Close the link with 1001, or give up the attempt; returns the link that is being closed."""
        link = self.link
        if self._attempt is not None:
            self._attempt.cancel()
        elif link is not None:
            link.close_with(CLOSE_GOING_AWAY, "going away")
        return link


def explain(failure: Failure) -> str:
    """Why a link could not be opened, in a line."""
    problem = failure.value
    if isinstance(problem, ConnectionRefusedError):
        return "nothing listens there (connection refused)"
    if isinstance(problem, Refused):
        is_secret = problem.status in (401, 403) and OTHER_NODE not in f"{problem}"
        return f"{problem}{_SECRET if is_secret else ''}"
    text = f"{problem}" or type(problem).__name__
    return text.replace("\n", " ")
