#!/bin/sh
# Autobahn: the timers of a connection run on the global reactor, not on the reactor that the factory was given.
#
# Version:   autobahn 26.10.2, txaio 26.6.1, Twisted 26.10.0 (PyPI), CPython 3.11
# Behavior:  WebSocketServerFactory(reactor=clock) keeps the reactor in factory.reactor, but the timeouts of the opening
#            and closing handshakes and of automatic pings are scheduled by txaio.make_batched_timer(), which takes
#            txaio.config.loop or the global reactor. A twisted.internet.task.Clock never sees them.
# Guess:     factory.reactor schedules the timers: Clock.advance() makes a connection time out.
# Source:    autobahn/websocket/protocol.py, WebSocketServerFactory.setProtocolOptions and resetProtocolOptions
# Output:
#            calls on the factory's clock: 0
#            calls on the global reactor: 1
#            after the clock has advanced by 100 s, dropped: False
#
# A unit test with a Clock needs openHandshakeTimeout=0 and closeHandshakeTimeout=0, or txaio.config.loop = clock before the
# factory is made.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    autobahn==26.10.2 txaio==26.6.1 Twisted==26.10.0 setuptools
cat >"$folder/show.py" <<'PYTHON'
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet import reactor
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport


class Transport(StringTransport):
    aborted = False

    def abortConnection(self):
        self.aborted = True


clock = Clock()
factory = WebSocketServerFactory("ws://127.0.0.1:9000", reactor=clock)
factory.setProtocolOptions(openHandshakeTimeout=5)
factory.protocol = WebSocketServerProtocol
protocol = factory.buildProtocol(None)
transport = Transport()
# A client connects, and sends nothing.
protocol.makeConnection(transport)
print("calls on the factory's clock:", len(clock.getDelayedCalls()))
print("calls on the global reactor:", len(reactor.getDelayedCalls()))
clock.advance(100)
print("after the clock has advanced by 100 s, dropped:", transport.aborted or transport.disconnecting)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" >"$folder/output"
cat "$folder/output"
diff - "$folder/output" <<'EXPECTED'
calls on the factory's clock: 0
calls on the global reactor: 1
after the clock has advanced by 100 s, dropped: False
EXPECTED
