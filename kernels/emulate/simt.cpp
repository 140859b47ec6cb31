// The scheduler of the emulation: which thread of a block runs, and what the others wait for.
#include "simt.h"

#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace simt {

__thread Block* block = nullptr;
__thread const Thread* running = nullptr;

namespace {

void wake(unsigned thread) { block->runnable.push(thread); }

// The next thread to run: in turn, backwards, or drawn.
unsigned take_runnable() {
    if (block->schedule == 0) return block->runnable.take_first();
    if (block->schedule == 1) return block->runnable.take_last();
    block->random ^= block->random << 13;
    block->random ^= block->random >> 7;
    block->random ^= block->random << 17;
    return block->runnable.take_any(block->random);
}

// Makes a thread that may run the running one.
Fiber& take_turn() {
    block->current = take_runnable();
    Fiber& fiber = current();
    running = &fiber.index;
    return fiber;
}

// Threads that poll are asked when nobody else may run, and now and then.
constexpr unsigned TURNS_A_POLL = 64;

// Leaves off here, for the next thread; where there is none, or threads must be asked whether they
// may go on, for the launch.
inline void leave(Fiber& fiber) {
    const bool polls = !block->polling.empty() && ++block->turns % TURNS_A_POLL == 0;
    const bool next = !block->runnable.empty() && !polls;
    Stack::change(fiber.stack, next ? take_turn().stack : block->launch);
}

// Lets others run until somebody wakes this thread.
inline void sleep(const char* what) {
    Fiber& fiber = current();
    fiber.waits = what;
    leave(fiber);
    fiber.waits = nullptr;
}

// What becomes of copies whose thread has ended is nowhere said.
void check_landed() {
    size_t waiting = current().copies.size();
    for (const auto& group : current().groups) waiting += group.size();
    if (waiting + copies_to_arrive(block->current) > 0) fail("ends before its copies have landed");
}

void fiber_main() {
    block->kernel->run(block->args);
    check_landed();
    current().ended = true;
    --block->live;
    leave(current());
    abort();
}

void describe_deadlock() {
    for (const Fiber& fiber : block->fibers) {
        if (fiber.ended) continue;
        const Thread& t = fiber.index;
        std::snprintf(block->error, sizeof block->error,
                      "deadlock: thread %u of block (%u, %u, %u) waits in %s; %u threads wait, "
                      "%zu have ended",
                      t.thread.x, t.block.x, t.block.y, t.block.z,
                      fiber.waits ? fiber.waits : "nothing", block->live,
                      block->fibers.size() - block->live);
        return;
    }
}

void wake_polling() {
    std::vector<unsigned> still;
    for (unsigned thread : block->polling) {
        Fiber& fiber = block->fibers[thread];
        if (fiber.ready(fiber.ready_for)) {
            wake(thread);
        } else {
            still.push_back(thread);
        }
    }
    block->polling.swap(still);
}

// Whoever arrived at a named barrier did so for somebody who waits there.
bool all_called_came() {
    for (int id = 0; id < 16; ++id) {
        if (block->barriers[id].arrived == 0) continue;
        const Index& index = block->fibers[0].index.block;
        std::snprintf(block->error, sizeof block->error,
                      "block (%u, %u, %u): %u threads arrived at barrier %d, at which nobody "
                      "waited",
                      index.x, index.y, index.z, block->barriers[id].arrived, id);
        return false;
    }
    return true;
}

// The block's memory ends with it.
bool all_copies_landed() {
    const size_t left = bulk_copies_to_land();
    if (left == 0) return true;
    const Index& index = block->fibers[0].index.block;
    std::snprintf(block->error, sizeof block->error,
                  "block (%u, %u, %u) ends before %zu bulk copies have landed", index.x, index.y,
                  index.z, left);
    return false;
}

void at_barrier(int id, unsigned threads, const char* what, bool waits) {
    Barrier& barrier = block->barriers[id];
    if (waits) {
        barrier.waiting.push_back(block->current);
    } else {
        ++barrier.arrived;
        races::release(block->current, barrier.clock);
    }
    if (barrier.waiting.size() + barrier.arrived < threads) {
        if (waits) sleep(what);
        return;
    }
    Barrier done;
    std::swap(done, barrier);
    races::join(done.waiting);
    for (unsigned thread : done.waiting) {
        races::acquire(thread, done.clock);
        if (thread != block->current) wake(thread);
    }
}

void check_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % 32 != 0) fail("barrier %d of %d threads", id, threads);
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

