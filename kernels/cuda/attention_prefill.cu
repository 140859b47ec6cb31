#include "prefill.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
// Rows of a warp: two products share each fragment of keys or values.
constexpr int WARP_ROWS = TILE_ROWS / WARPS;
// Keys between two looks at the largest score.
constexpr int STEP_KEYS = 64;
// Tiles of keys or values in shared memory.
constexpr int RING = 3;

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// Offset of the 16 bytes `piece` of row `row` in a tile of rows of D bf16. Pieces are exchanged
// within 128 bytes so that the same piece of eight rows lies in all banks.
template <int D>
DEVICE int swizzled(int row, int piece) {
    return row * (2 * D) + ((piece ^ (row & 7)) << 4);
}

// `offset`, of a row below 16 and piece 0 or 1, moved on by so many times 16 rows and 16 columns.
template <int D>
DEVICE int moved(int offset, int rows16, int columns16) {
    return (offset ^ ((columns16 & 3) << 5)) + (columns16 >> 2) * 128 + rows16 * (32 * D);
}

// The tiles that a block reads: K and V of a step in turn, 64 tokens each, through a ring. Warp w
// moves the w-th block of 16 tokens, which the cache holds in one piece.
template <int D>
struct Stream {
    static constexpr int TILE_BYTES = STEP_KEYS * 2 * D;
    static constexpr int BLOCK_BYTES = BLOCK_TOKENS * 2 * D;
    static constexpr int PIECES = 2 * D / 16;
    // Rows that a warp moves at a time.
    static constexpr int COPY_ROWS = WARP / PIECES;

    const PrefillTile& tile;
    unsigned char* ring;
    int steps_end;
    int warp;
    int row;             // of the first 16 bytes that this thread moves, in a block of tokens
    int to;              // where in a tile they go
    int64_t head_bytes;  // from the start of a cache's block to what this thread moves of it
    int64_t block_bytes;  // from one block of the cache to the next
    int block = 0;        // of the cache, that this warp moves next
    int slot = 0;         // of the ring, that is filled next

    DEVICE Stream(const PrefillArgs& args, const PrefillTile& tile, unsigned char* ring, int head)
        : tile(tile), ring(ring) {
        const int lane = threadIdx.x % WARP;
        steps_end = (tile.keys_end + STEP_KEYS - 1) / STEP_KEYS;
        warp = threadIdx.x / WARP;
        row = lane / PIECES;
        to = swizzled<D>(warp * BLOCK_TOKENS + row, lane % PIECES);
        head_bytes = head / (args.q_heads / args.kv_heads) * BLOCK_BYTES + lane * 16;
        block_bytes = static_cast<int64_t>(args.kv_heads) * BLOCK_BYTES;
    }

    // Looks up the block that this warp moves in `step`.
    DEVICE void look_up(int step) {
        const int index = step * (STEP_KEYS / BLOCK_TOKENS) + warp;
        if (index * BLOCK_TOKENS < tile.keys_end) block = tile.blocks[index];
    }

    // Begins to copy the tokens of `step`, with zeros past the last key: nobody has written there,
    // and a NaN would survive a weight of zero.
    DEVICE void load(const void* pool, int step) {
        const auto* from = static_cast<const unsigned char*>(pool) + block * block_bytes;
        from += head_bytes;
        unsigned char* target = ring + slot * TILE_BYTES;
        const int valid = tile.keys_end - step * STEP_KEYS - warp * BLOCK_TOKENS - row;
        if (step < steps_end) {
#pragma unroll
            for (int rows = 0; rows < BLOCK_TOKENS; rows += COPY_ROWS) {
                cp_async_16(target + (to ^ ((rows & 7) << 4)) + rows * (2 * D),
                            from + rows * (2 * D), rows < valid);
            }
        }
        cp_async_commit();
        slot = slot == RING - 1 ? 0 : slot + 1;
    }

