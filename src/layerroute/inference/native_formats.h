// The formats a matrix may have, each with the vectors it multiplies. A format is a struct with
//   Number what norms, biases, keys and values are kept in
//   Unpacked  the format of matrices of Number that are not packed
//   put    writes 32 numbers of a vector the way the format wants to read them
//   panel  multiplies 16 rows of a matrix with `count` vectors: out (count, 16)
//   row    widens one row, for the embedding
//   pack   fills sixteen rows, the packed formats only
// A panel's sums for one vector are taken in the same order whatever `count` is.

#pragma once

#include <type_traits>

#include "native_tiles.h"

static const int64_t MOST = 64;      // rows in one call, a multiple of the sixteen that tiles read
static const int64_t GROUP = 32;     // numbers of a vector that share a scale
static const int64_t FAR = 2048;     // bytes that a stream is fetched ahead
static const int64_t ENOUGH = 12;    // vectors of int8 that tiles multiply quicker than lanes

struct Matrix {
    const void *codes, *scales;
};

// `count` vectors of `width` numbers. fp32 and bf16: `codes` alone.
struct Vectors {
    void *codes;      // float, bf16 or int8 (count, width); Tiled has its own order
    float *scale;     // (count, width / GROUP): a number is its code times this
    int32_t *offset;  // (count, width / GROUP): -128 times the sum of the codes
    float *total;     // (count, width / GROUP): the sum of the numbers
    int64_t width, count;

    Vectors shaped(int64_t new_width, int64_t new_count) const {
        return {codes, scale, offset, total, new_width, new_count};
    }
};

// Into the second cache: the first one has too few misses in flight for a stream.
static inline void fetch(const void *at) { __builtin_prefetch(at, 0, 2); }

// Call with as many vectors at a time as may be: `MOST_AT_ONCE`, then fewer. Three at a time leave no last one alone.
template <int MOST_AT_ONCE, class Call>
static inline void in_groups(int64_t count, Call call) {
    int64_t m = 0;
    for (; m + MOST_AT_ONCE <= count && (MOST_AT_ONCE != 3 || m + 4 != count); m += MOST_AT_ONCE)
        call(std::integral_constant<int, MOST_AT_ONCE>(), m);
    for (; m + 2 <= count; m += 2) call(std::integral_constant<int, 2>(), m);
    if (m < count) call(std::integral_constant<int, 1>(), m);
}

// fp32 or bf16, (out, in) as torch has it.
template <class N>
struct Dense {
    typedef N Number;
    typedef Dense Unpacked;

    static const int LINES = sizeof(N) / 2;  // of memory that 32 numbers take

    static size_t bytes(int64_t width) { return sizeof(N) * width; }

    static void put(const Vectors &v, int64_t m, int64_t at, const float *x) {
        N *out = (N *)v.codes + m * v.width + at;
        for (int i = 0; i < GROUP; i++) narrow(x[i], out + i);
    }

    // One row times one vector: where nothing is to be widened, memory is read fastest in one stream.
    static Lanes stream(const N *w, const N *v, int64_t k) {
        Lanes sum = {};
        for (int64_t i = 0; i < k; i += 32) {
            for (int line = 0; line < LINES; line++) fetch((const char *)(w + i) + FAR + 64 * line);
            sum = dot32(sum, w + i, v + i);
        }
        return sum;
    }

