// The emulation's interface: kernels by name, launched block by block.
#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

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
    size_t args_size;
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

}  // namespace

Kernel::Kernel(const char* name, size_t args_size, unsigned threads, void (*run)(const void*))
    : name(name), args_size(args_size), threads(threads), run(run), next(kernels) {
    kernels = this;
}

}  // namespace simt

#define EXPORTED extern "C" __attribute__((visibility("default")))

// 0, or 1 with a text in `error`. `schedule`: 0 in turn, 1 backwards, more: seeds of a random
// order.
EXPORTED int simt_launch(const char* name, const uint32_t grid[3], uint32_t threads, size_t shared,
                         const void* args, size_t args_size, uint32_t schedule, char* error,
                         size_t error_size) {
    using namespace simt;
    const Kernel* kernel = kernels;
    while (kernel != nullptr && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    size_t given = 0, wanted = 0;
    const char* refused = refusal(kernel, {name, grid, threads, shared, args_size}, given, wanted);
    if (refused != nullptr) {
        std::snprintf(error, error_size, "%s: %s (%zu given, %zu wanted)", name, refused, given,
                      wanted);
        return 1;
    }
    thread_local const auto storage = std::make_unique<Block>();
    block = storage.get();
    block->kernel = kernel;
    block->args = args;
    block->schedule = schedule;
    block->shared_bytes = shared;
    block->failed = false;
    const size_t blocks = static_cast<size_t>(grid[0]) * grid[1] * grid[2];
    for (size_t i = 0; i < blocks; ++i) {
        // An order of blocks that is not the obvious one finds kernels that rely on it.
        const size_t at = schedule == 1 ? blocks - 1 - i : i;
        const Index index{static_cast<unsigned>(at % grid[0]),
                          static_cast<unsigned>(at / grid[0] % grid[1]),
                          static_cast<unsigned>(at / grid[0] / grid[1])};
        if (posix_memalign(&block->shared, 1024, shared > 0 ? shared : 1) != 0) {
            std::snprintf(error, error_size, "%s: no memory for %zu bytes", name, shared);
            return 1;
        }
        std::memset(block->shared, 0xff, shared);
        start_block(index, {grid[0], grid[1], grid[2]}, threads);
        const bool good = run_block();
        std::free(block->shared);
        if (!good) {
            std::snprintf(error, error_size, "%s: %s", name, block->error);
            return 1;
        }
    }
    return 0;
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
