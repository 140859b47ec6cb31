// Attention of sequences with one row each over the paged cache: split-KV (the "flash-decoding" of
// Dao et al. 2023) over FlashAttention's online softmax, GQA heads packed into one tile.
//
// Computes, for the row of each sequence and each query head h that shares key head h / group:
// out = softmax(q kᵀ · scale) v over the keys at positions max(0, context - window) .. context.
// Layout: K and V are [blocks, kv heads, 16 tokens, D], bf16 or e4m3, so that one head's 16 tokens
// are contiguous; a row of block_tables [S, cols] names a sequence's blocks in order. Slots past
// the context and table entries past a sequence's own may hold anything and are never read.
//
// Work: a thread block takes SPLIT_TOKENS keys of one key head, and up to 16 query heads that share
// it as the 16 rows of mma.m16n8k16, so that K and V are read once for the whole group. Its four
// warps go through the split's KV blocks in turn (warp w has blocks w, w + 4, ...), each on its
// own: own copies, own running maximum and sums, no barrier in the loop. At the end they are
// merged through shared memory in the order of the warps. A sequence of one split is finished
// there; others leave f32 sums, which attention_combine adds in a fixed order. How a
// sequence is cut depends on its context alone, so its bits do not depend on the batch.
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
// Tiles are swizzled by the row's number, so that 8 rows of one 16-byte column lie in 8 different
// bank groups: neither ldmatrix nor the copies have conflicts.
//
// e4m3: products are of f16, which holds e4m3 exactly and is two conversions away; queries come
// into its range by a power of two a head, weights are in it. A lane's 4 bytes of ldmatrix become
// two registers, bytes 0 and 2, bytes 1 and 3. For K those are 4 consecutive dimensions, which Q's
// fragments take in the same order; for V (a transposed load of pairs of bytes) they are two tokens
// of an even and of an odd dimension. So nothing is exchanged between lanes. The scales are in
// `score_scale` and `value_scale`.
#include "common.cuh"

// Keys of one thread block; the launcher cuts by the same number.
constexpr int SPLIT_TOKENS = 512;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
// That fit a multiprocessor.
constexpr int BLOCKS = 3;
// Query heads of one thread block: the rows of a product.
constexpr int TILE_HEADS = 16;
static_assert(SPLIT_TOKENS / BLOCK_TOKENS <= WARP, "a lane for each KV block of a split");

struct DecodeArgs {
    const bf16* qkv;             // [T, qkv_cols]: query heads first
    bf16* out;                   // [T, q_heads * D]
    const unsigned char* keys;   // [blocks, kv_heads, 16, D]
    const unsigned char* values;
    const int* splits;           // [grid.x, 3]: sequence, split, slot of its sums
    const int* row_starts;       // [S + 1]
    const int* context_lens;     // [S]
    const int* block_tables;     // [S, table_cols]
    float* sums;                 // [slots, q_heads, D]: Σ 2^(score - max) · value
    float* weights;              // [slots, q_heads, 2]: max of the scores, Σ 2^(score - max)
    float score_scale;           // log2(e) / sqrt(D), and the keys' scale
    float value_scale;
    int qkv_cols;
    int q_heads;
    int kv_heads;                // grid.y
    int table_cols;
    int group;                   // q_heads / kv_heads
    int window;                  // keys that a row sees, itself included; 2^30 for all
};

struct e4m3 {
    uint8_t bits;
};

// A score's maximum so far and the sum of 2^(score - max).
struct alignas(8) Weight {
    float max, sum;
};

// The 16 tokens of a KV block for one head, in shared memory.
template <typename T, int D>
struct Tile {
    static constexpr int ROW = D * static_cast<int>(sizeof(T));
    static constexpr int CHUNKS = ROW / 16;
    static constexpr int BYTES = BLOCK_TOKENS * ROW;
    // K and V tiles of each warp.
    static constexpr int STAGES = BYTES == 4096 ? 2 : 4;

