// Sampling, third part: the draw.
//
// sample_draw, a block a row: settles where the head of a filtered row ends, adds what that keeps
// to the masses of the spans, and walks them in the order of ids to where the uniform number falls:
// first the spans, then the ids of one. The number is Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", 2011) keyed by (seed, position) alone, 53 bits of it.
// Reads the ids in doubt (commonly tens, a list of up to 4096), the spans' masses (297 at 152064
// ids) and 512 logits; bound by the latency of some 20 barriers, about 5 µs. Where more than 4096
// ids are in doubt (flat rows, filters that keep thousands) it passes over the whole row instead,
// up to some 10 times, each about 20 µs of one multiprocessor: exact, and rare.
#include "sampling.cuh"

// Parts into which an interval of ranks is cut at a time.
constexpr uint32_t CUTS = 256;
constexpr uint32_t NO_TOKEN = 0xffffffffu;

struct DrawShared {
    uint64_t scratch[ROW_THREADS / WARP];
    uint64_t least;
    uint64_t most;
    uint64_t needed;
    uint64_t rest;
    uint32_t span;
    uint32_t token;
    uint32_t part;
    uint32_t part_count;
    uint32_t counts[CUTS];
    uint32_t low[CUTS];
    uint32_t high[CUTS];
    uint32_t span_low[SPANS_MAX];
    uint32_t span_high[SPANS_MAX];
    // Of the ids in doubt.
    uint64_t ranks[CANDIDATES];
};

// One row on its way to a token.
struct Draw {
    const SampleArgs& args;
    const SampleRow& wanted;
    const RowState& state;
    DrawShared& s;
    uint32_t row;
    // Bins of the ids in doubt, and how many there are.
    uint32_t first, last, candidates;

    DEVICE float weight(float logit) const {
        return exp_nonpositive(distance(logit, state.peak, wanted.temperature));
    }
    DEVICE bool doubtful(float logit) const {
        const float x = distance(logit, state.peak, wanted.temperature);
        if (!(x >= -REACH)) return false;
        const uint32_t bin = bin_of(x, state.bin_scale);
        return first <= bin && bin <= last;
    }
};

// Calls `f` with the rank of every id in doubt, each from one thread of the block.
template <typename F>
DEVICE void each_candidate(const Draw& d, F&& f) {
    if (d.candidates <= CANDIDATES) {
        for (uint32_t i = threadIdx.x; i < d.candidates; i += ROW_THREADS) f(d.s.ranks[i]);
        return;
    }
    for (uint32_t span = threadIdx.x / WARP; span < d.args.spans; span += ROW_THREADS / WARP) {
        float v[LANE_IDS];
        load_span(v, d.args, d.row, span);
        forbid(v, d.args, d.wanted.mask_row, span);
        for (uint32_t i = 0; i < LANE_IDS; ++i)
            if (d.doubtful(v[i])) f(rank_of(v[i], span_id(span, i)));
    }
}

// The least and the largest rank in doubt up to `limit`, in s.least and s.most.
DEVICE void rank_range(const Draw& d, uint64_t limit) {
    uint64_t least = ~0ull, most = 0;
    each_candidate(d, [&](uint64_t rank) {
        if (rank > limit) return;
        least = rank < least ? rank : least;
        most = rank > most ? rank : most;
    });
    least = ~warp_max_key(~least);
    most = warp_max_key(most);
    const uint32_t warp = threadIdx.x / WARP;
    __syncthreads();
    // Both in turn through the same scratch.
    if (threadIdx.x % WARP == 0) d.s.scratch[warp] = least;
    __syncthreads();
    if (threadIdx.x == 0)
        for (uint32_t w = 1; w < ROW_THREADS / WARP; ++w)
            least = d.s.scratch[w] < least ? d.s.scratch[w] : least;
    __syncthreads();
    if (threadIdx.x % WARP == 0) d.s.scratch[warp] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (uint32_t w = 1; w < ROW_THREADS / WARP; ++w)
            most = d.s.scratch[w] > most ? d.s.scratch[w] : most;
        d.s.least = least;
        d.s.most = most;
    }
    __syncthreads();
}

// One warp finds the first part at which the running sum reaches s.needed, and takes what lies
// before it off. Without any, the last part.
template <bool by_mass>
DEVICE void find_part(DrawShared& s) {
    constexpr uint32_t EACH = CUTS / WARP;
    const uint32_t first = threadIdx.x * EACH;
    const auto size = [&](uint32_t part) -> uint64_t {
        return by_mass ? joined(s.low[part], s.high[part]) : s.counts[part];
    };
    uint64_t sum = 0;
    for (uint32_t i = 0; i < EACH; ++i) sum += size(first + i);
    const uint64_t end = warp_prefix(sum), needed = s.needed;
    const uint32_t lanes = __ballot_sync(ALL_LANES, end >= needed);
    const int chosen = lanes == 0 ? WARP - 1 : __ffs(static_cast<int>(lanes)) - 1;
    // Everybody has read what the chosen lane writes.
    __syncwarp();
    if (static_cast<int>(threadIdx.x) != chosen) return;
    uint64_t before = end - sum;
    uint32_t part = first;
    for (; part + 1 < first + EACH && before + size(part) < needed; ++part) before += size(part);
    s.part = part;
    s.part_count = s.counts[part];
    s.needed = needed - before;
}

