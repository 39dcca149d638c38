// The steps of attention in registers: queries times keys, and weights times values.
//
// Queries and results are rows of floats or of bfloat16; scores and weights [keys, lanes], a query a lane. A sum's order
// does not depend on how many queries or keys are computed together.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pairs.h"

namespace qnext {

// Queries and keys in registers.
constexpr int kRows = Vec::size == 16 ? 8 : 4, kKeys = Vec::size == 16 ? 2 : 3;

// What scores are computed from: with BF16 dot products keys and queries as they are, else floats.
template <class T>
struct Scores {
    using Element = float;
};
#if defined(__AVX512BF16__)
template <>
struct Scores<bfloat16> {
    using Element = bfloat16;
};
#endif

// In a register: the compiler would make a value that is read several times a memory operand of each use.
inline Vec held(Vec x) {
    asm("" : "+v"(x.v));
    return x;
}

template <class T>
Vec load_raw(const T* p) {
    return Vec::load(reinterpret_cast<const float*>(p));
}

// Of floats, or of pairs of bfloat16.
template <bool Bf16>
Vec add_products(Vec total, Vec x, Vec y) {
#if defined(__AVX512BF16__)
    if constexpr (Bf16) return {_mm512_dpbf16_ps(total.v, (__m512bh)x.v, (__m512bh)y.v)};
#endif
    return fma(x, y, total);
}

// Calls f with min(rows, R) as a constant.
template <int R, class F>
void with_rows(int64_t rows, F f) {
    if constexpr (R > 1) {
        if (rows < R) return with_rows<R - 1>(rows, f);
    }
    f(std::integral_constant<int, R>());
}

// The sums of the elements of [kKeys, R] vectors times `scale` to [kKeys, lanes] floats, kRows for each key; what lies
// behind the R-th of them is undefined. Inlined, so that the vectors come from registers.
#if defined(__AVX512F__)

template <int R>
__attribute__((always_inline)) inline void store_sums(const Vec (&x)[kKeys][R], Vec scale, float* to, int64_t lanes) {
    static_assert(kKeys == 2 && R <= 8);
    const auto at = [&](int i) { return i % 8 < R ? x[i / 8][i % 8].v : _mm512_setzero_ps(); };
    __m512 eighths[4], quarters[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512d pairs[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 a = at(4 * i + 2 * half), b = at(4 * i + 2 * half + 1);
            pairs[half] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        }
        eighths[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 a = eighths[2 * i], b = eighths[2 * i + 1];
        quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const Vec sums = {_mm512_add_ps(_mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88),
                                    _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd))};
    const Vec scaled = sums * scale;
    if (lanes == 8) return scaled.store(to);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(scaled.v));
    _mm256_storeu_ps(to + lanes, _mm512_extractf32x8_ps(scaled.v, 1));
}

#else

template <int R>
__attribute__((always_inline)) inline void store_sums(const Vec (&x)[kKeys][R], Vec scale, float* to, int64_t lanes) {
    static_assert(R <= 4);
    for (int k = 0; k < kKeys; ++k) {
        const auto at = [&](int r) { return r < R ? x[k][r] : Vec::zero(); };
        const __m128 four = sums(at(0), at(1), at(2), at(3));
        _mm_storeu_ps(to + k * lanes, _mm_mul_ps(four, _mm256_castps256_ps128(scale.v)));
    }
}

#endif

// Rows of keys and values that are read later, fetched in step with the operations: a processor does not foresee these
// rows, and waiting for memory would come on top of the operations. Evenly: lines that were asked for much faster than
// memory delivers them made a decode up to twice as long.
template <class T>
struct Ahead {
    const T *const *rows, *const *last;
    int64_t bytes;  // of a row
    const char *at, *end;
    void begin(const T* const* from) {
        rows = from;
        at = reinterpret_cast<const char*>(*rows);
        end = at + bytes;
    }
    void four_lines() {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
        at += 4 * 64;
        if (at >= end) begin(rows + (rows < last));
    }
};

// Four lines are fetched so many times in a call of `dots`, and after so many values in kPair columns of kRows results:
// with 8 queries of 256 elements a line for 12 operations with AVX-512, for 32 without.
template <class T>
constexpr int kFetches = 3 * sizeof(T) / 2;
template <class T>
constexpr int kStretch = Vec::size == 16 ? 4 - sizeof(T) / 2 : 32 / sizeof(T);

// The products of R queries [R, width] with min(kKeys, count) keys, times `scale`, to kRows neighbouring floats for each
// key; where there are fewer keys, the last one's again. rows: the first key, its value, the second key, its value … Not
// inlined, as below.
template <int R, class Q, class T>
__attribute__((noinline)) void dots(const Q* q, int64_t width, const T* const* rows, int64_t count, Vec scale, float* out,
                                    int64_t lanes, Ahead<T>* ahead) {
    constexpr bool direct = std::is_same_v<Q, bfloat16>;
    const T* keys[kKeys];
    Vec total[kKeys][R];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
        keys[k] = rows[2 * std::min<int64_t>(k, count - 1)];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[k][r] = Vec::zero();
    }
    if (ahead) {
        Ahead<T> next = *ahead;
#pragma GCC unroll 8
        for (int n = 0; n < kFetches<T>; ++n) next.four_lines();
        *ahead = next;
    }
    for (int64_t i = 0; i < width; i += kPair) {
#pragma GCC unroll 2
        for (int half = 0; half < (direct ? 1 : 2); ++half) {
            Vec key[kKeys];
#pragma GCC unroll 8
            for (int k = 0; k < kKeys; ++k) key[k] = held(direct ? load_raw(keys[k] + i) : load_half(keys[k] + i, half));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec x = held(direct ? load_raw(q + r * width + i) : load_half(q + r * width + i, half));
#pragma GCC unroll 8
                for (int k = 0; k < kKeys; ++k) total[k][r] = add_products<direct>(total[k][r], x, key[k]);
            }
        }
    }
    store_sums<R>(total, scale, out, lanes);
}

// kPair columns of R results [R, width]: times their factors, plus the values of `count` keys times their weights [count,
// lanes]. rows: as above. Not inlined: the compiler would keep addresses of the loops around in registers of vectors, from
// where they come only after all additions before.
template <int R, class T>
__attribute__((noinline)) void add_weighted(const float* weights, int64_t lanes, const float* factors,
                                            const T* const* rows, int64_t count, int64_t column, float* out,
                                            int64_t width, Ahead<T>* ahead) {
    Vec x[R], y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Vec factor = Vec::fill(factors[r]);
        x[r] = Vec::load(out + r * width + column) * factor;
        y[r] = Vec::load(out + r * width + column + Vec::size) * factor;
    }
    const auto add = [&](int64_t j) __attribute__((always_inline)) {
        const Pair v = load_pair(rows[2 * j + 1] + column);
        const Vec first = held(v.first), second = held(v.second);
        const float* const w = weights + j * lanes;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec weight = Vec::fill(w[r]);
            x[r] = fma(weight, first, x[r]);
            y[r] = fma(weight, second, y[r]);
        }
    };
    int64_t j = 0;
    for (; j + kStretch<T> <= count; j += kStretch<T>) {
        if (ahead) ahead->four_lines();
#pragma GCC unroll 4
        for (int k = 0; k < kStretch<T>; ++k) add(j + k);
    }
    for (; j < count; ++j) add(j);
    // Addresses are computed again, for the same reason.
    asm("" : "+r"(out), "+r"(width));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        x[r].store(out + r * width + column);
        y[r].store(out + r * width + column + Vec::size);
    }
}

}  // namespace qnext
