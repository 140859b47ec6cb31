// Barriers in shared memory, and the copies that are on their way to them.
#include "simt.h"

#include "races.h"

#include <map>
#include <vector>

namespace simt {
namespace {

// At a barrier, behind copies.
struct Arrival {
    uint64_t* barrier;
    std::vector<Copy> copies;
};

// What a barrier knows of bulk copies.
struct Transactions {
    uint64_t expected = 0;  // bytes that the phase still wants
    uint64_t promised = 0;  // of these, the bytes of copies that have not begun
    std::vector<Copy> begun;
};

struct State {
    uint64_t block = 0;
    std::vector<std::vector<Arrival>> arrivals;  // by thread, in order
    std::map<const uint64_t*, size_t> coming;    // how many of them, by barrier
    std::map<const uint64_t*, Transactions> transactions;
    std::map<const uint64_t*, races::Clock> clocks;
    uint64_t random = 0x2545f4914f6cdd1dull;
};
thread_local State kept;

State& state() {
    if (kept.block == block_serial()) return kept;
    kept.block = block_serial();
    kept.arrivals.assign(self().block_size.x, {});
    kept.coming.clear();
    kept.transactions.clear();
    kept.clocks.clear();
    return kept;
}

// The eight bytes: 20 bits of arrivals in a phase, 20 of those that this one still wants, its
// parity, and a mark that tells a barrier from something else.
struct Phase {
    uint32_t arrivals, wanted, parity;
};
constexpr uint64_t MARK = 0xb5a1ull << 48;
constexpr uint32_t ARRIVALS_MAX = (1u << 20) - 1;

bool is_barrier(uint64_t bits) { return bits >> 48 == MARK >> 48; }

Phase unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits & ARRIVALS_MAX),
            static_cast<uint32_t>(bits >> 20 & ARRIVALS_MAX),
            static_cast<uint32_t>(bits >> 40 & 1)};
}

uint64_t pack(const Phase& p) {
    return MARK | p.arrivals | static_cast<uint64_t>(p.wanted) << 20 |
           static_cast<uint64_t>(p.parity) << 40;
}

void check_barrier(const uint64_t* barrier) {
    aligned(barrier, 8);
    if (!is_barrier(*barrier)) fail("an mbarrier that nobody has initialised");
}

// Ends the phase where neither arrivals nor bytes are missing.
void settle(uint64_t* barrier) {
    const Phase phase = unpack(*barrier);
    if (phase.wanted == 0 && state().transactions[barrier].expected == 0)
        *barrier = pack({phase.arrivals, phase.arrivals, phase.parity ^ 1});
}

void arrive(uint64_t* barrier) {
    Phase phase = unpack(*barrier);
    // Past the last one while bytes are missing: the count is below zero, and the phase never ends.
    phase.wanted = (phase.wanted - 1) & ARRIVALS_MAX;
    *barrier = pack(phase);
    settle(barrier);
}

void land_bulk(uint64_t* barrier) {
    Transactions& transactions = state().transactions[barrier];
    if (transactions.begun.empty()) return;
    for (const Copy& copy : transactions.begun) {
        copy_now(copy);
        transactions.expected -= copy.bytes;
    }
    transactions.begun.clear();
    settle(barrier);
}

// The first `count` arrivals that a thread has on their way.
void land(unsigned thread, size_t count) {
    auto& arrivals = state().arrivals[thread];
    for (size_t i = 0; i < count; ++i) {
        for (const Copy& copy : arrivals[i].copies) {
            copy_now(copy);
            note_landing(copy, thread);
        }
        arrive(arrivals[i].barrier);
        --state().coming[arrivals[i].barrier];
    }
    arrivals.erase(arrivals.begin(), arrivals.begin() + static_cast<std::ptrdiff_t>(count));
}

// An arrival is behind all copies that its thread began before, and so behind its earlier ones.
void land_up_to(uint64_t* barrier) {
    State& s = state();
    land_bulk(barrier);
    if (s.coming[barrier] == 0) return;
    for (unsigned thread = 0; thread < s.arrivals.size(); ++thread) {
        const auto& arrivals = s.arrivals[thread];
        size_t count = arrivals.size();
        while (count > 0 && arrivals[count - 1].barrier != barrier) --count;
        if (count > 0) land(thread, count);
    }
}

