// Products of few tokens with 4-bit weights, and the order of their columns. Layout: `int4.cuh`.
//
// out [T, N] = x [T, K] · W [N, K]ᵀ + bias, in tiles of 256 rows and of 8, 16 or 32 tokens. Moves
// the weights once, and x once for each tile and split from the L2. Bound by memory up to 16
// tokens: a warp issues 348 (8 tokens) or 370 (16) instructions a stage, two warps of a scheduler
// 740 of the 940 clocks in which a multiprocessor's share of 4.3 TB/s brings the next 17 KB; beyond
// by those instructions. Three stages, 51 KB and x, are on their way at any time: twice what
// latency times bandwidth asks of a multiprocessor. Registers: 64, 104 and 172.
//
// Shared memory, without bank conflicts: weights 16 bytes a lane in order; x as [slot][token][32],
// where a fragment's 32 lanes read 512 consecutive bytes.
//
// The columns are cut into as many splits as the weight's shape says (`grid.y`), never the tokens.
// A split leaves its sums; the last one to arrive adds all of them in the order of the columns. So
// a token's bits depend neither on the batch nor on which tile width multiplied it.
//
// W is the M side of the product and the tokens are its N side, in eights: few waste nothing. The
// scale multiplies the f32 sums of at most 64 columns: exacter than scaling the fragments, and
// fewer instructions below 32 tokens.
#include "int4.cuh"

using namespace int4_weights;

constexpr int THREADS = 256;
// Strips that a block multiplies. Two warps share one: the first takes columns 0 to 63 of every
// stage, the second the others.
constexpr int STRIPS = 4;
constexpr int TILE = STRIPS * STRIP;
constexpr int STAGES = 4;
// Floats between the tokens' rows of sums in shared memory: 4 more than a multiple of the banks, so
// that the 32 lanes of a fragment's write have a bank each.
constexpr int SUMS_STRIDE = TILE + 4;

struct Int4LinearArgs {
    const unsigned char* weight;  // [strips][stages] records
    const bf16* x;                // [tokens, cols]
    const bf16* bias;             // [rows] or null
    void* out;                    // [tokens, rows], f32 or bf16
    float* sums;                  // [tiles · token tiles][splits][tokens of a tile][256]
    uint32_t* arrived;            // [tiles · token tiles], zero before and after
    uint32_t tokens;
    uint32_t rows;  // a multiple of 8
    uint32_t cols;  // a multiple of 8
    uint32_t lead;  // columns of the first stage that precede x's, a multiple of 8
    uint32_t stages;
    uint32_t token_tiles;
    uint32_t out_f32;
    uint32_t unused;
};

// Which part of the product a block makes.
struct Part {
    uint32_t tile, first_token, first_stage, end_stage;
};

template <int tokens>
DEVICE Part part_of_block(const Int4LinearArgs& args) {
    const uint32_t splits = gridDim.y, split = blockIdx.y;
    return {blockIdx.x / args.token_tiles, blockIdx.x % args.token_tiles * tokens,
            static_cast<uint32_t>(static_cast<uint64_t>(args.stages) * split / splits),
            static_cast<uint32_t>(static_cast<uint64_t>(args.stages) * (split + 1) / splits)};
}

template <int tokens, int group>
constexpr int STAGE_BYTES = STRIPS * RECORD<group> + tokens * STAGE_COLS * 2;

// What this thread copies of every stage, one stage after another.
template <int tokens, int group>
struct Feed {
    const unsigned char* weight;  // its first 16 bytes of the next record; null past the last row
    const bf16* x;                // its token's row
    uint32_t col;                 // its first column there; those before the row wrap around
    uint32_t cols;                // of the row; none past the last token
    uint32_t left;                // stages

