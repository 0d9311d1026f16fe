#!/bin/sh
# Builds and runs the native checks: plainly, under the address and undefined-behaviour sanitizers, and for AArch64 under
# qemu where there are a cross compiler and an emulator. Usage: run.sh [build directory [quick|aarch64]]
# "quick" is what the ordinary tests run: only under the sanitizers, which AVX-512's attention is compiled without, because
# that takes minutes. The plain build adds little to it: other tests run those kernels as they are installed. "aarch64": those
# of AArch64 alone, and the instructions that attention takes with each.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
core=$here/../../kvmmap/_core
build=${1:-$here/../../build/native} quick=${2:-}
mkdir -p "$build"
. "$here/objects.sh"
families="rows codec attend sketch" program=check

# compile NAME COMPILER FLAGS...: every kernel file with the flags CMakeLists.txt gives it, then a program of each family.
compile() {
    name=$1 compiler=$2
    shift 2
    all=$*
    for family in $families; do
        objects=
        case $family in
            codec) parts="rows codec" ;;
            attend) parts="rows codec hash attend" ;;
            *) parts=$family ;;
        esac
        sources="$core/cpu.cpp $core/parallel.cpp $here/${family}_$program.cpp"
        case $family in attend) sources="$sources $core/first_read.cpp" ;; esac
        for part in $parts; do sources="$sources $core/$part.cpp $(echo "$core/$part"_*.cpp)"; done
        for source in $sources; do
            unit=$(basename "$source" .cpp)
            case $name/$unit in
                aarch64*/*avx*|aarch64*/*_amx|native*/*neon|sanitized/*neon) continue ;;
            esac
            case $unit in
                *_avx2) isa="-mavx2 -mfma -mf16c" ;;
                *_avx512) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c \
                    -Wno-maybe-uninitialized -Wno-uninitialized" ;;
                *_amx) isa="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi -mfma -mf16c \
                    -mamx-tile -mamx-int8 \
                    -Wno-maybe-uninitialized -Wno-uninitialized" ;;
                *_dotprod_neon) isa="-march=armv8.2-a+dotprod" ;;
                *_i8mm_neon) isa="-march=armv8.2-a+dotprod+i8mm" ;;
                *_check | *_count) isa=-fno-tree-vectorize ;;  # GCC 12 for AArch64 fails on it, and nothing here is measured
                *) isa= ;;
            esac
            flags=$all
            case $quick/$unit in quick/attend*_avx512 | quick/attend_amx) flags=-O1 ;; esac
            # shellcheck disable=SC2086
            set -- "$compiler" -std=c++17 -Wall -Wextra -ffp-contract=off $flags $isa
            name_object "$source" "$@"
            compile_object "$object" "$source" "$@"
            objects="$objects $object"
        done
        # shellcheck disable=SC2086
        $compiler $all $objects -pthread -o "$build/$name-$family"
    done
}

# check_aarch64 COMPILER FLAGS...: the checks, under $emulator if there is one.
check_aarch64() {
    compile aarch64 "$@" -DKVMMAP_BYTE_PRODUCTS -O3
    for family in $families; do $emulator "$build/aarch64-$family"; done
}

# count_aarch64 COMPILER FLAGS...: the instructions that attention takes with each kernel, from the lines that the emulator
# writes for each, over 192 positions less those over 64.
count_aarch64() {
    families=attend program=count
    compile aarch64-count "$@" -DKVMMAP_BYTE_PRODUCTS -O3
    run() { $emulator -singlestep -d exec,nochain -D /dev/stderr "$build/aarch64-count-attend" "$@" 2>&1 | wc -l; }
    echo "instructions a position and row of queries, head_dim 128:"
    for bits in 32 16; do
        for group in 1 4 8; do
            for kernel in neon dotprod i8mm; do
                more=$(run $kernel $group $bits 192) less=$(run $kernel $group $bits 64)
                echo "  queries of $bits bits, $group a KV head, $kernel: $(((more - less) / 128 / group))"
            done
        done
    done
}

host=$(uname -m)
emulator=
if [ "$host" = x86_64 ] && [ "$quick" != aarch64 ]; then
    compile sanitized "${CXX:-g++}" -DKVMMAP_AMX -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
    for family in $families; do "$build/sanitized-$family"; done
    [ -z "$quick" ] || exit 0
    compile native "${CXX:-g++}" -DKVMMAP_AMX -O3
    for family in $families; do "$build/native-$family"; done
fi
if [ "$host" = aarch64 ]; then
    check_aarch64 "${CXX:-g++}"
elif [ "$host" = x86_64 ]; then
    emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
    if command -v aarch64-linux-gnu-g++ >/dev/null && [ -n "$emulator" ]; then
        check_aarch64 aarch64-linux-gnu-g++ -static
        [ "$quick" != aarch64 ] || count_aarch64 aarch64-linux-gnu-g++ -static
    else
        echo "skipped: aarch64 (needs aarch64-linux-gnu-g++ and qemu-aarch64: Debian's g++-aarch64-linux-gnu and qemu-user-static)"
    fi
else
    echo "skipped: no vector kernels for $host"
fi
