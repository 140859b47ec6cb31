// Adds what the prefill kernels leave of tiles that are cut along their keys (`prefill.cuh`):
//
//   out = Σ 2^(largest - greatest largest) · sums / Σ 2^(largest - greatest largest) · sum
//
// over the spans in their order, row by row. The launch behind that of the tiles, with the same
// grid: the blocks of a sequence's spans share its rows, each warp does one at a time, a lane
// D / 32 dimensions. A launch of its own, where decode lets the block that comes last add: a tile
// of 128 rows is 20 µs of work for one block, which others here share; prefill is launched step by
// step anyway, and no counters are left behind by a step that fails. Bound by latency; moves
// 4 (D + 2) bytes a row, head and span, mostly within the L2.
#include "prefill.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

// One row of a query head. `place`: of its sums of span 0; `stride`: from a span's to the next's.
template <int D>
DEVICE void combine(const PrefillArgs& args, bf16* out, int head, Spans spans, int place,
                    int stride) {
    constexpr int EACH = D / WARP;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const auto weight = [&](int span) { return weight_of(args, place + span * stride, head); };
    float most = -INFINITY, total = 0.0f;
    for (int s = spans.first + lane; s <= spans.last; s += WARP) most = fmaxf(most, weight(s)[0]);
    most = warp_max(most);
    for (int s = spans.first + lane; s <= spans.last; s += WARP)
        total += exp2_approx(weight(s)[0] - most) * weight(s)[1];
    total = warp_sum(total);
    float x[EACH] = {};
#pragma unroll 8
    for (int s = spans.first; s <= spans.last; ++s) {
        const float share = exp2_approx(weight(s)[0] - most);
        const float* part = sums_of<D>(args, place + s * stride, head) + lane * EACH;
#pragma unroll
        for (int i = 0; i < EACH; i += 2) {
            const Bytes8 two = load8(part + i);
            x[i] += share * __uint_as_float(two.words[0]);
            x[i + 1] += share * __uint_as_float(two.words[1]);
        }
    }
    const float factor = 1.0f / total;
#pragma unroll
    for (int i = 0; i < EACH; ++i) out[lane * EACH + i] = to_bf16(x[i] * factor);
}

template <int D>
DEVICE void combine_tile(const PrefillArgs& args) {
    const int32_t* entry =
        args.tiles + 4 * static_cast<int64_t>(args.first_tile + blockIdx.x / args.q_heads);
    const int sequence = entry[0], first_row = entry[1], span = entry[2], place = entry[3];
    if (place < 0) return;
    const int head = blockIdx.x % args.q_heads, keys_end = args.context_lens[sequence];
    const int rows = args.row_starts[sequence + 1] - first_row;
    const int first_key = max(keys_end - rows + 1 - args.window, 0);
    const Spans spans = spans_of(rows, first_key, keys_end);
    if (spans.first == spans.last) return;
    // The spans that a window leaves out have blocks too.
    const int blocks = spans.last + 1, warp = static_cast<int>(threadIdx.x) / WARP;
    const int64_t stride = static_cast<int64_t>(args.q_heads) * D;
    for (int row = span + warp * blocks; row < rows; row += WARPS * blocks) {
        bf16* out = args.out + (first_row + row) * stride + head * D;
        combine<D>(args, out, head, spans, place + row, rows);
    }
}

KERNEL(attention_combine_d64, PrefillArgs, THREADS) { combine_tile<64>(args); }
KERNEL(attention_combine_d128, PrefillArgs, THREADS) { combine_tile<128>(args); }
