// A block of sm_90a's prefill: its steps, its shared memory with the rings of keys and values, and
// the warpgroup that fills them from a cache in bf16. From one in e4m3: `prefill_sm90_fp8.cuh`.
#pragma once

#include "hopper.cuh"
#include "prefill.cuh"

namespace prefill_sm90 {

inline constexpr int GROUPS = 2;       // warpgroups that compute
inline constexpr int GROUP_ROWS = 64;  // of one of them
inline constexpr int STEP_KEYS = 128;
inline constexpr int STEP_BLOCKS = STEP_KEYS / BLOCK_TOKENS;
// Of a cache.
enum class KvFormat { BF16, FP8 };

inline constexpr int COMPUTING = GROUPS * WARPGROUP;
inline constexpr int THREADS = WARPGROUP + COMPUTING;

// Arrivals at a slot that is filled.
template <KvFormat format>
inline constexpr int FILLING = format == KvFormat::BF16 ? WARPGROUP : WARPGROUP / WARP;

inline constexpr int Q_PANEL_BYTES = GROUP_ROWS * PANEL_ROW_BYTES;
inline constexpr int KV_PANEL_BYTES = STEP_KEYS * PANEL_ROW_BYTES;

// Phases of a ring's slots.
template <int slots>
struct Ring {
    static constexpr int SLOTS = slots;
    Barrier full[slots];  // an arrival for each copying thread, or warp that widens
    Barrier free[slots];  // an arrival for each computing warp
};

// Tiles of e4m3 as stored, on their way to be widened.
inline constexpr int STAGES = 4;

// The block's shared memory. Tiles are panels of 64 columns, D / 64 of them one after another.
template <int D, KvFormat format>
struct Shared;

template <int D>
struct alignas(1024) Shared<D, KvFormat::BF16> {
    static constexpr int SLOTS = 3;
    bf16 q[GROUPS][GROUP_ROWS * D];
    bf16 keys[SLOTS][STEP_KEYS * D];
    bf16 values[SLOTS][STEP_KEYS * D];
    Ring<SLOTS> key_ring, value_ring;
};

template <int D>
struct alignas(1024) Shared<D, KvFormat::FP8> {
    static constexpr int SLOTS = 2;
    bf16 q[GROUPS][GROUP_ROWS * D];
    bf16 keys[SLOTS][STEP_KEYS * D];
    bf16 values[SLOTS][STEP_KEYS * D];
    unsigned char staged[STAGES][STEP_BLOCKS * Fp8Block<D>::BYTES];
    Ring<SLOTS> key_ring, value_ring;
};

// A place in a ring, and the parity of its phase.
template <int slots>
struct Place {
    int slot = 0;
    uint32_t parity = 0;

    DEVICE void advance() {
        if (++slot == slots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// The steps of a tile, from the last to the first.
struct Steps {
    int last, count;
};

DEVICE Steps steps_of(const PrefillTile& tile) {
    const int last = (tile.keys_stop - 1) / STEP_KEYS;
    return {last, last - tile.first_key / STEP_KEYS + 1};
}

// The query head of this block.
DEVICE int head_of(const PrefillArgs& args) { return blockIdx.x % args.q_heads; }

// How the copying threads share a step's rows: each takes one chunk of every PASS_ROWS-th row.
// Eight neighbours write the chunks of one row, so that a quarter of a warp fills all banks.
template <int D>
struct Copier {
    static constexpr int CHUNKS = D / 8;
    static constexpr int PASS_ROWS = WARPGROUP / CHUNKS;
    static constexpr int64_t HEAD_ELEMENTS = BLOCK_TOKENS * D;

    const int32_t* blocks;
    int keys_end;
    int row;                 // of the first pass
    int to;                  // this thread's chunk of it in a slot, in bytes
    int64_t block_elements;  // from a block of the pool to the next
    int64_t head_elements;   // from a block's start to that chunk

    DEVICE Copier(const PrefillArgs& args, const PrefillTile& tile) {
        const int thread = threadIdx.x % WARPGROUP, chunk = thread % CHUNKS;
        const int kv_head = head_of(args) / (args.q_heads / args.kv_heads);
        blocks = tile.blocks;
        keys_end = tile.keys_end;
        row = thread / CHUNKS;
        to = chunk / 8 * KV_PANEL_BYTES + swizzled(row, chunk % 8);
        block_elements = args.kv_heads * HEAD_ELEMENTS;
        head_elements = kv_head * HEAD_ELEMENTS + row * D + chunk * 8;
    }

    // The block of a step that this lane remembers: lane i the i-th.
    DEVICE int look_up(int step) const {
        const int index = step * STEP_BLOCKS + static_cast<int>(threadIdx.x) % STEP_BLOCKS;
        return index >= 0 && index * BLOCK_TOKENS < keys_end ? blocks[index] : 0;
    }

    // Begins to copy a step of a pool into a slot. Rows past the last key are zeros: nobody has
    // written them, and a NaN there would survive a weight of zero.
    DEVICE void copy(bf16* slot, const void* pool, int step, int remembered) const {
        auto* target = reinterpret_cast<unsigned char*>(slot) + to;
        const bf16* source = static_cast<const bf16*>(pool) + head_elements;
        const int valid = keys_end - step * STEP_KEYS - row;
#pragma unroll
        for (int block = 0; block < STEP_BLOCKS; ++block) {
            const int64_t id = __shfl_sync(ALL_LANES, remembered, block);
            const bf16* from = source + id * block_elements;
#pragma unroll
            for (int pass = 0; pass < BLOCK_TOKENS; pass += PASS_ROWS) {
                const int at = block * BLOCK_TOKENS + pass;
                cp_async_16(target + at * PANEL_ROW_BYTES, from + pass * D, at < valid);
            }
        }
    }
};

template <int D>
DEVICE void bring_steps(const PrefillArgs& args, const PrefillTile& tile,
                        Shared<D, KvFormat::BF16>& shared) {
    const Copier<D> copier(args, tile);
    const Steps steps = steps_of(tile);
    Place<Shared<D, KvFormat::BF16>::SLOTS> place, last;
    int remembered = copier.look_up(steps.last);
    for (int i = 0; i < steps.count; ++i) {
        const int step = steps.last - i;
        const int next = copier.look_up(step - 1);
        barrier_wait(&shared.key_ring.free[place.slot], place.parity ^ 1);
        copier.copy(shared.keys[place.slot], args.keys, step, remembered);
        barrier_arrive_copies(&shared.key_ring.full[place.slot]);
        barrier_wait(&shared.value_ring.free[place.slot], place.parity ^ 1);
        copier.copy(shared.values[place.slot], args.values, step, remembered);
        barrier_arrive_copies(&shared.value_ring.full[place.slot]);
        remembered = next;
        last = place;
        place.advance();
    }
    // A thread stays until what it began has landed: nothing says what becomes of copies, and of
    // arrivals behind them, whose thread has ended. The last values are behind all else.
    barrier_wait(&shared.value_ring.full[last.slot], last.parity);
}

}  // namespace prefill_sm90
