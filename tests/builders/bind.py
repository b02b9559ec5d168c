"""Run a private BIND for tests, in a temporary directory and on a free port of the loopback interface.

    from tests.builders import bind

    server = bind.server()
    server.remove_records("gw.example.com")
    server.lookup("gw.example.com")     # the set of its addresses

:func:`server` starts one server for the whole test run, at its first call. A test that stops or kills a server makes
its own ``BindServer()``; ``start`` after ``kill`` uses the same zone and port. A server exits with the process that
started it, even if that is killed, and its directory is removed (process_reaper.py).

It has the zone ``example.com``, which the key in ``key_file`` may update, and ``broken.example``, which it cannot load.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.tsig
import dns.update

from tests.builders.ports import free_port
from tests.builders.process_reaper import ProcessReaper

MISSING = "BIND is missing: apt-get install --no-install-recommends bind9"
#: seconds
START_TIMEOUT = 60.0

ZONE = "example.com"

#: all paths are in the server's own directory, so it runs as any user
_CONFIGURATION = """
options {{
    directory "{folder}";
    pid-file none;
    session-keyfile none;
    managed-keys-directory "{folder}";
    listen-on port {port} {{ 127.0.0.1; }};
    listen-on-v6 {{ none; }};
    recursion no;
    dnssec-validation no;
    notify no;
    allow-transfer {{ none; }};
    empty-zones-enable no;
    minimal-responses yes;
}};
controls {{ }};
include "{folder}/key";
include "{folder}/powerless";
zone "example.com" {{
    type primary;
    file "zone";
    allow-update {{ key "wsgateway"; }};
}};
zone "broken.example" {{
    type primary;
    file "not-there";
    allow-update {{ key "wsgateway"; }};
}};
"""

_ZONE = """$TTL 60
@  IN SOA ns hostmaster 1 3600 600 86400 60
   IN NS ns
ns IN A 127.0.0.1
"""


class ServerError(Exception):
    """The server cannot be started. The text is one line."""


class BindServer:
    """A running server. Raises :class:`ServerError` if BIND is not installed or does not start."""

    def __init__(self) -> None:
        program = shutil.which("named") or shutil.which("named", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise ServerError(MISSING)
        self._program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="wsgateway-bind-"))
        #: a key that may update the zone, and a key that the server knows but refuses
        self.key_file, self.unauthorized_key_file = self.folder / "key", self.folder / "powerless"
        self._secret = os.urandom(32)
        self._reaper = ProcessReaper(self.folder)
        try:
            write_key(self.key_file, "wsgateway", self._secret)
            write_key(self.unauthorized_key_file, "powerless", os.urandom(32))
            (self.folder / "zone").write_text(_ZONE)
            (self.folder / "named.conf").write_text(_CONFIGURATION.format(folder=self.folder, port=self.port))
            self.start()
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    @property
    def spec(self) -> str:
        """The beginning of a value of ``--dns`` for this server."""
        return rf"rfc2136:server=127.0.0.1\:{self.port}:zone={ZONE}:key-file={self.key_file}"

    def start(self) -> None:
        """Start with the same zone and port, and wait until the server responds."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [self._program, "-g", "-n", "1", "-c", str(self.folder / "named.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.folder / "running").write_text(str(self.process.pid))
        end = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"named does not start: {self._last_line()}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, EOFError, dns.exception.DNSException):
            return bool(self.lookup(f"ns.{ZONE}"))
        return False

    def _last_line(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return next(
            (line for line in reversed(lines) if "error" in line or "denied" in line), (lines or ["no output"])[-1]
        )

    def lookup(self, name: str, kind: str = "A") -> set[str]:
        """Return the records of a name and type, as texts."""
        query = dns.message.make_query(name, kind)
        answer = dns.query.tcp(query, "127.0.0.1", timeout=5, port=self.port)
        assert answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN), answer
        return {
            record.to_text() for rrset in answer.answer for record in rrset if rrset.rdtype == query.question[0].rdtype
        }

    def ttl(self, name: str, kind: str = "A") -> int:
        """Return the TTL of the records of a name, in seconds."""
        answer = dns.query.tcp(dns.message.make_query(name, kind), "127.0.0.1", timeout=5, port=self.port)
        return answer.answer[0].ttl

    def update(self) -> dns.update.UpdateMessage:
        """Make an update of the zone, for :meth:`send`."""
        return dns.update.UpdateMessage(ZONE, keyring=dns.tsig.Key("wsgateway", self._secret))

    def send(self, update: dns.update.UpdateMessage) -> None:
        """Send an update and assert its success."""
        answer = dns.query.tcp(update, "127.0.0.1", timeout=5, port=self.port)
        assert answer.rcode() == dns.rcode.NOERROR, answer

    def remove_records(self, *names: str) -> None:
        """Remove all records of names, and their notes."""
        update = self.update()
        for name in names:
            absolute = dns.name.from_text(name)
            update.delete(absolute)
            update.delete(dns.name.from_text("_wsgateway", absolute))
        self.send(update)

    def pause(self) -> None:
        """Send SIGSTOP: connections are accepted by the kernel, requests get no response."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            (self.folder / "running").unlink(missing_ok=True)

    def close(self) -> None:
        """Kill the server and remove its directory."""
        atexit.unregister(self.close)
        self.kill()
        self._reaper.reap()


def write_key(path: Path, name: str, secret: bytes) -> None:
    """Write a key file in the format of tsig-keygen."""
    text = base64.b64encode(secret).decode()
    path.touch(0o600)
    path.write_text(f'key "{name}" {{\n\talgorithm hmac-sha256;\n\tsecret "{text}";\n}};\n')


@functools.cache
def server() -> BindServer:
    """Return the server of this test run. Tests must not stop it."""
    return BindServer()
