#!/bin/sh
# Create the virtual environment for the Autobahn test suite, which is Python 2 code:
# make_venv27.sh PYTHON FOLDER [PYTHON27]
# PYTHON is a Python 3 with pip. PYTHON27 is a CPython 2.7; the default is to search for one.
set -eu
python=$1
venv=$2
wanted=${3:-}

is_27() {
    "$1" -c 'import platform, sys
sys.exit(sys.version_info[:2] != (2, 7) or platform.python_implementation() != "CPython")' 2>/dev/null
}

find_27() {
    if [ -n "$wanted" ]; then
        is_27 "$wanted" && echo "$wanted"
        return
    fi
    for each in python2.7 python2 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7*/bin/python2.7; do
        if is_27 "$each"; then
            echo "$each"
            return
        fi
    done
    return 1
}

python27=$(find_27) || {
    if [ -n "$wanted" ]; then
        why="$wanted is not one"
    else
        why="python2.7, python2 and pyenv do not provide one"
    fi
    echo "conformance: the Autobahn test suite needs CPython 2.7, and $why. Install it (pyenv install 2.7.18)," \
        "or name its path: make conformance PYTHON27=/path/to/python2.7" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# virtualenv 20.22 dropped support for Python 2.7.
"$python" -m pip --quiet --disable-pip-version-check install --target "$work" 'virtualenv<20.22'
PYTHONPATH=$work "$python" -m virtualenv --quiet --clear --no-periodic-update --python "$python27" "$venv"
# -W: silence pip's warning about the end of life of Python 2.7.
"$venv/bin/python" -W ignore -m pip --quiet --disable-pip-version-check install autobahntestsuite==25.10.1 || {
    echo "conformance: could not install autobahntestsuite; some of its dependencies are compiled: check that there is a C compiler" >&2
    exit 1
}
"$venv/bin/wstest" --autobahnversion
