// Sixteen lanes at a time: the few vector operations the kernel is made of, with a plain version for any machine.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Counts __attribute__((vector_size(64)));

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits += 0x7FFF + ((bits >> 16) & 1);  // round to nearest, ties to even
    return (bf16)(bits >> 16);
}

static inline Lanes load(const float *at) {
    Lanes out;
    memcpy(&out, at, 64);
    return out;
}

static inline Lanes every(float value) { return value - Lanes{}; }

static inline Counts every(int32_t value) { return value - Counts{}; }

static inline Lanes to_float(Counts values) { return __builtin_convertvector(values, Lanes); }

// Sixteen bf16 as float.
static inline Lanes load_wide(const bf16 *at) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
#else
    Lanes out;
    for (int i = 0; i < 16; i++) out[i] = widen(at[i]);
    return out;
#endif
}

// Sixteen float16 as float.
static inline Lanes load_half(const uint16_t *at) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#else
    _Float16 halves[16];
    memcpy(halves, at, 32);
    Lanes out;
    for (int i = 0; i < 16; i++) out[i] = (float)halves[i];
    return out;
#endif
}

static inline uint16_t to_half(float value) {
    const _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static inline float from_half(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

// sum + a * b over 32 bf16, two to a lane.
static inline Lanes dot32(Lanes sum, const bf16 *a, const bf16 *b) {
#if defined(__AVX512BF16__)
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    for (int i = 0; i < 16; i++)
        sum[i] += widen(a[2 * i]) * widen(b[2 * i]) + widen(a[2 * i + 1]) * widen(b[2 * i + 1]);
    return sum;
#endif
}

// sum + codes * four: 64 unsigned codes, four to a lane, each four against the same four signed ones.
static inline Counts dot4(Counts sum, Counts codes, const int8_t *four) {
#if defined(__AVX512VNNI__)
    int32_t bits;
    memcpy(&bits, four, 4);
    return (Counts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(bits));
#else
    uint8_t bytes[64];
    memcpy(bytes, &codes, 64);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) sum[i] += (int32_t)bytes[4 * i + j] * four[j];
    return sum;
#endif
}

// The sums of the lanes of four vectors.
static inline void sum4(Lanes a, Lanes b, Lanes c, Lanes d, float *out) {
#if defined(__AVX512F__)
    const Lanes all[4] = {a, b, c, d};
    __m256 half[4];
    for (int i = 0; i < 4; i++)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)all[i]),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)all[i], 1)));
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
    const Lanes all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        out[i] = 0;
        for (int j = 0; j < 16; j++) out[i] += all[i][j];
    }
#endif
}

// exp to about 2e-7 relative between -87 and 87, and clamped there, in a form that vectorises.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    float power = x * 1.44269504f;
    float whole = std::floor(power);
    float f = (power - whole) * 0.693147181f;
    float series = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f +
                   f * (0.00138888889f + f * 0.000198412698f))))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return series * scale;
}
