// Attention of sequences with one row each over the paged cache: split-KV (the "flash-decoding" of
// Dao et al. 2023) over FlashAttention's online softmax, GQA heads packed into one tile.
//
// Computes, for the row of each sequence and each query head h that shares key head h / group:
// out = softmax(q kᵀ · scale) v over the keys at positions max(0, context - window) .. context.
// Layout: K and V are [blocks, kv heads, 16 tokens, D] in bf16, or e4m3 with scales behind
// (`Fp8Block`), so that one head's 16 tokens
// are contiguous; a row of block_tables [.., cols] names a sequence's blocks in order. Slots past
// the context and table entries past a sequence's own may hold anything and are never read.
//
// Where rows come as the product left them (`cos_sin`), blocks do to their heads what `rope.cu`
// does, with its bits: each turns its queries, into shared memory; those with the sequence's last
// split turn the new key too, put it and the value among the tiles, and one of them stores both.
// Nobody reads the new token from the cache, so a block's tiles come from what earlier steps left.
//
// Work: a thread block takes SPLIT_TOKENS keys of one key head, and up to 16 query heads that share
// it as the 16 rows of mma.m16n8k16, so that K and V are read once for the whole group. Its four
// warps go through the split's KV blocks in turn (warp w has blocks w, w + 4, ...), each on its
// own: own copies, own running maximum and sums, no barrier in the loop. At the end they are
// merged through shared memory in the order of the warps. A sequence of one split is finished
// there; others leave f32 sums, which the block that comes last adds in the order of the splits.
// How a sequence is cut depends on its context alone, so its bits do not depend on the batch. The
// grid is always the same: blocks go through a list on the device (`step.cu`), so that a recorded
// launch serves every step.
//
// Moves 2 · context · D · element bytes a key head, and 8 (D + 2) bytes for each query head and
// split: 4 · group / (512 · element bytes) of the former, 3 % at a group of 8 in bf16, and that
// mostly within the L2. Half the split would double this; twice the split would leave SMs without
// work at batch 1: 32k tokens of 8 key heads are 512 thread blocks for 132 SMs.
//
// Bound by memory. An H200 needs about 4.3 TB/s · 800 ns / 132 = 26 KB in flight an SM. A warp's
// ring holds two K and two V tiles of 4 KB (four and four where a tile is smaller) and refills each
// as soon as it was used: with 64 KB of shared memory and at most 168 registers a thread, three
// thread blocks fit an SM, and 12 warps keep 3 of 4 tiles in flight: 144 KB. Counted, unmeasured:
// a warp alone goes through 16 tokens of D = 128 in about 800 cycles, in which an SM's share of the
// bandwidth is 15 KB and its 12 warps could take 96 KB. For them it issues about 380 instructions
// (32 products: 128 of the 450 cycles that the data takes) of 1800 slots; of e4m3 about 410 of 900
// on sm_90a. On sm_80, which converts with integers, e4m3 is bound by issue: about 1200.
//
// What a warp does with its tiles, and e4m3: `decode.cuh`. What a block has before it, and the rows
// that it turns: `decode_row.cuh`.
#include "decode_row.cuh"

using namespace decoding;

// That fit a multiprocessor.
constexpr int BLOCKS = 3;

// Where warps leave their results, over the tiles.
template <typename T, int D>
struct Merge {
    // Rows of heads a few banks apart.
    static constexpr int STRIDE = D + (sizeof(T) == 2 ? 8 : 16);
    float sums[WARPS][TILE_HEADS][STRIDE];
    Weight weights[WARPS][TILE_HEADS];
    bool last;  // whether this block came last of its sequence
};

// The queries of the sequence's row, turned on the way where they are not yet.
template <typename T, int D>
DEVICE void load_queries(const DecodeArgs& args, const Split& split, Lane<T, D>& mine) {
    if (args.turns()) {
        OwnRow<T, D>& own = OwnRow<T, D>::behind_tiles();
        turn_row(args, split, own);
        mine.load_q(own.queries[0], own.STRIDE, split.heads, args.score_scale);
    } else {
        const int64_t row = args.row_starts[split.sequence];
        const bf16* first = args.qkv + row * args.qkv_cols + split.first_head * D;
        mine.load_q(first, D, split.heads, args.score_scale);
    }
}

