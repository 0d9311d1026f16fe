// Which instruction sets this machine can run, and which one the kernels use.
// A kernel family keeps a table indexed by Isa; a null entry means "not built here".
#pragma once

namespace kvmmap {

// amx has kernels of its own where tiles of bytes help, and those of avx512 elsewhere; so have dotprod and i8mm those of neon.
enum class Isa : int { portable = 0, neon = 1, dotprod = 2, i8mm = 3, avx2 = 4, avx512 = 5, amx = 6 };
constexpr int isa_count = 7;

const char* isa_name(Isa isa);

// True if this binary holds the kernels of `isa` and this processor (and system) can run them.
bool isa_available(Isa isa);

// The instruction set in use: the best available, or the one named by the environment variable
// KVMMAP_KERNEL at start-up, or by set_isa. Reading is one relaxed atomic load.
Isa current_isa();

// Returns false, and changes nothing, if `isa` is not available.
bool set_isa(Isa isa);

}  // namespace kvmmap
