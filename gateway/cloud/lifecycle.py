"""The end of an instance of an autoscaling group: it is emptied first, and AWS waits for that.

    every 5 s   -> GET autoscaling/target-lifecycle-state       <- InService … Terminated: drain
    from then   -> RecordLifecycleActionHeartbeat               at once, and at every third of the hook's time-out
    drained,
    and no client is left on other nodes of this instance
                -> CompleteLifecycleAction CONTINUE             AWS ends the instance

The group has to have a lifecycle hook for ``autoscaling:EC2_INSTANCE_TERMINATING``, or AWS does not wait. A node that
drains for another reason completes nothing, unless AWS turns out to want the instance's end.

``Terminated`` is where an instance goes that leaves the group, ``Warmed:Terminated`` one that leaves its warm pool:
that may have been running, with clients, and the same hook holds it. The other ``Warmed:`` states are left alone: an
instance that is being launched into a warm pool has them, too, and one that is hibernated, or kept running, comes back
without a new start of this program. If it is stopped, SIGTERM is what tells.

When AWS cannot be reached, it is asked again, less and less often, while the node drains, and for half a minute then.
The hook's own time-out ends the wait if nothing else does.
"""

from __future__ import annotations

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
from gateway.util.log import one_line

T = TypeVar("T")

#: seconds between two looks at the target lifecycle state
POLL_INTERVAL = 5.0
#: the target lifecycle states of an instance that ends
TERMINATING_STATES = frozenset({"Terminated", "Warmed:Terminated"})
#: the lifecycle transition before which AWS waits
TRANSITION = "autoscaling:EC2_INSTANCE_TERMINATING"
#: seconds that a hook is taken to wait which AWS does not describe: after the last heartbeat, and in all
DEFAULT_HEARTBEAT_TIMEOUT, DEFAULT_GLOBAL_TIMEOUT = 60.0, 6000.0
#: seconds: the first pause after a failure, and the longest; each is twice the one before
INITIAL_BACKOFF, MAX_BACKOFF = 1.0, 30.0
#: seconds that it is tried to complete the action
COMPLETION_TIMEOUT = 30.0
#: seconds between two looks at the other nodes of this instance
COLOCATED_POLL_INTERVAL = 1.0


@attrs.frozen
class LifecycleHook:
    """A lifecycle hook; its times are in seconds."""

    name: str
    #: AWS waits so long after the last heartbeat
    heartbeat_timeout: float = DEFAULT_HEARTBEAT_TIMEOUT
    #: AWS waits no longer than this in all
    global_timeout: float = DEFAULT_GLOBAL_TIMEOUT


def parse_hooks(answer: Mapping[str, Any]) -> list[LifecycleHook]:
    """The hooks for ending instances, in what DescribeLifecycleHooks answered."""
    return [
        LifecycleHook(
            hook["LifecycleHookName"],
            _seconds(hook.get("HeartbeatTimeout"), DEFAULT_HEARTBEAT_TIMEOUT),
            _seconds(hook.get("GlobalTimeout"), DEFAULT_GLOBAL_TIMEOUT),
        )
        for hook in answer.get("LifecycleHooks", ())
        if hook.get("LifecycleTransition") == TRANSITION and hook.get("LifecycleHookName")
    ]


def _seconds(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int) and value > 0 else default


