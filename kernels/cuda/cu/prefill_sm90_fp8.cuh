// The warpgroup that fills the rings of sm_90a's prefill from a cache in e4m3.
//
// wgmma takes bf16 here, so codes are widened on the way, with the same rounding as in
// `attention_prefill.cu`: code times scale in f32, then to bf16. A tile of 128 keys or values comes
// by cp.async as it is stored (eight blocks of the pool, codes and scales) to one of four stages,
// of which three are on their way while the fourth is widened into a slot of the ring. A warp
// widens the two blocks that it has copied itself, so that warps do not wait for each other. Each
// thread fences what it has written before its warp arrives at the slot's barrier: who computes
// need not.
//
// Counted at D = 128, per multiprocessor and step (see `attention_prefill_sm90.cu`), where products
// take 2048 cycles and each of the four schedulers issues as many instructions. A scheduler has one
// warp of each warpgroup:
//   this one            256 elements a thread at 3 instructions (to f16 in pairs, to f32, times the
//                       scale, to bf16 in pairs), 32 loads of codes and 32 of scales, 32 stores, 20
//                       copies, their addresses: 1080 in the machine code
//   computing           475 each, 950 together: 2030 in all (bf16: 1200)
//   shared memory       160 KiB read by wgmma, 64 KiB written widened, 33 KiB copied and 33 read
//                       again: 2320 cycles (bf16: 1792)
//   from the L2         33 KiB (bf16: 64)
// So neither issue nor shared memory has room beside the tensor cores: 400 to 450 TFLOP/s are to be
// expected, a quarter below bf16 caches; mma.sync, which issues as much for half the rows, should
// come to 250 to 300. Not measured. At D = 64 issue comes to 1500 of 1024.
//
// What would be faster: codes that wgmma reads as f16, which takes one instruction for two, their
// scales applied to scores and weights as in decode. That is about 1550 instead of 2030, and the
// two prefill kernels then round differently. Loads straight into registers spare 512 cycles of
// shared memory, but 14 KiB on their way, which hide the L2's latency, are 28 registers more.
//
// Shared memory at D = 128: 32 KiB of Q, 2 · 64 of K and V, 4 · 16.5 of stages, 64 bytes of
// barriers: 226.1 of 227 KiB. A ring of two is enough: a slot is free again half a step before the
// computing warpgroup that is ahead wants it, and is filled in a quarter.
#pragma once

#include "prefill_sm90.cuh"

namespace prefill_sm90 {

template <int D>
struct Widener {
    using Block = Fp8Block<D>;
    using Room = Shared<D, KvFormat::FP8>;
    // Blocks of a step that a warp moves, one behind the other.
    static constexpr int BLOCKS = STEP_BLOCKS / (WARPGROUP / WARP);
    // 16 bytes each, of a token as stored; tokens that a warp copies at a time.
    static constexpr int PIECES = D / 16, COPY_ROWS = WARP / PIECES;
    // The same once widened: eight lanes write eight chunks of a row, to all banks.
    static constexpr int CHUNKS = D / 8, PASS_ROWS = WARP / CHUNKS;

    const PrefillTile& tile;
    const Steps steps;
    const int lane, first_token;  // the latter of this warp's in a step
    const SharedAddress stages;   // this warp's part of the first one
    const int kv_heads, kv_head;
    int oldest = 0;               // stage

    DEVICE Widener(const PrefillArgs& args, const PrefillTile& tile, Room& shared)
        : tile(tile),
          steps(steps_of(tile)),
          lane(static_cast<int>(threadIdx.x) % WARP),
          // From one lane, so that the compiler knows that the whole warp goes the same way.
          first_token(__shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / WARP, 0) * BLOCKS *
                      BLOCK_TOKENS),
          stages(shared_address(shared.staged) + first_token / BLOCK_TOKENS * Block::BYTES),
          kv_heads(args.kv_heads),
          kv_head(head_of(args) / (args.q_heads / args.kv_heads)) {}

    // Tokens from this warp's first one in the i-th step to the last key.
    DEVICE int valid(int i) const {
        return tile.keys_end - (steps.last - i) * STEP_KEYS - first_token;
    }

    // This warp's blocks of the i-th step: lane j the j-th.
    DEVICE int look_up(int i) const {
        const int first = (steps.last - i) * STEP_BLOCKS + first_token / BLOCK_TOKENS;
        const int index = first + lane % BLOCKS;
        return i < steps.count && index * BLOCK_TOKENS < tile.keys_end ? tile.blocks[index] : 0;
    }

