// Attention of every text to itself, head by head.

#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

// e^x for x <= 0, to 2 units in the last place: Cephes' expf (S. L. Moshier, 1989), without its branches.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = std::nearbyint(x * 1.44269504088896341f);
    const float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f * f + f + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

constexpr int LANES = 16;  // of the widest vectors
constexpr int BLOCK = 8;   // queries at a time

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
inline const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// out[r][j] = sum over c of left[r][c] * right[c][j], for BLOCK rows r. left: rows of stride. right: (depth, width); width: of whole lanes.
inline void products(const float* left, int64_t stride, int64_t depth, const float* right, int64_t width, float* out) {
    for (int64_t j = 0; j < width; j += LANES) {
        Lanes sums[BLOCK] = {};
        for (int64_t c = 0; c < depth; ++c) {
            const Lanes column = lanes(right + c * width + j);
            for (int r = 0; r < BLOCK; ++r) sums[r] += left[r * stride + c] * column;
        }
        for (int r = 0; r < BLOCK; ++r) lanes(out + r * width + j) = sums[r];
    }
}

// accumulated[j][c] += sum over r of left[r][j] * right[r][c], for BLOCK rows r. accumulated: (count, depth). left: rows of stride.
inline void outer_products(const float* left, int64_t stride, const float* right, int64_t depth, int64_t count, float* accumulated) {
    for (int64_t c = 0; c < depth; c += LANES) {
        Lanes rows[BLOCK];
        for (int r = 0; r < BLOCK; ++r) rows[r] = lanes(right + r * depth + c);
        for (int64_t j = 0; j < count; ++j) {
            Lanes sum = lanes(accumulated + j * depth + c);
            for (int r = 0; r < BLOCK; ++r) sum += left[r * stride + j] * rows[r];
            lanes(accumulated + j * depth + c) = sum;
        }
    }
}

// What all of attention's loops are given: B texts; the queries of text e are rows queries[e] to queries[e + 1], its keys and values rows
// keys[e] to keys[e + 1]; heads stand side by side in a row.
struct Texts {
    const int64_t *queries, *keys;
    int64_t texts, heads, depth;  // depth: of a head
    const int64_t* dropout;       // a key per text, or null
    Noise noise;
    float scaling;
};

// One head of one text. width: its keys, in whole lanes. depth: its columns, in whole lanes. column: the first one.
struct Head {
    int64_t first_query, end, first_key, count, width, depth, column;
    uint64_t dropout;

    Head(const Texts& texts, int64_t e, int64_t h)
        : first_query(texts.queries[e]), end(texts.queries[e + 1]), first_key(texts.keys[e]), count(texts.keys[e + 1] - first_key),
          width(padded(count)), depth(padded(texts.depth)), column(h * texts.depth),
          dropout(texts.dropout ? mixed(texts.dropout[e], uint64_t(h)) : 0) {}

    uint64_t row_key(int64_t query) const { return mixed(dropout, uint64_t(query - first_query)); }
};

// Rows of a head in float: (count, padded depth), zero where depth is padded and behind the last row of a block.
template <class T>
void copy_rows(const T* from, int64_t stride, int64_t count, int64_t depth, float* to, int64_t block = 0) {
    const int64_t whole = padded(depth);
    for (int64_t i = count * whole; i < block * whole; ++i) to[i] = 0.0f;
    for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
        for (int64_t c = 0; c < depth; ++c) to[j * whole + c] = widen(from[j * stride + c]);
        for (int64_t c = depth; c < whole; ++c) to[j * whole + c] = 0.0f;
    }
}

template <class T>
void write_rows(const float* from, int64_t count, int64_t depth, T* to, int64_t stride) {
    const int64_t whole = padded(depth);
    for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
        for (int64_t c = 0; c < depth; ++c) to[j * stride + c] = narrow<T>(from[j * whole + c]);
    }
}

// (count, depth) to (depth, width), zero behind the last row.
inline void transpose(const float* rows, int64_t count, int64_t depth, int64_t width, float* to) {
    for (int64_t c = 0; c < depth; ++c) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) to[c * width + j] = rows[j * depth + c];
        for (int64_t j = count; j < width; ++j) to[c * width + j] = 0.0f;
    }
}

// One thread's memory for the head it works on, grown to the longest text it meets.
struct Scratch {
    std::vector<float> memory;
    std::vector<int64_t> words;
    float* next = nullptr;

