// What the kernels of sampling share: their arguments, exact weights, masses and orders.
//
// Everything that decides is exact, so that neither the order in which blocks run nor how a row is
// cut can change a token:
// - weights exp((logit - peak) / temperature) are the host sampler's, bit for bit: every operation
//   is written as one that is rounded on its own, never fused;
// - masses (sums of weights) are integers in units of 2^-45: a weight is at most 1, a row has fewer
//   than 2^19 ids. A weight is off by 2^-46 at most, the sum of a row by less than 2^-27 and, as
//   roundings cancel, commonly by 1e-12;
// - ids are ordered by logit, then by the lower id, in one 64-bit number.
#pragma once

#include "common.cuh"

// Ids that one warp looks at, 16 a lane, and the largest number of such spans in a row.
constexpr uint32_t SPAN = 512;
constexpr uint32_t LANE_IDS = SPAN / WARP;
constexpr uint32_t SPANS_MAX = 1024;
// Threads of the kernels that pass over whole rows, and spans of one block.
constexpr uint32_t PASS_THREADS = 256;
constexpr uint32_t PASS_SPANS = PASS_THREADS / WARP;
// Threads of the kernels that give a row one block.
constexpr uint32_t ROW_THREADS = 512;
// Bins of the histogram of a row, and spans that one block of it takes.
constexpr uint32_t BINS = 512;
constexpr uint32_t HISTOGRAM_THREADS = 256;
constexpr uint32_t HISTOGRAM_SPANS = 24;
// Ids about which the histogram leaves a doubt, kept as a list; where there are more, the row
// itself is looked at again.
constexpr uint32_t CANDIDATES = 4096;
// The likeliest tokens that a row may ask for.
constexpr uint32_t TOP_MAX = 20;
// Temperatures below the peak from which on a weight rounds to no mass.
constexpr float REACH = 32.0f;

// What a row asks for. Mirrored by the launcher, as all structs here that end in Args or Row.
struct SampleRow {
    uint64_t seed;
    uint64_t position;
    // In units of 2^-64; 0 is off.
    uint64_t top_p;
    // 0 is greedy.
    float temperature;
    float min_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    // 0 is off.
    uint32_t top_k;
    uint32_t adjustments_first;
    uint32_t adjustments_len;
    // Row of the masks, or -1.
    int32_t mask_row;
    // The token whose logprob is wanted, or -1: the next one is.
    int32_t token;
    // The likeliest tokens to report, or -1: no logprobs at all.
    int32_t top;
    // Where the token is left for the next step, or -1.
    int32_t table;
};

// What bias and penalties do to one id of a row.
struct Adjustment {
    uint32_t id;
    // 0 not seen, 1 in the prompt alone, else one more than its occurrences in the answer.
    uint32_t seen;
    uint32_t biases_first;
    uint32_t biases_len;
};

// What one block saw of a row.
struct ScanPart {
    // The likeliest of the ids that may be drawn, as `best_key`; 0 where there is none.
    uint64_t best;
    // The least logit of these.
    float least;
    uint32_t flags;
};
constexpr uint32_t RAW_NOT_FINITE = 1;
constexpr uint32_t ADJUSTED_NOT_FINITE = 2;

// One span of the unmodified logits.
struct SpanPart {
    // As `best_key`.
    uint64_t best;
    // Of weights below the span's own best at temperature 1.
    uint64_t mass;
};

// Where a filtered row's head ends, as far as the histogram tells.
struct RowBounds {
    // Of the whole row.
    uint64_t mass;
    // Of all bins before `first`.
    uint64_t above_mass;
    uint32_t above_count;
    // Ids in bins before `first` are in the head, behind `last` they are not; between is doubt.
    uint32_t first;
    uint32_t last;
    // Whether the head ends at the top_k-th id at all: fewer may be allowed.
    uint32_t counted;
    // Ids in doubt so far.
    uint32_t candidates;
    uint32_t unused;
};

constexpr uint32_t SAMPLED = 0;
constexpr uint32_t LOGITS_NOT_FINITE = 1;
constexpr uint32_t ADJUSTED_LOGITS_NOT_FINITE = 2;
constexpr uint32_t NOTHING_ALLOWED = 3;

struct SampleOut {
    int32_t token;
    uint32_t status;
    float logprob;
    uint32_t top_len;
    uint32_t ids[TOP_MAX];
    float logprobs[TOP_MAX];
};

