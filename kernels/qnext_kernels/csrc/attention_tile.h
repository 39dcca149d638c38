// The steps of attention in registers: queries times keys, and weights times values.
//
// At most kRows query heads are computed together. What is theirs lies together, so that addresses are constants: queries
// and results as [width / kPair, heads, kPair], scores and weights as [keys, kRows]. A sum's order does not depend on how
// many heads or keys are computed together.
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

static_assert(2 * kRows == Vec::size);

// kRows floats, twice.
inline Vec load_twice(const float* p) {
#if defined(__AVX512F__)
    return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
#else
    return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
#endif
}

inline void store_half(Vec x, float* p) {
#if defined(__AVX512F__)
    _mm256_storeu_ps(p, _mm512_castps512_ps256(x.v));
#else
    _mm_storeu_ps(p, _mm256_castps256_ps128(x.v));
#endif
}

// The halves of a vector in the other order.
inline Vec swapped(Vec x) {
#if defined(__AVX512F__)
    return {_mm512_shuffle_f32x4(x.v, x.v, 0x4e)};
#else
    return {_mm256_permute2f128_ps(x.v, x.v, 1)};
#endif
}

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

// The sums of the elements of [kKeys, R] vectors times `scale` to [kKeys, kRows] floats; what lies behind the R-th of a key
// is undefined. Inlined, so that the vectors come from registers.
#if defined(__AVX512F__)

template <int R>
__attribute__((always_inline)) inline void store_sums(const Vec (&x)[kKeys][R], Vec scale, float* to) {
    static_assert(kKeys == 2 && kRows == 8 && R <= 8);
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
    (sums * scale).store(to);
}

#else

template <int R>
__attribute__((always_inline)) inline void store_sums(const Vec (&x)[kKeys][R], Vec scale, float* to) {
    static_assert(kRows == 4 && R <= 4);
    for (int k = 0; k < kKeys; ++k) {
        const auto at = [&](int r) { return r < R ? x[k][r] : Vec::zero(); };
        const __m128 four = sums(at(0), at(1), at(2), at(3));
        _mm_storeu_ps(to + k * kRows, _mm_mul_ps(four, _mm256_castps256_ps128(scale.v)));
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
    QNEXT_INLINE void four_lines() {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm_prefetch(at + 64 * i, _MM_HINT_T0);
        at += 4 * 64;
        if (at >= end) begin(rows + (rows < last));
    }
};

// Four lines are fetched so many times with kKeys keys, and after so many values in kPair columns of kRows results:
// with 8 queries of 256 elements a line for 12 operations with AVX-512, for 32 without.
template <class T>
constexpr int kFetches = 3 * sizeof(T) / 2;
template <class T>
constexpr int kStretch = Vec::size == 16 ? 4 - sizeof(T) / 2 : 32 / sizeof(T);

// The products of R queries with `count` keys, times `scale`, to [count, kRows], and where kKeys does not divide the count,
// those of the last key again. keys: where each lies. Not inlined, as below.
template <int R, class Q, class T>
__attribute__((noinline)) void score(const Q* queries, int64_t width, const T* const* keys, int64_t count, Vec scale,
                                     float* out, Ahead<T>* ahead) {
    constexpr bool direct = std::is_same_v<Q, bfloat16>;
    Ahead<T> fetch = ahead ? *ahead : Ahead<T>{};
    for (; count > 0; count -= kKeys, keys += kKeys, out += kKeys * kRows) {
        if (ahead) {
#pragma GCC unroll 8
            for (int n = 0; n < kFetches<T>; ++n) fetch.four_lines();
        }
        const T* at[kKeys];
        Vec total[kKeys][R];
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) {
            at[k] = keys[std::min<int64_t>(k, count - 1)];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) total[k][r] = Vec::zero();
        }
        const Q* q = queries;
        for (int64_t i = 0; i < width; i += kPair, q += R * kPair) {
#pragma GCC unroll 2
            for (int half = 0; half < (direct ? 1 : 2); ++half) {
                Vec key[kKeys];
#pragma GCC unroll 8
                for (int k = 0; k < kKeys; ++k)
                    key[k] = held(direct ? load_raw(at[k] + i) : load_half(at[k] + i, half));
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vec x = held(direct ? load_raw(q + r * kPair) : load_half(q + r * kPair, half));
#pragma GCC unroll 8
                    for (int k = 0; k < kKeys; ++k) total[k][r] = add_products<direct>(total[k][r], x, key[k]);
                }
            }
        }
        store_sums<R>(total, scale, out);
    }
    if (ahead) *ahead = fetch;
}

// Scores of keys that become weights, kSoftened vectors of two keys at once, and their sums.
constexpr int kSoftened = 2;
struct Soften {
    float* scores;
    int64_t times;
    const float* largest;  // [kRows]
    float* sum;            // of a vector

    QNEXT_INLINE void once(Vec top, Vec& total) {
        Vec e[kSoftened];
#pragma GCC unroll 2
        for (int k = 0; k < kSoftened; ++k) e[k] = Vec::load(scores + k * Vec::size) - top;
        exp2(e);
#pragma GCC unroll 2
        for (int k = 0; k < kSoftened; ++k) {
            e[k].store(scores + k * Vec::size);
            total = total + e[k];
        }
        scores += kSoftened * Vec::size;
        --times;
    }
    void all() {
        const Vec top = load_twice(largest);
        Vec total = Vec::load(sum);
        while (times) once(top, total);
        total.store(sum);
    }
};

// R results: times their factors where there are such, plus the values of `count` keys times their weights [count, kRows].
// values: where each lies. Between the columns other scores are softened, so that their latency is covered. Not inlined: the
// compiler would keep addresses of the loops around in registers of vectors.
template <int R, class T>
__attribute__((noinline)) void add_weighted(const float* weights, const float* factors, const T* const* values, int64_t count,
                                            int64_t width, float* out, Ahead<T>* ahead, Soften soften) {
    Ahead<T> fetch = ahead ? *ahead : Ahead<T>{};
    const int64_t columns = width / kPair, times = soften.times;
    int64_t due = 0;
    const Vec top = load_twice(soften.largest);
    Vec sum = Vec::load(soften.sum);
    for (int64_t column = 0; column < width; column += kPair, out += R * kPair) {
        for (due += times; due >= columns; due -= columns) soften.once(top, sum);
        Vec x[R], y[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            x[r] = Vec::load(out + r * kPair);
            y[r] = Vec::load(out + r * kPair + Vec::size);
        }
        if (factors) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec factor = Vec::fill(factors[r]);
                x[r] = x[r] * factor;
                y[r] = y[r] * factor;
            }
        }
        const float* w = weights;
        const T* const* row = values;
        const auto add = [&](int64_t k) __attribute__((always_inline)) {
            const Pair v = load_pair(row[k] + column);
            const Vec first = held(v.first), second = held(v.second);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec weight = Vec::fill(w[k * kRows + r]);
                x[r] = fma(weight, first, x[r]);
                y[r] = fma(weight, second, y[r]);
            }
        };
        int64_t left = count;
        for (; left >= kStretch<T>; left -= kStretch<T>) {
            if (ahead) fetch.four_lines();
#pragma GCC unroll 4
            for (int k = 0; k < kStretch<T>; ++k) add(k);
            row += kStretch<T>;
            w += kStretch<T> * kRows;
        }
        for (; left; --left, ++row, w += kRows) add(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            x[r].store(out + r * kPair);
            y[r].store(out + r * kPair + Vec::size);
        }
    }
    sum.store(soften.sum);
    if (ahead) *ahead = fetch;
}

}  // namespace qnext
