#!/bin/sh
# Create the virtual environment for the tests, the documentation and the demo: make_venv.sh PYTHON FOLDER
set -eu
python=$1
venv=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "wsgateway needs Python 3.10 or newer; $python is $("$python" -V 2>&1). Name another one: make PYTHON=python3.11" >&2
    exit 1
}
# Debian packages ensurepip separately, in python3-venv.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || {
        echo "$python has no venv module: install it (Debian: apt-get install python3-venv)" >&2
        exit 1
    }
fi
"$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade pip
pip install --editable '.[test,docs]'
