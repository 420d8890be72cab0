// Sixteen lanes at a time: the few vector operations the kernel is made of. AVX-512 has one register for them, AVX2
// two, other machines get what the compiler makes of four.
//
// Sums are taken in the order written (native_library.py), products of dot products rounded once, so that a dot product is
// the same number wherever it is inlined.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;

// Two vectors that work as one of twice the width: GCC keeps a vector wider than a register in memory, but not the
// members of a struct.
template <class Half>
struct Pair {
    Half low, high;
};

template <class H> static inline Pair<H> operator+(Pair<H> a, Pair<H> b) { return {a.low + b.low, a.high + b.high}; }
template <class H> static inline Pair<H> operator*(Pair<H> a, Pair<H> b) { return {a.low * b.low, a.high * b.high}; }
template <class H> static inline Pair<H> operator&(Pair<H> a, int32_t b) { return {a.low & b, a.high & b}; }
template <class H> static inline Pair<H> operator<<(Pair<H> a, int b) { return {a.low << b, a.high << b}; }
template <class H> static inline Pair<H> operator>>(Pair<H> a, int b) { return {a.low >> b, a.high >> b}; }

#if defined(__AVX512F__)
static const int REGISTER = 64;
#elif defined(__AVX2__)
static const int REGISTER = 32;
#else
static const int REGISTER = 16;
#endif

typedef float Floats __attribute__((vector_size(REGISTER)));
typedef int32_t Ints __attribute__((vector_size(REGISTER)));

#if defined(__AVX512F__)
typedef Floats Lanes;
typedef Ints Counts;
#elif defined(__AVX2__)
typedef Pair<Floats> Lanes;
typedef Pair<Ints> Counts;
#else
typedef Pair<Pair<Floats>> Lanes;
typedef Pair<Pair<Ints>> Counts;
#endif

// Vectors that packed matrices multiply side by side: what the registers hold.
static const int TOGETHER = REGISTER == 64 ? 4 : 2;

// How many registers the sixteen lanes take.
static const int PARTS = 64 / REGISTER;

static inline Floats to_float(Ints values) { return __builtin_convertvector(values, Floats); }
static inline Floats bits_as_float(Ints bits) { return (Floats)bits; }

template <class H>
static inline auto to_float(Pair<H> values) -> Pair<decltype(to_float(values.low))> {
    return {to_float(values.low), to_float(values.high)};
}

template <class H>
static inline auto bits_as_float(Pair<H> bits) -> Pair<decltype(bits_as_float(bits.low))> {
    return {bits_as_float(bits.low), bits_as_float(bits.high)};
}

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline float widen(float value) { return value; }

static inline void narrow(float value, bf16 *out) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits += 0x7FFF + ((bits >> 16) & 1);  // round to nearest, ties to even
    *out = (bf16)(bits >> 16);
}

static inline void narrow(float value, float *out) { *out = value; }

// Member by member: a struct copied whole goes through memory.
template <class Vector>
static inline void copy_in(Vector &vector, const char *at) {
    memcpy(&vector, at, sizeof vector);
}

template <class H>
static inline void copy_in(Pair<H> &pair, const char *at) {
    copy_in(pair.low, at);
    copy_in(pair.high, at + sizeof(H));
}

template <class Vector>
static inline void copy_out(char *at, const Vector &vector) {
    memcpy(at, &vector, sizeof vector);
}

template <class H>
static inline void copy_out(char *at, const Pair<H> &pair) {
    copy_out(at, pair.low);
    copy_out(at + sizeof(H), pair.high);
}

template <class Vector>
static inline Vector read(const void *at) {
    Vector out;
    copy_in(out, (const char *)at);
    return out;
}

static inline Lanes load(const float *at) { return read<Lanes>(at); }
static inline void store(float *at, const Lanes &lanes) { copy_out((char *)at, lanes); }

static inline void fill(Floats &lanes, float value) { lanes = value - Floats{}; }
static inline void fill(Ints &lanes, int32_t value) { lanes = value - Ints{}; }

template <class H, class Value>
static inline void fill(Pair<H> &lanes, Value value) {
    fill(lanes.low, value);
    lanes.high = lanes.low;
}

