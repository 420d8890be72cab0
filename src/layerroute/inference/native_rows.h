// What lies between two products, a token at a time: one pass over memory where torch takes several.

#pragma once

#include "native_lanes.h"

// own (16) = the activation of own times other (16). Not inlined: between other loops the compiler makes sixteen steps
// of it.
__attribute__((noinline)) static void gate16(float *__restrict own, const float *__restrict other, int64_t gelu) {
    for (int i = 0; i < 16; i++) {
        // tanh(y) is 1 - 2 / (1 + exp(2 y)), which turns the gelu into the same form as the silu.
        const float x = own[i], y = gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
        own[i] = x / (1.0f + exponential(-y)) * other[i];
    }
}

// out (tokens, n) = x (tokens, n) normalised, times gain (n); n a multiple of 16.
template <class N>
static void normalise_rows(const N *x, const N *gain, int64_t tokens, int64_t n, float eps, N *out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const Lanes factor = every(inverse_size(x + t * n, n, eps));
        for (int64_t i = 0; i < n; i += 16)
            store_narrow(out + t * n + i, load_wide(x + t * n + i) * factor * load_wide(gain + i));
    }
}

// Rotates `heads` heads of d numbers in place, each normalised before if there is a gain (d); a token's lie `apart`
// numbers after the last one's. cos and sin (tokens, d / 2); d a multiple of 32.
template <class N>
static void turn_rows(N *x, const N *gain, const N *cos, const N *sin, int64_t tokens, int64_t apart, int64_t heads,
                      int64_t d, float eps, int64_t threads) {
    const int64_t half = d / 2;
#pragma omp parallel for num_threads(threads) if (tokens > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            N *low = x + t * apart + h * d, *high = low + half;
            const Lanes factor = every(gain ? inverse_size(low, d, eps) : 1.0f);
            for (int64_t i = 0; i < half; i += 16) {
                Lanes a = load_wide(low + i), b = load_wide(high + i);
                if (gain) {
                    a = a * factor * load_wide(gain + i);
                    b = b * factor * load_wide(gain + half + i);
                }
                const Lanes c = load_wide(cos + t * half + i), s = load_wide(sin + t * half + i);
                store_narrow(low + i, add_product(a * c, b * every(-1.0f), s));
                store_narrow(high + i, add_product(b * c, a, s));
            }
        }
}

// out (tokens, n) = the activation of the first half of x (tokens, 2 n) times the second; n a multiple of 16.
template <class N>
static void gate_rows(const N *x, int64_t tokens, int64_t n, int64_t gelu, N *out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const N *gate = x + t * 2 * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            float own[16], other[16];
            store(own, load_wide(gate + i));
            store(other, load_wide(up + i));
            gate16(own, other, gelu);
            store_narrow(out + t * n + i, load(own));
        }
    }
}