// Goes through the warp's KV blocks. Where the row is turned here, those that are fetched first are
// of earlier steps: their way goes on beside the product that makes the row.
template <typename T, int D>
DEVICE void walk(const DecodeArgs& args, const Split& split, Lane<T, D>& mine) {
    using Shape = Tile<T, D>;
    constexpr int STAGES = Shape::STAGES;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    // From one lane, so that the compiler knows that the whole warp goes the same way.
    const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / WARP, 0);
    unsigned char* ring = shared_memory<unsigned char>() + warp * STAGES * 2 * Shape::BYTES;

    const int first_block = split.first / BLOCK_TOKENS;
    const int blocks = (split.end + BLOCK_TOKENS - 1) / BLOCK_TOKENS - first_block;
    const int count = blocks > warp ? (blocks - warp + WARPS - 1) / WARPS : 0;
    const int* table =
        args.block_tables + static_cast<int64_t>(args.tables[split.sequence]) * args.table_cols;
    const int ids = lane < blocks ? table[first_block + lane] : 0;
    const int cached_end = split.end - (split.newest ? 1 : 0);

    // Copies the warp's i-th tile of keys (which = 0) or values (1); each copy is a group of its
    // own, empty past the last.
    const auto fetch = [&](int i, int which) {
        if (i < count) {
            const int at = warp + i * WARPS, token = (first_block + at) * BLOCK_TOKENS;
            const int64_t block = __shfl_sync(ALL_LANES, ids, at);
            const unsigned char* from = which == 0 ? args.keys : args.values;
            const int64_t place = (block * args.kv_heads + split.kv_head) * Shape::STORED;
            unsigned char* tile = ring + (i % STAGES * 2 + which) * Shape::BYTES;
            Shape::fetch(tile, from + place, split.first - token, cached_end - token);
            if (which == 0) fetch_scales<T, D>(tile, args.keys + place, args.values + place);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        fetch(i, 0);
        fetch(i, 1);
    }
    const OwnRow<T, D>& own = OwnRow<T, D>::behind_tiles();
    load_queries(args, split, mine);
    mine.clear();
    for (int i = 0; i < count; ++i) {
        unsigned char* keys = ring + i % STAGES * 2 * Shape::BYTES;
        const int token = (first_block + warp + i * WARPS) * BLOCK_TOKENS;
        float scores[2][4];
        uint32_t p[4];
        // After the group of these keys came those of its values, of all later stages, and none.
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
        const bool has_new = split.newest && split.end - token <= BLOCK_TOKENS;
        if (has_new) own.put(keys, 0, cached_end - token);
        mine.multiply_keys(scores, keys);
        // Of e4m3 the scales lie behind the keys.
        const auto* scales = reinterpret_cast<const float*>(keys + Shape::ELEMENTS);
        if constexpr (!Shape::SCALED) {
            __syncwarp();
            fetch(i + STAGES, 0);
        }
        mine.soften(scores, split.first - token, split.end - token, p, scales);
        if constexpr (Shape::SCALED) {
            __syncwarp();
            fetch(i + STAGES, 0);
        }
        // As many: the keys of the stage after the last are newer than these values.
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
        if (has_new) own.put(keys + Shape::BYTES, 1, cached_end - token);
        mine.multiply_values(p, keys + Shape::BYTES);
        __syncwarp();
        fetch(i + STAGES, 1);
    }
}

// Adds up what the warps have and writes it: the result, or the split's sums.
template <typename T, int D>
DEVICE void merge(const DecodeArgs& args, const Split& split, const Lane<T, D>& mine) {
    const int warp = static_cast<int>(threadIdx.x) / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int heads = split.heads;
    auto* all = shared_memory<Merge<T, D>>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = lane / 4 + 8 * half;
        const float total = warp_sum<4>(mine.total[half]);
        if (head >= heads) continue;
        if (lane % 4 == 0) all->weights[warp][head] = {mine.max[half], total};
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            for (int i = 0; i < 2; ++i)
                all->sums[warp][head][mine.dimension(n, i)] = mine.sums[n][2 * half + i];
    }
    __syncthreads();
    const uint64_t row = static_cast<uint64_t>(args.row_starts[split.sequence]) * args.q_heads;
    for (int at = static_cast<int>(threadIdx.x); at < heads * (D / 4); at += THREADS) {
        const int head = at / (D / 4), d = at % (D / 4) * 4;
        Weight weight{-INFINITY, 0.0f};
        for (int w = 0; w < WARPS; ++w) weight.max = fmaxf(weight.max, all->weights[w][head].max);
        float x[4] = {};
        for (int w = 0; w < WARPS; ++w) {
            const Weight part = all->weights[w][head];
            const float share = exp2_approx(part.max - weight.max);
            weight.sum += share * part.sum;
            const Bytes16 sums = load16(&all->sums[w][head][d]);
            for (int i = 0; i < 4; ++i) x[i] += share * __uint_as_float(sums.words[i]);
        }
        if (split.alone) {
            const float scale = 1.0f / weight.sum;
            const Bytes8 result{{pack_bf16(x[0] * scale, x[1] * scale),
                                 pack_bf16(x[2] * scale, x[3] * scale)}};
            store8(args.out + (row + split.first_head + head) * D + d, result);
            continue;
        }
        const uint64_t slot =
            static_cast<uint64_t>(split.place) * args.q_heads + split.first_head + head;
        Bytes16 sums;
        for (int i = 0; i < 4; ++i) sums.words[i] = __float_as_uint(x[i]);
        store16(args.sums + slot * D + d, sums);
        if (d == 0) reinterpret_cast<Weight*>(args.weights)[slot] = weight;
    }
}

