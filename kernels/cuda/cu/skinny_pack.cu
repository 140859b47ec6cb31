// Weights into records and out of them (layout: `skinny.cuh`), and the order of int4's columns.
//
// Into: once, as a weight is uploaded, from rows of bf16, e4m3 or int4 that arrive a piece at a
// time.
//
// Out of: [N, K] as rows, for products of so many tokens that the device's own are worth it, in
// bf16 or, where there are products in e4m3, as its codes. That reads and writes a weight once more
// for each product, that is, once for a chunk of T tokens: in bytes an element 2 + 2 of bf16, 1 + 1
// of e4m3 and 0.53 + 2 of int4. At 4.3 TB/s, beside 2 T operations an element at 790 TFLOP/s in
// bf16 and twice that in e4m3, it is 367 / T of the product's own time (int4: 232 / T): 4.5 % at
// 8192 tokens, 9 % at 4096.
#include "skinny.cuh"

using namespace skinny;

constexpr int THREADS = 256;

// ---- into records -------------------------------------------------------------------------------

struct PackArgs {
    unsigned char* weight;      // [strips][records]
    const unsigned char* from;  // [rows, cols], the weight's rows `first` and on
    uint32_t first;
    uint32_t rows;
    uint32_t cols;  // a multiple of 8
    uint32_t records;
    uint32_t pairs;  // as SkinnyArgs'
    uint32_t unused;
};

// Where word `word` of a lane's chunk `chunk` lies for a row and eight columns of a weight.
template <class Format>
DEVICE unsigned char* word_of(const PackArgs& args, uint32_t row, uint32_t col, int chunk,
                              int word) {
    const uint64_t record =
        static_cast<uint64_t>(row / STRIP) * args.records + col / Format::COLS;
    const uint32_t slot = col % Format::COLS / SLOT_COLS, half = row % STRIP / HALF;
    const uint32_t lane = row % HALF / LANE_ROWS * 4 + col % SLOT_COLS / 8;
    const uint32_t at = ((slot * 2 + half) * Format::CHUNKS + chunk) * CHUNK_BYTES;
    return args.weight + record * Format::BYTES + at + lane * 16 + word * 4;
}

// The row and the first of the eight columns that a thread moves; false past the last.
DEVICE bool piece_of(const PackArgs& args, uint32_t& row, uint32_t& col) {
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const uint32_t pieces = args.cols / 8;
    row = static_cast<uint32_t>(at / pieces);
    col = static_cast<uint32_t>(at % pieces) * 8;
    return row < args.rows;
}

KERNEL(skinny_pack_bf16, PackArgs, THREADS) {
    uint32_t row, col;
    if (!piece_of(args, row, col)) return;
    const auto* from = reinterpret_cast<const bf16*>(args.from);
    const Bytes16 eight = load16_stream(from + static_cast<uint64_t>(row) * args.cols + col);
    row = row_in_records(row + args.first, args.pairs);
    const int m = row % LANE_ROWS / 2, r = row % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Columns 4 s and on, two to a register.
        const int s = i / 2, pair = i % 2;
        store_word(word_of<Bf16>(args, row, col, 2 * m + s, 2 * pair + r), eight.words[i]);
    }
}

KERNEL(skinny_pack_e4m3, PackArgs, THREADS) {
    uint32_t row, col;
    if (!piece_of(args, row, col)) return;
    const Bytes8 eight = load8(args.from + static_cast<uint64_t>(row) * args.cols + col);
    row = row_in_records(row + args.first, args.pairs);
    const int m = row % LANE_ROWS / 2, r = row % 2;
#pragma unroll
    for (int s = 0; s < 2; ++s)
        store_word(word_of<E4m3>(args, row, col, m, 2 * s + r), eight.words[s]);
}

