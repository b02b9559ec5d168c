"""``python -m gateway.agent``: the demo client, which serves ``echo``, ``time`` and ``disk.usage``.

For each connection it prints ``connected CLIENT_ID URL`` to stdout. The log goes to stderr.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from typing import Any, TextIO

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import (
    FilteringLogObserver,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.python.usage import Options, UsageError

from gateway.agent import Agent, AgentError, Stopped, tls_of_files

_log = Logger(namespace="agent")


class DemoOptions(Options):
    synopsis = "python -m gateway.agent --url ws://127.0.0.1:8080 --client-id demo-1"
    longdesc = "A client to try a gateway with; it serves echo, time and disk.usage."
    optParameters = [
        ["url", None, None, "The url of the gateway: ws://host[:port][/prefix]."],
        ["client-id", None, None, "The client_id to connect as."],
        ["token-file", None, None, "A file with the token."],
        ["ca-file", None, "", "A PEM file with the CAs to trust, instead of those of this machine."],
        ["certificate", None, "", "A PEM file with the client certificate and its intermediates."],
        ["key", None, "", "A PEM file with the private key, if it is not in the same file."],
        ["echo-delay", None, "0", "Seconds before echo answers."],
    ]

    def parseArgs(self, *arguments: str) -> None:
        if arguments:
            raise UsageError(f"{arguments[0]!r} is not an option")

    def postOptions(self) -> None:
        if not self["url"]:
            raise UsageError("--url is required, such as --url ws://127.0.0.1:8080")
        if not self["client-id"] and not self["token-file"] and not self["certificate"]:
            raise UsageError("--client-id is required, such as --client-id demo-1")
        try:
            self["echo-delay"] = float(self["echo-delay"])
        except ValueError:
            self["echo-delay"] = -1.0
        if not 0 <= self["echo-delay"] <= 3600:
            raise UsageError("--echo-delay is not a number of seconds from 0 to 3600")
        self["token"] = self._read_token()
        files = [self["ca-file"], self["certificate"], self["key"]]
        if not any(files):
            return
        try:
            self["tls"] = tls_of_files(*files)
            # Report unusable files now, instead of at each attempt.
            self["tls"]("localhost")
        except (OSError, ValueError) as e:
            problem = f"{e.filename} cannot be read: {e.strerror}" if isinstance(e, OSError) else str(e)
            raise UsageError(f"--ca-file, --certificate, --key: {problem}") from None

    def _read_token(self) -> str | None:
        if not self["token-file"]:
            return None
        try:
            with open(self["token-file"], encoding="ascii") as file:
                token = file.read().strip()
        except (OSError, ValueError) as e:
            raise UsageError(f"--token-file {self['token-file']} cannot be read: {e}") from None
        if not token:
            raise UsageError(f"--token-file {self['token-file']} is empty")
        return token


def make_echo(clock: Any, delay: float) -> Any:
    """Make the handler of ``echo``: return the params after ``delay`` seconds."""

    def echo(params: Any) -> Any:
        return deferLater(clock, delay, lambda: params) if delay else params

    return echo


def current_time(params: Any) -> float:
    """Handle ``time``: return the seconds since 1970."""
    return time.time()


def disk_usage(params: Any) -> dict[str, int]:
    """Handle ``disk.usage``: return the free and total bytes of the file system of ``{"path": …}``."""
    path = params.get("path") if isinstance(params, dict) else None
    if not isinstance(path, str):
        raise AgentError(-32602, 'params must be {"path": "…"}')
    try:
        usage = shutil.disk_usage(path)
    except (OSError, ValueError) as e:
        raise AgentError(-32602, f"path: {os.strerror(e.errno) if isinstance(e, OSError) and e.errno else e}") from None
    return {"free": usage.free, "total": usage.total}


def make_agent(options: DemoOptions, reactor: Any, **agent_options: Any) -> Agent:
    """Make the demo client. Raises ``UsageError``."""

    def connected(agent: Agent) -> None:
        _print_line(sys.stdout, f"connected {agent.client_id or '-'} {agent.connected_url}")

    def notified(method: str, params: Any) -> None:
        _log.info("notification {method!a} {params!a}", method=method, params=params)

    methods = {"echo": make_echo(reactor, options["echo-delay"]), "time": current_time, "disk.usage": disk_usage}
    if "tls" in options:
        agent_options["tls"] = options["tls"]
    try:
        return Agent(
            options["url"],
            reactor=reactor,
            client_id=options["client-id"],
            token=options["token"],
            methods=methods,
            on_notification=notified,
            on_connected=connected,
            **agent_options,
        )
    except ValueError as e:
        raise UsageError(str(e)) from None


def _print_line(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def _start_logging() -> None:
    levels = LogLevelFilterPredicate(LogLevel.info)
    # Twisted logs the start and the end of its main loop.
    levels.setLogLevelForNamespace("twisted", LogLevel.warn)
    # Each connection is printed to stdout.
    levels.setLogLevelForNamespace("gateway.agent.client", LogLevel.warn)
    quiet = FilteringLogObserver(textFileLogObserver(sys.stderr), [levels])
    globalLogBeginner.beginLoggingTo([quiet], redirectStandardIO=False, discardBuffer=True)


def run(agent: Agent, reactor: Any) -> int:
    """Run an agent until SIGINT or SIGTERM (returns 0), or until it gives up (returns 1)."""
    results: list[Stopped] = []

    def agent_stopped(stopped: Stopped) -> None:
        results.append(stopped)
        reactor.stop()

    def stop(*_: object) -> None:
        reactor.callFromThread(agent.stop)

    def start() -> None:
        # After the reactor has installed its own handlers, which would stop it before the close frame is sent.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, stop)
        stopped: Deferred[Stopped] = agent.whenStopped()
        stopped.addCallback(agent_stopped)
        agent.start()

    reactor.callWhenRunning(start)
    reactor.run()
    if results and results[0].code is not None:
        # The agent has logged the reason.
        return 1
    return 0


def main() -> None:
    try:
        options = DemoOptions()  # type: ignore[no-untyped-call]
        options.parseOptions(sys.argv[1:])  # type: ignore[no-untyped-call]
        from twisted.internet import reactor

        # The reactor's timers follow the wall clock: setting it back by an hour would stop pings and reconnects that
        # long.
        reactor.seconds = time.monotonic  # type: ignore[method-assign]
        agent = make_agent(options, reactor)
        _start_logging()
        status = run(agent, reactor)
    except UsageError as e:
        _print_line(sys.stderr, f"gateway.agent: {e}")
        status = 2
    except KeyboardInterrupt:
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    main()
