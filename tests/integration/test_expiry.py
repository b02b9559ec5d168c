"""Clients whose tokens expire while they are connected, and those that show new ones in time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import websockets
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fleet import Node, asynchronous, closed, eventually, serving_client

#: how long the shortest tokens of these tests are good, in seconds
LIFE = 4


class Issuer:
    """Signs tokens, and says how nodes are to check them."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        path = folder / "issuer.pem"
        public = self._key.public_key()
        path.write_bytes(
            public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        self.spec = f"jwt:key-file={path}:algorithms=ES256:audience=gateway:issuer=https://issuer.example"

    def token(self, subject: str, life: float = LIFE) -> str:
        claims = {"sub": subject, "aud": "gateway", "iss": "https://issuer.example", "exp": int(time.time() + life)}
        return jwt.encode(claims, self._key, "ES256")

    def shown(self, subject: str, life: float = LIFE) -> dict[str, str]:
        """The header that has such a token."""
        return {"Authorization": f"Bearer {self.token(subject, life)}"}


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


async def renew(client: Any, token: str) -> None:
    """Show another token, as a notification: it is not answered."""
    await client.send(json.dumps({"jsonrpc": "2.0", "method": "gateway.token", "params": {"token": token}}))


@asynchronous
async def test_token_expires_unless_renewed(issuer: Issuer, start: Callable[..., Node]) -> None:
    node = start("--auth", issuer.spec)
    async with (
        node.connect("", additional_headers=issuer.shown("ends")) as ends,
        serving_client(node, "", additional_headers=issuer.shown("stays")) as stays,
        node.connect("", additional_headers=issuer.shown("late")) as late,
    ):
        await eventually(lambda: is_parked(node, 3), "all are parked")
        await renew(stays, issuer.token("stays", 3600))
        for bad in (issuer.token("stays", 3600), issuer.token("late", -1), "nonsense"):
            await renew(late, bad)
        assert await closed(ends) == 1008
        assert ends.close_reason == "the token, or the certificate, has expired"
        assert await closed(late) == 1008
        assert (await node.call("stays", "echo", [1])).json["result"] == [1]
        assert (await node.call("ends", "echo")).status == 404
    assert await node.metric("wsgateway_expired_total") == 2
    assert await node.metric("wsgateway_renewed_total") == 1
    assert await node.metric("wsgateway_renewals_refused_total") == 3


async def is_parked(node: Node, clients: int) -> bool:
    return await node.metric("wsgateway_parked") == clients


@asynchronous
async def test_result_of_token_renewal(issuer: Issuer, start: Callable[..., Node]) -> None:
    node = start("--auth", issuer.spec)
    async with node.connect("", additional_headers=issuer.shown("a")) as client:
        for token, code in ((issuer.token("a", 3600), None), (issuer.token("b", 3600), -32602), ("x", -32602)):
            await client.send(
                json.dumps({"jsonrpc": "2.0", "id": 1, "method": "gateway.token", "params": {"token": token}})
            )
            answer = json.loads(await client.recv())
            assert (answer["id"], answer.get("error", {}).get("code")) == (1, code), answer
            assert token == "x" or token not in json.dumps(answer)
    assert issuer.token("a", 3600)[:20] not in node.log.read_text()


@asynchronous
async def test_renewal_through_another_node(issuer: Issuer, fleet: Callable[..., list[Node]]) -> None:
    """The node that has a client ends its connection, and takes its new token, though it came through another."""
    first, second = fleet(2, "--auth", issuer.spec, "--openings-per-address", "0")
    # What `fleet` allows everybody is not what is meant here.
    headers = issuer.shown("ends"), issuer.shown("stays")
    older = [await first.connect("", additional_headers=header) for header in headers]
    async with (
        second.connect("", additional_headers=headers[0]) as ends,
        serving_client(second, "", additional_headers=headers[1]) as stays,
    ):
        assert [await closed(one) for one in older] == [4001, 4001]
        await renew(stays, issuer.token("stays", 3600))
        assert await closed(ends) == 1008
        assert (await first.request("GET", "/v1/clients/stays")).json["node"] == first.node_id
        assert (await second.call("stays", "echo", [2])).json["result"] == [2]
        assert stays.state is websockets.State.OPEN
