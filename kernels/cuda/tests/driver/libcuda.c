// A CUDA driver in host memory, for tests of the code that talks to one.
//
// Work on a stream is done when an event behind it is asked for and not before, so that staging
// memory which is reused too early shows. The environment says how the device misbehaves:
// FAKE_VERSION, FAKE_DEVICES, FAKE_MAJOR, and FAKE_END: what events and the stream answer after a
// launch.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NOT_READY = 600 };
enum { MEMORY_BYTES = 64 << 20, WORK_MAX = 4096, SHARED_DEFAULT = 48 << 10, ARGS_BYTES = 24 };

typedef unsigned long long address;
typedef struct { void* to; const void* from; size_t bytes; int fill; } Work;
typedef struct { size_t behind; } Event;

static Work work[WORK_MAX];
static size_t queued, done, used;
static int launched, shared_max = SHARED_DEFAULT;
static int the_context, the_stream, the_module, the_function;

static int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int add(Work item) {
    if (queued == WORK_MAX) return INVALID_VALUE;
    work[queued++] = item;
    return SUCCESS;
}

static void run(size_t end) {
    for (; done < end; ++done) {
        Work w = work[done];
        if (w.from) memcpy(w.to, w.from, w.bytes);
        else memset(w.to, w.fill, w.bytes);
    }
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int* v) { return *v = setting("FAKE_VERSION", 13000), SUCCESS; }
int cuDeviceGetCount(int* n) { return *n = setting("FAKE_DEVICES", 1), SUCCESS; }
int cuDeviceGet(int* device, int at) { return *device = at, SUCCESS; }
int cuDeviceGetName(char* to, int len, int device) {
    return snprintf(to, (size_t)len, "fake %d", device), SUCCESS;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return (void)device, *bytes = MEMORY_BYTES, SUCCESS;
}
int cuDeviceGetAttribute(int* value, int what, int device) {
    (void)device;
    *value = what == 75 ? setting("FAKE_MAJOR", 9) : what == 76 ? 0 : what == 16 ? 132 : 227 << 10;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    return (void)device, *context = &the_context, SUCCESS;
}
int cuCtxSetCurrent(void* context) { return context == &the_context ? SUCCESS : INVALID_VALUE; }
int cuStreamCreate(void** stream, unsigned flags) {
    return (void)flags, *stream = &the_stream, SUCCESS;
}

int cuEventCreate(Event** event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    return *event ? SUCCESS : OUT_OF_MEMORY;
}
int cuEventDestroy_v2(Event* event) { return free(event), SUCCESS; }
int cuEventRecord(Event* event, void* stream) {
    event->behind = queued;
    return stream == &the_stream ? SUCCESS : INVALID_VALUE;
}
int cuEventQuery(Event* event) {
    if (launched && setting("FAKE_END", SUCCESS)) return setting("FAKE_END", SUCCESS);
    return run(event->behind), SUCCESS;
}
int cuStreamQuery(void* stream) {
    if (stream != &the_stream) return INVALID_VALUE;
    if (launched && setting("FAKE_END", SUCCESS)) return setting("FAKE_END", SUCCESS);
    return run(queued), SUCCESS;
}
// What gives something back waits for the device, and does not return where that hangs.
static void finish(void) {
    while (launched && setting("FAKE_END", SUCCESS) == NOT_READY) sleep(1);
    run(queued);
}
int cuStreamDestroy_v2(void* stream) { return stream == &the_stream ? SUCCESS : INVALID_VALUE; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, finish(), SUCCESS; }
int cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
    return *milliseconds = (float)(to->behind - from->behind), SUCCESS;
}

int cuMemAlloc_v2(address* at, size_t bytes) {
    if (bytes > MEMORY_BYTES - used) return OUT_OF_MEMORY;
    // Rubbish at first, its size in front.
    char* start = aligned_alloc(256, 256 + (bytes + 255) / 256 * 256);
    memset(start, 0xa5, 256 + bytes);
    memcpy(start, &bytes, sizeof bytes);
    used += bytes;
    return *at = (address)(start + 256), SUCCESS;
}
int cuMemFree_v2(address at) {
    size_t bytes;
    finish();
    memcpy(&bytes, (char*)at - 256, sizeof bytes);
    used -= bytes;
    return free((char*)at - 256), SUCCESS;
}
int cuMemGetInfo_v2(size_t* left, size_t* all) {
    return *left = MEMORY_BYTES - used, *all = MEMORY_BYTES, SUCCESS;
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned flags) {
    return *at = malloc(bytes), flags ? INVALID_VALUE : SUCCESS;
}
int cuMemFreeHost(void* at) { return finish(), free(at), SUCCESS; }
int cuMemsetD8Async(address to, unsigned char value, size_t bytes, void* stream) {
    return (void)stream, add((Work){(void*)to, NULL, bytes, value});
}
int cuMemcpyHtoDAsync_v2(address to, const void* from, size_t bytes, void* stream) {
    return (void)stream, add((Work){(void*)to, from, bytes, 0});
}
int cuMemcpyDtoHAsync_v2(void* to, address from, size_t bytes, void* stream) {
    return (void)stream, add((Work){to, (void*)from, bytes, 0});
}
int cuMemcpyDtoDAsync_v2(address to, address from, size_t bytes, void* stream) {
    return (void)stream, add((Work){(void*)to, (void*)from, bytes, 0});
}

int cuModuleLoadData(void** module, const void* image) {
    // The magic number of fat binaries, at an address that they may have.
    if (*(const unsigned*)image != 0xba55ed50u || (size_t)image % 16) return INVALID_VALUE;
    return *module = &the_module, SUCCESS;
}
int cuModuleUnload(void* module) {
    return finish(), module == &the_module ? SUCCESS : INVALID_VALUE;
}
int cuModuleGetFunctionCount(unsigned* count, void* module) {
    return (void)module, *count = 1, SUCCESS;
}
int cuModuleEnumerateFunctions(void** functions, unsigned count, void* module) {
    (void)module;
    if (count == 1) functions[0] = &the_function;
    return count == 1 ? SUCCESS : INVALID_VALUE;
}
int cuFuncGetName(const char** name, void* function) {
    return (void)function, *name = "add_bf16", SUCCESS;
}
int cuFuncGetParamInfo(void* function, size_t at, size_t* offset, size_t* bytes) {
    (void)function;
    *offset = 0, *bytes = ARGS_BYTES;
    return at == 0 ? SUCCESS : INVALID_VALUE;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    (void)function;
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    return shared_max = value, SUCCESS;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned ty, unsigned tz, unsigned shared, void* stream, void** params,
                   void** extra) {
    (void)params;
    int fits = x && y && z && threads && ty == 1 && tz == 1 && (int)shared <= shared_max;
    if (!fits || function != &the_function || stream != &the_stream || extra) return INVALID_VALUE;
    return launched = 1, SUCCESS;
}

int cuGetErrorName(int code, const char** name) {
    *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
            : code == 1 ? "CUDA_ERROR_INVALID_VALUE"
                        : "CUDA_ERROR";
    return SUCCESS;
}
int cuGetErrorString(int code, const char** text) {
    return (void)code, *text = "told by the fake", SUCCESS;
}
