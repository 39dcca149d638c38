// Products of a few activations with rows of a weight matrix as it lies in the checkpoint: [rows, K], K contiguous.
//
// A result is the sum over blocks of kBlock elements of K, each summed in the lanes of a vector and then across them, in
// one order. It does not depend on how many activations or rows are multiplied together.
//
// Weights are converted on the way into the product: two bfloat16 in 32 bits are two floats after a shift and a mask,
// the even and the odd element; activations are packed once into the same order. With BF16 dot products neither is needed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "arguments.h"

namespace qnext {

constexpr int64_t kBlock = 512;
constexpr int kRowsAtOnce = 4;  // streams of weights that a processor fetches ahead
// Rows that all activations meet before the next; rows mostly lie a page apart, and the same block of many such rows finds
// no place in the second-level cache.
constexpr int64_t kGroup = 64;
// With two rows at once their sums, weights, an activation and a mask fill the registers.
constexpr int kActivations = Vec::size == 16 ? 8 : 5;
// Activations that are packed together: with the rows that they meet they fit in the second-level cache.
constexpr int64_t kTokens = 10 * kActivations;

struct DotFloat {
    using Packed = float;
    static constexpr int64_t step = Vec::size;
    static constexpr int parts = 1;
    static Vec weights(const float* w, int) { return Vec::load(w); }
    static Vec activation(const float* x, int) { return Vec::load(x); }
    static Vec add(Vec total, Vec x, Vec w) { return fma(x, w, total); }
    static void pack(const float* x, int64_t size, float* to, int64_t width) {
        std::copy_n(x, size, to);
        std::fill(to + size, to + width, 0.0f);
    }
};

#if defined(__AVX512BF16__)

struct DotBFloat16 {
    using Packed = bfloat16;
    static constexpr int64_t step = 32;
    static constexpr int parts = 1;
    static Vec weights(const bfloat16* w, int) { return {_mm512_loadu_ps(w)}; }
    static Vec activation(const bfloat16* x, int) { return {_mm512_loadu_ps(x)}; }
    static Vec add(Vec total, Vec x, Vec w) {
        return {_mm512_dpbf16_ps(total.v, (__m512bh)x.v, (__m512bh)w.v)};
    }
    static void pack(const bfloat16* x, int64_t size, bfloat16* to, int64_t width) {
        std::copy_n(x, size, to);
        std::fill(to + size, to + width, bfloat16{0});
    }
};

#else

struct DotBFloat16 {
    using Packed = float;
    static constexpr int64_t step = 2 * Vec::size;
    static constexpr int parts = 2;
#if defined(__AVX512F__)
    static Vec weights(const bfloat16* w, int part) {
        const __m512i pairs = _mm512_loadu_si512(w);
        return {_mm512_castsi512_ps(part ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))
                                         : _mm512_slli_epi32(pairs, 16))};
    }
#else
    static Vec weights(const bfloat16* w, int part) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
        return {_mm256_castsi256_ps(part ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))
                                         : _mm256_slli_epi32(pairs, 16))};
    }
#endif
    static Vec activation(const float* x, int part) { return Vec::load(x + part * Vec::size); }
    static Vec add(Vec total, Vec x, Vec w) { return fma(x, w, total); }
    static void pack(const bfloat16* x, int64_t size, float* to, int64_t width) {
        int64_t i = 0;
        for (; i + step <= size; i += step) {
            weights(x + i, 0).store(to + i);
            weights(x + i, 1).store(to + i + Vec::size);
        }
        if (i == width) return;
        bfloat16 rest[step] = {};
        std::copy_n(x + i, size - i, rest);
        weights(rest, 0).store(to + i);
        weights(rest, 1).store(to + i + Vec::size);
    }
};

#endif

template <class T>
using Dot = std::conditional_t<std::is_same_v<T, float>, DotFloat, DotBFloat16>;

// Elements of a packed activation of K elements.
template <class T>
int64_t packed_width(int64_t k) {
    return (k + Dot<T>::step - 1) / Dot<T>::step * Dot<T>::step;
}

// Elements from a packed activation to the next: not a multiple of a page, as the distance between rows of weights mostly
// is, else all that is multiplied together would compete for the same few places of the first-level cache.
template <class T>
int64_t packed_stride(int64_t k) {
    constexpr int64_t element = sizeof(typename Dot<T>::Packed), page = 4096, apart = page / 2 + 64;
    const int64_t bytes = packed_width<T>(k) * element;
    return (bytes <= apart ? bytes : (bytes - apart + page - 1) / page * page + apart) / element;
}

// Keeps the compiler from reading an activation from memory again for every row: that would be the limit.
inline void in_register(Vec& x) { asm("" : "+v"(x.v)); }

