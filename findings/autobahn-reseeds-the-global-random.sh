#!/bin/sh
# Autobahn: each WebSocket factory that is made seeds the random module of the whole program again.
#
# Version:   autobahn 26.10.2, txaio 26.6.1, Twisted 26.10.0 (PyPI), CPython 3.11
# Behavior:  The constructors of WebSocketServerFactory and WebSocketClientFactory call random.seed() without an argument,
#            which seeds the generator behind random.random() and the other functions of the module from the system. A
#            seed that the program or its tests have set is lost at that moment.
# Guess:     A constructor leaves the program's generator alone; after random.seed(1) the numbers are the same each time.
# Source:    autobahn/websocket/protocol.py, WebSocketServerFactory.__init__ and WebSocketClientFactory.__init__
# Output:
#            without a factory, the numbers are the same: True
#            with a server factory in between: False
#            with a client factory in between: False
#
# A simulation or a property test that needs one seed has to replace random.seed while factories are made, or draw from a
# random.Random of its own.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    autobahn==26.10.2 txaio==26.6.1 Twisted==26.10.0 setuptools
cat >"$folder/show.py" <<'PYTHON'
import random

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketServerFactory


def numbers(make=lambda: None):
    random.seed(1)
    make()
    return [random.random() for _ in range(3)]


print("without a factory, the numbers are the same:", numbers() == numbers())
print("with a server factory in between:", numbers() == numbers(WebSocketServerFactory))
print("with a client factory in between:", numbers() == numbers(lambda: WebSocketClientFactory("ws://127.0.0.1:9000")))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" >"$folder/output"
cat "$folder/output"
diff - "$folder/output" <<'EXPECTED'
without a factory, the numbers are the same: True
with a server factory in between: False
with a client factory in between: False
EXPECTED