struct PackInt4Args {
    uint32_t* records;        // of the first strip here
    const uint32_t* from;     // [rows, cols / 8] of eight integers, rows as records have them
    const uint32_t* factors;  // [rows, groups] as records have them
    const int32_t* columns;   // [places] the column at each place, negative for none
    const int32_t* runs;      // [places / unit] the group of a run of places, negative for none
    uint64_t words;           // of the records here
    uint32_t rows;
    uint32_t cols;  // a multiple of 8
    uint32_t groups;
    uint32_t strip_records;
    uint32_t unit;  // places of a run
    uint32_t unused;
};

// The integer of a row at a place; 0 where there is none.
DEVICE uint32_t int4_at(const PackInt4Args& args, uint64_t row, uint32_t place) {
    const int32_t col = args.columns[place];
    if (row >= args.rows || col < 0) return 0;
    return args.from[row * (args.cols / 8) + col / 8] >> (col % 8 * 4) & 15;
}

// A thread for each word of the records.
KERNEL(skinny_pack_int4, PackInt4Args, THREADS) {
    using Format = Int4<128>;
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= args.words) return;
    const uint32_t numbers = Format::NUMBER_BYTES / 4;
    const uint32_t words = numbers + Format::COLS / args.unit * STRIP;
    const uint32_t word = static_cast<uint32_t>(at % words);
    const uint32_t record = static_cast<uint32_t>(at / words % args.strip_records);
    const uint64_t first_row = at / words / args.strip_records * STRIP;
    if (word >= numbers) {
        const uint32_t factor = word - numbers;
        const uint64_t row = first_row + factor % STRIP;
        const int32_t group = args.runs[record * (Format::COLS / args.unit) + factor / STRIP];
        // 128 without a scale: what is not there counts nothing.
        const bool there = row < args.rows && group >= 0;
        args.records[at] = there ? args.factors[row * args.groups + group] : 0x43000000u;
        return;
    }
    const uint32_t lane = word / 4 % 32, half = word / 128 % 2, slot = word / 256;
    const uint64_t row = first_row + half * HALF + lane / 4 * LANE_ROWS + word % 4 / 2 * 2;
    const uint32_t place =
        record * Format::COLS + slot * SLOT_COLS + lane % 4 * 8 + word % 2 * 4;
    uint32_t packed = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t even = place + r / 2 * 2;
        packed |= int4_at(args, row + r % 2, even) << 4 * r;
        packed |= int4_at(args, row + r % 2, even + 1) << (16 + 4 * r);
    }
    args.records[at] = packed;
}

// ---- out of records -----------------------------------------------------------------------------

struct UnpackArgs {
    const unsigned char* weight;  // [strips][records]
    const float* scales;          // [rows] or null
    void* out;                    // [rows, cols]
    uint32_t rows;
    uint32_t cols;  // a multiple of 8
    uint32_t lead;  // as SkinnyArgs'
    uint32_t records;
    uint32_t strips;
    uint32_t pairs;  // as SkinnyArgs'
};

// A lane's row and its eight columns of a slot and half.
struct Spot {
    uint32_t row, col;

    DEVICE Spot(const UnpackArgs& args, uint64_t record, int cols, int slot, int half) {
        const uint32_t lane = threadIdx.x % WARP;
        row = static_cast<uint32_t>(record / args.records) * STRIP + half * HALF +
              lane / 4 * LANE_ROWS;
        // Columns before the first wrap around to large ones.
        col = static_cast<uint32_t>(record % args.records) * cols + slot * SLOT_COLS +
              lane % 4 * 8 - args.lead;
    }
};

