// The scheduler of the emulation: fibers, what they wait for, and the C interface.
#include "simt.h"

#include "races.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__x86_64__)
// Saves what a call must preserve, stores the stack in *from and goes on where `to` was stored.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
    .text
    .globl simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, .-simt_switch
)");
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned THREADS_MAX = 1024;
constexpr size_t SHARED_MAX = 227 << 10;

struct Fiber {
    Thread index;
    std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
    void* at = nullptr;
#else
    ucontext_t at;
#endif
    bool ended = false;
    // What it waits for; null while it runs or is about to.
    const char* waits = nullptr;
    bool (*ready)(const void*) = nullptr;
    const void* ready_for = nullptr;
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
    const char* what = nullptr;
    std::vector<unsigned> waiting;
    // Threads that came without waiting, and what they knew.
    unsigned arrived = 0;
    races::Clock clock;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned> runnable;
    std::vector<std::vector<Meeting>> warps;
    std::vector<GroupMeeting> groups;
    Barrier barriers[16];
    // Threads in a wait that nobody wakes: asked again after others ran.
    std::vector<unsigned> polling;
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
    char error[512];
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

// What runs on this thread of the host. A bare pointer, which no access has to initialise first.
thread_local Block* block = nullptr;
const Kernel* kernels = nullptr;

Fiber& current() { return block->fibers[block->current]; }

#if defined(__x86_64__)
void to_scheduler() { simt_switch(&current().at, block->scheduler); }
void to_fiber(Fiber& fiber) { simt_switch(&block->scheduler, fiber.at); }
#else
void to_scheduler() { swapcontext(&current().at, &block->scheduler); }
void to_fiber(Fiber& fiber) { swapcontext(&block->scheduler, &fiber.at); }
#endif

// Lets others run until somebody wakes this thread.
void sleep(const char* what) {
    current().waits = what;
    to_scheduler();
    current().waits = nullptr;
}

void wake(unsigned thread) { block->runnable.push_back(thread); }

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
    to_scheduler();
    abort();
}

void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) fiber.stack.reset(new char[STACK_BYTES]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.get(), STACK_BYTES);
#endif
    fiber.ended = false;
    fiber.waits = nullptr;
    fiber.ready = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
#if defined(__x86_64__)
    // As if simt_switch had been called at the start of fiber_main: six registers and the address.
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get()) + STACK_BYTES;
    auto** at = reinterpret_cast<void**>(top / 16 * 16 - 8);
    *--at = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    fiber.at = at;
#else
    getcontext(&fiber.at);
    fiber.at.uc_stack.ss_sp = fiber.stack.get();
    fiber.at.uc_stack.ss_size = STACK_BYTES;
    fiber.at.uc_link = nullptr;
    makecontext(&fiber.at, &fiber_main, 0);
#endif
}

// The next thread to run: in turn, backwards, or drawn.
unsigned take_runnable() {
    auto& r = block->runnable;
    size_t at = 0;
    if (block->schedule == 1) at = r.size() - 1;
    if (block->schedule > 1) {
        block->random ^= block->random << 13;
        block->random ^= block->random >> 7;
        block->random ^= block->random << 17;
        at = block->random % r.size();
    }
    const unsigned thread = r[at];
    r.erase(r.begin() + static_cast<std::ptrdiff_t>(at));
    return thread;
}

void describe_deadlock() {
    for (const Fiber& fiber : block->fibers) {
        if (fiber.ended) continue;
        const size_t ended = block->fibers.size() - block->live;
        std::snprintf(block->error, sizeof block->error,
                      "deadlock: thread %u of block (%u, %u, %u) waits in %s; %u threads wait, %zu have ended",
                      fiber.index.thread.x, fiber.index.block.x, fiber.index.block.y, fiber.index.block.z,
                      fiber.waits ? fiber.waits : "nothing", block->live, ended);
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
                      "block (%u, %u, %u): %u threads arrived at barrier %d, at which nobody waited", index.x,
                      index.y, index.z, block->barriers[id].arrived, id);
        return false;
    }
    return true;
}

bool run_block() {
    while (block->live > 0 && !block->failed) {
        if (!block->polling.empty()) wake_polling();
        if (block->runnable.empty()) {
            describe_deadlock();
            return false;
        }
        block->current = take_runnable();
        to_fiber(current());
    }
    return !block->failed && all_called_came();
}

