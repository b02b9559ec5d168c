"""Tests of gateway.auth.tickets."""

from __future__ import annotations

import re
from collections.abc import Container

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.auth.errors import REASONS, VerificationError
from gateway.auth.interface import TICKET_METHODS, AuthMethod, Identity
from gateway.auth.tickets import MAX_TICKET_LIFETIME, TICKET_LIFETIME, Tickets, derive_key
from gateway.settings import ConfigError
from tests.builders.tokens import NOW

SECRET = b"what only nodes of this fleet know"
ROBOT = Identity("acme/robot-7", NOW + 3600, method=AuthMethod.JWT)


class TicketsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.now = NOW
        self.issuer = self.make("issuer")
        self.tickets = self.make("target")

    def make(self, node_id: str, secret: bytes = SECRET, max_spent: int = 10_000) -> Tickets:
        return Tickets(node_id, lambda: secret, wall_clock=lambda: self.now, max_spent=max_spent)

    def issue(self, identity: Identity = ROBOT, node_id: str = "target", after: float = 0.0) -> str:
        return self.issuer.issue(identity, node_id, after)

    def redeem(
        self, ticket: str, client_id: str | None = ROBOT.client_id, methods: Container[AuthMethod] = TICKET_METHODS
    ) -> Identity:
        return self.tickets.redeem(ticket, client_id, methods)

    def assert_refused(
        self,
        reason: str,
        ticket: str,
        client_id: str | None = ROBOT.client_id,
        methods: Container[AuthMethod] = TICKET_METHODS,
    ) -> None:
        error = self.assertRaises(VerificationError, self.redeem, ticket, client_id, methods)
        self.assertEqual(error.reason, f"ticket_{reason}")
        self.assertIn(error.reason, REASONS)
        self.assertEqual(str(error), "the ticket in this URL is not accepted here")


class RedeemTests(TicketsTestCase):
    def test_identity_that_was_proved(self) -> None:
        for method in TICKET_METHODS:
            for expires_at in (0.0, NOW + 60):
                proved = Identity("acme/robot-7", expires_at, method=method)
                identity = self.redeem(self.issue(proved))
                self.assertEqual((identity, identity.method), (proved, method))

    def test_accepted_once(self) -> None:
        ticket = self.issue()
        self.redeem(ticket)
        self.assert_refused("spent", ticket)
        # Another ticket of the same client in the same second is another one.
        self.redeem(self.issue())

    def test_accepted_again_if_the_connection_did_not_open(self) -> None:
        ticket = self.issue()
        self.tickets.restore(self.redeem(ticket).ticket)
        self.redeem(ticket)
        self.assert_refused("spent", ticket)
        self.tickets.restore("")

    def test_another_client(self) -> None:
        ticket = self.issue()
        for client_id in ("acme/robot-8", "acme/robot-7 ", "acme/robot-7\ntarget"):
            self.assert_refused("signature", ticket, client_id)
        self.assert_refused("malformed", ticket, None)
        self.redeem(ticket)

    def test_another_node(self) -> None:
        ticket = self.issue()
        self.tickets = self.make("other")
        self.assert_refused("signature", ticket)

    def test_another_secret(self) -> None:
        ticket = self.issue()
        for secret in (b"another secret of another fleet", b""):
            self.tickets = self.make("target", secret)
            self.assert_refused("signature", ticket)

    def test_secret_that_cannot_be_read(self) -> None:
        def fail() -> bytes:
            raise ConfigError("cluster-secret-file", "it cannot be read")

        ticket = self.issue()
        self.tickets = Tickets("target", fail, wall_clock=lambda: self.now)
        self.assert_refused("signature", ticket)
        self.assertRaises(ConfigError, self.tickets.issue, ROBOT, "target")

    def test_secret_is_created_to_sign(self) -> None:
        issuer = Tickets("issuer", lambda: b"", signing_secret=lambda: SECRET, wall_clock=lambda: self.now)
        self.redeem(issuer.issue(ROBOT, "target"))

    def test_altered(self) -> None:
        ticket = self.issue()
        parts = ticket.split(".")
        for n, other in enumerate(("v2", "jwks", str(int(parts[2]) + 1), "0", "0" * 32, "0" * 64)):
            changed = ".".join([*parts[:n], other, *parts[n + 1 :]])
            self.assert_refused("malformed" if n == 0 else "signature", changed)
        for odd in ("", "v1", ticket[:-1], ticket + "0", ticket.upper(), ticket + ".", f" {ticket}", f"{ticket}\n"):
            self.assert_refused("malformed", odd)
        self.redeem(ticket)

    def test_method_that_the_node_does_not_accept(self) -> None:
        ticket = self.issue()
        self.assert_refused("method", ticket, methods={AuthMethod.JWKS, AuthMethod.TOKENS})
        self.assert_refused("method", ticket, methods=())
        self.redeem(ticket, methods={AuthMethod.JWT})

    def test_valid_for_some_time_after_the_client_was_asked_to_use_it(self) -> None:
        self.assertEqual(TICKET_LIFETIME, 30)
        for after in (0.0, 1.5):
            tickets = [self.issue(after=after), self.issue(after=after)]
            self.now += after + TICKET_LIFETIME - 0.5
            self.redeem(tickets[0])
            self.now += 1.5
            self.assert_refused("expired", tickets[1])

    def test_not_after_the_expiry_of_what_was_proved(self) -> None:
        tickets = [self.issue(Identity("acme/robot-7", NOW + 5, method=AuthMethod.JWT)) for _ in range(2)]
        self.now += 4.9
        self.redeem(tickets[0])
        self.now += 0.1
        self.assert_refused("expired", tickets[1])

    def test_no_expiry_rounds_to_never(self) -> None:
        ticket = self.issue(Identity("acme/robot-7", 0.4, method=AuthMethod.JWT))
        self.assert_refused("expired", ticket)

    def test_from_a_clock_that_is_far_ahead(self) -> None:
        self.now += MAX_TICKET_LIFETIME
        ticket = self.issue()
        self.now -= MAX_TICKET_LIFETIME
        self.assert_refused("early", ticket)

    def test_no_ticket_for_a_certificate_or_without_proof(self) -> None:
        self.assertEqual(TICKET_METHODS, {AuthMethod.TOKENS, AuthMethod.JWT, AuthMethod.JWKS})
        for method in (AuthMethod.MTLS, AuthMethod.NONE):
            self.assertRaises(AssertionError, self.issue, Identity("a", method=method))


