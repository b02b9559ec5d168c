"""JSON-RPC 2.0 calls between clients and backends: dispatch, delivery through other nodes, and calls in flight."""