static inline Lanes every(float value) {
    Lanes out;
    fill(out, value);
    return out;
}

static inline Counts every(int32_t value) {
    Counts out;
    fill(out, value);
    return out;
}

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

static inline uint16_t to_half(float value) {
    const Half half = (Half)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static inline float from_half(uint16_t bits) {
    Half half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

// sum + a * b, rounded once where the processor can. Left to the compiler, it would depend on what stands around it.
static inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

template <class H>
static inline Pair<H> add_product(Pair<H> sum, Pair<H> a, Pair<H> b) {
    return {add_product(sum.low, a.low, b.low), add_product(sum.high, a.high, b.high)};
}

// Sixteen bf16 as float.
static inline Lanes load_wide(const bf16 *at) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(at)), 16);
#elif defined(__AVX2__)
    auto half = [](const bf16 *some) {
        return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(some)), 16);
    };
    return {half(at), half(at + 8)};
#else
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = widen(at[i]);
    return load(out);
#endif
}

static inline Lanes load_wide(const float *at) { return load(at); }

static inline void store_narrow(bf16 *at, const Lanes &lanes) {
#if defined(__AVX512BF16__)
    const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)lanes);
    memcpy(at, &narrowed, sizeof narrowed);
#else
    float wide[16];
    store(wide, lanes);
    for (int i = 0; i < 16; i++) narrow(wide[i], at + i);
#endif
}

static inline void store_narrow(float *at, const Lanes &lanes) { store(at, lanes); }

// Sixteen float16 as float.
static inline Lanes load_half(const uint16_t *at) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtph_ps(read<__m256i>(at));
#elif defined(__AVX2__) && defined(__F16C__)
    return {(Floats)_mm256_cvtph_ps(read<__m128i>(at)), (Floats)_mm256_cvtph_ps(read<__m128i>(at + 8))};
#else
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = from_half(at[i]);
    return load(out);
#endif
}

// sum + a * b over 32 bf16, two to a lane.
static inline Lanes dot32(Lanes sum, const bf16 *a, const bf16 *b) {
#if defined(__AVX512BF16__)
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#else
    const int32_t upper = (int32_t)0xFFFF0000;
    const Counts both_a = read<Counts>(a), both_b = read<Counts>(b);
    sum = add_product(sum, bits_as_float(both_a << 16), bits_as_float(both_b << 16));
    return add_product(sum, bits_as_float(both_a & upper), bits_as_float(both_b & upper));
#endif
}

// sum + a * b over 32 float.
static inline Lanes dot32(Lanes sum, const float *a, const float *b) {
    return add_product(add_product(sum, load(a), load(b)), load(a + 16), load(b + 16));
}

// Thirty-two numbers, register by register, as dot32 takes them: the same products added in the same order. `STEPS`
// registers for each part of the lanes; `WIDENS` if a number must become a float before it is multiplied.
template <class N> struct Registers;

template <>
struct Registers<float> {
    static const bool WIDENS = false;
    static const int STEPS = 2;
    typedef Floats Register;

    static Register take(const float *at, int step, int part) {
        return read<Floats>(at + 16 * step + 16 / PARTS * part);
    }
    static Floats add_product(Floats sum, Register a, Register b) { return ::add_product(sum, a, b); }
};

template <>
struct Registers<bf16> {
#if defined(__AVX512BF16__)
    static const bool WIDENS = false;
    static const int STEPS = 1;
    typedef Ints Register;

