// Sampling, second part: top-k, top-p and min-p without sorting, and the mass of every span.
//
// All three filters keep a head of the same order (likelier first, then the lower id). A histogram
// over the distance below the peak says in which bin the head ends; only the ids of that bin stay
// in doubt, and the draw settles them. As bins are spread between the peak and the row's least
// logit (or where weights end), they hold few ids each, whatever the scale of the logits. The idea
// is that of selection by histogram (radix select); masses are integers, so that atomic sums do not
// depend on their order.
//
// sample_histogram: ids and masses of 512 bins, per 12288 ids of a row; grid [V / 12288, R]. Reads
// 4 bytes a logit, from the L2 as long as 50 MB hold the rows. Bound by sums in shared memory: one
// for the count (top-k), one for the mass (top-p), a second one where a weight is above 2^-13 or
// carries. At 64 rows 832 blocks give each multiprocessor 74 k ids: at 10 lanes a clock about
// 9 µs for one filter, 18 for both, beside 40 instructions an id for its weight, 13 µs.
// sample_bounds: sums a row's histograms (13 · 6 KB) and finds the bins; a block a row.
// sample_spans: sums the mass of all ids surely kept, per span, and lists those in doubt; grid as
// the scan's. Ids behind the last bin cost their distance alone.
#include "sampling.cuh"

struct Histogram {
    uint32_t counts[BINS];
    uint32_t low[BINS];
    uint32_t high[BINS];
};

DEVICE void count_span(Histogram& histogram, const SampleArgs& args, uint32_t row, uint32_t span,
                       const RowState& state) {
    const SampleRow& wanted = args.rows[row];
    float v[LANE_IDS];
    load_span(v, args, row, span);
    forbid(v, args, wanted.mask_row, span);
    const bool by_count = wanted.top_k != 0, by_mass = wanted.top_p != 0;
    for (uint32_t i = 0; i < LANE_IDS; ++i) {
        const float x = distance(v[i], state.peak, wanted.temperature);
        if (!(x >= -REACH)) continue;
        const uint32_t bin = bin_of(x, state.bin_scale);
        if (by_count) atomicAdd(&histogram.counts[bin], 1u);
        if (!by_mass) continue;
        const uint64_t mass = mass_of(exp_nonpositive(x));
        add_mass(&histogram.low[bin], &histogram.high[bin], mass);
    }
}

KERNEL(sample_histogram, SampleArgs, 256) {
    const uint32_t row = blockIdx.y, t = threadIdx.x;
    if (!filtered(args.rows[row])) return;
    const RowState state = row_state(args, row);
    if (state.status != SAMPLED) return;
    Histogram& histogram = *shared_memory<Histogram>();
    for (uint32_t bin = t; bin < BINS; bin += HISTOGRAM_THREADS) {
        histogram.counts[bin] = 0;
        histogram.low[bin] = 0;
        histogram.high[bin] = 0;
    }
    __syncthreads();
    constexpr uint32_t WARPS = HISTOGRAM_THREADS / WARP;
    for (uint32_t s = t / WARP; s < HISTOGRAM_SPANS; s += WARPS) {
        const uint32_t span = blockIdx.x * HISTOGRAM_SPANS + s;
        if (span < args.spans) count_span(histogram, args, row, span, state);
    }
    __syncthreads();
    const uint64_t to = (static_cast<uint64_t>(row) * args.histograms_len + blockIdx.x) * BINS;
    for (uint32_t bin = t; bin < BINS; bin += HISTOGRAM_THREADS) {
        args.counts[to + bin] = histogram.counts[bin];
        args.masses[to + bin] = joined(histogram.low[bin], histogram.high[bin]);
    }
}

struct BoundsShared {
    // Sums over a bin and all before it.
    uint64_t masses[BINS];
    uint32_t counts[BINS];
    uint64_t mass_scratch[BINS / WARP];
    uint32_t count_scratch[BINS / WARP];
    uint32_t count_bin;
    uint32_t first;
    uint32_t last;
};

