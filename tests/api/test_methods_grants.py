"""What a token that is for some clients, or for some verbs, is answered over the WebSocket, and what it hears."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from gateway.auth.backend_tokens import VERBS, Grant
from gateway.protocol.errors import Kind
from gateway.rpc.pending import Reply
from tests.api.case import BackendTestCase, any_json, call, note
from tests.api.fakes import Backend, Endpoint

ONLY_ACME = "this token is for clients whose id begins with acme/ alone"
#: what a verb is for
ASKED = {
    "call": ("client.call", {"client": "acme/r", "method": "m"}),
    "notify": ("client.notify", {"client": "acme/r", "method": "m"}),
    "read": ("client.get", {"client": "acme/r"}),
    "serve": ("upstream.serve", None),
}


class GrantTestCase(BackendTestCase):
    """A WebSocket by a token that is limited; a client of its customer, and one of another."""

    here = False

    def setUp(self):
        self.limit("acme/")

    def limit(self, prefix="", verbs=None):
        self.grant = Grant(prefix, verbs)
        self.endpoint = Endpoint(grant_of={"t": self.grant}.get, max_message_size=262144)
        self.hub, self.upstream = self.endpoint.hub, self.endpoint.upstream
        # What can be asked at once goes another way.
        self.asked_at_once = []
        self.hub.ask = lambda call, *asked: self.asked_at_once.append(asked) or self.here
        self.hub.notify_here = lambda *asked: self.asked_at_once.append(asked) or self.here
        for client_id in ("acme/r", "beta/r"):
            self.endpoint.edge.add(client_id)
        self.backend = Backend(self.endpoint, [("Authorization", "Bearer t")])

    def refused(self, method, params, client="beta/r"):
        """It is refused, and nothing came of it; returns why."""
        return self.error(self.asked(method, params), -32008, client)

    def nothing_was_done(self):
        self.assertEqual((self.hub.calls, self.hub.notifications, self.asked_at_once), ([], [], []))
        self.assertEqual(self.endpoint.registry.asked, [])


class VerbTests(GrantTestCase):
    here = True

    def test_each_verb_is_for_its_own_alone(self):
        for verb in VERBS:
            self.limit("", [verb])
            for needed, (method, params) in ASKED.items():
                if needed != verb:
                    client = None if params is None else "acme/r"
                    why = self.refused(method, params, client)
                    self.assertEqual(why, f"this token may not {needed}; it is for {verb}")
            if verb != "read":
                self.assertIn("may not read", self.refused("events.subscribe", {"kinds": ["message"]}, None))
            self.nothing_was_done()
            if verb in ASKED:
                method, params = ASKED[verb]
                self.backend.tell(call(2, method, params))
                self.assertNotIn("error", *self.backend.heard() or [{}])

    def test_limited_calls_take_the_short_way_too(self):
        self.limit("acme/", ["call", "notify"])
        self.backend.tell(call(1, *ASKED["call"]))
        self.backend.tell(note(*ASKED["notify"]))
        self.assertEqual([each[0] for each in self.asked_at_once], ["acme/r"] * 2)
        self.assertEqual((self.hub.calls, self.hub.notifications), ([], []))


class PrefixTests(GrantTestCase):
    def test_clients_of_another(self):
        for method, params in list(ASKED.values())[:3]:
            self.assertEqual(self.refused(method, {**params, "client": "beta/r"}), ONLY_ACME)
        self.backend.tell(note("client.notify", {"client": "beta/r", "method": "m"}))
        self.backend.tell(note("client.call", {"client": "beta/r", "method": "m"}))
        self.assertEqual(self.backend.heard(), [])
        self.nothing_was_done()

    def test_nobody_can_tell_whether_a_client_is_there(self):
        heard = []
        for state in ("here", "nowhere", "away", "silent"):
            self.limit("acme/")
            if state != "here":
                self.endpoint.edge.here.clear()
            self.endpoint.registry.away = state == "away"
            if state == "silent":
                self.endpoint.registry.find = lambda client_id: Deferred()
            for method, params in list(ASKED.values())[:3]:
                self.backend.tell(call(1, method, {**params, "client": "beta/r"}))
            heard.append(self.backend.frames())
            self.nothing_was_done()
        self.assertEqual([len(frames) for frames in heard], [3] * 4)
        self.assertEqual(heard, [heard[0]] * 4)

    def test_ids_that_look_like_others(self):
        for client in ("acme", "Acme/r", "/acme/r", "beta/acme/r", "a", "acme.r", "beta/../acme/r"):
            for method in ("client.call", "client.notify"):
                self.assertEqual(self.refused(method, {"client": client, "method": "m"}, client), ONLY_ACME)
        for client in (
            "",
            "..",
            "acme/ ",
            "acme/\0",
            "acme%2Fr",
            "acme/\u00e9",
            ["acme/r"],
            {"acme/": 1},
            1,
            None,
            True,
        ):
            self.error(self.asked("client.call", {"client": client, "method": "m"}), -32602)
        # Ids that nobody can have are found with nobody, at once.
        self.assertTrue(all(each[0].startswith("acme/") for each in self.asked_at_once))
        self.assertEqual((self.hub.calls, self.hub.notifications), ([], []))

    def test_params_in_an_array(self):
        for method in ("client.call", "client.notify", "client.get"):
            for params in (["beta/r", "m"], [{"client": "beta/r"}], [["client", "beta/r"]]):
                self.error(self.asked(method, params), -32602)
        self.nothing_was_done()

    def test_a_client_given_twice(self):
        """The last one counts, for whom it is asked and for whether it may be."""
        for first, last in (("acme/r", "beta/r"), ("beta/r", "acme/r")):
            self.backend.tell(
                b'{"jsonrpc":"2.0","id":1,"method":"client.call","params":{"client":"%b","method":"m","client":"%b"}}'
                % (first.encode(), last.encode())
            )
        (refused,) = self.backend.heard()
        self.assertEqual(self.error(refused, -32008, "beta/r"), ONLY_ACME)
        self.assertEqual(self.hub.calls, [("acme/r", "m", None, None)])

    def test_ids_of_every_type(self):
        for id in (None, 1, 1.5, "", "acme/"):
            self.error(self.asked("client.call", {"client": "beta/r", "method": "m"}, id), -32008, "beta/r")
        for id in (True, [1], {"a": 1}):
            self.backend.tell(call(id, "client.call", {"client": "beta/r", "method": "m"}))
            self.assertEqual(self.backend.heard()[0]["error"]["code"], -32600)
        self.nothing_was_done()

    def test_a_batch_of_a_thousand(self):
        own, other = ({"client": client, "method": "m"} for client in ("acme/r", "beta/r"))
        self.hub.answers.extend([Reply(b"1", None)] * 250)
        some = [call(1, "client.call", own), call(2, "client.call", other), note("client.notify", other)]
        self.backend.tell([*some, note("client.notify", own)] * 250)
        (answers,) = self.backend.heard()
        codes = [each.get("error", {}).get("code") for each in answers]
        self.assertEqual(codes, [None, -32008] * 250)
        self.assertEqual({each[0] for each in (*self.hub.calls, *self.hub.notifications)}, {"acme/r"})
        self.assertEqual((len(self.hub.calls), len(self.hub.notifications)), (250, 250))

    def test_what_there_is_not(self):
        for method in ("client.close", "client.notify_prefix", "peer.close", "peer.drain", "gateway.token"):
            self.error(self.asked(method, {"client": "acme/r"}), -32601)

    @given(
        st.sampled_from(["client.call", "client.notify", "client.get"]),
        any_json | st.fixed_dictionaries({"client": st.text("acmebt/.\0", max_size=9), "method": st.just("m")}),
    )
    @settings(max_examples=300, deadline=None)
    def test_nothing_reaches_a_client_of_another(self, method, params):
        self.limit("acme/")
        self.backend.tell(call(1, method, params))
        touched = [each[0] for each in (*self.hub.calls, *self.hub.notifications, *self.asked_at_once)]
        touched += [each[1] for each in self.endpoint.registry.asked]
        self.assertTrue(all(client_id.startswith("acme/") for client_id in touched), touched)


class HearingTests(GrantTestCase):
    def happen(self, *clients):
        for client_id in clients:
            self.upstream.connected(client_id, 7)
            self.upstream.message(client_id, "m", None)
            self.upstream.disconnected(client_id, 7)

    def heard_of(self):
        return [each["params"]["client"] for each in self.backend.heard()]

    def test_events(self):
        self.asked("events.subscribe", {"kinds": ["connected", "disconnected", "message"]})
        self.happen("acme/r", "beta/r", "acme", "acme/s")
        self.assertEqual(self.heard_of(), ["acme/r"] * 3 + ["acme/s"] * 3)

    def test_calls(self):
        self.asked("upstream.serve")
        refused = self.upstream.call("beta/r", "m", None)
        error = self.failureResultOf(refused).value
        self.assertEqual((error.kind, error.client_id), (Kind.METHOD_NOT_FOUND, "beta/r"))
        answered = self.upstream.call("acme/r", "m", None)
        (asked,) = self.backend.heard()
        self.backend.tell({"jsonrpc": "2.0", "id": asked["id"], "result": 1})
        self.assertEqual(self.successResultOf(answered), Reply(b"1", None))

    def test_withdrawn(self):
        self.asked("events.subscribe", {"kinds": ["connected", "disconnected", "message"]})
        self.asked("upstream.serve")
        waiting = self.upstream.call("acme/r", "m", None)
        (asked,) = self.backend.heard()
        self.grant.withdraw()
        self.happen("acme/r", "beta/r")
        refused = self.upstream.call("acme/r", "m", None)
        self.assertEqual(self.failureResultOf(refused).value.kind, Kind.METHOD_NOT_FOUND)
        self.backend.tell({"jsonrpc": "2.0", "id": asked["id"], "result": 1})
        error = self.failureResultOf(waiting).value
        self.assertEqual((error.kind, error.client_id, error.sent), (Kind.CONNECTION_LOST, "acme/r", True))
        for method, params in (
            *ASKED.values(),
            ("client.call", {"client": 1}),
            ("events.subscribe", {"kinds": ["message"]}),
            ("no.method", None),
        ):
            self.assertEqual(self.refused(method, params, None), "this token was withdrawn")
        self.nothing_was_done()
        self.assertFalse(self.backend.transport.disconnecting)

    def test_back_again(self):
        self.asked("events.subscribe", {"kinds": ["connected"]})
        self.asked("upstream.serve")
        self.grant.withdraw()
        self.happen("acme/r", "beta/r")
        self.grant.limit("beta/", ["read", "call"])
        self.happen("acme/r", "beta/r")
        self.assertEqual(self.heard_of(), ["beta/r"])
        refused = self.upstream.call("beta/r", "m", None)
        self.assertEqual(self.failureResultOf(refused).value.kind, Kind.METHOD_NOT_FOUND)
        self.assertEqual(
            self.refused("client.call", {"client": "acme/r", "method": "m"}, "acme/r"),
            "this token is for clients whose id begins with beta/ alone",
        )

    def test_what_is_under_way_goes_on(self):
        self.backend.tell(call(1, *ASKED["call"]))
        self.grant.withdraw()
        self.hub.waiting[0].callback(Reply(b"2", None))
        self.assertEqual(self.backend.heard(), [{"jsonrpc": "2.0", "id": 1, "result": 2}])
