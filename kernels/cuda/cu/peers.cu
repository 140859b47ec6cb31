// What the ranks of one machine exchange, by memory of each other's that they have mapped.
//
//   peer_sum:       x [T, H] = the sum of every rank's x, in f32 and rank order, rounded to bf16
//   peer_sum_norm:  peer_sum of x, then add_rms_norm: hidden [T, H] += x, out = rms_norm(hidden);
//                   bit for bit as the two ops one after the other
//   peer_gather:    out [T, Σ cols] = every rank's x [T, cols of it], in f32, side by side
//
// One-shot: a row is an item. A block writes its rank's row into the area of every other rank, and
// sums what has come: one meeting, (ranks - 1) rows written by each. Two-shot: an item is as many
// rows as there are ranks, each of which sums one and sends the sum to all: two meetings, but
// 2 (ranks - 1) / ranks rows written for each one summed. Both add up the same numbers in the same
// order: all ranks hold the same bits, whichever of the two ran.
#include "norm.cuh"
#include "peers.cuh"

struct PeerSumArgs {
    PeerRegions regions;
    bf16* x;             // [rows, cols]: this rank's part; peer_sum: also the result
    bf16* hidden;        // [rows, cols], of peer_sum_norm as what follows
    bf16* out;           // [rows, cols]
    const bf16* weight;  // [cols]
    uint32_t rows;
    uint32_t cols;  // a multiple of 8
    float eps;
};

// A row in registers, by all threads of the block.
template <int threads>
struct Row {
    Bytes16 x[DEPTH] = {};

    template <typename Visit>
    DEVICE static void each(uint32_t cols, Visit visit) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const uint32_t at = (i * threads + threadIdx.x) * VECTOR;
            if (at < cols) visit(i, at);
        }
    }

    DEVICE void load(const bf16* from, uint32_t cols) {
        each(cols, [&](int i, uint32_t at) { x[i] = load16(from + at); });
    }

    // What another rank, or another block, has written.
    DEVICE void load_fresh(const bf16* from, uint32_t cols) {
        each(cols, [&](int i, uint32_t at) { x[i] = load16_shared_by_blocks(from + at); });
    }

    DEVICE void store(bf16* to, uint32_t cols) const {
        each(cols, [&](int i, uint32_t at) { store16_global(to + at, x[i]); });
    }

    // x, which is rank `rank`'s part, becomes the sum of `ranks` parts, of which the others lie
    // `distance` elements apart from `parts` on.
    DEVICE void sum(const PeerRegions& regions, const bf16* parts, uint64_t distance,
                    uint32_t cols) {
        each(cols, [&](int i, uint32_t at) {
            float sums[VECTOR] = {};
            for (uint32_t r = 0; r < regions.ranks; ++r) {
                const bf16* from = parts + r * distance + at;
                const Bytes16 part = r == regions.rank ? x[i] : load16_shared_by_blocks(from);
                for (int w = 0; w < 4; ++w) {
                    sums[2 * w] += low_bf16(part.words[w]);
                    sums[2 * w + 1] += high_bf16(part.words[w]);
                }
            }
            for (int w = 0; w < 4; ++w) x[i].words[w] = pack_bf16(sums[2 * w], sums[2 * w + 1]);
        });
    }
};

// What becomes of the summed row `row`.
template <int threads, bool norm>
DEVICE void finish_row(const PeerSumArgs& args, uint32_t row, Row<threads>& sum, float* scratch) {
    const uint64_t start = static_cast<uint64_t>(row) * args.cols;
    if constexpr (!norm) {
        sum.store(args.x + start, args.cols);
        return;
    }
    Row<threads> hidden;
    hidden.load(args.hidden + start, args.cols);
    RowSum squares;
    Row<threads>::each(args.cols, [&](int i, uint32_t at) {
        add_vector(hidden.x[i], sum.x[i]);
        store16(args.hidden + start + at, hidden.x[i]);
        squares.take(hidden.x[i]);
    });
    write_normed<threads>(hidden.x, squares, {args.out + start, args.weight, args.cols, args.eps},
                          threadIdx.x, scratch);
}

template <int threads, bool norm>
DEVICE void sum_one_shot(const PeerSumArgs& args) {
    follow_launches();
    const PeerRegions& regions = args.regions;
    const PeerCall call(regions);
    if (call.has_failed()) return;
    // A float for each warp, then the verdict.
    float* scratch = shared_memory<float>();
    auto* verdict = reinterpret_cast<uint32_t*>(scratch + threads / WARP);
    // Of one rank's rows in an area.
    const uint64_t part = static_cast<uint64_t>(args.rows) * args.cols;
    for (uint32_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const uint64_t start = static_cast<uint64_t>(row) * args.cols;
        Row<threads> mine;
        mine.load(args.x + start, args.cols);
        for (uint32_t r = 0; r < regions.ranks; ++r)
            if (r != regions.rank)
                mine.store(call.area<bf16>(r) + regions.rank * part + start, args.cols);
        if (!call.meet(0, row, verdict)) return;
        mine.sum(regions, call.area<bf16>(regions.rank) + start, part, args.cols);
        finish_row<threads, norm>(args, row, mine, scratch);
    }
    call.end();
}

