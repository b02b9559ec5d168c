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

from gateway.cloud.errors import AwsError, Trouble
from gateway.cloud.imds import Imds
from gateway.util.log import one_line

T = TypeVar("T")

#: seconds between two looks at the target lifecycle state
POLL = 5.0
#: the target lifecycle states of an instance that ends
ENDING = frozenset({"Terminated", "Warmed:Terminated"})
#: the lifecycle transition before which AWS waits
TRANSITION = "autoscaling:EC2_INSTANCE_TERMINATING"
#: seconds that a hook is taken to wait which AWS does not describe: after the last heartbeat, and in all
HEARTBEAT, LONGEST = 60.0, 6000.0
#: seconds: the first pause after a failure, and the longest; each is twice the one before
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
#: seconds that it is tried to complete the action
PATIENCE = 30.0
#: seconds between two looks at the other nodes of this instance
ALONE_POLL = 1.0


@attrs.frozen
class Hook:
    """A lifecycle hook; its times are in seconds."""

    name: str
    #: AWS waits so long after the last heartbeat
    heartbeat: float = HEARTBEAT
    #: AWS waits no longer than this in all
    longest: float = LONGEST


def read_hooks(answer: Mapping[str, Any]) -> list[Hook]:
    """The hooks for ending instances, in what DescribeLifecycleHooks answered."""
    return [
        Hook(
            hook["LifecycleHookName"],
            _seconds(hook.get("HeartbeatTimeout"), HEARTBEAT),
            _seconds(hook.get("GlobalTimeout"), LONGEST),
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
        ask: Callable[..., Deferred[dict[str, Any]]],
        imds: Imds,
        clock: Any,
        *,
        group: str,
        hook: str,
        drain: Callable[[], object],
        neighbours: Callable[[], int],
        failures: Counter[str],
    ) -> None:
        self._ask = ask
        self._imds = imds
        self._clock = clock
        self._group = group
        self._hook_name = hook
        self._drain = drain
        self._neighbours = neighbours
        self._no_state = Trouble("the instance's lifecycle state is not known", "metadata", failures)
        self._no_hook = Trouble("the group's lifecycle hook is not known", "DescribeLifecycleHooks", failures)
        self._no_beat = Trouble("AWS is not told to wait", "RecordLifecycleActionHeartbeat", failures)
        self._no_end = Trouble("AWS is not told that the instance is empty", "CompleteLifecycleAction", failures)
        #: ``None`` as long as it is not known whether there is one, or there is none
        self._hook: Hook | None = None
        self._said = ""
        self._instance = ""
        self._ending = self._drained = self._hurried = False
        self._holding: Deferred[None] = succeed(None)
        #: what goes on beside
        self._running: set[Deferred[None]] = set()
        self._loop = LoopingCall(lambda: self._run(self._look()))
        self._loop.clock = clock

    def start(self) -> None:
        """Watch, from now on."""
        self._run(self._prepare())
        self._loop.start(POLL)

    def drained(self) -> Deferred[None]:
        """To be called when no client is left here, before the process ends; fires when it may end. Does not fail.

        It takes no more than 70 s, and those for which other nodes of this instance have clients; for these it waits no
        longer than AWS does."""
        if self._drained:
            return succeed(None)
        self._drained = True
        return self._run(self._finish())

    def hurry(self) -> None:
        """Do not wait for other nodes of this instance: if they have clients, it is for them to tell AWS."""
        self._hurried = True

    def stop(self) -> None:
        """Leave off whatever is under way."""
        if self._loop.running:
            self._loop.stop()
        for running in list(self._running):
            running.cancel()

    def _run(self, work: Coroutine[Deferred[Any], Any, None]) -> Deferred[None]:
        """Have work done beside; the Deferred does not fail, and is cancelled by the stop."""
        running = Deferred.fromCoroutine(work)
        self._running.add(running)

        def over(failure: Failure | None) -> None:
            self._running.discard(running)
            if failure is not None and not failure.check(CancelledError):
                self._log.failure("error in the instance's lifecycle", failure)

        return running.addBoth(over)

    # Before the end.

    async def _prepare(self) -> None:
        """Find out at the start what will be needed, so that who has forgotten something hears of it then."""
        await self._once(self._no_hook, self._find)
        await self._once(self._no_state, self._instance_id)

    async def _look(self) -> None:
        state = await self._once(self._no_state, self._imds.target_state)
        if state in ENDING and not self._ending:
            self._ending = True
            self._log.info("AWS ends this instance (its target lifecycle state is {state}): draining", state=state)
            self._holding = self._run(self._hold())
            if not self._drained:
                self._drain()

    async def _instance_id(self) -> str:
        if not self._instance:
            self._instance = await self._imds.instance_id()
        return self._instance

    # While the node drains.

    async def _hold(self) -> None:
        """Have AWS wait. Ends only by being cancelled, or without a hook."""
        hook = await self._until_it_works(self._no_hook, self._find)
        while hook is not None:
            await self._until_it_works(self._no_beat, lambda: self._beat(hook))
            await deferLater(self._clock, hook.heartbeat / 3)

    async def _find(self) -> Hook | None:
        """The hook, or ``None`` if there is none that can be used."""
        if self._hook is not None:
            return self._hook
        which: dict[str, Any] = {"AutoScalingGroupName": self._group}
        if self._hook_name:
            which["LifecycleHookNames"] = [self._hook_name]
        try:
            answer = await self._ask("autoscaling", "describe_lifecycle_hooks", **which)
        except AwsError as e:
            if not self._ending or not self._hook_name:
                raise
            # Its name is enough to go on with.
            self._no_hook.failed(e)
            return Hook(self._hook_name)
        hooks = read_hooks(answer)
        if len(hooks) == 1:
            self._hook = hooks[0]
        elif hooks:
            names = ", ".join(sorted(one_line(hook.name) for hook in hooks))
            self._say(f"has more than one hook for {TRANSITION}: say which one is for this by hook=… ({names})")
        else:
            named = f" named {self._hook_name}" if self._hook_name else ""
            self._say(f"has no lifecycle hook{named} for {TRANSITION}: AWS will not wait until an instance is drained")
        return self._hook

    def _say(self, problem: str) -> None:
        if problem != self._said:
            self._said = problem
            self._log.warn("--autoscaling: the group {group} {problem}", group=self._group, problem=problem)

    async def _beat(self, hook: Hook) -> None:
        await self._ask("autoscaling", "record_lifecycle_action_heartbeat", **await self._action(hook))

    async def _action(self, hook: Hook) -> dict[str, str]:
        return {
            "LifecycleHookName": hook.name,
            "AutoScalingGroupName": self._group,
            "InstanceId": await self._instance_id(),
        }

    # Afterwards.

    async def _finish(self) -> None:
        if not self._ending:
            # The instance's shutdown may have been quicker to tell.
            await self._look()
        if self._loop.running:
            self._loop.stop()
        if not self._ending:
            return
        try:
            await self._complete()
        except TimeoutError:
            self._log.error("AWS was not told that the instance is empty: it ends when the hook's time is over")

    async def _complete(self) -> None:
        finding = Deferred.fromCoroutine(self._until_it_works(self._no_hook, self._find))
        hook = await finding.addTimeout(PATIENCE, self._clock)
        if hook is None:
            return
        alone = await self._alone(hook)
        self._holding.cancel()
        if not alone:
            self._log.info("ends while other nodes of this instance have clients: it is for them to tell AWS")
            return
        ending = Deferred.fromCoroutine(self._until_it_works(self._no_end, lambda: self._end(hook)))
        await ending.addTimeout(PATIENCE, self._clock)

    async def _alone(self, hook: Hook) -> bool:
        """Wait until the other nodes of this instance have no clients, but no longer than AWS would. ``False`` if they
        have some, and somebody does not want that to be waited for."""
        for second in range(int(hook.longest / ALONE_POLL)):
            left = self._neighbours()
            if left <= 0:
                return True
            if self._hurried:
                return False
            if not second:
                self._log.info("drained; other nodes of this instance have clients yet: {left}", left=left)
            await deferLater(self._clock, ALONE_POLL)
        return True

    async def _end(self, hook: Hook) -> None:
        action = await self._action(hook)
        try:
            await self._ask("autoscaling", "complete_lifecycle_action", LifecycleActionResult="CONTINUE", **action)
        except AwsError as e:
            # Another node of this instance did it, or the hook's time is over.
            if "no active lifecycle action" not in str(e).lower():
                raise
            self._log.info("AWS does not wait for this instance any more")
        else:
            self._log.info("AWS was told that this instance is empty")

    # Trying.

    async def _once(self, trouble: Trouble, work: Callable[[], Awaitable[T]]) -> T | None:
        """Try; ``None`` if it fails."""
        try:
            answer = await work()
        except AwsError as e:
            trouble.failed(e)
            return None
        trouble.worked()
        return answer

    async def _until_it_works(self, trouble: Trouble, work: Callable[[], Awaitable[T]]) -> T:
        """Try again and again, with pauses that grow."""
        pause = FIRST_PAUSE
        while True:
            try:
                answer = await work()
            except AwsError as e:
                trouble.failed(e)
            else:
                trouble.worked()
                return answer
            await deferLater(self._clock, pause)
            pause = min(2 * pause, LONGEST_PAUSE)
