"""Coverage-guided fuzzing of the parsers of untrusted input: ``python -m tests.fuzz``, or ``make fuzz``.

    frames.py    data on an open connection
    jsonrpc.py   text messages of a client, a backend or another node
    opening.py   data before a connection is open

Each has a function ``target`` that takes any bytes and asserts the invariants. The suite (test_corpus.py) calls it with
each file in ``seeds/`` (written by hand), ``corpus/`` (kept from earlier runs) and ``found/`` (the input of each bug
ever found); libFuzzer calls it with mutations of these. A file contains the input bytes, unencoded.
"""
