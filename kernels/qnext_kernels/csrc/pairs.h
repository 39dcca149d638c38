// Two neighbouring vectors of elements as two vectors of floats; those of bfloat16 as the even ones and the odd ones,
// which a shift and a mask make of 32 bits.
#pragma once

#include <algorithm>

#include "vec.h"

namespace qnext {

constexpr int64_t kPair = 2 * Vec::size;

inline Vec load_half(const float* p, int half) { return Vec::load(p + half * Vec::size); }

inline Vec load_half(const bfloat16* p, int half) {
#if defined(__AVX512F__)
    const __m512i x = _mm512_loadu_si512(p), odd = _mm512_set1_epi32(int(0xffff0000));
    return {_mm512_castsi512_ps(half ? _mm512_and_si512(x, odd) : _mm512_slli_epi32(x, 16))};
#else
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), odd = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(half ? _mm256_and_si256(x, odd) : _mm256_slli_epi32(x, 16))};
#endif
}

struct Pair {
    Vec first, second;
    void store(float* to) const {
        first.store(to);
        second.store(to + Vec::size);
    }
    void store(bfloat16* to) const {
#if defined(__AVX512F__)
        _mm512_storeu_si512(to, elements());
#else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), elements());
#endif
    }
    // Past the caches; to: a multiple of the size of a vector.
    void stream(bfloat16* to) const {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), elements());
#else
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), elements());
#endif
    }

  private:
    // As bfloat16, in the order of the elements.
#if defined(__AVX512F__)
    __m512i elements() const {
        alignas(64) static constexpr uint16_t order[kPair] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
    }
#else
    __m256i elements() const {
        const __m256i even = _mm256_srli_epi32(rounded_bits(first), 16);
        return _mm256_blend_epi16(even, rounded_bits(second), 0xaa);
    }
#endif
};

template <class T>
Pair load_pair(const T* p) {
    return {load_half(p, 0), load_half(p, 1)};
}

#if defined(__AVX512F__)

// Two rows of kPair elements as operands of dot products: of each column the upper element and then the lower, those of every
// other four columns in one vector.
struct Twos {
    __m512i first, second;
};

inline Twos twos(__m512i upper, __m512i lower) {
    return {_mm512_unpacklo_epi16(upper, lower), _mm512_unpackhi_epi16(upper, lower)};
}

// kPair sums of such dot products as bfloat16, in the order of the columns.
inline __m512i in_order(Pair x) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                                    (__m512i)_mm512_cvtne2ps_pbh(x.second.v, x.first.v));
}

// [kPair, 4]: as the other operands, of each row its first two elements and its last two.
inline void load_twos(const bfloat16* from, Twos& first, Twos& last) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 16, 18, 20, 22, 8, 10, 12, 14, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(from + i * kPair);
    for (Twos* to : {&first, &last}) {
        const __m512i order = to == &first ? even : odd;
        const __m512i low = _mm512_permutex2var_epi32(x[0], order, x[1]), high = _mm512_permutex2var_epi32(x[2], order, x[3]);
        *to = {_mm512_shuffle_i64x2(low, high, 0x44), _mm512_shuffle_i64x2(low, high, 0xee)};
    }
}

// total + x[0] · weight[0] + x[1] · weight[1] of each channel.
inline Pair dot(Twos x, Twos weight, Pair total) {
    return {{_mm512_dpbf16_ps(total.first.v, (__m512bh)x.first, (__m512bh)weight.first)},
            {_mm512_dpbf16_ps(total.second.v, (__m512bh)x.second, (__m512bh)weight.second)}};
}

#else

// The columns of [kPair, 4], the rows in the order of a Pair's elements.
inline void load_columns(const bfloat16* from, Pair (&columns)[4]) {
    // Two columns of an even row, or of an odd one, are 32 bits.
    const __m256i rows = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), odd = _mm256_set1_epi32(int(0xffff0000));
    for (int half = 0; half < 2; ++half) {
        for (int c = 0; c < 4; c += 2) {
            const __m256i two = _mm256_i32gather_epi32(reinterpret_cast<const int*>(from) + half * 2 + c / 2, rows, 4);
            Vec& low = half ? columns[c].second : columns[c].first;
            Vec& high = half ? columns[c + 1].second : columns[c + 1].first;
            low.v = _mm256_castsi256_ps(_mm256_slli_epi32(two, 16));
            high.v = _mm256_castsi256_ps(_mm256_and_si256(two, odd));
        }
    }
}

#endif

// Of a row of `size` elements, zeros behind its end.
template <class T>
Pair load_pair(const T* row, int64_t i, int64_t size) {
    if (i + kPair <= size) return load_pair(row + i);
    T padded[kPair] = {};
    if (i < size) std::memcpy(padded, row + i, (size - i) * sizeof(T));
    return load_pair(padded);
}

template <class T>
void store_pair(Pair x, T* row, int64_t i, int64_t size) {
    if (i + kPair <= size) return x.store(row + i);
    T padded[kPair];
    x.store(padded);
    std::memcpy(row + i, padded, (size - i) * sizeof(T));
}

}  // namespace qnext
