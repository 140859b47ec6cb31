// What a kernel file is compiled for: a device, or the host emulation (`emulate/simt.h`), which
// runs the same kernels in tests on machines without a GPU.
//
// A kernel is declared with KERNEL: one argument, a struct that the launcher mirrors with
// `#[repr(C)]`.
#pragma once

#include <cstdint>

#ifdef LOCKSTEP_EMULATE
#include "simt.h"
#define DEVICE inline
#else
#define DEVICE __device__ __forceinline__
// KERNEL(name, Args, threads) { body; `args` is the argument }
// A fourth value is the number of blocks that an SM shall have room for: it limits registers.
#define KERNEL(name, Args, ...)                                \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) \
        name(const __grid_constant__ Args args)
#endif

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
// Tokens in one KV block; `BLOCK_TOKENS` of the crate.
constexpr int BLOCK_TOKENS = 16;
