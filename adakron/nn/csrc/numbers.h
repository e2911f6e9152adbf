// What an encoder computes between its matrix products, on a CPU, without intermediate tensors: dropout, residual, LayerNorm and the
// attention of texts that stand one behind the other. Equations: ../README.md; the same in torch: ../rows.py and ../dropout.py.
//
// A plain C interface of pointers and sizes, so that no header of torch or Python is compiled. T is float or bf16. Where torch would
// round a tensor to T between two operations outside attention, so does this; sums are in float. Every output element is written by
// one thread in one order: results do not depend on the number of threads.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class T> inline T narrow(float x);

template <> inline float narrow<float>(float x) { return x; }

// To nearest, ties to even; NaN stays one.
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fc0)};
}

template <class T> inline float rounded(float x) { return widen(narrow<T>(x)); }

// ---- Draws (../counters.py) -------------------------------------------------------------------------------------------------------

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
constexpr int WORDS = 8;  // of four draws, in a vector

inline uint64_t mixed(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * GOLDEN;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Dropout of one row: what its elements are multiplied by, 0 or scale. Made in whole vectors: columns and factors have room for them.
struct Noise {
    const int64_t* columns;  // keys of words
    int16_t limit;           // draws below are dropped
    float scale;

    static int64_t room(int64_t width) { return (width + 4 * WORDS - 1) / (4 * WORDS) * (4 * WORDS); }

    // words: room(width) / 4 of them.
    void row(uint64_t key, int64_t width, int64_t* words, float* factors) const {
        const int64_t count = room(width) / 4;
        const int16_t least = limit;
        const int64_t* column = columns;
        const float kept = scale;  // a copy, which no write to factors can change
        for (int64_t j = 0; j < count; ++j) {
            uint64_t w = (key ^ uint64_t(column[j])) * 0xD6E8FEB86659FD93u;
            w += uint64_t(int64_t(w) >> 32);
            w += 2 * w * w;
            words[j] = int64_t(w + uint64_t(int64_t(w) >> 32));
        }
        const int16_t* draws = reinterpret_cast<const int16_t*>(words);
#pragma omp simd
        for (int64_t c = 0; c < 4 * count; ++c) factors[c] = draws[c] >= least ? kept : 0.0f;
    }
};

}  // namespace
