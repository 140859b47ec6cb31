// Weights made from a seed, for models without a checkpoint: what a number is follows from its
// place alone, as `kernels/src/weight/random.rs` says, so that any device makes the same.
//
// Bound by the integer units, about 60 operations a number: 70 thousand million of them take an
// H100 some seconds.
#include "skinny.cuh"

constexpr int THREADS = 256;
// Numbers of a thread, THREADS apart.
constexpr int DEPTH = 8;

// The sum of four even draws of 16 bits, less its mean.
DEVICE int random_sum(uint64_t seed, uint64_t row, uint64_t col) {
    uint64_t x = seed ^ (row << 32 | col) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    const int low = static_cast<int>(x & 0xffff) + static_cast<int>(x >> 16 & 0xffff);
    const int high = static_cast<int>(x >> 32 & 0xffff) + static_cast<int>(x >> 48);
    return low + high - 2 * 65535;
}

// out [rows, cols] in bf16.
struct RandomArgs {
    bf16* out;
    uint64_t seed;
    uint64_t first_row;
    uint64_t first_col;
    uint64_t numbers;  // rows · cols
    uint32_t cols;
    float step;  // what a sum is multiplied by
};

KERNEL(random_bf16, RandomArgs, THREADS) {
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * (THREADS * DEPTH) + threadIdx.x;
    for (int i = 0; i < DEPTH; ++i) {
        const uint64_t at = first + i * THREADS;
        if (at >= args.numbers) break;
        const uint64_t row = at / args.cols, col = at % args.cols;
        const int sum = random_sum(args.seed, args.first_row + row, args.first_col + col);
        args.out[at] = to_bf16(static_cast<float>(sum) * args.step);
    }
}

// Rows of one matrix in a stack.
struct RandomPart {
    uint64_t seed;
    uint64_t first_row;
    uint64_t first_col;
    uint64_t rows;
};

constexpr int PARTS = 3;

// Records of skinny.cuh.
struct RandomInt4Args {
    uint32_t* records;
    RandomPart parts[PARTS];
    uint64_t words;  // of all records
    uint32_t cols;
    uint32_t lead;
    uint32_t strip_records;
    uint32_t group;   // columns with one scale
    uint32_t factor;  // of every row and group that is there
    uint32_t zero;    // the integer that stands for 0
    uint32_t pairs;   // as SkinnyArgs'
    uint32_t unused;
};

// The integer at row `at` of the records and place `place`; 0 where there is none.
DEVICE uint32_t random_int4(const RandomInt4Args& args, uint64_t at, uint32_t place) {
    uint64_t row = skinny::row_of_matrix(static_cast<uint32_t>(at), args.pairs);
    if (place < args.lead || place - args.lead >= args.cols) return 0;
    for (int p = 0; p < PARTS; ++p) {
        const RandomPart& part = args.parts[p];
        if (row < part.rows) {
            const uint64_t col = part.first_col + (place - args.lead);
            const int sum = random_sum(part.seed, part.first_row + row, col);
            const int value = (sum + (1 << 13) >> 14) + static_cast<int>(args.zero);
            return static_cast<uint32_t>(value < 0 ? 0 : value > 15 ? 15 : value);
        }
        row -= part.rows;
    }
    return 0;
}

DEVICE bool random_has_row(const RandomInt4Args& args, uint64_t row) {
    uint64_t rows = 0;
    for (int p = 0; p < PARTS; ++p) rows += args.parts[p].rows;
    return row < rows;
}

KERNEL(random_int4_records, RandomInt4Args, THREADS) {
    using skinny::HALF, skinny::LANE_ROWS, skinny::SLOT_COLS, skinny::STRIP;
    using Format = skinny::Int4<128>;
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= args.words) return;
    const uint32_t numbers = Format::NUMBER_BYTES / 4;
    const uint32_t words = numbers + Format::COLS / args.group * (Format::GROUP_BYTES / 4);
    const uint32_t word = static_cast<uint32_t>(at % words);
    const uint32_t record = static_cast<uint32_t>(at / words % args.strip_records);
    const uint64_t first_row = at / words / args.strip_records * STRIP;
    if (word < numbers) {
        const uint32_t lane = word / 4 % 32, half = word / 128 % 2, slot = word / 256;
        const uint64_t row = first_row + half * HALF + lane / 4 * LANE_ROWS + word % 4 / 2 * 2;
        const uint32_t in_slot = lane % 4 * 8 + word % 2 * 4;
        const uint32_t place = record * Format::COLS + slot * SLOT_COLS + in_slot;
        uint32_t packed = 0;
        for (int r = 0; r < 4; ++r) {
            const uint32_t even = place + r / 2 * 2;
            packed |= random_int4(args, row + r % 2, even) << 4 * r;
            packed |= random_int4(args, row + r % 2, even + 1) << (16 + 4 * r);
        }
        args.records[at] = packed;
        return;
    }
    const uint32_t factor = word - numbers;
    const uint64_t row = first_row + factor % STRIP;
    const uint32_t first = record * Format::COLS + factor / STRIP * args.group;
    // 128 without a scale: what is not there counts nothing.
    const bool has_cols = first < args.lead + args.cols && first + args.group > args.lead;
    args.records[at] = has_cols && random_has_row(args, row) ? args.factor : 0x43000000u;
}
