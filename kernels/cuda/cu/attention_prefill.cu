// Attention of sequences with several rows over the paged cache, with mma.sync (sm_80 and later).
//
//   out [T, q heads · D] = softmax(Q Kᵀ / sqrt(D)) V, row by row over the keys at positions up to
//   the row's own and inside its window. Q from packed rows qkv [T, (q heads + 2 kv heads) · D],
//   K and V from the cache alone (this step's are stored already), each [blocks, kv heads, 16, D],
//   bf16 or e4m3; D 64 or 128. f32 sums, weights rounded to bf16 for the second product.
//
// FlashAttention-2 (Dao 2023): a block has 128 rows of one sequence and one head, a warp 32 of
// them; scores of 64 keys at a time stay in registers, the softmax runs relative to the largest
// score so far, in powers of two. Steps begin at multiples of 64 keys and a step that a row does
// not see leaves its bits alone: a row's result depends neither on the batch nor on how the prompt
// was cut. A warp skips steps that none of its rows sees and masks only those that some row sees in
// part.
//
// Moves Q and out once, and 4 D bytes a key (2 D in e4m3) for every 128 rows, from L2 where blocks
// of neighbouring heads and tiles run together: 128 FLOP a byte. Bound by the tensor cores. For a
// warp and step of D = 128 (halve products and loads for D = 64), counted in the machine code:
// 256 HMMA.16816, 80 LDSM, 64 EX2, about 860 instructions without mask and shrinking.
//   - tensor cores: 4 cycles an HMMA at wgmma's rate, about 6.5 at what mma.sync reaches on Hopper:
//     1660 cycles (8 on sm_80: 2050)
//   - shared memory: 32 rows a warp make a fragment of K or V serve two products; 80 · 4 cycles for
//     each of the SM's four quarters and 256 for the copies: 1540, the next limit
//   - exponentials: 16 lanes a cycle and SM, 512 cycles, placed between the second products
//   - issue: 860 cycles (D = 64: 660, and products of 830)
// Two blocks an SM (three for D = 64) give each quarter two warps, one's softmax beside the other's
// products. Were nothing else lost, 62 % of wgmma's peak; with what the softmax leaves uncovered
// about 400 TFLOP/s on an H200 is to be expected.
//
// Registers: 128 sums, 64 scores, 8 a fragment (255 in all, D = 64: 168). Shared memory: queries
// 256 D bytes, a ring of three tiles of K or V, 128 D bytes each, so that two are on the way while
// one is read (81 KiB, D = 64: 41; two and three blocks fit an sm_80's 164). e4m3 is copied as it
// is and widened into one tile of bf16 before it is read: a barrier more.
#include "prefill_mma.cuh"

using namespace prefill_mma;

// What a score that does not count becomes, and below any scaled score that does.
DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
constexpr float LOWEST = -3e38f;

// What a warp knows of its rows: two fragments of 16, of which a thread has rows g and g + 8 with
// g = lane / 4 (see mma_16816).
template <int D>
struct WarpRows {
    float scores[2][STEP_KEYS / 8][4];
    float out[2][D / 8][4] = {};  // not yet divided by `sum`
    float most[2][2];             // largest score, scaled; LOWEST where there was none
    float sum[2][2] = {};         // of weights, of this thread's columns
};

// scores = Q · Kᵀ, unscaled. `queries`: this warp's rows in shared memory.
template <int D>
DEVICE void score(WarpRows<D>& rows, SharedAddress queries, SharedAddress keys) {
    const int lane = threadIdx.x % WARP;
    queries += swizzled<D>(lane % 16, lane / 16);
    keys += swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) rows.scores[m][n][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        uint32_t q[2][4];
        ldmatrix_x4(q[0], moved<D>(queries, 0, d));
        ldmatrix_x4(q[1], moved<D>(queries, 1, d));
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 16; ++n) {
            uint32_t k[4];
            ldmatrix_x4(k, moved<D>(keys, n, d));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_16816(rows.scores[m][2 * n], q[m], k[0], k[1]);
                mma_16816(rows.scores[m][2 * n + 1], q[m], k[2], k[3]);
            }
        }
    }
}

// Leaves out keys after a row and before its window. `ahead`: the first row's position minus the
// first key's.
template <int D>
DEVICE void mask(WarpRows<D>& rows, int ahead, int window) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = m * 16 + i / 2 * 8 + lane / 4, key = n * 8 + lane % 4 * 2 + i % 2;
                // Keys after the row wrap to the largest numbers.
                const bool seen = static_cast<unsigned>(ahead + row - key) <
                                  static_cast<unsigned>(window);
                rows.scores[m][n][i] = seen ? rows.scores[m][n][i] : minus_infinity();
            }
}

