"""Requests to AWS by boto3: in threads of their own, each tried once, within seconds.

    ask("autoscaling", "describe_lifecycle_hooks", AutoScalingGroupName="gw")    -> the answer, or AwsError

boto3 finds credentials by itself (environment, files, the role of a container or of the instance), and heeds
AWS_ENDPOINT_URL and its like.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import boto3.session
from botocore.config import Config
from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError
from twisted.internet.defer import Deferred, TimeoutError

from gateway.cloud.errors import AwsError
from gateway.util.log import one_line
from gateway.util.threads import DaemonThreadPool

#: seconds that connecting may take, and an answer (less looking up the name, which has no bound)
CONNECT_TIMEOUT, READ_TIMEOUT = 2.0, 3.0
#: the most requests at a time
MAX_THREADS = 3
#: seconds that a stop waits for those that are under way
STOP_TIMEOUT = 3.0

_NO_CREDENTIALS_HINT = "no credentials: give the instance a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def make_client(service: str, region: str) -> Any:
    """A boto3 client that tries once, and not for long."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"total_max_attempts": 1},
        max_pool_connections=MAX_THREADS,
        user_agent_extra="wsgateway",
    )
    # Sessions are not to be shared by threads.
    return boto3.session.Session().client(service, region_name=region, config=config)


class AWSClient:
    """AWS in one region.

    ``region`` finds it, and fails with :class:`AwsError`; it is asked until it has been found. ``run`` does work in a
    thread, and ``make_client`` is what makes a client of a service in a region.
    """

    def __init__(
        self,
        reactor: Any,
        region: Callable[[], Deferred[str]],
        *,
        run: Callable[[Callable[[], Any]], Deferred[Any]] | None = None,
        make_client: Callable[[str, str], Any] = make_client,
    ) -> None:
        self._reactor = reactor
        self._find_region = region
        self._region = ""
        self._thread_pool = DaemonThreadPool(reactor, "aws", MAX_THREADS)
        self._run = run or self._thread_pool.run
        self._make_client = make_client
        self._clients: dict[str, Any] = {}
        self._in_flight = 0

    def request(self, service: str, operation: str, **parameters: Any) -> Deferred[dict[str, Any]]:
        """Ask once. Fails with :class:`AwsError` alone."""
        return Deferred.fromCoroutine(self._request(service, operation, parameters))

    async def _request(self, service: str, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        if not self._region:
            self._region = await self._find_region()
        if self._in_flight >= MAX_THREADS:
            raise AwsError(f"{operation}: {MAX_THREADS} requests are not answered yet", kind="busy")
        self._in_flight += 1
        # Whoever waits may give up; the thread goes on.
        running = self._run(functools.partial(self._call_in_thread, service, operation, parameters))
        outcome: Deferred[dict[str, Any]] = Deferred()
        running.addBoth(self._request_finished, outcome)
        return await outcome

    def _request_finished(self, result: Any, outcome: Deferred[dict[str, Any]]) -> None:
        self._in_flight -= 1
        outcome.callback(result)

    def _call_in_thread(self, service: str, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """What is done in a thread."""
        try:
            client = self._clients.get(service)
            if client is None:
                client = self._clients[service] = self._make_client(service, self._region)
            answer: dict[str, Any] = getattr(client, operation)(**parameters)
        except (NoCredentialsError, PartialCredentialsError):
            # A client looks for them but once, and the instance may be given a role yet.
            self._clients.pop(service, None)
            raise AwsError(f"{operation}: {_NO_CREDENTIALS_HINT}", kind="NoCredentials") from None
        except ClientError as e:
            error = e.response.get("Error", {})
            code = one_line(error.get("Code", "unknown"))
            raise AwsError(f"{operation}: {code}: {one_line(error.get('Message', ''))}", kind=code) from None
        except Exception as e:  # noqa: BLE001 - botocore's have no common class
            problem = one_line(e) or type(e).__name__
            raise AwsError(f"{operation}: {problem}", kind=type(e).__name__) from None
        return answer

    def stop(self) -> Deferred[None]:
        """Wait for what is under way, but not for long. Does not fail."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        # Not to be cancelled: then it would wait in earnest, without the reactor.
        closed: Deferred[None] = Deferred()
        self._thread_pool.close().addBoth(lambda _: closed.callback(None))
        try:
            await closed.addTimeout(STOP_TIMEOUT, self._reactor)
        except TimeoutError:
            # Its threads end with the process.
            return
        for client in self._clients.values():
            with contextlib.suppress(Exception):
                client.close()
