// What every kernel shares: vector loads, asynchronous copies, warp sums and tensor-core products;
// number formats come along.
//
// Each function that needs a GPU instruction has two bodies: PTX for the device, and one for the
// host emulation. Kernels themselves have one source and never ask which of the two they run on.
// Shared memory is dynamic only (`shared_memory`), its size told by the launcher.
#pragma once

#include "formats.cuh"
#include "overlap.cuh"

// ---- the cache --------------------------------------------------------------------------------

// A block of a head's keys or values in e4m3: codes [16, D], then a scale for each token.
template <int D>
struct Fp8Block {
    static constexpr int CODES = BLOCK_TOKENS * D;
    static constexpr int SCALES = BLOCK_TOKENS * static_cast<int>(sizeof(float));
    static constexpr int BYTES = CODES + SCALES;
};

// ---- memory ---------------------------------------------------------------------------------

// 16 bytes: what one thread moves at a time.
struct alignas(16) Bytes16 {
    uint32_t words[4];
};

DEVICE Bytes16 load16(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const Bytes16*>(simt::aligned(from, 16));
#else
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
#endif
}

// As load16, for global memory that is read once: past the L1. Volatile, so that it stays behind a
// wait for the launch that writes there.
DEVICE Bytes16 load16_stream(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return load16(from);
#else
    Bytes16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(from));
    return v;
#endif
}

// Two neighbouring bf16.
DEVICE uint32_t load_pair(const bf16* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const uint32_t*>(simt::aligned(from, 4));
#else
    return *reinterpret_cast<const uint32_t*>(from);
#endif
}

// As load16, for global memory that other blocks of this kernel have written: past the L1.
DEVICE Bytes16 load16_shared_by_blocks(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return load16(from);
#else
    Bytes16 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(from)
                 : "memory");
    return v;
#endif
}

DEVICE float load_shared_by_blocks(const float* from) {
#ifdef LOCKSTEP_EMULATE
    return *from;
#else
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
#endif
}

DEVICE void store16(void* to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    *static_cast<Bytes16*>(const_cast<void*>(simt::aligned(to, 16))) = v;
#else
    *static_cast<uint4*>(to) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
#endif
}

// As store16, for global memory, and one instruction always: behind branches the compiler takes the
// other one apart.
DEVICE void store16_global(void* to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    store16(to, v);
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
#endif
}

// 8 bytes, where 16 would be more than a thread has.
struct alignas(8) Bytes8 {
    uint32_t words[2];
};

DEVICE Bytes8 load8(const void* from) {
#ifdef LOCKSTEP_EMULATE
    return *static_cast<const Bytes8*>(simt::aligned(from, 8));
#else
    const uint2 v = *static_cast<const uint2*>(from);
    return {{v.x, v.y}};
#endif
}

DEVICE void store8(void* to, const Bytes8& v) {
#ifdef LOCKSTEP_EMULATE
    *static_cast<Bytes8*>(const_cast<void*>(simt::aligned(to, 8))) = v;
#else
    *static_cast<uint2*>(to) = make_uint2(v.words[0], v.words[1]);
#endif
}

// The block's dynamic shared memory, aligned to 1024 bytes. Its contents are undefined at first.
template <typename T>
DEVICE T* shared_memory() {
#ifdef LOCKSTEP_EMULATE
    return static_cast<T*>(simt::shared(sizeof(T)));
#else
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    return reinterpret_cast<T*>(dynamic_shared);
#endif
}

// An address in shared memory, for arithmetic in 32 bits.
#ifdef LOCKSTEP_EMULATE
using SharedAddress = uintptr_t;
DEVICE SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
#else
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

DEVICE float load_float_shared(SharedAddress from) {
#ifdef LOCKSTEP_EMULATE
    return *reinterpret_cast<const float*>(simt::aligned(reinterpret_cast<const void*>(from), 4));
#else
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
    return v;
#endif
}

DEVICE void store_float_shared(SharedAddress to, float x) {
#ifdef LOCKSTEP_EMULATE
    *reinterpret_cast<float*>(const_cast<void*>(
        simt::aligned(reinterpret_cast<const void*>(to), 4))) = x;
#else
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
#endif
}

