// A block of the mma.sync prefill: its work, and the tiles of keys and values that it reads.
#pragma once

#include "prefill.cuh"

namespace prefill_mma {

inline constexpr int THREADS = 128;
inline constexpr int WARPS = THREADS / WARP;
// Rows of a warp: two products share each fragment of keys or values.
inline constexpr int WARP_ROWS = TILE_ROWS / WARPS;
// Keys between two looks at the largest score.
inline constexpr int STEP_KEYS = 64;
// Tiles of keys or values in shared memory.
inline constexpr int RING = 3;

// Offset of the 16 bytes `piece` of row `row` in a tile of rows of D bf16. Pieces are exchanged
// within 128 bytes so that the same piece of eight rows lies in all banks.
template <int D>
DEVICE int swizzled(int row, int piece) {
    return row * (2 * D) + ((piece ^ (row & 7)) << 4);
}

// The address `at` of a row below 16 and piece 0 or 1 of a tile, moved on by so many times 16 rows
// and 16 columns.
template <int D>
DEVICE SharedAddress moved(SharedAddress at, int rows16, int columns16) {
    return (at ^ ((columns16 & 3) << 5)) + (columns16 >> 2) * 128 + rows16 * (32 * D);
}

// What a block works on. Kept in shared memory: the sums leave no registers for it.
struct Work {
    PrefillTile tile;
    int head;
    int kv_head;
};

// Neighbouring blocks work on the heads of one tile: those that share keys find them in L2.
DEVICE Work work_of_block(const PrefillArgs& args) {
    const int head = blockIdx.x % args.q_heads;
    const int kv_head = head / (args.q_heads / args.kv_heads);
    return {prefill_tile(args, blockIdx.x / args.q_heads), head, kv_head};
}

// The tiles that a block reads: K and V of a step in turn, 64 tokens each, through a ring. Warp w
// moves the w-th block of 16 tokens, which the cache holds in one piece.
//
// bf16 is read where it was copied to. e4m3 (STORED_BYTES 1) waits in the ring as stored; each
// thread widens what it has copied itself into the one tile that is read.
template <int D, int STORED_BYTES>
struct Stream {
    static constexpr int TILE_BYTES = STEP_KEYS * 2 * D;
    // A token's elements and, of e4m3, its scale.
    static constexpr int BLOCK_BYTES =
        STORED_BYTES == 2 ? BLOCK_TOKENS * 2 * D : Fp8Block<D>::BYTES;
    static constexpr int SLOT_BYTES = STEP_KEYS / BLOCK_TOKENS * BLOCK_BYTES;
    static constexpr int BYTES = RING * SLOT_BYTES + (STORED_BYTES == 2 ? 0 : TILE_BYTES);
    // 16 bytes each, of a token as stored.
    static constexpr int PIECES = STORED_BYTES * D / 16;
    // Tokens that a warp moves at a time.
    static constexpr int COPY_ROWS = WARP / PIECES;

    const PrefillArgs& args;
    const Work& work;
    const SharedAddress ring;
    int block = 0;  // of the cache, that this warp moves next
    int slot = 0;   // of the ring, that is filled next

    // `shared`: the tile of e4m3 once widened, then the ring.
    DEVICE Stream(const PrefillArgs& args, const Work& work, SharedAddress shared)
        : args(args), work(work), ring(STORED_BYTES == 2 ? shared : shared + TILE_BYTES) {}

    // Looks up the block that this warp moves in `step`.
    DEVICE void look_up(int step) {
        const int index = step * (STEP_KEYS / BLOCK_TOKENS) + threadIdx.x / WARP;
        if (index * BLOCK_TOKENS < work.tile.keys_stop) block = work.tile.blocks[index];
    }

    // Where in a slot this thread's first 16 bytes lie.
    DEVICE SharedAddress place() const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        if (STORED_BYTES == 1) return warp * BLOCK_BYTES + lane * 16;
        return swizzled<D>(warp * BLOCK_TOKENS + lane / PIECES, lane % PIECES);
    }

    // Begins to copy the tokens of `step`, with zeros past the last key: nobody has written there,
    // and a NaN would survive a weight of zero.
    DEVICE void load(const void* pool, int step) {
        if (step * STEP_KEYS < work.tile.keys_stop) {
            const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
            const int64_t at = static_cast<int64_t>(block) * args.kv_heads + work.kv_head;
            const auto* from = static_cast<const char*>(pool) + at * BLOCK_BYTES + lane * 16;
            const SharedAddress to = ring + slot * SLOT_BYTES + place();
            const int valid =
                work.tile.keys_stop - step * STEP_KEYS - warp * BLOCK_TOKENS - lane / PIECES;
#pragma unroll
            for (int rows = 0; rows < BLOCK_TOKENS; rows += COPY_ROWS) {
                const int swizzle = STORED_BYTES == 2 ? (rows & 7) << 4 : 0;
                const int bytes = rows * (STORED_BYTES * D);
                cp_async_16((to ^ swizzle) + bytes, from + bytes, rows < valid);
            }
            // The first lanes have 16 bytes of the scales too.
            if (STORED_BYTES == 1 && lane < Fp8Block<D>::SCALES / 16)
                cp_async_16(to + Fp8Block<D>::CODES, from + Fp8Block<D>::CODES);
        }
        cp_async_commit();
        slot = slot == RING - 1 ? 0 : slot + 1;
    }

    // The oldest tile, once it is there; in place of the one before, `step`'s is begun.
    DEVICE SharedAddress turn(const void* pool, int step) {
        cp_async_wait<RING - 2>();
        __syncthreads();
        load(pool, step);
        const SharedAddress oldest = ring + slot * SLOT_BYTES;
        if (STORED_BYTES == 2) return oldest;
        widen(oldest + threadIdx.x / WARP * BLOCK_BYTES);
        __syncthreads();
        return ring - TILE_BYTES;
    }

    // `block`: what this warp has copied. Tokens past the last key are zeros, whatever their scale.
    DEVICE void widen(SharedAddress block) {
        const int lane = threadIdx.x % WARP, token = lane / PIECES;
        const int row = threadIdx.x / WARP * BLOCK_TOKENS + token;
        // At D = 64, where three blocks share the registers, sm_80 has none for two at a time.
        constexpr int AT_A_TIME = D == 64 ? 1 : BLOCK_TOKENS / COPY_ROWS;
#pragma unroll AT_A_TIME
        for (int rows = 0; rows < BLOCK_TOKENS; rows += COPY_ROWS) {
            const Bytes16 stored = load16_shared(block + lane * 16 + rows * D);
            const bool zero =
                (stored.words[0] | stored.words[1] | stored.words[2] | stored.words[3]) == 0;
            const int at = Fp8Block<D>::CODES + (token + rows) * static_cast<int>(sizeof(float));
            const float scale = zero ? 0.0f : load_float_shared(block + at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Bytes16 wide;
                for (int quarter = 0; quarter < 2; ++quarter) {
                    uint32_t pairs[2];
                    fp8x4_to_bf16(stored.words[2 * half + quarter], pairs);
                    for (int i = 0; i < 2; ++i)
                        wide.words[2 * quarter + i] =
                            pack_bf16(low_bf16(pairs[i]) * scale, high_bf16(pairs[i]) * scale);
                }
                const int to = swizzled<D>(row + rows, lane % PIECES * 2 + half);
                store16_shared(ring - TILE_BYTES + to, wide);
            }
        }
    }
};

}  // namespace prefill_mma