DEVICE bool record_of_warp(const UnpackArgs& args, uint64_t& record) {
    record = (static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
    return record < static_cast<uint64_t>(args.strips) * args.records;
}

// As bf16, rounded once where there are scales.
template <class Format>
DEVICE void unpack(const UnpackArgs& args) {
    uint64_t at;
    if (!record_of_warp(args, at)) return;
    const unsigned char* record = args.weight + at * Format::BYTES;
    auto* out = static_cast<bf16*>(args.out);
    for (int i = 0; i < Format::COLS / SLOT_COLS * 2; ++i) {
        const int slot = i / 2, half = i % 2;
        const Spot spot(args, at, Format::COLS, slot, half);
        const typename Format::Factors factors(record, slot * SLOT_COLS / Format::GROUP, half);
        Bytes16 chunks[Format::CHUNKS];
#pragma unroll
        for (int c = 0; c < Format::CHUNKS; ++c)
            chunks[c] = load16_stream(lane_chunks<Format>(record, slot, half) + c * CHUNK_BYTES);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t a[2][4];
#pragma unroll
            for (int s = 0; s < 2; ++s) Format::fragment(a[s], chunks, factors, m, s);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t row = row_of_matrix(spot.row + 2 * m + r, args.pairs);
                if (row >= args.rows || spot.col >= args.cols) continue;
                float scale = factors.scale(m, r);
                if (args.scales != nullptr) scale = args.scales[row];
                Bytes16 v;
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const uint32_t pair = a[w / 2][w % 2 * 2 + r];
                    v.words[w] = pack_bf16(low_bf16(pair) * scale, high_bf16(pair) * scale);
                }
                store16(out + static_cast<uint64_t>(row) * args.cols + spot.col, v);
            }
        }
    }
}

KERNEL(skinny_unpack_bf16, UnpackArgs, THREADS) { unpack<Bf16>(args); }
KERNEL(skinny_unpack_e4m3, UnpackArgs, THREADS) { unpack<E4m3>(args); }
KERNEL(skinny_unpack_int4_g32, UnpackArgs, THREADS) { unpack<Int4<32>>(args); }
KERNEL(skinny_unpack_int4_g64, UnpackArgs, THREADS) { unpack<Int4<64>>(args); }
KERNEL(skinny_unpack_int4_g128, UnpackArgs, THREADS) { unpack<Int4<128>>(args); }

// e4m3 as it is.
KERNEL(skinny_unpack_codes, UnpackArgs, THREADS) {
    uint64_t at;
    if (!record_of_warp(args, at)) return;
    const unsigned char* record = args.weight + at * E4m3::BYTES;
    auto* out = static_cast<unsigned char*>(args.out);
    for (int i = 0; i < E4m3::COLS / SLOT_COLS * 2; ++i) {
        const Spot spot(args, at, E4m3::COLS, i / 2, i % 2);
#pragma unroll
        for (int m = 0; m < E4m3::CHUNKS; ++m) {
            const unsigned char* from = lane_chunks<E4m3>(record, i / 2, i % 2);
            const Bytes16 chunk = load16_stream(from + m * CHUNK_BYTES);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t row = row_of_matrix(spot.row + 2 * m + r, args.pairs);
                if (row >= args.rows || spot.col >= args.cols) continue;
                const Bytes8 v = {{chunk.words[r], chunk.words[2 + r]}};
                store8(out + static_cast<uint64_t>(row) * args.cols + spot.col, v);
            }
        }
    }
}

// ---- permuted columns (GPTQ's act-order) ------------------------------------------------------
//
// out [T, places] = x [T, cols] by place: column order[place], 0 where that is negative. So that
// groups of columns lie together as the records want them. Small beside the weights.

struct GatherColumnsArgs {
    bf16* out;
    const bf16* x;
    const int32_t* order;
    uint32_t cols;
    uint32_t places;
};

KERNEL(int4_gather_columns, GatherColumnsArgs, THREADS) {
    const uint32_t place = blockIdx.x * THREADS + threadIdx.x;
    if (place >= args.places) return;
    const int32_t col = args.order[place];
    const bf16* x = args.x + static_cast<uint64_t>(blockIdx.y) * args.cols;
    const bf16 value = col < 0 ? bf16{0} : x[col];
    args.out[static_cast<uint64_t>(blockIdx.y) * args.places + place] = value;
}
