// Detects two threads of a block that touch the same shared byte, one of them writing, with no barrier between.
#pragma once

#include <cstddef>

namespace simt::races {

// Watches the two pieces of shared memory of the block that starts now.
void watch(const unsigned char* fixed, size_t fixed_bytes, const unsigned char* dynamic, size_t dynamic_bytes);

void block_synchronized();           // all threads of the block
void warp_synchronized(int warp);    // all living lanes of one warp
void running(int thread);            // the thread that runs from now on; -1 for the host

}  // namespace simt::races
