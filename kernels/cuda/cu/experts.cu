// Mixtures of experts: which experts each token goes to, products by pair of token and expert, and
// the sum of a token's results. What pairs and places are: `routing.rs`.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// ---- choosing ----------------------------------------------------------------------------------
//
// A warp for each token. The k largest logits are found one after another, each the largest of
// those behind the one before, so nothing is marked and no list is held: k (E / 32) reads a lane,
// from the L1 after the first round. Latency-bound, as all work on 100 numbers is.

struct RouteArgs {
    const float* logits;  // [tokens, logit_cols]
    float* weights;       // [tokens, weight_cols]
    int32_t* chosen;      // [tokens, per_token]
    uint32_t tokens;
    uint32_t experts;
    uint32_t per_token;
    uint32_t logit_cols;   // experts, and one more where there is a shared expert
    uint32_t weight_cols;  // per_token, and one more
    uint32_t normalise;
};

// Orders logits as IEEE 754's total order does, the first of equals highest; never 0.
DEVICE uint64_t rank_of(float logit, uint32_t expert) {
    const uint32_t bits = __float_as_uint(logit);
    const uint32_t key = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
    return static_cast<uint64_t>(key) << 32 | (0xffffffffu - expert);
}

// e^x.
DEVICE float weight_of(float x) { return exp2_approx(x * 1.4426950408889634f); }

KERNEL(experts_choose, RouteArgs, THREADS) {
    follow_launches();
    const uint32_t token = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= args.tokens) return;
    const float* logits = args.logits + static_cast<uint64_t>(token) * args.logit_cols;
    float* weights = args.weights + static_cast<uint64_t>(token) * args.weight_cols;
    int32_t* chosen = args.chosen + static_cast<uint64_t>(token) * args.per_token;
    uint64_t last = ~0ull;
    float largest = 0.0f, total = 0.0f, mine = 0.0f;
    for (uint32_t j = 0; j < args.per_token; ++j) {
        uint64_t best = 0;
        for (uint32_t e = lane; e < args.experts; e += WARP) {
            const uint64_t rank = rank_of(logits[e], e);
            if (rank < last && rank > best) best = rank;
        }
        last = warp_max_key(best);
        const uint32_t expert = 0xffffffffu - static_cast<uint32_t>(last);
        const float logit = logits[expert];
        if (j == 0) largest = logit;
        const float weight = weight_of(logit - largest);
        total += weight;
        // A lane keeps the weight that it writes: there are at most as many as lanes.
        if (lane == j) mine = weight;
        if (lane == 0) chosen[j] = static_cast<int32_t>(expert);
    }
    if (args.normalise == 0) {
        total = 0.0f;
        for (uint32_t e = lane; e < args.experts; e += WARP)
            total += weight_of(logits[e] - largest);
        total = warp_sum(total);
    }
    if (lane < args.per_token) weights[lane] = mine / total;
    if (args.weight_cols > args.per_token && lane == 0)
        weights[args.per_token] = 1.0f / (1.0f + weight_of(-logits[args.experts]));
}

// ---- sorting -----------------------------------------------------------------------------------
//
// A block for each expert: it counts the pairs of the experts before its own, then gives its own
// pairs their places in order. Every block reads all pairs twice: 128 experts and 65,536 pairs are
// 64 MB from the L2, and no two blocks wait for each other.

struct SortArgs {
    const int32_t* chosen;  // [pairs]
    int32_t* pairs;         // [pairs]
    int32_t* places;        // [pairs]
    int32_t* starts;        // [experts + 1]
    uint32_t count;
    uint32_t unused;
};

// The block's sum; `counts`: WARPS numbers of shared memory.
DEVICE uint32_t block_count(uint32_t x, uint32_t* counts) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) counts[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < WARPS; ++w) x += counts[w];
    return x;
}