    // Where 16 bytes of a row lie: 8 rows of one chunk are in 8 different groups of 4 banks.
    static DEVICE int offset(int row, int chunk) {
        return row * ROW + (chunk ^ turn(row)) * 16;
    }
    static DEVICE int turn(int row) { return CHUNKS >= 8 ? row % 8 : row / 2 % 4; }

    // Copies rows from..to of a warp's tile, and makes the others zero: 0 · NaN must not be.
    static DEVICE void fetch(unsigned char* tile, const unsigned char* block, int from, int to) {
        constexpr int COPIES = BYTES / 16 / WARP, ROWS = WARP / CHUNKS;
        const int lane = static_cast<int>(threadIdx.x) % WARP, first = lane / CHUNKS;
        const int start = offset(first, lane % CHUNKS);
        const bool whole = from <= 0 && to >= BLOCK_TOKENS;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            // As offset(first + i * ROWS, ..): the two parts of the row have no bit in common.
            unsigned char* at = tile + (start ^ turn(i * ROWS) * 16) + i * ROWS * ROW;
            const unsigned char* source = block + (i * WARP + lane) * 16;
            const int row = first + i * ROWS;
            if (whole) {
                cp_async_16(at, source);
            } else {
                cp_async_16(at, source, row >= from && row < to);
            }
        }
    }
};

// What a thread block has before it.
struct Split {
    int sequence, slot, first, end;  // keys first..end; none where first >= end
    bool alone;                      // the sequence has no other
};

DEVICE Split split_of(const DecodeArgs& args) {
    const int* cut = args.splits + 3 * static_cast<uint64_t>(blockIdx.x);
    const int sequence = cut[0], start = cut[1] * SPLIT_TOKENS;
    const int context = args.context_lens[sequence];
    const int visible = max(context - args.window, 0);
    return {sequence, cut[2], max(start, visible), min(start + SPLIT_TOKENS, context),
            context <= SPLIT_TOKENS};
}

// Four e4m3 as f16: bytes 0 and 2, then bytes 1 and 3.
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[2]) {
    fp8x4_to_f16(swap_middle_bytes(packed), pairs);
}

// A warp's share of a split, in the layout of mma_16816: lane l has rows (heads) g = l / 4 and
// g + 8, and of a tile's 8 columns 2t and 2t + 1, t = l % 4.
template <typename T, int D>
struct Lane {
    using Shape = Tile<T, D>;
    static constexpr bool WIDE = sizeof(T) == 2;

    uint32_t q[D / 16][4];
    // Columns are dimensions: 8n.. of tile n in order; of e4m3, 16 of tiles 2n and 2n + 1 in turn.
    float sums[D / 8][4];
    float max[2], total[2];
    // What makes products logarithms of weights.
    float scale[2];

