// Rows of unit stride in tensors of any other strides, and loops over their vectors.
#pragma once

#include <cmath>

#include "arguments.h"

namespace qnext {

// A tensor [outer, inner, width], as `rows.py` describes it; none without data.
struct Rows {
    const void* data;
    int64_t dtype, outer_stride, inner_stride;
    template <class T>
    const T* row(int64_t outer, int64_t inner) const {
        return static_cast<const T*>(data) + outer * outer_stride + inner * inner_stride;
    }
};

// Calls f(outer, inner) for every row, in parallel where their `elements` are many.
template <class F>
void for_rows(int64_t outer, int64_t inner, int64_t elements, F f) {
#pragma omp parallel for collapse(2) if (elements > 1 << 15)
    for (int64_t o = 0; o < outer; ++o) {
        for (int64_t i = 0; i < inner; ++i) f(o, i);
    }
}

struct Whole {};

// What is left at the end of a row.
struct Part {
    int64_t count;
};

template <class T>
Vec load(const T* p, Whole, float = 0.0f) { return Vec::load(p); }

// Elements behind the end are `rest`.
template <class T>
Vec load(const T* p, Part part, float rest = 0.0f) {
    T elements[Vec::size];
    for (T& element : elements) assign(element, rest);
    std::memcpy(elements, p, size_t(part.count) * sizeof(T));
    return Vec::load(elements);
}

template <class T>
void store(Vec v, T* p, Whole) { v.store(p); }

template <class T>
void store(Vec v, T* p, Part part) {
    T elements[Vec::size];
    v.store(elements);
    std::memcpy(p, elements, size_t(part.count) * sizeof(T));
}

// Calls f(offset, Whole or Part) for the vectors of a row.
template <class F>
void for_vectors(int64_t width, F f) {
    int64_t i = 0;
    for (; i + Vec::size <= width; i += Vec::size) f(i, Whole());
    if (i < width) f(i, Part{width - i});
}

// 1 / √(mean(x²) + eps)
template <class T>
float inverse_rms(const T* x, int64_t width, float eps) {
    // One sum would wait for itself.
    constexpr int chains = 4;
    Vec squares[chains];
    for (int c = 0; c < chains; ++c) squares[c] = Vec::zero();
    const int64_t blocks = width / (chains * Vec::size) * (chains * Vec::size);
    for (int64_t i = 0; i < blocks; i += chains * Vec::size) {
        for (int c = 0; c < chains; ++c) {
            const Vec v = Vec::load(x + i + c * Vec::size);
            squares[c] = fma(v, v, squares[c]);
        }
    }
    for_vectors(width - blocks, [&](int64_t i, auto part) {
        const Vec v = load(x + blocks + i, part);
        squares[0] = fma(v, v, squares[0]);
    });
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / std::sqrt(total / float(width) + eps);
}

// x / √(mean(x²) + eps) · weight · SiLU(z); `out` may be x.
template <class T, class Z, class W>
void gated_rms_norm_row(const T* x, const Z* z, const W* weight, int64_t width, float eps, T* out) {
    const Vec scale = Vec::fill(inverse_rms(x, width, eps));
    for_vectors(width, [&](int64_t i, auto part) {
        store(load(x + i, part) * scale * load(weight + i, part) * silu(load(z + i, part)), out + i, part);
    });
}

}  // namespace qnext
