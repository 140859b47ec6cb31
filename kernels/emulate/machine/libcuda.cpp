// A CUDA driver in host memory: what `libcuda.so.1` is to the product, for tests of the code that
// talks to one. Kernels run in the emulation's library (LOCKSTEP_FAKE_KERNELS).
//
// Each stream has a thread. Work on a stream begins when something behind it is asked for, or a
// while later, so that staging memory which is reused too early shows. What a device would fault at
// is a fault here: addresses outside allocations in copies, host memory that is not pinned, another
// device's context. Kernels' own accesses are not watched: the emulation has AddressSanitizer.
//
// The environment says what the machine is and how it misbehaves (`src/machine.rs` has the list):
// FAKE_VERSION, FAKE_DEVICES, FAKE_MAJOR, FAKE_MEMORY_MIB, FAKE_NO_PEERS, and names of kernels:
// FAKE_HANG never ends, FAKE_FAULT ends with a fault, the call that launches FAKE_STUCK does not
// return.
#include "mapping.h"

namespace {

struct Passed {
    bool timed;
    Clock::time_point at;
};

struct Event {
    Device* device;
    std::shared_ptr<Passed> passed;
    Stream* stream = nullptr;
    uint64_t behind = 0;
};

struct Function {
    const char* name;
    size_t args_bytes;
    int shared_max = SHARED_DEFAULT;
    bool loaded = false;
};

// Programmatic stream serialization (6): launches in a stream here never overlap.
struct LaunchAttribute {
    int id;
    char pad[4];
    union {
        char all[64];
        int allowed;
    };
};

struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    const LaunchAttribute* attributes;
    unsigned count;

    bool overlaps_at_most() const {
        return count == 0 || (count == 1 && attributes->id == 6 && attributes->allowed == 1);
    }
};

struct Module {
    Device* device;
    std::vector<std::unique_ptr<Function>> functions;
};

// What a call needs: a context that still works, and its stream.
int usable(const Stream* stream) {
    if (current == nullptr) return INVALID_CONTEXT;
    if (stream == nullptr || stream->device != current) return INVALID_HANDLE;
    return current->failed();
}

int run_kernel(const Function& function, const uint32_t (&grid)[3], uint32_t threads,
               size_t shared, const std::vector<char>& args) {
    while (named("FAKE_HANG", function.name)) sleep(1);
    if (named("FAKE_FAULT", function.name)) return ILLEGAL_ADDRESS;
    char error[1024] = "";
    const int code = kernels().launch(function.name, grid, threads, shared, args.data(),
                                      args.size(), 0, error, sizeof error);
    if (code == 0) return SUCCESS;
    tell(error);
    return LAUNCH_FAILED;
}

}  // namespace

