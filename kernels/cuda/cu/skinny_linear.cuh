// Products of few tokens: every weight is read once, at the speed of memory. Layout: `skinny.cuh`.
//
// out [T, N] = x [T, K] · W [N, K]ᵀ (· scale of the row) + bias, for 8, 16, 32 or 64 tokens. W is
// the M side of the product and the tokens are its N side, in eights: few waste nothing. Of pairs
// of gate and up, out [T, N / 2] = silu(gate) · up: a kernel less, and 8 bytes an output.
//
// Work. A unit is a tile of 256 rows (four strips) and one of `parts` runs of whole 128 columns,
// cut by the weight's shape alone. Blocks, one a multiprocessor, take every gridDim.x-th unit;
// the parts of a tile are neighbours, and so run at one time and find their sums in the L2. Four
// strips share what is read of x: 64 tokens of it cost 4 KB of L2 a record, where strips of their
// own would cost 16, as much as a record of bf16.
//
// A block is eight warps that multiply, two a strip with 32 rows each, and one that feeds them
// through a ring of stages: a record of each strip and the tokens' columns of x, in shared memory
// as [slot][token][32], where the 32 lanes of a fragment read 512 consecutive bytes. Records come
// by bulk copies (sm_80: 16 bytes a lane), x by 16 bytes a lane, zeros where it ends; all arrive at
// the stage's `full` barrier, and the warps that are done with it at `empty`. The ring runs on into
// the next unit, so no unit waits for memory.
//
// Bits. A row's sum is made of its columns in order within a part, one accumulator each, and of the
// parts in order: a warp leaves its sums, and the last of a tile's to arrive adds all of them.
// Neither the tokens beside it, nor the kernel for more tokens, nor the number of blocks is in it.
//
// Speed. At 1.7 GHz a multiprocessor's share of 4.3 TB/s, among 132 of them, is 19.2 bytes a clock,
// while its four schedulers issue four instructions. A stage is four records, which take (bytes) /
// 19.2 clocks and leave four times as many slots to the loops of eight warps. On sm_90a, of slots:
//
//            bytes   slots   8 tokens     16     32     64
//   bf16     32768    6827         6 %    7 %   11 %   16 %
//   e4m3     32768    6827        38 %   41 %   44 %   54 %
//   int4     17408    3627        59 %   65 %   75 %  172 %   (groups of 128)
//
// Tensor cores take about 8 clocks for one of these products a scheduler: a stage of T tokens keeps
// them 32 T clocks (bf16 16 T). 64 tokens of int4 are bound by both, at about half of memory's
// speed, 64 of e4m3 (2048 clocks of 1707) by the tensor cores; all others by memory.
#pragma once

#include "hopper.cuh"
#include "skinny_sums.cuh"

namespace skinny {

template <class Format, int tokens>
constexpr uint32_t STAGE_BYTES = STRIPS * Format::BYTES + tokens * Format::COLS * 2;

// A place in the ring and how often it came round.
struct Place {
    uint32_t stage = 0, parity = 0;

    DEVICE void next(uint32_t stages) {
        if (++stage < stages) return;
        stage = 0;
        parity ^= 1;
    }
};

struct Ring {
    Barrier* full;
    Barrier* empty;
    unsigned char* stages;

    DEVICE Ring() {
        full = shared_memory<Barrier>();
        empty = full + STAGES_MAX;
        stages = shared_memory<unsigned char>() + HEAD_BYTES;
    }
};

DEVICE uint32_t tiles_of(const SkinnyArgs& args) {
    return (args.rows + STRIPS * STRIP - 1) / (STRIPS * STRIP);
}

// A part of a tile of one weight, for all tokens.
template <class Format>
DEVICE Unit unit_of(const SkinnyArgs& args, uint32_t index) {
    constexpr uint32_t A_STEP = RECORDS_A_STEP<Format>;
    const uint32_t steps = (args.records + A_STEP - 1) / A_STEP;
    const uint32_t tile = index / args.parts, part = index % args.parts;
    const uint32_t strips = (args.rows + STRIP - 1) / STRIP;
    return {tile,
            part,
            steps * part / args.parts * A_STEP,
            min(steps * (part + 1) / args.parts * A_STEP, args.records),
            min(strips - tile * STRIPS, static_cast<uint32_t>(STRIPS)),
            args.tokens,
            0,
            0};
}

// What a launch walks. Here: a weight that all tokens are multiplied with, whose units are known
// before the launches before are done. Elsewhere: experts (`skinny_experts.cuh`).
template <class Weights, int most>
struct Alone {
    using Args = SkinnyArgs;
    using Format = Weights;
    static constexpr int TOKENS = most;
    static constexpr bool KNOWN_AHEAD = true;
    const SkinnyArgs& args;

