// NCCL in host memory, as `libnccl.so.2` is to the product: sums in rank order, rounded at each
// rank as in a ring, sends and receives, done where the stream comes to them. No call waits: a
// communicator comes about in a thread, and work goes to the stream only once it was asked after a
// few times, so that whoever does not ask gets other bytes. It refuses what NVIDIA's refuses: a
// second rank on a device, memory that is not the device's, communicators that were aborted; and
// sums of unequal sizes, which NVIDIA's hang at.
//
// FAKE_NCCL lists, with commas between, how it misbehaves: "init-hangs", "init-fails",
// "call-hangs" (stays in progress), "abort-hangs", "abort-fails", "fails-after:N" (calls; then work
// stands still and the error is asynchronous), "version:N".
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "nccl_shared.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Of the fake driver, which the product has opened.
extern "C" int cuLaunchHostFunc(void* stream, void (*call)(void*), void* data);
extern "C" int cuCtxGetDevice(int* device);
extern "C" int cuMemGetAddressRange_v2(unsigned long long* start, size_t* bytes,
                                       unsigned long long at);

namespace {

enum Result : int {
    SUCCESS = 0,
    CUDA_ERROR = 1,
    SYSTEM_ERROR = 2,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
    IN_PROGRESS = 7,
};
enum Type : int { F32 = 7, BF16 = 9 };
constexpr int ASKED = 3;

// The value of a setting that is named so, "" for one without; null where it is not set.
const char* setting(const char* name) {
    static const std::string all = std::string(",") + (getenv("FAKE_NCCL") ?: "") + ",";
    const size_t at = all.find("," + std::string(name));
    if (at == std::string::npos) return nullptr;
    const char* behind = all.c_str() + at + 1 + std::strlen(name);
    return *behind == ':' ? behind + 1 : *behind == ',' ? "" : nullptr;
}

thread_local std::string last_error;

int failed(int result, const std::string& text) { return last_error = text, result; }

struct Comm {
    const int rank, ranks, device;
    Shared* shared = nullptr;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    // Of a failure in a thread of this library's.
    std::string said;
    uint64_t meetings = 0;
    int calls = 0, asked = 0;
    // A call in progress.
    std::function<int()> call;

    Comm(int rank, int ranks, int device) : rank(rank), ranks(ranks), device(device) {}

    int fail(int result, const std::string& text) {
        said = text;
        return state = result;
    }

    // Whether every rank came.
    bool meet() {
        ++meetings;
        shared->at[rank] = meetings;
        for (int other = 0; other < ranks; ++other)
            while (shared->at[other] < meetings) {
                if (aborted) return false;
                short_wait();
            }
        return true;
    }

    void init(const std::string& id) {
        while (setting("init-hangs") && !aborted) short_wait();
        if (setting("init-fails")) {
            fail(SYSTEM_ERROR, "Bootstrap : no socket interface found");
            return;
        }
        shared = open_shared(id.c_str());
        if (shared == nullptr) {
            fail(SYSTEM_ERROR, "nobody listens at " + id);
            return;
        }
        shared->device[rank] = device + 1;
        if (!meet()) return;
        if (rank == 0) unlink(id.c_str());
        for (int other = 0; other < ranks; ++other)
            if (other != rank && shared->device[other] == device + 1) {
                fail(INVALID_USAGE, "Duplicate GPU detected : rank " + std::to_string(rank) +
                                        " and rank " + std::to_string(other));
                return;
            }
        state = SUCCESS;
    }

