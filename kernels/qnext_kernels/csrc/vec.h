// A vector of floats as wide as the processor's registers: 16 with AVX-512, 8 with AVX2 and FMA.
//
// Fused multiply-adds are written out (the compiler may not contract), so that the bits of a result do not depend on how
// a function was inlined.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Where a call would move vectors through memory.
#define QNEXT_INLINE __attribute__((always_inline))

namespace qnext {

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounds to the nearest, ties to even, as torch does; NaN stays NaN.
inline void assign(float& to, float x) { to = x; }
inline void assign(bfloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
    static constexpr int size = 16;
    __m512 v;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
    // Of 32 bits in memory. Loaded as an integer they take no turn of the instructions that move parts of vectors.
    static Vec fill_from(const void* x) {
        int32_t bits;
        std::memcpy(&bits, x, sizeof bits);
        return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
    }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const bfloat16* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void stream(float* p) const { _mm512_stream_ps(p, v); }  // p: a multiple of the vector's size
    void store(bfloat16* p) const {
#if defined(__AVX512BF16__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
    }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    // a · b + c, and a · b − c, rounded once.
    friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    friend Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
    friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    friend Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    // a · 2^n for whole n, rounded once; 0 or infinity where float32 ends.
    friend Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
    __m256 halves() const {
        return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    }
};

inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// 16 rows of 32 bits become 16 columns.
inline void transpose(Vec (&x)[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + 2 + j]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        x[i].v = _mm512_shuffle_f32x4(even, even2, 0x88);
        x[i + 4].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        x[i + 8].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[i + 12].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Vec {
    static constexpr int size = 8;
    __m256 v;
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
    static Vec fill_from(const float* x) { return fill(*x); }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const bfloat16* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void stream(float* p) const { _mm256_stream_ps(p, v); }
    void store(bfloat16* p) const {
        const __m256i rounded = _mm256_srli_epi32(rounded_bits(*this), 16);
        const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
    }
    // The upper 16 of every 32 bits: its bfloat16.
    friend __m256i rounded_bits(Vec a) {
        const __m256i bits = _mm256_castps_si256(a.v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    }
    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    friend Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
    friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    friend Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    friend Vec scale_by_power(Vec a, Vec n) {
        // In two steps: 2^128 is no float, and 2^-149 is no normal one.
        const Vec half = round(n * fill(0.5f));
        return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(n - half))};
    }
    static __m256 power(Vec n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    __m256 halves() const { return v; }
};

inline float largest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// 8 rows of 32 bits become 8 columns.
inline void transpose(Vec (&x)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        x[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

#else
#error "needs AVX2 and FMA"
#endif

// The sums of four vectors' elements, each in one fixed order.
inline __m128 sums(Vec a, Vec b, Vec c, Vec d) {
    const __m256 ab = _mm256_hadd_ps(a.halves(), b.halves());
    const __m256 cd = _mm256_hadd_ps(c.halves(), d.halves());
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

inline float sum(Vec a) {
    const __m256 x = a.halves();
    const __m256 pairs = _mm256_hadd_ps(x, x);
    const __m256 fours = _mm256_hadd_ps(pairs, pairs);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}

// e^x with an error of at most 2 ulp; 0 and infinity where float32 ends; NaN stays.
inline Vec exp(Vec x) {
    const Vec low = Vec::fill(-104.5f), high = Vec::fill(89.5f);
    // max and min return their second operand where one is NaN.
    const Vec bounded = min(high, max(low, x));
    const Vec n = round(bounded * Vec::fill(1.44269504f));
    // x = n · ln 2 + r, with ln 2 in two parts.
    Vec r = fma(n, Vec::fill(-0.693359375f), bounded);
    r = fma(n, Vec::fill(2.12194440e-4f), r);
    Vec p = Vec::fill(1.9875691500e-4f);
    p = fma(p, r, Vec::fill(1.3981999507e-3f));
    p = fma(p, r, Vec::fill(8.3334519073e-3f));
    p = fma(p, r, Vec::fill(4.1665795894e-2f));
    p = fma(p, r, Vec::fill(1.6666665459e-1f));
    p = fma(p, r, Vec::fill(5.0000001201e-1f));
    return scale_by_power(fma(p, r * r, r + Vec::fill(1.0f)), n);
}

// 2^x of N vectors with an error of at most 2 ulp, step by step so that their steps overlap; 0 and infinity where float32
// ends; NaN stays.
template <int N>
inline void exp2(Vec (&x)[N]) {
    const Vec low = Vec::fill(-151.0f), high = Vec::fill(129.0f);
    Vec n[N], p[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i] = min(high, max(low, x[i]));
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) n[i] = round(x[i]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i] = x[i] - n[i];
    // A polynomial of the least relative error for 2^x with |x| <= 1/2, and exact at 0.
    const Vec coefficients[] = {Vec::fill(1.3398874e-3f),  Vec::fill(9.6184369e-3f), Vec::fill(5.5503324e-2f),
                                Vec::fill(2.4022648e-1f), Vec::fill(6.9314718e-1f), Vec::fill(1.0f)};
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = fma(Vec::fill(1.5353362e-4f), x[i], coefficients[0]);
#pragma GCC unroll 5
    for (int c = 1; c < 6; ++c)
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], x[i], coefficients[c]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i] = scale_by_power(p[i], n[i]);
}

inline Vec exp2(Vec x) {
    Vec one[1] = {x};
    exp2(one);
    return one[0];
}

inline Vec sigmoid(Vec x) { return Vec::fill(1.0f) / (Vec::fill(1.0f) + exp(Vec::zero() - x)); }
inline Vec silu(Vec x) { return x / (Vec::fill(1.0f) + exp(Vec::zero() - x)); }

// log(1 + e^x) with an error of a few ulp; x where e^x is no float.
inline Vec softplus(Vec x) {
    const Vec zero = Vec::zero(), one = Vec::fill(1.0f);
    // log(1 + u) = 2 artanh(s) with s = u / (2 + u) in [0, 1/3].
    const Vec u = exp(zero - max(x, zero - x)), s = u / (u + Vec::fill(2.0f)), square = s * s;
    Vec p = Vec::fill(1.0f / 17);
    for (int n = 15; n > 1; n -= 2) p = fma(p, square, Vec::fill(1.0f / float(n)));
    return fma(fma(p, square, one), s + s, max(x, zero));
}

#if defined(__AVX512F__)

// 2^(i/32), i from 0 to 31, times what makes 1 + r the best line for e^r.
struct PowersOfTwo {
    alignas(64) float of[32];
    constexpr PowersOfTwo() : of() {
        double power = 1.0 + 2.93e-5;
        for (float& each : of) each = float(power), power *= 1.0218971486541166;
    }
};

// SiLU of N vectors, step by step so that their steps overlap, with an error of at most 1e-4 of the result: rounding it to
// bfloat16 is 20 times as much.
template <int N>
QNEXT_INLINE inline void silu_for_bfloat16(Vec (&x)[N]) {
    static constexpr PowersOfTwo powers;
    const __m512 bound = _mm512_set1_ps(104.0f), shift = _mm512_set1_ps(393216.0f), one = _mm512_set1_ps(1.0f);
    const __m512 minus_log2_e = _mm512_set1_ps(-1.44269504f), minus_ln_2 = _mm512_set1_ps(-0.69314718f);
    const __m512 low = _mm512_load_ps(powers.of), high = _mm512_load_ps(powers.of + 16);
    __m512 r[N], n[N], p[N];
    // e^-x = 2^n · e^r with |r| <= ln 2 / 64, where the sum with 2^18 · 1.5 leaves 5 bits behind the point of n; infinity at
    // -104 and 0 at 104.
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = _mm512_range_ps(x[i].v, bound, 0x2);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = _mm512_fmadd_ps(r[i], minus_log2_e, shift);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) n[i] = _mm512_sub_ps(p[i], shift);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = _mm512_permutex2var_ps(low, _mm512_castps_si512(p[i]), high);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = _mm512_sub_ps(one, r[i]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = _mm512_scalef_ps(p[i], n[i]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = _mm512_fmadd_ps(n[i], minus_ln_2, r[i]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = _mm512_fmadd_ps(p[i], r[i], one);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = _mm512_rcp14_ps(p[i]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i].v = _mm512_mul_ps(x[i].v, p[i]);
}

#else

// SiLU of N vectors, step by step so that their steps overlap, with an error of at most 4e-6 of the result: rounding it to
// bfloat16 is 500 times as much.
template <int N>
QNEXT_INLINE inline void silu_for_bfloat16(Vec (&x)[N]) {
    const Vec low = Vec::fill(-89.5f), high = Vec::fill(104.5f), one = Vec::fill(1.0f);
    const Vec minus_log2_e = Vec::fill(-1.44269504f);
    Vec n[N], r[N], p[N];
    // e^-x = 2^n · 2^r with |r| <= 1/2, and a polynomial of the least relative error for 2^r.
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = min(high, max(low, x[i]));
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) n[i] = round(r[i] * minus_log2_e);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) r[i] = fms(r[i], minus_log2_e, n[i]);
    const Vec coefficients[] = {Vec::fill(5.5917863e-2f), Vec::fill(2.4024744e-1f), Vec::fill(6.9312179e-1f),
                                Vec::fill(9.9999928e-1f)};
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = fma(Vec::fill(9.5701022e-3f), r[i], coefficients[0]);
#pragma GCC unroll 3
    for (int c = 1; c < 4; ++c)
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], coefficients[c]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) p[i] = scale_by_power(p[i], n[i]) + one;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) x[i] = x[i] / p[i];
}

#endif

// SiLU of N vectors whose results are stored as T.
template <class T, int N>
QNEXT_INLINE inline void silu_for(Vec (&x)[N]) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        silu_for_bfloat16(x);
    } else {
        for (Vec& each : x) each = silu(each);
    }
}

// Sizes in whole vectors: `padded(5)` is 8 or 16.
inline int64_t padded(int64_t size) { return (size + Vec::size - 1) / Vec::size * Vec::size; }

}  // namespace qnext
