"""Tests of gateway.cloud.lifecycle."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud.errors import AwsError
from gateway.cloud.lifecycle import COMPLETION_TIMEOUT, POLL_INTERVAL, Lifecycle, LifecycleHook, parse_hooks
from tests.fakes.aws import ACTION, HOOK, NO_ACTION, StubbedAws

DESCRIBE, HEARTBEAT, COMPLETE = (
    "describe_lifecycle_hooks",
    "record_lifecycle_action_heartbeat",
    "complete_lifecycle_action",
)


class FakeImds:
    """The two items that the lifecycle reads; all requests fail during an outage."""

    def __init__(self) -> None:
        self.state: str | None = "InService"
        self.away = False
        self.polls = 0

    def _answer(self, value: Any) -> Deferred[Any]:
        return fail(AwsError("it is away", kind="away")) if self.away else succeed(value)

    def target_lifecycle_state(self) -> Deferred[str | None]:
        self.polls += 1
        return self._answer(self.state)

    def instance_id(self) -> Deferred[str]:
        return self._answer(ACTION["InstanceId"])


class LifecycleTestCase(SynchronousTestCase):
    hook = ""

    def setUp(self) -> None:
        self.clock = Clock()
        self.imds = FakeImds()
        self.stubbed = StubbedAws(self.clock)
        self.addCleanup(self.stubbed.close)
        self.failures: Counter[str] = Counter()
        self.drains = 0
        self.colocated_clients = 0
        self.lifecycle = Lifecycle(
            self.stubbed.request,
            self.imds,  # type: ignore[arg-type]
            self.clock,
            group="gw",
            hook=self.hook,
            drain=self.drain,
            colocated_clients=lambda: self.colocated_clients,
            failures=self.failures,
        )

    def drain(self) -> None:
        self.drains += 1

    def tearDown(self) -> None:
        self.lifecycle.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.stubbed.assert_no_pending_requests()

    def start(self, *hooks: dict[str, Any]) -> None:
        self.stubbed.expect_describe_hooks(*(hooks or (HOOK,)), name=self.hook)
        self.lifecycle.start()
        self.stubbed.assert_no_pending_requests()

    def end_instance(self, state: str = "Terminated") -> None:
        """Set the target lifecycle state and poll; the first heartbeat follows at once."""
        self.imds.state = state
        self.stubbed.expect_heartbeat()
        self.clock.advance(POLL_INTERVAL)
        self.stubbed.assert_no_pending_requests()


class TerminationTests(LifecycleTestCase):
    def test_drain_heartbeats_and_complete(self) -> None:
        self.start()
        self.clock.pump([POLL_INTERVAL] * 3)
        self.assertEqual((self.drains, self.imds.polls), (0, 4))
        self.end_instance()
        self.assertEqual(self.drains, 1)
        # The hook waits for 90 s.
        self.clock.advance(29)
        self.stubbed.expect_heartbeat()
        self.clock.advance(1)
        self.stubbed.assert_no_pending_requests()
        self.stubbed.expect_heartbeat()
        self.clock.advance(30)
        self.stubbed.assert_no_pending_requests()
        self.stubbed.expect_completion()
        self.assertIsNone(self.successResultOf(self.lifecycle.complete_drain()))
        self.clock.pump([30] * 4)
        self.assertEqual((self.drains, self.failures), (1, {}))

    def test_termination_in_a_warm_pool(self) -> None:
        self.start()
        self.end_instance("Warmed:Terminated")
        self.assertEqual(self.drains, 1)

    def test_other_states_are_ignored(self) -> None:
        self.start()
        for state in ("Standby", "Detached", "Warmed:Stopped", "Warmed:Running", "Warmed:Hibernated", None):
            self.imds.state = state
            self.clock.advance(POLL_INTERVAL)
        self.assertEqual(self.drains, 0)

    def test_drain_for_another_reason_completes_nothing(self) -> None:
        self.start()
        self.successResultOf(self.lifecycle.complete_drain())
        self.imds.state = "Terminated"
        self.clock.pump([POLL_INTERVAL] * 3)
        self.assertEqual(self.drains, 0)

    def test_sigterm_before_the_next_poll(self) -> None:
        self.start()
        self.imds.state = "Terminated"
        self.stubbed.expect_heartbeat()
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())
        self.assertEqual(self.drains, 0)

    def test_termination_during_drain_for_another_reason(self) -> None:
        self.start()
        self.drains = 1
        self.end_instance()
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_complete_drain_twice(self) -> None:
        self.start()
        self.end_instance()
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())
        self.successResultOf(self.lifecycle.complete_drain())

    def test_complete_drain_before_start(self) -> None:
        self.successResultOf(self.lifecycle.complete_drain())

    def test_stop_cancels_everything(self) -> None:
        self.start()
        self.end_instance()
        self.colocated_clients = 1
        drained = self.lifecycle.complete_drain()
        self.assertNoResult(drained)
        self.lifecycle.stop()
        self.assertIsNone(self.successResultOf(drained))

    def test_unexpected_error_does_not_block_the_exit(self) -> None:
        self.start()
        self.end_instance()
        self.colocated_clients = None  # type: ignore[assignment]
        self.assertIsNone(self.successResultOf(self.lifecycle.complete_drain()))
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)


class ColocatedNodesTests(LifecycleTestCase):
    def test_completion_waits_for_colocated_nodes(self) -> None:
        self.start()
        self.end_instance()
        self.colocated_clients = 7
        drained = self.lifecycle.complete_drain()
        self.clock.pump([1] * 25)
        self.colocated_clients = 1
        self.stubbed.expect_heartbeat()
        self.clock.pump([1] * 5)
        self.stubbed.assert_no_pending_requests()
        self.assertNoResult(drained)
        self.colocated_clients = 0
        self.stubbed.expect_completion()
        self.clock.advance(1)
        self.successResultOf(drained)

    def test_skip_colocated_nodes_leaves_completion_to_them(self) -> None:
        """The other nodes of the instance complete the action."""
        self.start()
        self.end_instance()
        self.colocated_clients = 7
        drained = self.lifecycle.complete_drain()
        self.clock.pump([1] * 5)
        self.assertNoResult(drained)
        self.lifecycle.skip_colocated_nodes()
        self.clock.advance(1)
        self.successResultOf(drained)
        self.stubbed.assert_no_pending_requests()

    def test_skip_colocated_nodes_without_clients_completes(self) -> None:
        self.start()
        self.end_instance()
        self.lifecycle.skip_colocated_nodes()
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_wait_is_bounded_by_the_global_timeout(self) -> None:
        self.start({**HOOK, "HeartbeatTimeout": 30, "GlobalTimeout": 60})
        self.end_instance()
        self.colocated_clients = 7
        for _ in range(6):
            self.stubbed.expect_heartbeat()
        drained = self.lifecycle.complete_drain()
        self.clock.pump([1] * 59)
        self.assertNoResult(drained)
        self.stubbed.expect_error(COMPLETE, *NO_ACTION)
        self.clock.advance(1)
        self.successResultOf(drained)
        self.assertEqual(self.failures, {})

    def test_action_completed_by_another_node(self) -> None:
        self.start()
        self.end_instance()
        self.stubbed.expect_error(COMPLETE, *NO_ACTION)
        with capturedLogs() as logs:
            self.successResultOf(self.lifecycle.complete_drain())
        self.assertEqual(self.failures, {})
        self.assertEqual(len(logs), 1)


class FailureTests(LifecycleTestCase):
    def test_metadata_outage(self) -> None:
        self.imds.away = True
        with capturedLogs() as logs:
            self.start()
            self.clock.pump([POLL_INTERVAL] * 10)
            self.imds.away = False
            self.clock.advance(POLL_INTERVAL)
        self.assertEqual([event.get("problem") for event in logs], ["it is away", None])
        self.assertEqual(self.failures, {"metadata": 12})
        self.end_instance()
        self.assertEqual(self.drains, 1)

    def test_drain_without_metadata(self) -> None:
        self.imds.away = True
        self.start()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_heartbeats_are_retried(self) -> None:
        self.start()
        self.stubbed.expect_error(HEARTBEAT, times=4)
        self.imds.state = "Terminated"
        with capturedLogs() as logs:
            # 0, 1, 3 and 7 s after the poll.
            self.clock.pump([POLL_INTERVAL] + [1] * 14)
            self.stubbed.assert_no_pending_requests()
            self.stubbed.expect_heartbeat()
            self.clock.advance(1)
            self.stubbed.assert_no_pending_requests()
        self.assertEqual(self.failures, {"RecordLifecycleActionHeartbeat": 4})
        self.assertEqual(len([event for event in logs if "AccessDenied" in event.get("problem", "")]), 1)
        self.assertIn("works again", logs[-1]["log_format"])
        # Then at the regular interval.
        self.clock.advance(29)
        self.stubbed.expect_heartbeat()
        self.clock.advance(1)

    def test_completion_is_retried(self) -> None:
        self.start()
        self.end_instance()
        self.stubbed.expect_error(COMPLETE, "ResourceContention", "busy", times=2)
        drained = self.lifecycle.complete_drain()
        self.stubbed.expect_completion()
        self.clock.pump([1] * 3)
        self.successResultOf(drained)
        self.assertEqual(self.failures, {"CompleteLifecycleAction": 2})

    def test_completion_is_given_up_after_timeout(self) -> None:
        self.start()
        self.end_instance()
        # 0, 1, 3, 7 and 15 s after the drain.
        self.stubbed.expect_error(COMPLETE, times=5)
        drained = self.lifecycle.complete_drain()
        self.clock.pump([1] * (int(COMPLETION_TIMEOUT) - 1))
        self.assertNoResult(drained)
        with capturedLogs() as logs:
            self.clock.advance(1)
        self.successResultOf(drained)
        self.assertIn("when the hook times out", logs[0]["log_format"])

    def test_request_without_response(self) -> None:
        self.start()
        self.end_instance()
        self.stubbed.hold()
        drained = self.lifecycle.complete_drain()
        self.clock.advance(COMPLETION_TIMEOUT)
        self.successResultOf(drained)
        self.stubbed.expect_completion()
        self.stubbed.release()


class HookTests(LifecycleTestCase):
    def test_group_without_hook(self) -> None:
        launching = {**HOOK, "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING"}
        with capturedLogs() as logs:
            self.start(launching)
            self.stubbed.expect_describe_hooks(launching)
            self.imds.state = "Terminated"
            self.clock.advance(POLL_INTERVAL)
            self.assertEqual(self.drains, 1)
            self.stubbed.expect_describe_hooks(launching)
            self.successResultOf(self.lifecycle.complete_drain())
        warnings = [event for event in logs if "before they are drained" in event.get("problem", "")]
        self.assertEqual(len(warnings), 1)

    def test_hook_created_later(self) -> None:
        self.stubbed.expect_describe_hooks()
        self.lifecycle.start()
        self.stubbed.expect_describe_hooks(HOOK)
        self.end_instance()
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_several_hooks(self) -> None:
        with capturedLogs() as logs:
            self.start(HOOK, {**HOOK, "LifecycleHookName": "another"})
        self.assertIn("(another, empty-it)", logs[0]["problem"])

    def test_find_hook_is_retried(self) -> None:
        self.stubbed.expect_error(DESCRIBE, times=3)
        self.lifecycle.start()
        self.imds.state = "Terminated"
        self.clock.pump([POLL_INTERVAL, 1])
        self.assertEqual(self.drains, 1)
        self.stubbed.expect_describe_hooks(HOOK)
        self.stubbed.expect_heartbeat()
        self.clock.pump([1, 1])
        self.assertEqual(self.failures, {"DescribeLifecycleHooks": 3})
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_find_hook_is_given_up_after_timeout(self) -> None:
        # At the start; then twice, by the heartbeats and by the completion, after 0, 1, 3, 7 and 15 s.
        self.stubbed.expect_error(DESCRIBE, times=11)
        self.lifecycle.start()
        self.imds.state = "Terminated"
        self.clock.advance(POLL_INTERVAL)
        drained = self.lifecycle.complete_drain()
        self.clock.pump([1] * 29)
        self.assertNoResult(drained)
        self.clock.advance(1)
        self.successResultOf(drained)


class NamedHookTests(LifecycleTestCase):
    hook = "empty-it"

    def test_request_by_name(self) -> None:
        self.start()
        self.end_instance()

    def test_undescribed_hook_is_used_by_name(self) -> None:
        self.stubbed.expect_error(DESCRIBE, times=2)
        self.lifecycle.start()
        self.end_instance()
        self.stubbed.expect_heartbeat()
        self.clock.advance(20)
        self.stubbed.assert_no_pending_requests()
        self.stubbed.expect_error(DESCRIBE)
        self.stubbed.expect_completion()
        self.successResultOf(self.lifecycle.complete_drain())

    def test_unknown_hook_name(self) -> None:
        self.stubbed.expect_describe_hooks(name="empty-it")
        with capturedLogs() as logs:
            self.lifecycle.start()
        self.assertIn("has no lifecycle hook named empty-it for", logs[0]["problem"])


class ReadingTests(SynchronousTestCase):
    def test_parse_hooks(self) -> None:
        self.assertEqual(parse_hooks({"LifecycleHooks": [HOOK]}), [LifecycleHook("empty-it", 90.0, 9000.0)])
        self.assertEqual(parse_hooks({}), [])

    @given(
        st.dictionaries(
            st.sampled_from(["LifecycleHookName", "LifecycleTransition"]),
            st.sampled_from(["", "x", HOOK["LifecycleTransition"]]),
        ),
        st.dictionaries(st.sampled_from(["HeartbeatTimeout", "GlobalTimeout"]), st.none() | st.integers()),
    )
    def test_any_missing_member(self, texts: dict[str, str], times: dict[str, int | None]) -> None:
        hooks = parse_hooks({"LifecycleHooks": [{**texts, **times}]})
        ours = texts.get("LifecycleTransition") == HOOK["LifecycleTransition"] and texts.get("LifecycleHookName")
        self.assertEqual([hook.name for hook in hooks], [ours] if ours else [])
        self.assertTrue(all(hook.heartbeat_timeout > 0 and hook.global_timeout > 0 for hook in hooks))