struct SampleArgs {
    float* logits;                  // [R, V]
    const SampleRow* rows;          // [R]
    const Adjustment* adjustments;  // of all rows, ascending ids in each
    const float* biases;
    const uint32_t* masks;       // [masked rows, mask_words], bit i % 32 of word i / 32: id i
    float* saved;                // one logit an adjustment
    ScanPart* scans;             // [R, scans]
    SpanPart* span_parts;        // [R, spans]
    uint32_t* counts;            // [R, histograms, BINS]
    uint64_t* masses;            // [R, histograms, BINS]
    RowBounds* bounds;           // [R]
    uint64_t* span_masses;       // [R, spans]
    uint32_t* candidates;        // [R, CANDIDATES]
    SampleOut* out;              // [R]
    int32_t* last_ids;           // by table
    uint32_t vocab;              // V
    uint32_t drawable;           // ids from here on are padding
    uint32_t spans;              // V / SPAN
    uint32_t scans_len;          // spans / PASS_SPANS
    uint32_t histograms_len;     // spans / HISTOGRAM_SPANS
    uint32_t mask_words;         // V / 32
    uint32_t adjusted;           // 1 for the scan after bias and penalties
    uint32_t unused;
};

// ---- orders ---------------------------------------------------------------------------------

// Rises with x; both zeros are one.
DEVICE uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

DEVICE float from_ordered(uint32_t o) {
    return __uint_as_float((o & 0x80000000u) != 0 ? o & 0x7fffffffu : ~o);
}

// Larger for likelier ids; never 0.
DEVICE uint64_t best_key(float logit, uint32_t id) {
    return static_cast<uint64_t>(ordered(logit)) << 32 | (0xffffffffu - id);
}
DEVICE float best_logit(uint64_t key) { return from_ordered(static_cast<uint32_t>(key >> 32)); }
DEVICE uint32_t best_id(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Smaller for likelier ids, and dense: one step is one id or one f32.
DEVICE uint64_t rank_of(float logit, uint32_t id) {
    return static_cast<uint64_t>(~ordered(logit)) << 19 | id;
}
DEVICE float rank_logit(uint64_t rank) { return from_ordered(~static_cast<uint32_t>(rank >> 19)); }
DEVICE uint32_t rank_id(uint64_t rank) { return static_cast<uint32_t>(rank) & 0x7ffffu; }

// ---- weights and masses ---------------------------------------------------------------------

DEVICE bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// (logit - peak) / temperature, at most 0.
DEVICE float distance(float logit, float peak, float temperature) {
    return __fdiv_rn(__fsub_rn(logit, peak), temperature);
}

// e^x for -87 ≤ x ≤ 0 within two units in the last place: Cody–Waite reduction and Cephes' minimax
// polynomial, operation by operation what the host computes.
DEVICE float exp_nonpositive(float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504f), ROUND);
    const float n = __fsub_rn(shifted, ROUND);
    float r = __fsub_rn(x, __fmul_rn(n, 0.6933594f));
    r = __fsub_rn(r, __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float mantissa = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    return __fmul_rn(mantissa, __uint_as_float((__float_as_uint(shifted) + 127u) << 23));
}

DEVICE uint64_t mass_of(float weight) {
    return __float2ull_rn(__fmul_rn(weight, 35184372088832.0f));  // 2^45
}

// a · b / 2^64, rounded up.
DEVICE uint64_t share(uint64_t a, uint64_t b) { return __umul64hi(a, b) + (a * b != 0 ? 1 : 0); }

// Adds to a mass in two halves, as there is no 64-bit sum in shared memory. Sums of integers: the
// order in which threads come does not matter.
DEVICE void add_mass(uint32_t* low, uint32_t* high, uint64_t mass) {
    const uint32_t part = static_cast<uint32_t>(mass);
    const uint32_t before = atomicAdd(low, part);
    const uint32_t carried = static_cast<uint32_t>(mass >> 32) + (before + part < before ? 1u : 0u);
    if (carried != 0) atomicAdd(high, carried);
}

DEVICE uint64_t joined(uint32_t low, uint32_t high) {
    return static_cast<uint64_t>(high) << 32 | low;
}

// ---- warps and blocks -----------------------------------------------------------------------

