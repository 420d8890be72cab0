// One token of several rows through the blocks they keep, bf16 weights, fp32 residual. Called from native.py.
//
// Decoding is bound by the bytes of the weights, so everything here serves one aim: stream each kept matrix once,
// with all cores, and let nothing else take time. A row's result does not depend on which rows run beside it:
// every dot product is summed in the same order whatever the batch.

#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;

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

// exp for x <= 0 to about 2e-7 relative, in a form that vectorises.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
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

extern "C" {

struct Shape {
    int64_t blocks, hidden, heads, kv_heads, head_dim, intermediate, vocab, gelu;
    float eps, scale;
};

struct Block {
    const bf16 *norm_attention, *qkv, *qkv_bias, *query_norm, *key_norm, *out, *out_bias;
    const bf16 *norm_mlp, *gate_up, *gate_up_bias, *down, *down_bias;
    const float *cos, *sin;  // (positions, head_dim / 2)
    int64_t window;          // 0: none
};

struct Rows {
    int64_t count;
    const int64_t *ids, *positions, *capacity;  // (count)
    const uint8_t *runs;                        // (count, blocks)
    bf16 *const *keys, *const *values;          // (count, blocks): (kv_heads, capacity, head_dim)
    bf16 *const *owed;                          // (count, blocks): residual (room, hidden), or null
    const int64_t *owed_start;                  // (count): position of the first owed token
};

struct Work {
    float *x;       // (count, hidden)
    bf16 *wide;     // (count, max(hidden, query, intermediate)): what the next matrix reads
    bf16 *normed;   // (threads, count, hidden)
    float *fused;   // (count, qkv)
    float *scores;  // (threads, longest)
    float *logits;  // (count, vocab)
    int64_t longest;  // positions that `scores` has room for, per thread
    int64_t threads;  // as many as `normed` and `scores` are made for
};

}  // extern "C"

// 4 rows of a matrix times MB vectors. `w` (4, k), vectors `v` (MB, stride); sums go to out[m * 4 + r].
template <int R, int MB>
static inline void tile(const bf16 *w, const bf16 *v, int64_t k, int64_t stride, float *out) {
#if defined(__AVX512BF16__)
    __m512 sum[R][MB];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < MB; m++) sum[r][m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
        __m512bh a[MB];
        for (int m = 0; m < MB; m++) a[m] = (__m512bh)_mm512_loadu_si512(v + m * stride + i);
        for (int r = 0; r < R; r++) {
            const bf16 *at = w + r * k + i;
            // The next tile follows this one in memory.
            _mm_prefetch((const char *)(at + R * k), _MM_HINT_T0);
            __m512bh b = (__m512bh)_mm512_loadu_si512(at);
            for (int m = 0; m < MB; m++) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], b, a[m]);
        }
    }
    for (int m = 0; m < MB; m++)
        for (int r = 0; r < R; r++) out[m * R + r] = _mm512_reduce_add_ps(sum[r][m]);
#else
    for (int m = 0; m < MB; m++)
        for (int r = 0; r < R; r++) {
            float lane[16] = {0};
            const bf16 *a = v + m * stride, *b = w + r * k;
            for (int64_t i = 0; i < k; i += 16)
                for (int j = 0; j < 16; j++) lane[j] += widen(a[i + j]) * widen(b[i + j]);
            float sum = 0;
            for (int j = 0; j < 16; j++) sum += lane[j];
            out[m * R + r] = sum;
        }
#endif
}

// Rows n .. n + R of `w` (.., k) times all `count` vectors; out (count, R).
template <int R>
static inline void rows_times(const bf16 *w, const bf16 *v, int64_t k, int64_t stride, int64_t count, float *out) {
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) tile<R, 4>(w, v + m * stride, k, stride, out + m * R);
    for (; m + 2 <= count; m += 2) tile<R, 2>(w, v + m * stride, k, stride, out + m * R);
    if (m < count) tile<R, 1>(w, v + m * stride, k, stride, out + m * R);
}

static const int64_t MOST = 64;  // rows in one call

// The matrix rows of one thread, in whole tiles.
static inline void portion(int64_t n, int64_t grain, int64_t thread, int64_t threads, int64_t *first, int64_t *last) {
    int64_t tiles = (n + grain - 1) / grain;
    *first = tiles * thread / threads * grain;
    *last = tiles * (thread + 1) / threads * grain;
    if (*last > n) *last = n;
}

