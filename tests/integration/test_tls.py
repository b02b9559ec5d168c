"""TLS with real nodes: at both endpoints, with certificates of clients or without, renewed, and between nodes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import websockets.asyncio.client
from conftest import SHORT_TIMEOUT_OPTIONS, end
from fleet import HTTPResponse, Node, asynchronous, eventually, serving_client

from tests.builders.ports import free_port

HOST = "127.0.0.1"
#: of a peer url; the port is filled in
NAMED = "wss://localhost:{backend}"


class Authority:
    """A CA, its files in a folder, and who trusts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.path = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.path))

    def issue(self, name: str, *identities: str, by: trustme.CA | None = None) -> Path:
        """A certificate and its key, in a file of that name."""
        path = self.folder / f"{name}.pem"
        path.touch(0o600)
        (by or self.ca).issue_cert(*identities).private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def context(self, own: Path | None = None) -> ssl.SSLContext:
        """That of a client, with a certificate of its own or without."""
        context = ssl.create_default_context(cafile=str(self.path))
        if own is not None:
            context.load_cert_chain(own)
        return context


class SecureNode(Node):
    """A node whose endpoints have TLS; ``context`` is that of its clients and backends."""

    def __init__(self, folder: Path, kinds: tuple[str, str], context: ssl.SSLContext, pem: Path, *options: str) -> None:
        self.context, self.pem = context, pem
        ports = free_port(), free_port()
        listen, backend = (
            f"{kind}:{port}:interface={HOST}:backlog=4096:privateKey={pem}"
            + (f":clientCAs={folder / 'ca.pem'}" if "mtls" in kind else "")
            for kind, port in zip(kinds, ports, strict=True)
        )
        given = (option.format(backend=ports[1]) for option in options or SHORT_TIMEOUT_OPTIONS)
        super().__init__(folder, *given, listen=listen, backend=backend, ports=ports)

    @property
    def url(self) -> str:
        return f"wss://{HOST}:{self.client_port}/v1/connect"

    def connect(self, client_id: str, **kwargs: Any) -> websockets.asyncio.client.connect:
        return super().connect(client_id, ssl=kwargs.pop("ssl", self.context), **kwargs)

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        url = f"https://{HOST}:{self.backend_port}{path}"
        request = urllib.request.Request(url, body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60, context=self.context) as response:
                return HTTPResponse(response.status, response.headers, response.read())
        except urllib.error.HTTPError as e:
            return HTTPResponse(e.code, e.headers, e.read())

    def shown(self, port: int) -> bytes:
        """The certificate that it shows at a port."""
        with (
            socket.create_connection((HOST, port), 20) as plain,
            self.context.wrap_socket(plain, server_hostname=HOST) as connection,
        ):
            return connection.getpeercert(binary_form=True) or b""

    def lines(self, word: str) -> list[str]:
        """The lines of its log with a word in it."""
        return [line for line in self.log.read_text().splitlines() if word in line]


