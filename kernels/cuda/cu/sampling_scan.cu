// Sampling, first part: what a row looks like, and the changes that bias and penalties make.
//
// sample_scan: per block of 4096 ids of a row, the likeliest id that may be drawn, the least logit
// and whether all numbers are finite; per span of 512 ids, where logprobs are wanted, the likeliest
// id and the sum of exp below it. One warp a span, one block eight spans, grid [V / 4096, R]. Reads
// 4 bytes a logit and writes 16 bytes a block; bound by memory: 64 × 152064 logits are 39 MB, 9 µs
// at 4.3 TB/s, and then lie in the L2 (50 MB) for the kernels that follow. Each lane has four
// 16-byte loads in flight. With one row 38 blocks spread over as many multiprocessors.
//
// sample_adjust, sample_restore: change the few logits with bias or penalties in place, one thread
// an id, and put them back once the token is drawn. Between the two a second scan looks at the rows
// that changed.
#include "sampling.cuh"

DEVICE ScanPart scan_span(const SampleArgs& args, uint32_t row, uint32_t span) {
    const SampleRow& wanted = args.rows[row];
    ScanPart part = {0, INFINITY, 0};
    float v[LANE_IDS];
    load_span(v, args, row, span);
    if (args.adjusted == 0) {
        bool bad = false;
        for (uint32_t i = 0; i < LANE_IDS; ++i)
            bad |= span_id(span, i) < args.vocab && !finite(v[i]);
        if (bad) part.flags = RAW_NOT_FINITE;
        if (wanted.top >= 0) {
            uint64_t best = 0;
            for (uint32_t i = 0; i < LANE_IDS; ++i) {
                const uint32_t id = span_id(span, i);
                const uint64_t key = id < args.vocab ? best_key(v[i], id) : 0;
                best = key > best ? key : best;
            }
            best = warp_max_key(best);
            const float peak = best_logit(best);
            uint64_t mass = 0;
            for (uint32_t i = 0; i < LANE_IDS; ++i) {
                const float x = __fsub_rn(v[i], peak);
                if (x >= -REACH) mass += mass_of(exp_nonpositive(x));
            }
            mass = warp_sum(mass);
            if (threadIdx.x % WARP == 0)
                args.span_parts[static_cast<uint64_t>(row) * args.spans + span] = {best, mass};
        }
    }
    forbid(v, args, -1, span);
    if (args.adjusted != 0)
        for (uint32_t i = 0; i < LANE_IDS; ++i)
            if (span_id(span, i) < args.drawable && !finite(v[i])) part.flags = ADJUSTED_NOT_FINITE;
    if (wanted.mask_row >= 0) forbid(v, args, wanted.mask_row, span);
    for (uint32_t i = 0; i < LANE_IDS; ++i) {
        if (!finite(v[i])) continue;
        const uint64_t key = best_key(v[i], span_id(span, i));
        part.best = key > part.best ? key : part.best;
        part.least = fminf(part.least, v[i]);
    }
    part.best = warp_max_key(part.best);
    part.least = warp_min(part.least);
    const uint32_t raw = __any_sync(ALL_LANES, part.flags == RAW_NOT_FINITE) ? RAW_NOT_FINITE : 0;
    const bool adjusted = __any_sync(ALL_LANES, part.flags == ADJUSTED_NOT_FINITE);
    part.flags = raw | (adjusted ? ADJUSTED_NOT_FINITE : 0);
    return part;
}

KERNEL(sample_scan, SampleArgs, 256) {
    const uint32_t row = blockIdx.y, warp = threadIdx.x / WARP;
    if (args.adjusted != 0 && args.rows[row].adjustments_len == 0) return;
    ScanPart* parts = shared_memory<ScanPart>();  // [PASS_SPANS]
    const uint32_t span = blockIdx.x * PASS_SPANS + warp;
    ScanPart part = {0, INFINITY, 0};
    if (span < args.spans) part = scan_span(args, row, span);
    if (threadIdx.x % WARP == 0) parts[warp] = part;
    __syncthreads();
    if (threadIdx.x != 0) return;
    ScanPart* to = args.scans + static_cast<uint64_t>(row) * args.scans_len + blockIdx.x;
    // What the first scan said of the unmodified logits stays true.
    if (args.adjusted != 0) part.flags |= to->flags;
    for (uint32_t w = 1; w < PASS_SPANS; ++w) {
        const ScanPart other = parts[w];
        part.best = other.best > part.best ? other.best : part.best;
        part.least = fminf(part.least, other.least);
        part.flags |= other.flags;
    }
    *to = part;
    if (blockIdx.x == 0) args.bounds[row].candidates = 0;
}

// Every bias in the request's order, then the penalties of a token that was seen.
DEVICE float adjusted_logit(const SampleArgs& args, const SampleRow& row, const Adjustment& change,
                            float logit) {
    for (uint32_t i = 0; i < change.biases_len; ++i)
        logit = __fadd_rn(logit, args.biases[change.biases_first + i]);
    if (change.seen == 0) return logit;
    logit = logit > 0.0f ? __fdiv_rn(logit, row.repetition_penalty)
                         : __fmul_rn(logit, row.repetition_penalty);
    if (change.seen == 1) return logit;
    const float times = static_cast<float>(change.seen - 1);
    return __fsub_rn(logit, __fadd_rn(row.presence_penalty,
                                      __fmul_rn(row.frequency_penalty, times)));
}

KERNEL(sample_adjust, SampleArgs, 256) {
    const SampleRow& row = args.rows[blockIdx.y];
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= row.adjustments_len) return;
    const uint32_t at = row.adjustments_first + i;
    const Adjustment change = args.adjustments[at];
    float* logit = args.logits + static_cast<uint64_t>(blockIdx.y) * args.vocab + change.id;
    args.saved[at] = *logit;
    *logit = adjusted_logit(args, row, change, *logit);
}

KERNEL(sample_restore, SampleArgs, 256) {
    const SampleRow& row = args.rows[blockIdx.y];
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i >= row.adjustments_len) return;
    const uint32_t at = row.adjustments_first + i;
    args.logits[static_cast<uint64_t>(blockIdx.y) * args.vocab + args.adjustments[at].id] =
        args.saved[at];
}