    DEVICE explicit Alone(const SkinnyArgs& args) : args(args) {}

    DEVICE void begin() const {}
    DEVICE uint32_t units() const { return tiles_of(args) * args.parts; }
    DEVICE Unit unit(uint32_t index) const { return unit_of<Format>(args, index); }

    // The rows of x of a lane's tokens: token lane / 4 of every eight.
    struct Rows {
        DEVICE void begin(const Alone&, const Unit&) {}
        DEVICE uint32_t of(int eight) const { return threadIdx.x % WARP / 4 + 8 * eight; }
    };
};

template <class Walk>
constexpr uint32_t STAGE_BYTES_OF = STAGE_BYTES<typename Walk::Format, Walk::TOKENS>;

// ---- the feeding warp -------------------------------------------------------------------------

// Columns of the tokens that belong to record `record`.
template <class Walk>
DEVICE void copy_x(const SkinnyArgs& args, unsigned char* to, const Unit& unit, uint32_t record,
                   const typename Walk::Rows& rows) {
    constexpr uint32_t COLS = Walk::Format::COLS, tokens = Walk::TOKENS;
    const uint32_t lane = threadIdx.x % WARP;
    // Columns before the first wrap around to large ones.
    const uint32_t first = record * COLS - args.lead + lane % 4 * 8;
#pragma unroll
    for (uint32_t at = 0; at < tokens * COLS / 8; at += WARP) {
        const uint32_t eight = at / 4 % tokens / 8, token = eight * 8 + lane / 4;
        const uint32_t col = first + at / 4 / tokens * SLOT_COLS;
        const bool valid = col < args.cols && token < unit.tokens;
        const bf16* from = args.x + static_cast<uint64_t>(rows.of(eight)) * args.cols + col;
        cp_async_16(to + (at + lane) * 16, valid ? from : args.x, valid);
    }
}

template <class Format>
DEVICE void copy_records(const SkinnyArgs& args, unsigned char* to, const Unit& unit,
                         uint32_t record, Barrier* full) {
    const uint32_t lane = threadIdx.x % WARP;
    const uint64_t stride = static_cast<uint64_t>(args.records) * Format::BYTES;
    const uint64_t strips = (args.rows + STRIP - 1) / STRIP;
    const unsigned char* from = args.weight + (unit.weight * strips + unit.tile * STRIPS) * stride +
                                static_cast<uint64_t>(record) * Format::BYTES;
    if (moves_in_bulk(args.in_bulk)) {
        if (lane != 0) return;
        barrier_arrive_expect(full, unit.strips * Format::BYTES);
        for (uint32_t i = 0; i < unit.strips; ++i)
            bulk_copy(to + i * Format::BYTES, from + i * stride, Format::BYTES, full);
    } else {
        for (uint32_t i = 0; i < unit.strips; ++i)
            for (uint32_t at = lane * 16; at < Format::BYTES; at += CHUNK_BYTES)
                cp_async_16_once(to + i * Format::BYTES + at, from + i * stride + at);
        if (lane == 0) barrier_arrive(full);
    }
}

// A record of a block's units, and the stage that it comes to.
template <class Walk>
struct Step {
    uint32_t index, record = 0;
    Unit unit = {};
    Place place;

    DEVICE explicit Step(const Walk& walk) : index(blockIdx.x) { begin(walk); }

