"""Twisted plugin for ``mtls:`` endpoint strings: TLS with client certificates."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IStreamServerEndpoint, IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class _MTLSParser:
    """Parse ``mtls:8443:privateKey=key.pem:certKey=chain.pem:clientCAs=ca.pem``; see :mod:`gateway.net.tls`."""

    prefix = "mtls"

    def parseStreamServer(self, reactor: Any, *args: str, **kwargs: str) -> IStreamServerEndpoint:
        """Make the endpoint. Raises ``ValueError``, ``TypeError`` or ``OSError`` if it is invalid."""
        # Imported here because Twisted loads this plugin for endpoint strings of every kind.
        from gateway.net.tls import make_endpoint

        return make_endpoint(self.prefix, reactor, args, kwargs)


mtls = _MTLSParser()