    // Begins to copy this warp's part of the i-th step to the stage `ahead` of the oldest; nothing
    // where there is no such step. Tokens past the last key are zeros.
    DEVICE void fetch(const void* pool, int i, int remembered, int ahead) {
        if (i < steps.count) {
            const SharedAddress stage =
                stages + (oldest + ahead) % STAGES * static_cast<int>(sizeof(Room::staged[0]));
            const int left = valid(i) - lane / PIECES;
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                const int64_t id = __shfl_sync(ALL_LANES, remembered, block);
                const auto* from = static_cast<const unsigned char*>(pool) +
                                   (id * kv_heads + kv_head) * Block::BYTES + lane * 16;
                const SharedAddress to = stage + block * Block::BYTES + lane * 16;
#pragma unroll
                for (int rows = 0; rows < BLOCK_TOKENS; rows += COPY_ROWS)
                    cp_async_16(to + rows * D, from + rows * D, block * BLOCK_TOKENS + rows < left);
                if (lane < Block::SCALES / 16) cp_async_16(to + Block::CODES, from + Block::CODES);
            }
        }
        cp_async_commit();
    }

    // Scales of tokens past the last key, which may be anything, become zeros: a lane has a token.
    DEVICE void clear_scales(SharedAddress stage, int i) const {
        static_assert(BLOCKS * BLOCK_TOKENS == WARP, "a token for each lane");
        if (valid(i) >= WARP) return;
        const int within = lane % BLOCK_TOKENS * static_cast<int>(sizeof(float));
        const SharedAddress block = stage + lane / BLOCK_TOKENS * Block::BYTES;
        if (lane >= valid(i)) store_float_shared(block + Block::CODES + within, 0.0f);
        __syncwarp();
    }

    // The oldest stage, of the i-th step, into a slot. Loads of a batch come before its stores,
    // which the compiler must take for writes to what is loaded next.
    DEVICE void widen(SharedAddress slot, int i) const {
        constexpr int BATCH = 4;
        const SharedAddress stage = stages + oldest * static_cast<int>(sizeof(Room::staged[0]));
        const int row = lane / CHUNKS, chunk = lane % CHUNKS;
        const SharedAddress to =
            slot + chunk / 8 * KV_PANEL_BYTES + swizzled(first_token + row, chunk % 8);
        clear_scales(stage, i);
#pragma unroll
        for (int first = 0; first < BLOCKS * BLOCK_TOKENS; first += BATCH * PASS_ROWS) {
            const SharedAddress block = stage + first / BLOCK_TOKENS * Block::BYTES;
            Bytes8 codes[BATCH];
            float scales[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int token = first % BLOCK_TOKENS + j * PASS_ROWS;
                const int scale = (token + row) * static_cast<int>(sizeof(float));
                codes[j] = load8_shared(block + token * D + lane * 8);
                scales[j] = load_float_shared(block + Block::CODES + scale);
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                // Rows of this thread differ in bits that its first one has not.
                const int at = first + j * PASS_ROWS;
                store16_operand((to ^ (at % 8 << 4)) + at * PANEL_ROW_BYTES,
                                scaled(codes[j], scales[j]));
            }
        }
    }

    static DEVICE Bytes16 scaled(const Bytes8& codes, float scale) {
        Bytes16 wide;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x[4];
            unpack_fp8x4(codes.words[half], x);
            wide.words[2 * half] = pack_bf16(x[0] * scale, x[1] * scale);
            wide.words[2 * half + 1] = pack_bf16(x[2] * scale, x[3] * scale);
        }
        return wide;
    }

    // Widens the oldest stage, of the i-th step, into a slot of a ring, and first begins to fetch
    // step `next` of `pool` to the stage before, which the warp is done with.
    DEVICE void turn(Ring<Room::SLOTS>& ring, const bf16* slots, Place<Room::SLOTS> place, int i,
                     const void* pool, int next, int remembered) {
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        fetch(pool, next, remembered, STAGES - 1);
        barrier_wait(&ring.free[place.slot], place.parity ^ 1);
        widen(shared_address(slots + place.slot * STEP_KEYS * D), i);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) barrier_arrive(&ring.full[place.slot]);
        oldest = (oldest + 1) % STAGES;
    }
};

template <int D>
DEVICE void bring_steps(const PrefillArgs& args, const PrefillTile& tile,
                        Shared<D, KvFormat::FP8>& shared) {
    Widener<D> widener(args, tile, shared);
    Place<Shared<D, KvFormat::FP8>::SLOTS> place;
    int now = widener.look_up(0), next = widener.look_up(1);
    widener.fetch(args.keys, 0, now, 0);
    widener.fetch(args.values, 0, now, 1);
    widener.fetch(args.keys, 1, next, 2);
    for (int i = 0; i < widener.steps.count; ++i) {
        const int later = widener.look_up(i + 2);
        widener.turn(shared.key_ring, shared.keys[0], place, i, args.values, i + 1, next);
        widener.turn(shared.value_ring, shared.values[0], place, i, args.keys, i + 2, later);
        next = later;
        place.advance();
    }
}

}  // namespace prefill_sm90
