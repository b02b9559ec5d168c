"""The registry of nodes, clients and assignments, in an SQL database.

:mod:`~gateway.registry.sql` is the registry, :mod:`~gateway.registry.statements` has its SQL statements, and
:mod:`~gateway.registry.dialect` is the interface to what differs between databases, implemented in ``sqlite`` and
``mysql``.
"""
