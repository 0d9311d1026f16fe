#!/bin/sh
# The long forms of the tests of crashes: power losses, killed processes, opens, changed bits. Usage: all.sh PYTHON
# IMAGES is about how many power losses are simulated, KILLS how many processes are killed of each kind.
set -eu
python=$(realpath -s "$1")
kills=${KILLS:-1000}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"

KVMMAP_HISTORIES=$((${IMAGES:-200000} / 20)) "$python" -m pytest -s test_crash.py # some 23 images each
KVMMAP_STATE_HISTORIES=$((${IMAGES:-200000} / 1200 * 17)) "$python" -m pytest -s test_crash_states.py # 60 images each
KVMMAP_OPENS=10000 "$python" -m pytest test_handles.py -k nothing_behind
KVMMAP_EVERY_BIT=1 "$python" -m pytest test_damage.py -k every_byte
"$python" -m soak.kills --kills "$kills"
"$python" -m soak.kills --inherited 300 --kills "$kills"
"$python" -m soak.states --kills "$kills"
"$python" -m soak.library --kills "$kills"
KVMMAP_LIBRARY_EXAMPLES=200 "$python" -m pytest test_library_stateful.py