EXPORTED int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
EXPORTED int cuDriverGetVersion(int* v) { return *v = setting("FAKE_VERSION", 13000), SUCCESS; }
EXPORTED int cuDeviceGetCount(int* n) { return *n = static_cast<int>(devices().size()), SUCCESS; }
EXPORTED int cuDeviceGet(int* device, int at) {
    return *device = at, device_at(at) ? SUCCESS : INVALID_DEVICE;
}
EXPORTED int cuDeviceGetName(char* to, int len, int device) {
    return std::snprintf(to, static_cast<size_t>(len), "fake %d", device), SUCCESS;
}
EXPORTED int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory_bytes(), SUCCESS; }
EXPORTED int cuDeviceGetAttribute(int* value, int what, int) {
    switch (what) {
        case 16: *value = 132; break;                        // multiprocessors
        case 75: *value = setting("FAKE_MAJOR", 9); break;   // compute capability
        case 76: *value = 0; break;
        case 97: *value = SHARED_MAX; break;                 // shared memory of a block
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORTED int cuDevicePrimaryCtxRetain(void** context, int device) {
    return *context = device_at(device), *context ? SUCCESS : INVALID_DEVICE;
}
EXPORTED int cuDevicePrimaryCtxRelease_v2(int device) {
    return device_at(device) ? SUCCESS : INVALID_DEVICE;
}
EXPORTED int cuCtxSetCurrent(void* context) {
    for (Device* device : devices())
        if (device == context) return current = device, SUCCESS;
    return INVALID_CONTEXT;
}
EXPORTED int cuCtxGetDevice(int* device) {
    if (current == nullptr) return INVALID_CONTEXT;
    return *device = current->ordinal, SUCCESS;
}

EXPORTED int cuStreamCreate(Stream** stream, unsigned) {
    if (current == nullptr) return INVALID_CONTEXT;
    *stream = new Stream(current);
    const std::lock_guard lock(current->mutex);
    current->streams.push_back(*stream);
    return SUCCESS;
}
EXPORTED int cuStreamDestroy_v2(Stream* stream) { return usable(stream); }
EXPORTED int cuStreamQuery(Stream* stream) {
    const int error = usable(stream);
    return error ? error : stream->ask(stream->end());
}
EXPORTED int cuLaunchHostFunc(Stream* stream, void (*call)(void*), void* data) {
    const int error = usable(stream);
    return error ? error : stream->add([=] { return call(data), SUCCESS; });
}

// A graph is the work itself, and so is what is made of it.
EXPORTED int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (const int error = usable(stream)) return error;
    const std::lock_guard lock(stream->mutex);
    if (stream->captures || mode != 1) return INVALID_VALUE;
    stream->captured.clear();
    return stream->captures = true, SUCCESS;
}
EXPORTED int cuStreamEndCapture(Stream* stream, std::vector<Work>** graph) {
    if (const int error = usable(stream)) return error;
    const std::lock_guard lock(stream->mutex);
    if (!stream->captures) return INVALID_VALUE;
    stream->captures = false;
    *graph = new std::vector<Work>(std::move(stream->captured));
    return SUCCESS;
}
EXPORTED int cuGraphInstantiateWithFlags(std::vector<Work>** made, std::vector<Work>* graph,
                                         unsigned long long flags) {
    return *made = new std::vector<Work>(*graph), flags ? INVALID_VALUE : SUCCESS;
}
EXPORTED int cuGraphLaunch(std::vector<Work>* graph, Stream* stream) {
    if (const int error = usable(stream)) return error;
    if (stream->is_capturing()) return CAPTURE_UNSUPPORTED;
    return stream->add([=] {
        for (const Work& item : *graph)
            if (const int code = item()) return code;
        return static_cast<int>(SUCCESS);
    });
}
EXPORTED int cuGraphDestroy(std::vector<Work>* graph) { return delete graph, SUCCESS; }
EXPORTED int cuGraphExecDestroy(std::vector<Work>* graph) { return delete graph, SUCCESS; }

EXPORTED int cuEventCreate(Event** event, unsigned flags) {
    if (current == nullptr) return INVALID_CONTEXT;
    *event = new Event{current, std::make_shared<Passed>(Passed{!(flags & 2), {}})};
    return SUCCESS;
}
EXPORTED int cuEventDestroy_v2(Event* event) { return delete event, SUCCESS; }
EXPORTED int cuEventRecord(Event* event, Stream* stream) {
    if (const int error = usable(stream)) return error;
    if (event->device != current) return INVALID_HANDLE;
    // Captured events order graphs; nobody here waits for one.
    if (stream->is_capturing()) return CAPTURE_UNSUPPORTED;
    const int error = stream->add([passed = event->passed] {
        return passed->at = Clock::now(), SUCCESS;
    });
    event->stream = stream;
    event->behind = stream->end();
    return error;
}
EXPORTED int cuEventQuery(Event* event) {
    return event->stream ? event->stream->ask(event->behind) : SUCCESS;
}
EXPORTED int cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
    if (!from->stream || !to->stream || !from->passed->timed || !to->passed->timed)
        return INVALID_HANDLE;
    if (const int error = to->stream->ask(to->behind)) return error;
    const std::chrono::duration<float, std::milli> between = to->passed->at - from->passed->at;
    return *milliseconds = between.count(), SUCCESS;
}

