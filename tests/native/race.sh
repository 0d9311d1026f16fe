#!/bin/sh
# Builds the race check with ThreadSanitizer, and runs it. Usage: race.sh [build directory]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
core=$here/../../kvmmap/_core
build=${1:-$here/../../build/native}
mkdir -p "$build"

# Fences are none of what ThreadSanitizer knows; the words' acquire and release are.
objects=
for source in "$core/cpu.cpp" "$core/io.cpp" "$core"/rows*.cpp "$core"/attend*.cpp "$here/race_check.cpp"; do
    unit=$(basename "$source" .cpp)
    case $(uname -m)/$unit in
        x86_64/*neon | aarch64/*avx*) continue ;;
        */*_avx2) isa="-mavx2 -mfma -mf16c" ;;
        */*_avx512) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c \
            -Wno-maybe-uninitialized -Wno-uninitialized" ;;
        *) isa= ;;
    esac
    # shellcheck disable=SC2086
    "${CXX:-g++}" -std=c++17 -Wall -Wextra -Wno-tsan -ffp-contract=off -O1 -g -fsanitize=thread $isa \
        -c "$source" -o "$build/race-$unit.o" &
    objects="$objects $build/race-$unit.o"
done
wait
# shellcheck disable=SC2086
"${CXX:-g++}" -fsanitize=thread $objects -pthread -o "$build/race"
TSAN_OPTIONS="halt_on_error=1 exitcode=66 ${TSAN_OPTIONS:-}" "$build/race"
