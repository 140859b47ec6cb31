// The driver's virtual memory calls: memory with a file descriptor of its own, which other
// processes map too. FAKE_NO_PEERS: no device reaches another's.
#pragma once

#include <sys/mman.h>

#include "machine.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t PIECE_BYTES = 2 << 20;

// As the driver's own structures begin.
struct Location {
    int type;
    int id;
};
struct Properties {
    int type;
    int handle_types;
    Location location;
};
struct Access {
    Location location;
    int flags;
};

// Behind a handle.
struct Physical {
    int file;
    size_t bytes;
};

Address as_address(void* at) { return reinterpret_cast<Address>(at); }

bool whole(size_t bytes) { return bytes > 0 && bytes % PIECE_BYTES == 0; }

}  // namespace

EXPORTED int cuMemGetAllocationGranularity(size_t* bytes, const Properties* wanted, int) {
    return *bytes = PIECE_BYTES, wanted->type == 1 ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuMemCreate(Address* handle, size_t bytes, const Properties* wanted, Address flags) {
    if (current == nullptr) return INVALID_CONTEXT;
    const bool good = wanted->type == 1 && wanted->handle_types == 1 && wanted->location.type == 1;
    if (!good || flags || !whole(bytes) || !device_at(wanted->location.id)) return INVALID_VALUE;
    if (bytes > memory_bytes()) return OUT_OF_MEMORY;
    const int file = memfd_create("fake-device-memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return OUT_OF_MEMORY;
    *handle = as_address(new Physical{file, bytes});
    return SUCCESS;
}
EXPORTED int cuMemRelease(Address handle) {
    auto* physical = reinterpret_cast<Physical*>(handle);
    close(physical->file);
    return delete physical, SUCCESS;
}
EXPORTED int cuMemExportToShareableHandle(int* file, Address handle, int type, Address flags) {
    if (type != 1 || flags) return INVALID_VALUE;
    *file = dup(reinterpret_cast<Physical*>(handle)->file);
    return *file < 0 ? OUT_OF_MEMORY : SUCCESS;
}
EXPORTED int cuMemImportFromShareableHandle(Address* handle, void* file, int type) {
    if (type != 1) return INVALID_VALUE;
    const int own = dup(static_cast<int>(reinterpret_cast<intptr_t>(file)));
    const off_t bytes = own < 0 ? -1 : lseek(own, 0, SEEK_END);
    if (bytes <= 0) return INVALID_HANDLE;
    *handle = as_address(new Physical{own, static_cast<size_t>(bytes)});
    return SUCCESS;
}
EXPORTED int cuMemAddressReserve(Address* at, size_t bytes, size_t, Address, Address) {
    if (!whole(bytes)) return INVALID_VALUE;
    void* start = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return *at = as_address(start), start == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
EXPORTED int cuMemAddressFree(Address at, size_t bytes) {
    return munmap(reinterpret_cast<void*>(at), bytes) ? INVALID_VALUE : SUCCESS;
}
EXPORTED int cuMemMap(Address at, size_t bytes, size_t offset, Address handle, Address flags) {
    const auto* physical = reinterpret_cast<Physical*>(handle);
    if (offset || flags || bytes > physical->bytes) return INVALID_VALUE;
    // Out of reach until cuMemSetAccess.
    void* start = mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
                       physical->file, 0);
    return start == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}
EXPORTED int cuMemSetAccess(Address at, size_t bytes, const Access* access, size_t count) {
    Device* device = count == 1 ? device_at(access->location.id) : nullptr;
    if (device == nullptr || access->flags != 3) return INVALID_VALUE;
    if (mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE)) return INVALID_VALUE;
    const std::lock_guard lock(device->mutex);
    return device->memory.add(at, bytes), SUCCESS;
}
EXPORTED int cuMemUnmap(Address at, size_t bytes) {
    if (current == nullptr) return INVALID_CONTEXT;
    finish(current);
    {
        const std::lock_guard lock(current->mutex);
        current->memory.take(at);
    }
    void* start = mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return start == MAP_FAILED ? INVALID_VALUE : SUCCESS;
}

EXPORTED int cuDeviceGetPCIBusId(char* to, int len, int device) {
    return std::snprintf(to, static_cast<size_t>(len), "0000:%02x:00.0", device), SUCCESS;
}
EXPORTED int cuDeviceGetByPCIBusId(int* device, const char* text) {
    unsigned at = 0;
    const bool read = std::sscanf(text, "0000:%x:00.0", &at) == 1;
    return *device = static_cast<int>(at), read && device_at(*device) ? SUCCESS : INVALID_DEVICE;
}
EXPORTED int cuDeviceCanAccessPeer(int* can, int, int) {
    return *can = setting("FAKE_NO_PEERS", 0) == 0, SUCCESS;
}