    // R rows times MB vectors, side by side: a register is loaded (and widened) once for all that it meets, and sums
    // wait for each other less.
    template <int R, int MB>
    static void tile(const N *const w[R], const N *v, int64_t k, Lanes *sums) {
        typedef Registers<N> Of;
        Floats sum[MB * R][PARTS] = {};
        for (int64_t i = 0; i < k; i += 32)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++)
#pragma GCC unroll 2
                for (int step = 0; step < Of::STEPS; step++) {
                    typename Of::Register row[R];
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) {
                        if (!part && step < LINES) fetch((const char *)(w[r] + i + 2 * R * k) + 64 * step);
                        hold(row[r] = Of::take(w[r] + i, step, part));
                    }
#pragma GCC unroll 4
                    for (int m = 0; m < MB; m++) {
                        typename Of::Register vector = Of::take(v + m * k + i, step, part);
                        hold(vector);
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++)
                            sum[m * R + r][part] = Of::add_product(sum[m * R + r][part], row[r], vector);
                    }
                }
        for (int t = 0; t < MB * R; t++) sums[t] = lanes_of(sum[t]);
    }

    // Rows and vectors of a tile: what the registers hold, of AVX-512, AVX2 and others.
    static const int TALL = REGISTER == 64 ? 4 : 2;
    static const int WIDE = REGISTER == 64 ? 4 : REGISTER == 32 && sizeof(N) == 4 ? 3 : 2;

    template <int MB>
    static void four_rows(const N *const w[4], const N *v, int64_t k, float *out) {
        Lanes sums[4 * MB];
        if constexpr (MB == 1 && !Registers<N>::WIDENS) {
            for (int r = 0; r < 4; r++) sums[r] = stream(w[r], v, k);
        } else {
            const int R = MB == 1 ? 4 : TALL;
            Lanes some[R * MB];
            for (int first = 0; first < 4; first += R) {
                tile<R, MB>(w + first, v, k, some);
                for (int m = 0; m < MB; m++)
                    for (int r = 0; r < R; r++) sums[m * 4 + first + r] = some[m * R + r];
            }
        }
        for (int m = 0; m < MB; m++)
            sum4(sums[m * 4], sums[m * 4 + 1], sums[m * 4 + 2], sums[m * 4 + 3], out + m * 16);
    }

    static void panel(const Matrix &w, int64_t n, int64_t rows, int64_t k, const Vectors &v, int64_t count,
                      float *out) {
        const N *codes = (const N *)w.codes + n * k, *vectors = (const N *)v.codes;
        for (int64_t r = 0; r < rows; r += 4) {
            const N *four[4];
            for (int i = 0; i < 4; i++) four[i] = codes + (r + i < rows ? r + i : rows - 1) * k;
            in_groups<WIDE>(count, [&](auto size, int64_t m) {
                four_rows<size.value>(four, vectors + m * k, k, out + m * 16 + r);
            });
        }
    }

    static void row(const Matrix &w, int64_t n, int64_t k, float *out) {
        for (int64_t i = 0; i < k; i++) out[i] = widen(((const N *)w.codes)[n * k + i]);
    }
};

#if LAYERROUTE_TILES
// bf16 by tiles: sixteen rows of the matrix, as torch has them, times up to sixteen vectors. A row of a tile of vectors
// has a pair of numbers of each, so codes are (groups of sixteen vectors, width / 2, columns, 2).
struct Tiled {
    typedef bf16 Number;
    typedef Tiled Unpacked;

    static size_t bytes(int64_t width) { return 2 * width; }

    static int64_t columns(int64_t count) { return count < 16 ? count : 16; }

    static void put(const Vectors &v, int64_t m, int64_t at, const float *x) {
        const int64_t side = columns(v.count);
        bf16 *out = (bf16 *)v.codes + (m / 16 * 16 * v.width) + (at / 2 * side + m % 16) * 2;
        bf16 some[GROUP];
        for (int i = 0; i < GROUP; i++) narrow(x[i], some + i);
        for (int i = 0; i < GROUP; i += 2) memcpy(out + i * side, some + i, 4);
    }

    static void panel(const Matrix &w, int64_t n, int64_t rows, int64_t k, const Vectors &v, int64_t count,
                      float *out) {
        const bf16 *codes = (const bf16 *)w.codes + n * k;
        const int64_t side = columns(count);
        alignas(64) float sums[256];
        alignas(64) bf16 last[16 * GROUP] = {};  // rows of the last panel of a matrix, and none below it
        shape_tiles({16, (uint16_t)(4 * side), (uint16_t)(4 * side)});
        for (int64_t m = 0; m < count; m += 16) {
            const bf16 *vectors = (const bf16 *)v.codes + m * k;
            _tile_zero(0);
            for (int64_t i = 0; i < k; i += GROUP) {
                // The next panel, in the order in which it lies in memory, while this one is multiplied.
                for (int line = 0; !m && line < 16; line++) fetch((const char *)(codes + 16 * k + 16 * i) + 64 * line);
                if (rows < 16)
                    for (int64_t r = 0; r < rows; r++) memcpy(last + r * GROUP, codes + r * k + i, 2 * GROUP);
                memory_is_read();
                _tile_loadd(1, rows < 16 ? last : codes + i, rows < 16 ? 2 * GROUP : 2 * k);
                _tile_loadd(2, vectors + i * side, 4 * side);
                _tile_dpbf16ps(0, 1, 2);
                memory_is_read();
            }
            _tile_stored(0, sums, 4 * side);
            for (int64_t c = 0; c < side && m + c < count; c++)
                for (int r = 0; r < 16; r++) out[(m + c) * 16 + r] = sums[r * side + c];
        }
    }

