// Makes of what the host says about a step what the other kernels read, in two launches before the
// first layer: `step_tables` enters new blocks into the block tables, `step_rows` derives the rest.
//
// The host sends 16 bytes a sequence, 4 a row and 8 a new block; tables stay on the device. Rows
// from `rows` on are padding: token 0, no slot. Bound by latency.
#include "common.cuh"

constexpr int THREADS = 256;
// As attention cuts: keys of a split, rows of a tile.
constexpr int SPLIT_TOKENS = 512;
constexpr int TILE_ROWS = 128;

struct StepSequence {
    int first_row;
    int start;       // position of that row
    int rope_start;  // and its row of the cos/sin table
    int table;       // its row of block_tables
};

// Work that begins with item `first`, in ascending order.
struct StepWork {
    int sequence, first;
};

// The same of tiles. A sequence that is cut along its keys has an item for each span, and its sums
// from a place on; that of others is below zero.
struct StepTiles {
    int sequence, first, place;
};

struct StepArgs {
    // From the host.
    const StepSequence* sequences;
    const int* ids;               // [rows]; negative: the sequence's last sampled id
    const int* new_blocks;        // [.., 2]: place in block_tables, block
    const int* wanted;            // [logit_rows_len]
    const StepWork* decoding;     // by their first split
    const StepTiles* prefilling;  // by their first tile
    const float* q_scales;        // by position, or null
    const int* last_ids;          // by table
    // Derived.
    int* out_ids;
    int* positions;
    int* rope_rows;
    int* slots;
    float* q_scale;
    int* row_starts;
    int* context_lens;
    int* tables;
    int* block_tables;  // [.., table_cols]
    int* logit_rows;
    int* splits;        // [splits_len, 3]: sequence, its split, the item of its first split
    int* tiles;         // [tiles_len, 4]: sequence, first row, span, place of sums
    int* splits_count;
    int sequences_len;
    int rows;
    int tokens;
    int new_blocks_len;
    int logit_rows_len;
    int decoding_len;
    int splits_len;
    int prefilling_len;
    int tiles_len;
    int table_cols;
};

DEVICE int item_of_thread() { return static_cast<int>(blockIdx.x * THREADS + threadIdx.x); }

// The last of `count` entries whose first item is not behind `item`.
template <typename First>
DEVICE int entry_of(int item, int count, First first) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (first(middle) <= item) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

DEVICE int rows_of(const StepArgs& args, int sequence) {
    const int next = sequence + 1;
    const int end = next < args.sequences_len ? args.sequences[next].first_row : args.rows;
    return end - args.sequences[sequence].first_row;
}

DEVICE void derive_row(const StepArgs& args, int row) {
    if (row >= args.rows) {
        args.out_ids[row] = args.positions[row] = args.rope_rows[row] = 0;
        args.slots[row] = -1;
        if (args.q_scales != nullptr) args.q_scale[row] = 1.0f;
        return;
    }
    const auto first = [&](int entry) { return args.sequences[entry].first_row; };
    const StepSequence sequence = args.sequences[entry_of(row, args.sequences_len, first)];
    const int within = row - sequence.first_row, position = sequence.start + within;
    const int64_t table = static_cast<int64_t>(sequence.table) * args.table_cols;
    const int block = args.block_tables[table + position / BLOCK_TOKENS];
    const int id = args.ids[row];
    args.out_ids[row] = id >= 0 ? id : args.last_ids[sequence.table];
    args.positions[row] = position;
    args.rope_rows[row] = sequence.rope_start + within;
    args.slots[row] = block * BLOCK_TOKENS + position % BLOCK_TOKENS;
    if (args.q_scales != nullptr) args.q_scale[row] = args.q_scales[position];
}

DEVICE void derive_sequence(const StepArgs& args, int s) {
    if (s == args.sequences_len) {
        args.row_starts[s] = args.rows;
        return;
    }
    const StepSequence sequence = args.sequences[s];
    args.row_starts[s] = sequence.first_row;
    args.context_lens[s] = sequence.start + rows_of(args, s);
    args.tables[s] = sequence.table;
}

template <typename Work>
DEVICE Work work_of(const Work* work, int count, int item) {
    return work[entry_of(item, count, [&](int entry) { return work[entry].first; })];
}

DEVICE void derive_split(const StepArgs& args, int item) {
    const StepWork work = work_of(args.decoding, args.decoding_len, item);
    int* split = args.splits + 3 * static_cast<int64_t>(item);
    split[0] = work.sequence;
    split[1] = item - work.first;
    split[2] = work.first;
}

// A sequence's last tile comes first: it sees the most keys.
DEVICE void derive_tile(const StepArgs& args, int item) {
    const StepTiles work = work_of(args.prefilling, args.prefilling_len, item);
    const int within = item - work.first;
    const int index = work.place < 0 ? (rows_of(args, work.sequence) - 1) / TILE_ROWS - within : 0;
    int* tile = args.tiles + 4 * static_cast<int64_t>(item);
    tile[0] = work.sequence;
    tile[1] = args.sequences[work.sequence].first_row + index * TILE_ROWS;
    tile[2] = work.place < 0 ? 0 : within;
    tile[3] = work.place;
}

KERNEL(step_tables, StepArgs, THREADS) {
    const int item = item_of_thread();
    if (item >= args.new_blocks_len) return;
    args.block_tables[args.new_blocks[2 * item]] = args.new_blocks[2 * item + 1];
}

KERNEL(step_rows, StepArgs, THREADS) {
    const int item = item_of_thread();
    if (item < args.tokens) derive_row(args, item);
    if (item <= args.sequences_len) derive_sequence(args, item);
    if (item < args.logit_rows_len) args.logit_rows[item] = args.wanted[item];
    if (item < args.splits_len) derive_split(args, item);
    if (item < args.tiles_len) derive_tile(args, item);
    if (item == 0) *args.splits_count = args.splits_len;
}
