// What only sm_90a has: warpgroup products (wgmma), bulk copies, fences between proxies and
// registers that move between warpgroups; and barriers in shared memory (mbarrier), which sm_80 has
// too.
//
// As in common.cuh, each function has a PTX body and one for the emulation (`simt_hopper.h`). The
// semantics, descriptors and fragment layouts are those of the PTX ISA's chapters on
// wgmma.mma_async and mbarrier.
//
// Shared operands lie in panels: rows of 64 bf16 (128 bytes), one after another, the first at an
// address that is a multiple of 1024, the 16-byte chunk c of row r stored as chunk c ^ (r % 8)
// (the 128-byte swizzle; `swizzled`). Eight rows that are read or written at the same column, and
// eight chunks of one row, then lie in different banks.
#pragma once

#include "common.cuh"

// HOPPER_KERNEL(name, Args, threads, body): a kernel that calls body(args) on sm_90a and is a trap
// elsewhere; launchers choose it by the device's compute capability. One block an SM: setmaxnreg
// wants to be told.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_KERNEL(name, Args, threads, body) \
    KERNEL(name, Args, threads, 1) { body(args); }
#else
#define HOPPER_KERNEL(name, Args, threads, body) \
    KERNEL(name, Args, threads, 1) { __trap(); }
#endif

constexpr int WARPGROUP = 128;
constexpr int PANEL_COLS = 64;        // bf16 in a row of a panel
constexpr int PANEL_ROW_BYTES = 128;  // one row
constexpr int PANEL_GROUP_BYTES = 8 * PANEL_ROW_BYTES;  // eight rows: where the swizzle repeats

// Where the 16-byte chunk `chunk` of row `row` of a panel lies, in bytes from the panel's start.
DEVICE int swizzled(int row, int chunk) { return row * PANEL_ROW_BYTES + ((chunk ^ row % 8) << 4); }

// ---- barriers -------------------------------------------------------------------------------

// Counts arrivals in phases; eight bytes of shared memory. A phase ends with its last arrival.
struct alignas(8) Barrier {
    uint64_t state;
};

// By one thread, before a __syncthreads that others wait for.
DEVICE void barrier_init(Barrier* barrier, int arrivals) {
#ifdef LOCKSTEP_EMULATE
    simt::mbarrier_init(&barrier->state, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
#endif
}

// One arrival; what this thread did before is visible to those that wait for the phase.
DEVICE void barrier_arrive(Barrier* barrier) {
#ifdef LOCKSTEP_EMULATE
    simt::mbarrier_arrive(&barrier->state);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
#endif
}

// One arrival once all cp.async of this thread so far have landed; the thread goes on at once.
DEVICE void barrier_arrive_copies(Barrier* barrier) {
#ifdef LOCKSTEP_EMULATE
    simt::mbarrier_arrive_copies(&barrier->state);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                     shared_address(barrier))
                 : "memory");
#endif
}

// Waits for the end of the phase with this parity: 0, 1, 0, … from the first on. Parity 1 of a
// fresh barrier counts as ended.
DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
#ifdef LOCKSTEP_EMULATE
    simt::mbarrier_wait(&barrier->state, parity);
#else
    uint32_t ended = 0;
    while (!ended) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MBARRIER_TRY "mbarrier.try_wait"
#else
#define MBARRIER_TRY "mbarrier.test_wait"
#endif
        asm volatile(
            "{\n.reg .pred ended;\n" MBARRIER_TRY
            ".parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
#endif
}

// Barriers that this thread has initialised are there for bulk copies too, once a __syncthreads
// follows.
DEVICE void barriers_made() {
#if !defined(LOCKSTEP_EMULATE) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Whether weights move by bulk copies: where the device has them. Only the emulation, which has
// both, asks what the launcher says.
DEVICE bool moves_in_bulk(uint32_t said) {
#if defined(LOCKSTEP_EMULATE)
    return said != 0;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return static_cast<void>(said), true;
#else
    return static_cast<void>(said), false;
#endif
}

// One arrival; the phase ends no sooner than `bytes` more of bulk copies, which begin after it,
// have landed.
DEVICE void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
#if defined(LOCKSTEP_EMULATE)
    simt::mbarrier_arrive_expect(&barrier->state, bytes);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#else
    static_cast<void>(barrier), static_cast<void>(bytes);
    __trap();
#endif
}

// Copies `bytes`, a multiple of 16, from global memory that is read once to shared memory in the
// background, both aligned to 16 bytes; whoever waits for the phase of `barrier` that expects them
// sees them.
DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
#if defined(LOCKSTEP_EMULATE)
    simt::bulk_copy(to, from, bytes, &barrier->state);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], once;\n}" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#else
    static_cast<void>(to), static_cast<void>(from), static_cast<void>(bytes);
    static_cast<void>(barrier);
    __trap();
#endif
}

// Arrives at a named barrier (common.cuh) without waiting there.
DEVICE void named_barrier_arrive(int id, int threads) {
#ifdef LOCKSTEP_EMULATE
    simt::named_barrier_arrive(id, threads);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// What ordinary instructions (cp.async too) wrote to shared memory and this thread knows of, wgmma
// that it starts after this sees. wgmma reads through another proxy, so a barrier is not enough.
DEVICE void fence_async_proxy() {
#ifdef LOCKSTEP_EMULATE
    simt::fence_async_proxy();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Stores 16 bytes of an operand, which wgmma sees once this thread has fenced and its reader knows.
DEVICE void store16_operand(SharedAddress to, const Bytes16& v) {
    store16_shared(to, v);
#ifdef LOCKSTEP_EMULATE
    simt::note_operand(reinterpret_cast<void*>(to), 16);
#endif
}

// ---- registers ------------------------------------------------------------------------------

// The warpgroup's threads give registers back until they have `count`.
template <int count>
DEVICE void registers_shrink() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "what setmaxnreg takes");
#ifdef LOCKSTEP_EMULATE
    simt::setmaxnreg(count, false);
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// The warpgroup's threads wait for registers that others gave back.
template <int count>
DEVICE void registers_grow() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "what setmaxnreg takes");
#ifdef LOCKSTEP_EMULATE
    simt::setmaxnreg(count, true);
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// ---- warpgroup products ---------------------------------------------------------------------

