"""gateway.cluster.peer_pool"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from gateway.cluster.auth import WRONG_NODE
from gateway.cluster.interface import PeerUnreachableError
from gateway.cluster.peer_pool import (
    INITIAL_BACKOFF,
    LOG_INTERVAL,
    MAX_BACKOFF,
    MIN_UPTIME,
    PeerConnector,
    describe_failure,
)
from gateway.metrics import Metrics
from gateway.settings import ConfigError
from gateway.websocket.client import CloseEvent, HandshakeError, HandshakeRefusedError

URL = "ws://b:8081"


class FakeConnection:
    def __init__(self) -> None:
        self.closed: Deferred[CloseEvent] = Deferred()
        self.close_codes: list[int] = []

    def close_with(self, code: int, reason: str) -> None:
        self.close_codes.append(code)
        self.closed.callback(CloseEvent(code, reason, initiated_locally=True))


class PeerConnectorTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.attempts: list[tuple[str, str, FakeConnection, Deferred[None]]] = []
        self.events: list[tuple[str, str, object]] = []
        self.error: Exception | None = None
        self.connector = PeerConnector(
            "b",
            clock=self.clock,
            metrics=self.metrics,
            open_connection=self.open_connection,
            on_open=lambda node_id, link: self.events.append(("opened", node_id, link)),
            on_close=lambda node_id, link: self.events.append(("ended", node_id, link)),
        )

    def open_connection(self, node_id: str, url: str) -> tuple[FakeConnection, Deferred[None]]:
        if self.error is not None:
            raise self.error
        self.attempts.append((node_id, url, FakeConnection(), Deferred()))
        return self.attempts[-1][2:]

    def connected(self) -> FakeConnection:
        self.connector.connect(URL)
        self.attempts[-1][3].callback(None)
        return self.attempts[-1][2]

    def fail(self, error: Exception | None = None) -> None:
        waiting = self.connector.connect(URL)
        self.attempts[-1][3].errback(error or ConnectionRefusedError())
        self.failureResultOf(waiting, PeerUnreachableError)

    def test_one_attempt_for_all(self) -> None:
        waiting = [self.connector.connect(URL) for _ in range(3)]
        self.assertEqual([each[:2] for each in self.attempts], [("b", URL)])
        waiting[1].addErrback(lambda _: None).cancel()
        self.assertFalse(self.connector.is_idle)
        self.attempts[0][3].callback(None)
        self.successResultOf(waiting[0])
        self.successResultOf(waiting[2])
        link = self.attempts[0][2]
        self.assertIs(self.connector.connection, link)
        self.assertEqual(self.events, [("opened", "b", link)])
        self.successResultOf(self.connector.connect(URL))
        self.assertEqual(len(self.attempts), 1)

    def test_failed(self) -> None:
        waiting = [self.connector.connect(URL) for _ in range(2)]
        self.attempts[0][3].errback(ConnectionRefusedError())
        for each in waiting:
            failed = self.failureResultOf(each, PeerUnreachableError).value
            self.assertEqual(str(failed), f"node b at {URL}: nothing listens there (connection refused)")
            self.assertEqual((failed.sent, failed.refused), (False, True))
        self.assertEqual(self.metrics.link_failures, 1)

    def test_at_once_for_a_while(self) -> None:
        wait = INITIAL_BACKOFF
        for n in range(1, 9):
            self.fail()
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(wait - 0.01)
            self.failureResultOf(self.connector.connect(URL), PeerUnreachableError)
            self.assertEqual(len(self.attempts), n)
            self.clock.advance(0.02)
            wait = min(2 * wait, MAX_BACKOFF)
        self.connected()

    def test_many_failures(self) -> None:
        for _ in range(2000):
            self.fail()
            self.clock.advance(MAX_BACKOFF)
        self.connected()

    def test_url_or_secret_that_will_not_do(self) -> None:
        for error in (
            ValueError("no url"),
            ConfigError("cluster-secret-file", "bad"),
            PeerUnreachableError("stopping"),
        ):
            self.error = error
            failed = self.failureResultOf(self.connector.connect(URL), PeerUnreachableError).value
            self.assertIn(str(error), str(failed))
            self.assertFalse(failed.refused)
            self.clock.advance(MAX_BACKOFF)
        self.assertTrue(self.connector.is_idle)

    def test_broken(self) -> None:
        link = self.connected()
        self.clock.advance(MIN_UPTIME)
        link.closed.callback(CloseEvent(1006, "lost"))
        self.assertEqual(self.events[-1], ("ended", "b", link))
        self.assertEqual(self.metrics.link_failures, 1)
        self.assertIsNot(self.connected(), link)

    def test_broken_at_once(self) -> None:
        """A link that does not last is no better than one that does not open."""
        for n in range(3):
            self.connected().closed.callback(CloseEvent(1008, "go away"))
            failed = self.failureResultOf(self.connector.connect(URL), PeerUnreachableError).value
            self.assertIn("the link broke: 1008 go away", str(failed))
            self.assertEqual(len(self.attempts), n + 1)
            self.clock.advance(INITIAL_BACKOFF * 2**n)

    def test_closed_in_good_order(self) -> None:
        link = self.connected()
        link.closed.callback(CloseEvent(1001, "going away"))
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertEqual(self.events[-1], ("ended", "b", link))
        self.connected()

    def test_log(self) -> None:
        with capturedLogs() as logs:
            for _ in range(20):
                self.fail(HandshakeRefusedError(401, {}, b'{"error":"peer","message":"the cluster secrets differ\\n"}'))
                self.clock.advance(MAX_BACKOFF)
            self.connected()
        texts = [(log["log_level"], log["log_format"].format(**log)) for log in logs]
        self.assertEqual([level for level, _ in texts], [LogLevel.warn] * 2 + [LogLevel.info])
        self.assertLess(19 * MAX_BACKOFF, 2 * LOG_INTERVAL)
        self.assertEqual(
            texts[0][1],
            f"node b at {URL} cannot be asked: the gateway answered 401 (peer: the cluster secrets differ\\n); have both "
            "nodes the same --cluster-secret-file, and clocks that agree?",
        )
        self.assertEqual(texts[-1][1], f"node b at {URL} is linked again")

    def test_stop(self) -> None:
        link = self.connected()
        self.connector.stop()
        self.assertEqual(link.close_codes, [1001])
        self.assertTrue(self.connector.is_idle)

    def test_stop_an_attempt(self) -> None:
        waiting = self.connector.connect(URL)
        self.connector.stop()
        self.failureResultOf(waiting, PeerUnreachableError)
        self.assertEqual(self.metrics.link_failures, 0)
        self.assertTrue(self.connector.is_idle)
        self.connector.stop()

    def test_refused(self) -> None:
        """Whether it is certain that the node is there no more."""
        other = b'{"error":"peer","message":"this is no request of a node: %b"}' % WRONG_NODE.encode()
        for error, refused in (
            (ConnectionRefusedError(), True),
            (HandshakeRefusedError(401, {}, other), True),
            (HandshakeRefusedError(401, {}, b""), False),
            (HandshakeError("lost"), False),
        ):
            waiting = self.connector.connect(URL)
            self.attempts[-1][3].errback(error)
            self.assertEqual(self.failureResultOf(waiting, PeerUnreachableError).value.refused, refused, error)
            self.clock.advance(MAX_BACKOFF)

    def test_explained_in_a_line(self) -> None:
        for error, text in (
            (HandshakeError("lost"), "lost"),
            (RuntimeError(""), "RuntimeError"),
            (RuntimeError("a\nb"), "a b"),
            (HandshakeRefusedError(503, {}, b""), "the gateway answered 503"),
        ):
            self.assertEqual(describe_failure(Failure(error)), text)