void start_block(const Thread& index, unsigned threads) {
    block->fibers.resize(threads);
    block->live = threads;
    ++block->serial;
    block->runnable.clear();
    block->polling.clear();
    block->warps.assign((threads + 31) / 32, {});
    block->groups.assign((threads + 127) / 128, {});
    for (Barrier& barrier : block->barriers) barrier = {};
    block->random = 0x9e3779b97f4a7c15ull * (block->schedule + 1);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = block->fibers[t];
        fiber.index = index;
        fiber.index.thread = {t, 0, 0};
        prepare(fiber);
        wake(t);
    }
    races::begin(threads, block->shared, block->shared_bytes);
}

void land(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        races::touch(copy.to, copy.bytes, true);
        copy_now(copy);
        note_landing(copy, block->current);
    }
    copies.clear();
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

}  // namespace

Kernel::Kernel(const char* name, size_t args_size, unsigned threads, void (*run)(const void*))
    : name(name), args_size(args_size), threads(threads), run(run), next(kernels) {
    kernels = this;
}

const Thread& self() { return current().index; }

void fail(const char* format, ...) {
    const Thread& t = self();
    const int used = std::snprintf(block->error, sizeof block->error, "thread %u of block (%u, %u, %u): ", t.thread.x,
                                   t.block.x, t.block.y, t.block.z);
    va_list args;
    va_start(args, format);
    std::vsnprintf(block->error + used, sizeof block->error - static_cast<size_t>(used), format, args);
    va_end(args);
    block->failed = true;
    to_scheduler();
    abort();
}

void* shared(size_t least) {
    if (least > block->shared_bytes) fail("%zu bytes of shared memory given, %zu used", block->shared_bytes, least);
    return block->shared;
}

void block_barrier(const char* what) { at_barrier(0, static_cast<unsigned>(block->fibers.size()), what, true); }

namespace {
void check_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % 32 != 0) fail("barrier %d of %d threads", id, threads);
}
}  // namespace

void named_barrier(int id, int threads) {
    check_barrier(id, threads);
    at_barrier(id, static_cast<unsigned>(threads), "a named barrier", true);
}

void named_barrier_arrive(int id, int threads) {
    check_barrier(id, threads);
    at_barrier(id, static_cast<unsigned>(threads), "a named barrier", false);
}

size_t shared_bytes() { return block->shared_bytes; }
uint32_t schedule() { return block->schedule; }
uint64_t block_serial() { return block->serial; }

void meet(const char* what, uint32_t mask, void* mine, void (*finish)(void* const (&all)[32], uint32_t mask)) {
    const unsigned thread = self().thread.x, lane = thread % 32;
    if (!(mask >> lane & 1)) fail("lane %u is not in the mask %08x of %s", lane, mask, what);
    auto& meetings = block->warps[thread / 32];
    size_t at = 0;
    while (at < meetings.size() && !(meetings[at].mask & mask)) ++at;
    if (at == meetings.size()) meetings.push_back({what, mask, 0, {}});
    Meeting& meeting = meetings[at];
    if (meeting.mask != mask || std::strcmp(meeting.what, what) != 0)
        fail("lanes diverge: %s with mask %08x, others %s with %08x", what, mask, meeting.what, meeting.mask);
    meeting.mine[lane] = mine;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived != mask) return sleep(what);
    const Meeting done = meeting;
    meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(at));
    finish(done.mine, mask);
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
    if (std::strcmp(meeting.what, what) != 0) fail("warps diverge: %s, others %s", what, meeting.what);
    meeting.mine[thread % 128] = mine;
    if (++meeting.arrived < 128) return sleep(what);
    const GroupMeeting done = meeting;
    meeting.arrived = 0;
    finish(done.mine);
    for (unsigned other = group * 128; other < (group + 1) * 128; ++other)
        if (other != thread) wake(other);
}

void wait_until(const char* name, bool (*ready)(const void*), const void* what) {
    if (ready(what)) return;
    current().ready = ready;
    current().ready_for = what;
    block->polling.push_back(block->current);
    sleep(name);
}

void cp_async(void* shared, const void* global, unsigned bytes, bool valid) {
    aligned(shared, bytes);
    const auto to = reinterpret_cast<uintptr_t>(shared), first = reinterpret_cast<uintptr_t>(block->shared);
    if (to < first || to + bytes > first + block->shared_bytes) fail("copy outside shared memory");
    if (valid) aligned(global, bytes);
    // It may land from now on.
    races::touch(shared, bytes, true);
    current().copies.push_back({shared, global, bytes, valid});
}

void cp_async_commit() {
    Fiber& fiber = current();
    fiber.groups.emplace_back();
    fiber.groups.back().swap(fiber.copies);
}

void cp_async_wait(int pending) {
    auto& groups = current().groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        land(groups.front());
        groups.erase(groups.begin());
    }
}