DEVICE Bytes8 load8_shared(SharedAddress from) {
#ifdef LOCKSTEP_EMULATE
    return load8(reinterpret_cast<const void*>(from));
#else
    Bytes8 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.words[0]), "=r"(v.words[1])
                 : "r"(from)
                 : "memory");
    return v;
#endif
}

DEVICE Bytes16 load16_shared(SharedAddress from) {
#ifdef LOCKSTEP_EMULATE
    return load16(reinterpret_cast<const void*>(from));
#else
    Bytes16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "r"(from)
                 : "memory");
    return v;
#endif
}

DEVICE void store16_shared(SharedAddress to, const Bytes16& v) {
#ifdef LOCKSTEP_EMULATE
    store16(reinterpret_cast<void*>(to), v);
#else
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.words[0]),
                 "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
#endif
}

// Copies 16 bytes from global to shared memory in the background; zeros where `valid` is false,
// and then `from` is not read. Visible to this thread after cp_async_wait, to others after a
// barrier behind it.
DEVICE void cp_async_16(SharedAddress shared, const void* global, bool valid = true) {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async(reinterpret_cast<void*>(shared), global, 16, valid);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
#endif
}
DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
    cp_async_16(shared_address(shared), global, valid);
}

// As cp_async_16, of what is read once: it leaves the L2 first.
DEVICE void cp_async_16_once(void* shared, const void* global) {
#ifdef LOCKSTEP_EMULATE
    cp_async_16(shared, global);
#else
    asm volatile(
        "{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, once;\n}" ::"r"(
            shared_address(shared)),
        "l"(global)
        : "memory");
#endif
}

// Ends a group of copies.
DEVICE void cp_async_commit() {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are unfinished.
template <int pending>
DEVICE void cp_async_wait() {
#ifdef LOCKSTEP_EMULATE
    simt::cp_async_wait(pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- barriers and warps ---------------------------------------------------------------------

// A barrier of `threads` threads (whole warps) with a number of its own, 1 to 15.
DEVICE void named_barrier(int id, int threads) {
#ifdef LOCKSTEP_EMULATE
    simt::named_barrier(id, threads);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Sum over the lanes of aligned groups of `width` lanes; every lane gets it. Every lane of the warp
// takes part. The order is fixed.
template <int width = WARP, typename T>
DEVICE T warp_sum(T x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <int width = WARP>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = width / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

DEVICE uint64_t warp_max_key(uint64_t x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL_LANES, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// The sum over this lane and those before it.
template <typename T>
DEVICE T warp_prefix(T x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const T other = __shfl_up_sync(ALL_LANES, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

// Sum over a block of `threads` threads, a multiple of 32, in a fixed order; every thread gets it.
// `scratch`: threads / 32 floats of shared memory, not in use by others.
template <int threads>
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if constexpr (threads > WARP) {
        __syncthreads();
        if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
        __syncthreads();
        x = 0.0f;
        for (int w = 0; w < threads / WARP; ++w) x += scratch[w];
    }
    return x;
}

// ---- tensor cores ---------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements from shared memory into a warp's registers: lane l gives the
// address of row l % 8 of matrix l / 8, 16 bytes aligned; matrix i lands in r[i], where lane l has
// row l / 4, columns 2 (l % 4) and the next (PTX ISA, ldmatrix).
DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
#ifdef LOCKSTEP_EMULATE
    simt::ldmatrix_x4(r, reinterpret_cast<const void*>(row), false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    ldmatrix_x4(r, shared_address(row));
}

// As ldmatrix_x4, each matrix transposed.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
#ifdef LOCKSTEP_EMULATE
    simt::ldmatrix_x4(r, reinterpret_cast<const void*>(row), true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    ldmatrix_x4_trans(r, shared_address(row));
}

// d [16, 8] += a [16, 16] · b [16, 8] for a warp: bf16 in, f32 sums. Lane l with g = l / 4 and
// t = l % 4 holds a: {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, two columns a
// register; b: {(2t.., g), (2t + 8.., g)}, two rows a register; d: {(g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1)} (PTX ISA, mma.m16n8k16).
DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LOCKSTEP_EMULATE
    simt::mma_16816(d, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// As mma_16816, of f16.
DEVICE void mma_16816_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef LOCKSTEP_EMULATE
    simt::mma_16816_f16(d, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