    DEVICE Feed(const Int4LinearArgs& args, const Part& part) {
        const uint32_t thread = threadIdx.x % STRIP;
        const uint32_t strip = part.tile * STRIPS + threadIdx.x / STRIP;
        const uint64_t first = static_cast<uint64_t>(strip) * args.stages + part.first_stage;
        weight = strip * STRIP < args.rows ? args.weight + first * RECORD<group> + thread * 16
                                           : nullptr;
        const uint32_t token = part.first_token + threadIdx.x / 4 % tokens;
        x = args.x + static_cast<uint64_t>(token < args.tokens ? token : 0) * args.cols;
        cols = token < args.tokens ? args.cols : 0;
        col = part.first_stage * STAGE_COLS - args.lead +
              threadIdx.x / 4 / tokens * SLOT_COLS + threadIdx.x % 4 * 8;
        left = part.end_stage - part.first_stage;
    }

    // Starts to copy the next stage, if there is one: four records, then x. Ends a group anyway.
    DEVICE void copy(unsigned char* to) {
        if (left > 0) {
            --left;
            if (weight != nullptr) copy_weight(to + threadIdx.x / STRIP * RECORD<group>);
            copy_x(to + STRIPS * RECORD<group> + threadIdx.x * 16);
        }
        cp_async_commit();
    }

    DEVICE void copy_weight(unsigned char* to) {
        const uint32_t thread = threadIdx.x % STRIP;
#pragma unroll
        for (uint32_t at = 0; at < RECORD<group>; at += STRIP * 16)
            if (at + thread * 16 < RECORD<group>) cp_async_16(to + at + thread * 16, weight + at);
        weight += RECORD<group>;
    }

    DEVICE void copy_x(unsigned char* to) {
        constexpr uint32_t PIECES = tokens * STAGE_COLS / 8;
#pragma unroll
        for (uint32_t i = 0; i < PIECES; i += THREADS) {
            if (PIECES < THREADS && threadIdx.x >= PIECES) break;
            // The next piece of a thread is of the same row, some slots on.
            const uint32_t at = col + i / 4 / tokens * SLOT_COLS;
            const bool valid = at < cols;
            cp_async_16(to + i * 16, x + (valid ? at : 0), valid);
        }
        col += STAGE_COLS;
    }
};

template <int tokens>
using Sums = float[4][tokens / 8][4];

// Adds a warp's half of a stage to its sums.
template <int tokens, int group>
DEVICE void multiply_half(Sums<tokens>& sums, const unsigned char* record, const unsigned char* x,
                          int half) {
    constexpr int COLS = STAGE_COLS / 2, RUN = group < COLS ? group : COLS;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int run = 0; run < COLS / RUN; ++run) {
        const unsigned char* factors =
            record + STRIP_BYTES + (half * COLS + run * RUN) / group * FACTOR_BYTES;
        Bytes16 factor[2];
#pragma unroll
        for (int rows = 0; rows < 2; ++rows)
            factor[rows] = load16(factors + rows * (FACTOR_BYTES / 2) + lane / 4 * 16);
        Sums<tokens> part = {};
#pragma unroll
        for (int i = 0; i < RUN / SLOT_COLS; ++i) {
            const int slot = (half * COLS + run * RUN) / SLOT_COLS + i;
            Bytes16 b[tokens / 8];
#pragma unroll
            for (int n = 0; n < tokens / 8; ++n)
                b[n] = load16(x + (slot * tokens + n * 8) * (SLOT_COLS * 2) + lane * 16);
#pragma unroll
            for (int rows = 0; rows < 2; ++rows) {
                const Bytes16 q =
                    load16(record + slot * SLOT_BYTES + rows * (SLOT_BYTES / 2) + lane * 16);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const uint32_t upper = biased_zero(factor[rows].words[2 * m]);
                    const uint32_t lower = biased_zero(factor[rows].words[2 * m + 1]);
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        uint32_t a[4];
                        dequantize(a, q.words[2 * m + step], upper, lower);
#pragma unroll
                        for (int n = 0; n < tokens / 8; ++n)
                            mma_16816(part[2 * rows + m][n], a, b[n].words[2 * step],
                                      b[n].words[2 * step + 1]);
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const float upper = half_to_float(factor[m / 2].words[m % 2 * 2]);
            const float lower = half_to_float(factor[m / 2].words[m % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < tokens / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[m][n][i] = fmaf(part[m][n][i], i < 2 ? upper : lower, sums[m][n][i]);
            }
        }
    }
}

// Adds the two warps' sums of every strip: total [tokens][SUMS_STRIDE], by token and row.
template <int tokens>
DEVICE void join_halves(float* total, const Sums<tokens>& sums) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float* mine = total + lane % 4 * 2 * SUMS_STRIDE + warp / 2 * STRIP + lane / 4;
    for (int half = 1; half >= 0; --half) {
        // First that nobody multiplies any more where sums go; then that the others' are there.
        __syncthreads();
        if (warp % 2 != half) continue;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int n = 0; n < tokens / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* at = mine + (n * 8 + i % 2) * SUMS_STRIDE + m * 16 + i / 2 * 8;
                    *at = half == 1 ? sums[m][n][i] : sums[m][n][i] + *at;
                }
            }
        }
    }
    __syncthreads();
}