KERNEL(experts_sort, SortArgs, THREADS) {
    follow_launches();
    auto* counts = shared_memory<uint32_t>();
    const auto expert = static_cast<int32_t>(blockIdx.x);
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t before = 0;
    for (uint32_t i = threadIdx.x; i < args.count; i += THREADS)
        before += args.chosen[i] < expert ? 1 : 0;
    uint32_t next = block_count(before, counts);
    if (threadIdx.x == 0) {
        args.starts[expert] = static_cast<int32_t>(next);
        if (blockIdx.x == gridDim.x - 1) args.starts[gridDim.x] = static_cast<int32_t>(args.count);
    }
    for (uint32_t first = 0; first < args.count; first += THREADS) {
        const uint32_t pair = first + threadIdx.x;
        const bool mine = pair < args.count && args.chosen[pair] == expert;
        const uint32_t votes = __ballot_sync(ALL_LANES, mine);
        __syncthreads();
        if (lane == 0) counts[warp] = static_cast<uint32_t>(__popc(votes));
        __syncthreads();
        uint32_t place = next + static_cast<uint32_t>(__popc(votes & ((1u << lane) - 1)));
        for (uint32_t w = 0; w < WARPS; ++w) {
            if (w < warp) place += counts[w];
            next += counts[w];
        }
        if (mine) {
            args.pairs[place] = static_cast<int32_t>(pair);
            args.places[pair] = static_cast<int32_t>(place);
        }
    }
}

// ---- products ----------------------------------------------------------------------------------
//
// out [pairs, N] by place = x · W[expert] [N, K]ᵀ, in tiles of 128 rows of W and 16 or 64 places of
// one expert. W is the M side of the product and the places are its N side: few waste little. The
// sum over K runs in one order, 16 columns at a time, whatever the tile: a pair's bits depend on
// nothing but its row of x. Three stages of 64 columns, 55 or 74 KB, are on their way at any time.
//
// How many tiles an expert has only the device knows: the grid has room for the most there can be,
// and a block finds its own by counting those of the experts before. Blocks without one end.
//
// Shared memory, without bank conflicts: rows of 128 bytes, the 16-byte chunk c of row r at
// c ^ (r % 8), as ldmatrix reads them.

constexpr int ROWS = 128;
constexpr int STAGE_COLS = 64;
constexpr int CHUNKS = STAGE_COLS / 8;
constexpr int STAGES = 3;
// Floats between the places' rows of sums: the lanes of a fragment's write have a bank each.
constexpr int SUMS_STRIDE = ROWS + 4;

struct ExpertLinearArgs {
    const bf16* weight;     // [experts, rows, cols]
    const bf16* x;          // [tokens or pairs, cols]
    bf16* out;              // [pairs, rows]
    const int32_t* pairs;   // [pairs]
    const int32_t* starts;  // [experts + 1]
    uint32_t experts;
    uint32_t rows;      // a multiple of 8
    uint32_t cols;      // a multiple of 8
    uint32_t pairs_of;  // pairs with one row of x: k, or 0 where x has a row for each place
};

template <int places>
constexpr int STAGE_BYTES = (ROWS + places) * STAGE_COLS * 2;

// Which expert's places a block multiplies.
struct Tile {
    int32_t expert, first, end;
};

// Tile `at` of all, or none: expert -1. `found`: three numbers of shared memory.
template <int places>
DEVICE Tile find_tile(const ExpertLinearArgs& args, uint32_t at, int32_t* found) {
    if (threadIdx.x < WARP) {
        const uint32_t lane = threadIdx.x;
        if (lane < 3) found[lane] = -1;
        __syncwarp();
        uint32_t before = 0;
        for (uint32_t base = 0; base < args.experts && before <= at; base += WARP) {
            const uint32_t expert = base + lane;
            const bool valid = expert < args.experts;
            const int32_t start = valid ? args.starts[expert] : 0;
            const int32_t end = valid ? args.starts[expert + 1] : 0;
            const uint32_t tiles = static_cast<uint32_t>(end - start + places - 1) / places;
            const uint32_t upto = warp_prefix(tiles);
            const uint32_t first = before + upto - tiles;
            if (at >= first && at < first + tiles) {
                found[0] = static_cast<int32_t>(expert);
                found[1] = start + static_cast<int32_t>(at - first) * places;
                found[2] = end;
            }
            before += __shfl_sync(ALL_LANES, upto, WARP - 1);
        }
    }
    __syncthreads();
    const Tile tile = {found[0], found[1], found[2]};
    // Stages lie where this was.
    __syncthreads();
    return tile;
}

