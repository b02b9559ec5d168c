"""Nodes and the name that leads to them, on a real BIND."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.name
import pytest
from conftest import SHORT_TIMEOUT_OPTIONS
from fleet import Node, asynchronous, eventually, serving_client

from tests.builders import bind, mariadb

NAME = "gw.example.com"


@pytest.fixture
def killable() -> Iterator[bind.BindServer]:
    """A BIND that may be killed."""
    server = bind.BindServer()
    yield server
    server.close()


def option(server: bind.BindServer, address: str, key_file: Path | None = None) -> tuple[str, str]:
    spec = server.spec if key_file is None else server.spec.replace(str(server.key_file), str(key_file))
    return "--dns", f"{spec}:name={NAME}:address={address}"


async def leads_to(server: bind.BindServer, *addresses: str) -> None:
    """Wait until the name leads there, and nowhere else."""

    async def answered() -> bool:
        return await asyncio.to_thread(server.lookup, NAME) == set(addresses)

    await eventually(answered, f"{NAME} leads to {addresses}")


async def one_note(server: bind.BindServer) -> bool:
    return len(await asyncio.to_thread(server.lookup, f"_wsgateway.{NAME}", "TXT")) == 1


def leave_record(server: bind.BindServer, address: str) -> None:
    """What a node leaves behind that was killed when no other was there."""
    update = server.update()
    update.add(dns.name.from_text(NAME), 30, "A", address)
    update.add(dns.name.from_text(f"_wsgateway.{NAME}"), 30, "TXT", f'"{uuid.uuid4()} {address}"')
    server.send(update)


@asynchronous
async def test_dns_names_the_nodes_that_take_clients(start: Callable[..., Node]) -> None:
    server, url = bind.server(), mariadb.server().new_database()
    server.remove_records(NAME)
    leave_record(server, "192.0.2.9")
    # Two have one address, as on one machine.
    addresses = ["192.0.2.1", "192.0.2.1", "192.0.2.3", "192.0.2.4"]
    more = {"registry": url, "ready": False}
    nodes = [
        start(*SHORT_TIMEOUT_OPTIONS, "--drain-seconds", "0.2", *option(server, address), **more)
        for address in addresses
    ]
    left, beside, killed, stopped = [node.await_ready() for node in nodes]
    await leads_to(server, *addresses, "192.0.2.9")
    assert await left.metric("wsgateway_dns_announced") == 1
    beside.kill()
    killed.kill()
    stopped.kill(signal.SIGSTOP)
    try:
        # No node saw the node at .9 exit.
        await leads_to(server, "192.0.2.1")
        await eventually(lambda: one_note(server), "that of the one beside it is gone, too")
    finally:
        stopped.kill(signal.SIGCONT)
    await leads_to(server, "192.0.2.1", "192.0.2.4")
    async with left.connect("c") as client:
        left.kill(signal.SIGTERM)
        # This is the first that a client hears of it.
        assert json.loads(await client.recv())["method"] == "gateway.goaway"
        assert server.lookup(NAME) == {"192.0.2.4"}
    # A stop is no drain, but withdraws, too.
    stopped.kill(signal.SIGINT)
    assert [await node.ended() for node in (left, stopped)] == [0, 0]
    assert server.lookup(NAME) == server.lookup(f"_wsgateway.{NAME}", "TXT") == set()


@asynchronous
async def test_nodes_serve_without_dns(start: Callable[..., Node], killable: bind.BindServer, tmp_path: Path) -> None:
    bind.server().remove_records(NAME)
    killable.kill()
    key_file = tmp_path / "key"
    bind.write_key(key_file, "wsgateway", b"another secret")
    more = {"registry": mariadb.server().new_database(), "ready": False}
    stranger = start(*SHORT_TIMEOUT_OPTIONS, *option(bind.server(), "192.0.2.1", key_file), **more)
    other = start(*SHORT_TIMEOUT_OPTIONS, *option(killable, "192.0.2.2"), **more)
    for node in (stranger.await_ready(), other.await_ready()):

        async def failed(node: Node = node) -> bool:
            return await node.metric("wsgateway_dns_failures_total") > 0

        await eventually(failed, "it is counted")
        assert await node.metric("wsgateway_dns_announced") == 0
        async with serving_client(node, "c"):
            assert (await node.call("c", "echo", [1])).json["result"] == [1]
    assert stranger.log.read_text().count("its key with that name has another secret (BADSIG)") == 1
    assert other.log.read_text().count("cannot be reached: Connection refused") == 1
    killable.start()
    await leads_to(killable, "192.0.2.2")
    # A drain does not wait for the name servers either.
    killable.kill()
    for node in (stranger, other):
        node.kill(signal.SIGTERM)
    assert [await node.ended() for node in (stranger, other)] == [0, 0]
    assert bind.server().lookup(NAME) == set()
