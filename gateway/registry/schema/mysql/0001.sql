-- Oldest program: 1
-- Times are UTC, by this server's clock.
-- Each statement can be carried out again: a server does not undo them when one behind them fails.
-- AUTO_INCREMENT: the number of a node that is gone is never given to another, so that no row changes hands by itself.
CREATE TABLE IF NOT EXISTS nodes (
    id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    node_id CHAR(36) CHARACTER SET ascii COLLATE ascii_bin NOT NULL UNIQUE,
    name TEXT NOT NULL,
    public_url TEXT NOT NULL,
    peer_url TEXT NOT NULL,
    state VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    clients INT UNSIGNED NOT NULL,
    capacity INT UNSIGNED NOT NULL,
    started_at DATETIME(6) NOT NULL,
    heartbeat_at DATETIME(6) NOT NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- Where a client is. VARBINARY: ids are compared byte by byte. No index on node: it would add to the cost of every claim
-- and release, and only the end of a node asks by node, which walks the table in pieces.
-- One row for each client, by its key, and no statement that needs the rows of two at once: it can be sharded by it.
CREATE TABLE IF NOT EXISTS clients (
    client_id VARBINARY(128) NOT NULL PRIMARY KEY,
    node INT UNSIGNED NOT NULL,
    generation BIGINT UNSIGNED NOT NULL,
    connected_at DATETIME(6) NOT NULL,
    address VARCHAR(255) NOT NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- Where a client should be.
CREATE TABLE IF NOT EXISTS placements (
    client_id VARBINARY(128) NOT NULL PRIMARY KEY,
    node INT UNSIGNED NOT NULL,
    until DATETIME(6) NOT NULL,
    moved_at DATETIME(6) NOT NULL
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
