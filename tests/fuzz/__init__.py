"""Coverage-guided fuzzing of what reads bytes from strangers: ``python -m tests.fuzz``, or ``make fuzz``.

    frames.py    what comes on a connection that is open
    jsonrpc.py   what a client, a backend or another node says in a text message
    opening.py   what comes before a connection is open

Each has a function ``target`` that takes any bytes and asserts what must be true of them. The suite (test_corpus.py)
calls it with every file in ``seeds/``, which somebody thought of, in ``corpus/``, which is what earlier runs found to be
worth keeping, and in ``found/``, the input of each fault that was ever found; libFuzzer calls it with what it makes of
those. A file is the very bytes that are read.
"""