    static void row(const Matrix &w, int64_t n, int64_t k, float *out) { Dense<bf16>::row(w, n, k, out); }
};
#endif

// What int8 and int4 read: int8 with a scale per group.
struct Coded {
    typedef bf16 Number;
    typedef Dense<bf16> Unpacked;

    static void put(const Vectors &v, int64_t m, int64_t at, const float *x) {
        float sizes[GROUP];
        for (int i = 0; i < GROUP; i++) sizes[i] = std::fabs(x[i]);
        const float most = largest(sizes, GROUP), all = total(sizes, GROUP);
        const float inverse = most > 0 ? 127 / most : 0;
        int8_t *out = (int8_t *)v.codes + m * v.width + at;
        int32_t sum = 0, codes[GROUP];
        for (int i = 0; i < GROUP; i++) codes[i] = (int32_t)std::nearbyint(x[i] * inverse);
        for (int i = 0; i < GROUP; i++) sum += codes[i];
        for (int i = 0; i < GROUP; i++) out[i] = (int8_t)codes[i];
        const int64_t group = (m * v.width + at) / GROUP;
        v.scale[group] = std::isfinite(all) ? most / 127 : NAN;  // what is not finite stays so
        v.offset[group] = -128 * sum;
        v.total[group] = v.scale[group] * sum;
    }
};

// codes (n / 16, k / 4, 16, 4) of 0 .. 255 around 128, one float scale per row.
struct Int8 : Coded {
    static size_t bytes(int64_t width) { return width; }

    template <int MB>
    static inline void some(const uint8_t *w, const float *scales, int64_t k, const Vectors &v, int64_t m, float *out) {
        const int8_t *codes = (const int8_t *)v.codes + m * k;
        const int64_t groups = k / GROUP;
        Lanes sum[MB] = {};
        for (int64_t g = 0; g < groups; g++, w += 512) {
            Counts dots[MB];
            for (int i = 0; i < MB; i++) dots[i] = every(v.offset[(m + i) * groups + g]);
            for (int j = 0; j < 8; j++) {
                const Counts bytes = read<Counts>(w + 64 * j);
                fetch(w + 64 * j + FAR);
                for (int i = 0; i < MB; i++) dots[i] = dot4(dots[i], bytes, codes + i * k + g * GROUP + 4 * j);
            }
            for (int i = 0; i < MB; i++)
                sum[i] = add_product(sum[i], to_float(dots[i]), every(v.scale[(m + i) * groups + g]));
        }
        for (int i = 0; i < MB; i++) {
            sum[i] = sum[i] * load(scales);
            store(out + i * 16, sum[i]);
        }
    }

#if LAYERROUTE_TILES
    // Sixteen vectors by tiles, of which `count` are wanted: whole numbers have the same sum in any order, and floats
    // are added as in `some`. Reads sixteen even where fewer are left: buffers hold a multiple of sixteen.
    static void sixteen(const uint8_t *w, const float *scales, int64_t k, const Vectors &v, int64_t m, int64_t count,
                        float *out) {
        const int8_t *codes = (const int8_t *)v.codes + m * k;
        const int64_t groups = k / GROUP;
        alignas(64) int32_t sums[256];  // (vectors, rows)
        Lanes sum[16] = {};
        shape_tiles({8, 64, GROUP});
        for (int64_t g = 0; g < groups; g++, w += 512) {
            for (int line = 0; line < 8; line++) fetch(w + 64 * line + FAR);
            memory_is_read();
            _tile_zero(0);
            _tile_loadd(1, w, 64);
            _tile_loadd(2, codes + g * GROUP, k);
            _tile_dpbsud(0, 2, 1);
            _tile_stored(0, sums, 64);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t at = (m + i) * groups + g;
                const Counts found = read<Counts>(sums + 16 * i) + every(v.offset[at]);
                sum[i] = add_product(sum[i], to_float(found), every(v.scale[at]));
            }
        }
        for (int64_t i = 0; i < count && i < 16; i++) store(out + i * 16, sum[i] * load(scales));
    }
