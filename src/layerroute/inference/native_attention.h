// Attention of one token over its row's cache, cut into stretches of positions that threads share out.
//
// A stretch is the same set of positions whoever runs it, and stretches are merged in their order, so the result
// depends neither on the number of threads nor on other rows.

#pragma once

#include "native_lanes.h"

static const int64_t STRETCH = 128;

// One head, normalised if the family does so, rotated, as it is kept.
template <class N>
static inline void turn(const float *head, const N *gain, const float *cos, const float *sin, int64_t d, float eps,
                        N *out) {
    float kept[512];
    const float factor = gain ? inverse_size(head, d, eps) : 1.0f;
    for (int64_t i = 0; i < d; i++) kept[i] = gain ? head[i] * factor * widen(gain[i]) : head[i];
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        narrow(kept[i] * cos[i] - kept[i + half] * sin[i], out + i);
        narrow(kept[i + half] * cos[i] + kept[i] * sin[i], out + i + half);
    }
}

// Q queries (Q, d) of one key head over `length` positions. Each one's softmax so far, unfinished, goes to
// out[q * apart]: largest score, sum of exponentials, weighted values.
template <int D32, int Q, class N, class Fetch>
static void attend(const N *queries, const N *keys, const N *values, int64_t length, float scale, float *out,
                   int64_t apart, Fetch fetch_next) {
    const int64_t d = D32 * 32;
    alignas(64) float scores[Q][STRETCH + 16];
    for (int64_t j = 0; j < length; j += 4) {
        const N *key[4];  // beyond the end the last one is read again and its score not used
        for (int i = 0; i < 4; i++) key[i] = keys + (j + i < length ? j + i : length - 1) * d;
        fetch_next();
        for (int q = 0; q < Q; q++) {
            Lanes sum[4] = {};
            for (int part = 0; part < D32; part++)
                for (int i = 0; i < 4; i++)
                    sum[i] = dot32(sum[i], key[i] + part * 32, queries + q * d + part * 32);
            sum4(sum[0], sum[1], sum[2], sum[3], scores[q] + j);
        }
    }
    const int64_t whole = (length + 15) / 16 * 16;
    for (int q = 0; q < Q; q++) {
        for (int64_t j = 0; j < length; j++) scores[q][j] *= scale;
        for (int64_t j = length; j < whole; j++) scores[q][j] = -INFINITY;
        const float most = largest(scores[q], whole);
        for (int64_t j = 0; j < length; j++) scores[q][j] = exponential(scores[q][j] - most);
        for (int64_t j = length; j < whole; j++) scores[q][j] = 0;
        out[q * apart] = most;
        out[q * apart + 1] = total(scores[q], whole);
    }
    // As many parts of the values side by side as there are registers for their sums.
    const int parts = REGISTER == 64 ? 2 * D32 : 1;
    for (int part = 0; part < 2 * D32; part += parts) {
        Lanes sums[Q][parts] = {};
        for (int64_t j = 0; j < length; j++)
            for (int p = 0; p < parts; p++) {
                const Lanes value = load_wide(values + j * d + (part + p) * 16);
                for (int q = 0; q < Q; q++) sums[q][p] = add_product(sums[q][p], value, every(scores[q][j]));
            }
        for (int q = 0; q < Q; q++)
            for (int p = 0; p < parts; p++) store(out + q * apart + 16 + (part + p) * 16, sums[q][p]);
    }
}

// All queries of a key head, as many at a time as registers hold.
template <int D32, class N, class Fetch>
static void attend_group(const N *queries, int64_t group, const N *keys, const N *values, int64_t length, float scale,
                         float *out, int64_t apart, Fetch next) {
    const int64_t d = D32 * 32;
    int64_t q = 0;
    if (D32 <= 2)
        for (; q + 3 <= group && q + 4 != group; q += 3)
            attend<D32, 3>(queries + q * d, keys, values, length, scale, out + q * apart, apart, next);
    for (; q + 2 <= group; q += 2)
        attend<D32, 2>(queries + q * d, keys, values, length, scale, out + q * apart, apart, next);
    for (; q < group; q++)
        attend<D32, 1>(queries + q * d, keys, values, length, scale, out + q * apart, apart, next);
}

template <class N, class Fetch>
static void attend_any(int64_t d, const N *queries, int64_t group, const N *keys, const N *values, int64_t length,
                       float scale, float *out, int64_t apart, Fetch next) {
    switch (d) {
        case 32: return attend_group<1>(queries, group, keys, values, length, scale, out, apart, next);
        case 64: return attend_group<2>(queries, group, keys, values, length, scale, out, apart, next);
        case 96: return attend_group<3>(queries, group, keys, values, length, scale, out, apart, next);
        case 128: return attend_group<4>(queries, group, keys, values, length, scale, out, apart, next);
        case 256: return attend_group<8>(queries, group, keys, values, length, scale, out, apart, next);
    }
}

// Finish the softmax of one query from its partial results, `count` of them, `apart` floats apart.
static inline void merge(const float *parts, int64_t count, int64_t apart, int64_t d, float *out) {
    float most = -INFINITY, total = 0;
    for (int64_t c = 0; c < count; c++) most = parts[c * apart] > most ? parts[c * apart] : most;
    for (int64_t i = 0; i < d; i++) out[i] = 0;
    for (int64_t c = 0; c < count; c++) {
        const float factor = exponential(parts[c * apart] - most), *sums = parts + c * apart + 16;
        total += parts[c * apart + 1] * factor;
        for (int64_t i = 0; i < d; i++) out[i] += sums[i] * factor;
    }
    for (int64_t i = 0; i < d; i++) out[i] /= total;
}
