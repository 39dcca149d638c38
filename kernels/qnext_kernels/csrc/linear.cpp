// x · weightᵀ + bias over weights as the checkpoint stores them, [rows, K].
//
// For a few tokens the limit is reading the weights once; threads take ranges of rows.
#include "matmul.h"

namespace qnext {

struct Linear {
    const void *x, *weight, *bias;  // [tokens, k] with a stride, [rows, k], [rows] or none
    void* out;                      // [tokens, rows], contiguous
    int64_t dtype, x_token, tokens, rows, k;
};

namespace {

constexpr int64_t kRows = 128;
constexpr int64_t kPacked = 10 * kTokens;  // packed at once, in memory of a few megabytes

template <class T>
void linear(const Linear& p) {
    using Packed = typename Dot<T>::Packed;
    const int64_t width = packed_width<T>(p.k), stride = packed_stride<T>(p.k), ranges = (p.rows + kRows - 1) / kRows;
    const auto packed = scratch<Packed>(std::min(kPacked, p.tokens) * stride);
    const T *x = static_cast<const T*>(p.x), *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
    T* out = static_cast<T*>(p.out);
#pragma omp parallel if (worth_threads(p.tokens * p.rows * p.k))
    {
        const auto products = scratch<float>(kTokens * kRows);
        for (int64_t begin = 0; begin < p.tokens; begin += kPacked) {
            const int64_t end = std::min(begin + kPacked, p.tokens);
#pragma omp for schedule(static)
            for (int64_t t = begin; t < end; ++t)
                Dot<T>::pack(x + t * p.x_token, p.k, packed.get() + (t - begin) * stride, width);
#pragma omp for schedule(dynamic, 1)
            for (int64_t range = 0; range < ranges; ++range) {
                const int64_t first = range * kRows, some = std::min(kRows, p.rows - first);
                const T* rows[kRows];
                for (int64_t r = 0; r < some; ++r) rows[r] = weight + (first + r) * p.k;
                for (int64_t block = begin; block < end; block += kTokens) {
                    const int64_t count = std::min(kTokens, end - block);
                    multiply<T>(packed.get() + (block - begin) * stride, count, rows, some, p.k, products.get());
                    for (int64_t i = 0; i < count; ++i)
                        for (int64_t r = 0; r < some; ++r)
                            assign(out[(block + i) * p.rows + first + r],
                                   products[i * some + r] + (bias ? to_float(bias[first + r]) : 0.0f));
                }
            }
        }
    }
}

}  // namespace
}  // namespace qnext

extern "C" __attribute__((visibility("default"))) void qnext_linear(const qnext::Linear* p) {
    qnext::with_type(p->dtype, [&](auto type) { qnext::linear<decltype(type)>(*p); });
}
