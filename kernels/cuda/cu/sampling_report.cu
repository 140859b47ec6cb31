// Sampling, last part: logprobs of the unmodified logits.
//
// sample_report, a block a row, where logprobs are wanted: the chosen token's and the `top`
// likeliest, of the unmodified logits. The n likeliest ids lie in the n spans whose best ids are
// likeliest, so that 20 · 512 ids are looked at, one of each span a thread, and taken best by best.
// Bound by latency: two barriers for each of the n, about 5 µs at n = 20, and a read of 16 bytes a
// span and of 40 KB of logits.
#include "sampling.cuh"

struct ReportShared {
    double scratch[ROW_THREADS / WARP];
    uint64_t keys[SPANS_MAX];
    uint64_t best[ROW_THREADS / WARP];
    // The likeliest spans, likeliest first.
    uint32_t spans[TOP_MAX];
    uint32_t spans_len;
};

// ln of the sum of exp over the row; every thread gets it. A fixed order of sums.
DEVICE double log_normalizer(const SampleArgs& args, const SpanPart* parts, ReportShared& s) {
    uint64_t best = 0;
    for (uint32_t i = threadIdx.x; i < args.spans; i += ROW_THREADS)
        best = parts[i].best > best ? parts[i].best : best;
    best = warp_max_key(best);
    if (threadIdx.x % WARP == 0) s.best[threadIdx.x / WARP] = best;
    __syncthreads();
    for (uint32_t w = 0; w < ROW_THREADS / WARP; ++w) best = s.best[w] > best ? s.best[w] : best;
    const double peak = best_logit(best);
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < args.spans; i += ROW_THREADS) {
        const double below = static_cast<double>(best_logit(parts[i].best)) - peak;
        sum += static_cast<double>(parts[i].mass) * exp(below);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) s.scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0;
    for (uint32_t w = 0; w < ROW_THREADS / WARP; ++w) sum += s.scratch[w];
    return peak + log(sum / 35184372088832.0);  // 2^45
}

// The spans that hold the `top` likeliest ids.
DEVICE void likeliest_spans(const SampleArgs& args, const SpanPart* parts, uint32_t top,
                            ReportShared& s) {
    for (uint32_t i = threadIdx.x; i < args.spans; i += ROW_THREADS) s.keys[i] = parts[i].best;
    if (threadIdx.x == 0) s.spans_len = min(top, args.spans);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < args.spans; i += ROW_THREADS) {
        uint32_t better = 0;
        for (uint32_t other = 0; other < args.spans; ++other)
            better += s.keys[other] > s.keys[i] ? 1 : 0;
        if (better < top) s.spans[better] = i;
    }
    __syncthreads();
}

DEVICE void report_top(const SampleArgs& args, const SpanPart* parts, double normalizer,
                       ReportShared& s) {
    const uint32_t row = blockIdx.x;
    const uint32_t top = min(static_cast<uint32_t>(args.rows[row].top), min(TOP_MAX, args.vocab));
    likeliest_spans(args, parts, top, s);
    uint64_t mine[TOP_MAX];
#pragma unroll
    for (uint32_t i = 0; i < TOP_MAX; ++i) {
        mine[i] = 0;
        if (i >= s.spans_len) continue;
        const uint32_t id = s.spans[i] * SPAN + threadIdx.x;
        if (id >= args.vocab) continue;
        mine[i] = best_key(args.logits[static_cast<uint64_t>(row) * args.vocab + id], id);
    }
    uint64_t before = ~0ull;
    for (uint32_t n = 0; n < top; ++n) {
        uint64_t best = 0;
#pragma unroll
        for (uint32_t i = 0; i < TOP_MAX; ++i)
            best = mine[i] < before && mine[i] > best ? mine[i] : best;
        best = warp_max_key(best);
        __syncthreads();
        if (threadIdx.x % WARP == 0) s.best[threadIdx.x / WARP] = best;
        __syncthreads();
        for (uint32_t w = 0; w < ROW_THREADS / WARP; ++w)
            best = s.best[w] > best ? s.best[w] : best;
        before = best;
        if (threadIdx.x != 0) continue;
        args.out[row].ids[n] = best_id(best);
        args.out[row].logprobs[n] =
            static_cast<float>(static_cast<double>(best_logit(best)) - normalizer);
    }
    if (threadIdx.x == 0) args.out[row].top_len = top;
}

KERNEL(sample_report, SampleArgs, 512) {
    const uint32_t row = blockIdx.x;
    if (args.rows[row].top < 0 || args.out[row].status != SAMPLED) return;
    // The launcher tells of a row without a token.
    if (args.out[row].token < 0) return;
    ReportShared& s = *shared_memory<ReportShared>();
    const SpanPart* parts = args.span_parts + static_cast<uint64_t>(row) * args.spans;
    const double normalizer = log_normalizer(args, parts, s);
    if (threadIdx.x == 0) {
        const uint64_t at = static_cast<uint64_t>(row) * args.vocab +
                            static_cast<uint32_t>(args.out[row].token);
        args.out[row].logprob =
            static_cast<float>(static_cast<double>(args.logits[at]) - normalizer);
    }
    report_top(args, parts, normalizer, s);
}