// Takes the step's largest scores into account; what was summed with smaller ones shrinks.
template <int D>
DEVICE void look(WarpRows<D>& rows, float scale) {
    float shrink[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float most = rows.scores[m][0][2 * h];
#pragma unroll
            for (int n = 0; n < STEP_KEYS / 8; ++n)
                most = fmaxf(most, fmaxf(rows.scores[m][n][2 * h], rows.scores[m][n][2 * h + 1]));
            most = fmaxf(warp_max<4>(most) * scale, rows.most[m][h]);
            // Exactly 1 where the largest is the same: a step that a row does not see leaves no
            // trace in it.
            shrink[m][h] = exp2_approx(rows.most[m][h] - most);
            rows.most[m][h] = most;
            rows.sum[m][h] *= shrink[m][h];
        }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        // Rare after the first steps: the multiplications are spared, to the same bits.
        if (!__any_sync(ALL_LANES, shrink[m][0] != 1.0f || shrink[m][1] != 1.0f)) continue;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) rows.out[m][n][i] *= shrink[m][i / 2];
    }
}

// Weights of 16 rows and 16 keys as a product's first factor: its register `i`.
template <int D>
DEVICE uint32_t weigh(WarpRows<D>& rows, float scale, int m, int keys16, int i) {
    const int h = i % 2, n = 2 * keys16 + i / 2;
    const float low = exp2_approx(fmaf(rows.scores[m][n][2 * h], scale, -rows.most[m][h]));
    const float high = exp2_approx(fmaf(rows.scores[m][n][2 * h + 1], scale, -rows.most[m][h]));
    rows.sum[m][h] += low + high;
    return pack_bf16(low, high);
}

// out += weights · V. The next 16 keys' weights are made between the products of these: the
// exponentials run beside the tensor cores.
template <int D>
DEVICE void add_values(WarpRows<D>& rows, SharedAddress values, float scale) {
    const int lane = threadIdx.x % WARP;
    values += swizzled<D>(lane % 16, lane / 16);
    constexpr int PRODUCTS = D / 16;
    uint32_t weights[2][2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) weights[0][i / 4][i % 4] = weigh(rows, scale, i / 4, 0, i % 4);
#pragma unroll
    for (int keys16 = 0; keys16 < STEP_KEYS / 16; ++keys16) {
        const auto& now = weights[keys16 % 2];
        auto& next = weights[1 - keys16 % 2];
#pragma unroll
        for (int d = 0; d < PRODUCTS; ++d) {
            uint32_t v[4];
            ldmatrix_x4_trans(v, moved<D>(values, keys16, d));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_16816(rows.out[m][2 * d], now[m], v[0], v[1]);
                mma_16816(rows.out[m][2 * d + 1], now[m], v[2], v[3]);
            }
            if (keys16 + 1 == STEP_KEYS / 16) continue;
#pragma unroll
            for (int i = d * 8 / PRODUCTS; i < (d + 1) * 8 / PRODUCTS; ++i)
                next[i / 4][i % 4] = weigh(rows, scale, i / 4, keys16 + 1, i % 4);
        }
    }
}

// Writes a warp's rows, by way of the room of its queries.
template <int D>
DEVICE void write(WarpRows<D>& rows, unsigned char* room, const PrefillArgs& args,
                  const Work& work) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float factor = 1.0f / warp_sum<4>(rows.sum[m][h]);
            const int row = m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                auto* to = reinterpret_cast<uint32_t*>(room + swizzled<D>(row, n)) + lane % 4;
                *to = pack_bf16(rows.out[m][n][2 * h] * factor, rows.out[m][n][2 * h + 1] * factor);
            }
        }
    __syncwarp();
    constexpr int PIECES = D / 8, COPY_ROWS = WARP / PIECES;
    const int64_t stride = static_cast<int64_t>(args.q_heads) * D;
    const int piece = lane % PIECES, first = threadIdx.x / WARP * WARP_ROWS;
    bf16* out = args.out + work.tile.first_row * stride + work.head * D + piece * 8;
    for (int r = lane / PIECES; r < WARP_ROWS && first + r < work.tile.rows; r += COPY_ROWS)
        store16(out + (first + r) * stride, load16(room + swizzled<D>(r, piece)));
}

