// Dropout, the sum with the residual and LayerNorm, row by row, and the keys of dropout's rows.

#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

template <class T>
void dropout(const T* x, const int64_t* keys, const int64_t* columns, int limit, float scale, T* out, int64_t rows, int64_t width) {
    const Noise noise{columns, int16_t(limit), rounded<T>(scale)};
#pragma omp parallel
    {
        std::vector<int64_t> words(Noise::room(width) / 4);
        std::vector<float> factors(Noise::room(width));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            noise.row(keys[r], width, words.data(), factors.data());
            const T* in = x + r * width;
            T* to = out + r * width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) to[c] = narrow<T>(widen(in[c]) * factors[c]);
        }
    }
}

// sum = dropout(x) + residual; out = LayerNorm(sum) * weight + bias. keys null: no dropout. moments: (rows, 2), mean and 1 / deviation.
template <class T>
void add_norm(const T* x, const T* residual, const int64_t* keys, const int64_t* columns, int limit, float scale, const T* weight,
              const T* bias, float eps, T* sum, float* moments, T* out, int64_t rows, int64_t width) {
    const Noise noise{columns, int16_t(limit), rounded<T>(scale)};
#pragma omp parallel
    {
        std::vector<int64_t> words(Noise::room(width) / 4);
        std::vector<float> factors(Noise::room(width), 1.0f), wide(width);
        float *f = factors.data(), *s = wide.data();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            if (keys) noise.row(keys[r], width, words.data(), f);
            const T *a = x + r * width, *b = residual + r * width;
            T *kept = sum + r * width, *to = out + r * width;
            float total = 0.0f;
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < width; ++c) {
                const float value = rounded<T>(rounded<T>(widen(a[c]) * f[c]) + widen(b[c]));
                kept[c] = narrow<T>(value);
                s[c] = value;
                total += value;
            }
            const float mean = total / float(width);
            float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t c = 0; c < width; ++c) squares += (s[c] - mean) * (s[c] - mean);
            const float inverse = 1.0f / std::sqrt(squares / float(width) + eps);
            moments[2 * r] = mean;
            moments[2 * r + 1] = inverse;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) to[c] = narrow<T>((s[c] - mean) * inverse * widen(weight[c]) + widen(bias[c]));
        }
    }
}

// Gradients of x and of residual from that of out. With keys null the two are equal and to_x may be null.
template <class T>
void add_norm_backward(const T* gradient, const T* sum, const float* moments, const int64_t* keys, const int64_t* columns, int limit,
                       float scale, const T* weight, T* to_x, T* to_residual, int64_t rows, int64_t width) {
    const Noise noise{columns, int16_t(limit), rounded<T>(scale)};
#pragma omp parallel
    {
        std::vector<int64_t> words(Noise::room(width) / 4);
        std::vector<float> factors(Noise::room(width)), normal(width), weighted(width);
        float *f = factors.data(), *n = normal.data(), *g = weighted.data();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T *from = gradient + r * width, *s = sum + r * width;
            const float mean = moments[2 * r], inverse = moments[2 * r + 1];
            float total = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : total, along)
            for (int64_t c = 0; c < width; ++c) {
                n[c] = (widen(s[c]) - mean) * inverse;
                g[c] = widen(from[c]) * widen(weight[c]);
                total += g[c];
                along += g[c] * n[c];
            }
            total /= float(width);
            along /= float(width);
            T* residual = to_residual + r * width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
                g[c] = rounded<T>(inverse * (g[c] - total - n[c] * along));
                residual[c] = narrow<T>(g[c]);
            }
            if (!keys) continue;
            noise.row(keys[r], width, words.data(), f);
            T* x = to_x + r * width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) x[c] = narrow<T>(g[c] * f[c]);
        }
    }
}

}  // namespace

#define FOR_TYPE(T, NAME) \
    void adakron_dropout_##NAME(const T* x, const int64_t* keys, const int64_t* columns, int limit, float scale, T* out, int64_t rows, \
                                int64_t width) { \
        dropout(x, keys, columns, limit, scale, out, rows, width); \
    } \
    void adakron_add_norm_##NAME(const T* x, const T* residual, const int64_t* keys, const int64_t* columns, int limit, float scale, \
                                 const T* weight, const T* bias, float eps, T* sum, float* moments, T* out, int64_t rows, \
                                 int64_t width) { \
        add_norm(x, residual, keys, columns, limit, scale, weight, bias, eps, sum, moments, out, rows, width); \
    } \
    void adakron_add_norm_backward_##NAME(const T* gradient, const T* sum, const float* moments, const int64_t* keys, \
                                          const int64_t* columns, int limit, float scale, const T* weight, T* to_x, T* to_residual, \
                                          int64_t rows, int64_t width) { \
        add_norm_backward(gradient, sum, moments, keys, columns, limit, scale, weight, to_x, to_residual, rows, width); \
    }

extern "C" {
// Keys of a dropout's rows. keys: of texts. places: of the rows, in a rectangle of texts with that many columns.
void adakron_row_keys(const int64_t* keys, int64_t call, const int64_t* places, int64_t columns, int64_t* out, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
        out[r] = int64_t(mixed(mixed(uint64_t(keys[places[r] / columns]), uint64_t(call)), uint64_t(places[r] % columns)));
}

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
}
