"""A whole fleet in one process under simulated time, and what must never happen in it."""
