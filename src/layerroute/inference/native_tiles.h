// AMX: eight registers ("tiles") of up to sixteen rows of 64 bytes each, and products of whole tiles. Where the processor
// or the system has none, `tiles_allowed` says so and nothing else here is used.

#pragma once

#include "native_lanes.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define LAYERROUTE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether this process may use tiles: the system grants them on request, once for all threads.
static inline bool tiles_allowed() {
#if LAYERROUTE_TILES
    const int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
#else
    return false;
#endif
}

#if LAYERROUTE_TILES
// How tiles are laid out: sums in 0, a matrix in 1, vectors in 2. Sums and vectors have sixteen rows, a row of a matrix
// has 64 bytes. One sum waits for itself, but less long than memory takes to bring the next rows.
struct TileShape {
    uint16_t matrix_rows, sum_bytes, vector_bytes;
};

static thread_local TileShape tile_shape = {};  // this thread's; all zero: its tiles are not in use

static inline void shape_tiles(const TileShape &wanted) {
    if (!memcmp(&wanted, &tile_shape, sizeof wanted)) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } all;
    all.rows[0] = 16, all.bytes[0] = wanted.sum_bytes;
    all.rows[1] = (uint8_t)wanted.matrix_rows, all.bytes[1] = 64;
    all.rows[2] = 16, all.bytes[2] = wanted.vector_bytes;
    asm volatile("" : : "r"(&all) : "memory");  // the intrinsic says that it reads eight bytes
    _tile_loadconfig(&all);
    tile_shape = wanted;
}

// Around loads of tiles, which don't tell the compiler what they read.
static inline void memory_is_read() { asm volatile("" ::: "memory"); }
#endif

static inline void release_tiles() {
#if LAYERROUTE_TILES
    if (tile_shape.matrix_rows) _tile_release();
    tile_shape = {};
#endif
}