class MemoryTests(TicketsTestCase):
    def test_the_token_is_needed_while_the_memory_is_full(self) -> None:
        self.tickets = self.make("target", max_spent=3)
        spent = [self.issue() for _ in range(3)]
        for ticket in spent:
            self.redeem(ticket)
        left = self.issue(after=10)
        self.assert_refused("full", left)
        for ticket in spent:
            self.assert_refused("spent", ticket)
        self.now += TICKET_LIFETIME + 1
        self.redeem(left)
        self.assertEqual(len(self.tickets._spent), 1)

    def test_a_ticket_that_is_forgotten_stays_spent_when_the_clock_is_set_back(self) -> None:
        ticket, unused = self.issue(), self.issue()
        self.redeem(ticket)
        self.now += TICKET_LIFETIME + 1
        self.redeem(self.issue())
        self.assertEqual(len(self.tickets._spent), 1)
        self.now = NOW
        self.assert_refused("expired", ticket)
        self.assert_refused("expired", unused)
        self.now += 1
        self.redeem(self.issue())


class SecrecyTests(TicketsTestCase):
    def test_not_in_reprs(self) -> None:
        ticket = self.issue()
        identity = self.redeem(ticket)
        self.assertEqual(identity.ticket, ticket)
        self.assertNotIn(ticket[:20], repr(identity))

    def test_key_is_that_of_hkdf(self) -> None:
        for secret in (SECRET, b"x" * 200):
            key = HKDF(SHA256(), 32, salt=None, info=b"wsgateway ticket v1").derive(secret)
            self.assertEqual(derive_key(secret), key)


class GeneratedTests(TicketsTestCase):
    @given(st.one_of(st.text(), st.from_regex(r"v1\.(jwt|tokens|jwks|mtls)\.[0-9]+\.[0-9]+\.[0-9a-f]+\.[0-9a-f]+")))
    @example("v1.jwt.1800000030.0." + "0" * 32 + "." + "0" * 64)
    @example("v1.jwt.1800000030.0." + "\u0660" * 32 + "." + "0" * 64)
    def test_anything_else_is_refused(self, text: str) -> None:
        error = self.assertRaises(VerificationError, self.redeem, text)
        self.assertIn(error.reason, ("ticket_malformed", "ticket_signature"))
        self.assertEqual(len(self.tickets._spent), 0)

    @given(st.data())
    def test_no_character_can_be_changed(self, data: st.DataObject) -> None:
        ticket = self.issue()
        at = data.draw(st.integers(0, len(ticket) - 1))
        other = data.draw(st.characters().filter(lambda c: c != ticket[at]))
        self.assertRaises(VerificationError, self.redeem, ticket[:at] + other + ticket[at + 1 :])
        self.redeem(ticket)

    @given(
        st.from_regex(re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}", re.ASCII), fullmatch=True),
        st.sampled_from(sorted(TICKET_METHODS)),
        st.one_of(st.just(0.0), st.floats(NOW + 1, 253402300799.0)),
        st.floats(0, 60),
    )
    def test_round_trip(self, client_id: str, method: AuthMethod, expires_at: float, after: float) -> None:
        ticket = self.issue(Identity(client_id, expires_at, method=method), after=after)
        # Nothing in it needs an escape in a query.
        self.assertRegex(ticket, r"\A[0-9a-z.]+\Z")
        identity = self.redeem(ticket, client_id)
        self.assertEqual((identity.client_id, identity.method), (client_id, method))
        self.assertTrue(expires_at <= identity.expires_at < expires_at + 1)
