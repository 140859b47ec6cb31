// What a block of decode attention has before it, and the sequence's own row, which it turns where
// the row comes as its product left it.
#pragma once

#include "decode.cuh"
#include "rope.cuh"

namespace decoding {

struct DecodeArgs {
    const bf16* qkv;             // [T, qkv_cols]: query heads first
    bf16* out;                   // [T, q_heads * D]
    unsigned char* keys;         // [blocks, kv_heads, 16, D]
    unsigned char* values;
    const int* splits;           // [.., 3]: sequence, its split, place of its first split
    const int* splits_count;     // [1]
    const int* row_starts;       // [S + 1]
    const int* context_lens;     // [S]
    const int* tables;           // [S]: rows of block_tables
    const int* block_tables;     // [.., table_cols]
    float* sums;                 // [splits, q_heads, D]: Σ 2^(score - max) · value
    float* weights;              // [splits, q_heads, 2]: max of the scores, Σ 2^(score - max)
    uint32_t* arrivals;          // [S, q_heads]: splits that left sums; zeros between launches
    rope::TurnArgs turn;         // cos_sin is null where rows are turned and stored already
    float score_scale;           // log2(e) / sqrt(D)
    int qkv_cols;
    int q_heads;
    int kv_heads;
    int table_cols;
    int group;                   // q_heads / kv_heads
    int window;                  // keys that a row sees, itself included; 2^30 for all

    DEVICE bool turns() const { return turn.cos_sin != nullptr; }
};

// What a thread block has before it: one split, and the query heads of one key head, up to 16.
struct Split {
    int sequence, kv_head, first_head, heads;
    int place, first_place, last_place;  // of this split and of those that have keys, in the list
    int first, end;                      // keys; none where first >= end
    bool alone;                          // the sequence has no other
    bool newest;                         // the last key is turned here: not in the cache
};

// Without heads behind the last.
DEVICE Split split_of(const DecodeArgs& args, int item) {
    const int count = *args.splits_count;
    if (item >= count * args.kv_heads * ((args.group + TILE_HEADS - 1) / TILE_HEADS)) return {};
    const int place = item % count, rest = item / count;
    const int* cut = args.splits + 3 * static_cast<int64_t>(place);
    const int sequence = cut[0], start = cut[1] * SPLIT_TOKENS;
    const int context = args.context_lens[sequence];
    const int visible = max(context - args.window, 0);
    const int kv_head = rest % args.kv_heads, tile = rest / args.kv_heads * TILE_HEADS;
    Split split;
    split.sequence = sequence;
    split.kv_head = kv_head;
    split.first_head = kv_head * args.group + tile;
    split.heads = min(args.group - tile, TILE_HEADS);
    split.place = place;
    split.first_place = cut[2] + visible / SPLIT_TOKENS;
    split.last_place = cut[2] + (context - 1) / SPLIT_TOKENS;
    split.first = max(start, visible);
    split.end = min(start + SPLIT_TOKENS, context);
    split.alone = context <= SPLIT_TOKENS;
    split.newest = args.turns() && split.end == context;
    return split;
}

// A sequence's own row, turned, behind the tiles: queries, and the key and value as the cache has
// them.
template <typename T, int D>
struct alignas(16) OwnRow {
    // Rows of heads a few banks apart.
    static constexpr int STRIDE = D + 8;
    bf16 queries[TILE_HEADS][STRIDE];
    T cached[2][D];
    float scales[2];

    static DEVICE OwnRow& behind_tiles() {
        unsigned char* tiles = shared_memory<unsigned char>();
        constexpr int TILES = WARPS * Tile<T, D>::STAGES * 2 * Tile<T, D>::BYTES;
        return *reinterpret_cast<OwnRow*>(tiles + TILES);
    }

    // Puts the key (`which` = 0) or the value into a tile, at `row`.
    DEVICE void put(unsigned char* tile, int which, int row) const {
        using Shape = Tile<T, D>;
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        const auto* from = reinterpret_cast<const unsigned char*>(cached[which]);
        if (lane < Shape::CHUNKS)
            store16(tile + Shape::offset(row, lane), load16(from + lane * 16));
        // Of both behind the keys.
        auto* behind = reinterpret_cast<float*>(tile + Shape::ELEMENTS);
        if (Shape::SCALED && which == 0 && lane < 2)
            behind[lane * BLOCK_TOKENS + row] = scales[lane];
        __syncwarp();
    }
};

// Turns the heads of the sequence's row that the block has to do with.
template <typename T, int D>
DEVICE void turn_row(const DecodeArgs& args, const Split& split, OwnRow<T, D>& own) {
    using namespace rope;
    constexpr int LANES = D / 16, TOGETHER = THREADS / LANES;
    const int at = static_cast<int>(threadIdx.x) % LANES * LANE_VECTOR;
    const int token = args.row_starts[split.sequence];
    const bf16* row = args.qkv + static_cast<int64_t>(token) * args.qkv_cols + at;
    const int heads = split.heads + (split.newest ? 2 : 0);
    const Turn turn = Turn::of<D>(args.turn, token, at);
    const CachePlace<D> there(args.turn.slots[token], args.kv_heads, split.kv_head);
    // Of the product that makes the row.
    wait_prerequisites();
    for (int first = 0; first < heads; first += TOGETHER) {
        const int n = first + static_cast<int>(threadIdx.x) / LANES;
        const bool is_query = n < split.heads, is_key = n == split.heads;
        const int cached = args.q_heads + split.kv_head + (is_key ? 0 : args.kv_heads);
        HeadPart part;
        if (n < heads) part.load<D>(row + (is_query ? split.first_head + n : cached) * D);
        turn.apply<D>(part, is_query ? Head::QUERY : is_key ? Head::KEY : Head::OTHER);
        if (is_query) {
            store16(&own.queries[n][at], part.low);
            store16(&own.queries[n][at + D / 2], part.high);
        }
        const int which = is_key ? 0 : 1;
        unsigned char* here = reinterpret_cast<unsigned char*>(own.cached[which]);
        void* const cache = is_key ? args.keys : args.values;
        // Of the blocks that share the key head one.
        const bool is_new = n >= split.heads && n < heads;
        const bool stores = is_new && split.first_head == split.kv_head * args.group;
        if constexpr (Tile<T, D>::SCALED) {
            const CodedPart codes = coded<D>(part);
            if (is_new) codes.store<D>(here, at, &own.scales[which]);
            if (stores) there.store(cache, codes, at);
        } else {
            if (is_new) {
                store16(here + at * 2, part.low);
                store16(here + (at + D / 2) * 2, part.high);
            }
            if (stores) there.store(cache, part, at);
        }
    }
    __syncthreads();
}

}  // namespace decoding