    static Register take(const bf16 *at, int, int) { return read<Ints>(at); }
    static Floats add_product(Floats sum, Register a, Register b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
#else
    static const bool WIDENS = true;
    static const int STEPS = 2;
    typedef Floats Register;

    static Register take(const bf16 *at, int step, int part) {
        const Ints both = read<Ints>(at + 32 / PARTS * part);
        return bits_as_float(step ? both & (int32_t)0xFFFF0000 : both << 16);
    }
    static Floats add_product(Floats sum, Register a, Register b) { return ::add_product(sum, a, b); }
#endif
};

// Have a register hold `value` from here on: left to itself the compiler loads it again for each product.
template <class Register>
static inline void hold(Register &value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#else
    (void)value;
#endif
}

static inline Lanes lanes_of(const Floats *parts) {
#if defined(__AVX512F__)
    return parts[0];
#elif defined(__AVX2__)
    return {parts[0], parts[1]};
#else
    return {{parts[0], parts[1]}, {parts[2], parts[3]}};
#endif
}

// sum + codes * four: 64 unsigned codes, four to a lane, each four against the same four signed ones.
static inline Counts dot4(Counts sum, Counts codes, const int8_t *four) {
#if defined(__AVX512VNNI__)
    return (Counts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(read<int32_t>(four)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // The even and the odd bytes as 16 bits: products of pairs then fit.
    const __m256i all = _mm256_set1_epi32(read<int32_t>(four)), odd = _mm256_srai_epi16(all, 8);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
    auto half = [&](Ints so_far, Ints some) {
        const __m256i low = _mm256_and_si256((__m256i)some, _mm256_set1_epi16(255));
        const __m256i high = _mm256_srli_epi16((__m256i)some, 8);
        return so_far + (Ints)_mm256_madd_epi16(low, even) + (Ints)_mm256_madd_epi16(high, odd);
    };
    return {half(sum.low, codes.low), half(sum.high, codes.high)};
#else
    for (int i = 0; i < 4; i++) sum = sum + (codes >> 8 * i & 255) * every((int32_t)four[i]);
    return sum;
#endif
}

// The same for codes of 0 .. 15.
static inline Counts dot4_small(Counts sum, Counts codes, const int8_t *four) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i all = _mm256_set1_epi32(read<int32_t>(four)), ones = _mm256_set1_epi16(1);
    auto half = [&](Ints so_far, Ints some) {
        return so_far + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)some, all), ones);
    };
    return {half(sum.low, codes.low), half(sum.high, codes.high)};
#else
    return dot4(sum, codes, four);
#endif
}

// The sums of the lanes of four vectors.
static inline void sum4(Lanes a, Lanes b, Lanes c, Lanes d, float *out) {
#if defined(__AVX2__)
    const Lanes all[4] = {a, b, c, d};
    __m256 half[4];
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)all[i]),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)all[i], 1)));
#else
        half[i] = (__m256)(all[i].low + all[i].high);
#endif
    }
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
    const Lanes all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        float lanes[16], sum = 0;
        store(lanes, all[i]);
        for (int j = 0; j < 16; j++) sum += lanes[j];
        out[i] = sum;
    }
#endif
}

// The largest and the sum of n numbers, n a multiple of 16.
static inline float largest(const float *x, int64_t n) {
    float lanes[16];
    memcpy(lanes, x, 64);
    for (int64_t i = 16; i < n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
    return lanes[0];
}

static inline float sum_of(const Lanes &sum) {
    float lanes[16];
    store(lanes, sum);
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

static inline float total(const float *x, int64_t n) {
    Lanes sum = {};
    for (int64_t i = 0; i < n; i += 16) sum = sum + load(x + i);
    return sum_of(sum);
}

// The factor that gives n numbers, a multiple of 16, a mean square of one.
template <class N>
static inline float inverse_size(const N *x, int64_t n, float eps) {
    Lanes squares = {};
    for (int64_t i = 0; i < n; i += 16) {
        const Lanes some = load_wide(x + i);
        squares = add_product(squares, some, some);
    }
    return 1.0f / std::sqrt(sum_of(squares) / n + eps);
}

// exp to 1e-7 relative between -60 and 60, and clamped there, in a form that vectorises. Not as far as floats go:
// the compiler computes what follows for the clamped value too, in every lane, and numbers below 1e-38 are slow.
static inline float exponential(float x) {
    x = x < -60.0f ? -60.0f : x;
    x = x > 60.0f ? 60.0f : x;
    const float whole = std::nearbyint(x * 1.44269504f);
    const float f = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts: the first times whole is exact
    const float series = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f +
                         f * (0.00138888889f + f * 0.000198412698f))))));
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return series * scale;
}