// Eight rows' sums of one token.
struct Eight {
    Bytes16 halves[2];
};

DEVICE float value(const Eight& sums, int i) {
    return __uint_as_float(sums.halves[i / 4].words[i % 4]);
}

DEVICE void write_out(const Int4LinearArgs& args, uint32_t token, uint32_t row, const Eight& sums) {
    if (token >= args.tokens || row >= args.rows) return;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = value(sums, i);
    if (args.bias != nullptr) {
        const Bytes16 bias = load16(args.bias + row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] += low_bf16(bias.words[i]);
            x[2 * i + 1] += high_bf16(bias.words[i]);
        }
    }
    const uint64_t at = static_cast<uint64_t>(token) * args.rows + row;
    if (args.out_f32 != 0) {
        float* out = static_cast<float*>(args.out) + at;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Bytes16 v;
#pragma unroll
            for (int i = 0; i < 4; ++i) v.words[i] = __float_as_uint(x[4 * h + i]);
            store16(out + 4 * h, v);
        }
    } else {
        Bytes16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        store16(static_cast<bf16*>(args.out) + at, v);
    }
}

// Leaves this split's total in `sums`; true in the block that came last, which then sees all.
template <int tokens>
DEVICE bool leave_sums(const Int4LinearArgs& args, float* sums, float* total) {
    for (uint32_t i = threadIdx.x; i < tokens * TILE / 8; i += THREADS) {
        const uint32_t token = i / (TILE / 8), row = i % (TILE / 8) * 8;
        const uint64_t at = static_cast<uint64_t>(blockIdx.y) * tokens * TILE + token * TILE + row;
#pragma unroll
        for (int h = 0; h < 2; ++h)
            store16(sums + at + 4 * h, load16(total + token * SUMS_STRIDE + row + 4 * h));
    }
    __threadfence();
    __syncthreads();
    auto* last = reinterpret_cast<uint32_t*>(total);
    if (threadIdx.x == 0) *last = atomicAdd(args.arrived + blockIdx.x, 1u) == gridDim.y - 1;
    __syncthreads();
    const bool result = *last != 0;
    __threadfence();
    if (result && threadIdx.x == 0) args.arrived[blockIdx.x] = 0;
    return result;
}

// Adds the splits' sums, in their order.
template <int tokens>
DEVICE Eight add_splits(const float* sums, uint32_t token, uint32_t row) {
    float x[8] = {};
    sums += token * TILE + row;
#pragma unroll 4
    for (uint32_t split = 0; split < gridDim.y; ++split) {
        Eight more;
#pragma unroll
        for (int h = 0; h < 2; ++h) more.halves[h] = load16_shared_by_blocks(sums + 4 * h);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] += value(more, i);
        sums += tokens * TILE;
    }
    Eight all;
#pragma unroll
    for (int i = 0; i < 8; ++i) all.halves[i / 4].words[i % 4] = __float_as_uint(x[i]);
    return all;
}

