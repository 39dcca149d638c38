// Weights of a byte each, in e4m3 or in int8, two columns of a panel of rows side by side, and how a processor turns them
// into what it multiplies.
#pragma once

#include <array>

#include "vec.h"

namespace qnext {

// Sign, four bits of exponent and three of mantissa. The code of NaN, which no checkpoint has, is read as 480.
struct float8 {
    uint8_t bits;
};

// As itself + 128 where it is not packed. S is the type of their scales.
template <class S>
struct int8 {
    uint8_t bits;
};

constexpr int64_t kScaleBlock = 128;  // columns, and rows, that share a scale in e4m3

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

namespace bytes_detail {

// A byte of the bfloat16 of every number without its sign, to be looked up by the lower seven bits of its code.
using Table = std::array<uint8_t, 128>;

// Subnormal numbers' exponents need more bits, so that they cannot be computed from the code's bits alone.
constexpr Table of_float8(int shift) {
    Table table{};
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

// The code of zero is that of −128 too, which has another sign.
constexpr Table of_int8(int shift) {
    Table table{};
    for (int code = 0; code < 128; ++code) {
        int exponent = 7, mantissa = code ? code : 128;
        for (; mantissa < 128; --exponent) mantissa *= 2;
        table[code] = uint8_t(((exponent + 127) << 7 | (mantissa - 128)) >> shift);
    }
    return table;
}

alignas(64) constexpr Table kFloat8Low = of_float8(0), kFloat8High = of_float8(8);
alignas(64) constexpr Table kInt8Low = of_int8(0), kInt8High = of_int8(8);
static_assert(kInt8Low[0] == 0, "zero and −128 differ in the high byte alone");

// Of the codes of two vectors, both columns of the rows of the first or second; `there`: whose high byte is not zero.
QNEXT_INLINE inline __m512i pairs(__m512i codes, const Table& low, const Table& high, __mmask64 there, int second) {
    const auto half = [](const Table& table, int n) { return _mm512_load_si512(table.data() + 64 * n); };
    const __m512i lows = _mm512_permutex2var_epi8(half(low, 0), codes, half(low, 1));
    const __m512i without_sign = _mm512_maskz_permutex2var_epi8(there, half(high, 0), codes, half(high, 1));
    // The sign is the highest bit of both.
    const __m512i highs = _mm512_ternarylogic_epi32(without_sign, codes, _mm512_set1_epi8(char(0x80)), 0xf8);
    return second ? _mm512_unpackhi_epi8(lows, highs) : _mm512_unpacklo_epi8(lows, highs);
}

}  // namespace bytes_detail

// Where a row's even or odd column lies among those of a step: 64 bytes are two vectors of 16 rows, whose bytes lie so that
// bytes of results that are looked up apart come together within lanes of 128 bits.
constexpr int64_t byte_place(int64_t row, int64_t odd) {
    const int64_t vector = row / 16, in_vector = row % 16;
    return vector / 2 * 64 + in_vector / 4 * 16 + vector % 2 * 8 + in_vector % 4 * 2 + odd;
}

// Sign and magnitude of a two's complement, and the other way around; −128 has the code that −0 would have.
constexpr uint8_t code_of(uint8_t number) { return number & 0x80 ? uint8_t(0x80 | (-number & 0x7f)) : number; }

// Of a step from `w` on, both columns of the rows of vector `v` as bfloat16.
QNEXT_INLINE inline __m512i byte_pairs(const float8* w, int v) {
    using namespace bytes_detail;
    return pairs(_mm512_loadu_si512(w + v / 2 * 64), kFloat8Low, kFloat8High, ~__mmask64(0), v % 2);
}

template <class S>
QNEXT_INLINE inline __m512i byte_pairs(const int8<S>* w, int v) {
    using namespace bytes_detail;
    const __m512i codes = _mm512_loadu_si512(w + v / 2 * 64);
    return pairs(codes, kInt8Low, kInt8High, _mm512_test_epi8_mask(codes, codes), v % 2);
}

constexpr float kFloat8Unit = 1.0f;

// Of a step from `w` on, the even or odd column of the rows of vector `v`, in e4m3 in units of kFloat8Unit.
template <class W>
QNEXT_INLINE inline Vec byte_column(const W* w, int v, int odd) {
    const __m512i pairs = byte_pairs(w, v);
    return {_mm512_castsi512_ps(odd ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                    : _mm512_slli_epi32(pairs, 16))};
}

#else

constexpr int64_t byte_place(int64_t row, int64_t odd) {
    return row / Vec::size * 2 * Vec::size + odd * Vec::size + row % Vec::size;
}

constexpr uint8_t code_of(uint8_t number) { return number; }

// Shifted by their difference in mantissa bits, codes are float16 of numbers as many times smaller as the biases of both
// exponents differ, subnormal ones too.
constexpr float kFloat8Unit = 256.0f;

#if defined(__AVX512F__)

QNEXT_INLINE inline Vec byte_column(const float8* w, int v, int odd) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(short(0xbf80))))};
}

template <class S>
QNEXT_INLINE inline Vec byte_column(const int8<S>* w, int v, int odd) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers))};
}

// Both columns as bfloat16, the higher halves of their floats.
template <class S>
QNEXT_INLINE inline __m512i byte_pairs(const int8<S>* w, int v) {
    const __m512i even = _mm512_castps_si512(byte_column(w, v, 0).v), odd = _mm512_castps_si512(byte_column(w, v, 1).v);
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

#else

QNEXT_INLINE inline Vec byte_column(const float8* w, int v, int odd) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
    return {_mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(short(0xbf80))))};
}

template <class S>
QNEXT_INLINE inline Vec byte_column(const int8<S>* w, int v, int odd) {
    const __m128i numbers = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + (2 * v + odd) * Vec::size));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(numbers))};
}

#endif

#endif

// What a byte is in a panel.
constexpr uint8_t packed_byte(float8 w) { return w.bits; }
template <class S>
constexpr uint8_t packed_byte(int8<S> w) {
    return code_of(w.bits ^ 0x80);
}

// What a byte of a panel is elsewhere.
constexpr uint8_t unpacked_byte(float8 w) { return w.bits; }
template <class S>
constexpr uint8_t unpacked_byte(int8<S> w) {
    return code_of(w.bits) ^ 0x80;
}

}  // namespace qnext
