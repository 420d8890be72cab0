// One token of several rows through the blocks they keep, fp32 residual: called from native.py. At the end what other
// modules call: products of packed matrices (quantised.py) and what prefill does between products (native_rows.py).
//
// Decoding is bound by the bytes of the weights, so everything here serves one aim: stream each kept matrix once,
// with all cores, and let nothing else take time. A row's result does not depend on which rows run beside it:
// every dot product is summed in the same order whatever the batch.

#include <omp.h>

#include "native_attention.h"
#include "native_formats.h"
#include "native_rows.h"
#include "native_team.h"

struct Shape {
    int64_t blocks, hidden, heads, kv_heads, head_dim, intermediate, vocab, gelu, bypass;  // bypass: the rank, or 0
    float eps, scale;
};

// N is what norms, biases, keys and values are kept in: float or bf16.
template <class N>
struct Block {
    Matrix qkv, out, gate_up, down, bypass_down, bypass_up;  // the last two of N, or null
    const N *norm_attention, *qkv_bias, *query_norm, *key_norm, *out_bias, *norm_mlp, *gate_up_bias, *down_bias;
    const float *cos, *sin;  // (positions, head_dim / 2)
    int64_t window;          // 0: none
};

template <class N>
struct Ends {
    Matrix embedding, head;
    const N *norm, *head_bias;
};

template <class N>
struct Rows {
    int64_t count;
    const int64_t *ids, *positions, *capacity;  // (count)
    const uint8_t *runs;                        // (count, blocks)
    N *const *keys, *const *values;             // (count, blocks): (kv_heads, capacity, head_dim)
    N *const *owed;                             // (count, blocks): residual (room, hidden), or null
    const int64_t *owed_start;                  // (count): position of the first owed token
};

struct Room {
    char *scratch;  // as many bytes as `layerroute_room` says, zero at first
    float *logits;  // (rows, vocab)
    float *entered;  // (blocks, rows, hidden): the residuals that enter each block, or null
    int64_t rows, longest, threads;  // what scratch is large enough for
};

struct Work {
    float *x;            // (rows, hidden)
    float *fused;        // (rows, qkv)
    float *low;          // (rows, bypass)
    float *parts;        // (rows, heads, stretches, head_dim + 16)
    std::atomic<int32_t> *done;  // (rows, kv_heads): stretches attended so far; zero between phases
    Vectors wide;        // what the next matrix reads
    Vectors normed;      // of this thread
    int64_t stretches;
};

// Lay the work of one thread out in `scratch`. Returns the bytes that all threads need.
static int64_t lay_out(const Shape &s, const Room &room, int64_t thread, Work *work) {
    int64_t at = 0;
    auto take = [&](int64_t bytes) {
        char *here = room.scratch + at;
        at += (bytes + 63) / 64 * 64;
        return here;
    };
    auto vectors = [&](int64_t width) {
        const int64_t each = (room.rows + 15) / 16 * 16 * width;  // tiles take sixteen at a time
        char *codes = take(4 * each);
        float *scale = (float *)take(each / 8);
        int32_t *offset = (int32_t *)take(each / 8);
        return Vectors{codes, scale, offset, (float *)take(each / 8), width, room.rows};
    };
    const int64_t query = s.heads * s.head_dim, keyed = s.kv_heads * s.head_dim;
    work->stretches = room.longest / STRETCH + 1;
    work->x = (float *)take(room.rows * s.hidden * 4);
    work->fused = (float *)take(room.rows * (query + 2 * keyed) * 4);
    work->low = (float *)take(room.rows * s.bypass * 4);
    work->parts = (float *)take(room.rows * s.heads * work->stretches * (s.head_dim + 16) * 4);
    work->done = (std::atomic<int32_t> *)take(room.rows * s.kv_heads * 4);
    work->wide = vectors(s.intermediate > query ? s.intermediate : query);
    for (int64_t t = 0; t < room.threads; t++) {
        const Vectors own = vectors(s.hidden);
        if (t == thread) work->normed = own;
    }
    return at;
}

extern "C" int64_t layerroute_room(const Shape *shape, const Room *room) {
    Work work;
    return lay_out(*shape, *room, 0, &work);
}

template <class N>
static inline float add(float sum, const N *bias, int64_t n) { return bias ? sum + widen(bias[n]) : sum; }

