"""The registry of nodes, clients and assignments, in an SQL database.

    sql.py          the registry
    statements.py   its SQL statements
    dialect.py      what differs between databases; implemented by sqlite.py and mysql.py
"""
