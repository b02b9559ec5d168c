-- Oldest program: 1
-- Times are microseconds since 1970, by the clock of the machine that has the file.
-- AUTOINCREMENT: the number of a node that is gone is never given to another, so that no row changes hands by itself.
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    node_id CHAR(36) NOT NULL UNIQUE,
    name TEXT NOT NULL,
    public_url TEXT NOT NULL,
    peer_url TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('up', 'draining')),
    clients INTEGER NOT NULL CHECK (typeof(clients) = 'integer'),
    capacity INTEGER NOT NULL CHECK (typeof(capacity) = 'integer'),
    started_at INTEGER NOT NULL CHECK (typeof(started_at) = 'integer'),
    heartbeat_at INTEGER NOT NULL CHECK (typeof(heartbeat_at) = 'integer')
);

-- Where a client is. No index on node: it would double the cost of every claim and release, and only the end of a node
-- asks by node, which walks the table in pieces.
CREATE TABLE clients (
    client_id TEXT NOT NULL PRIMARY KEY,
    node INTEGER NOT NULL CHECK (typeof(node) = 'integer'),
    generation INTEGER NOT NULL CHECK (typeof(generation) = 'integer'),
    connected_at INTEGER NOT NULL CHECK (typeof(connected_at) = 'integer'),
    address TEXT NOT NULL
) WITHOUT ROWID;

-- Where a client should be.
CREATE TABLE placements (
    client_id TEXT NOT NULL PRIMARY KEY,
    node INTEGER NOT NULL CHECK (typeof(node) = 'integer'),
    until INTEGER NOT NULL CHECK (typeof(until) = 'integer'),
    moved_at INTEGER NOT NULL CHECK (typeof(moved_at) = 'integer')
) WITHOUT ROWID;