// Call `put(m, n, sum)` for every row n of `w` (n, k) that is this thread's and every vector m.
template <class F, class Put>
static inline void multiply(const Matrix &w, int64_t n, int64_t k, Vectors v, int64_t count, const Member &me, Put put) {
    int64_t at, last;
    float sums[MOST * 16];
    v = v.shaped(k, count);
    me.portion(n, 16, &at, &last);
    for (; at < last; at += 16) {
        const int64_t rows = at + 16 <= last ? 16 : last - at;
        F::panel(w, at, rows, k, v, count, sums);
        for (int64_t m = 0; m < count; m++)
            for (int64_t r = 0; r < rows; r++) put(m, at + r, sums[m * 16 + r]);
    }
}

template <class F>
static void normalise(const float *x, const typename F::Number *gain, int64_t n, float eps, const Vectors &v,
                      int64_t m) {
    const float factor = inverse_size(x, n, eps);
    for (int64_t i = 0; i < n; i += GROUP) {
        float some[GROUP];
        for (int j = 0; j < GROUP; j++) some[j] = x[i + j] * factor * widen(gain[i + j]);
        F::put(v, m, i, some);
    }
}

// The key and the value of a row's token, of one key head, into its cache.
template <class N>
static void store(const Shape &s, const Block<N> &b, int64_t index, const Rows<N> &rows, int64_t row, int64_t head,
                  const float *fused) {
    const int64_t d = s.head_dim, at = rows.positions[row], place = (head * rows.capacity[row] + at) * d;
    const float *key = fused + (s.heads + head) * d, *value = key + s.kv_heads * d;
    turn(key, b.key_norm, b.cos + at * d / 2, b.sin + at * d / 2, d, s.eps,
         rows.keys[row * s.blocks + index] + place);
    for (int64_t i = 0; i < d; i++) narrow(value[i], rows.values[row * s.blocks + index] + place + i);
}

// One stretch of one key head of one row.
template <class N>
static void attend_stretch(const Shape &s, const Block<N> &b, int64_t index, const Rows<N> &rows, int64_t row,
                           int64_t head, int64_t first, int64_t last, const float *fused, float *parts,
                           int64_t apart, Member &me) {
    const int64_t d = s.head_dim, at = rows.positions[row], group = s.heads / s.kv_heads;
    const float *cos = b.cos + at * d / 2, *sin = b.sin + at * d / 2;
    const int64_t place = head * rows.capacity[row];
    const N *keys = rows.keys[row * s.blocks + index], *values = rows.values[row * s.blocks + index];
    N queries[16 * 256];
    for (int64_t q = 0; q < group; q += 16) {
        const int64_t some = group - q < 16 ? group - q : 16;
        for (int64_t i = 0; i < some; i++)
            turn(fused + (head * group + q + i) * d, b.query_norm, cos, sin, d, s.eps, queries + i * d);
        attend_any(d, queries, some, keys + (place + first) * d, values + (place + first) * d, last - first + 1,
                   s.scale, parts + q * apart, apart, [&] { me.fetch_some(12); });
    }
}

// Take stretches as long as there are any; a row by itself also stores its key and value. Whoever finishes the last one of a head merges it.
template <class F>
static void attend_all(const Shape &s, const Block<typename F::Number> &b, int64_t index,
                       const Rows<typename F::Number> &rows, const int64_t *active, int64_t count, Work &work,
                       Member &me) {
    const int64_t d = s.head_dim, group = s.heads / s.kv_heads, each = d + 16;
    const Vectors wide = work.wide.shaped(s.heads * d, count);
    int64_t task = me.team->task.fetch_add(1, std::memory_order_relaxed), passed = 0;
    for (int64_t m = 0; m < count; m++) {
        const int64_t row = active[m], at = rows.positions[row];
        const int64_t first = b.window && at + 1 > b.window ? at + 1 - b.window : 0;
        const int64_t stretches = at / STRETCH - first / STRETCH + 1;
        for (; task < passed + s.kv_heads * stretches; task = me.team->task.fetch_add(1, std::memory_order_relaxed)) {
            const int64_t head = (task - passed) / stretches, c = (task - passed) % stretches;
            const int64_t start = (first / STRETCH + c) * STRETCH, end = start + STRETCH - 1;
            float *parts = work.parts + (m * s.heads + head * group) * work.stretches * each;
            const float *fused = work.fused + m * (s.heads + 2 * s.kv_heads) * d;
            if (count == 1 && end >= at) store(s, b, index, rows, row, head, fused);
            attend_stretch(s, b, index, rows, row, head, start > first ? start : first, end < at ? end : at,
                           fused, parts + c * each, work.stretches * each, me);
            std::atomic<int32_t> &done = work.done[m * s.kv_heads + head];
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < stretches) continue;
            done.store(0, std::memory_order_relaxed);
            for (int64_t q = 0; q < group; q++) {
                float merged[512];
                merge(parts + q * work.stretches * each, stretches, each, d, merged);
                for (int64_t i = 0; i < d; i += GROUP) F::put(wide, m, (head * group + q) * d + i, merged + i);
            }
        }
        passed += s.kv_heads * stretches;
    }
}