    void begin(int64_t floats, int64_t room) {
        if (int64_t(words.size()) < room / 4) words.resize(size_t(room / 4));
        if (int64_t(memory.size()) < floats) memory.resize(size_t(floats));
        next = memory.data();
    }
    float* take(int64_t floats) {
        float* taken = next;
        next += floats;
        return taken;
    }
};

// A head's keys and values as the loops want them, in scratch's memory: 3 * depth * width of it.
struct KeysAndValues {
    float *k, *kt, *v;

    template <class T>
    KeysAndValues(const Head& head, const T* keys, const T* values, int64_t stride, int64_t depth, Scratch& scratch)
        : k(scratch.take(head.depth * head.width)), kt(scratch.take(head.depth * head.width)), v(scratch.take(head.depth * head.width)) {
        const int64_t first = head.first_key * stride + head.column;
        copy_rows(keys + first, stride, head.count, depth, k);
        transpose(k, head.count, head.depth, head.width, kt);
        copy_rows(values + first, stride, head.count, depth, v);
    }
};

// out: rows of `heads * depth`. logs: (rows of queries, heads), log of the softmax's denominator, for the backward pass.
template <class T>
void attention(const Texts& texts, const T* queries, int64_t query_stride, const T* keys, const T* values, int64_t key_stride, T* out,
               float* logs) {
    const int64_t depth = texts.depth, heads = texts.heads;
    const float scaling = texts.scaling;  // a copy: writes to other floats cannot change it
#pragma omp parallel
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < texts.texts * heads; ++task) {
            const int64_t h = task % heads;
            const Head head(texts, task / heads, h);
            const int64_t width = head.width, count = head.count, room = Noise::room(width);
            scratch.begin(3 * head.depth * width + 2 * BLOCK * head.depth + BLOCK * width + room, room);
            const KeysAndValues side(head, keys, values, key_stride, depth, scratch);
            float *q = scratch.take(BLOCK * head.depth), *o = scratch.take(BLOCK * head.depth);
            float *weights = scratch.take(BLOCK * width), *factors = scratch.take(room);
            for (int64_t first = head.first_query; first < head.end; first += BLOCK) {
                const int64_t rows = head.end - first < BLOCK ? head.end - first : BLOCK;
                copy_rows(queries + first * query_stride + head.column, query_stride, rows, depth, q, BLOCK);
                products(q, head.depth, head.depth, side.kt, width, weights);
                for (int64_t r = 0; r < rows; ++r) {
                    float* w = weights + r * width;
                    float most = w[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
                    for (int64_t j = 0; j < width; ++j) most = j < count && w[j] > most ? w[j] : most;
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < width; ++j) {
                        w[j] = j < count ? exponential((w[j] - most) * scaling) : 0.0f;
                        sum += w[j];
                    }
                    logs[(first + r) * heads + h] = most * scaling + std::log(sum);
                    const float inverse = 1.0f / sum;
                    if (texts.dropout) {
                        texts.noise.row(head.row_key(first + r), count, scratch.words.data(), factors);
#pragma omp simd
                        for (int64_t j = 0; j < width; ++j) w[j] *= inverse * factors[j];
                    } else {
#pragma omp simd
                        for (int64_t j = 0; j < width; ++j) w[j] *= inverse;
                    }
                }
                products(weights, width, count, side.v, head.depth, o);
                write_rows(o, rows, depth, out + first * heads * depth + head.column, heads * depth);
            }
        }
    }
}

