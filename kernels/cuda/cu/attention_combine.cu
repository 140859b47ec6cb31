// Decode attention of a sequence with several splits: their sums, added.
//
// out = Σ 2^(max - greatest max) · sums / Σ 2^(max - greatest max) · sum over the splits of one
// sequence and head, in an order that their number alone decides. A thread block has one sequence
// and head; its warps take splits in turn, a lane D / 32 dimensions. Moves 4 (D + 2) bytes a split
// and head, which the kernel before left in the L2: bound by latency.
#include "decode.cuh"

using namespace decoding;

struct CombineArgs {
    bf16* out;                // [T, q_heads * D]
    const float* sums;        // [slots, q_heads, D]
    const float* weights;     // [slots, q_heads, 2]
    const int* decoding;      // [grid.x, 3]: sequence, number of splits, slot of the first
    const int* row_starts;    // [S + 1]
    const int* context_lens;  // [S]
    int q_heads;              // grid.y
    int window;               // keys that a row sees
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