    // The products' left side: heads `first` and the next of a row, zero from `heads` on.
    DEVICE void load_q(const bf16* first, int heads, float score_scale) {
        const int lane = static_cast<int>(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int head = g + 8 * half;
            const bf16* row = first + head * D;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                uint32_t low = 0, high = 0;
                if (head < heads && WIDE) {
                    low = load_pair(row + 16 * k + 2 * t);
                    high = load_pair(row + 16 * k + 8 + 2 * t);
                }
                if (head < heads && !WIDE) {
                    const uint32_t a = load_pair(row + 16 * k + 4 * t);
                    const uint32_t b = load_pair(row + 16 * k + 4 * t + 2);
                    low = (a & 0xffffu) | b << 16;
                    high = a >> 16 | (b & 0xffff0000u);
                }
                q[k][half] = low;
                q[k][2 + half] = high;
            }
            scale[half] = score_scale;
            if constexpr (!WIDE) scale[half] *= narrow_q(half);
        }
    }

    // Makes q f16, each head divided by the greatest power of two that is no greater than its
    // greatest element, so that nothing overflows; returns that power.
    DEVICE float narrow_q(int half) {
        float most = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            for (int i = half; i < 4; i += 2) {
                most = fmaxf(most, fabsf(low_bf16(q[k][i])));
                most = fmaxf(most, fabsf(high_bf16(q[k][i])));
            }
        }
        most = warp_max<4>(most);
        const uint32_t exponent = min(__float_as_uint(most) >> 23, 253u);
        const float divisor = __uint_as_float((254 - exponent) << 23);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            for (int i = half; i < 4; i += 2)
                q[k][i] = pack_f16(low_bf16(q[k][i]) * divisor, high_bf16(q[k][i]) * divisor);
        }
        return __uint_as_float(exponent << 23);
    }

    static DEVICE uint32_t pack(float low, float high) {
        return WIDE ? pack_bf16(low, high) : pack_f16(low, high);
    }

    static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        if constexpr (WIDE) {
            mma_16816(d, a, b0, b1);
        } else {
            mma_16816_f16(d, a, b0, b1);
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        for (int half = 0; half < 2; ++half) {
            max[half] = -INFINITY;
            total[half] = 0.0f;
        }
    }

    // scores [16 heads, 16 tokens] = q · keysᵀ, as two tiles of 8 tokens.
    DEVICE void multiply_keys(float (&scores)[2][4], const unsigned char* keys) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        const int row = lane / 16 * 8 + lane % 8, side = lane / 8 % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[0][i] = scores[1][i] = 0.0f;
#pragma unroll
        for (int pair = 0; pair < Shape::CHUNKS / 2; ++pair) {
            uint32_t k[4];
            ldmatrix_x4(k, keys + Shape::offset(row, 2 * pair + side));
            if constexpr (WIDE) {
                multiply(scores[0], q[pair], k[0], k[1]);
                multiply(scores[1], q[pair], k[2], k[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t pairs[2];
                    widen(k[i], pairs);
                    multiply(scores[i / 2], q[2 * pair + i % 2], pairs[0], pairs[1]);
                }
            }
        }
    }

    // Takes 16 tokens' scores, of which those at from..to count, into maximum and total, and makes
    // them weights, the right side's partner in multiply_values.
    DEVICE void soften(float (&scores)[2][4], int from, int to, uint32_t (&p)[4]) {
        const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int token = i / 4 * 8 + 2 * t + i % 2;
            float& score = scores[i / 4][i % 4];
            score = token >= from && token < to ? score * scale[i / 2 % 2] : -INFINITY;
        }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* low = &scores[0][2 * half];
            float* high = &scores[1][2 * half];
            const float most = fmaxf(fmaxf(low[0], low[1]), fmaxf(high[0], high[1]));
            const float next = fmaxf(max[half], warp_max<4>(most));
            shrink[half] = exp2_approx(max[half] - next);
            max[half] = next;
            for (int j = 0; j < 2; ++j) {
                low[j] = exp2_approx(low[j] - next);
                high[j] = exp2_approx(high[j] - next);
            }
            total[half] = total[half] * shrink[half] + ((low[0] + low[1]) + (high[0] + high[1]));
            p[half] = pack(low[0], low[1]);
            p[2 + half] = pack(high[0], high[1]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
    }

    // sums += p [16 heads, 16 tokens] · values.
    DEVICE void multiply_values(const uint32_t (&p)[4], const unsigned char* values) {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
#pragma unroll
        for (int pair = 0; pair < Shape::CHUNKS / 2; ++pair) {
            uint32_t v[4];
            ldmatrix_x4_trans(v, values + Shape::offset(lane % 16, 2 * pair + lane / 16));
            if constexpr (WIDE) {
                multiply(sums[2 * pair], p, v[0], v[1]);
                multiply(sums[2 * pair + 1], p, v[2], v[3]);
            } else {
#pragma unroll
                for (int chunk = 0; chunk < 2; ++chunk) {
                    uint32_t low[2], high[2];
                    widen(v[2 * chunk], low);
                    widen(v[2 * chunk + 1], high);
                    multiply(sums[4 * pair + 2 * chunk], p, low[0], high[0]);
                    multiply(sums[4 * pair + 2 * chunk + 1], p, low[1], high[1]);
                }
            }
        }
    }

    // The dimension of sums[n][i].
    static DEVICE int dimension(int n, int i) {
        const int t = static_cast<int>(threadIdx.x) % 4;
        return WIDE ? 8 * n + 2 * t + i % 2 : n / 2 * 16 + 4 * t + i % 2 * 2 + n % 2;
    }
};

