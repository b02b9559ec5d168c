"""gateway.cluster.peer_pool"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import OTHER_NODE
from gateway.cluster.interface import PeerUnreachable
from gateway.cluster.peer_pool import FIRST_WAIT, LOG_EVERY, LONGEST_WAIT, STABLE, Peer, explain
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from gateway.websocket.client import Ended, OpeningFailed, Refused

URL = "ws://b:8081"


class FakeLink:
    def __init__(self) -> None:
        self.closing: Deferred[Ended] = Deferred()
        self.closed: list[int] = []

    def close_with(self, code: int, reason: str) -> None:
        self.closed.append(code)
        self.closing.callback(Ended(code, reason, ours=True))


class PeerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.attempts: list[tuple[str, str, FakeLink, Deferred[None]]] = []
        self.told: list[tuple[str, str, object]] = []
        self.error: Exception | None = None
        self.peer = Peer(
            "b",
            clock=self.clock,
            metrics=self.metrics,
            open=self.open,
            opened=lambda node_id, link: self.told.append(("opened", node_id, link)),
            ended=lambda node_id, link: self.told.append(("ended", node_id, link)),
        )

    def open(self, node_id: str, url: str) -> tuple[FakeLink, Deferred[None]]:
        if self.error is not None:
            raise self.error
        self.attempts.append((node_id, url, FakeLink(), Deferred()))
        return self.attempts[-1][2:]

    def linked(self) -> FakeLink:
        self.peer.connect(URL)
        self.attempts[-1][3].callback(None)
        return self.attempts[-1][2]

    def fail(self, error: Exception | None = None) -> None:
        waiting = self.peer.connect(URL)
        self.attempts[-1][3].errback(error or ConnectionRefusedError())
        self.failureResultOf(waiting, PeerUnreachable)

    def test_one_attempt_for_all(self) -> None:
        waiting = [self.peer.connect(URL) for _ in range(3)]
        self.assertEqual([each[:2] for each in self.attempts], [("b", URL)])
        waiting[1].addErrback(lambda _: None).cancel()
        self.assertFalse(self.peer.idle)
        self.attempts[0][3].callback(None)
        self.successResultOf(waiting[0])
        self.successResultOf(waiting[2])
        link = self.attempts[0][2]
        self.assertIs(self.peer.link, link)
        self.assertEqual(self.told, [("opened", "b", link)])
        self.successResultOf(self.peer.connect(URL))
        self.assertEqual(len(self.attempts), 1)

    def test_failed(self) -> None:
        waiting = [self.peer.connect(URL) for _ in range(2)]
        self.attempts[0][3].errback(ConnectionRefusedError())
        for each in waiting:
            failed = self.failureResultOf(each, PeerUnreachable).value
            self.assertEqual(str(failed), f"node b at {URL}: nothing listens there (connection refused)")
            self.assertEqual((failed.sent, failed.refused), (False, True))
        self.assertEqual(self.metrics.link_failures, 1)

    def test_at_once_for_a_while(self) -> None:
        wait = FIRST_WAIT
        for n in range(1, 9):
            self.fail()
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(wait - 0.01)
            self.failureResultOf(self.peer.connect(URL), PeerUnreachable)
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(0.02)
            wait = min(2 * wait, LONGEST_WAIT)
        self.linked()

    def test_many_failures(self) -> None:
        for _ in range(2000):
            self.fail()
            self.clock.advance(LONGEST_WAIT)
        self.linked()

    def test_url_or_secret_that_will_not_do(self) -> None:
        for error in (ValueError("no url"), ConfigError("cluster-secret-file", "bad"), PeerUnreachable("stopping")):
            self.error = error
            failed = self.failureResultOf(self.peer.connect(URL), PeerUnreachable).value
            self.assertIn(str(error), str(failed))
            self.assertFalse(failed.refused)
            self.clock.advance(LONGEST_WAIT)
        self.assertTrue(self.peer.idle)

    def test_broken(self) -> None:
        link = self.linked()
        self.clock.advance(STABLE)
        link.closing.callback(Ended(1006, "lost"))
        self.assertEqual(self.told[-1], ("ended", "b", link))
        self.assertEqual(self.metrics.link_failures, 1)
        self.assertIsNot(self.linked(), link)

    def test_broken_at_once(self) -> None:
        """A link that does not last is no better than one that does not open."""
        for n in range(3):
            self.linked().closing.callback(Ended(1008, "go away"))
            failed = self.failureResultOf(self.peer.connect(URL), PeerUnreachable).value
            self.assertIn("the link broke: 1008 go away", str(failed))
            self.assertEqual(len(self.attempts), n + 1)
            self.clock.advance(FIRST_WAIT * 2**n)

    def test_closed_in_good_order(self) -> None:
        link = self.linked()
        link.closing.callback(Ended(1001, "going away"))
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertEqual(self.told[-1], ("ended", "b", link))
        self.linked()

    def test_log(self) -> None:
        with capturedLogs() as logs:
            for _ in range(20):
                self.fail(Refused(401, {}, b'{"error":"peer","message":"the cluster secrets differ\\n"}'))
                self.clock.advance(LONGEST_WAIT)
            self.linked()
        texts = [(log["log_level"], log["log_format"].format(**log)) for log in logs]
        self.assertEqual([level for level, _ in texts], [LogLevel.warn] * 2 + [LogLevel.info])
        self.assertLess(19 * LONGEST_WAIT, 2 * LOG_EVERY)
        self.assertEqual(
            texts[0][1],
            f"node b at {URL} cannot be asked: the gateway answered 401 (peer: the cluster secrets differ\\n); have both "
            "nodes the same --cluster-secret-file, and clocks that agree?",
        )
        self.assertEqual(texts[-1][1], f"node b at {URL} is linked again")

    def test_stop(self) -> None:
        link = self.linked()
        self.peer.stop()
        self.assertEqual(link.closed, [1001])
        self.assertTrue(self.peer.idle)

    def test_stop_an_attempt(self) -> None:
        waiting = self.peer.connect(URL)
        self.peer.stop()
        self.failureResultOf(waiting, PeerUnreachable)
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertTrue(self.peer.idle)
        self.peer.stop()

    def test_refused(self) -> None:
        """Whether it is certain that the node is there no more."""
        other = b'{"error":"peer","message":"this is no request of a node: %b"}' % OTHER_NODE.encode()
        for error, refused in (
            (ConnectionRefusedError(), True),
            (Refused(401, {}, other), True),
            (Refused(401, {}, b""), False),
            (OpeningFailed("lost"), False),
        ):
            waiting = self.peer.connect(URL)
            self.attempts[-1][3].errback(error)
            self.assertEqual(self.failureResultOf(waiting, PeerUnreachable).value.refused, refused, error)
            self.clock.advance(LONGEST_WAIT)

    def test_explained_in_a_line(self) -> None:
        for error, text in (
            (OpeningFailed("lost"), "lost"),
            (RuntimeError(""), "RuntimeError"),
            (RuntimeError("a\nb"), "a b"),
            (Refused(503, {}, b""), "the gateway answered 503"),
        ):
            self.assertEqual(explain(Failure(error)), text)
