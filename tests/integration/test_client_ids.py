"""Client ids through proxies that change paths: no request reaches another client, and the query passes every id."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fleet import HTTPResponse, Node, asynchronous, closed, eventually, serving_client

from tests.builders.ports import free_port

CLIENT_IDS = (
    *("a", "b", "a/b", "b/a", "a/...", "...", "a+b", "a=b@c:d", "rpc", "a/rpc", "client/a", "A_-"),
    *("spiffe://acme/robot/7", "spiffe://a", "urn:acme:7", "x" * 128),
)
#: what was a client id before segments were checked; the first ones become ids of CLIENT_IDS in a path
FORMER_IDS = (
    *("a//b", "a/./b", "a/../b", "./a", "x/../a", "/a", "a/", "a/.", "b//a", "a/b/..", "//", "a//rpc"),
    *("spiffe:/acme/robot/7", "spiffe:///a", "spiffe://acme//robot/7"),
)

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{front};
        location / {{ proxy_pass http://127.0.0.1:{backend}{settings}; }}
    }}
}}
"""
APACHE = """
ServerRoot {folder}
ServerName 127.0.0.1
DefaultRuntimeDir {folder}
PidFile {folder}/apache.pid
ErrorLog {folder}/apache.log
Listen 127.0.0.1:{front}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
StartServers 1
{settings}
"""
APACHE_DEFAULT = 'ProxyPass "/v1/" "http://127.0.0.1:{backend}/v1/"\n'
#: as in docs/backends.rst
APACHE_UNCHANGED = 'AllowEncodedSlashes NoDecode\nProxyPass "/v1/" "http://127.0.0.1:{backend}/v1/" nocanon\n'

#: proxy -> its program and arguments, its configuration, its settings, and whether it leaves paths as they are
PROXIES = {
    "nginx": (("nginx", "-e", "stderr", "-c"), NGINX, "/", False),
    "nginx-unchanged": (("nginx", "-e", "stderr", "-c"), NGINX, "", True),
    "apache": (("apache2", "-DFOREGROUND", "-f"), APACHE, APACHE_DEFAULT, False),
    "apache-unchanged": (("apache2", "-DFOREGROUND", "-f"), APACHE, APACHE_UNCHANGED, True),
}


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Callable[[str, Node], int]]:
    """Starts a proxy of PROXIES in front of a node. Returns its port."""
    with contextlib.ExitStack() as stack:

        def start(name: str, node: Node) -> int:
            (program, *arguments), configuration, settings, _ = PROXIES[name]
            front, path = free_port(), tmp_path / f"{name}.conf"
            settings = settings.format(backend=node.backend_port)
            path.write_text(
                configuration.format(folder=tmp_path, front=front, backend=node.backend_port, settings=settings)
            )
            command = [shutil.which(program) or f"/usr/sbin/{program}", *arguments, str(path)]
            process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return front

        yield start


async def ask(port: int, method: str, target: str, body: Any = None) -> HTTPResponse:
    """Send a request with exactly that target."""

    def send() -> HTTPResponse:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            data = None if body is None else json.dumps(body)
            connection.request(method, target, data, {} if body is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            return HTTPResponse(response.status, response.headers, response.read())

    return await asyncio.to_thread(send)


def call(number: int) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": "name"}


@asynchronous
async def test_clients_with_former_ids_are_refused(node: Node) -> None:
    for former in FORMER_IDS:
        response = await node.opening(f"/v1/connect?client_id={quote(former, safe='')}")
        assert (response.status, response.json["error"]) == (400, "client_id"), former


@pytest.mark.parametrize("name", PROXIES)
@asynchronous
async def test_no_other_client_is_reached(node: Node, proxy: Callable[[str, Node], int], name: str) -> None:
    front, unchanged = proxy(name, node), PROXIES[name][3]

    async def forwards() -> bool:
        with contextlib.suppress(OSError):
            return (await ask(front, "GET", "/v1/nodes")).status == 200
        return False

    await eventually(forwards, f"{name} runs")
    async with contextlib.AsyncExitStack() as stack:
        sockets = {}
        for client_id in CLIENT_IDS:
            # Each client answers with its own id.
            client = serving_client(node, client_id, lambda request, client_id=client_id: client_id)
            sockets[client_id] = await stack.enter_async_context(client)

        for number, client_id in enumerate(CLIENT_IDS):
            encoded = quote(client_id, safe="")
            for form in (encoded, client_id):
                # In the query, every id.
                response = await ask(front, "POST", f"/v1/rpc?client_id={form}", call(number))
                assert (response.status, response.json) == (200, {"jsonrpc": "2.0", "id": number, "result": client_id})
                assert (await ask(front, "GET", f"/v1/client?client_id={form}")).json["client_id"] == client_id
                # In the path, that client or none.
                response = await ask(front, "POST", f"/v1/clients/{form}/rpc", call(number))
                if unchanged or response.status == 200:
                    assert response.json["result"] == client_id, response.body
                else:
                    assert response.status in (400, 404), (form, response.body)
                response = await ask(front, "GET", f"/v1/clients/{form}")
                if unchanged or response.status == 200:
                    assert response.json["client_id"] == client_id
                else:
                    assert response.status in (400, 404, 405), (form, response.body)

        # A path that is no client's is changed into one that may be; the merged form of an id with a scheme is none.
        response = await ask(front, "POST", "/v1/clients/a//b/rpc", call(1))
        assert (response.status, response.json.get("result")) == ((400, None) if unchanged else (200, "a/b"))
        response = await ask(front, "GET", "/v1/clients/spiffe://a")
        assert response.status == (200 if unchanged else 400)

        for former in FORMER_IDS:
            for form in (quote(former, safe=""), former):
                response = await ask(front, "POST", f"/v1/rpc?client_id={form}", call(1))
                assert (response.status, response.json["error"]["code"]) == (400, -32600), form
                assert (await ask(front, "GET", f"/v1/client?client_id={form}")).status == 400, form
                assert (await ask(front, "DELETE", f"/v1/client?client_id={form}")).status == 404, form
        assert await node.metric("wsgateway_clients") == len(CLIENT_IDS)

        for client_id in CLIENT_IDS:
            response = await ask(front, "DELETE", f"/v1/client?client_id={quote(client_id, safe='')}")
            assert response.status == 204, client_id
            assert await closed(sockets.pop(client_id)) == 4003
            assert await node.metric("wsgateway_clients") == len(sockets)
