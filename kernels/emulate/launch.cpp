// The emulation's interface: kernels by name, launched block by block.
//
// A dependent launch may begin before the one before it is done, up to where it waits for it. The
// worst case is that nothing before has even begun: its first block runs so far, on a thread of
// the host, before the launches that stand before it; the others in its own turn.
#include "block.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace simt {
namespace {

constexpr size_t SHARED_MAX = 227 << 10;

const Kernel* kernels = nullptr;

// A launch as the interface gets it.
struct Launch {
    const char* name;
    const uint32_t* grid;
    uint32_t threads;
    size_t shared;
    const void* args;
    size_t args_size;
    // 0 in turn, 1 backwards, more: seeds of a random order.
    uint32_t schedule;
    // Whether it may begin before the launch before it is done.
    uint32_t dependent;
};

// Why a device would refuse it, with what was given and what is wanted; null where it would not.
const char* refusal(const Kernel* kernel, const Launch& launch, size_t& given, size_t& wanted) {
    const auto because = [&](const char* text, size_t is, size_t should) {
        given = is;
        wanted = should;
        return text;
    };
    if (kernel == nullptr) return because("no such kernel", 0, 0);
    if (kernel->args_size != launch.args_size)
        return because("arguments of another size", launch.args_size, kernel->args_size);
    const uint32_t threads = launch.threads;
    if (kernel->threads != threads || threads > THREADS_MAX || threads % 32 != 0)
        return because("threads in a block", threads, kernel->threads);
    if (launch.shared > SHARED_MAX) return because("shared memory", launch.shared, SHARED_MAX);
    const uint32_t* grid = launch.grid;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535)
        return because("no valid grid", grid[1], 65535);
    return nullptr;
}

// Where a block runs that began before its turn.
class EarlyBlock {
public:
    // Runs the block as far as it comes without the launches before.
    template <typename Run>
    explicit EarlyBlock(Run run) : thread([this, run] { end(run(this)); }) {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return has_stopped || has_ended; });
    }

    ~EarlyBlock() { finish(); }

    // Runs it to its end; empty where that went well.
    std::string finish() {
        {
            const std::lock_guard lock(mutex);
            may_go_on = true;
        }
        changed.notify_all();
        if (thread.joinable()) thread.join();
        return error;
    }

    // On the block's own thread: it cannot go on.
    static void stop(void* of) {
        auto* self = static_cast<EarlyBlock*>(of);
        std::unique_lock lock(self->mutex);
        self->has_stopped = true;
        self->changed.notify_all();
        self->changed.wait(lock, [self] { return self->may_go_on; });
    }

private:
    std::mutex mutex;
    std::condition_variable changed;
    bool has_stopped = false, may_go_on = false, has_ended = false;
    std::string error;
    // Last: it uses all others.
    std::thread thread;

    void end(std::string how) {
        const std::lock_guard lock(mutex);
        error = std::move(how);
        has_ended = true;
        changed.notify_all();
    }
};

// Runs one block on this thread; says what went wrong, where something did.
std::string run_at(const Kernel* kernel, const Launch& launch, size_t at, EarlyBlock* early) {
    thread_local const auto storage = std::make_unique<Block>();
    block = storage.get();
    block->kernel = kernel;
    block->args = launch.args;
    block->schedule = launch.schedule;
    block->shared_bytes = launch.shared;
    block->failed = false;
    block->is_behind = early == nullptr;
    block->comes_to_wait = EarlyBlock::stop;
    block->waiter = early;
    const uint32_t* grid = launch.grid;
    const Index index{static_cast<unsigned>(at % grid[0]),
                      static_cast<unsigned>(at / grid[0] % grid[1]),
                      static_cast<unsigned>(at / grid[0] / grid[1])};
    if (posix_memalign(&block->shared, 1024, launch.shared > 0 ? launch.shared : 1) != 0)
        return "no memory for " + std::to_string(launch.shared) + " bytes";
    std::memset(block->shared, 0xff, launch.shared);
    start_block(index, {grid[0], grid[1], grid[2]}, launch.threads);
    const bool good = run_block();
    std::free(block->shared);
    if (!good) return block->error;
    // Else this launch could be done before the one before it, for which nobody would wait then.
    if (launch.dependent && !block->has_waited)
        return "a block that never waits for the launches before";
    return "";
}

