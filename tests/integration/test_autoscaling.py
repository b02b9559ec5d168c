"""The end of an instance: nodes that are processes, with the instance's metadata service and AWS beside them."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator

import pytest
from fleet import Node, asynchronous, closed

from tests.fakes import autoscaling, moto
from tests.fakes.imds import FakeIMDS

OPTIONS = ("--auth", "none", "--drain-seconds", "0.5", "--autoscaling", "aws:group=gw")


@pytest.fixture
def imds() -> Iterator[FakeIMDS]:
    server = FakeIMDS()
    yield server
    server.close()


@pytest.fixture
def aws(imds: FakeIMDS, monkeypatch: pytest.MonkeyPatch) -> Iterator[autoscaling.FakeAutoscaling]:
    """What the nodes that are started from now on take for AWS."""
    # A heartbeat each 0.3 s.
    server = autoscaling.FakeAutoscaling(heartbeat=1)
    for name, value in moto.environment(server.url).items():
        monkeypatch.setenv(name, value)
    # It is the instance that tells it.
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.url)
    yield server
    server.close()


@asynchronous
async def test_node_drains_before_aws_terminates_its_instance(
    start: Callable[..., Node], imds: FakeIMDS, aws: autoscaling.FakeAutoscaling
) -> None:
    # Both cores of it.
    quick, slow = [start(*OPTIONS, "--lease", "2", "--heartbeat", "0.3", ready=False) for _ in range(2)]
    early = [await quick.await_ready().connect(f"early-{i}") for i in range(4)]
    late = await slow.await_ready().connect("late")
    calling = asyncio.ensure_future(slow.call("late", "echo"))
    request = json.loads(await late.recv())
    aws.waiting = True
    imds.state = "Terminated"
    for client in [*early, late]:
        goaway = json.loads(await client.recv())
        assert (goaway["method"], goaway["params"]["reason"]) == ("gateway.goaway", "drain")
    for client in early:
        assert await closed(client) == 1012
    # The call in flight keeps the last client, and that keeps the instance; AWS waits meanwhile.
    while "other nodes of this instance" not in quick.log.read_text():
        await asyncio.sleep(0.02)
    beats = aws.operations().count("RecordLifecycleActionHeartbeat")
    while aws.operations().count("RecordLifecycleActionHeartbeat") < beats + 2:
        await asyncio.sleep(0.02)
    assert aws.waiting
    await late.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": "answered"}))
    assert (await calling).json["result"] == "answered"
    assert await closed(late) == 1012
    assert [await node.ended() for node in (quick, slow)] == [0, 0]
    assert not aws.waiting
    action = {"LifecycleHookName": "empty-it", "AutoScalingGroupName": "gw", "InstanceId": imds.items["instance-id"]}
    assert ("CompleteLifecycleAction", {**action, "LifecycleActionResult": "CONTINUE"}) in aws.requests
    for node in (quick, slow):
        assert "Traceback" not in node.log.read_text()


@asynchronous
async def test_sigterm_before_the_lifecycle_action(
    start: Callable[..., Node], imds: FakeIMDS, aws: autoscaling.FakeAutoscaling
) -> None:
    node = start(*OPTIONS)
    aws.waiting = True
    imds.state = "Terminated"
    node.kill(signal.SIGTERM)
    assert await node.ended() == 0
    assert not aws.waiting


@asynchronous
async def test_node_outside_ec2_serves_clients(
    start: Callable[..., Node], imds: FakeIMDS, aws: autoscaling.FakeAutoscaling
) -> None:
    imds.failure_mode = "error"
    node = start(*OPTIONS)
    async with node.connect("c") as client:
        while "this is not an EC2 instance" not in node.log.read_text():
            await asyncio.sleep(0.02)
        node.kill(signal.SIGTERM)
        assert json.loads(await client.recv())["method"] == "gateway.goaway"
        assert await closed(client) == 1012
    assert await node.ended() == 0
    assert aws.requests == []


def test_missing_group(start: Callable[..., Node]) -> None:
    node = start("--autoscaling", "aws:region=eu-central-1", ready=False)
    assert node.process.wait(30) != 0
    (line,) = node.process.stderr.read().decode().splitlines()
    assert "--autoscaling: 'group' is missing" in line
