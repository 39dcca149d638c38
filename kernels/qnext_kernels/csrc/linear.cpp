// x · weightᵀ + bias, and the packing of weights that makes reading them one stream.
//
// For a few tokens the limit is reading the weights once, for many the rate of multiplications. Threads take panels.
#include "decoder_layer.h"
#include "matmul_tiles.h"

namespace qnext {

struct Pack {
    void* weights;  // [matrices, rows, k], contiguous; k is whole steps
    int64_t stored, matrices, rows, k;
    int64_t back;  // from panels to rows
};

namespace {

constexpr int64_t kTokenBlock = 1024;  // tokens that stay in the last-level cache while all weights pass by
constexpr int64_t kLeastBlock = 32;    // tokens: fewer would wait for the weights

template <class T>
void store(const float* products, int64_t count, const T* bias, T* out, int64_t stride, int64_t columns) {
    for (int64_t i = 0; i < count; ++i, products += kPanel, out += stride) {
        int64_t c = 0;
        for (; c + Vec::size <= columns; c += Vec::size) {
            const Vec x = Vec::load(products + c);
            (bias ? x + Vec::load(bias + c) : x).store(out + c);
        }
        for (; c < columns; ++c) assign(out[c], bias ? products[c] + to_float(bias[c]) : products[c]);
    }
}

template <class T, class W>
void linear(const Linear& p) {
    const auto* scales = static_cast<const Scale<W>*>(p.scale);
    const Matrix<W> weight{static_cast<const W*>(p.weight), p.rows, p.k, p.packed != 0, scales, p.group};
    const T *x = static_cast<const T*>(p.x), *bias = static_cast<const T*>(p.bias);
    T* out = static_cast<T*>(p.out);
    const int64_t threads = worth_threads(p.tokens * p.rows * p.k) ? omp_get_max_threads() : 1;
    // Two panels are two streams for a few tokens; for many, one stays in the second-level cache. Scales are a stream too.
    const bool two = p.tokens <= kFew && std::is_same_v<T, W> && panels_of(p.rows) >= 2 * threads;
    const int64_t at_once = two ? 2 : 1, ranges = (p.rows + at_once * kPanel - 1) / (at_once * kPanel);
    // Threads share panels, and tokens too where there are few panels.
    constexpr int64_t most = kTiled<T> ? kTokens : kTokenBlock;
    int64_t blocks = std::max<int64_t>(1, (p.tokens + most - 1) / most);
    while (!keep_busy(ranges * blocks, threads) && p.tokens / (blocks + 1) >= kLeastBlock) ++blocks;
    const int64_t token_block = std::max<int64_t>(1, (p.tokens + blocks - 1) / blocks);
#pragma omp parallel num_threads(threads)
    {
        ActivationsOf<T, W> activations(p.k);
        int64_t taken = -1;
        const int64_t panel_size = Matrix<W>::panel_size(p.k);
        const auto memory = scratch<W>(weight.packed ? panel_size : at_once * panel_size);
        const Products products(std::min(kTokens, p.tokens));
        for (int64_t begin = 0; begin < p.tokens; begin += token_block) {
            const int64_t end = std::min(begin + token_block, p.tokens);
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t range = 0; range < ranges; ++range) {
                const int64_t first = range * at_once * kPanel, panels = std::min(at_once, panels_of(p.rows - first));
                Panel<W> w[2] = {};
                for (int64_t n = 0; n < panels; ++n)
                    w[n] = weight.panel(first + n * kPanel, memory.get() + (weight.packed ? 0 : n * panel_size));
                for (int64_t block = begin; block < end; block += kTokens) {
                    const int64_t tokens = std::min(kTokens, end - block);
                    if (block != taken) activations.take(tokens, [&](int64_t i) { return x + (block + i) * p.x_token; });
                    taken = block;
                    multiply<T>(activations.rows(), tokens, w, panels, p.k, products.get());
                    for (int64_t n = 0; n < panels; ++n) {
                        const int64_t row = first + n * kPanel;
                        store(products.row(n, 0), tokens, bias ? bias + row : nullptr, out + block * p.rows + row, p.rows,
                              std::min(kPanel, p.rows - row));
                    }
                }
            }
        }
    }
}

template <class S>
void unpack_panel(const int4<S>* panel, int64_t k, int4<S>* to) {
    const int64_t steps = steps_of<int4<S>>(k);
    std::fill_n(to, steps * kPanel, int4<S>{});
    for (int64_t r = 0; r < kPanel; ++r)
        for (int64_t i = 0; i < steps; ++i)
            for (int odd = 0; odd < 2; ++odd) {
                const int code = panel[i * kPanel + int4_byte(r, odd)].columns >> int4_shift(r, odd) & 15;
                to[r * steps + i].columns |= uint8_t((code ^ kInt4Flip) << 4 * odd);
            }
}

template <class W>
void unpack_bytes(const W* panel, int64_t k, W* to) {
    for (int64_t r = 0; r < kPanel; ++r)
        for (int64_t i = 0; i < k; ++i) to[r * k + i] = {unpacked_byte(panel[i / 2 * 2 * kPanel + byte_place(r, i % 2)])};
}

void unpack_panel(const float8* panel, int64_t k, float8* to) { unpack_bytes(panel, k, to); }

template <class S>
void unpack_panel(const int8<S>* panel, int64_t k, int8<S>* to) {
    unpack_bytes(panel, k, to);
}

template <class T>
void unpack_panel(const T* panel, int64_t k, T* to) {
    constexpr int64_t step = kStep<T>;
    for (int64_t r = 0; r < kPanel; ++r)
        for (int64_t i = 0; i < k; ++i) to[r * k + i] = panel[(i / step * kPanel + r) * step + i % step];
}

template <class T>
void pack(const Pack& p) {
    const int64_t panels = p.rows / kPanel, size = stored_in<T>(kPanel * p.k);
    T* weights = static_cast<T*>(p.weights);
#pragma omp parallel
    {
        const auto memory = scratch<T>(size);
#pragma omp for collapse(2)
        for (int64_t m = 0; m < p.matrices; ++m) {
            for (int64_t panel = 0; panel < panels; ++panel) {
                T* place = weights + stored_in<T>((m * p.rows + panel * kPanel) * p.k);
                if (p.back)
                    unpack_panel(place, p.k, memory.get());
                else
                    pack_panel(place, kPanel, p.k, memory.get());
                std::copy_n(memory.get(), size, place);
            }
        }
    }
}

}  // namespace
}  // namespace qnext

extern "C" void qnext_linear(const qnext::Linear* p) {
    qnext::with_types(p->dtype, p->stored, [&](auto type, auto weight) {
        qnext::linear<decltype(type), decltype(weight)>(*p);
    });
}

extern "C" __attribute__((visibility("default"))) void qnext_pack(const qnext::Pack* p) {
    if (p->stored == qnext::kFloat8) return qnext::pack<qnext::float8>(*p);
    if (p->stored == qnext::kInt4) return qnext::pack<qnext::int4<float>>(*p);
    if (p->stored == qnext::kInt8) return qnext::pack<qnext::int8<float>>(*p);
    qnext::with_type(p->stored, [&](auto type) { qnext::pack<decltype(type)>(*p); });
}
