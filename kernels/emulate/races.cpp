// The clocks, the memory of accesses, and the calls that the compiler puts before each access.
#ifdef LOCKSTEP_RACES
#include "races.h"

#include "simt.h"

namespace races {
namespace {

constexpr unsigned LANES = 32;
constexpr uint16_t NOBODY = 0xffff;

// What a thread knows of the others: the last clock of each lane of its warp, and of each warp.
struct Known {
    uint32_t clock;
    uint32_t lanes[LANES];
    uint32_t warps[LANES];
};

// Who touched a byte last, and when.
struct Access {
    uint32_t clock;
    uint16_t thread;
};

struct Byte {
    Access write;
    // The last read of each of two threads of different warps, if there were two.
    Access reads[2];
};

struct State {
    std::vector<Known> threads;
    std::vector<Byte> bytes;
    uintptr_t start = 0;
};
thread_local State state;

bool ordered(unsigned now, const Access& before) {
    if (before.thread == NOBODY || before.thread == now) return true;
    const Known& known = state.threads[now];
    if (before.thread / LANES == now / LANES)
        return known.lanes[before.thread % LANES] >= before.clock;
    return known.warps[before.thread / LANES] >= before.clock;
}

void raise(uint32_t& to, uint32_t from) {
    if (to < from) to = from;
}

}  // namespace

void begin(unsigned threads, const void* shared, size_t bytes) {
    state.threads.assign(threads, {});
    for (Known& known : state.threads) known.clock = 1;
    const Access none{0, NOBODY};
    state.bytes.assign(bytes, {none, {none, none}});
    state.start = reinterpret_cast<uintptr_t>(shared);
}

void join(const std::vector<unsigned>& threads) {
    Known all{};
    uint32_t lanes[LANES][LANES] = {};
    for (unsigned t : threads) {
        const Known& known = state.threads[t];
        raise(all.clock, known.clock);
        for (unsigned i = 0; i < LANES; ++i) raise(all.warps[i], known.warps[i]);
        for (unsigned i = 0; i < LANES; ++i) raise(lanes[t / LANES][i], known.lanes[i]);
        raise(lanes[t / LANES][t % LANES], known.clock);
        raise(all.warps[t / LANES], known.clock);
    }
    for (unsigned t : threads) {
        Known& known = state.threads[t];
        known.clock = all.clock + 1;
        for (unsigned i = 0; i < LANES; ++i) known.lanes[i] = lanes[t / LANES][i];
        for (unsigned i = 0; i < LANES; ++i) raise(known.warps[i], all.warps[i]);
    }
}

void release(unsigned thread, Clock& clock) {
    Known& known = state.threads[thread];
    clock.resize(LANES);
    for (unsigned i = 0; i < LANES; ++i) raise(clock[i], known.warps[i]);
    raise(clock[thread / LANES], known.clock);
    ++known.clock;
}

void acquire(unsigned thread, const Clock& clock) {
    Known& known = state.threads[thread];
    for (unsigned i = 0; i < clock.size(); ++i) raise(known.warps[i], clock[i]);
    // Who waited for a lane of its own warp knows it too.
    if (!clock.empty())
        for (uint32_t& lane : known.lanes) raise(lane, clock[thread / LANES]);
}

void touch(const void* at, size_t count, bool write) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(at) - state.start;
    if (first >= state.bytes.size()) return;
    const unsigned now = simt::self().thread.x;
    const Access mine{state.threads[now].clock, static_cast<uint16_t>(now)};
    for (size_t i = first; i < first + count && i < state.bytes.size(); ++i) {
        Byte& byte = state.bytes[i];
        const auto report = [&](const Access& other, const char* what) {
            simt::fail("race on byte %zu of shared memory: %s here, %s by thread %u, nothing "
                       "between",
                       i, write ? "written" : "read", what, other.thread);
        };
        if (!ordered(now, byte.write)) report(byte.write, "written");
        if (write) {
            for (const Access& read : byte.reads)
                if (!ordered(now, read)) report(read, "read");
            byte.write = mine;
            continue;
        }
        // An unordered read is kept: a later write must follow it too.
        Access& kept = ordered(now, byte.reads[0]) ? byte.reads[0] : byte.reads[1];
        kept = mine;
    }
}

}  // namespace races

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(bytes)                                                                      \
    void __tsan_read##bytes(void* at) { races::touch(at, bytes, false); }                  \
    void __tsan_write##bytes(void* at) { races::touch(at, bytes, true); }                  \
    void __tsan_unaligned_read##bytes(void* at) { races::touch(at, bytes, false); }        \
    void __tsan_unaligned_write##bytes(void* at) { races::touch(at, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
void __tsan_read_range(void* at, unsigned long bytes) { races::touch(at, bytes, false); }
void __tsan_write_range(void* at, unsigned long bytes) { races::touch(at, bytes, true); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
#endif