template <int tokens, int group>
DEVICE void int4_linear(const Int4LinearArgs& args) {
    auto* shared = shared_memory<unsigned char>();
    constexpr uint32_t BYTES = STAGE_BYTES<tokens, group>;
    const Part part = part_of_block<tokens>(args);
    const int warp = threadIdx.x / WARP;
    const bool has_rows = (part.tile * STRIPS + warp / 2) * STRIP < args.rows;
    Feed<tokens, group> feed(args, part);
#pragma unroll
    for (uint32_t i = 0; i < STAGES - 1; ++i) feed.copy(shared + i * BYTES);
    Sums<tokens> sums = {};
    uint32_t place = 0, free = STAGES - 1;
    for (uint32_t stage = part.first_stage; stage < part.end_stage; ++stage) {
        cp_async_wait<STAGES - 2>();
        // This stage has arrived for all, and nobody reads the one before it any more.
        __syncthreads();
        feed.copy(shared + free * BYTES);
        const unsigned char* now = shared + place * BYTES;
        if (has_rows)
            multiply_half<tokens, group>(sums, now + warp / 2 * RECORD<group>,
                                         now + STRIPS * RECORD<group>, warp % 2);
        free = place;
        place = place + 1 == STAGES ? 0 : place + 1;
    }
    auto* total = reinterpret_cast<float*>(shared);
    join_halves<tokens>(total, sums);
    const bool whole = gridDim.y == 1;
    float* all = args.sums + static_cast<uint64_t>(blockIdx.x) * gridDim.y * tokens * TILE;
    if (!whole && !leave_sums<tokens>(args, all, total)) return;
    for (uint32_t i = threadIdx.x; i < tokens * TILE / 8; i += THREADS) {
        const uint32_t token = i / (TILE / 8), row = i % (TILE / 8) * 8;
        Eight made;
        if (whole) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
                made.halves[h] = load16(total + token * SUMS_STRIDE + row + 4 * h);
        } else {
            made = add_splits<tokens>(all, token, row);
        }
        write_out(args, part.first_token + token, part.tile * TILE + row, made);
    }
}

KERNEL(int4_linear_t8_g32, Int4LinearArgs, THREADS) { int4_linear<8, 32>(args); }
KERNEL(int4_linear_t8_g64, Int4LinearArgs, THREADS) { int4_linear<8, 64>(args); }
KERNEL(int4_linear_t8_g128, Int4LinearArgs, THREADS) { int4_linear<8, 128>(args); }
KERNEL(int4_linear_t16_g32, Int4LinearArgs, THREADS) { int4_linear<16, 32>(args); }
KERNEL(int4_linear_t16_g64, Int4LinearArgs, THREADS) { int4_linear<16, 64>(args); }
KERNEL(int4_linear_t16_g128, Int4LinearArgs, THREADS) { int4_linear<16, 128>(args); }
KERNEL(int4_linear_t32_g32, Int4LinearArgs, THREADS) { int4_linear<32, 32>(args); }
KERNEL(int4_linear_t32_g64, Int4LinearArgs, THREADS) { int4_linear<32, 64>(args); }
KERNEL(int4_linear_t32_g128, Int4LinearArgs, THREADS) { int4_linear<32, 128>(args); }

// ---- permuted columns (GPTQ's act-order) ------------------------------------------------------
//
// out [T, places] = x [T, cols] by place: column order[place], 0 where that is negative. So that
// groups of columns lie together as the records want them. Small beside the weights.

struct Int4GatherArgs {
    bf16* out;
    const bf16* x;
    const int32_t* order;
    uint32_t cols;
    uint32_t places;
};

KERNEL(int4_gather_columns, Int4GatherArgs, THREADS) {
    const uint32_t place = blockIdx.x * THREADS + threadIdx.x;
    if (place >= args.places) return;
    const int32_t col = args.order[place];
    const bf16* x = args.x + static_cast<uint64_t>(blockIdx.y) * args.cols;
    const bf16 value = col < 0 ? bf16{0} : x[col];
    args.out[static_cast<uint64_t>(blockIdx.y) * args.places + place] = value;
}
