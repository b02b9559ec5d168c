"""Clients with tokens of an external issuer: real nodes, and a real server that publishes the keys."""

import base64
import hashlib
import hmac
import json
import signal
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fleet import Node, asynchronous, eventually, serving_client

from tests.builders.ports import free_port
from tests.builders.tokens import EC, OTHER_EC, OTHER_RSA, RSA, jwk, jwks, pem, private_pem, raw_token, sign

SUBJECT = "acme/robot-7"
CLAIMS = {"sub": SUBJECT, "aud": "gateway", "iss": "https://idp.example.com/realm?a=b"}
RULES = "audience=gateway:issuer=https://idp.example.com/realm?a=b"


def valid_token(key: Any = RSA, algorithm: str = "RS256", kid: str | None = None, **claims: Any) -> str:
    headers = None if kid is None else {"kid": kid}
    return sign(key, algorithm, headers, **{**CLAIMS, "exp": time.time() + 60, **claims})


async def status(node: Node, token: str) -> int:
    answer = await node.opening("/v1/connect", {"Authorization": f"Bearer {token}"})
    if answer.status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    if answer.status == 503:
        assert answer.headers["Retry-After"] == "1"
    return answer.status


class KeyServer:
    """A server of keys that can be changed, and that can be away."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/keys"
        self.document = b""
        self.requests = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        published = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                published.requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(published.document)))
                self.end_headers()
                self.wfile.write(published.document)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def published() -> Iterator[KeyServer]:
    published = KeyServer()
    yield published
    published.stop()


@asynchronous
async def test_tokens_with_keys_from_a_file(start: Callable[..., Node], tmp_path: Path) -> None:
    keys = tmp_path / "keys.pem"
    keys.write_bytes(pem(RSA) + pem(EC))
    node = start("--auth", f"jwt:key-file={keys}:algorithms=RS256,ES256:{RULES}")
    for token in (valid_token(), valid_token(EC, "ES256")):
        async with serving_client(node, "", additional_headers={"Authorization": f"Bearer {token}"}):
            assert (await node.call(SUBJECT, "echo", [1])).json["result"] == [1]
    confused = raw_token({"alg": "HS256", "typ": "JWT"}, CLAIMS).rpartition(".")[0]
    digest = hmac.digest(pem(RSA), confused.encode(), hashlib.sha256)
    for token in (
        valid_token(OTHER_RSA),
        valid_token(OTHER_EC, "ES256"),
        raw_token({"alg": "none"}, CLAIMS),
        f"{confused}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}",
        valid_token(exp=time.time() - 1),
        valid_token(aud="billing"),
        valid_token(iss="https://other.example.com"),
        valid_token(sub="a b"),
        valid_token() + "x" * 8192,
        "opaque",
    ):
        assert await status(node, token) == 401, token
    answer = await node.opening("/v1/connect", {"Authorization": f"Bearer {valid_token(exp=time.time() - 1)}"})
    assert json.loads(answer.body) == {"error": "token", "message": "this token has expired"}
    assert (
        await node.opening("/v1/connect?client_id=robot-8", {"Authorization": f"Bearer {valid_token()}"})
    ).status == 403
    log = node.log.read_text()
    assert "Traceback" not in log
    assert "without audience=" not in log
    assert await node.metric('wsgateway_token_refusals_total{reason="audience"}') == 1
    assert valid_token().split(".")[0] not in log


@asynchronous
async def test_key_file_is_reloaded(start: Callable[..., Node], tmp_path: Path) -> None:
    keys = tmp_path / "keys.pem"
    keys.write_bytes(pem(EC))
    node = start("--auth", f"jwt:key-file={keys}:algorithms=ES256")
    old, new = valid_token(EC, "ES256"), valid_token(OTHER_EC, "ES256")
    assert (await status(node, old), await status(node, new)) == (101, 401)
    keys.write_bytes(pem(EC) + pem(OTHER_EC))
    node.kill(signal.SIGHUP)

    async def reads_it() -> bool:
        return await status(node, new) == 101

    await eventually(reads_it, "the new key is known")
    assert await status(node, old) == 101
    for bad in (pem(OTHER_EC)[:-20], private_pem(OTHER_EC), b""):
        count = node.log.read_text().count("the previous content stays in effect")
        keys.write_bytes(bad)
        node.kill(signal.SIGHUP)

        async def says_so(before: int = count) -> bool:
            return node.log.read_text().count("the previous content stays in effect") > before

        await eventually(says_so, "the log tells of the bad file")
        assert (await status(node, old), await status(node, new)) == (101, 101)
    log = node.log.read_text()
    assert f"--auth: {keys} has a private key" in log
    assert log.count("a token that the same issuer made for another service is accepted") == 1


@asynchronous
async def test_published_keys(start: Callable[..., Node], published: KeyServer) -> None:
    """The key server is down at first, then the key is changed twice; the node is not restarted."""
    node = start("--auth", f"jwks:url={published.url}:{RULES}", "--auth", "none")
    old, new, newest = (
        valid_token(EC, "ES256", "1"),
        valid_token(OTHER_EC, "ES256", "2"),
        valid_token(RSA, "PS256", "3"),
    )
    assert await status(node, old) == 503
    # Other clients are accepted meanwhile.
    async with serving_client(node, "nobody"):
        assert (await node.call("nobody", "echo", [1])).json["result"] == [1]
    published.document = jwks(jwk(EC, "1"))
    published.start()

    async def is_in() -> bool:
        return await status(node, old) == 101

    await eventually(is_in, "the keys are fetched")
    assert await node.metric("wsgateway_key_failures_total") >= 1

    # A key that is new is fetched when it is first used, once in a minute.
    published.document = jwks(jwk(EC, "1"), jwk(OTHER_EC, "2"))
    requests_before = published.requests
    assert (await status(node, new), await status(node, old)) == (101, 101)
    assert published.requests == requests_before + 1
    published.document = jwks(jwk(RSA, "3"))
    assert await status(node, newest) == 401
    assert published.requests == requests_before + 1
    node.kill(signal.SIGHUP)

    async def is_in_by_the_newest() -> bool:
        return await status(node, newest) == 101

    await eventually(is_in_by_the_newest, "the keys are fetched anew")
    assert (await status(node, new), await status(node, old)) == (401, 401)
    published.stop()
    assert await status(node, newest) == 101
    log = node.log.read_text()
    assert log.count("keys cannot be fetched") == log.count("keys can be fetched again") == 1
    assert "Traceback" not in log
    node.kill(signal.SIGTERM)
    assert await node.ended() == 0
