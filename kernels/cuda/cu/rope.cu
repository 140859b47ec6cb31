// What happens to packed rows qkv [T, (q + 2 kv) D] between the product that makes them and
// attention, in one pass:
//
//   1. root-mean-square norm of each query and key head, where there are weights (Qwen3)
//   2. rotation of query and key heads by cos_sin [P, D] (D/2 cosines, then D/2 sines, f32), row
//      `rope_rows[t]`: pairs are element i and i + D/2 (rotate-half, as Qwen is trained). YaRN and
//      dynamic NTK are in the table
//   3. query heads · q_scale[t] (logn attention)
//   4. query heads back in place, in bf16, rounded once
//   5. keys and values to slot `slots[t]` of the cache, keys and values each [blocks, kv, 16, D] in
//      bf16; or e4m3, each token's head divided by its scale, so that its largest element is 448:
//      [blocks, kv], each 16 rows of D codes, then 16 scales in f32 (`Fp8Block` of `common.cuh`).
//      Keys are taken as the rounded bf16 has them
//
// The norm and the factors are left out where their pointers are null.
//
// Moves 4 bytes for each element (3 of k and v with e4m3). Bound by memory.
// A head has D / 16 lanes; a lane holds 8 elements of the lower half and the 8 they are paired
// with, so nothing is exchanged but the norm's sum. A warp has 2 · 512 / D heads of one token: two
// heads a lane, 64 bytes on the way from each, under one load of its cosines and sines, which the
// other warps of the token find in the L1.
#include "rope.cuh"

using namespace rope;

constexpr int THREADS = 128;
// Heads of a lane.
constexpr int DEPTH = 2;

struct RopeArgs {
    bf16* qkv;
    TurnArgs turn;
    void* keys;
    void* values;
    uint32_t tokens;
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t token_warps;  // those that share a token
    uint32_t fp8;          // whether the cache is e4m3
    uint32_t unused;
};

template <int D>
DEVICE void rotate_and_store(const RopeArgs& args) {
    constexpr uint32_t LANES = D / 16, TOGETHER = WARP / LANES;
    const uint32_t warp = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    const uint32_t token = warp / args.token_warps;
    if (token >= args.tokens) return;
    const uint32_t lane = threadIdx.x % WARP;
    const uint32_t first =
        lane / LANES + (warp - token * args.token_warps) * (TOGETHER * DEPTH);
    const int at = static_cast<int>(lane % LANES) * LANE_VECTOR;
    const uint32_t rotated = args.q_heads + args.kv_heads, heads = rotated + args.kv_heads;
    bf16* const row = args.qkv + static_cast<uint64_t>(token) * heads * D + at;

    HeadPart parts[DEPTH];
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t head = first + i * TOGETHER;
        if (head >= heads) break;
        parts[i].load<D>(row + head * D);
    }
    const Turn turn = Turn::of<D>(args.turn, token, at);
    const int32_t slot = args.turn.slots[token];

#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t head = first + i * TOGETHER;
        const bool is_query = head < args.q_heads, is_key = !is_query && head < rotated;
        turn.apply<D>(parts[i], is_query ? Head::QUERY : is_key ? Head::KEY : Head::OTHER);
        if (is_query) parts[i].store<D>(row + head * D);
        // Keys are read from the cache alone.
        const bool is_cached = !is_query && head < heads && slot >= 0;
        const CachePlace<D> place(slot, args.kv_heads, head - (is_key ? args.q_heads : rotated));
        void* const cache = is_key ? args.keys : args.values;
        if (args.fp8 != 0) {
            const CodedPart part = coded<D>(parts[i]);
            if (is_cached) place.store(cache, part, at);
        } else if (is_cached) {
            place.store(cache, parts[i], at);
        }
    }
}

KERNEL(rope_d64, RopeArgs, THREADS, 7) { rotate_and_store<64>(args); }
KERNEL(rope_d128, RopeArgs, THREADS, 7) { rotate_and_store<128>(args); }