template <int threads, bool norm>
DEVICE void sum_two_shot(const PeerSumArgs& args) {
    follow_launches();
    const PeerRegions& regions = args.regions;
    const PeerCall call(regions);
    if (call.has_failed()) return;
    float* scratch = shared_memory<float>();
    auto* verdict = reinterpret_cast<uint32_t*>(scratch + threads / WARP);
    const uint32_t ranks = regions.ranks, rank = regions.rank, cols = args.cols;
    const uint32_t items = (args.rows + ranks - 1) / ranks;
    // Parts [ranks, items, cols] of the rows that this rank sums, then sums [rows, cols].
    const uint64_t part = static_cast<uint64_t>(items) * cols, sums = ranks * part;
    for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
        const uint64_t at = static_cast<uint64_t>(item) * cols;
        const uint32_t first = item * ranks;
        for (uint32_t r = 0; r < ranks && first + r < args.rows; ++r) {
            if (r == rank) continue;
            Row<threads> theirs;
            theirs.load(args.x + static_cast<uint64_t>(first + r) * cols, cols);
            theirs.store(call.area<bf16>(r) + rank * part + at, cols);
        }
        if (!call.meet(0, item, verdict)) return;
        Row<threads> mine;
        const uint64_t start = static_cast<uint64_t>(first + rank) * cols;
        if (first + rank < args.rows) {
            mine.load(args.x + start, cols);
            mine.sum(regions, call.area<bf16>(rank) + at, part, cols);
            for (uint32_t r = 0; r < ranks; ++r)
                if (r != rank) mine.store(call.area<bf16>(r) + sums + start, cols);
        }
        if (!call.meet(1, item, verdict)) return;
        for (uint32_t r = 0; r < ranks && first + r < args.rows; ++r) {
            Row<threads> sum = mine;
            if (r != rank) {
                const uint64_t row = static_cast<uint64_t>(first + r) * cols;
                sum.load_fresh(call.area<bf16>(rank) + sums + row, cols);
            }
            finish_row<threads, norm>(args, first + r, sum, scratch);
        }
    }
    call.end();
}

#define PEER_SUMS(cols, threads)                                                             \
    KERNEL(peer_sum_##cols, PeerSumArgs, threads) { sum_one_shot<threads, false>(args); }    \
    KERNEL(peer_sum_norm_##cols, PeerSumArgs, threads) { sum_one_shot<threads, true>(args); } \
    KERNEL(peer_sum_twice_##cols, PeerSumArgs, threads) { sum_two_shot<threads, false>(args); } \
    KERNEL(peer_sum_twice_norm_##cols, PeerSumArgs, threads) { sum_two_shot<threads, true>(args); }

// As many threads a row as norm.cu has for one.
PEER_SUMS(1024, 32)
PEER_SUMS(8192, 256)
PEER_SUMS(16384, 512)

constexpr int GATHER_THREADS = 256;
// Columns of every rank that are one item.
constexpr uint32_t GATHER_COLS = 4096;

struct PeerGatherArgs {
    PeerRegions regions;
    const float* x;  // [rows, cols[rank]]
    float* out;      // [rows, Σ cols]; not written where only rank 0 gets it and this is another
    uint32_t cols[PEERS_MAX];
    uint32_t rows;
    uint32_t pieces;  // of a row: the widest rank's columns by GATHER_COLS
    uint32_t to_all;  // 0: the result is rank 0's alone
};

KERNEL(peer_gather, PeerGatherArgs, GATHER_THREADS) {
    follow_launches();
    const PeerRegions& regions = args.regions;
    const PeerCall call(regions);
    if (call.has_failed()) return;
    auto* verdict = shared_memory<uint32_t>();
    uint32_t total = 0, before = 0;
    for (uint32_t r = 0; r < regions.ranks; ++r) {
        if (r == regions.rank) before = total;
        total += args.cols[r];
    }
    const uint32_t cols = args.cols[regions.rank];
    const auto gets = [&](uint32_t rank) { return args.to_all != 0 || rank == 0; };
    for (uint32_t item = blockIdx.x; item < args.rows * args.pieces; item += gridDim.x) {
        const uint64_t row = item / args.pieces;
        const uint32_t first = item % args.pieces * GATHER_COLS;
        const auto each = [&](uint32_t width, auto visit) {
            const uint32_t end = min(width, first + GATHER_COLS);
            for (uint32_t at = first + threadIdx.x; at < end; at += GATHER_THREADS) visit(at);
        };
        // Ranks' columns [rows, cols of it] lie one after another in an area.
        const float* mine = args.x + row * cols;
        for (uint32_t r = 0; r < regions.ranks; ++r) {
            if (r == regions.rank || !gets(r)) continue;
            const uint64_t block = static_cast<uint64_t>(before) * args.rows;
            float* to = call.area<float>(r) + block + row * cols;
            each(cols, [&](uint32_t at) { to[at] = mine[at]; });
        }
        if (!call.meet(0, item, verdict)) return;
        if (!gets(regions.rank)) continue;
        float* out = args.out + row * total;
        for (uint32_t r = 0, start = 0; r < regions.ranks; start += args.cols[r++]) {
            const uint32_t width = args.cols[r];
            const float* from = mine;
            if (r != regions.rank)
                from = call.area<float>(regions.rank) + static_cast<uint64_t>(start) * args.rows +
                       row * width;
            each(width, [&](uint32_t at) { out[start + at] = load_shared_by_blocks(from + at); });
        }
    }
    call.end();
}
