"""Send requests to AWS with boto3, in separate threads; each is tried once, with a timeout of seconds.

    request("autoscaling", "describe_lifecycle_hooks", AutoScalingGroupName="gw")    -> the response, or AwsError

boto3 finds the credentials (environment, files, role of the container or of the instance), and honors AWS_ENDPOINT_URL
and related variables.
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

#: seconds; name resolution is not bounded
CONNECT_TIMEOUT = 2.0
#: seconds
READ_TIMEOUT = 3.0
#: requests in flight
MAX_THREADS = 3
#: seconds that stop() waits for requests in flight
STOP_TIMEOUT = 3.0

_NO_CREDENTIALS_HINT = "no credentials: give the instance a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def make_client(service: str, region: str) -> Any:
    """Make a boto3 client without retries and with short timeouts."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"total_max_attempts": 1},
        max_pool_connections=MAX_THREADS,
        user_agent_extra="wsgateway",
    )
    # Sessions are not thread-safe.
    return boto3.session.Session().client(service, region_name=region, config=config)


class AWSClient:
    """Send requests to the services of one AWS region.

    ``region()`` fires with the region or fails with :class:`AwsError`; it is called until it has succeeded once.
    ``run`` runs a function in a thread; ``make_client(service, region)`` makes a boto3 client.
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
        """Send a request once. The Deferred fails only with :class:`AwsError`."""
        return Deferred.fromCoroutine(self._request(service, operation, parameters))

    async def _request(self, service: str, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        if not self._region:
            self._region = await self._find_region()
        if self._in_flight >= MAX_THREADS:
            raise AwsError(f"{operation}: {MAX_THREADS} requests are already in flight", kind="busy")
        self._in_flight += 1
        # Cancelling stops the wait only: the thread continues, and counts until it is done.
        running = self._run(functools.partial(self._call_in_thread, service, operation, parameters))
        outcome: Deferred[dict[str, Any]] = Deferred()
        running.addBoth(self._request_finished, outcome)
        return await outcome

    def _request_finished(self, result: Any, outcome: Deferred[dict[str, Any]]) -> None:
        self._in_flight -= 1
        outcome.callback(result)

    def _call_in_thread(self, service: str, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            client = self._clients.get(service)
            if client is None:
                client = self._clients[service] = self._make_client(service, self._region)
            response: dict[str, Any] = getattr(client, operation)(**parameters)
        except (NoCredentialsError, PartialCredentialsError):
            # A client looks for credentials only once, and the instance may be given a role later.
            self._clients.pop(service, None)
            raise AwsError(f"{operation}: {_NO_CREDENTIALS_HINT}", kind="NoCredentials") from None
        except ClientError as e:
            error = e.response.get("Error", {})
            code = one_line(error.get("Code", "unknown"))
            raise AwsError(f"{operation}: {code}: {one_line(error.get('Message', ''))}", kind=code) from None
        except Exception as e:  # noqa: BLE001 - botocore's exceptions have no common base class
            problem = one_line(e) or type(e).__name__
            raise AwsError(f"{operation}: {problem}", kind=type(e).__name__) from None
        return response

    def stop(self) -> Deferred[None]:
        """Wait for requests in flight, at most ``STOP_TIMEOUT``, and close the clients. Never fails."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        # The time-out must not cancel close() itself: that would join the threads and block the reactor.
        closed: Deferred[None] = Deferred()
        self._thread_pool.close().addBoth(lambda _: closed.callback(None))
        try:
            await closed.addTimeout(STOP_TIMEOUT, self._reactor)
        except TimeoutError:
            # Daemon threads end with the process.
            return
        for client in self._clients.values():
            with contextlib.suppress(Exception):
                client.close()
