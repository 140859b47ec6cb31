// Where a fiber starts.
#include "stack.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace simt {

void Stack::prepare(void (*entry)()) {
    if (memory == nullptr) memory.reset(new char[BYTES]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory.get(), BYTES);
#endif
#if defined(__x86_64__)
    // As if it had left off right before `entry`, called from nowhere.
    const auto top = reinterpret_cast<uintptr_t>(memory.get()) + BYTES;
    auto** first = reinterpret_cast<void**>(top / 16 * 16 - 16);
    first[0] = reinterpret_cast<void*>(entry);
    first[1] = nullptr;
    at = first;
#else
    getcontext(&at);
    at.uc_stack.ss_sp = memory.get();
    at.uc_stack.ss_size = BYTES;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
#endif
}

}  // namespace simt
