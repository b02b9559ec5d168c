"""The nodes of one fleet: membership, routing, relays, calls between peers, drain and rebalancing."""
