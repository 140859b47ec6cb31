// Warpgroup products.
#include "simt.h"

#include "races.h"

#include <memory>
#include <vector>

namespace simt {
namespace {

constexpr unsigned LANES = 32, WARPS = 4, ROWS = 16, DEPTH = 16;
constexpr int COLUMNS_MAX = 256;
// Of a multiprocessor, and of one thread.
constexpr unsigned REGISTERS = 65536, REGISTERS_MAX = 256;

// A product that a warp has begun.
struct Pending {
    Wgmma product;  // of lane 0
    const uint32_t* a[LANES];
    size_t sums;      // index in Warp::sums
    uint64_t fenced;  // when the lane that did so first last fenced its proxies
    unsigned group;
};

// Accumulators of products that are not done: a warp's rows, and where they go.
struct Sums {
    float* d[LANES];
    int registers;
    unsigned uses;
    float values[ROWS][COLUMNS_MAX];
};

struct Warp {
    std::vector<Pending> begun;
    std::vector<Sums> sums;
    unsigned group = 0;  // that is open
    size_t products = 0;
    bool fenced = false;
};

// A 16-byte chunk that was written, by a copy or as an operand: when, and which thread's.
struct Landing {
    uint64_t when;
    unsigned thread;
};

struct State {
    uint64_t block = 0;
    uint64_t now = 0;  // counts landings, stores of operands and proxy fences
    std::vector<Warp> warps;
    // What the warps of each warpgroup began, in order.
    std::vector<std::vector<Wgmma>> begun;
    std::vector<uint64_t> fenced;  // by thread
    std::vector<Landing> landings;
    // A lane's, of each warp, and those of all lanes that are nobody's.
    std::vector<unsigned> registers;
    unsigned free_registers = 0;
};
thread_local State kept;

State& state() {
    if (kept.block == block_serial()) return kept;
    const unsigned threads = self().block_size.x;
    kept = {};
    kept.block = block_serial();
    kept.warps.resize(threads / LANES);
    kept.registers.assign(threads / LANES, std::min(REGISTERS / threads / 8 * 8, REGISTERS_MAX));
    kept.begun.resize((threads + 127) / 128);
    kept.fenced.assign(threads, 0);
    kept.landings.assign(shared_bytes() / 16 + 1, {0, 0});
    return kept;
}

// ---- operands -------------------------------------------------------------------------------

struct Descriptor {
    uint32_t start, leading, stride;
};

Descriptor decode(uint64_t bits) {
    constexpr uint64_t FIELDS = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if ((bits & ~FIELDS) != 0)
        fail("wgmma descriptor %016llx has reserved bits or a base offset",
             static_cast<unsigned long long>(bits));
    if (bits >> 62 != 1)
        fail("wgmma descriptor with swizzle mode %u, only 128 bytes is known",
             static_cast<unsigned>(bits >> 62));
    const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
    const Descriptor d{field(0), field(16), field(32)};
    if ((d.start & 0x380) != 0)
        fail("wgmma operand at %x: its swizzle does not start at a multiple of 1024", d.start);
    return d;
}

// The chunk at an address before swizzling, which must be there for the async proxy too.
void read_chunk(const Pending& p, uint32_t address, uint16_t (&to)[8]) {
    State& s = state();
    const uint32_t at = address ^ (address >> 7 & 7) << 4;
    if (at + 16 > shared_bytes())
        fail("wgmma reads at %u of %zu bytes of shared memory", at, shared_bytes());
    const Landing& landing = s.landings[at / 16];
    if (landing.when > p.fenced && landing.when > s.fenced[landing.thread])
        fail("wgmma reads at %u what thread %u wrote or copied, with no fence.proxy.async between",
             at, landing.thread);
    const auto* from = static_cast<const unsigned char*>(shared(0)) + at;
    races::touch(from, 16, false);
    std::memcpy(to, from, 16);
}

float widened(uint32_t bits) { return bits_to_float(bits << 16); }

// Rows `first` and on of an operand with rows along K.
void read_along_k(const Pending& p, uint64_t descriptor, unsigned first, unsigned rows, float* to,
                  size_t row_stride, size_t k_stride) {
    const Descriptor d = decode(descriptor);
    for (unsigned i = 0; i < rows; ++i) {
        const unsigned row = first + i;
        for (unsigned k = 0; k < DEPTH; k += 8) {
            uint16_t chunk[8];
            read_chunk(p, d.start + row / 8 * d.stride + row % 8 * 128 + k * 2, chunk);
            for (unsigned j = 0; j < 8; ++j)
                to[i * row_stride + (k + j) * k_stride] = widened(chunk[j]);
        }
    }
}

// [16, columns] of an operand with rows along N.
void read_along_n(const Pending& p, unsigned columns, float (*to)[COLUMNS_MAX]) {
    const Descriptor d = decode(p.product.b_descriptor);
    for (unsigned k = 0; k < DEPTH; ++k) {
        for (unsigned n = 0; n < columns; n += 8) {
            uint16_t chunk[8];
            const uint32_t at = n / 64 * d.leading + n % 64 * 2 + k / 8 * d.stride + k % 8 * 128;
            read_chunk(p, d.start + at, chunk);
            for (unsigned j = 0; j < 8; ++j) to[k][n + j] = widened(chunk[j]);
        }
    }
}

// The place in the warp's rows of register i of a lane: of an accumulator, and of A by halves.
unsigned row_of(unsigned lane, unsigned i) { return lane / 4 + i / 2 % 2 * 8; }
unsigned column_of(unsigned lane, unsigned i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void read_registers(const Pending& p, float (&a)[ROWS][DEPTH]) {
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned i = 0; i < 8; ++i)
            a[row_of(lane, i)][column_of(lane, i)] =
                widened(p.a[lane][i / 2] >> i % 2 * 16 & 0xffff);
}

// Nearly all of the time goes here; its arrays are its own, so that no sanitizer need look.
__attribute__((optimize("O3"), no_sanitize("address")))
void add_product(float (*sums)[COLUMNS_MAX], const float (&a)[ROWS][DEPTH],
                 const float (*b)[COLUMNS_MAX], unsigned columns) {
    for (unsigned row = 0; row < ROWS; ++row)
        for (unsigned k = 0; k < DEPTH; ++k)
            for (unsigned n = 0; n < columns; ++n) sums[row][n] += a[row][k] * b[k][n];
}

struct Operands {
    float a[ROWS][DEPTH], b[DEPTH][COLUMNS_MAX];
};

// Rows 16 w and on of a product, with what lies in its operands now.
void execute(Warp& warp, const Pending& p, unsigned w) {
    static thread_local const auto operands = std::make_unique<Operands>();
    auto& [a, b] = *operands;
    const unsigned columns = static_cast<unsigned>(p.product.registers) * 2;
    Sums& sums = warp.sums[p.sums];
    if (p.product.a != nullptr) {
        read_registers(p, a);
    } else {
        read_along_k(p, p.product.a_descriptor, w * ROWS, ROWS, a[0], DEPTH, 1);
    }
    if (p.product.b_transposed) {
        read_along_n(p, columns, b);
    } else {
        read_along_k(p, p.product.b_descriptor, 0, columns, b[0], 1, COLUMNS_MAX);
    }
    if (!p.product.accumulate) std::memset(sums.values, 0, sizeof sums.values);
    add_product(sums.values, a, b, columns);
    --sums.uses;
}

// ---- what a warp does -----------------------------------------------------------------------

Warp& warp_of(unsigned thread) { return state().warps[thread / LANES]; }

void check_alike(const Wgmma& one, const Wgmma& other, const char* whom) {
    if (one.registers != other.registers || (one.a == nullptr) != (other.a == nullptr) ||
        one.a_descriptor != other.a_descriptor || one.b_descriptor != other.b_descriptor ||
        one.b_transposed != other.b_transposed || one.accumulate != other.accumulate)
        fail("%s begin different products", whom);
}

// The accumulators that start at the lanes' registers, taken from there where they are new.
size_t take_sums(Warp& warp, void* const (&all)[LANES]) {
    const auto& first = *static_cast<Wgmma*>(all[0]);
    for (size_t i = 0; i < warp.sums.size(); ++i)
        if (warp.sums[i].uses > 0 && warp.sums[i].d[0] == first.d) return i;
    size_t at = 0;
    while (at < warp.sums.size() && warp.sums[at].uses > 0) ++at;
    if (at == warp.sums.size()) warp.sums.emplace_back();
    Sums& sums = warp.sums[at];
    sums.registers = first.registers;
    sums.uses = 0;
    for (unsigned lane = 0; lane < LANES; ++lane) {
        sums.d[lane] = static_cast<Wgmma*>(all[lane])->d;
        for (unsigned i = 0; i < static_cast<unsigned>(first.registers); ++i) {
            sums.values[row_of(lane, i)][column_of(lane, i)] = sums.d[lane][i];
            sums.d[lane][i] = bits_to_float(0x7fffffffu);
        }
    }
    return at;
}

void give_sums(const Sums& sums) {
    for (unsigned lane = 0; lane < LANES; ++lane)
        for (unsigned i = 0; i < static_cast<unsigned>(sums.registers); ++i)
            sums.d[lane][i] = sums.values[row_of(lane, i)][column_of(lane, i)];
}

void begin(void* const (&all)[LANES], uint32_t) {
    const unsigned thread = self().thread.x;
    State& s = state();
    Warp& warp = warp_of(thread);
    const auto& first = *static_cast<Wgmma*>(all[0]);
    if (!warp.fenced) fail("wgmma without a wgmma.fence since the last wait");
    auto& begun = s.begun[thread / LANES / WARPS];
    if (warp.products == begun.size()) begun.push_back(first);
    check_alike(begun[warp.products++], first, "warps of a warpgroup");
    Pending p{first, {}, take_sums(warp, all), UINT64_MAX, warp.group};
    ++warp.sums[p.sums].uses;
    for (unsigned lane = 0; lane < LANES; ++lane) {
        const auto& mine = *static_cast<Wgmma*>(all[lane]);
        check_alike(first, mine, "lanes of a warp");
        p.a[lane] = mine.a;
        p.fenced = std::min(p.fenced, s.fenced[thread / LANES * LANES + lane]);
    }
    warp.begun.push_back(p);
}

void finish(unsigned pending) {
    const unsigned thread = self().thread.x;
    Warp& warp = warp_of(thread);
    size_t done = 0;
    while (done < warp.begun.size() && warp.begun[done].group + pending < warp.group) {
        const Pending& p = warp.begun[done++];
        execute(warp, p, thread / LANES % WARPS);
        if (warp.sums[p.sums].uses == 0) give_sums(warp.sums[p.sums]);
    }
    warp.begun.erase(warp.begun.begin(), warp.begun.begin() + static_cast<std::ptrdiff_t>(done));
    warp.fenced = false;
    order_lanes(0xffffffffu);
}

constexpr uint32_t ALL = 0xffffffffu;

}  // namespace

void wgmma(Wgmma mine) { meet("wgmma", ALL, &mine, begin); }

void wgmma_fence() {
    meet("wgmma.fence", ALL, nullptr,
         [](void* const(&)[LANES], uint32_t) { warp_of(self().thread.x).fenced = true; });
}

void wgmma_commit() {
    meet("wgmma.commit_group", ALL, nullptr,
         [](void* const(&)[LANES], uint32_t) { ++warp_of(self().thread.x).group; });
}

void wgmma_wait(int pending) {
    meet("wgmma.wait_group", ALL, &pending, [](void* const(&all)[LANES], uint32_t) {
        finish(static_cast<unsigned>(*static_cast<int*>(all[0])));
    });
}

void fence_async_proxy() {
    State& s = state();
    s.fenced[self().thread.x] = ++s.now;
}

namespace {

struct Registers {
    unsigned warp, count;
};

// Takes what a warp lacks, for whichever of its lanes asks first.
bool take_registers(const void* what) {
    const auto& wanted = *static_cast<const Registers*>(what);
    State& s = state();
    unsigned& has = s.registers[wanted.warp];
    const unsigned more = (wanted.count - has) * LANES;
    if (more > s.free_registers) return false;
    s.free_registers -= more;
    has = wanted.count;
    return true;
}

}  // namespace

void setmaxnreg(unsigned count, bool grow) {
    meet_group(grow ? "setmaxnreg.inc" : "setmaxnreg.dec", &count, [](void* const(&all)[128]) {
        for (const void* one : all)
            if (*static_cast<const unsigned*>(one) != *static_cast<const unsigned*>(all[0]))
                fail("warps of a warpgroup want different numbers of registers");
    });
    State& s = state();
    const Registers wanted{self().thread.x / LANES, count};
    unsigned& has = s.registers[wanted.warp];
    if (grow ? count < has : count > has)
        fail("setmaxnreg from %u registers to %u, the wrong way", has, count);
    if (grow) return wait_until("setmaxnreg", take_registers, &wanted);
    s.free_registers += (has - count) * LANES;
    has = count;
}

uint32_t shared_address(const void* p) {
    const auto* start = static_cast<const unsigned char*>(shared(0));
    return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - start);
}

namespace {

void note(const void* to, unsigned bytes, unsigned thread) {
    State& s = state();
    ++s.now;
    for (unsigned i = 0; i < bytes; i += 16)
        s.landings[(shared_address(to) + i) / 16] = {s.now, thread};
}

}  // namespace

void note_landing(const Copy& copy, unsigned thread) { note(copy.to, copy.bytes, thread); }

void note_operand(const void* to, unsigned bytes) { note(to, bytes, self().thread.x); }

}  // namespace simt
