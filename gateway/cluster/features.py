"""Features that two nodes agree on when a peer connection opens.

    -> GET /v1/backend HTTP/1.1                 Wsgateway-Features: fence, floor     what the connecting node knows
    <- HTTP/1.1 101 Switching Protocols         Wsgateway-Features: fence, floor     what it knows, too

Both use the intersection. A node of a release without this header has no features, and is treated as before.
"""

from __future__ import annotations

from enum import Enum

#: name of the header, in the request and in the response
FEATURES_HEADER = "Wsgateway-Features"
#: characters of the header; a longer one counts as empty
MAX_HEADER_LENGTH = 1024


class Feature(Enum):
    """A feature of the protocol between nodes; the value is its name on the wire."""

    #: the node orders the messages to one client that passes from node to node (rpc/ordering.py)
    FENCE = "fence"
    #: the nodes tell each other the highest generation that they know (cluster/membership.py)
    FLOOR = "floor"
    #: responses with an error of the gateway itself are marked (protocol/jsonrpc.py)
    MARK = "mark"


#: what this program knows
ALL_FEATURES: frozenset[Feature] = frozenset(Feature)


def encode_features(features: frozenset[Feature] = ALL_FEATURES) -> str:
    """Return the value of the header."""
    return ", ".join(sorted(feature.value for feature in features))


def decode_features(value: str) -> frozenset[Feature]:
    """Return the features that a header's value names and this program knows; unknown names are ignored."""
    if len(value) > MAX_HEADER_LENGTH:
        return frozenset()
    names = {name.strip() for name in value.split(",")}
    return frozenset(feature for feature in ALL_FEATURES if feature.value in names)
