"""Drain the node before AWS terminates its instance, by a lifecycle hook of the autoscaling group.

    every 5 s   -> GET autoscaling/target-lifecycle-state       <- InService … Terminated: drain
    from then   -> RecordLifecycleActionHeartbeat               at once, then every third of the hook's timeout
    drained, and no clients on other nodes of this instance
                -> CompleteLifecycleAction CONTINUE             AWS terminates the instance

The group needs a lifecycle hook for ``autoscaling:EC2_INSTANCE_TERMINATING``, or AWS does not wait. A node that drains
for another reason completes the action only if AWS is terminating the instance as well.

``Terminated`` is the target state of an instance that leaves the group, ``Warmed:Terminated`` of one that leaves its
warm pool: it may have been running, with clients, and the same hook applies. The other ``Warmed:`` states are ignored:
an instance that is being launched into a warm pool has them too, and one that is hibernated or kept running comes back
without a restart of this program. If the instance is stopped, the program receives SIGTERM.

While AWS is unreachable, requests are retried with backoff for as long as the node drains, and for 30 s after that.
Otherwise the hook's own timeout ends the wait.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import attrs
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, succeed
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.cloud.errors import AwsError, FailureLog
from gateway.cloud.imds import Imds
from gateway.util.backoff import Backoff
from gateway.util.log import one_line

T = TypeVar("T")

#: seconds between two requests for the target lifecycle state
POLL_INTERVAL = 5.0
#: target lifecycle states of an instance that is terminated
TERMINATING_STATES = frozenset({"Terminated", "Warmed:Terminated"})
#: the lifecycle transition of the hook
TRANSITION = "autoscaling:EC2_INSTANCE_TERMINATING"
#: seconds; assumed for a hook that AWS does not describe
DEFAULT_HEARTBEAT_TIMEOUT = 60.0
DEFAULT_GLOBAL_TIMEOUT = 6000.0
#: seconds; the backoff after a failure doubles from the first to the second
INITIAL_BACKOFF = 1.0
MAX_BACKOFF = 30.0
#: seconds for finding the hook, and again for completing the action
COMPLETION_TIMEOUT = 30.0
#: seconds between two checks of the other nodes of this instance
COLOCATED_POLL_INTERVAL = 1.0


class LifecycleState(enum.Enum):
    """State of this instance, as far as this node knows.

    IN_SERVICE -> TERMINATING -> COMPLETING    AWS terminates the instance, then the node has drained
    IN_SERVICE -> DRAINED [-> COMPLETING]      the node has drained for another reason [AWS terminates the instance too]
    """

    IN_SERVICE = enum.auto()
    TERMINATING = enum.auto()
    DRAINED = enum.auto()
    COMPLETING = enum.auto()


@attrs.frozen
class LifecycleHook:
    """A lifecycle hook; times are in seconds."""

    name: str
    #: how long AWS waits after the last heartbeat
    heartbeat_timeout: float = DEFAULT_HEARTBEAT_TIMEOUT
    #: how long AWS waits in total
    global_timeout: float = DEFAULT_GLOBAL_TIMEOUT


def parse_hooks(response: Mapping[str, Any]) -> list[LifecycleHook]:
    """Return the hooks for terminating instances in a response to DescribeLifecycleHooks."""
    return [
        LifecycleHook(
            hook["LifecycleHookName"],
            _seconds(hook.get("HeartbeatTimeout"), DEFAULT_HEARTBEAT_TIMEOUT),
            _seconds(hook.get("GlobalTimeout"), DEFAULT_GLOBAL_TIMEOUT),
        )
        for hook in response.get("LifecycleHooks", ())
        if hook.get("LifecycleTransition") == TRANSITION and hook.get("LifecycleHookName")
    ]


def _seconds(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int) and value > 0 else default


class Lifecycle:
    """Watch for the termination of this instance, delay it while the node drains, and complete it.

    ``request`` is that of :class:`~gateway.cloud.aws.AWSClient`. ``hook`` is the name of the hook; if empty, the group
    must have exactly one. ``drain`` is called at most once, when AWS terminates the instance. ``colocated_clients()``
    returns the number of clients on other live nodes of this instance; a node that has not begun to drain must count as
    at least one. ``failures`` counts failures by request.
    """

    _log = Logger()

    def __init__(
        self,
        request: Callable[..., Deferred[dict[str, Any]]],
        imds: Imds,
        clock: Any,
        *,
        group: str,
        hook: str,
        drain: Callable[[], object],
        colocated_clients: Callable[[], int],
        failures: Counter[str],
    ) -> None:
        self._request = request
        self._imds = imds
        self._clock = clock
        self._group = group
        self._hook_name = hook
        self._drain = drain
        self._colocated_clients = colocated_clients
        self._state_failures = FailureLog("the lifecycle state of the instance is unknown", "metadata", failures)
        self._hook_failures = FailureLog(
            "the lifecycle hook of the group is unknown", "DescribeLifecycleHooks", failures
        )
        self._heartbeat_failures = FailureLog(
            "the lifecycle heartbeat cannot be sent", "RecordLifecycleActionHeartbeat", failures
        )
        self._completion_failures = FailureLog(
            "the lifecycle action cannot be completed", "CompleteLifecycleAction", failures
        )
        #: ``None`` until a usable hook has been found
        self._hook: LifecycleHook | None = None
        self._last_hook_problem = ""
        self._cached_instance_id = ""
        self._state = LifecycleState.IN_SERVICE
        self._skip_colocated = False
        self._heartbeats: Deferred[None] = succeed(None)
        #: work in the background
        self._tasks: set[Deferred[None]] = set()
        self._poll_loop = LoopingCall(lambda: self._start_task(self._poll()))
        self._poll_loop.clock = clock

    def start(self) -> None:
        """Check the hook and the instance, and poll the lifecycle state from now on."""
        self._start_task(self._check_prerequisites())
        self._poll_loop.start(POLL_INTERVAL)

    def complete_drain(self) -> Deferred[None]:
        """Complete the termination of the instance, if AWS is terminating it.

        Call this when the node has no clients left, before the process exits. Fires when the process may exit; never
        fails. Takes at most 70 s, plus the time during which other nodes of this instance have clients, which is bound
        by the hook's global timeout.
        """
        if self._state in (LifecycleState.DRAINED, LifecycleState.COMPLETING):
            return succeed(None)
        self._state = LifecycleState.COMPLETING if self._is_terminating else LifecycleState.DRAINED
        return self._start_task(self._finish())

    def skip_colocated_nodes(self) -> None:
        """Do not wait for other nodes of this instance: if they have clients, they complete the action."""
        self._skip_colocated = True

    def stop(self) -> None:
        """Cancel all work in the background."""
        if self._poll_loop.running:
            self._poll_loop.stop()
        for running in list(self._tasks):
            running.cancel()

    def _start_task(self, work: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
        """Run work in the background. The Deferred never fails, and is cancelled by :meth:`stop`."""
        running = Deferred.fromCoroutine(work)
        self._tasks.add(running)

        def finished(failure: Failure | None) -> None:
            self._tasks.discard(running)
            if failure is not None and not failure.check(CancelledError):
                self._log.failure("error in the lifecycle of the instance", failure)

        return running.addBoth(finished)

    # In service.

    @property
    def _is_terminating(self) -> bool:
        return self._state in (LifecycleState.TERMINATING, LifecycleState.COMPLETING)

    async def _check_prerequisites(self) -> None:
        """Request at the start what is needed at the end, so that a misconfiguration is logged early."""
        await self._try_once(self._hook_failures, self._find_hook)
        await self._try_once(self._state_failures, self._get_instance_id)

    async def _poll(self) -> None:
        state = await self._try_once(self._state_failures, self._imds.target_lifecycle_state)
        if state in TERMINATING_STATES and not self._is_terminating:
            was_drained = self._state is LifecycleState.DRAINED
            self._state = LifecycleState.COMPLETING if was_drained else LifecycleState.TERMINATING
            self._log.info("AWS terminates this instance (target lifecycle state {state}): draining", state=state)
            self._heartbeats = self._start_task(self._send_heartbeats())
            if not was_drained:
                self._drain()

    async def _get_instance_id(self) -> str:
        if not self._cached_instance_id:
            self._cached_instance_id = await self._imds.instance_id()
        return self._cached_instance_id

    # While the node drains.

    async def _send_heartbeats(self) -> None:
        """Send heartbeats until cancelled; return if there is no usable hook."""
        hook = await self._retry(self._hook_failures, self._find_hook)
        while hook is not None:
            await self._retry(self._heartbeat_failures, lambda: self._send_heartbeat(hook))
            await deferLater(self._clock, hook.heartbeat_timeout / 3)

    async def _find_hook(self) -> LifecycleHook | None:
        """Return the hook, or ``None`` if there is no usable one. Raises :class:`AwsError`."""
        if self._hook is not None:
            return self._hook
        parameters: dict[str, Any] = {"AutoScalingGroupName": self._group}
        if self._hook_name:
            parameters["LifecycleHookNames"] = [self._hook_name]
        try:
            response = await self._request("autoscaling", "describe_lifecycle_hooks", **parameters)
        except AwsError as e:
            if not self._is_terminating or not self._hook_name:
                raise
            # The name is enough to send heartbeats and to complete the action.
            self._hook_failures.record_failure(e)
            return LifecycleHook(self._hook_name)
        hooks = parse_hooks(response)
        if len(hooks) == 1:
            self._hook = hooks[0]
        elif hooks:
            names = ", ".join(sorted(one_line(hook.name) for hook in hooks))
            self._warn_about_hook(f"has more than one lifecycle hook for {TRANSITION}: select one by hook=… ({names})")
        else:
            named = f" named {self._hook_name}" if self._hook_name else ""
            self._warn_about_hook(
                f"has no lifecycle hook{named} for {TRANSITION}: AWS terminates instances before they are drained"
            )
        return self._hook

    def _warn_about_hook(self, problem: str) -> None:
        if problem != self._last_hook_problem:
            self._last_hook_problem = problem
            self._log.warn("--autoscaling: the group {group} {problem}", group=self._group, problem=problem)

    async def _send_heartbeat(self, hook: LifecycleHook) -> None:
        await self._request("autoscaling", "record_lifecycle_action_heartbeat", **await self._action_parameters(hook))

    async def _action_parameters(self, hook: LifecycleHook) -> dict[str, str]:
        return {
            "LifecycleHookName": hook.name,
            "AutoScalingGroupName": self._group,
            "InstanceId": await self._get_instance_id(),
        }

    # Drained.

    async def _finish(self) -> None:
        if not self._is_terminating:
            # The SIGTERM of the instance's shutdown may have come before the next poll.
            await self._poll()
        if self._poll_loop.running:
            self._poll_loop.stop()
        if not self._is_terminating:
            return
        try:
            await self._complete()
        except TimeoutError:
            self._log.error(
                "the lifecycle action is not completed: AWS terminates the instance when the hook times out"
            )

    async def _complete(self) -> None:
        hook_found = Deferred.fromCoroutine(self._retry(self._hook_failures, self._find_hook))
        hook = await hook_found.addTimeout(COMPLETION_TIMEOUT, self._clock)
        if hook is None:
            return
        may_complete = await self._wait_for_colocated_nodes(hook)
        self._heartbeats.cancel()
        if not may_complete:
            self._log.info("stopping; other nodes of this instance have clients and complete the lifecycle action")
            return
        completed = Deferred.fromCoroutine(self._retry(self._completion_failures, lambda: self._complete_action(hook)))
        await completed.addTimeout(COMPLETION_TIMEOUT, self._clock)

    async def _wait_for_colocated_nodes(self, hook: LifecycleHook) -> bool:
        """Wait until the other nodes of this instance have no clients, at most the hook's global timeout.

        Returns ``False`` if they have some, after :meth:`skip_colocated_nodes`.
        """
        for attempt in range(int(hook.global_timeout / COLOCATED_POLL_INTERVAL)):
            clients = self._colocated_clients()
            if clients <= 0:
                return True
            if self._skip_colocated:
                return False
            if not attempt:
                self._log.info(
                    "drained; waiting for {clients} clients of other nodes of this instance", clients=clients
                )
            await deferLater(self._clock, COLOCATED_POLL_INTERVAL)
        return True

    async def _complete_action(self, hook: LifecycleHook) -> None:
        action = await self._action_parameters(hook)
        try:
            await self._request("autoscaling", "complete_lifecycle_action", LifecycleActionResult="CONTINUE", **action)
        except AwsError as e:
            # Another node of this instance completed it, or the hook timed out.
            if "no active lifecycle action" not in str(e).lower():
                raise
            self._log.info("the lifecycle action of this instance is no longer active")
        else:
            self._log.info("lifecycle action completed: AWS terminates this instance")

    # Requests.

    async def _try_once(self, failure_log: FailureLog, work: Callable[[], Awaitable[T]]) -> T | None:
        """Return the result, or ``None`` on :class:`AwsError`."""
        try:
            result = await work()
        except AwsError as e:
            failure_log.record_failure(e)
            return None
        failure_log.record_success()
        return result

    async def _retry(self, failure_log: FailureLog, work: Callable[[], Awaitable[T]]) -> T:
        """Retry with backoff on :class:`AwsError`, until the work succeeds."""
        backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        while True:
            try:
                result = await work()
            except AwsError as e:
                failure_log.record_failure(e)
            else:
                failure_log.record_success()
                return result
            await deferLater(self._clock, backoff.next_delay())
