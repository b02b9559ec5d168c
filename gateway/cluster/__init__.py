"""The nodes of one cluster: membership, routing, relays, calls between peers, drain and rebalancing."""
