// cp.async: copies that land when they are waited for.
#include "block.h"

namespace simt {
namespace {

void land(std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        races::touch(copy.to, copy.bytes, true);
        copy_now(copy);
        note_landing(copy, block->current);
    }
    copies.clear();
}

}  // namespace

void hold(Copy& copy) {
    if (!copy.valid) return;
    const auto* from = static_cast<const unsigned char*>(copy.from);
    block->held.emplace_back(from, from + copy.bytes);
    copy.from = block->held.back().data();
}

void hold_begun_copies() {
    for (Fiber& fiber : block->fibers) {
        for (Copy& copy : fiber.copies) hold(copy);
        for (auto& group : fiber.groups)
            for (Copy& copy : group) hold(copy);
    }
    hold_begun_arrivals();
}

void cp_async(void* shared, const void* global, unsigned bytes, bool valid) {
    aligned(shared, bytes);
    const auto to = reinterpret_cast<uintptr_t>(shared);
    const auto first = reinterpret_cast<uintptr_t>(block->shared);
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

}  // namespace simt
