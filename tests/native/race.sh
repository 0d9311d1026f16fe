#!/bin/sh
# Builds the race checks with ThreadSanitizer, and runs them. Usage: race.sh [build directory [quick]]
# "quick" compiles attention with AVX-512 and AMX, which takes a minute, without, as run.sh does: the checks run every
# kernel one after the other.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
core=$here/../../kvmmap/_core
build=${1:-$here/../../build/native} quick=${2:-}
checks="parallel race recent"
mkdir -p "$build"
. "$here/objects.sh"

# Fences are none of what ThreadSanitizer knows; the words' acquire and release are. What the recent window's fences order is
# checked between processes, which it does not look at.
objects=
for source in "$core/cpu.cpp" "$core/io.cpp" "$core/parallel.cpp" "$core"/rows*.cpp "$core"/codec*.cpp "$core"/attend*.cpp "$core"/hash*.cpp \
    "$core/first_read.cpp" "$core/recent.cpp" "$core/merge.cpp" "$core"/digest*.cpp "$here/parallel_check.cpp" \
    "$here/race_check.cpp" "$here/recent_check.cpp"; do
    unit=$(basename "$source" .cpp)
    case $(uname -m)/$unit in
        x86_64/*neon | aarch64/*avx* | aarch64/*_amx) continue ;;
        */*_avx2) isa="-mavx2 -mfma -mf16c" ;;
        */*_avx512) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c \
            -Wno-maybe-uninitialized -Wno-uninitialized" ;;
        */*_amx) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mamx-tile -mamx-int8 \
            -Wno-maybe-uninitialized -Wno-uninitialized" ;;
        *) isa= ;;
    esac
    flags="-Wno-tsan -O1 -g -fsanitize=thread"
    case $quick/$unit in quick/attend*_avx512 | quick/attend_amx) flags=-O1 ;; esac
    # shellcheck disable=SC2086
    set -- "${CXX:-g++}" -std=c++17 -Wall -Wextra -ffp-contract=off $flags $isa
    name_object "$source" "$@"
    compile_object "$object" "$source" "$@" &
    case $unit in
        parallel_check) parallel_check=$object ;;
        race_check) race_check=$object ;;
        recent_check) recent_check=$object ;;
        *) objects="$objects $object" ;;
    esac
done
wait
for check in $checks; do
    case $check in
        parallel) program=$parallel_check ;;
        race) program=$race_check ;;
        recent) program=$recent_check ;;
    esac
    # shellcheck disable=SC2086
    "${CXX:-g++}" -fsanitize=thread $objects "$program" -pthread -o "$build/$check-race"
    TSAN_OPTIONS="halt_on_error=1 exitcode=66 ${TSAN_OPTIONS:-}" "$build/$check-race"
done