    DEVICE bool exists(const Walk& walk) const { return index < walk.units(); }

    DEVICE bool is_first() const { return record == unit.first; }

    DEVICE void next(const Walk& walk) {
        place.next(walk.args.stages);
        if (++record < unit.end) return;
        index += gridDim.x;
        begin(walk);
    }

    DEVICE void copy(const Walk& walk, const Ring& ring) const {
        using Format = typename Walk::Format;
        copy_records<Format>(walk.args, stage(ring), unit, record, &ring.full[place.stage]);
    }

    DEVICE unsigned char* stage(const Ring& ring) const {
        return ring.stages + place.stage * STAGE_BYTES_OF<Walk>;
    }

private:
    DEVICE void begin(const Walk& walk) {
        if (!exists(walk)) return;
        unit = walk.unit(index);
        record = unit.first;
    }
};

// The stages' first records come before the launches before are done, where units are known: those
// leave weights alone. Not where copies arrive in their order: x would arrive behind all of them.
template <class Walk>
DEVICE uint32_t feed_ahead(const Walk& walk, const Ring& ring) {
    uint32_t came = 0;
    if constexpr (Walk::KNOWN_AHEAD) {
        if (moves_in_bulk(walk.args.in_bulk)) {
            Step<Walk> step(walk);
            for (; came < walk.args.stages && step.exists(walk); ++came, step.next(walk))
                step.copy(walk, ring);
        }
        wait_prerequisites();
    }
    return came;
}

template <class Walk>
DEVICE void feed(const Walk& walk, const Ring& ring) {
    const uint32_t came = feed_ahead(walk, ring);
    typename Walk::Rows rows;
    Place last;
    uint32_t n = 0;
    for (Step<Walk> step(walk); step.exists(walk); ++n, step.next(walk)) {
        Barrier* full = &ring.full[step.place.stage];
        if (n >= came) {
            barrier_wait(&ring.empty[step.place.stage], step.place.parity ^ 1);
            step.copy(walk, ring);
        }
        if (step.is_first()) rows.begin(walk, step.unit);
        unsigned char* to = step.stage(ring) + STRIPS * Walk::Format::BYTES;
        copy_x<Walk>(walk.args, to, step.unit, step.record, rows);
        barrier_arrive_copies(full);
        last = step.place;
    }
    // A thread stays until its copies of x have landed.
    if (n > 0) barrier_wait(&ring.full[last.stage], last.parity);
}

// ---- the multiplying warps --------------------------------------------------------------------

// Tokens whose sums of one group a lane can hold beside those of all: integers of 64 tokens become
// bf16 twice.
template <class Format, int tokens>
constexpr int AT_ONCE = Format::SCALED && tokens > 32 ? 32 : tokens;

// Adds the products of a group of columns, and of tokens `first` to `first + AT_ONCE`.
template <class Format, int tokens, int first>
DEVICE void multiply_group(Sums<tokens>& sums, const unsigned char* record,
                           const unsigned char* x, int half, int group) {
    constexpr int SLOTS = Format::GROUP / SLOT_COLS, COUNT = AT_ONCE<Format, tokens>;
    const int lane = threadIdx.x % WARP;
    const typename Format::Factors factors(record, group, half);
    Sums<COUNT> part = {};
    // Rolled where both times would be made one, for which there are no registers.
    [[maybe_unused]] constexpr int UNROLL = COUNT < tokens ? 1 : SLOTS;
#pragma unroll UNROLL
    for (int i = 0; i < SLOTS; ++i) {
        const int slot = group * SLOTS + i;
        Bytes16 b[COUNT / 8], chunks[Format::CHUNKS];
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n)
            b[n] = load16(x + ((slot * tokens + first + n * 8) * SLOT_COLS * 2 + lane * 16));
        const unsigned char* from = lane_chunks<Format>(record, slot, half);
#pragma unroll
        for (int c = 0; c < Format::CHUNKS; ++c) chunks[c] = load16(from + c * CHUNK_BYTES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = j / 2, s = j % 2;
            uint32_t a[4];
            Format::fragment(a, chunks, factors, m, s);
#pragma unroll
            for (int n = 0; n < COUNT / 8; ++n) {
                float(&to)[4] = Format::SCALED ? part[m][n] : sums[m][first / 8 + n];
                mma_16816(to, a, b[n].words[2 * s], b[n].words[2 * s + 1]);
            }
        }
    }
    if constexpr (Format::SCALED) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int m = i % 2, r = i / 2 % 2, n = i / 8, at = 2 * r + i / 4 % 2;
            float& sum = sums[m][first / 8 + n][at];
            sum = fmaf(part[m][n][at], factors.scale(m, r), sum);
        }
    }
}