// Whether this block's sums are the last of the sequence's to come, which it then sees.
template <typename T, int D>
DEVICE bool came_last(const DecodeArgs& args, const Split& split) {
    auto* all = shared_memory<Merge<T, D>>();
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t* arrived = args.arrivals + static_cast<uint64_t>(split.sequence) * args.q_heads +
                            split.first_head;
        const uint32_t due = static_cast<uint32_t>(split.last_place - split.first_place);
        all->last = atomicAdd(arrived, 1u) == due;
        if (all->last) *arrived = 0;
    }
    __syncthreads();
    const bool last = all->last;
    if (last) __threadfence();
    return last;
}

// out = Σ 2^(max - greatest max) · sums / Σ 2^(max - greatest max) · sum over the sequence's splits
// in their order: a warp has a head at a time, a lane D / 32 dimensions.
template <int D>
DEVICE void combine(const DecodeArgs& args, const Split& split) {
    constexpr int EACH = D / WARP;
    const int warp = static_cast<int>(threadIdx.x) / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const uint64_t row = static_cast<uint64_t>(args.row_starts[split.sequence]) * args.q_heads;
    for (int h = warp; h < split.heads; h += WARPS) {
        const int head = split.first_head + h;
        const auto weight_of = [&](int place) {
            const float* at =
                args.weights + 2 * (static_cast<uint64_t>(place) * args.q_heads + head);
            return Weight{load_shared_by_blocks(at), load_shared_by_blocks(at + 1)};
        };
        float most = -INFINITY, total = 0.0f;
        for (int s = split.first_place + lane; s <= split.last_place; s += WARP)
            most = fmaxf(most, weight_of(s).max);
        most = warp_max(most);
        for (int s = split.first_place + lane; s <= split.last_place; s += WARP) {
            const Weight weight = weight_of(s);
            total += exp2_approx(weight.max - most) * weight.sum;
        }
        total = warp_sum(total);
        float x[EACH] = {};
#pragma unroll 8
        for (int s = split.first_place; s <= split.last_place; ++s) {
            const float share = exp2_approx(weight_of(s).max - most);
            const float* part =
                args.sums + (static_cast<uint64_t>(s) * args.q_heads + head) * D + lane * EACH;
            if constexpr (EACH == 4) {
                const Bytes16 four = load16_shared_by_blocks(part);
                for (int i = 0; i < EACH; ++i) x[i] += share * __uint_as_float(four.words[i]);
            } else {
                for (int i = 0; i < EACH; ++i) x[i] += share * load_shared_by_blocks(part + i);
            }
        }
        bf16* out = args.out + (row + head) * D + lane * EACH;
        for (int i = 0; i < EACH; ++i) out[i] = to_bf16(x[i] / total);
    }
}

template <typename T, int D>
DEVICE void decode(const DecodeArgs& args) {
    launch_dependents();
    // Rows that are turned already are stored too, and what is fetched first may be among them.
    if (!args.turns()) wait_prerequisites();
    const auto next = [&](int item) { return item + static_cast<int>(gridDim.x); };
    for (int item = static_cast<int>(blockIdx.x);; item = next(item)) {
        Lane<T, D> mine;
        {
            const Split split = split_of(args, item);
            if (split.heads == 0) break;
            // Outside the window: nobody waits for it.
            if (split.first >= split.end) continue;
            walk(args, split, mine);
        }
        // Read again: registers for it are short on the way.
        const Split split = split_of(args, item);
        merge(args, split, mine);
        if (!split.alone && came_last<T, D>(args, split)) combine<D>(args, split);
        // The ring is where warps may still read.
        __syncthreads();
    }
    // Of blocks without work.
    wait_prerequisites();
}

KERNEL(attention_decode_d64_bf16, DecodeArgs, THREADS, BLOCKS) { decode<bf16, 64>(args); }
KERNEL(attention_decode_d128_bf16, DecodeArgs, THREADS, BLOCKS) { decode<bf16, 128>(args); }
KERNEL(attention_decode_d64_fp8, DecodeArgs, THREADS, BLOCKS) { decode<e4m3, 64>(args); }
KERNEL(attention_decode_d128_fp8, DecodeArgs, THREADS, BLOCKS) { decode<e4m3, 128>(args); }