    void sum(uint16_t* x, size_t count) {
        for (size_t first = 0; first < count; first += PIECE / 2) {
            const size_t len = std::min(count - first, PIECE / 2);
            shared->count[rank] = count;
            std::memcpy(shared->part[rank], x + first, len * 2);
            if (!meet()) return;
            for (int other = 0; other < ranks; ++other)
                if (shared->count[other] != count) {
                    fail(INVALID_USAGE, "ranks sum other numbers of elements");
                    return;
                }
            for (size_t at = 0; at < len; ++at) {
                uint16_t sum = 0;
                for (int other = 0; other < ranks; ++other) {
                    const auto* part = reinterpret_cast<uint16_t*>(shared->part[other]);
                    sum = rounded(widened(sum) + widened(part[at]));
                }
                x[first + at] = sum;
            }
            if (!meet()) return;
        }
    }
};

// Every communicator that lives. Never freed: work may lie in a stream that stands still.
std::mutex alive_mutex;
std::set<Comm*> alive;

bool lives(Comm* comm) {
    const std::lock_guard lock(alive_mutex);
    return alive.count(comm) > 0;
}

bool on_device(const void* at, size_t bytes) {
    const auto address = reinterpret_cast<unsigned long long>(at);
    unsigned long long start = 0;
    size_t all = 0;
    return cuMemGetAddressRange_v2(&start, &all, address) == 0 && address + bytes <= start + all;
}

// Bytes to or from another rank.
struct Move {
    bool sends;
    int peer;
    char* at;
    size_t bytes, done;
};

// All moves at once, those with the same rank one after another.
void move_all(Comm* comm, std::vector<Move>& moves) {
    for (bool busy = true; busy && !comm->aborted;) {
        busy = false;
        bool waits[2][RANKS_MAX] = {};
        for (Move& move : moves) {
            if (move.done == move.bytes || waits[move.sends][move.peer]) continue;
            busy = waits[move.sends][move.peer] = true;
            Box& box = move.sends ? comm->shared->boxes[comm->rank][move.peer]
                                  : comm->shared->boxes[move.peer][comm->rank];
            if (move.sends && box.sent == box.taken) {
                box.bytes = std::min(move.bytes - move.done, PIECE);
                std::memcpy(box.data, move.at + move.done, box.bytes);
                move.done += box.bytes, ++box.sent;
            } else if (!move.sends && box.sent > box.taken) {
                if (box.bytes > move.bytes - move.done) {
                    comm->fail(INVALID_USAGE, "a rank sends more than another receives");
                    return;
                }
                std::memcpy(move.at + move.done, box.data, box.bytes);
                move.done += box.bytes, ++box.taken;
            }
        }
        if (busy) short_wait();
    }
}

using Work = std::function<void()>;

void run(void* data) {
    const std::unique_ptr<Work> work(static_cast<Work*>(data));
    (*work)();
}

// Begins a call, whose work goes to the stream once it was asked after.
int begin(Comm* comm, void* stream, Work work) {
    if (comm->state != SUCCESS) return failed(comm->state, comm->said);
    const char* until = setting("fails-after");
    if (until && comm->calls++ >= std::atoi(until)) {
        work = [comm] {
            while (!comm->aborted) short_wait();
        };
        comm->fail(REMOTE_ERROR, "a rank closed its connection");
        return cuLaunchHostFunc(stream, run, new Work(work)) ? CUDA_ERROR : SUCCESS;
    }
    comm->asked = 0;
    comm->call = [=] { return cuLaunchHostFunc(stream, run, new Work(work)); };
    return comm->state = IN_PROGRESS;
}

// Of this thread.
thread_local int depth = 0;
thread_local std::vector<Move> moves;
thread_local Comm* mover = nullptr;
thread_local void* moves_stream = nullptr;

int end_group() {
    if (mover == nullptr) return SUCCESS;
    Comm* comm = mover;
    mover = nullptr;
    return begin(comm, moves_stream, [comm, all = std::move(moves)]() mutable {
        move_all(comm, all);
    });
}

int move(bool sends, void* at, size_t count, int type, int peer, Comm* comm, void* stream) {
    if (!lives(comm) || type != F32 || peer < 0 || peer >= comm->ranks)
        return failed(INVALID_ARGUMENT, "no such communicator, type or rank");
    if (!on_device(at, count * 4)) return failed(INVALID_ARGUMENT, "memory of another device");
    if (mover == nullptr) moves.clear();
    mover = comm, moves_stream = stream;
    moves.push_back({sends, peer, static_cast<char*>(at), count * 4, 0});
    return depth ? SUCCESS : end_group();
}

struct Id {
    char bytes[128];
};

// As nccl.h's begins.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char* net_name;
    int split_share;
};

}  // namespace

