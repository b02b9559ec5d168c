#!/bin/sh
# haproxy: a configuration whose maxconn needs more files than there are is "valid", and then does not start.
#
# Version:   haproxy 2.6.12-1+deb12u4 (Debian 12)
# Behavior:  haproxy -c says that the configuration is valid and exits with 0; haproxy -f with the same file and limit ends
#            at once with an alert. "no strict-limits" turns it into a warning. Without maxconn it starts: the number is
#            derived from the limit of open files.
# Guess:     -c under the same limit finds what prevents the start; or the start lowers maxconn and warns, as releases
#            before 2.3 did.
# Source:    https://docs.haproxy.org/2.6/configuration.html, "maxconn" and "strict-limits" of the section "global"
# Output:
#            maxconn 200000, 20000 files: check 0, start 1
#            maxconn 200000, 20000 files, no strict-limits: check 0, start runs
#            without maxconn, 20000 files: check 0, start runs
#
# So a reload after "haproxy -c" may fail on a machine, or in a container, with fewer files than the one it was written on.
set -eu
folder=$(mktemp -d)
chmod 755 "$folder"
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && apt-get download -qq haproxy=2.6.12-1+deb12u4 >/dev/null && dpkg-deb -x haproxy_*.deb haproxy)
haproxy="$folder/haproxy/usr/sbin/haproxy"
configuration() {
    cat <<CONFIGURATION
global
$1
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend clients
    bind unix@$folder/socket
CONFIGURATION
}
try() {
    configuration "$2" >"$folder/haproxy.cfg"
    check=0 start=0
    (ulimit -n 20000 && exec "$haproxy" -c -f "$folder/haproxy.cfg") >/dev/null 2>&1 || check=$?
    # timeout(1) exits with 124 if it had to end the program.
    (ulimit -n 20000 && exec timeout 2 "$haproxy" -db -f "$folder/haproxy.cfg") >/dev/null 2>&1 || start=$?
    [ "$start" != 124 ] || start=runs
    echo "$1: check $check, start $start"
}
{
    try "maxconn 200000, 20000 files" "    maxconn 200000"
    try "maxconn 200000, 20000 files, no strict-limits" "    maxconn 200000
    no strict-limits"
    try "without maxconn, 20000 files" "    nbthread 1"
} >"$folder/output"
cat "$folder/output"
diff - "$folder/output" <<'EXPECTED'
maxconn 200000, 20000 files: check 0, start 1
maxconn 200000, 20000 files, no strict-limits: check 0, start runs
without maxconn, 20000 files: check 0, start runs
EXPECTED
