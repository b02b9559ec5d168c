"""Run moto's server, a fake of AWS, in a separate process on a free port of the loopback interface.

    from tests.fakes import moto

    moto = moto.server()
    moto.reset()
    route53 = moto.client("route53")

:func:`server` starts one server for the whole test run, at its first call. It exits with the process that started it,
even if that is killed: it waits for the end of a pipe.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

import boto3
from botocore.config import Config

from tests.builders.ports import free_port

#: seconds
START_TIMEOUT = 60.0
#: the region of all tests
REGION = "eu-central-1"

#: exits at the end of its standard input
_PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


def environment(url: str) -> dict[str, str]:
    """Return an environment in which boto3 uses only that url, with dummy credentials."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


def offline_client(service: str) -> Any:
    """Make a boto3 client for a Stubber, with dummy credentials and an unused url."""
    return _client(service, f"http://127.0.0.1:{free_port()}")


def _client(service: str, url: str, **options: Any) -> Any:
    return boto3.session.Session().client(
        service,
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        config=Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 1}, proxies={}),
        **options,
    )


class MotoServer:
    """A server of its own, running. ``url`` is where it is.

    :raises AssertionError: it does not start.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the server runs
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(self.port)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **environment(self.url)},
        )
        atexit.register(self.close)
        end = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").strip().splitlines() or ["no output"]
                self.close()
                raise AssertionError(f"moto's server does not start: {lines[-1]}")
            time.sleep(0.02)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which boto3 uses only this server."""
        return environment(self.url)

    def client(self, service: str, **options: Any) -> Any:
        """Make a boto3 client of this server."""
        return _client(service, self.url, **options)

    def reset(self) -> None:
        """Delete all data."""
        self._request("POST", "/moto-api/reset")

    def _is_ready(self) -> bool:
        try:
            self._request("GET", "/moto-api/data.json")
        except urllib.error.HTTPError:
            raise
        except OSError:
            return False
        return True

    def _request(self, method: str, path: str) -> None:
        # Without a proxy of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(urllib.request.Request(self.url + path, method=method), timeout=20).close()

    def close(self) -> None:
        """Stop the server."""
        atexit.unregister(self.close)
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._log.close()


@functools.cache
def server() -> MotoServer:
    """Return the server of this test run, which exits with it."""
    return MotoServer()