// Where chunk `chunk` of row `row` lies in a stage's matrix.
DEVICE uint32_t chunk_at(uint32_t row, uint32_t chunk) {
    return (row * CHUNKS + (chunk ^ (row % 8))) * 16;
}

// What this thread copies of every stage: pieces of the same chunk, 32 rows apart.
template <int places>
struct Feed {
    static constexpr int WEIGHT_PIECES = ROWS * CHUNKS / THREADS;
    static constexpr int X_PIECES = places * CHUNKS > THREADS ? places * CHUNKS / THREADS : 1;
    const bf16* weight;
    const bf16* x[X_PIECES];  // null past the last place
    uint32_t row, chunk, rows_left, cols, row_stride;

    DEVICE Feed(const ExpertLinearArgs& args, const Tile& tile, uint32_t first_row) {
        row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        cols = args.cols;
        row_stride = THREADS / CHUNKS * args.cols;
        rows_left = args.rows - first_row;
        const uint64_t at = static_cast<uint64_t>(tile.expert) * args.rows + first_row + row;
        weight = args.weight + at * args.cols;
#pragma unroll
        for (int i = 0; i < X_PIECES; ++i) {
            const int32_t own = static_cast<int32_t>(row) + i * (THREADS / CHUNKS);
            const int32_t place = tile.first + own;
            x[i] = nullptr;
            if (own >= places || place >= tile.end) continue;
            const uint32_t from = args.pairs_of == 0
                                      ? static_cast<uint32_t>(place)
                                      : static_cast<uint32_t>(args.pairs[place]) / args.pairs_of;
            x[i] = args.x + static_cast<uint64_t>(from) * args.cols;
        }
    }

    // Starts to copy the stage at column `col`, if there is one: W, then x. Ends a group anyway.
    DEVICE void copy(unsigned char* to, uint32_t col) {
        const uint32_t at = col + chunk * 8;
        if (col < cols) {
#pragma unroll
            for (int i = 0; i < WEIGHT_PIECES; ++i) {
                const uint32_t r = row + i * (THREADS / CHUNKS);
                const bool valid = at < cols && r < rows_left;
                const bf16* from = valid ? weight + static_cast<uint64_t>(i) * row_stride + at
                                         : weight;
                cp_async_16(to + chunk_at(r, chunk), from, valid);
            }
#pragma unroll
            for (int i = 0; i < X_PIECES; ++i) {
                const uint32_t r = row + i * (THREADS / CHUNKS);
                if (places < THREADS / CHUNKS && r >= places) continue;
                const bool valid = at < cols && x[i] != nullptr;
                cp_async_16(to + ROWS * STAGE_COLS * 2 + chunk_at(r, chunk),
                            valid ? x[i] + at : weight, valid);
            }
        }
        cp_async_commit();
    }
};

// Adds a warp's 16 rows of a stage to its sums.
template <int places>
DEVICE void multiply_stage(float (&sums)[places / 8][4], const unsigned char* stage) {
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned char* x = stage + ROWS * STAGE_COLS * 2;
#pragma unroll
    for (uint32_t step = 0; step < STAGE_COLS / 16; ++step) {
        uint32_t a[4];
        ldmatrix_x4(a, stage + chunk_at(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (uint32_t n = 0; n < places / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4(b, x + chunk_at(n * 16 + lane / 16 * 8 + lane % 8,
                                        step * 2 + lane / 8 % 2));
            mma_16816(sums[2 * n], a, b[0], b[1]);
            mma_16816(sums[2 * n + 1], a, b[2], b[3]);
        }
    }
}

template <int places>
DEVICE void write_tile(const ExpertLinearArgs& args, const Tile& tile, uint32_t first_row,
                       const float (&sums)[places / 8][4], float* total) {
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < places / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t place = n * 8 + lane % 4 * 2 + i % 2;
            total[place * SUMS_STRIDE + warp * 16 + lane / 4 + i / 2 * 8] = sums[n][i];
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < places * ROWS / 8; i += THREADS) {
        const uint32_t place = i / (ROWS / 8), row = i % (ROWS / 8) * 8;
        const int32_t to = tile.first + static_cast<int32_t>(place);
        if (to >= tile.end || first_row + row >= args.rows) continue;
        Bytes16 v;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float* pair = total + place * SUMS_STRIDE + row + 2 * w;
            v.words[w] = pack_bf16(pair[0], pair[1]);
        }
        store16(args.out + static_cast<uint64_t>(to) * args.rows + first_row + row, v);
    }
}