EXPORTED int cuMemAlloc_v2(Address* at, size_t bytes) {
    if (current == nullptr) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    if (is_capturing(current)) return CAPTURE_UNSUPPORTED;
    const std::lock_guard lock(current->mutex);
    if (current->error) return current->error;
    if (bytes > memory_bytes() - current->used) return OUT_OF_MEMORY;
    void* start = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (start == nullptr) return OUT_OF_MEMORY;
    // Whoever reads what was never written gets NaNs.
    std::memset(start, 0xff, bytes);
    *at = reinterpret_cast<Address>(start);
    current->memory.add(*at, bytes);
    current->used += bytes;
    return SUCCESS;
}
EXPORTED int cuMemFree_v2(Address at) {
    if (current == nullptr) return INVALID_CONTEXT;
    finish(current);
    const std::lock_guard lock(current->mutex);
    const size_t bytes = current->memory.take(at);
    current->used -= bytes;
    if (bytes) std::free(reinterpret_cast<void*>(at));
    return bytes ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuMemGetInfo_v2(size_t* left, size_t* all) {
    if (current == nullptr) return INVALID_CONTEXT;
    const std::lock_guard lock(current->mutex);
    return *all = memory_bytes(), *left = *all - current->used, SUCCESS;
}
EXPORTED int cuMemGetAddressRange_v2(Address* start, size_t* bytes, Address at) {
    if (current == nullptr) return INVALID_CONTEXT;
    const std::lock_guard lock(current->mutex);
    return current->memory.find(at, *start, *bytes) ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) {
    if (flags || bytes == 0) return INVALID_VALUE;
    *at = std::malloc(bytes);
    const std::lock_guard lock(pinned_mutex);
    pinned.add(reinterpret_cast<Address>(*at), bytes);
    return *at ? SUCCESS : OUT_OF_MEMORY;
}
EXPORTED int cuMemFreeHost(void* at) {
    if (current != nullptr) finish(current);
    const std::lock_guard lock(pinned_mutex);
    if (pinned.take(reinterpret_cast<Address>(at)) == 0) return INVALID_VALUE;
    return std::free(at), SUCCESS;
}

EXPORTED int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream* stream) {
    if (const int error = usable(stream)) return error;
    return stream->add([=, device = current] {
        if (!device->holds(to, bytes)) return ILLEGAL_ADDRESS;
        return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS;
    });
}
EXPORTED int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
    if (const int error = usable(stream)) return error;
    if (!is_pinned(from, bytes)) return INVALID_VALUE;
    return stream->add([=, device = current] {
        if (!device->holds(to, bytes)) return ILLEGAL_ADDRESS;
        return std::memcpy(reinterpret_cast<void*>(to), from, bytes), SUCCESS;
    });
}
EXPORTED int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    if (const int error = usable(stream)) return error;
    if (!is_pinned(to, bytes)) return INVALID_VALUE;
    return stream->add([=, device = current] {
        if (!device->holds(from, bytes)) return ILLEGAL_ADDRESS;
        return std::memcpy(to, reinterpret_cast<void*>(from), bytes), SUCCESS;
    });
}
EXPORTED int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    if (const int error = usable(stream)) return error;
    return stream->add([=, device = current] {
        if (!device->holds(to, bytes) || !device->holds(from, bytes)) return ILLEGAL_ADDRESS;
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
        return SUCCESS;
    });
}

EXPORTED int cuModuleLoadData(Module** module, const void* image) {
    if (current == nullptr) return INVALID_CONTEXT;
    // The magic number of fat binaries, at an address that they may have.
    unsigned magic = 0;
    std::memcpy(&magic, image, sizeof magic);
    if (magic != 0xba55ed50u || reinterpret_cast<Address>(image) % 16) return INVALID_VALUE;
    *module = new Module{current, {}};
    for (size_t at = 0; const char* name = kernels().name(at); ++at)
        (*module)->functions.emplace_back(new Function{name, kernels().args_bytes(at)});
    return SUCCESS;
}
EXPORTED int cuModuleUnload(Module* module) {
    finish(module->device);
    return delete module, SUCCESS;
}
EXPORTED int cuModuleGetFunctionCount(unsigned* count, Module* module) {
    return *count = static_cast<unsigned>(module->functions.size()), SUCCESS;
}
EXPORTED int cuModuleEnumerateFunctions(Function** functions, unsigned count, Module* module) {
    if (count > module->functions.size()) return INVALID_VALUE;
    for (unsigned at = 0; at < count; ++at) functions[at] = module->functions[at].get();
    return SUCCESS;
}
EXPORTED int cuFuncGetName(const char** name, Function* function) {
    return *name = function->name, SUCCESS;
}
EXPORTED int cuFuncGetParamInfo(Function* function, size_t at, size_t* offset, size_t* bytes) {
    *offset = 0, *bytes = function->args_bytes;
    return at == 0 ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cuFuncLoad(Function* function) { return function->loaded = true, SUCCESS; }
EXPORTED int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8 || value > SHARED_MAX) return INVALID_VALUE;
    return function->shared_max = value, SUCCESS;
}
EXPORTED int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** params,
                              void** extra) {
    const auto [x, y, z] = config->grid;
    const auto [threads, ty, tz] = config->block;
    const unsigned shared = config->shared;
    Stream* stream = config->stream;
    if (const int error = usable(stream)) return error;
    const bool fits = x && y && z && y < 65536 && z < 65536 && threads && threads <= 1024 &&
                      ty == 1 && tz == 1 && static_cast<int>(shared) <= function->shared_max;
    if (!fits || extra || !config->overlaps_at_most()) return INVALID_VALUE;
    while (named("FAKE_STUCK", function->name)) sleep(1);
    // Code that is loaded only now waits for the device.
    if (!function->loaded) finish(current);
    function->loaded = true;
    const char* first = static_cast<const char*>(params[0]);
    std::vector<char> args(first, first + function->args_bytes);
    return stream->add([=, args = std::move(args)] {
        return run_kernel(*function, {x, y, z}, threads, shared, args);
    });
}

EXPORTED int cuGetErrorName(int code, const char** name) {
    switch (code) {
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *name = "CUDA_ERROR";
    }
    return SUCCESS;
}
EXPORTED int cuGetErrorString(int, const char** text) {
    const std::lock_guard lock(told_mutex);
    return *text = told, SUCCESS;
}