// gate and up side by side: their product needs both.
template <class F>
static void gate_up(const Shape &s, const Block<typename F::Number> &b, int64_t count, Work &work, const Member &me) {
    const int64_t h = s.hidden, inner = s.intermediate;
    int64_t at, last;
    float gate[MOST * 16], up[MOST * 16];
    const Vectors normed = work.normed.shaped(h, count), wide = work.wide.shaped(inner, count);
    float some[MOST][GROUP];
    me.portion(inner, GROUP, &at, &last);
    for (; at < last; at += 16) {
        F::panel(b.gate_up, at, 16, h, normed, count, gate);
        F::panel(b.gate_up, inner + at, 16, h, normed, count, up);
        const int64_t half = at % GROUP;
        for (int64_t m = 0; m < count; m++) {
            float *own = gate + m * 16, *other = up + m * 16;
            if (b.gate_up_bias)
                for (int r = 0; r < 16; r++) {
                    own[r] += widen(b.gate_up_bias[at + r]);
                    other[r] += widen(b.gate_up_bias[inner + at + r]);
                }
            gate16(own, other, s.gelu);
            memcpy(some[m] + half, own, 64);
            if (half) F::put(wide, m, at - 16, some[m]);
        }
    }
}

template <class F>
static void run_block(const Shape &s, const Block<typename F::Number> &b, int64_t index,
                      const Rows<typename F::Number> &rows, const int64_t *active, int64_t count, Work &work,
                      Member &me) {
    const int64_t h = s.hidden, d = s.head_dim, inner = s.intermediate;
    const int64_t query = s.heads * d, fused = query + 2 * s.kv_heads * d;
    const Vectors normed = work.normed.shaped(h, count);
    // Every thread normalises for itself: cheaper than meeting once more.
    for (int64_t m = 0; m < count; m++)
        normalise<F>(work.x + active[m] * h, b.norm_attention, h, s.eps, normed, m);
    multiply<F>(b.qkv, fused, h, work.normed, count, me, [&](int64_t m, int64_t n, float sum) {
        work.fused[m * fused + n] = add(sum, b.qkv_bias, n);
    });
    if (me.thread == 0) me.team->task.store(0, std::memory_order_relaxed);
    me.expect(b.out, h, 16, F::bytes(query));
    me.meet();
    if (count > 1) {
        // Rows may be successive tokens of one conversation: all keys are there before any row attends. A row by
        // itself stores its own where it attends to it, and saves a meeting.
        for (int64_t task = me.thread; task < count * s.kv_heads; task += me.threads)
            store(s, b, index, rows, active[task / s.kv_heads], task % s.kv_heads,
                  work.fused + task / s.kv_heads * fused);
        me.meet();
    }
    attend_all<F>(s, b, index, rows, active, count, work, me);
    me.meet();
    multiply<F>(b.out, h, query, work.wide, count, me, [&](int64_t m, int64_t n, float sum) {
        work.x[active[m] * h + n] += add(sum, b.out_bias, n);
    });
    me.expect(b.gate_up, inner, GROUP, F::bytes(h));
    me.meet();
    for (int64_t m = 0; m < count; m++)
        normalise<F>(work.x + active[m] * h, b.norm_mlp, h, s.eps, normed, m);
    gate_up<F>(s, b, count, work, me);
    me.expect(b.down, h, 16, F::bytes(inner));
    me.meet();
    multiply<F>(b.down, h, inner, work.wide, count, me, [&](int64_t m, int64_t n, float sum) {
        work.x[active[m] * h + n] += add(sum, b.down_bias, n);
    });
}