template <int places>
DEVICE void expert_linear(const ExpertLinearArgs& args) {
    follow_launches();
    auto* memory = shared_memory<unsigned char>();
    const Tile tile = find_tile<places>(args, blockIdx.y, reinterpret_cast<int32_t*>(memory));
    if (tile.expert < 0) return;
    const uint32_t first_row = blockIdx.x * ROWS;
    Feed<places> feed(args, tile, first_row);
    for (uint32_t s = 0; s < STAGES - 1; ++s)
        feed.copy(memory + s * STAGE_BYTES<places>, s * STAGE_COLS);
    float sums[places / 8][4] = {};
    uint32_t slot = 0, next = STAGES - 1;
    for (uint32_t col = 0; col < args.cols; col += STAGE_COLS) {
        cp_async_wait<STAGES - 2>();
        // This stage is there for all, and nobody reads the one before any more.
        __syncthreads();
        feed.copy(memory + next * STAGE_BYTES<places>, col + (STAGES - 1) * STAGE_COLS);
        multiply_stage<places>(sums, memory + slot * STAGE_BYTES<places>);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    cp_async_wait<0>();
    write_tile<places>(args, tile, first_row, sums, reinterpret_cast<float*>(memory));
}

KERNEL(expert_linear_t16, ExpertLinearArgs, THREADS) { expert_linear<16>(args); }
KERNEL(expert_linear_t64, ExpertLinearArgs, THREADS) { expert_linear<64>(args); }

// ---- combining ---------------------------------------------------------------------------------
//
// out [tokens, N] = the results of each token's experts times their weights, in order, then the
// shared expert's. Bound by memory: 2 (k + 1) bytes an element, k + 2 with a shared expert.

struct CombineArgs {
    bf16* out;            // [tokens, row_vectors · 8]
    const bf16* x;        // [pairs, row_vectors · 8] by place
    const bf16* shared;   // [tokens, row_vectors · 8] or null
    const int32_t* places;
    const float* weights;  // [tokens, per_token], and one more where there is `shared`
    uint32_t vectors;      // of out
    uint32_t row_vectors;
    uint32_t per_token;
    uint32_t unused;
};

DEVICE void add_scaled(float (&sum)[8], const Bytes16& x, float weight) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        sum[2 * w] = fmaf(low_bf16(x.words[w]), weight, sum[2 * w]);
        sum[2 * w + 1] = fmaf(high_bf16(x.words[w]), weight, sum[2 * w + 1]);
    }
}

KERNEL(experts_combine, CombineArgs, THREADS) {
    follow_launches();
    const uint32_t at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= args.vectors) return;
    const uint32_t token = at / args.row_vectors, col = at % args.row_vectors;
    const int32_t* places = args.places + static_cast<uint64_t>(token) * args.per_token;
    const uint32_t weight_cols = args.per_token + (args.shared != nullptr ? 1 : 0);
    const float* weights = args.weights + static_cast<uint64_t>(token) * weight_cols;
    float sum[8] = {};
    for (uint32_t j = 0; j < args.per_token; ++j) {
        const uint64_t row = static_cast<uint64_t>(places[j]) * args.row_vectors;
        add_scaled(sum, load16_stream(args.x + (row + col) * 8), weights[j]);
    }
    if (args.shared != nullptr)
        add_scaled(sum, load16_stream(args.shared + static_cast<uint64_t>(at) * 8),
                   weights[args.per_token]);
    Bytes16 v;
#pragma unroll
    for (int w = 0; w < 4; ++w) v.words[w] = pack_bf16(sum[2 * w], sum[2 * w + 1]);
    store16(args.out + static_cast<uint64_t>(at) * 8, v);
}
