#!/bin/sh
# The fuzzer at full length, on inputs of each kind. Usage: all.sh PYTHON; EXECUTIONS is how many files are tried.
set -eu
python=$(realpath -s "$1")
executions=${EXECUTIONS:-1000000}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"

"$python" -m fuzz.run --executions "$executions"
"$python" -m fuzz.run --groups --executions $((executions / 50))
"$python" -m fuzz.run --tensors --executions $((executions / 20))
"$python" -m fuzz.run --states --executions $((executions / 20))
"$python" -m fuzz.run --children --executions $((executions / 20))
"$python" -m fuzz.run --checkpoints --executions $((executions / 20))
"$python" -m fuzz.urls --keys "$executions"
"$python" -m fuzz.commands --count $((executions / 50))
