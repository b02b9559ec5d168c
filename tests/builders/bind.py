"""A private BIND for tests, in a temporary folder and on a free port of loopback; real, but gone when the tests are.

    from tests.builders import bind

    server = bind.server()
    server.clear()                      # no record but those of the zone itself
    server.lookup("gw.example.com")     # the set of its addresses

:func:`server` starts one server for the whole test run, at its first call. A test that stops or kills a server makes
its own: ``Server()``, with ``kill`` and ``start`` again on the same zone and port. However the process that started a
server ends, the server ends too, and its folder goes (reaper.py).

It has the zone ``example.com``, which the key in ``key_file`` may change, and ``broken.example``, of which it has no data.
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
#: seconds that a server has to start
START_TIMEOUT = 60.0

ZONE = "example.com"

#: Everything is in its own folder, so that it can be whoever runs the tests.
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
    """A server that cannot be started. Its text says why, in one line."""


class BindServer:
    """A server of its own, running.

    :raises ServerError: it is not installed, or does not start.
    """

    def __init__(self) -> None:
        program = shutil.which("named") or shutil.which("named", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise ServerError(MISSING)
        self._program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="wsgateway-bind-"))
        #: of the key that may change the zone, and of one that the server knows and lets do nothing
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
        """The beginning of a ``--dns`` that means this server."""
        return rf"rfc2136:server=127.0.0.1\:{self.port}:zone={ZONE}:key-file={self.key_file}"

    def start(self) -> None:
        """Start it, on the zone and the port that it had, and wait until it answers."""
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
        """What anybody is told of a name."""
        query = dns.message.make_query(name, kind)
        answer = dns.query.tcp(query, "127.0.0.1", timeout=5, port=self.port)
        assert answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN), answer
        return {
            record.to_text() for rrset in answer.answer for record in rrset if rrset.rdtype == query.question[0].rdtype
        }

    def ttl(self, name: str, kind: str = "A") -> int:
        """The seconds for which anybody may believe that."""
        answer = dns.query.tcp(dns.message.make_query(name, kind), "127.0.0.1", timeout=5, port=self.port)
        return answer.answer[0].ttl

    def update(self) -> dns.update.UpdateMessage:
        """An update of the zone, to be sent."""
        return dns.update.UpdateMessage(ZONE, keyring=dns.tsig.Key("wsgateway", self._secret))

    def send(self, update: dns.update.UpdateMessage) -> None:
        """Have an update carried out."""
        answer = dns.query.tcp(update, "127.0.0.1", timeout=5, port=self.port)
        assert answer.rcode() == dns.rcode.NOERROR, answer

    def remove_records(self, *names: str) -> None:
        """Remove all records of names, and the notes beside them."""
        update = self.update()
        for name in names:
            absolute = dns.name.from_text(name)
            update.delete(absolute)
            update.delete(dns.name.from_text("_wsgateway", absolute))
        self.send(update)

    def pause(self) -> None:
        """SIGSTOP: who connects gets no answer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            (self.folder / "running").unlink(missing_ok=True)

    def close(self) -> None:
        """End it for good, and remove its folder."""
        atexit.unregister(self.close)
        self.kill()
        self._reaper.reap()


def write_key(path: Path, name: str, secret: bytes) -> None:
    """Write the file of a key, as tsig-keygen does."""
    text = base64.b64encode(secret).decode()
    path.touch(0o600)
    path.write_text(f'key "{name}" {{\n\talgorithm hmac-sha256;\n\tsecret "{text}";\n}};\n')


@functools.cache
def server() -> BindServer:
    """The server of this test run. Nobody stops it."""
    return BindServer()