EXPORTED int ncclGetVersion(int* version) {
    const char* other = setting("version");
    return *version = other ? std::atoi(other) : 22707, SUCCESS;
}
EXPORTED int ncclGetUniqueId(Id* id) {
    return make_shared(id->bytes) ? SUCCESS : failed(SYSTEM_ERROR, "no file in /dev/shm");
}
EXPORTED int ncclCommInitRankConfig(Comm** comm, int ranks, Id id, int rank, Config* config) {
    const bool known = config->size >= sizeof(Config) && config->magic == 0xcafebeef &&
                       config->version >= 21800 && config->blocking == 0 &&
                       config->cga_cluster_size == INT32_MIN && config->net_name == nullptr;
    if (!known || ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks)
        return failed(INVALID_ARGUMENT, "a configuration of another kind, or no such rank");
    int device = 0;
    if (cuCtxGetDevice(&device) != 0) return failed(CUDA_ERROR, "no device is current");
    auto* made = new Comm(rank, ranks, device);
    {
        const std::lock_guard lock(alive_mutex);
        alive.insert(made);
    }
    std::thread([made, name = std::string(id.bytes)] { made->init(name); }).detach();
    return *comm = made, IN_PROGRESS;
}
EXPORTED int ncclCommGetAsyncError(Comm* comm, int* state) {
    if (!lives(comm)) return failed(INVALID_ARGUMENT, "no such communicator");
    if (comm->call && !setting("call-hangs") && ++comm->asked == ASKED) {
        const auto call = std::move(comm->call);
        comm->call = nullptr;
        if (call() == 0) comm->state = SUCCESS;
        else comm->fail(CUDA_ERROR, "the stream takes no work");
    }
    *state = comm->state;
    if (*state != SUCCESS && *state != IN_PROGRESS) last_error = comm->said;
    return SUCCESS;
}
EXPORTED int ncclCommAbort(Comm* comm) {
    while (setting("abort-hangs")) sleep(1);
    const std::lock_guard lock(alive_mutex);
    if (alive.erase(comm) == 0) return failed(INVALID_ARGUMENT, "no such communicator");
    comm->aborted = true;
    return setting("abort-fails") ? failed(CUDA_ERROR, "memory stays in use") : SUCCESS;
}
EXPORTED int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm,
                           void* stream) {
    if (!lives(comm) || type != BF16 || op != 0 || from != to)
        return failed(INVALID_ARGUMENT, "no such communicator, type or sum");
    if (!on_device(to, count * 2)) return failed(INVALID_ARGUMENT, "memory of another device");
    return begin(comm, stream, [=] { comm->sum(static_cast<uint16_t*>(to), count); });
}
EXPORTED int ncclSend(const void* from, size_t count, int type, int peer, Comm* comm,
                      void* stream) {
    return move(true, const_cast<void*>(from), count, type, peer, comm, stream);
}
EXPORTED int ncclRecv(void* to, size_t count, int type, int peer, Comm* comm, void* stream) {
    return move(false, to, count, type, peer, comm, stream);
}
EXPORTED int ncclGroupStart() { return ++depth, SUCCESS; }
EXPORTED int ncclGroupEnd() {
    if (depth == 0) return failed(INVALID_USAGE, "no group was begun");
    return --depth ? SUCCESS : end_group();
}
EXPORTED const char* ncclGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "no error";
        case CUDA_ERROR: return "unhandled cuda error";
        case SYSTEM_ERROR: return "unhandled system error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        default: return "unknown result code";
    }
}
EXPORTED const char* ncclGetLastError(Comm*) { return last_error.c_str(); }