// What stands in for a block for `count` rows that skip it: x + up down norm(x).
template <class F>
static void pass_by(const Shape &s, const Block<typename F::Number> &b, const int64_t *passing, int64_t count,
                    Work &work, Member &me) {
    const int64_t h = s.hidden, rank = s.bypass;
    const Vectors normed = work.normed.shaped(h, count), low = work.normed.shaped(rank, count);
    for (int64_t m = 0; m < count; m++)
        normalise<F>(work.x + passing[m] * h, b.norm_attention, h, s.eps, normed, m);
    multiply<F>(b.bypass_down, rank, h, work.normed, count, me, [&](int64_t m, int64_t n, float sum) {
        work.low[m * rank + n] = sum;
    });
    me.meet();
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < rank; i += GROUP) F::put(low, m, i, work.low + m * rank + i);
    multiply<F>(b.bypass_up, h, rank, work.normed, count, me, [&](int64_t m, int64_t n, float sum) {
        work.x[passing[m] * h + n] += sum;
    });
    me.meet();
}

// The first block from `index` on that some row runs, or `blocks`.
template <class N>
static int64_t next_run(const Shape &s, const Rows<N> &rows, int64_t index) {
    for (; index < s.blocks; index++)
        for (int64_t m = 0; m < rows.count; m++)
            if (rows.runs[m * s.blocks + index]) return index;
    return index;
}

template <class F, class Outer>
static void decode(const Shape &s, const void *all_blocks, const void *both_ends, const void *all_rows,
                   const Room &room, Work work, Member me) {
    typedef typename F::Number N;
    const Block<N> *blocks = (const Block<N> *)all_blocks;
    const Ends<N> &ends = *(const Ends<N> *)both_ends;
    const Rows<N> &rows = *(const Rows<N> *)all_rows;
    const int64_t h = s.hidden, fused = (s.heads + 2 * s.kv_heads) * s.head_dim;
    for (int64_t m = me.thread; m < rows.count; m += me.threads)
        Outer::row(ends.embedding, rows.ids[m], h, work.x + m * h);
    me.meet();
    for (int64_t index = 0; index < s.blocks; index++) {
        int64_t active[MOST], passing[MOST], count = 0, passed = 0;
        if (room.entered)  // no thread changes x before all have met
            for (int64_t m = me.thread; m < rows.count; m += me.threads)
                memcpy(room.entered + (index * rows.count + m) * h, work.x + m * h, h * sizeof(float));
        for (int64_t m = 0; m < rows.count; m++) {
            if (rows.runs[m * s.blocks + index]) {
                active[count++] = m;
                continue;
            }
            passing[passed++] = m;
            if (N *owed = rows.owed[m * s.blocks + index]; owed && m % me.threads == me.thread) {
                owed += (rows.positions[m] - rows.owed_start[m]) * h;
                for (int64_t i = 0; i < h; i++) narrow(work.x[m * h + i], owed + i);
            }
        }
        if (passed && blocks[index].bypass_down.codes)
            pass_by<typename F::Unpacked>(s, blocks[index], passing, passed, work, me);
        if (!count) continue;
        run_block<F>(s, blocks[index], index, rows, active, count, work, me);
        const int64_t next = next_run(s, rows, index + 1);
        if (next < s.blocks)
            me.expect(blocks[next].qkv, fused, 16, F::bytes(h));
        else
            me.expect(ends.head, s.vocab, 16, Outer::bytes(h));
        me.meet();
    }
    const Vectors normed = work.normed.shaped(h, rows.count);
    for (int64_t m = 0; m < rows.count; m++) normalise<Outer>(work.x + m * h, ends.norm, h, s.eps, normed, m);
    multiply<Outer>(ends.head, s.vocab, h, normed, rows.count, me, [&](int64_t m, int64_t n, float sum) {
        room.logits[m * s.vocab + n] = add(sum, ends.head_bias, n);
    });
}

// `bits` of the blocks' matrices: 32, 16, 8 or 4; the embedding and the head have as many, but 8 for 4.
// Effects: writes keys, values, owed residuals and the logits. All pointers must stay valid for the call.
extern "C" void layerroute_decode(int64_t bits, const Shape *shape, const void *blocks, const void *ends,
                                  const void *rows, const Room *room) {
    Team team;
#pragma omp parallel num_threads(room->threads)
    {
        // The runtime may give fewer threads than asked.
        Member me{&team, omp_get_thread_num(), omp_get_num_threads()};
        Work work;
        lay_out(*shape, *room, me.thread, &work);
        if (bits == 32) decode<Dense<float>, Dense<float>>(*shape, blocks, ends, rows, *room, work, me);
#if LAYERROUTE_TILES
        if (bits == 16 && tiles_allowed()) {
            decode<Tiled, Tiled>(*shape, blocks, ends, rows, *room, work, me);
        } else
#endif
        if (bits == 16) decode<Dense<bf16>, Dense<bf16>>(*shape, blocks, ends, rows, *room, work, me);
        if (bits == 8) decode<Int8, Int8>(*shape, blocks, ends, rows, *room, work, me);
        if (bits == 4) decode<Int4, Int8>(*shape, blocks, ends, rows, *room, work, me);
        release_tiles();
    }
}

