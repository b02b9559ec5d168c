#!/bin/sh
# Sees to it that the programs of a MariaDB server are there, which tests start for themselves.
set -eu
PATH=$PATH:/usr/sbin:/usr/local/sbin

missing() {
    ! command -v mariadbd >/dev/null || ! command -v mariadb-install-db >/dev/null
}

if missing && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        mariadb-server-core mariadb-client-core >/dev/null
fi
if missing; then
    echo "MariaDB is missing: apt-get install --no-install-recommends mariadb-server-core mariadb-client-core" >&2
    exit 1
fi