// Where warps leave their results, over the tiles.
template <typename T, int D>
struct Merge {
    // Rows of heads a few banks apart.
    static constexpr int STRIDE = D + (sizeof(T) == 2 ? 8 : 16);
    float sums[WARPS][TILE_HEADS][STRIDE];
    Weight weights[WARPS][TILE_HEADS];
};

// Goes through the warp's KV blocks.
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
    const int* table = args.block_tables + static_cast<uint64_t>(split.sequence) * args.table_cols;
    const int ids = lane < blocks ? table[first_block + lane] : 0;

    // Copies the warp's i-th tile of keys (which = 0) or values (1); each copy is a group of its
    // own, empty past the last.
    const auto fetch = [&](int i, int which) {
        if (i < count) {
            const int at = warp + i * WARPS, token = (first_block + at) * BLOCK_TOKENS;
            const int64_t block = __shfl_sync(ALL_LANES, ids, at);
            const unsigned char* from = which == 0 ? args.keys : args.values;
            Shape::fetch(ring + (i % STAGES * 2 + which) * Shape::BYTES,
                         from + (block * args.kv_heads + blockIdx.y) * Shape::BYTES,
                         split.first - token, split.end - token);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        fetch(i, 0);
        fetch(i, 1);
    }
    const uint64_t row = static_cast<uint64_t>(args.row_starts[split.sequence]) * args.qkv_cols;
    const int tile = static_cast<int>(blockIdx.z) * TILE_HEADS;
    mine.load_q(args.qkv + row + (blockIdx.y * args.group + tile) * D,
                min(args.group - tile, TILE_HEADS), args.score_scale);

    for (int i = 0; i < count; ++i) {
        const unsigned char* keys = ring + i % STAGES * 2 * Shape::BYTES;
        const int token = (first_block + warp + i * WARPS) * BLOCK_TOKENS;
        float scores[2][4];
        uint32_t p[4];
        // After the group of these keys came those of its values, of all later stages, and none.
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
        mine.multiply_keys(scores, keys);
        __syncwarp();
        fetch(i + STAGES, 0);
        mine.soften(scores, split.first - token, split.end - token, p);
        // As many: the keys of the stage after the last are newer than these values.
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
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
    const int tile = static_cast<int>(blockIdx.z) * TILE_HEADS;
    const int heads = min(args.group - tile, TILE_HEADS);
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
    const int first = static_cast<int>(blockIdx.y) * args.group + tile;
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
            const float scale = args.value_scale / weight.sum;
            const Bytes8 result{{pack_bf16(x[0] * scale, x[1] * scale),
                                 pack_bf16(x[2] * scale, x[3] * scale)}};
            store8(args.out + (row + first + head) * D + d, result);
            continue;
        }
        const uint64_t slot = static_cast<uint64_t>(split.slot) * args.q_heads + first + head;
        Bytes16 sums;
        for (int i = 0; i < 4; ++i) sums.words[i] = __float_as_uint(x[i] * args.value_scale);
        store16(args.sums + slot * D + d, sums);
        if (d == 0) reinterpret_cast<Weight*>(args.weights)[slot] = weight;
    }
}

