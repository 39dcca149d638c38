// Weights in e4m3, two columns of a panel of rows side by side, and how a processor turns them into what it multiplies.
#pragma once

#include <array>

#include "vec.h"

namespace qnext {

// Sign, four bits of exponent and three of mantissa. The code of NaN, which no checkpoint has, is read as 480.
struct float8 {
    uint8_t bits;
};

constexpr int64_t kScaleBlock = 128;  // columns, and rows, that share a scale

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace float8_detail {

// A byte of the bfloat16 of every number without its sign, to be looked up by its code: their exponents need more bits, so
// that those of subnormal numbers cannot be computed from the code's bits alone.
constexpr std::array<uint8_t, 128> bytes(int shift) {
    std::array<uint8_t, 128> table{};
    for (int code = 1; code < 128; ++code) {
        int exponent = code >> 3, mantissa = code & 7;
        if (exponent == 0) {
            for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
            mantissa -= 8;
        }
        table[code] = uint8_t(((exponent + 127 - 7) << 7 | mantissa << 4) >> shift);
    }
    return table;
}
alignas(64) constexpr std::array<uint8_t, 128> kLow = bytes(0), kHigh = bytes(8);

}  // namespace float8_detail

// Where a row's even or odd column lies among those of a step: 64 bytes are two vectors of 16 rows, whose bytes lie so that
// bytes of results that are looked up apart come together within lanes of 128 bits.
constexpr int64_t float8_place(int64_t row, int64_t odd) {
    const int64_t vector = row / 16, in_vector = row % 16;
    return vector / 2 * 64 + in_vector / 4 * 16 + vector % 2 * 8 + in_vector % 4 * 2 + odd;
}

// Of a step from `w` on, both columns of the rows of vector `v` as bfloat16.
QNEXT_INLINE inline __m512i float8_pairs(const float8* w, int v) {
    using namespace float8_detail;
    const __m512i codes = _mm512_loadu_si512(w + v / 2 * 64);
    const auto look_up = [&](const std::array<uint8_t, 128>& table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table.data()), codes, _mm512_load_si512(table.data() + 64));
    };
    const __m512i low = look_up(kLow);
    // The sign is the highest bit of both.
    const __m512i high = _mm512_ternarylogic_epi32(look_up(kHigh), codes, _mm512_set1_epi8(char(0x80)), 0xf8);
    return v % 2 ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
}

constexpr float kFloat8Unit = 1.0f;

// Of a step from `w` on, the even or odd column of the rows of vector `v`, in units of kFloat8Unit.
QNEXT_INLINE inline Vec float8_column(const float8* w, int v, int odd) {
    const __m512i pairs = float8_pairs(w, v);
    return {_mm512_castsi512_ps(odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                    : _mm512_slli_epi32(pairs, 16))};
}

#else

constexpr int64_t float8_place(int64_t row, int64_t odd) {
    return row / Vec::size * 2 * Vec::size + odd * Vec::size + row % Vec::size;
}

// Shifted by their difference in mantissa bits, codes are float16 of numbers as many times smaller as the biases of both
// exponents differ, subnormal ones too.
constexpr float kFloat8Unit = 256.0f;

#if defined(__AVX512F__)
QNEXT_INLINE inline Vec float8_column(const float8* w, int v, int odd) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(short(0xbf80))))};
}
#else
QNEXT_INLINE inline Vec float8_column(const float8* w, int v, int odd) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    return {_mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(short(0xbf80))))};
}
#endif

#endif

}  // namespace qnext
