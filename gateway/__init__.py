"""A WebSocket gateway node: backends call connected clients by client id, from any node of a fleet.

The public API is:

* :mod:`gateway.agent`, the client for Twisted programs;
* :mod:`gateway.testing`, an in-memory gateway for the tests of such programs.

All other modules are internal and may change in any release.
"""

__version__ = "0.1.0"