template <typename T, int D>
DEVICE void decode(const DecodeArgs& args) {
    const Split split = split_of(args);
    // Outside the window: attention_combine does not look here.
    if (split.first >= split.end) return;
    Lane<T, D> mine;
    mine.clear();
    walk(args, split, mine);
    merge(args, split, mine);
}

KERNEL(attention_decode_d64_bf16, DecodeArgs, THREADS, BLOCKS) { decode<bf16, 64>(args); }
KERNEL(attention_decode_d128_bf16, DecodeArgs, THREADS, BLOCKS) { decode<bf16, 128>(args); }
KERNEL(attention_decode_d64_fp8, DecodeArgs, THREADS, BLOCKS) { decode<e4m3, 64>(args); }
KERNEL(attention_decode_d128_fp8, DecodeArgs, THREADS, BLOCKS) { decode<e4m3, 128>(args); }

// out = Σ 2^(max - greatest max) · sums / Σ 2^(max - greatest max) · sum over the splits of one
// sequence and head, in an order that their number alone decides. A thread block has one sequence
// and head; its warps take splits in turn, a lane D / 32 dimensions. Moves 4 (D + 2) bytes a split
// and head, which the kernel before left in the L2: bound by latency.
struct CombineArgs {
    bf16* out;                // [T, q_heads * D]
    const float* sums;        // [slots, q_heads, D]
    const float* weights;     // [slots, q_heads, 2]
    const int* decoding;      // [grid.x, 3]: sequence, number of splits, slot of the first
    const int* row_starts;    // [S + 1]
    const int* context_lens;  // [S]
    int q_heads;              // grid.y
    int window;               // as above
};

template <int D>
DEVICE void combine(const CombineArgs& args) {
    struct alignas(D / 8) Part {
        float x[D / WARP];
    };
    const int warp = static_cast<int>(threadIdx.x) / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const int* cut = args.decoding + 3 * static_cast<uint64_t>(blockIdx.x);
    const int sequence = cut[0], count = cut[1];
    const int context = args.context_lens[sequence];
    // Splits before the window have left nothing.
    const int first = max(context - args.window, 0) / SPLIT_TOKENS;
    const auto slot = [&](int split) {
        return (static_cast<uint64_t>(cut[2]) + split) * args.q_heads + blockIdx.y;
    };
    const auto* weights = reinterpret_cast<const Weight*>(args.weights);
    const auto* parts = reinterpret_cast<const Part*>(args.sums);

    float most = -INFINITY, total = 0.0f;
    for (int s = first + lane; s < count; s += WARP) most = fmaxf(most, weights[slot(s)].max);
    most = warp_max(most);
    for (int s = first + lane; s < count; s += WARP) {
        const Weight weight = weights[slot(s)];
        total += exp2_approx(weight.max - most) * weight.sum;
    }
    total = warp_sum(total);

    Part sum{};
#pragma unroll 4
    for (int s = first + warp; s < count; s += WARPS) {
        const float share = exp2_approx(weights[slot(s)].max - most);
        const Part part = parts[slot(s) * WARP + lane];
        for (int i = 0; i < D / WARP; ++i) sum.x[i] += share * part.x[i];
    }
    auto* shared = shared_memory<float>();
    reinterpret_cast<Part*>(shared)[threadIdx.x] = sum;
    __syncthreads();
    const int d = static_cast<int>(threadIdx.x);
    if (d >= D) return;
    float x = 0.0f;
    for (int w = 0; w < WARPS; ++w) x += shared[w * D + d];
    const uint64_t row = static_cast<uint64_t>(args.row_starts[sequence]);
    args.out[(row * args.q_heads + blockIdx.y) * D + d] = to_bf16(x / total);
}

KERNEL(attention_combine_d64, CombineArgs, THREADS) { combine<64>(args); }
KERNEL(attention_combine_d128, CombineArgs, THREADS) { combine<128>(args); }
