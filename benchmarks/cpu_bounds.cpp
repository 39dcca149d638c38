// What a processor can do at most: multiply-adds that stay in registers, and memory that is only moved.
// cpu_bounds.py compiles and calls it; threads are OpenMP's, and each thread has a part of its own.

#include <immintrin.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__AVX512F__)
using Vec = __m512;
inline Vec load(const float* p) { return _mm512_load_ps(p); }
inline void store(float* p, Vec x) { _mm512_store_ps(p, x); }
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
constexpr int chains = 24;
#else
using Vec = __m256;
inline Vec load(const float* p) { return _mm256_load_ps(p); }
inline void store(float* p, Vec x) { _mm256_store_ps(p, x); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fill(float x) { return _mm256_set1_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
constexpr int chains = 12;
#endif
constexpr int64_t width = sizeof(Vec) / sizeof(float);

// Keeps what has been computed from being left out.
inline void use(Vec x) { asm volatile("" ::"v"(x)); }

template <class Step>
void repeat(int64_t rounds, Step step) {
#pragma omp parallel
    {
        Vec sums[chains];
        for (Vec& sum : sums) sum = fill(0);
        for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
            for (Vec& sum : sums) sum = step(sum);
        }
        for (Vec& sum : sums) use(sum);
    }
}

}  // namespace

// Each returns the FLOP of one thread.
EXPORT int64_t float32_multiply_adds(int64_t rounds) {
    const Vec a = fill(1e-3f), b = fill(1e-3f);
    repeat(rounds, [&](Vec sum) { return multiply_add(a, b, sum); });
    return rounds * chains * width * 2;
}

// 0 where the processor has no such instruction.
EXPORT int64_t bfloat16_dot_products(int64_t rounds) {
#if defined(__AVX512BF16__)
    const __m512bh a = _mm512_cvtne2ps_pbh(fill(1e-3f), fill(1e-3f)), b = a;
    repeat(rounds, [&](Vec sum) { return _mm512_dpbf16_ps(sum, a, b); });
    return rounds * chains * width * 4;
#else
    (void)rounds;
    return 0;
#endif
}

// data: [blocks, size] floats, aligned to a vector, as all below; size: a multiple of eight vectors.
EXPORT void read_blocks(const float* data, int64_t blocks, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        Vec sums[8];
        for (Vec& sum : sums) sum = fill(0);
        const float* from = data + block * size;
        for (int64_t i = 0; i < size; i += 8 * width) {
            for (int j = 0; j < 8; ++j) sums[j] = add(sums[j], load(from + i + j * width));
        }
        for (Vec& sum : sums) use(sum);
    }
}

// As above, and beside each line of 64 bytes the arithmetic of attention's decode, whose results stay in registers: with 8
// query heads a key-value head, 12 BF16 dot products or multiply-adds of 16 lanes, without dot products 32 of 8 lanes.
EXPORT void multiply_blocks(const float* data, int64_t blocks, int64_t size) {
    constexpr int count = width == 16 ? 12 : 8, times = width == 16 ? 1 : 2;
    constexpr int64_t ahead = 4096;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        Vec sums[count];
        for (Vec& sum : sums) sum = fill(0);
        const Vec factor = fill(1e-3f);
        const float* from = data + block * size;
        for (int64_t i = 0; i < size; i += width) {
            if (i % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + i + ahead), _MM_HINT_T0);
            const Vec x = load(from + i);
#pragma GCC unroll 2
            for (int time = 0; time < times; ++time) {
#pragma GCC unroll 12
                for (Vec& sum : sums) sum = multiply_add(x, factor, sum);
            }
        }
        for (Vec& sum : sums) use(sum);
    }
}

EXPORT void update_blocks(float* data, int64_t blocks, int64_t size) {
    const Vec one = fill(1);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        float* at = data + block * size;
        for (int64_t i = 0; i < size; i += width) store(at + i, add(load(at + i), one));
    }
}

// to: [blocks, copies, size]; written past the caches.
EXPORT void copy_blocks(const float* data, float* to, int64_t blocks, int64_t size, int64_t copies) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const float* from = data + block * size;
        for (int64_t copy = 0; copy < copies; ++copy) {
            float* at = to + (block * copies + copy) * size;
            for (int64_t i = 0; i < size; i += width) stream(at + i, load(from + i));
        }
        _mm_sfence();
    }
}
