"""The registry of nodes, clients and assignments, in an SQL database."""