struct Wait {
    uint64_t* barrier;
    uint32_t parity;
};

// Whether the phase is over, once all that is on its way to the barrier has come.
bool is_over(const void* what) {
    const auto& wait = *static_cast<const Wait*>(what);
    if (unpack(*wait.barrier).parity != wait.parity) return true;
    land_up_to(wait.barrier);
    return unpack(*wait.barrier).parity != wait.parity;
}

bool lands_at_once(State& s) {
    if (schedule() < 2) return schedule() == 1;
    s.random ^= s.random << 13;
    s.random ^= s.random >> 7;
    s.random ^= s.random << 17;
    return s.random >> 40 & 1;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals) {
    aligned(barrier, 8);
    if (arrivals < 1 || arrivals > static_cast<int>(ARRIVALS_MAX))
        fail("an mbarrier of %d arrivals", arrivals);
    if (is_barrier(*barrier)) fail("an mbarrier that is initialised twice");
    const auto count = static_cast<uint32_t>(arrivals);
    *barrier = pack({count, count, 0});
}

void mbarrier_arrive(uint64_t* barrier) {
    check_barrier(barrier);
    races::release(self().thread.x, state().clocks[barrier]);
    arrive(barrier);
}

void mbarrier_arrive_copies(uint64_t* barrier) {
    check_barrier(barrier);
    State& s = state();
    races::release(self().thread.x, s.clocks[barrier]);
    const unsigned thread = self().thread.x;
    auto& arrivals = s.arrivals[thread];
    arrivals.push_back({barrier, cp_async_take()});
    ++s.coming[barrier];
    if (lands_at_once(s)) land(thread, arrivals.size());
}

void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
    check_barrier(barrier);
    Transactions& transactions = state().transactions[barrier];
    transactions.expected += bytes;
    transactions.promised += bytes;
    races::release(self().thread.x, state().clocks[barrier]);
    arrive(barrier);
}

void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
    check_barrier(barrier);
    aligned(to, 16);
    aligned(from, 16);
    if (bytes == 0 || bytes % 16 != 0) fail("a bulk copy of %u bytes", bytes);
    if (static_cast<uint64_t>(shared_address(to)) + bytes > shared_bytes())
        fail("bulk copy outside shared memory");
    State& s = state();
    Transactions& transactions = s.transactions[barrier];
    if (transactions.promised < bytes)
        fail("a bulk copy of %u bytes at an mbarrier that expects %llu more", bytes,
             static_cast<unsigned long long>(transactions.promised));
    transactions.promised -= bytes;
    // It may land from now on, and who waits for the barrier sees it.
    races::touch(to, bytes, true);
    races::release(self().thread.x, s.clocks[barrier]);
    transactions.begun.push_back({to, from, bytes, true});
    if (lands_at_once(s)) land_bulk(barrier);
}

void hold_begun_arrivals() {
    if (kept.block != block_serial()) return;
    for (auto& arrivals : kept.arrivals)
        for (Arrival& arrival : arrivals)
            for (Copy& copy : arrival.copies) hold(copy);
    for (auto& [barrier, transactions] : kept.transactions)
        for (Copy& copy : transactions.begun) hold(copy);
}

size_t copies_to_arrive(unsigned thread) {
    size_t found = 0;
    if (kept.block != block_serial()) return found;
    for (const Arrival& arrival : kept.arrivals[thread]) found += arrival.copies.size();
    return found;
}

size_t bulk_copies_to_land() {
    size_t found = 0;
    if (kept.block != block_serial()) return found;
    for (const auto& [barrier, transactions] : kept.transactions)
        found += transactions.begun.size();
    return found;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    check_barrier(barrier);
    const Wait wait{barrier, parity};
    wait_until("an mbarrier", is_over, &wait);
    races::acquire(self().thread.x, state().clocks[barrier]);
}

}  // namespace simt