std::vector<Copy> cp_async_take() {
    Fiber& fiber = current();
    std::vector<Copy> all;
    for (const auto& group : fiber.groups) all.insert(all.end(), group.begin(), group.end());
    all.insert(all.end(), fiber.copies.begin(), fiber.copies.end());
    fiber.groups.clear();
    fiber.copies.clear();
    return all;
}

void copy_now(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
}

namespace {
struct Matrices {
    uint32_t* r;
    const void* row;
};

template <bool transposed>
void load_matrices(void* const (&all)[32], uint32_t) {
    for (int i = 0; i < 4; ++i) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(m[row], static_cast<Matrices*>(all[i * 8 + row])->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, col = lane % 4 * 2;
            const uint16_t low = transposed ? m[col][row] : m[row][col];
            const uint16_t high = transposed ? m[col + 1][row] : m[row][col + 1];
            static_cast<Matrices*>(all[lane])->r[i] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <bool f16>
float half_of(uint32_t packed, int which) {
    if (f16) return half_to_float(static_cast<uint16_t>(which ? packed >> 16 : packed));
    return bits_to_float(which ? packed & 0xffff0000u : packed << 16);
}

template <bool f16>
void multiply(void* const (&all)[32], uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* p = static_cast<Product*>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = half_of<f16>(p->a[i], j);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) b[2 * t + i * 8 + j][g] = half_of<f16>(p->b[i], j);
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* p = static_cast<Product*>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            float sum = p->d[i];
            for (int k = 0; k < 16; ++k) sum += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
            p->d[i] = sum;
        }
    }
}
}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
    Matrices mine{r, aligned(row, 16)};
    races::touch(row, 16, false);
    if (transposed) {
        meet("ldmatrix.trans", 0xffffffffu, &mine, load_matrices<true>);
    } else {
        meet("ldmatrix", 0xffffffffu, &mine, load_matrices<false>);
    }
}

void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{d, a, {b0, b1}};
    meet("mma.m16n8k16", 0xffffffffu, &mine, multiply<false>);
}

void mma_16816_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{d, a, {b0, b1}};
    meet("mma.m16n8k16.f16", 0xffffffffu, &mine, multiply<true>);
}

}  // namespace simt

extern "C" {

// 0, or 1 with a text in `error`. `schedule`: 0 in turn, 1 backwards, more: seeds of a random order.
int simt_launch(const char* name, const uint32_t grid[3], uint32_t threads, size_t shared, const void* args,
                size_t args_size, uint32_t schedule, char* error, size_t error_size) {
    using namespace simt;
    const Kernel* kernel = kernels;
    while (kernel != nullptr && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    const auto refuse = [&](const char* text, size_t given, size_t wanted) {
        std::snprintf(error, error_size, "%s: %s (%zu given, %zu wanted)", name, text, given, wanted);
        return 1;
    };
    if (kernel == nullptr) return refuse("no such kernel", 0, 0);
    if (kernel->args_size != args_size) return refuse("arguments of another size", args_size, kernel->args_size);
    if (kernel->threads != threads || threads > THREADS_MAX || threads % 32 != 0)
        return refuse("threads in a block", threads, kernel->threads);
    if (shared > SHARED_MAX) return refuse("shared memory", shared, SHARED_MAX);
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535)
        return refuse("no valid grid", grid[1], 65535);
    thread_local Block storage;
    block = &storage;
    block->kernel = kernel;
    block->args = args;
    block->schedule = schedule;
    block->shared_bytes = shared;
    block->failed = false;
    const size_t blocks = static_cast<size_t>(grid[0]) * grid[1] * grid[2];
    for (size_t i = 0; i < blocks; ++i) {
        // An order of blocks that is not the obvious one finds kernels that rely on it.
        const size_t at = schedule == 1 ? blocks - 1 - i : i;
        const Index index{static_cast<unsigned>(at % grid[0]), static_cast<unsigned>(at / grid[0] % grid[1]),
                          static_cast<unsigned>(at / grid[0] / grid[1])};
        if (posix_memalign(&block->shared, 1024, shared > 0 ? shared : 1) != 0) return refuse("out of memory", shared, 0);
        std::memset(block->shared, 0xff, shared);
        start_block({{0, 0, 0}, index, {threads, 1, 1}, {grid[0], grid[1], grid[2]}}, threads);
        const bool good = run_block();
        std::free(block->shared);
        if (!good) {
            std::snprintf(error, error_size, "%s: %s", name, block->error);
            return 1;
        }
    }
    return 0;
}

// Every kernel's name, the `index`-th; null past the last.
const char* simt_kernel(size_t index) {
    const simt::Kernel* kernel = simt::kernels;
    while (kernel != nullptr && index-- > 0) kernel = kernel->next;
    return kernel == nullptr ? nullptr : kernel->name;
}

}