// Before the first wgmma, and before one that follows a change of its registers.
DEVICE void wgmma_fence() {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
DEVICE void wgmma_commit() {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `pending` groups are unfinished. Until its group is, a product's registers
// and shared operands are the tensor core's: neither read nor written.
template <int pending>
DEVICE void wgmma_wait() {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma_wait(pending);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// Keeps the compiler from moving accesses of registers over the fences and waits around it, which
// it does not know to concern them.
template <int n>
DEVICE void hold_registers(float (&x)[n]) {
#ifdef LOCKSTEP_EMULATE
    static_cast<void>(x);
#else
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(x[i])::"memory");
#endif
}

template <int n, int m>
DEVICE void hold_registers(uint32_t (&x)[n][m]) {
#ifdef LOCKSTEP_EMULATE
    static_cast<void>(x);
#else
#pragma unroll
    for (int i = 0; i < n * m; ++i) asm volatile("" : "+r"(x[i / m][i % m])::"memory");
#endif
}

// `x`, which is not negative, is computed before what follows: on it hangs a store to `shared` that
// never happens. Else the assembler, which sees no reason against it, moves a wait for products
// above arithmetic that was meant to run beside them.
DEVICE void settle(float x, void* shared) {
#ifdef LOCKSTEP_EMULATE
    static_cast<void>(x), static_cast<void>(shared);
#else
    asm volatile(
        "{\n.reg .pred below;\nsetp.lt.f32 below, %0, 0f00000000;\n"
        "@below st.shared.f32 [%1], %0;\n}" ::"f"(x),
        "r"(shared_address(shared))
        : "memory");
#endif
}

// The descriptor of an operand in panels from `start` on, 128-byte swizzle. `group_bytes` from
// eight rows to the next eight; `panel_bytes` from a panel to the next one: used where rows run
// along K (transposed), and without meaning where they do not, for there the sixteen K of one
// product lie within one panel.
DEVICE uint64_t wgmma_descriptor(const void* start, int panel_bytes,
                                 int group_bytes = PANEL_GROUP_BYTES) {
#ifdef LOCKSTEP_EMULATE
    const uint32_t address = simt::shared_address(start);
#else
    const uint32_t address = shared_address(start);
#endif
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
           static_cast<uint64_t>(panel_bytes >> 4) << 16 |
           static_cast<uint64_t>(group_bytes >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// The same operand `bytes` further.
DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
    return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Lists of asm operands: eight registers, and the constraints of eight accumulators.
#define WGMMA_8(a, b, c, d, e, f, g, h) \
    "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define WGMMA_D32                                                                        \
    WGMMA_8(0, 1, 2, 3, 4, 5, 6, 7) ", " WGMMA_8(8, 9, 10, 11, 12, 13, 14, 15) ", "      \
    WGMMA_8(16, 17, 18, 19, 20, 21, 22, 23) ", " WGMMA_8(24, 25, 26, 27, 28, 29, 30, 31)
#define WGMMA_D64                                                                           \
    WGMMA_D32 ", " WGMMA_8(32, 33, 34, 35, 36, 37, 38, 39) ", "                             \
    WGMMA_8(40, 41, 42, 43, 44, 45, 46, 47) ", " WGMMA_8(48, 49, 50, 51, 52, 53, 54, 55) ", " \
    WGMMA_8(56, 57, 58, 59, 60, 61, 62, 63)
#define WGMMA_INOUT8(d, i)                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),          \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_INOUT32(d, i) \
    WGMMA_INOUT8(d, i), WGMMA_INOUT8(d, i + 8), WGMMA_INOUT8(d, i + 16), WGMMA_INOUT8(d, i + 24)

// d [64, 128] = a [64, 16] · b [128, 16]ᵀ, or += where `accumulate`: bf16 in, f32 sums, both from
// shared memory with rows along K. Thread t of the warpgroup holds of d, with w = t / 32,
// g = t % 32 / 4, c = t % 4: d[4 j + 2 h + i] is row 16 w + g + 8 h, column 8 j + 2 c + i.
// Asynchronous: between wgmma_fence and wgmma_commit.
DEVICE void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma({d, 64, nullptr, a, b, false, accumulate});
#else
    asm volatile(
        "{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D64
        "}, %64, %65, more, 1, 1, 0, 0;\n}"
        : WGMMA_INOUT32(d, 0), WGMMA_INOUT32(d, 32)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
#endif
}

// d [64, N] += a [64, 16] · b [16, N] with a in registers and b in shared memory with rows along N
// (transposed). Warp w's a holds rows 16 w … 16 w + 15 as mma_16816 wants them: columns 8 j + 2 c
// and the next of a wgmma's result, packed, are one register of it. Asynchronous, as above.
DEVICE void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma({d, 64, a, 0, b, true, true});
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D64
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : WGMMA_INOUT32(d, 0), WGMMA_INOUT32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

DEVICE void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#ifdef LOCKSTEP_EMULATE
    simt::wgmma({d, 32, a, 0, b, true, true});
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_D32
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : WGMMA_INOUT32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
