"""What is said: JSON-RPC 2.0 messages, calls in flight, and the way of one call."""