static const int64_t NEAR = 512 << 10;  // bytes of vectors that stay in the second cache

// This thread's part of a product. Vectors are written for all threads first; then a panel of the matrix, which stays in
// the first cache or the second, meets as many of them as stay in the second.
template <class F>
static void product(const Matrix &w, int64_t n, int64_t k, const float *x, int64_t count, float *out, const Vectors &v,
                    const Member &me) {
#pragma omp for
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < k; i += GROUP) F::put(v, m, i, x + m * k + i);
    const int64_t stretch = k * MOST < NEAR ? NEAR / (k * MOST) * MOST : MOST;
    int64_t first, last;
    float sums[MOST * 16];
    me.portion(n, 16, &first, &last);
    for (int64_t from = 0; from < count; from += stretch)
        for (int64_t at = first; at < last; at += 16) {
            const int64_t rows = at + 16 <= last ? 16 : last - at;
            for (int64_t m = from; m < count && m < from + stretch; m += MOST) {
                const int64_t some = count - m < MOST ? count - m : MOST, group = m * k / GROUP;
                const Vectors own{(int8_t *)v.codes + m * k, v.scale + group, v.offset + group, v.total + group, k, some};
                F::panel(w, at, rows, k, own, some, sums);
                for (int64_t i = 0; i < some; i++) memcpy(out + (m + i) * n + at, sums + i * 16, rows * sizeof(float));
            }
        }
}

// out (count, n) = x (count, k) times the rows of `w` (n, k) of `bits` 8 or 4.
extern "C" void layerroute_product(int64_t bits, const Matrix *w, int64_t n, int64_t k, const float *x, int64_t count,
                                   float *out, int64_t threads) {
    const int64_t held = (count + 15) / 16 * 16, groups = held * k / GROUP;  // tiles read sixteen vectors at a time
    char *codes = new char[held * k + groups * 12];
    float *scale = (float *)(codes + held * k), *total = scale + groups;
    const Vectors v{codes, scale, (int32_t *)(total + groups), total, k, held};
#pragma omp parallel num_threads(threads)
    {
        Member me{nullptr, omp_get_thread_num(), omp_get_num_threads()};
        if (bits == 8) product<Int8>(*w, n, k, x, count, out, v, me);
        if (bits == 4) product<Int4>(*w, n, k, x, count, out, v, me);
        release_tiles();
    }
    delete[] codes;
}

// Fill `w` of `bits` 8 or 4 from x (n, k), n a multiple of 16.
extern "C" void layerroute_pack(int64_t bits, const float *x, int64_t n, int64_t k, const Matrix *w, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; row += 16) {
        if (bits == 8) Int8::pack(x + row * k, k, *w, row);
        if (bits == 4) Int4::pack(x + row * k, k, *w, row);
    }
}

// The operations of native_rows.h on numbers of `bits` 32 or 16.
extern "C" void layerroute_normalise(int64_t bits, const void *x, const void *gain, int64_t tokens, int64_t n,
                                     float eps, void *out, int64_t threads) {
    if (bits == 32) normalise_rows((const float *)x, (const float *)gain, tokens, n, eps, (float *)out, threads);
    if (bits == 16) normalise_rows((const bf16 *)x, (const bf16 *)gain, tokens, n, eps, (bf16 *)out, threads);
}

extern "C" void layerroute_turn(int64_t bits, void *x, const void *gain, const void *cos, const void *sin,
                                int64_t tokens, int64_t apart, int64_t heads, int64_t d, float eps, int64_t threads) {
    if (bits == 32)
        turn_rows((float *)x, (const float *)gain, (const float *)cos, (const float *)sin, tokens, apart, heads, d, eps,
                  threads);
    if (bits == 16)
        turn_rows((bf16 *)x, (const bf16 *)gain, (const bf16 *)cos, (const bf16 *)sin, tokens, apart, heads, d, eps,
                  threads);
}

extern "C" void layerroute_gate(int64_t bits, const void *x, int64_t tokens, int64_t n, int64_t gelu, void *out,
                                int64_t threads) {
    if (bits == 32) gate_rows((const float *)x, tokens, n, gelu, (float *)out, threads);
    if (bits == 16) gate_rows((const bf16 *)x, tokens, n, gelu, (bf16 *)out, threads);
}
