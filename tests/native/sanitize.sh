#!/bin/sh
# Runs the tests that use the compiled core, and the fuzzer, with a core built under GCC's address and undefined-behaviour
# sanitizers; before that the native checks. Usage: sanitize.sh PYTHON, where `release/environment.py sanitize` made PYTHON.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
tests=$here/..
python=$(realpath -s "$1")
modules="attention cache copying file fork format golden layer properties quantize repair residency soak stateful
    statistics tensors threads verified_blocks zarr"

"$here/run.sh"
"$here/race.sh"

# Leaks are looked for by the native checks, where every allocation is ours: an interpreter leaves thousands when it ends,
# each through Python's frames, so that no list of exceptions could tell ours from its own. PYTHONMALLOC=malloc lets the
# sanitizer see where small buffers end.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
cd "$tests"
# shellcheck disable=SC2046
"$python" -m pytest $(for module in $modules; do echo "test_$module.py"; done)
"$python" -m fuzz.run --executions 5000 --unbounded
