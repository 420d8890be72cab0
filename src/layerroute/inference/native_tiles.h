// AMX: eight registers ("tiles") of up to sixteen rows of 64 bytes each, and products of whole tiles. Where the processor
// or the system has none, `tiles_allowed` says so and nothing else here is used.

#pragma once

#include "native_lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
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
// How tiles are laid out: sums in 0 and 1, a matrix in 2 and 3, vectors in 4 and 5.
struct TileShape {
    uint8_t sum_rows, matrix_rows, vector_rows;
    uint16_t sum_bytes, matrix_bytes, vector_bytes;  // of a row
};

static thread_local TileShape tile_shape = {};  // this thread's; all zero: its tiles are not in use

static inline void shape_tiles(const TileShape &wanted) {
    if (!memcmp(&wanted, &tile_shape, sizeof wanted)) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } all;
    for (int second = 0; second < 2; second++) {
        all.rows[second] = wanted.sum_rows, all.bytes[second] = wanted.sum_bytes;
        all.rows[2 + second] = wanted.matrix_rows, all.bytes[2 + second] = wanted.matrix_bytes;
        all.rows[4 + second] = wanted.vector_rows, all.bytes[4 + second] = wanted.vector_bytes;
    }
    _tile_loadconfig(&all);
    memcpy(&tile_shape, &wanted, sizeof wanted);
}
#endif

static inline void release_tiles() {
#if LAYERROUTE_TILES
    if (tile_shape.sum_rows) _tile_release();
    tile_shape = {};
#endif
}
