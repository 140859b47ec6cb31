// A GPU for kernels in C++ on the host: one fiber a thread, blocks one after another.
//
// It exists to find wrong arithmetic, wrong indices and missing synchronisation, not to be fast.
// Threads are switched only where they wait (barriers, warp operations), in an order that the
// launch chooses, so that a result which depends on the order shows. Shared memory starts as NaNs.
// An asynchronous copy lands when it is waited for, not before. Lanes of a warp meet in each warp
// operation; lanes that meet in different ones, threads that wait for one that has ended or end
// before their copies have landed, arrivals at a barrier that nobody waits at, and kernels that are
// launched with the wrong arguments or shared memory are errors with a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace simt {

struct Index {
    unsigned x, y, z;
};

struct Thread {
    Index thread, block, block_size, grid_size;
};

// The thread that runs now. A bare pointer, which no access has to initialise first.
extern __thread const Thread* running;
inline const Thread& self() { return *running; }

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A kernel by name.
struct Kernel {
    const char* name;
    size_t args_size;
    unsigned threads;
    void (*run)(const void* args);
    const Kernel* next;
    Kernel(const char* name, size_t args_size, unsigned threads, void (*run)(const void*));
};

// Of what KERNEL says after its argument: blocks an SM mean nothing here.
constexpr unsigned threads_of(unsigned threads, unsigned = 0) { return threads; }

// The block's shared memory, of which at least `least` bytes are needed.
void* shared(size_t least);
void block_barrier(const char* what);
void named_barrier(int id, int threads);
void named_barrier_arrive(int id, int threads);

// Lanes `mask` of a warp meet in `what`, each with `mine`; the last one to come calls `finish` with
// everybody's (by lane) and all go on.
using Finish = void (*)(void* const (&all)[32], uint32_t mask);
void meet(const char* what, uint32_t mask, void* mine, Finish finish);
// Lanes `mask` of the running thread's warp see each other's writes from here on.
void order_lanes(uint32_t mask);
// As `meet`, for the 128 threads of an aligned group of four warps.
void meet_group(const char* what, void* mine, void (*finish)(void* const (&all)[128]));
// Waits until `ready(what)` holds, which another thread makes true.
void wait_until(const char* name, bool (*ready)(const void*), const void* what);

// An asynchronous copy.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    bool valid;
};

void cp_async(void* shared, const void* global, unsigned bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
// Every copy that this thread has begun, committed or not, for somebody else to land.
std::vector<Copy> cp_async_take();
void copy_now(const Copy& copy);
// Those of them that `thread` began and nobody has landed.
size_t copies_to_arrive(unsigned thread);
// Bulk copies of the block that nobody has landed: their threads need not wait, somebody must.
size_t bulk_copies_to_land();
// Copies that the block has begun take their bytes now: they may have landed long since.
void hold_begun_copies();
void hold_begun_arrivals();
void hold(Copy& copy);
// A copy of `thread` has landed; see `simt_hopper.h`.
void note_landing(const Copy& copy, unsigned thread);

// Waits until all launches before the running one are done; see `launch.cpp`.
void wait_prerequisites();

// Of the running block: bytes of shared memory, the order of its threads (0 in turn, 1 backwards,
// more: seeds), and a number that no other block has.
size_t shared_bytes();
uint32_t schedule();
uint64_t block_serial();

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
// As mma_16816, of f16.
void mma_16816_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Round to nearest even; NaNs stay NaNs.
inline uint16_t bf16_bits(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent's bias grows from 15 to 127; subnormals too.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// f16: round to nearest even, beyond 65504 infinity; NaNs stay NaNs.
inline uint16_t f16_bits(float x) {
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000u) {
        // Below 2^-14 in steps of 2^-24, as f32 counts from 0.5 on.
        const float rounded = bits_to_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

inline const void* aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("%zu-byte access at %p", bytes, p);
    return p;
}

template <typename T>
struct Shuffle {
    T value;
    int from;
    T got;
};

template <typename T>
T shuffle(const char* what, uint32_t mask, T value, int from) {
    Shuffle<T> mine{value, from, value};
    meet(what, mask, &mine, [](void* const(&all)[32], uint32_t mask) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            auto* to = static_cast<Shuffle<T>*>(all[lane]);
            if (!(mask >> to->from & 1))
                fail("lane %d reads lane %d, which is not in %08x", lane, to->from, mask);
            to->got = static_cast<Shuffle<T>*>(all[to->from])->value;
        }
    });
    return mine.got;
}