#endif

    static void panel(const Matrix &w, int64_t n, int64_t, int64_t k, const Vectors &v, int64_t count, float *out) {
        const uint8_t *codes = (const uint8_t *)w.codes + n * k;
        const float *scales = (const float *)w.scales + n;
        int64_t done = 0;
#if LAYERROUTE_TILES
        for (; tiles_allowed() && count - done >= ENOUGH; done += 16)
            sixteen(codes, scales, k, v, done, count - done, out + done * 16);
#endif
        in_groups<TOGETHER>(count - done, [&](auto size, int64_t m) {
            some<size.value>(codes, scales, k, v, done + m, out + (done + m) * 16);
        });
    }

    static void pack(const float *x, int64_t k, const Matrix &w, int64_t n) {
        uint8_t *codes = (uint8_t *)w.codes + n * k;
        for (int64_t r = 0; r < 16; r++, x += k) {
            float most = 0;
            for (int64_t i = 0; i < k; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
            const float scale = ((float *)w.scales)[n + r] = most / 127, inverse = 1 / (scale > 1e-30f ? scale : 1e-30f);
            for (int64_t i = 0; i < k; i++)
                codes[i / 4 * 64 + r * 4 + i % 4] = (uint8_t)((int32_t)std::nearbyint(x[i] * inverse) + 128);
        }
    }

    static void row(const Matrix &w, int64_t n, int64_t k, float *out) {
        const uint8_t *codes = (const uint8_t *)w.codes + n / 16 * 16 * k + n % 16 * 4;
        const float scale = ((const float *)w.scales)[n];
        for (int64_t i = 0; i < k; i++) out[i] = (codes[i / 4 * 64 + i % 4] - 128) * scale;
    }
};

// codes (n / 16, k / 8, 16, 4): a byte holds the number at 8 j + b low and the one at 8 j + 4 + b high, 0 .. 15;
// scales float16 (n / 16, k / 32, 2, 16): a number is code * first + second.
struct Int4 : Coded {
    static size_t bytes(int64_t width) { return width / 2; }

    template <int MB>
    static inline void some(const uint8_t *w, const uint16_t *scales, int64_t k, const Vectors &v, int64_t m,
                            float *out) {
        const int8_t *codes = (const int8_t *)v.codes + m * k;
        const int64_t groups = k / GROUP;
        Lanes sum[MB] = {};
        for (int64_t g = 0; g < groups; g++, w += 256, scales += 32) {
            Counts dots[MB] = {};
            for (int j = 0; j < 4; j++) {
                const Counts bytes = read<Counts>(w + 64 * j);
                fetch(w + 64 * j + FAR);
                const Counts low = bytes & 0x0F0F0F0F, high = bytes >> 4 & 0x0F0F0F0F;
                for (int i = 0; i < MB; i++) {
                    const int8_t *at = codes + i * k + g * GROUP + 8 * j;
                    dots[i] = dot4_small(dot4_small(dots[i], low, at), high, at + 4);
                }
            }
            fetch((const char *)scales + FAR / 4);
            Lanes slope = load_half(scales), least = load_half(scales + 16);
            for (int i = 0; i < MB; i++) {
                const int64_t at = (m + i) * groups + g;
                sum[i] = add_product(sum[i], to_float(dots[i]), slope * every(v.scale[at]));
                sum[i] = add_product(sum[i], least, every(v.total[at]));
            }
        }
        for (int i = 0; i < MB; i++) store(out + i * 16, sum[i]);
    }

    static void panel(const Matrix &w, int64_t n, int64_t, int64_t k, const Vectors &v, int64_t count, float *out) {
        in_groups<TOGETHER>(count, [&](auto size, int64_t m) {
            some<size.value>((const uint8_t *)w.codes + n * k / 2, (const uint16_t *)w.scales + n * k / 16, k, v, m,
                             out + m * 16);
        });
    }

    static void pack(const float *x, int64_t k, const Matrix &w, int64_t n) {
        uint8_t *codes = (uint8_t *)w.codes + n * k / 2;
        uint16_t *scales = (uint16_t *)w.scales + n * k / 16;
        for (int64_t r = 0; r < 16; r++, x += k)
            for (int64_t g = 0; g < k; g += GROUP) {
                float low = x[g], high = x[g];
                for (int64_t i = g; i < g + GROUP; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
                uint16_t *at = scales + g + r;
                at[0] = to_half((high - low) / 15), at[16] = to_half(low);
                const float scale = from_half(at[0]), least = from_half(at[16]);
                const float inverse = 1 / (scale > 1e-30f ? scale : 1e-30f);
                uint8_t four[GROUP];
                for (int64_t i = 0; i < GROUP; i++) {
                    const float code = std::nearbyint((x[g + i] - least) * inverse);
                    four[i] = (uint8_t)(code < 0 ? 0 : code > 15 ? 15 : code);
                }
                for (int64_t i = 0; i < GROUP; i++)
                    if (i % 8 < 4) codes[(g + i) / 8 * 64 + r * 4 + i % 4] = four[i] | four[i + 4] << 4;
            }
    }
};