// Leaves a warp's sums of a span.
template <int D>
DEVICE void leave(WarpRows<D>& rows, const PrefillArgs& args, const Work& work) {
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * WARP_ROWS;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float sum = warp_sum<4>(rows.sum[m][h]);
            const int row = first + m * 16 + h * 8 + lane / 4, place = work.tile.place + row;
            if (row >= work.tile.rows) continue;
            float* to = sums_of<D>(args, place, work.head) + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                store_floats(to + n * 8, rows.out[m][n][2 * h], rows.out[m][n][2 * h + 1]);
            if (lane % 4 == 0)
                store_floats(weight_of(args, place, work.head), rows.most[m][h], sum);
        }
}

// Begins to copy a warp's queries, zeros for rows that there are not. `from`: the tile's first.
template <int D>
DEVICE void load_queries(SharedAddress to, const bf16* from, int64_t stride, int rows_len) {
    constexpr int PIECES = D / 8, COPY_ROWS = WARP / PIECES;
    const int lane = threadIdx.x % WARP, piece = lane % PIECES;
    const int first = threadIdx.x / WARP * WARP_ROWS;
    for (int r = lane / PIECES; r < WARP_ROWS; r += COPY_ROWS) {
        const bool valid = first + r < rows_len;
        const bf16* source = from + (valid ? (first + r) * stride + piece * 8 : 0);
        cp_async_16(to + swizzled<D>(r, piece), source, valid);
    }
}

template <int D, int STORED_BYTES>
DEVICE void prefill(const PrefillArgs& args) {
    using Tiles = Stream<D, STORED_BYTES>;
    // Queries, later results; tiles of keys and values; the work.
    auto* shared = shared_memory<unsigned char>();
    unsigned char* tiles = shared + TILE_ROWS * 2 * D;
    auto& work = *reinterpret_cast<Work*>(tiles + Tiles::BYTES);
    if (threadIdx.x == 0) work = work_of_block(args);
    __syncthreads();

    const PrefillTile& tile = work.tile;
    // A span outside the window.
    if (tile.first_key >= tile.keys_stop) return;
    const int first = threadIdx.x / WARP * WARP_ROWS;
    unsigned char* room = shared + first * (2 * D);
    const SharedAddress queries = shared_address(room);
    Tiles stream(args, work, shared_address(tiles));
    const int64_t stride = static_cast<int64_t>(args.q_heads + 2 * args.kv_heads) * D;
    load_queries<D>(queries, args.qkv + tile.first_row * stride + work.head * D, stride, tile.rows);
    int step = tile.first_key / STEP_KEYS;
    stream.look_up(step);
    stream.load(args.keys, step);
    stream.load(args.values, step);
    stream.look_up(step + 1);

    WarpRows<D> rows;
    for (int i = 0; i < 4; ++i) rows.most[i / 2][i % 2] = LOWEST;
    for (; step * STEP_KEYS < tile.keys_stop; ++step) {
        const SharedAddress keys = stream.turn(args.keys, step + 1);
        // Of the warp's first row and of the sequence's last one, from the step's first key.
        const int ahead = tile.position + first - step * STEP_KEYS;
        const int last = tile.keys_end - 1 - step * STEP_KEYS;
        const bool seen = ahead <= last && ahead > -WARP_ROWS &&
                          ahead - args.window < STEP_KEYS - 1;
        if (seen) {
            score(rows, queries, keys);
            if (ahead < STEP_KEYS - 1 || ahead + WARP_ROWS > args.window)
                mask(rows, ahead, args.window);
            look(rows, args.score_scale);
        }
        const SharedAddress values = stream.turn(args.values, step + 1);
        stream.look_up(step + 2);
        if (seen) add_values(rows, values, args.score_scale);
    }
    if (tile.place < 0) {
        write(rows, room, args, work);
    } else {
        leave(rows, args, work);
    }
}

KERNEL(attention_prefill_d64_bf16, PrefillArgs, THREADS, 3) { prefill<64, 2>(args); }
KERNEL(attention_prefill_d64_fp8, PrefillArgs, THREADS, 3) { prefill<64, 1>(args); }
KERNEL(attention_prefill_d128_bf16, PrefillArgs, THREADS, 2) { prefill<128, 2>(args); }
KERNEL(attention_prefill_d128_fp8, PrefillArgs, THREADS, 2) { prefill<128, 1>(args); }
