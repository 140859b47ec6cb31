// The running block, as the parts of the emulation know it; kernels see `simt.h` alone.
#pragma once

#include <deque>
#include <vector>

#include "races.h"
#include "simt.h"
#include "stack.h"

namespace simt {

struct Fiber {
    Thread index;
    Stack stack;
    bool ended = false;
    // What it waits for; null while it runs or is about to.
    const char* waits = nullptr;
    bool (*ready)(const void*) = nullptr;
    const void* ready_for = nullptr;
    // Begun and not committed, and the groups that are.
    std::vector<Copy> copies;
    std::vector<std::vector<Copy>> groups;
};

// Lanes that meet.
struct Meeting {
    const char* what;
    uint32_t mask;
    uint32_t arrived;
    void* mine[32];
};

struct GroupMeeting {
    const char* what = nullptr;
    unsigned arrived = 0;
    void* mine[128];
};

struct Barrier {
    std::vector<unsigned> waiting;
    // Threads that came without waiting, and what they knew.
    unsigned arrived = 0;
    races::Clock clock;
};

// Threads that may run, none of them twice, in the order in which they were woken.
class Queue {
public:
    static constexpr unsigned CAPACITY = 1024;

    bool empty() const { return first == end; }
    void clear() { first = end = 0; }
    void push(unsigned thread) { places[end++ % CAPACITY] = static_cast<uint16_t>(thread); }
    unsigned take_first() { return places[first++ % CAPACITY]; }
    unsigned take_last() { return places[--end % CAPACITY]; }
    // Any of them, as `random` says; the last takes its place.
    unsigned take_any(uint64_t random) {
        uint16_t& place = places[(first + random % (end - first)) % CAPACITY];
        const unsigned thread = place;
        place = places[--end % CAPACITY];
        return thread;
    }

private:
    uint16_t places[CAPACITY];
    // Counted up, never wrapped: a block switches fewer than 2^64 times.
    uint64_t first = 0, end = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    // Where the launch itself left off.
    Stack launch;
    Queue runnable;
    std::vector<std::vector<Meeting>> warps;
    std::vector<GroupMeeting> groups;
    Barrier barriers[16];
    // Threads in a wait that nobody wakes: asked again after others ran.
    std::vector<unsigned> polling;
    // Switches while there were such.
    unsigned turns = 0;
    void* shared = nullptr;
    size_t shared_bytes = 0;
    unsigned live = 0;
    unsigned current = 0;
    bool failed = false;
    const Kernel* kernel = nullptr;
    const void* args = nullptr;
    uint32_t schedule = 0;
    uint64_t serial = 0;
    uint64_t random = 0;
    // Launches before are done. Where they are not, the block comes to `comes_to_wait` once no
    // thread can go on without them.
    bool is_behind = true;
    void (*comes_to_wait)(void*) = nullptr;
    void* waiter = nullptr;
    // Whether a thread waited for the launches before.
    bool has_waited = false;
    // Bytes of copies that were begun before.
    std::deque<std::vector<unsigned char>> held;
    char error[512];
};

// What runs on this thread of the host.
extern __thread Block* block;

// Threads of a block at most.
constexpr unsigned THREADS_MAX = Queue::CAPACITY;

// Gives every thread of the kernel a fiber at its start.
void start_block(const Index& at, const Index& grid, unsigned threads);
// Runs them to their end; false where that failed, which block->error tells.
bool run_block();

inline Fiber& current() { return block->fibers[block->current]; }

}  // namespace simt