template <class T>
void attention_backward(const Texts& texts, const T* gradient, const T* queries, int64_t query_stride, const T* keys, const T* values,
                        int64_t key_stride, const float* logs, T* to_queries, int64_t to_query_stride, T* to_keys, T* to_values,
                        int64_t to_key_stride) {
    const int64_t depth = texts.depth, heads = texts.heads;
    const float scaling = texts.scaling;  // a copy: writes to other floats cannot change it
#pragma omp parallel
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < texts.texts * heads; ++task) {
            const int64_t h = task % heads;
            const Head head(texts, task / heads, h);
            const int64_t width = head.width, count = head.count, room = Noise::room(width);
            scratch.begin(6 * head.depth * width + 3 * BLOCK * head.depth + 2 * BLOCK * width + room, room);
            const KeysAndValues side(head, keys, values, key_stride, depth, scratch);
            float* vt = scratch.take(head.depth * width);
            float *to_k = scratch.take(head.depth * width), *to_v = scratch.take(head.depth * width);
            float *q = scratch.take(BLOCK * head.depth), *g = scratch.take(BLOCK * head.depth), *to_q = scratch.take(BLOCK * head.depth);
            float *weights = scratch.take(BLOCK * width), *scores = scratch.take(BLOCK * width), *factors = scratch.take(room);
            transpose(side.v, count, head.depth, width, vt);
            std::memset(to_k, 0, sizeof(float) * size_t(head.depth * count));
            std::memset(to_v, 0, sizeof(float) * size_t(head.depth * count));
#pragma omp simd
            for (int64_t j = 0; j < room; ++j) factors[j] = 1.0f;
            for (int64_t first = head.first_query; first < head.end; first += BLOCK) {
                const int64_t rows = head.end - first < BLOCK ? head.end - first : BLOCK;
                copy_rows(queries + first * query_stride + head.column, query_stride, rows, depth, q, BLOCK);
                copy_rows(gradient + first * heads * depth + head.column, heads * depth, rows, depth, g, BLOCK);
                products(q, head.depth, head.depth, side.kt, width, weights);
                products(g, head.depth, head.depth, vt, width, scores);
                for (int64_t r = 0; r < BLOCK; ++r) {
                    float *w = weights + r * width, *s = scores + r * width;
                    if (r >= rows) {  // there is no such query
#pragma omp simd
                        for (int64_t j = 0; j < width; ++j) w[j] = s[j] = 0.0f;
                        continue;
                    }
                    const float log = logs[(first + r) * heads + h];
#pragma omp simd
                    for (int64_t j = 0; j < width; ++j) w[j] = j < count ? exponential(w[j] * scaling - log) : 0.0f;
                    if (texts.dropout) texts.noise.row(head.row_key(first + r), count, scratch.words.data(), factors);
                    float along = 0.0f;
#pragma omp simd reduction(+ : along)
                    for (int64_t j = 0; j < width; ++j) {
                        s[j] *= factors[j];
                        along += s[j] * w[j];
                    }
#pragma omp simd
                    for (int64_t j = 0; j < width; ++j) {
                        s[j] = w[j] * (s[j] - along) * scaling;
                        w[j] *= factors[j];
                    }
                }
                products(scores, width, count, side.k, head.depth, to_q);
                write_rows(to_q, rows, depth, to_queries + first * to_query_stride + head.column, to_query_stride);
                outer_products(scores, width, q, head.depth, count, to_k);
                outer_products(weights, width, g, head.depth, count, to_v);
            }
            write_rows(to_k, count, depth, to_keys + head.first_key * to_key_stride + head.column, to_key_stride);
            write_rows(to_v, count, depth, to_values + head.first_key * to_key_stride + head.column, to_key_stride);
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME) \
    void adakron_attention_##NAME(const int64_t* query_offsets, const int64_t* key_offsets, int64_t texts, int64_t heads, \
                                  int64_t depth, const int64_t* dropout_keys, const int64_t* columns, int limit, float scale, \
                                  float scaling, const T* queries, int64_t query_stride, const T* keys, const T* values, \
                                  int64_t key_stride, T* out, float* logs) { \
        const Noise noise{columns, int16_t(limit), rounded<T>(scale)}; \
        const Texts all{query_offsets, key_offsets, texts, heads, depth, dropout_keys, noise, scaling}; \
        attention(all, queries, query_stride, keys, values, key_stride, out, logs); \
    } \
    void adakron_attention_backward_##NAME(const int64_t* query_offsets, const int64_t* key_offsets, int64_t texts, int64_t heads, \
                                           int64_t depth, const int64_t* dropout_keys, const int64_t* columns, int limit, float scale, \
                                           float scaling, const T* gradient, const T* queries, int64_t query_stride, const T* keys, \
                                           const T* values, int64_t key_stride, const float* logs, T* to_queries, \
                                           int64_t to_query_stride, T* to_keys, T* to_values, int64_t to_key_stride) { \
        const Noise noise{columns, int16_t(limit), rounded<T>(scale)}; \
        const Texts all{query_offsets, key_offsets, texts, heads, depth, dropout_keys, noise, scaling}; \
        attention_backward(all, gradient, queries, query_stride, keys, values, key_stride, logs, to_queries, to_query_stride, to_keys, \
                           to_values, to_key_stride); \
    }

extern "C" {
FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
}
