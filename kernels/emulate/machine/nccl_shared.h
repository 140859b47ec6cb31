// What the ranks of one group of the NCCL in host memory share, as threads or as processes: a file
// in memory that the id names.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int RANKS_MAX = 8;
constexpr size_t PIECE = 64 << 10;

// One rank's bytes on their way to another, a piece at a time.
struct Box {
    std::atomic<uint64_t> sent, taken;
    uint64_t bytes;
    char data[PIECE];
};

struct Shared {
    // Of each rank: its device and 1, meetings it has come to, and how many numbers it sums.
    std::atomic<int> device[RANKS_MAX];
    std::atomic<uint64_t> at[RANKS_MAX];
    uint64_t count[RANKS_MAX];
    char part[RANKS_MAX][PIECE];
    Box boxes[RANKS_MAX][RANKS_MAX];
};

// Files that nobody may have opened, for the end of the process.
struct Files {
    std::mutex mutex;
    std::vector<std::string> names;
    ~Files() {
        for (const std::string& name : names) unlink(name.c_str());
    }
};
Files files;

void short_wait() { usleep(50); }

// A new file's name, into an id of 128 bytes.
bool make_shared(char* id) {
    static std::atomic<int> number;
    std::snprintf(id, 128, "/dev/shm/fake-nccl-%d-%d", getpid(), number++);
    const int file = open(id, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return false;
    close(file);
    const std::lock_guard lock(files.mutex);
    return files.names.emplace_back(id), true;
}

// Null where there is no such file.
Shared* open_shared(const char* id) {
    const int file = open(id, O_RDWR | O_CLOEXEC);
    if (file < 0) return nullptr;
    void* at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return at == MAP_FAILED ? nullptr : static_cast<Shared*>(at);
}

float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    return std::memcpy(&value, &wide, 4), value;
}

uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