DEVICE float warp_min(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        x = fminf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over this thread and those before it in a block of `threads`. `scratch`: threads / 32
// elements of shared memory.
template <uint32_t threads, typename T>
DEVICE T block_prefix(T x, T* scratch) {
    x = warp_prefix(x);
    __syncthreads();
    if (threadIdx.x % WARP == WARP - 1) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    for (uint32_t w = 0; w < threadIdx.x / WARP; ++w) x += scratch[w];
    return x;
}

// ---- rows -----------------------------------------------------------------------------------

// The id of a lane's i-th logit in a span: four neighbours a load.
DEVICE uint32_t span_id(uint32_t span, uint32_t i) {
    return span * SPAN + i / 4 * (4 * WARP) + threadIdx.x % WARP * 4 + i % 4;
}

// A lane's logits of a span; -infinity past the row.
DEVICE void load_span(float (&v)[LANE_IDS], const SampleArgs& args, uint32_t row, uint32_t span) {
    const float* from = args.logits + static_cast<uint64_t>(row) * args.vocab;
    const bool vectors = args.vocab % 4 == 0;
#pragma unroll
    for (uint32_t i = 0; i < LANE_IDS; i += 4) {
        const uint32_t id = span_id(span, i);
        if (vectors) {
            Bytes16 bytes = {{0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u}};
            if (id < args.vocab) bytes = load16_stream(from + id);
            for (uint32_t j = 0; j < 4; ++j) v[i + j] = __uint_as_float(bytes.words[j]);
        } else {
            for (uint32_t j = 0; j < 4; ++j)
                v[i + j] = id + j < args.vocab ? from[id + j] : -INFINITY;
        }
    }
}

// -infinity for what may not be drawn: padding, and what the row's mask forbids.
DEVICE void forbid(float (&v)[LANE_IDS], const SampleArgs& args, int32_t mask_row, uint32_t span) {
#pragma unroll
    for (uint32_t i = 0; i < LANE_IDS; i += 4) {
        const uint32_t id = span_id(span, i);
        uint32_t bits = 0xffffffffu;
        if (mask_row >= 0 && id < args.drawable) {
            const uint64_t word = static_cast<uint64_t>(mask_row) * args.mask_words + id / 32;
            bits = args.masks[word] >> id % 32;
        }
        for (uint32_t j = 0; j < 4; ++j)
            if (id + j >= args.drawable || (bits >> j & 1) == 0) v[i + j] = -INFINITY;
    }
}

// What the scan found of a row's drawable ids.
struct RowState {
    float peak;
    uint32_t peak_id;
    // Bins a temperature.
    float bin_scale;
    uint32_t status;
};

// Every lane of a warp takes part and gets it.
DEVICE RowState row_state(const SampleArgs& args, uint32_t row) {
    const ScanPart* parts = args.scans + static_cast<uint64_t>(row) * args.scans_len;
    uint64_t best = 0;
    float least = INFINITY;
    uint32_t flags = 0;
    for (uint32_t i = threadIdx.x % WARP; i < args.scans_len; i += WARP) {
        const ScanPart part = parts[i];
        best = part.best > best ? part.best : best;
        least = fminf(least, part.least);
        flags |= part.flags;
    }
    best = warp_max_key(best);
    least = warp_min(least);
    RowState state = {best_logit(best), best_id(best), 0.0f, SAMPLED};
    if (best == 0) state.status = NOTHING_ALLOWED;
    if (__any_sync(ALL_LANES, (flags & ADJUSTED_NOT_FINITE) != 0))
        state.status = ADJUSTED_LOGITS_NOT_FINITE;
    if (__any_sync(ALL_LANES, (flags & RAW_NOT_FINITE) != 0)) state.status = LOGITS_NOT_FINITE;
    // The bins share what lies between the peak and the least logit that has a mass.
    const float depth = fminf(-distance(least, state.peak, args.rows[row].temperature), REACH);
    state.bin_scale = __fdiv_rn(static_cast<float>(BINS), fmaxf(depth, 1e-30f));
    return state;
}

// Never falls as x does.
DEVICE uint32_t bin_of(float x, float bin_scale) {
    const int bin = static_cast<int>(__fmul_rn(-x, bin_scale));
    return static_cast<uint32_t>(min(bin, static_cast<int>(BINS) - 1));
}

DEVICE bool drawn(const SampleRow& row) { return row.token < 0 && row.temperature > 0.0f; }
DEVICE bool filtered(const SampleRow& row) {
    return drawn(row) && (row.top_k != 0 || row.top_p != 0);
}
