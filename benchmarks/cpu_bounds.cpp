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

// A line of 64 bytes times what 8 query heads have for it.
inline void add_values(const float* line, Vec factor, Vec (&sums)[16]) {
    for (int64_t i = 0; i < 16; i += width) {
        const Vec x = load(line + i);
#pragma GCC unroll 16
        for (Vec& sum : sums) sum = multiply_add(x, factor, sum);
    }
}

// Two lines that 8 query heads are multiplied with.
inline void add_scores(const float* lines, Vec factor, Vec (&sums)[16]) {
#if defined(__AVX512BF16__)
    const __m512bh x = (__m512bh)load(lines), y = (__m512bh)load(lines + 16);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
        sums[k] = _mm512_dpbf16_ps(sums[k], x, (__m512bh)factor);
        sums[8 + k] = _mm512_dpbf16_ps(sums[8 + k], y, (__m512bh)factor);
    }
#else
    add_values(lines, factor, sums);
    add_values(lines + 16, factor, sums);
#endif
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

// As above, but as attention's decode reads: of every two blocks one is keys and one values, rows of 512 bytes; of 16 rows
// at a time the keys one behind the other, the values by columns of a line, while the next 16 of both are fetched; the pairs
// of blocks, pages of a cache, in another order than they lie. Beside each line its arithmetic with 8 query heads a
// key-value head and nothing else: 8 BF16 dot products or 16 multiply-adds of 16 lanes, without dot products 32 of 8 lanes.
EXPORT void multiply_blocks(const float* data, int64_t blocks, int64_t size) {
    constexpr int64_t row = 128, rows = 16, columns = row / 16;  // floats; lines
    const int64_t pairs = blocks / 2, steps = size / row / rows;
    const auto keys_at = [&](int64_t step) {
        const int64_t pair = step / steps % pairs * 797 % pairs;
        return data + 2 * pair * size + step % steps * rows * row;
    };
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        Vec sums[16];
        for (Vec& sum : sums) sum = fill(0);
        const Vec factor = fill(1e-3f);
        for (int64_t step = pair * steps; step < (pair + 1) * steps; ++step) {
            const float *keys = keys_at(step), *values = keys + size, *next = keys_at(step + 1);
            int64_t line = 0;  // that is fetched: of keys, then of values
            const auto fetch = [&] {
                const float* const from = line < rows * columns ? next : next + size - rows * row;
                _mm_prefetch(reinterpret_cast<const char*>(from + line++ * 16), _MM_HINT_T0);
            };
            for (int64_t i = 0; i < rows * columns; i += 8) {
                for (int k = 0; k < 4; ++k) fetch();
#pragma GCC unroll 8
                for (int64_t k = i; k < i + 8; k += 2) add_scores(keys + k * 16, factor, sums);
            }
            for (int64_t column = 0; column < columns; ++column) {
                for (int64_t i = 0; i < rows; i += 4) {
                    for (int k = 0; k < 6; ++k) fetch();
#pragma GCC unroll 4
                    for (int64_t k = i; k < i + 4; ++k) add_values(values + k * row + column * 16, factor, sums);
                }
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