// A launch whose first block may have begun.
struct Begun {
    const Kernel* kernel;
    std::vector<uint64_t> args;
    uint32_t grid[3];
    Launch launch;
    std::unique_ptr<EarlyBlock> first;

    Begun(const Kernel* kernel, const Launch& given)
        : kernel(kernel), args((given.args_size + 7) / 8), launch(given) {
        std::memcpy(args.data(), given.args, given.args_size);
        std::memcpy(grid, given.grid, sizeof grid);
        launch.args = args.data();
        launch.grid = grid;
    }

    size_t blocks() const { return static_cast<size_t>(grid[0]) * grid[1] * grid[2]; }

    // The block whose turn is the `turn`-th. An order that is not the obvious one finds kernels
    // that rely on it.
    size_t block_at(size_t turn) const { return launch.schedule == 1 ? blocks() - 1 - turn : turn; }

    void begin_early() {
        first = std::make_unique<EarlyBlock>(
            [this](EarlyBlock* early) { return run_at(kernel, launch, block_at(0), early); });
    }

    std::string run(size_t turn) {
        if (turn == 0 && first) return first->finish();
        return run_at(kernel, launch, block_at(turn), nullptr);
    }
};

}  // namespace

Kernel::Kernel(const char* name, size_t args_size, unsigned threads, void (*run)(const void*))
    : name(name), args_size(args_size), threads(threads), run(run), next(kernels) {
    kernels = this;
}

}  // namespace simt

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A launch for simt_end, which has begun where it is dependent and `ahead` is not 0; null with a
// text in `error`.
EXPORTED void* simt_begin(const simt::Launch* launch, int ahead, char* error, size_t error_size) {
    using namespace simt;
    const Kernel* kernel = kernels;
    while (kernel != nullptr && std::strcmp(kernel->name, launch->name) != 0) kernel = kernel->next;
    size_t given = 0, wanted = 0;
    const char* refused = refusal(kernel, *launch, given, wanted);
    if (refused != nullptr) {
        std::snprintf(error, error_size, "%s: %s (%zu given, %zu wanted)", launch->name, refused,
                      given, wanted);
        return nullptr;
    }
    auto* begun = new Begun(kernel, *launch);
    if (launch->dependent && ahead) begun->begin_early();
    return begun;
}

// Runs it to its end, in its turn: 0, or 1 with a text in `error`.
EXPORTED int simt_end(void* launch, char* error, size_t error_size) {
    using namespace simt;
    const std::unique_ptr<Begun> begun(static_cast<Begun*>(launch));
    for (size_t turn = 0; turn < begun->blocks(); ++turn) {
        const std::string wrong = begun->run(turn);
        if (wrong.empty()) continue;
        std::snprintf(error, error_size, "%s: %s", begun->kernel->name, wrong.c_str());
        return 1;
    }
    return 0;
}

// Both at once.
EXPORTED int simt_launch(const char* name, const uint32_t grid[3], uint32_t threads, size_t shared,
                         const void* args, size_t args_size, uint32_t schedule, char* error,
                         size_t error_size) {
    const simt::Launch launch{name, grid, threads, shared, args, args_size, schedule, 0};
    void* begun = simt_begin(&launch, 0, error, error_size);
    return begun == nullptr ? 1 : simt_end(begun, error, error_size);
}

static const simt::Kernel* kernel_at(size_t index) {
    const simt::Kernel* kernel = simt::kernels;
    while (kernel != nullptr && index-- > 0) kernel = kernel->next;
    return kernel;
}

// Every kernel's name, the `index`-th; null past the last.
EXPORTED const char* simt_kernel(size_t index) {
    const simt::Kernel* kernel = kernel_at(index);
    return kernel == nullptr ? nullptr : kernel->name;
}

// Bytes of its arguments.
EXPORTED size_t simt_args_bytes(size_t index) { return kernel_at(index)->args_size; }
