// What the driver in host memory is made of: devices with their memory, and streams.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Address = unsigned long long;
using Clock = std::chrono::steady_clock;

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
};

constexpr int SHARED_DEFAULT = 48 << 10, SHARED_MAX = 227 << 10;
// As long as a question may wait for its answer: the host's cores are the device's too.
constexpr auto PATIENCE = std::chrono::microseconds(500);
// As long as work may lie that nobody asks for.
constexpr auto LAZINESS = std::chrono::milliseconds(20);

int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

bool named(const char* variable, const char* kernel) {
    const char* text = getenv(variable);
    return text && std::strcmp(text, kernel) == 0;
}

// What the last fault was, for cuGetErrorString. Never freed: texts of the driver live as long as
// the process.
std::mutex told_mutex;
const char* told = "told by the fake";

void tell(const std::string& text) {
    const std::lock_guard lock(told_mutex);
    told = strdup(text.c_str());
}

using Launch = int (*)(const char*, const uint32_t*, uint32_t, size_t, const void*, size_t,
                       uint32_t, char*, size_t);
using Name = const char* (*)(size_t);
using ArgsBytes = size_t (*)(size_t);

// The emulation's interface.
struct Kernels {
    Launch launch = nullptr;
    Name name = nullptr;
    ArgsBytes args_bytes = nullptr;
};

const Kernels& kernels() {
    static const Kernels opened = [] {
        const char* path = getenv("LOCKSTEP_FAKE_KERNELS");
        void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (library == nullptr) {
            std::fprintf(stderr, "fake libcuda: no kernels in LOCKSTEP_FAKE_KERNELS: %s\n",
                         path ? dlerror() : "it is not set");
            std::abort();
        }
        return Kernels{reinterpret_cast<Launch>(dlsym(library, "simt_launch")),
                       reinterpret_cast<Name>(dlsym(library, "simt_kernel")),
                       reinterpret_cast<ArgsBytes>(dlsym(library, "simt_args_bytes"))};
    }();
    return opened;
}

// Memory, by its first address.
class Allocations {
public:
    void add(Address at, size_t bytes) { sizes[at] = bytes; }
    // Its size; 0 where none begins there.
    size_t take(Address at) {
        const auto found = sizes.find(at);
        if (found == sizes.end()) return 0;
        const size_t bytes = found->second;
        sizes.erase(found);
        return bytes;
    }
    bool find(Address at, Address& start, size_t& bytes) const {
        auto above = sizes.upper_bound(at);
        if (above == sizes.begin()) return false;
        --above;
        start = above->first;
        bytes = above->second;
        return at < start + bytes;
    }
    bool hold(Address at, size_t bytes) const {
        Address start = 0;
        size_t all = 0;
        return bytes == 0 || (find(at, start, all) && at + bytes <= start + all);
    }

private:
    std::map<Address, size_t> sizes;
};

// A device, which is its primary context too.
struct Device {
    int ordinal = 0;
    std::mutex mutex;
    Allocations memory;
    size_t used = 0;
    // The first failure, which all later calls get. Streams look at it while they are locked.
    std::atomic<int> error = SUCCESS;
    std::vector<struct Stream*> streams;

    int failed() const { return error; }
    void fail(int code) {
        int none = SUCCESS;
        error.compare_exchange_strong(none, code);
    }
    bool holds(Address at, size_t bytes) {
        const std::lock_guard lock(mutex);
        return memory.hold(at, bytes);
    }
};

// Host memory that any device may copy from and to.
std::mutex pinned_mutex;
Allocations pinned;

bool is_pinned(const void* at, size_t bytes) {
    const std::lock_guard lock(pinned_mutex);
    return pinned.hold(reinterpret_cast<Address>(at), bytes);
}

std::vector<Device*>& devices() {
    static std::vector<Device*> all = [] {
        std::vector<Device*> made;
        for (int at = 0; at < setting("FAKE_DEVICES", 1); ++at) {
            made.push_back(new Device);
            made.back()->ordinal = at;
        }
        return made;
    }();
    return all;
}

Device* device_at(int ordinal) {
    const bool is = ordinal >= 0 && static_cast<size_t>(ordinal) < devices().size();
    return is ? devices()[static_cast<size_t>(ordinal)] : nullptr;
}

size_t memory_bytes() { return static_cast<size_t>(setting("FAKE_MEMORY_MIB", 4096)) << 20; }

thread_local Device* current = nullptr;

using Work = std::function<int()>;

// Never freed: its thread may hang in a kernel that does.
struct Stream {
    Device* const device;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Work> work;
    // Pieces of work given, asked for, and done.
    uint64_t queued = 0, wanted = 0, done = 0;
    // What is kept instead of being done, while work is captured.
    bool captures = false;
    std::vector<Work> captured;

    explicit Stream(Device* device) : device(device) {
        std::thread([this] { serve(); }).detach();
    }

    int add(Work item) {
        if (const int error = device->failed()) return error;
        const std::lock_guard lock(mutex);
        if (captures) {
            captured.push_back(std::move(item));
            return SUCCESS;
        }
        work.push_back(std::move(item));
        ++queued;
        return SUCCESS;
    }
    bool is_capturing() {
        const std::lock_guard lock(mutex);
        return captures;
    }
    uint64_t end() {
        const std::lock_guard lock(mutex);
        return queued;
    }
    // Whether it has come past its first `end` pieces of work.
    int ask(uint64_t end) {
        std::unique_lock lock(mutex);
        if (captures) return CAPTURE_UNSUPPORTED;
        want(end);
        const auto passed = [&] { return done >= end || device->failed(); };
        changed.wait_for(lock, PATIENCE, passed);
        if (const int error = device->failed()) return error;
        return done >= end ? SUCCESS : NOT_READY;
    }
    // Waits for all work, without a deadline; what gives something back does.
    void finish() {
        std::unique_lock lock(mutex);
        want(queued);
        changed.wait(lock, [&] { return done >= queued || device->failed(); });
    }

private:
    void want(uint64_t end) {
        if (end <= wanted) return;
        wanted = end;
        changed.notify_all();
    }
    void serve() {
        std::unique_lock lock(mutex);
        for (;;) {
            while (done >= wanted) {
                const bool asked = changed.wait_for(lock, LAZINESS, [&] { return done < wanted; });
                if (!asked) wanted = queued;
            }
            const Work item = std::move(work.front());
            work.pop_front();
            lock.unlock();
            const int code = device->failed() ? SUCCESS : item();
            if (code != SUCCESS) device->fail(code);
            lock.lock();
            ++done;
            changed.notify_all();
        }
    }
};

// Whether a stream of the device is captured: then nothing may be taken or waited for.
bool is_capturing(Device* device) {
    const std::lock_guard lock(device->mutex);
    for (Stream* stream : device->streams)
        if (stream->is_capturing()) return true;
    return false;
}

void finish(Device* device) {
    std::vector<Stream*> all;
    {
        const std::lock_guard lock(device->mutex);
        all = device->streams;
    }
    for (Stream* stream : all) stream->finish();
}

}  // namespace
