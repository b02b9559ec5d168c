#!/bin/sh
# Check that the programs that tests start are installed: servers (MariaDB, BIND's named, haproxy, nginx, Apache), a browser
# (Chromium), and the programs that check deploy/ (systemd's, and curl). As root on Debian, install what is missing.
set -eu
PATH=$PATH:/usr/sbin:/usr/local/sbin

missing() {
    wanted=
    { command -v mariadbd && command -v mariadb-install-db; } >/dev/null ||
        wanted="mariadb-server-core mariadb-client-core"
    command -v named >/dev/null || wanted="$wanted bind9"
    command -v haproxy >/dev/null || wanted="$wanted haproxy"
    command -v nginx >/dev/null || wanted="$wanted nginx"
    command -v apache2 >/dev/null || wanted="$wanted apache2-bin"
    { command -v systemd-analyze && command -v systemd-sysusers; } >/dev/null || wanted="$wanted systemd"
    command -v curl >/dev/null || wanted="$wanted curl"
    { command -v chromium-headless-shell || command -v chromium || command -v google-chrome; } >/dev/null ||
        wanted="$wanted chromium-headless-shell"
    [ -n "$wanted" ]
}

if missing && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        # Keep the packages bind9, haproxy and nginx from starting servers for the whole machine.
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        trap 'rm -f $policy' EXIT
    fi
    apt-get update -qq
    # shellcheck disable=SC2086 # $wanted is a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted >/dev/null
fi
if missing; then
    echo "programs that the tests need are missing: apt-get install --no-install-recommends $wanted" >&2
    exit 1
fi