class Fleet:
    """Five nodes that share a registry, and trust one CA."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, Authority(folder)
        self.client = self.authority.issue("client", "robot-7")
        self.nodes: list[SecureNode] = []

    def _node(self, listen: str, backend: str, context: ssl.SSLContext, pem: Path, *options: str) -> SecureNode:
        node = SecureNode(self.folder, (listen, backend), context, pem, *options)
        self.nodes.append(node)
        return node

    def start(self) -> None:
        """Start them, two at first."""
        authority = self.authority
        mutual, plain, unverified = authority.context(self.client), authority.context(), ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        good, own = (authority.issue(name, HOST, "localhost") for name in ("good", "own"))
        #: these two ask other nodes for certificates
        self.first = self._node("ssl", "mtls", mutual, good)
        self.second = self._node("mtls", "mtls", mutual, own)
        self.await_ready()
        self.open = self._node("ssl", "ssl", plain, good, *SHORT_TIMEOUT_OPTIONS, "--peer-url", NAMED)
        self.misnamed = self._node("ssl", "ssl", unverified, authority.issue("other", "other.example"))
        bad = authority.issue("unknown", HOST, by=trustme.CA())
        self.unknown = self._node("ssl", "ssl", unverified, bad)
        self.await_ready()

    def await_ready(self) -> None:
        """All that were started take clients."""
        for node in self.nodes:
            node.await_ready()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("tls")
    fleet = Fleet(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # It is how an operator names the CA of a fleet.
            patch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
            fleet.start()
        yield fleet
    finally:
        end(fleet.nodes)


def quiet(*nodes: SecureNode) -> None:
    for node in nodes:
        assert not node.lines("Traceback"), node.log.read_text()


# Between nodes.


@asynchronous
async def test_calls_and_relays_go_through_with_certificates_of_both_nodes(fleet: Fleet) -> None:
    first, second, other = fleet.first, fleet.second, fleet.open
    async with serving_client(first, "there"):
        assert (await second.call("there", "echo", [1])).json["result"] == [1]
        async with serving_client(second, "there") as relayed:
            assert await first.metric("wsgateway_clients") == 1
            assert await second.metric("wsgateway_relays") == 1
            assert (await second.call("there", "echo", ["x" * 70_000])).json["result"] == ["x" * 70_000]
            presence = (await second.request("GET", "/v1/clients/there")).json
            assert presence["node"] == first.node_id
            assert presence["address"] == f"{HOST}:{relayed.local_address[1]}"
    # One that asks for none, by a name.
    async with serving_client(other, "elsewhere"):
        assert (await first.call("elsewhere", "echo", [2])).json["result"] == [2]
        async with serving_client(first, "elsewhere"):
            assert (await first.call("elsewhere", "echo", [3])).json["result"] == [3]
    quiet(first, second, other)


@asynchronous
async def test_no_connection_to_a_node_that_cannot_be_verified(fleet: Fleet) -> None:
    for peer, node, why in [
        (fleet.misnamed, fleet.first, "its certificate is not for the host in this url"),
        (fleet.unknown, fleet.first, "certificate verify failed"),
        # Here the calling node has no certificate.
        (fleet.first, fleet.open, "certificate required"),
    ]:
        async with serving_client(peer, "hidden"):
            answer = await node.call("hidden", "echo", [1])
            assert (answer.status, answer.json["error"]["code"]) == (503, -32004)
            assert answer.json["error"]["data"]["sent"] is False
            (line,) = (line for line in node.lines("cannot be reached") if str(peer.backend_port) in line)
            assert why in line, line
            # No client is relayed there either: a new connection of that client takes it over.
            async with serving_client(node, "hidden"):
                assert (await node.call("hidden", "echo", [1])).json["result"] == [1]
                assert await node.metric("wsgateway_relays") == 0
    quiet(*fleet.nodes)


# Clients and backends.


@asynchronous
async def test_client_without_certificate_is_refused(fleet: Fleet) -> None:
    node = fleet.second
    async with serving_client(node, "with-one"):
        assert (await node.call("with-one", "echo", [1])).json["result"] == [1]
    stranger = trustme.CA().issue_cert("robot-7")
    context = fleet.authority.context()
    for own in (None, stranger):
        if own is not None:
            own.configure_cert(context)
        with pytest.raises((ssl.SSLError, OSError, websockets.exceptions.InvalidMessage)):
            await node.connect("without", ssl=context)
    assert await node.metric("wsgateway_clients") == 0
    quiet(node)


def test_curl(fleet: Fleet) -> None:
    node, ca = fleet.open, str(fleet.authority.path)
    url = f"https://localhost:{node.backend_port}/v1/nodes"
    answer = subprocess.run(["curl", "-sS", "--cacert", ca, url], capture_output=True, check=True)
    assert len(json.loads(answer.stdout)["nodes"]) == 5
    # Not below TLS 1.2, and not with another name.
    for bad, *options in [
        (url, "--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"),
        (url.replace("localhost", "elsewhere"), "--resolve", f"elsewhere:{node.backend_port}:{HOST}"),
    ]:
        assert subprocess.run(["curl", "-sS", "--cacert", ca, bad, *options], capture_output=True).returncode != 0
    quiet(node)


@asynchronous
async def test_data_that_is_not_tls_is_dropped_and_not_logged(fleet: Fleet) -> None:
    node = fleet.open
    lines, files = len(node.lines("")), node.open_files()
    said = [b"GET /v1/nodes HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(2000), b"\x16\x03\x01\x02\x00" + os.urandom(512)]

    def say() -> None:
        for port in (node.client_port, node.backend_port):
            for data in said * 20:
                with socket.create_connection((HOST, port), 20) as connection:
                    connection.sendall(data)
                    try:
                        while connection.recv(4096):
                            pass
                    except ConnectionResetError:
                        pass

    async def as_before() -> bool:
        return node.open_files() <= files

    await asyncio.to_thread(say)
    await eventually(as_before, "nothing stays open")
    assert len(node.lines("")) == lines, node.log.read_text()


@asynchronous
async def test_certificate_renewal_closes_no_connection(fleet: Fleet) -> None:
    node, before = fleet.first, fleet.first.pem.read_bytes()
    shown = ssl.PEM_cert_to_DER_cert("-----BEGIN CERT" + before.decode().partition("-----BEGIN CERT")[2])

    def shows() -> set[bytes]:
        return {node.shown(port) for port in (node.client_port, node.backend_port)}

    async def reload() -> None:
        reloads = len(node.lines("SIGHUP: "))
        node.kill(signal.SIGHUP)

        async def done() -> bool:
            return len(node.lines("SIGHUP: ")) > reloads

        await eventually(done, "the backend was notified")
        # What it says of the files, it says in the same turn of the reactor.
        await node.request("GET", "/readyz")

    assert await asyncio.to_thread(shows) == {shown}
    ends = await node.metric("wsgateway_certificate_expires")
    async with serving_client(node, "stays") as client:
        renewed = fleet.authority.issue("renewed", HOST, "localhost").read_bytes()
        node.pem.write_bytes(renewed)
        await reload()
        (now,) = await asyncio.to_thread(shows)
        assert now != shown
        assert not node.lines("the previous content stays in effect")
        node.pem.write_bytes(b"nothing of use")
        await reload()
        assert await asyncio.to_thread(shows) == {now}
        assert len(node.lines("has no certificate; the previous content stays in effect")) == 2
        assert {line.split("--")[1].split(":")[0] for line in node.lines("previous content stays")} == {
            "listen",
            "backend",
        }
        assert await node.metric("wsgateway_certificate_expires") >= ends
        await client.ping()
        assert (await node.call("stays", "echo", [1])).json["result"] == [1]
    quiet(node)


# Behind a load balancer that passes TLS on.

_HAPROXY = """
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
listen through
    bind {host}:{through}
    server node {host}:{port} send-proxy-v2 check inter 50ms
