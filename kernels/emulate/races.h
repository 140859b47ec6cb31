// Races on shared memory: two threads touch a byte, one of them writes, and nothing between the two
// accesses orders them.
//
// Kernels are compiled with the compiler's thread sanitizer, whose calls at every access come here
// instead of to its own library. Order is kept in vector clocks: a barrier joins the clocks of its
// threads, a warp operation those of its lanes, an mbarrier hands them from who arrives to who
// waits. Of other warps a thread knows one clock each: what a single lane hands over counts for its
// warp, so that a race behind it may be missed, but none is reported that is not there. Global
// memory is not watched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace races {

#ifdef LOCKSTEP_RACES
// A block of `threads` threads begins.
void begin(unsigned threads, const void* shared, size_t bytes);
// All of `threads` have waited for each other.
void join(const std::vector<unsigned>& threads);
// Thread `thread` puts what it knows into `clock`, or takes what is there.
using Clock = std::vector<uint32_t>;
void release(unsigned thread, Clock& clock);
void acquire(unsigned thread, const Clock& clock);
// The running thread accesses memory by other means than its own loads and stores.
void touch(const void* at, size_t bytes, bool write);
#else
inline void begin(unsigned, const void*, size_t) {}
inline void join(const std::vector<unsigned>&) {}
struct Clock {};
inline void release(unsigned, Clock&) {}
inline void acquire(unsigned, const Clock&) {}
inline void touch(const void*, size_t, bool) {}
#endif

}  // namespace races