KERNEL(sample_bounds, SampleArgs, 512) {
    const uint32_t row = blockIdx.x, t = threadIdx.x;
    const SampleRow& wanted = args.rows[row];
    if (!filtered(wanted)) return;
    if (row_state(args, row).status != SAMPLED) return;
    BoundsShared& s = *shared_memory<BoundsShared>();
    uint64_t mass = 0;
    uint32_t count = 0;
    for (uint32_t part = 0; part < args.histograms_len; ++part) {
        const uint64_t at = (static_cast<uint64_t>(row) * args.histograms_len + part) * BINS + t;
        mass += args.masses[at];
        count += args.counts[at];
    }
    mass = block_prefix<BINS>(mass, s.mass_scratch);
    count = block_prefix<BINS>(count, s.count_scratch);
    s.masses[t] = mass;
    s.counts[t] = count;
    if (t == 0) {
        // Nothing in doubt, all kept.
        s.count_bin = BINS;
        s.first = BINS;
        s.last = BINS;
    }
    __syncthreads();
    const uint32_t count_before = t == 0 ? 0 : s.counts[t - 1];
    const uint64_t mass_before = t == 0 ? 0 : s.masses[t - 1];
    const uint32_t k = wanted.top_k;
    if (k != 0 && count_before < k && k <= count) s.count_bin = t;
    __syncthreads();
    const uint32_t end = s.count_bin;
    const bool counted = end < BINS;
    if (wanted.top_p != 0) {
        // The mass that top_p is a share of, as far as it is known.
        const uint64_t least = !counted ? s.masses[BINS - 1] : end == 0 ? 0 : s.masses[end - 1];
        const uint64_t needed = share(wanted.top_p, least);
        if ((t == 0 || mass_before < needed) && needed <= mass) s.first = t;
        __syncthreads();
        if (t == 0) s.last = counted ? end : s.first;
    } else if (t == 0) {
        s.first = end;
        s.last = end;
    }
    __syncthreads();
    if (t != 0) return;
    RowBounds& bounds = args.bounds[row];
    bounds.mass = s.masses[BINS - 1];
    bounds.first = s.first;
    bounds.last = s.last;
    bounds.counted = counted ? 1 : 0;
    bounds.above_mass = s.first == 0 ? 0 : s.masses[s.first - 1];
    bounds.above_count = s.first == 0 ? 0 : s.counts[s.first - 1];
}

// Lists the ids of a span whose bit in `doubts` is set, in whatever order warps come.
DEVICE void list(const SampleArgs& args, uint32_t row, uint32_t span, uint32_t doubts) {
    if (!__any_sync(ALL_LANES, doubts != 0)) return;
    const uint32_t mine = static_cast<uint32_t>(__popc(doubts));
    const uint32_t end = warp_prefix(mine);
    uint32_t first = 0;
    if (threadIdx.x % WARP == WARP - 1) first = atomicAdd(&args.bounds[row].candidates, end);
    first = __shfl_sync(ALL_LANES, first, WARP - 1);
    uint32_t at = first + end - mine;
    for (uint32_t i = 0; i < LANE_IDS; ++i) {
        if ((doubts >> i & 1) == 0) continue;
        if (at < CANDIDATES)
            args.candidates[static_cast<uint64_t>(row) * CANDIDATES + at] = span_id(span, i);
        ++at;
    }
}

KERNEL(sample_spans, SampleArgs, 256) {
    const uint32_t row = blockIdx.y;
    const SampleRow& wanted = args.rows[row];
    const uint32_t span = blockIdx.x * PASS_SPANS + threadIdx.x / WARP;
    if (!drawn(wanted) || span >= args.spans) return;
    float v[LANE_IDS];
    load_span(v, args, row, span);
    const RowState state = row_state(args, row);
    if (state.status != SAMPLED) return;
    forbid(v, args, wanted.mask_row, span);
    uint32_t first = BINS, last = BINS;
    if (filtered(wanted)) {
        first = args.bounds[row].first;
        last = args.bounds[row].last;
    }
    uint64_t mass = 0;
    uint32_t doubts = 0;
    for (uint32_t i = 0; i < LANE_IDS; ++i) {
        const float x = distance(v[i], state.peak, wanted.temperature);
        if (!(x >= -REACH)) continue;
        const uint32_t bin = bin_of(x, state.bin_scale);
        if (bin > last) continue;
        if (bin >= first) {
            doubts |= 1u << i;
            continue;
        }
        const float weight = exp_nonpositive(x);
        if (weight >= wanted.min_p) mass += mass_of(weight);
    }
    mass = warp_sum(mass);
    if (threadIdx.x % WARP == 0)
        args.span_masses[static_cast<uint64_t>(row) * args.spans + span] = mass;
    list(args, row, span, doubts);
}