listen again
    bind {host}:{again}
    server node {host}:{port} send-proxy ssl verify none crt {pem}
"""


class HAProxy:
    """haproxy in front of a node: ``through`` passes TLS on as it is, ``again`` makes it, with a certificate."""

    def __init__(self, folder: Path, port: int, pem: Path) -> None:
        self.through, self.again = free_port(), free_port()
        (folder / "haproxy.cfg").write_text(
            _HAPROXY.format(host=HOST, port=port, pem=pem, through=self.through, again=self.again)
        )
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        self.process = subprocess.Popen([program, "-db", "-f", folder / "haproxy.cfg"], stderr=subprocess.DEVNULL)

    async def up(self) -> bool:
        try:
            socket.create_connection((HOST, self.again)).close()
        except OSError:
            return False
        return True

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@asynchronous
async def test_behind_haproxy_a_client_has_its_address_and_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, balancers = authority.issue("client", "robot-7"), authority.issue("balancer", "balancer")
    pem, context = authority.issue("node", HOST), authority.context(own)
    node = SecureNode(tmp_path, ("haproxy:mtls", "ssl"), context, pem, "--auth", "mtls")
    front = None
    try:
        await asyncio.to_thread(node.await_ready)
        # Not before: it would find the node down, and take its time to look again.
        front = HAProxy(tmp_path, node.client_port, balancers)
        await eventually(front.up, "haproxy is there")
        for client_id, url, tls in [
            ("robot-7", f"wss://{HOST}:{front.through}/v1/connect", context),
            ("balancer", f"ws://{HOST}:{front.again}/v1/connect", None),
        ]:
            async with serving_client(node, "", url=url, ssl=tls, local_addr=("127.0.0.7", 0)) as client:
                address = (await node.request("GET", f"/v1/clients/{client_id}")).json["address"]
                assert address == f"127.0.0.7:{client.local_address[1]}"
                assert (await node.call(client_id, "echo", [1])).json["result"] == [1]
        # Its checks are of the kind LOCAL, and end before TLS begins.
        assert not node.lines("PROXY header")
        with socket.create_connection((HOST, node.client_port)) as connection:
            connection.sendall(b"\x16\x03\x01\x02\x00")
            assert await asyncio.to_thread(_rest, connection) == b""
        assert len(node.lines("no good PROXY header")) == 1
        quiet(node)
    finally:
        if front is not None:
            front.end()
        end([node])


def _rest(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""