// Adds a half's 32 rows of a record to its sums.
template <class Format, int tokens, int first = 0>
DEVICE void multiply(Sums<tokens>& sums, const unsigned char* record, const unsigned char* x,
                     int half) {
    constexpr int GROUPS = Format::COLS / Format::GROUP, COUNT = AT_ONCE<Format, tokens>;
    [[maybe_unused]] constexpr int UNROLL = tokens < 32 ? GROUPS : 1;
#pragma unroll UNROLL
    for (int group = 0; group < GROUPS; ++group)
        multiply_group<Format, tokens, first>(sums, record, x, half, group);
    if constexpr (first + COUNT < tokens)
        multiply<Format, tokens, first + COUNT>(sums, record, x, half);
}

template <class Walk>
DEVICE void multiply_all(const Walk& walk, const Ring& ring) {
    using Format = typename Walk::Format;
    constexpr int tokens = Walk::TOKENS;
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // What it writes, others may still read.
    if constexpr (Walk::KNOWN_AHEAD) wait_prerequisites();
    const uint32_t units = walk.units();
    Place place;
    for (uint32_t index = blockIdx.x; index < units; index += gridDim.x) {
        const Unit unit = walk.unit(index);
        const bool has_rows = warp / 2 < unit.strips;
        Sums<tokens> sums = {};
        for (uint32_t record = unit.first; record < unit.end; ++record) {
            const unsigned char* stage = ring.stages + place.stage * STAGE_BYTES_OF<Walk>;
            barrier_wait(&ring.full[place.stage], place.parity);
            if (has_rows)
                multiply<Format, tokens>(sums, stage + warp / 2 * Format::BYTES,
                                         stage + STRIPS * Format::BYTES, warp % 2);
            __syncwarp();
            if (lane == 0) barrier_arrive(&ring.empty[place.stage]);
            place.next(walk.args.stages);
        }
        if (has_rows) finish<tokens>(walk.args, unit, sums);
    }
}

template <class Walk>
DEVICE void skinny_product(const typename Walk::Args& args) {
    launch_dependents();
    static_assert(2 * STAGES_MAX * sizeof(Barrier) <= HEAD_BYTES, "room for the barriers");
    const Ring ring;
    Walk walk(args);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < walk.args.stages; ++i) {
            // Its records, and each lane's share of x.
            barrier_init(&ring.full[i], 1 + WARP);
            barrier_init(&ring.empty[i], WARPS);
        }
        barriers_made();
    }
    walk.begin();
    __syncthreads();
    if (threadIdx.x / WARP == WARPS) {
        feed(walk, ring);
    } else {
        multiply_all(walk, ring);
    }
}

}  // namespace skinny

// The kernels of a format. Each file of them is compiled on its own.
#define SKINNY_KERNEL(name, Format, tokens)                                \
    KERNEL(skinny_linear_##name##_t##tokens, SkinnyArgs, THREADS, 1) {     \
        skinny_product<Alone<Format, tokens>>(args);                       \
    }
#define SKINNY_KERNELS(name, Format)  \
    SKINNY_KERNEL(name, Format, 8)    \
    SKINNY_KERNEL(name, Format, 16)   \
    SKINNY_KERNEL(name, Format, 32)   \
    SKINNY_KERNEL(name, Format, 64)
