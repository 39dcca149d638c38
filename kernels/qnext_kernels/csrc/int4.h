// Weights in int4, two columns of a panel of rows side by side, and how a processor turns them into what it multiplies.
#pragma once

#include <array>

#include "vec.h"

namespace qnext {

// Both columns of a row in a byte, the even one in its lower half, as themselves + 8. S is the type of their scales.
template <class S>
struct int4 {
    uint8_t columns;
};

constexpr int64_t kFewestInGroup = 32;  // columns of a row that share a scale; 128 at most

#if defined(__AVX512F__)

namespace int4_detail {

// By their codes, twice where an index has a bit more than a code.
constexpr std::array<float, 16> kFloats{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr std::array<uint16_t, 32> kBFloat16s{
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

}  // namespace int4_detail

// Where a code lies among those of a step: 16 bits have the same column of a row of each vector of 16, so that a shift by
// four bits leads from a vector to the next.
constexpr int64_t int4_byte(int64_t row, int64_t odd) { return (row % 16 * 2 + odd) * 2 + row / 32; }
constexpr int int4_shift(int64_t row, int64_t) { return int(row / 16 % 2 * 4); }
constexpr uint8_t kInt4Flip = 0;

// Of a step from `w` on, the even or odd column of the rows of vector `v`.
template <class S>
QNEXT_INLINE inline Vec int4_column(const int4<S>* w, int v, int odd) {
    const __m512i codes = _mm512_srlv_epi32(_mm512_loadu_si512(w), _mm512_set1_epi32(16 * odd + 4 * v));
    return {_mm512_permutexvar_ps(codes, _mm512_loadu_ps(int4_detail::kFloats.data()))};
}

#if defined(__AVX512BF16__)
// The same of both columns, as bfloat16.
template <class S>
QNEXT_INLINE inline Vec int4_pairs(const int4<S>* w, int v) {
    const __m512i codes = _mm512_loadu_si512(w);
    const auto look_up = [](__m512i index) {
        return Vec{_mm512_castsi512_ps(
            _mm512_permutexvar_epi16(index, _mm512_load_si512(int4_detail::kBFloat16s.data())))};
    };
    switch (v) {
        case 0: return look_up(codes);
        case 1: return look_up(_mm512_srli_epi16(codes, 4));
        case 2: return look_up(_mm512_srli_epi16(codes, 8));
        default: return look_up(_mm512_srli_epi16(codes, 12));
    }
}
#endif

#else

constexpr int64_t int4_byte(int64_t row, int64_t) { return row; }
constexpr int int4_shift(int64_t, int64_t odd) { return int(4 * odd); }
constexpr uint8_t kInt4Flip = 8;  // of a code: the number as its lowest four bits

template <class S>
QNEXT_INLINE inline Vec int4_column(const int4<S>* w, int v, int odd) {
    const __m256i pairs = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + v * Vec::size)));
    const __m256i high = odd ? pairs : _mm256_slli_epi32(pairs, 28);
    return {_mm256_cvtepi32_ps(odd ? _mm256_srai_epi32(high, 4) : _mm256_srai_epi32(high, 28))};
}

#endif

}  // namespace qnext
