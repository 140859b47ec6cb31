// Mixtures of experts: which experts each token goes to, and the sum of a token's results. What
// pairs and places are: `routing.rs`; products by pair: `skinny_experts.cuh`.
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