class Lifecycle:
    """Watches over the end of this instance.

    ``ask`` is that of :class:`~gateway.cloud.aws.Aws`. ``hook`` is the name of the hook, or empty: then it is the only
    one that the group has. ``drain`` is called once when AWS wants the instance to end. ``neighbours`` gives how many
    clients are still on other live nodes of this instance, where a node that has not begun to drain counts for more
    than none. ``failures`` counts what fails, by request.
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
        self._state_failures = FailureLog("the instance's lifecycle state is not known", "metadata", failures)
        self._hook_failures = FailureLog("the group's lifecycle hook is not known", "DescribeLifecycleHooks", failures)
        self._heartbeat_failures = FailureLog("AWS is not told to wait", "RecordLifecycleActionHeartbeat", failures)
        self._completion_failures = FailureLog(
            "AWS is not told that the instance is empty", "CompleteLifecycleAction", failures
        )
        #: ``None`` as long as it is not known whether there is one, or there is none
        self._hook: LifecycleHook | None = None
        self._last_hook_problem = ""
        self._cached_instance_id = ""
        self._is_terminating = self._is_drained = self._skip_colocated = False
        self._heartbeats: Deferred[None] = succeed(None)
        #: what goes on beside
        self._tasks: set[Deferred[None]] = set()
        self._poll_loop = LoopingCall(lambda: self._start_task(self._poll()))
        self._poll_loop.clock = clock

    def start(self) -> None:
        """Watch, from now on."""
        self._start_task(self._check_prerequisites())
        self._poll_loop.start(POLL_INTERVAL)

    def complete_drain(self) -> Deferred[None]:
        """To be called when no client is left here, before the process ends; fires when it may end. Does not fail.

        It takes no more than 70 s, and those for which other nodes of this instance have clients; for these it waits no
        longer than AWS does."""
        if self._is_drained:
            return succeed(None)
        self._is_drained = True
        return self._start_task(self._finish())

    def skip_colocated_nodes(self) -> None:
        """Do not wait for other nodes of this instance: if they have clients, it is for them to tell AWS."""
        self._skip_colocated = True

    def stop(self) -> None:
        """Leave off whatever is under way."""
        if self._poll_loop.running:
            self._poll_loop.stop()
        for running in list(self._tasks):
            running.cancel()

    def _start_task(self, work: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
        """Have work done beside; the Deferred does not fail, and is cancelled by the stop."""
        running = Deferred.fromCoroutine(work)
        self._tasks.add(running)

        def over(failure: Failure | None) -> None:
            self._tasks.discard(running)
            if failure is not None and not failure.check(CancelledError):
                self._log.failure("error in the instance's lifecycle", failure)

        return running.addBoth(over)

    # Before the end.

    async def _check_prerequisites(self) -> None:
        """Find out at the start what will be needed, so that who has forgotten something hears of it then."""
        await self._try_once(self._hook_failures, self._find_hook)
        await self._try_once(self._state_failures, self._get_instance_id)

    async def _poll(self) -> None:
        state = await self._try_once(self._state_failures, self._imds.target_lifecycle_state)
        if state in TERMINATING_STATES and not self._is_terminating:
            self._is_terminating = True
            self._log.info("AWS ends this instance (its target lifecycle state is {state}): draining", state=state)
            self._heartbeats = self._start_task(self._keep_waiting())
            if not self._is_drained:
                self._drain()

    async def _get_instance_id(self) -> str:
        if not self._cached_instance_id:
            self._cached_instance_id = await self._imds.instance_id()
        return self._cached_instance_id

    # While the node drains.

    async def _keep_waiting(self) -> None:
        """Have AWS wait. Ends only by being cancelled, or without a hook."""
        hook = await self._retry(self._hook_failures, self._find_hook)
        while hook is not None:
            await self._retry(self._heartbeat_failures, lambda: self._send_heartbeat(hook))
            await deferLater(self._clock, hook.heartbeat_timeout / 3)

    async def _find_hook(self) -> LifecycleHook | None:
        """The hook, or ``None`` if there is none that can be used."""
        if self._hook is not None:
            return self._hook
        which: dict[str, Any] = {"AutoScalingGroupName": self._group}
        if self._hook_name:
            which["LifecycleHookNames"] = [self._hook_name]
        try:
            answer = await self._request("autoscaling", "describe_lifecycle_hooks", **which)
        except AwsError as e:
            if not self._is_terminating or not self._hook_name:
                raise
            # Its name is enough to go on with.
            self._hook_failures.record_failure(e)
            return LifecycleHook(self._hook_name)
        hooks = parse_hooks(answer)
        if len(hooks) == 1:
            self._hook = hooks[0]
        elif hooks:
            names = ", ".join(sorted(one_line(hook.name) for hook in hooks))
            self._warn_about_hook(
                f"has more than one hook for {TRANSITION}: say which one is for this by hook=… ({names})"
            )
        else:
            named = f" named {self._hook_name}" if self._hook_name else ""
            self._warn_about_hook(
                f"has no lifecycle hook{named} for {TRANSITION}: AWS will not wait until an instance is drained"
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

    # Afterwards.

    async def _finish(self) -> None:
        if not self._is_terminating:
            # The instance's shutdown may have been quicker to tell.
            await self._poll()
        if self._poll_loop.running:
            self._poll_loop.stop()
        if not self._is_terminating:
            return
        try:
            await self._complete()
        except TimeoutError:
            self._log.error("AWS was not told that the instance is empty: it ends when the hook's time is over")

    async def _complete(self) -> None:
        finding = Deferred.fromCoroutine(self._retry(self._hook_failures, self._find_hook))
        hook = await finding.addTimeout(COMPLETION_TIMEOUT, self._clock)
        if hook is None:
            return
        alone = await self._wait_for_colocated_nodes(hook)
        self._heartbeats.cancel()
        if not alone:
            self._log.info("ends while other nodes of this instance have clients: it is for them to tell AWS")
            return
        ending = Deferred.fromCoroutine(self._retry(self._completion_failures, lambda: self._complete_action(hook)))
        await ending.addTimeout(COMPLETION_TIMEOUT, self._clock)

    async def _wait_for_colocated_nodes(self, hook: LifecycleHook) -> bool:
        """Wait until the other nodes of this instance have no clients, but no longer than AWS would. ``False`` if they
        have some, and somebody does not want that to be waited for."""
        for second in range(int(hook.global_timeout / COLOCATED_POLL_INTERVAL)):
            left = self._colocated_clients()
            if left <= 0:
                return True
            if self._skip_colocated:
                return False
            if not second:
                self._log.info("drained; other nodes of this instance have clients yet: {left}", left=left)
            await deferLater(self._clock, COLOCATED_POLL_INTERVAL)
        return True

    async def _complete_action(self, hook: LifecycleHook) -> None:
        action = await self._action_parameters(hook)
        try:
            await self._request("autoscaling", "complete_lifecycle_action", LifecycleActionResult="CONTINUE", **action)
        except AwsError as e:
            # Another node of this instance did it, or the hook's time is over.
            if "no active lifecycle action" not in str(e).lower():
                raise
            self._log.info("AWS does not wait for this instance any more")
        else:
            self._log.info("AWS was told that this instance is empty")

    # Trying.

    async def _try_once(self, failure_log: FailureLog, work: Callable[[], Awaitable[T]]) -> T | None:
        """Try; ``None`` if it fails."""
        try:
            answer = await work()
        except AwsError as e:
            failure_log.record_failure(e)
            return None
        failure_log.record_success()
        return answer

    async def _retry(self, failure_log: FailureLog, work: Callable[[], Awaitable[T]]) -> T:
        """Try again and again, with pauses that grow."""
        pause = INITIAL_BACKOFF
        while True:
            try:
                answer = await work()
            except AwsError as e:
                failure_log.record_failure(e)
            else:
                failure_log.record_success()
                return answer
            await deferLater(self._clock, pause)
            pause = min(2 * pause, MAX_BACKOFF)
