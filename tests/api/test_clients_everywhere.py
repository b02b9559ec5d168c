"""A notification for clients of every node."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from gateway.cluster.interface import PeerUnreachableError
from gateway.protocol.errors import ErrorKind
from tests.api.fakes import NODE_ID, OTHER_ID, EndpointHarness, FakePeerClient, rpc_error
from tests.api.wire import request

PREFIX_NOTIFICATION = b'{"jsonrpc":"2.0","method":"m","params":[3]}'
TARGET = "/v1/clients?prefix=acme/"


class NotifyPrefixTests(TestCase):
    def setUp(self):
        self.peers = FakePeerClient()
        self.endpoint = EndpointHarness(peers=self.peers)
        for node_id in (NODE_ID, OTHER_ID, "third"):
            self.endpoint.registry.add_node(node_id)

    def notify(self):
        response = self.endpoint.request("POST", TARGET, PREFIX_NOTIFICATION)
        return response.status, response.json

    def test_everywhere_at_once(self):
        other, third = Deferred(), Deferred()
        self.peers.results += [other, third]
        connection = self.endpoint.connect()
        connection.send(request("POST", TARGET, PREFIX_NOTIFICATION))
        asked = ("acme/", "m", b"[3]")
        self.assertEqual(self.peers.requests, [("notify_prefix", node_id, *asked) for node_id in (OTHER_ID, "third")])
        self.assertEqual(self.endpoint.dispatcher.prefix_notifications, [asked])
        third.callback(5)
        self.assertEqual(connection.responses(), [])
        other.callback(0)
        (response,) = connection.responses()
        self.assertEqual((response.status, response.json), (202, {"nodes": {NODE_ID: 3, OTHER_ID: 0, "third": 5}}))

    def test_a_node_that_cannot_be_asked(self):
        self.peers.results += [
            PeerUnreachableError("nothing listens there"),
            PeerUnreachableError("peer.notify_prefix: silent", sent=True),
        ]
        status, body = self.notify()
        self.assertEqual((status, body["nodes"], set(body)), (202, {NODE_ID: 3}, {"nodes", "failed"}))
        self.assertEqual(body["failed"][OTHER_ID], "nothing listens there")
        self.assertEqual(body["failed"]["third"], "silent; some of its clients may have been told")

    def test_this_node_is_one_of_them_whatever_the_registry_says(self):
        del self.endpoint.registry.statuses[:2]
        self.peers.results.append(1)
        self.assertEqual(self.notify(), (202, {"nodes": {NODE_ID: 3, "third": 1}}))

    def test_when_the_nodes_are_not_known_nobody_is_told(self):
        self.endpoint.registry.unavailable = True
        status, body = self.notify()
        self.assertEqual((status, body["error"]), (503, "registry"))
        self.assertEqual((self.endpoint.dispatcher.prefix_notifications, self.peers.requests), ([], []))

    def test_what_no_node_passes_on(self):
        self.peers.results += [PeerUnreachableError("refused")] * 2
        self.endpoint.dispatcher.prefix_result = rpc_error(ErrorKind.INVALID_REQUEST, None)
        status, body = self.notify()
        self.assertEqual((status, body["error"]["code"]), (400, -32600))

    def test_who_asked_has_gone(self):
        cancelled = []
        self.peers.results += [Deferred(cancelled.append), Deferred(cancelled.append)]
        connection = self.endpoint.connect()
        connection.send(request("POST", TARGET, PREFIX_NOTIFICATION))
        connection.disconnect()
        self.assertEqual(len(cancelled), 2)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_an_unexpected_failure(self):
        self.peers.results += [ZeroDivisionError("secret"), 1]
        status, body = self.notify()
        self.assertEqual((status, body["error"]), (500, "internal"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