    // The oldest tile, once it is there; in place of the one before, `step`'s is begun.
    DEVICE const unsigned char* turn(const void* pool, int step) {
        cp_async_wait<RING - 2>();
        __syncthreads();
        load(pool, step);
        return ring + slot * TILE_BYTES;
    }
};

// What a warp knows of its rows: two fragments of 16, of which a thread has rows g and g + 8 with
// g = lane / 4 (see mma_16816).
template <int D>
struct WarpRows {
    float scores[2][STEP_KEYS / 8][4];
    float out[2][D / 8][4] = {};  // not yet divided by `sum`
    float most[2][2];             // largest score
    float sum[2][2] = {};         // of weights, of this thread's columns
    float base[2][2];             // what is taken from scaled scores
};

// scores = Q · Kᵀ, unscaled. `queries`: this warp's rows in shared memory.
template <int D>
DEVICE void score(WarpRows<D>& rows, const unsigned char* queries, const unsigned char* keys) {
    const int lane = threadIdx.x % WARP;
    const int query_at = swizzled<D>(lane % 16, lane / 16);
    const int key_at = swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) rows.scores[m][n][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        uint32_t q[2][4];
        ldmatrix_x4(q[0], queries + moved<D>(query_at, 0, d));
        ldmatrix_x4(q[1], queries + moved<D>(query_at, 1, d));
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 16; ++n) {
            uint32_t k[4];
            ldmatrix_x4(k, keys + moved<D>(key_at, n, d));
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
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float most = rows.most[m][h];
#pragma unroll
            for (int n = 0; n < STEP_KEYS / 8; ++n)
                most = fmaxf(most, fmaxf(rows.scores[m][n][2 * h], rows.scores[m][n][2 * h + 1]));
            most = warp_max<4>(most);
            // Nothing seen so far: any finite number gives weights of zero.
            const float finite = most == minus_infinity() ? 0.0f : most;
            // Exactly 1 where the largest is the same: steps that a row does not see leave no trace.
            shrink[h] = exp2_approx((rows.most[m][h] - finite) * scale);
            rows.most[m][h] = most;
            rows.base[m][h] = finite * scale;
            rows.sum[m][h] *= shrink[h];
        }
        // Rarely after the first steps: then the multiplications are spared.
        if (__any_sync(ALL_LANES, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) rows.out[m][n][i] *= shrink[i / 2];
        }
    }
}

// Weights of 16 rows and 16 keys as a product's first factor: its register `i`.
template <int D>
DEVICE uint32_t weigh(WarpRows<D>& rows, float scale, int m, int keys16, int i) {
    const int h = i % 2, n = 2 * keys16 + i / 2;
    const float low = exp2_approx(fmaf(rows.scores[m][n][2 * h], scale, -rows.base[m][h]));
    const float high = exp2_approx(fmaf(rows.scores[m][n][2 * h + 1], scale, -rows.base[m][h]));
    rows.sum[m][h] += low + high;
    return pack_bf16(low, high);
}

// out += weights · V. The next keys' weights are made between the products of these, so that the
// exponentials run beside the tensor cores.
template <int D>
DEVICE void add_values(WarpRows<D>& rows, const unsigned char* values, float scale) {
    const int lane = threadIdx.x % WARP;
    const int at = swizzled<D>(lane % 16, lane / 16);
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
            ldmatrix_x4_trans(v, values + moved<D>(at, keys16, d));
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                mma_16816(rows.out[m][2 * d], now[m], v[0], v[1]);
                mma_16816(rows.out[m][2 * d + 1], now[m], v[2], v[3]);
            }
            if (keys16 + 1 < STEP_KEYS / 16) {
#pragma unroll
                for (int i = d * 8 / PRODUCTS; i < (d + 1) * 8 / PRODUCTS; ++i)
                    next[i / 4][i % 4] = weigh(rows, scale, i / 4, keys16 + 1, i % 4);
            }
        }
    }
}