// Not inlined: among the surrounding loops the compiler would keep sums in memory instead of registers.
//
// Adds to c[a · c_stride + r] the products of elements [0, size) of activations a < A and rows r < R. With `ahead` the same
// elements of those rows are fetched: a processor's own prefetching ends with a page, which a row often fills.
template <class T, int A, int R, bool Ahead>
__attribute__((noinline)) void multiply_tile(const typename Dot<T>::Packed* x, int64_t x_stride, const T* const* rows,
                                             const T* const* ahead, int64_t offset, int64_t size, float* c,
                                             int64_t c_stride) {
    using D = Dot<T>;
    Vec total[A][R];
    for (int a = 0; a < A; ++a)
        for (int r = 0; r < R; ++r) total[a][r] = Vec::zero();
    const T* w[R];
    for (int r = 0; r < R; ++r) w[r] = rows[r] + offset;
    const int64_t whole = size / D::step * D::step;
    for (int64_t i = 0; i < whole; i += D::step) {
        if constexpr (Ahead)
            for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(ahead[r] + offset + i), _MM_HINT_T0);
        for (int part = 0; part < D::parts; ++part) {
            Vec weights[R];
            for (int r = 0; r < R; ++r) weights[r] = D::weights(w[r] + i, part);
            for (int a = 0; a < A; ++a) {
                Vec activation = D::activation(x + a * x_stride + i, part);
                in_register(activation);
                for (int r = 0; r < R; ++r) total[a][r] = D::add(total[a][r], activation, weights[r]);
            }
        }
    }
    if (whole < size) {
        for (int r = 0; r < R; ++r) {
            T rest[D::step] = {};
            std::copy_n(w[r] + whole, size - whole, rest);
            for (int part = 0; part < D::parts; ++part) {
                const Vec weights = D::weights(rest, part);
                for (int a = 0; a < A; ++a)
                    total[a][r] = D::add(total[a][r], D::activation(x + a * x_stride + whole, part), weights);
            }
        }
    }
    for (int a = 0; a < A; ++a)
        for (int r = 0; r < R; ++r) c[a * c_stride + r] += sum(total[a][r]);
}

// The same for any number of activations up to A; without `ahead` nothing is fetched.
template <class T, int R, int A>
void multiply_rows(int activations, const typename Dot<T>::Packed* x, int64_t x_stride, const T* const* rows,
                   const T* const* ahead, int64_t offset, int64_t size, float* c, int64_t c_stride) {
    if (activations == A) {
        if (ahead)
            multiply_tile<T, A, R, true>(x, x_stride, rows, ahead, offset, size, c, c_stride);
        else
            multiply_tile<T, A, R, false>(x, x_stride, rows, ahead, offset, size, c, c_stride);
    } else if constexpr (A > 1) {
        multiply_rows<T, R, A - 1>(activations, x, x_stride, rows, ahead, offset, size, c, c_stride);
    }
}

// The products of all activations with `group` rows, then with the next: a block of a few activations stays in the
// first-level cache while the block of those rows passes by, and that in the second-level cache for the next activations.
template <int A, int R, class T>
void multiply_groups(const typename Dot<T>::Packed* x, int64_t count, const T* const* rows, int64_t num_rows,
                     int64_t group, int64_t k, float* c) {
    const int64_t stride = packed_stride<T>(k);
    for (int64_t begin = 0; begin < num_rows; begin += group) {
        const int64_t end = std::min(begin + group, num_rows);
        for (int64_t i = 0; i < k; i += kBlock) {
            const int64_t size = std::min(kBlock, k - i);
            for (int64_t a = 0; a < count; a += A) {
                const int some = std::min<int64_t>(A, count - a);
                const auto run = [&](auto at_once, int64_t r) {
                    const auto ahead = a == 0 && r + group + at_once <= num_rows ? rows + r + group : nullptr;
                    multiply_rows<T, at_once, A>(some, x + a * stride + i, stride, rows + r, ahead, i, size,
                                                 c + a * num_rows + r, num_rows);
                };
                int64_t r = begin;
                for (; r + R <= end; r += R) run(std::integral_constant<int, R>(), r);
                for (; r < end; ++r) run(std::integral_constant<int, 1>(), r);
            }
        }
    }
}

// c [count, num_rows] = x [count, K] · rows [num_rows, K]ᵀ, with x packed.
template <class T>
void multiply(const typename Dot<T>::Packed* x, int64_t count, const T* const* rows, int64_t num_rows, int64_t k,
              float* c) {
    std::fill_n(c, count * num_rows, 0.0f);
    // Few sums leave registers for more rows. For few activations weights are read once, along their rows.
    if (count <= 2)
        multiply_groups<2, kRowsAtOnce>(x, count, rows, num_rows, kRowsAtOnce, k, c);
    else
        multiply_groups<kActivations, 2>(x, count, rows, num_rows, count <= kActivations ? 2 : kGroup, k, c);
}

}  // namespace qnext