// The rank at which the ids in doubt up to `limit`, likeliest first, reach `needed`, as a count or
// as a mass: the head is what has no larger rank. Cuts the interval of ranks into 256 parts, goes
// on with the part that holds the end, until that is one id.
template <bool by_mass>
DEVICE uint64_t head_end(const Draw& d, uint64_t needed, uint64_t limit) {
    DrawShared& s = d.s;
    rank_range(d, limit);
    uint64_t least = s.least, most = s.most;
    if (threadIdx.x == 0) s.needed = needed;
    while (least < most) {
        const int bits = 64 - __clzll(static_cast<long long>(most - least));
        const int shift = max(bits - 8, 0);
        if (threadIdx.x < CUTS) {
            s.counts[threadIdx.x] = 0;
            s.low[threadIdx.x] = 0;
            s.high[threadIdx.x] = 0;
        }
        __syncthreads();
        each_candidate(d, [&](uint64_t rank) {
            if (rank < least || rank > most) return;
            const uint32_t part = static_cast<uint32_t>((rank - least) >> shift);
            atomicAdd(&s.counts[part], 1u);
            if (by_mass) add_mass(&s.low[part], &s.high[part], mass_of(d.weight(rank_logit(rank))));
        });
        __syncthreads();
        if (threadIdx.x < WARP) find_part<by_mass>(s);
        __syncthreads();
        least += static_cast<uint64_t>(s.part) << shift;
        const uint64_t part_end = least + ((1ull << shift) - 1);
        most = part_end < most ? part_end : most;
        if (s.part_count <= 1) break;
    }
    return most;
}

// The mass of the ids in doubt up to `limit`; every thread gets it.
DEVICE uint64_t mass_up_to(const Draw& d, uint64_t limit) {
    uint64_t mass = 0;
    each_candidate(d, [&](uint64_t rank) {
        if (rank <= limit) mass += mass_of(d.weight(rank_logit(rank)));
    });
    mass = warp_sum(mass);
    __syncthreads();
    if (threadIdx.x % WARP == 0) d.s.scratch[threadIdx.x / WARP] = mass;
    __syncthreads();
    mass = 0;
    for (uint32_t w = 0; w < ROW_THREADS / WARP; ++w) mass += d.s.scratch[w];
    __syncthreads();
    return mass;
}

// Settles the ids in doubt: the largest rank that top-k and top-p keep. What they and min-p keep is
// added to the spans' masses.
DEVICE uint64_t settle(const Draw& d) {
    const RowBounds& bounds = d.args.bounds[d.row];
    if (d.candidates <= CANDIDATES) {
        const uint32_t* ids = d.args.candidates + static_cast<uint64_t>(d.row) * CANDIDATES;
        const float* logits = d.args.logits + static_cast<uint64_t>(d.row) * d.args.vocab;
        for (uint32_t i = threadIdx.x; i < d.candidates; i += ROW_THREADS)
            d.s.ranks[i] = rank_of(logits[ids[i]], ids[i]);
        __syncthreads();
    }
    uint64_t limit = ~0ull;
    if (bounds.counted != 0)
        limit = head_end<false>(d, d.wanted.top_k - bounds.above_count, limit);
    if (d.wanted.top_p != 0) {
        // Of what top-k keeps, which no bin behind those in doubt adds to.
        const bool counted = bounds.counted != 0;
        const uint64_t mass = counted ? bounds.above_mass + mass_up_to(d, limit) : bounds.mass;
        const uint64_t needed = share(d.wanted.top_p, mass) - bounds.above_mass;
        limit = head_end<true>(d, needed, limit);
    }
    each_candidate(d, [&](uint64_t rank) {
        const float weight = d.weight(rank_logit(rank));
        if (rank > limit || weight < d.wanted.min_p) return;
        const uint32_t span = rank_id(rank) / SPAN;
        add_mass(&d.s.span_low[span], &d.s.span_high[span], mass_of(weight));
    });
    return limit;
}

// The first 64 bits of the block of (seed, position).
DEVICE uint64_t philox(uint64_t seed, uint64_t position) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xd2511f53u) * counter[0];
        const uint64_t b = static_cast<uint64_t>(0xcd9e8d57u) * counter[2];
        counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
        counter[1] = static_cast<uint32_t>(b);
        counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
        counter[3] = static_cast<uint32_t>(a);
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    return static_cast<uint64_t>(counter[0]) << 32 | counter[1];
}