// Writes a warp's rows of one head, by way of the room of its queries.
template <int D>
DEVICE void write(WarpRows<D>& rows, unsigned char* room, bf16* out, int64_t stride, int rows_len,
                  float value_scale) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float factor = value_scale / warp_sum<4>(rows.sum[m][h]);
            const int row = m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                auto* to = reinterpret_cast<uint32_t*>(room + swizzled<D>(row, n)) + lane % 4;
                *to = pack_bf16(rows.out[m][n][2 * h] * factor, rows.out[m][n][2 * h + 1] * factor);
            }
        }
    __syncwarp();
    constexpr int PIECES = D / 8, COPY_ROWS = WARP / PIECES;
    for (int first = 0; first < WARP_ROWS; first += COPY_ROWS) {
        const int row = first + lane / PIECES, piece = lane % PIECES;
        if (row < rows_len)
            store16(out + row * stride + piece * 8, load16(room + swizzled<D>(row, piece)));
    }
}

// Begins to copy a warp's queries, zeros for rows that there are not.
template <int D>
DEVICE void load_queries(unsigned char* to, const bf16* from, int64_t stride, int rows_len) {
    constexpr int PIECES = D / 8, COPY_ROWS = WARP / PIECES;
    const int lane = threadIdx.x % WARP, piece = lane % PIECES;
    for (int first = 0; first < WARP_ROWS; first += COPY_ROWS) {
        const int row = first + lane / PIECES;
        const bool valid = row < rows_len;
        const bf16* source = from + (valid ? row * stride + piece * 8 : 0);
        cp_async_16(to + swizzled<D>(row, piece), source, valid);
    }
}

template <int D>
DEVICE void prefill(const PrefillArgs& args) {
    const int head = blockIdx.x % args.q_heads;
    const PrefillTile tile = prefill_tile(args, blockIdx.x / args.q_heads);
    const int first = threadIdx.x / WARP * WARP_ROWS;
    const int rows_len = max(tile.rows - first, 0);
    auto* queries = shared_memory<unsigned char>() + first * (2 * D);
    Stream<D> stream(args, tile, shared_memory<unsigned char>() + TILE_ROWS * (2 * D), head);

    const int64_t row = rows_len > 0 ? tile.first_row + first : tile.first_row;
    const int64_t stride = static_cast<int64_t>(args.q_heads + 2 * args.kv_heads) * D;
    load_queries<D>(queries, args.qkv + row * stride + head * D, stride, rows_len);
    int step = tile.first_key / STEP_KEYS;
    stream.look_up(step);
    stream.load(args.keys, step);
    stream.load(args.values, step);
    stream.look_up(step + 1);

    WarpRows<D> rows;
    for (int i = 0; i < 4; ++i) rows.most[i / 2][i % 2] = minus_infinity();
    for (; step < stream.steps_end; ++step) {
        // Of the warp's first row and its last, from the step's first key.
        const int ahead = tile.position + first - step * STEP_KEYS;
        const int last = ahead + min(rows_len, WARP_ROWS) - 1;
        const bool seen = rows_len > 0 && last >= 0 && ahead - args.window < STEP_KEYS - 1;
        const unsigned char* keys = stream.turn(args.keys, step + 1);
        if (seen) {
            score(rows, queries, keys);
            if (ahead < STEP_KEYS - 1 || ahead + WARP_ROWS > args.window)
                mask(rows, ahead, args.window);
            look(rows, args.score_scale);
        }
        const unsigned char* values = stream.turn(args.values, step + 1);
        stream.look_up(step + 2);
        if (seen) add_values(rows, values, args.score_scale);
    }
    const int64_t out_stride = static_cast<int64_t>(args.q_heads) * D;
    bf16* out = args.out + row * out_stride + head * D;
    if (rows_len > 0) write(rows, queries, out, out_stride, rows_len, args.value_scale);
}

KERNEL(attention_prefill_d64_bf16, PrefillArgs, THREADS) { prefill<64>(args); }
KERNEL(attention_prefill_d128_bf16, PrefillArgs, THREADS) { prefill<128>(args); }