// Call `put(m, n, sum)` for every row n of `w` (n, k) that is this thread's and every vector m.
template <class Put>
static inline void multiply(const bf16 *w, int64_t n, int64_t k, const bf16 *v, int64_t stride, int64_t count,
                            int64_t thread, int64_t threads, Put put) {
    int64_t at, last;
    float sums[MOST * 4];
    portion(n, 4, thread, threads, &at, &last);
    for (; at + 4 <= last; at += 4) {
        rows_times<4>(w + at * k, v, k, stride, count, sums);
        for (int64_t m = 0; m < count; m++)
            for (int r = 0; r < 4; r++) put(m, at + r, sums[m * 4 + r]);
    }
    for (; at < last; at++) {
        rows_times<1>(w + at * k, v, k, stride, count, sums);
        for (int64_t m = 0; m < count; m++) put(m, at, sums[m]);
    }
}

static inline void normalise(const float *x, const bf16 *gain, int64_t n, float eps, bf16 *out) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float factor = 1.0f / std::sqrt(sum / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = narrow(x[i] * factor * widen(gain[i]));
}

// One head, normalised if the family does so, rotated, rounded.
static inline void turn(const float *head, const bf16 *gain, const float *cos, const float *sin, int64_t d, float eps,
                        bf16 *out) {
    float kept[512];
    float factor = 1.0f;
    if (gain) {
        float sum = 0;
        for (int64_t i = 0; i < d; i++) sum += head[i] * head[i];
        factor = 1.0f / std::sqrt(sum / d + eps);
    }
    for (int64_t i = 0; i < d; i++) kept[i] = gain ? head[i] * factor * widen(gain[i]) : head[i];
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = narrow(kept[i] * cos[i] - kept[i + half] * sin[i]);
        out[i + half] = narrow(kept[i + half] * cos[i] + kept[i] * sin[i]);
    }
}

static inline float dot(const bf16 *a, const bf16 *b, int64_t d) {
    float out;
    tile<1, 1>(a, b, d, d, &out);
    return out;
}

// Attention of one query head of one row over positions first .. position.
static inline void attend(const bf16 *query, const bf16 *keys, const bf16 *values, int64_t first, int64_t position,
                          int64_t d, float scale, float *scores, bf16 *out) {
    int64_t length = position - first + 1;
    const bf16 *k = keys + first * d, *v = values + first * d;
    float most = -INFINITY, total = 0, sums[512];
    for (int64_t j = 0; j < length; j++) scores[j] = dot(k + j * d, query, d) * scale;
    for (int64_t j = 0; j < length; j++) most = scores[j] > most ? scores[j] : most;
    for (int64_t j = 0; j < length; j++) scores[j] = exponential(scores[j] - most);
    for (int64_t j = 0; j < length; j++) total += scores[j];
    for (int64_t i = 0; i < d; i++) sums[i] = 0;
    for (int64_t j = 0; j < length; j++)
        for (int64_t i = 0; i < d; i++) sums[i] += scores[j] * widen(v[j * d + i]);
    for (int64_t i = 0; i < d; i++) out[i] = narrow(sums[i] / total);
}