// The span at which the running mass passes the uniform share of all, and what is left of that
// share there; in s.span and s.rest.
DEVICE void choose_span(const Draw& d) {
    DrawShared& s = d.s;
    constexpr uint32_t EACH = SPANS_MAX / ROW_THREADS;
    uint64_t masses[EACH];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < EACH; ++i) {
        const uint32_t span = threadIdx.x * EACH + i;
        masses[i] = joined(s.span_low[span], s.span_high[span]);
        sum += masses[i];
    }
    const uint64_t end = block_prefix<ROW_THREADS>(sum, s.scratch);
    if (threadIdx.x == ROW_THREADS - 1) s.rest = end;
    __syncthreads();
    const uint64_t total = s.rest;
    __syncthreads();
    // floor(53 bits · total / 2^53): the running mass must be larger.
    const uint64_t uniform = philox(d.wanted.seed, d.wanted.position) >> 11 << 11;
    const uint64_t target = __umul64hi(uniform, total);
    uint64_t before = end - sum;
    for (uint32_t i = 0; i < EACH; ++i) {
        if (before <= target && target < before + masses[i]) {
            s.span = threadIdx.x * EACH + i;
            s.rest = target - before;
        }
        before += masses[i];
    }
    __syncthreads();
}

// The id of the chosen span at which the running mass passes s.rest.
DEVICE void choose_id(const Draw& d, uint64_t limit) {
    const uint32_t id = d.s.span * SPAN + threadIdx.x;
    bool allowed = id < d.args.drawable;
    if (allowed && d.wanted.mask_row >= 0) {
        const uint64_t first = static_cast<uint64_t>(d.wanted.mask_row) * d.args.mask_words;
        allowed = (d.args.masks[first + id / 32] >> id % 32 & 1) != 0;
    }
    uint64_t mass = 0;
    if (allowed) {
        const float logit = d.args.logits[static_cast<uint64_t>(d.row) * d.args.vocab + id];
        const float x = distance(logit, d.state.peak, d.wanted.temperature);
        if (x >= -REACH) {
            const uint32_t bin = bin_of(x, d.state.bin_scale);
            const float weight = exp_nonpositive(x);
            const bool head = bin < d.first || (bin <= d.last && rank_of(logit, id) <= limit);
            if (head && weight >= d.wanted.min_p) mass = mass_of(weight);
        }
    }
    const uint64_t end = block_prefix<ROW_THREADS>(mass, d.s.scratch);
    if (end - mass <= d.s.rest && d.s.rest < end) d.s.token = id;
}

DEVICE void draw(const SampleArgs& args, const SampleRow& wanted, const RowState& state,
                 DrawShared& s) {
    const uint32_t row = blockIdx.x;
    Draw d{args, wanted, state, s, row, BINS, BINS, 0};
    if (filtered(wanted)) {
        d.first = args.bounds[row].first;
        d.last = args.bounds[row].last;
        d.candidates = args.bounds[row].candidates;
    }
    for (uint32_t span = threadIdx.x; span < SPANS_MAX; span += ROW_THREADS) {
        uint64_t mass = 0;
        const uint64_t at = static_cast<uint64_t>(row) * args.spans + span;
        if (span < args.spans) mass = args.span_masses[at];
        s.span_low[span] = static_cast<uint32_t>(mass);
        s.span_high[span] = static_cast<uint32_t>(mass >> 32);
    }
    if (threadIdx.x == 0) {
        s.token = NO_TOKEN;
        s.span = 0;
    }
    __syncthreads();
    const uint64_t limit = d.candidates != 0 ? settle(d) : ~0ull;
    __syncthreads();
    choose_span(d);
    choose_id(d, limit);
    __syncthreads();
}

KERNEL(sample_draw, SampleArgs, 512) {
    const uint32_t row = blockIdx.x;
    const SampleRow& wanted = args.rows[row];
    DrawShared& s = *shared_memory<DrawShared>();
    const RowState state = row_state(args, row);
    uint32_t token = state.peak_id, status = state.status;
    if (wanted.token >= 0) {
        token = static_cast<uint32_t>(wanted.token);
        if (status != LOGITS_NOT_FINITE) status = SAMPLED;
    } else if (status == SAMPLED && wanted.temperature > 0.0f) {
        draw(args, wanted, state, s);
        token = s.token;
    }
    if (threadIdx.x != 0) return;
    SampleOut& out = args.out[row];
    out.token = static_cast<int32_t>(token);
    out.status = status;
    out.logprob = 0.0f;
    out.top_len = 0;
    // Of a row that is refused nobody reads it.
    const auto id = static_cast<int32_t>(min(token, args.vocab - 1));
    if (wanted.table >= 0) args.last_ids[wanted.table] = id;
}