void start_block(const Index& at, const Index& grid, unsigned threads) {
    block->fibers.resize(threads);
    block->live = threads;
    ++block->serial;
    block->runnable.clear();
    block->polling.clear();
    block->warps.assign((threads + 31) / 32, {});
    block->groups.assign((threads + 127) / 128, {});
    for (Barrier& barrier : block->barriers) barrier = {};
    block->has_waited = false;
    block->held.clear();
    block->random = 0x9e3779b97f4a7c15ull * (block->schedule + 1);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = block->fibers[t];
        fiber.index = {{t, 0, 0}, at, {threads, 1, 1}, grid};
        fiber.stack.prepare(&fiber_main);
        fiber.ended = false;
        fiber.waits = nullptr;
        fiber.copies.clear();
        fiber.groups.clear();
        wake(t);
    }
    races::begin(threads, block->shared, block->shared_bytes);
}

bool run_block() {
    while (block->live > 0 && !block->failed) {
        if (!block->polling.empty()) wake_polling();
        if (block->runnable.empty() && !block->is_behind) {
            hold_begun_copies();
            block->comes_to_wait(block->waiter);
            block->is_behind = true;
            continue;
        }
        if (block->runnable.empty()) {
            describe_deadlock();
            return false;
        }
        Stack::change(block->launch, take_turn().stack);
    }
    return !block->failed && all_called_came() && all_copies_landed();
}

void fail(const char* format, ...) {
    const Thread& t = self();
    const int used =
        std::snprintf(block->error, sizeof block->error, "thread %u of block (%u, %u, %u): ",
                      t.thread.x, t.block.x, t.block.y, t.block.z);
    va_list args;
    va_start(args, format);
    std::vsnprintf(block->error + used, sizeof block->error - static_cast<size_t>(used), format,
                   args);
    va_end(args);
    block->failed = true;
    Stack::change(current().stack, block->launch);
    abort();
}

size_t shared_bytes() { return block->shared_bytes; }
uint32_t schedule() { return block->schedule; }
uint64_t block_serial() { return block->serial; }

void* shared(size_t least) {
    if (least > block->shared_bytes)
        fail("%zu bytes of shared memory given, %zu used", block->shared_bytes, least);
    return block->shared;
}

void block_barrier(const char* what) {
    at_barrier(0, static_cast<unsigned>(block->fibers.size()), what, true);
}

void named_barrier(int id, int threads) {
    check_barrier(id, threads);
    at_barrier(id, static_cast<unsigned>(threads), "a named barrier", true);
}

void named_barrier_arrive(int id, int threads) {
    check_barrier(id, threads);
    at_barrier(id, static_cast<unsigned>(threads), "a named barrier", false);
}

void meet(const char* what, uint32_t mask, void* mine, Finish finish) {
    const unsigned thread = self().thread.x, lane = thread % 32;
    if (!(mask >> lane & 1)) fail("lane %u is not in the mask %08x of %s", lane, mask, what);
    auto& meetings = block->warps[thread / 32];
    size_t at = 0;
    while (at < meetings.size() && !(meetings[at].mask & mask)) ++at;
    if (at == meetings.size()) meetings.push_back({what, mask, 0, {}});
    Meeting& meeting = meetings[at];
    if (meeting.mask != mask || !same(meeting.what, what))
        fail("lanes diverge: %s with mask %08x, others %s with %08x", what, mask, meeting.what,
             meeting.mask);
    meeting.mine[lane] = mine;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived != mask) return sleep(what);
    finish(meeting.mine, mask);
    meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(at));
    for (unsigned other = 0; other < 32; ++other)
        if (other != lane && (mask >> other & 1)) wake(thread / 32 * 32 + other);
}

void order_lanes(uint32_t mask) {
    std::vector<unsigned> threads;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) threads.push_back(self().thread.x / 32 * 32 + lane);
    races::join(threads);
}

void meet_group(const char* what, void* mine, void (*finish)(void* const (&all)[128])) {
    const unsigned thread = self().thread.x, group = thread / 128;
    GroupMeeting& meeting = block->groups[group];
    if (meeting.arrived == 0) meeting.what = what;
    if (!same(meeting.what, what)) fail("warps diverge: %s, others %s", what, meeting.what);
    meeting.mine[thread % 128] = mine;
    if (++meeting.arrived < 128) return sleep(what);
    meeting.arrived = 0;
    finish(meeting.mine);
    for (unsigned other = group * 128; other < (group + 1) * 128; ++other)
        if (other != thread) wake(other);
}

void wait_prerequisites() {
    const auto is_behind = [](const void* of) { return static_cast<const Block*>(of)->is_behind; };
    wait_until("griddepcontrol.wait", is_behind, block);
    block->has_waited = true;
}

void wait_until(const char* name, bool (*ready)(const void*), const void* what) {
    if (ready(what)) return;
    current().ready = ready;
    current().ready_for = what;
    block->polling.push_back(block->current);
    sleep(name);
}

}  // namespace simt
