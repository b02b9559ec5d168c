"""Makes ``mtls:`` known to Twisted's endpoint strings: TLS with certificates on both sides."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IStreamServerEndpoint, IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class _MTLSParser:
    """``mtls:8443:privateKey=key.pem:certKey=chain.pem:clientCAs=ca.pem``, see :mod:`gateway.net.tls`."""

    prefix = "mtls"

    def parseStreamServer(self, reactor: Any, *args: str, **kwargs: str) -> IStreamServerEndpoint:
        """Make the endpoint. Raises ``ValueError``, ``TypeError`` or ``OSError``."""
        # Whoever uses an endpoint string imports this module, whatever kind it is of.
        from gateway.net.tls import make_endpoint

        return make_endpoint(self.prefix, reactor, args, kwargs)


mtls = _MTLSParser()