static inline float activate(float gate, int64_t gelu) {
    if (gelu) return 0.5f * gate * (1.0f + std::tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
    return gate / (1.0f + std::exp(-gate));
}

static void run_block(const Shape &s, const Block &b, int64_t index, const Rows &rows, const int64_t *active,
                      int64_t count, Work &work, int64_t thread, int64_t threads) {
    const int64_t h = s.hidden, d = s.head_dim, inner = s.intermediate;
    const int64_t query = s.heads * d, keyed = s.kv_heads * d, fused = query + 2 * keyed;
    bf16 *normed = work.normed + thread * rows.count * h;  // every thread has its own: cheaper than a barrier
    for (int64_t m = 0; m < count; m++)
        normalise(work.x + active[m] * h, b.norm_attention, h, s.eps, normed + m * h);
    multiply(b.qkv, fused, h, normed, h, count, thread, threads, [&](int64_t m, int64_t n, float sum) {
        work.fused[m * fused + n] = sum + (b.qkv_bias ? widen(b.qkv_bias[n]) : 0.0f);
    });
#pragma omp barrier
    // Keys and values first, by key head: every query head of the group needs them.
    for (int64_t task = thread; task < count * s.kv_heads; task += threads) {
        int64_t m = task / s.kv_heads, head = task % s.kv_heads, row = active[m], at = rows.positions[row];
        const float *mine = work.fused + m * fused + query + head * d;
        int64_t place = (head * rows.capacity[row] + at) * d;
        turn(mine, b.key_norm, b.cos + at * d / 2, b.sin + at * d / 2, d, s.eps,
             rows.keys[row * s.blocks + index] + place);
        for (int64_t i = 0; i < d; i++) rows.values[row * s.blocks + index][place + i] = narrow(mine[keyed + i]);
    }
#pragma omp barrier
    for (int64_t task = thread; task < count * s.heads; task += threads) {
        int64_t m = task / s.heads, head = task % s.heads, row = active[m], at = rows.positions[row];
        int64_t shared = head / (s.heads / s.kv_heads) * rows.capacity[row] * d;
        bf16 turned[512];
        turn(work.fused + m * fused + head * d, b.query_norm, b.cos + at * d / 2, b.sin + at * d / 2, d, s.eps, turned);
        int64_t first = b.window && at + 1 > b.window ? at + 1 - b.window : 0;
        attend(turned, rows.keys[row * s.blocks + index] + shared, rows.values[row * s.blocks + index] + shared, first,
               at, d, s.scale, work.scores + thread * work.longest, work.wide + m * query + head * d);
    }
#pragma omp barrier
    multiply(b.out, h, query, work.wide, query, count, thread, threads, [&](int64_t m, int64_t n, float sum) {
        work.x[active[m] * h + n] += sum + (b.out_bias ? widen(b.out_bias[n]) : 0.0f);
    });
#pragma omp barrier
    for (int64_t m = 0; m < count; m++) normalise(work.x + active[m] * h, b.norm_mlp, h, s.eps, normed + m * h);
    int64_t at, last;
    float gate[MOST * 4], up[MOST * 4];
    portion(inner, 4, thread, threads, &at, &last);
    for (; at < last; at += 4) {  // native.py admits only intermediate sizes that 4 divides
        rows_times<4>(b.gate_up + at * h, normed, h, h, count, gate);
        rows_times<4>(b.gate_up + (inner + at) * h, normed, h, h, count, up);
        for (int64_t m = 0; m < count; m++)
            for (int r = 0; r < 4; r++) {
                float g = gate[m * 4 + r], u = up[m * 4 + r];
                if (b.gate_up_bias) {
                    g += widen(b.gate_up_bias[at + r]);
                    u += widen(b.gate_up_bias[inner + at + r]);
                }
                work.wide[m * inner + at + r] = narrow(activate(g, s.gelu) * u);
            }
    }
#pragma omp barrier
    multiply(b.down, h, inner, work.wide, inner, count, thread, threads, [&](int64_t m, int64_t n, float sum) {
        work.x[active[m] * h + n] += sum + (b.down_bias ? widen(b.down_bias[n]) : 0.0f);
    });
#pragma omp barrier
}

// Effects: writes keys, values, owed residuals and work.logits. All pointers must stay valid for the call.
extern "C" void layerroute_decode(const Shape *shape, const Block *blocks, const bf16 *embedding, const bf16 *norm,
                                  const bf16 *head, const bf16 *head_bias, const Rows *given, Work *work) {
    const Shape &s = *shape;
    const Rows &rows = *given;
    const int64_t h = s.hidden;
    for (int64_t m = 0; m < rows.count; m++)
        for (int64_t i = 0; i < h; i++) work->x[m * h + i] = widen(embedding[rows.ids[m] * h + i]);
#pragma omp parallel num_threads(work->threads)
    {
        // The runtime may give fewer threads than asked.
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t index = 0; index < s.blocks; index++) {
            int64_t active[MOST], count = 0;
            for (int64_t m = 0; m < rows.count; m++) {
                if (rows.runs[m * s.blocks + index]) {
                    active[count++] = m;
                } else if (bf16 *owed = rows.owed[m * s.blocks + index]; owed && m % threads == thread) {
                    owed += (rows.positions[m] - rows.owed_start[m]) * h;
                    for (int64_t i = 0; i < h; i++) owed[i] = narrow(work->x[m * h + i]);
                }
            }
            if (count) run_block(s, blocks[index], index, rows, active, count, *work, thread, threads);
        }
        bf16 *normed = work->normed + thread * rows.count * h;
        for (int64_t m = 0; m < rows.count; m++) normalise(work->x + m * h, norm, h, s.eps, normed + m * h);
        multiply(head, s.vocab, h, normed, h, rows.count, thread, threads, [&](int64_t m, int64_t n, float sum) {
            work->logits[m * s.vocab + n] = sum + (head_bias ? widen(head_bias[n]) : 0.0f);
        });
    }
}