// Nanoseconds of a steady clock, never 0.
uint64_t clock_ns();
// Memory that other launches, on other threads of the host, touch at the same time. Loads let those
// run: whoever asks again and again waits for one of them.
void store_release(uint64_t* to, uint64_t value);
uint64_t load_acquire(const uint64_t* from);

inline int lane() { return static_cast<int>(self().thread.x % 32); }

}  // namespace simt

#define KERNEL(name, Args, ...)                                                                  \
    static void name##_body(const Args& args);                                                   \
    static const simt::Kernel name##_kernel{                                                     \
        #name, sizeof(Args), simt::threads_of(__VA_ARGS__),                                      \
        [](const void* args) { name##_body(*static_cast<const Args*>(args)); }};                 \
    static void name##_body(const Args& args)

#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict

#define threadIdx (simt::self().thread)
#define blockIdx (simt::self().block)
#define blockDim (simt::self().block_size)
#define gridDim (simt::self().grid_size)

inline void __syncthreads() { simt::block_barrier("__syncthreads"); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    simt::meet("__syncwarp", mask, nullptr,
               [](void* const(&)[32], uint32_t mask) { simt::order_lanes(mask); });
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
    const int first = simt::lane() / width * width;
    return simt::shuffle("__shfl_sync", mask, value, first + from % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    const int to = simt::lane() ^ bits;
    const bool inside = to / width == simt::lane() / width;
    return simt::shuffle("__shfl_xor_sync", mask, value, inside ? to : simt::lane());
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32) {
    const int to = simt::lane() + by;
    const bool inside = to / width == simt::lane() / width;
    return simt::shuffle("__shfl_down_sync", mask, value, inside ? to : simt::lane());
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32) {
    const int to = simt::lane() - by;
    const bool inside = to >= simt::lane() / width * width;
    return simt::shuffle("__shfl_up_sync", mask, value, inside ? to : simt::lane());
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
    struct Vote {
        bool vote;
        uint32_t all;
    } mine{vote, 0};
    simt::meet("__ballot_sync", mask, &mine, [](void* const(&all)[32], uint32_t mask) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
            if ((mask >> lane & 1) && static_cast<Vote*>(all[lane])->vote) votes |= 1u << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) static_cast<Vote*>(all[lane])->all = votes;
    });
    return mine.all;
}
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

// Threads are switched only where they wait: an atomic is a plain read and write, and no race.
#define ATOMIC template <typename T> __attribute__((noinline, no_sanitize("thread")))
ATOMIC
T atomicAdd(T* to, T value) {
    const T old = *to;
    *to = old + value;
    return old;
}
ATOMIC
T atomicMax(T* to, T value) {
    const T old = *to;
    *to = std::max(old, value);
    return old;
}
ATOMIC
T atomicMin(T* to, T value) {
    const T old = *to;
    *to = std::min(old, value);
    return old;
}
ATOMIC
T atomicOr(T* to, T value) {
    const T old = *to;
    *to = old | value;
    return old;
}
ATOMIC
T atomicExch(T* to, T value) {
    const T old = *to;
    *to = value;
    return old;
}
ATOMIC
T atomicCAS(T* to, T expected, T value) {
    const T old = *to;
    if (old == expected) *to = value;
    return old;
}
#undef ATOMIC
inline void __threadfence() {}
inline void __threadfence_block() {}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int x) { return simt::bits_to_float(static_cast<uint32_t>(x)); }
inline float __uint_as_float(uint32_t x) { return simt::bits_to_float(x); }
inline uint32_t __float_as_uint(float x) { return simt::float_to_bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(simt::float_to_bits(x)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}
inline uint64_t __umul64hi(uint64_t x, uint64_t y) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
// Operations that are rounded on their own and never fused.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
// For x from 0 to 2^63.
inline unsigned long long __float2ull_rn(float x) {
    return static_cast<unsigned long long>(std::llrint(x));
}
using std::max;
using std::min;

#include "simt_hopper.h"
