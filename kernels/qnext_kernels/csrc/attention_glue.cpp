// Around the attention: the joint projection split, queries and keys normalised and rotated; the output gated.
#include "decoder_layer.h"

namespace qnext {

namespace {

// `weight` is 1 + that of the norm; cos and sin are those of the first 2 · half elements.
template <class T>
void norm_rope(const T* x, const float* weight, const float* cos, const float* sin, int64_t half, int64_t width,
               float eps, T* out) {
    const Vec scale = Vec::fill(inverse_rms(x, width, eps));
    const auto normed = [&](int64_t i, auto part) { return load(x + i, part) * scale * load(weight + i, part); };
    for_vectors(half, [&](int64_t i, auto part) {
        const Vec first = normed(i, part), second = normed(half + i, part);
        const Vec c = load(cos + i, part), s = load(sin + i, part);
        store(first * c - second * s, out + i, part);
        store(second * c + first * s, out + half + i, part);
    });
    const int64_t rotary = 2 * half;
    for_vectors(width - rotary, [&](int64_t i, auto part) { store(normed(rotary + i, part), out + rotary + i, part); });
}

Scratch<float> one_plus(const Floats& weight, int64_t width) {
    Scratch<float> sums = scratch<float>(width);
    for (int64_t i = 0; i < width; ++i) sums[i] = 1.0f + weight[i];
    return sums;
}

template <class T>
void qk_norm_rope_gate(const QkNormRopeGate& p) {
    const Scratch<float> q_weight = one_plus(p.q_weight, p.head_dim), k_weight = one_plus(p.k_weight, p.head_dim);
    const int64_t dim = p.head_dim, half = p.rotary_dim / 2;
    const float eps = float(p.eps);
    for_rows(p.tokens, 1, p.tokens * (p.heads + p.kv_heads) * dim, [&](int64_t t, int64_t) {
        const Scratch<float> cos_sin = scratch<float>(p.rotary_dim);
        for (int64_t i = 0; i < p.rotary_dim; ++i) cos_sin[i] = p.cos_sin[p.positions[t] * p.cos_sin_row + i];
        const float *cos = cos_sin.get(), *sin = cos + half;
        const T* from = static_cast<const T*>(p.qkv) + t * p.qkv_token;
        T* q = static_cast<T*>(p.q) + t * p.heads * dim;
        T* gate = static_cast<T*>(p.gate) + t * p.heads * dim;
        for (int64_t h = 0; h < p.heads; ++h, from += 2 * dim) {
            norm_rope(from, q_weight.get(), cos, sin, half, dim, eps, q + h * dim);
            std::memcpy(gate + h * dim, from + dim, size_t(dim) * sizeof(T));
        }
        T* k = static_cast<T*>(p.k) + t * p.kv_heads * dim;
        for (int64_t h = 0; h < p.kv_heads; ++h, from += dim) {
            norm_rope(from, k_weight.get(), cos, sin, half, dim, eps, k + h * dim);
        }
        std::memcpy(static_cast<T*>(p.v) + t * p.kv_heads * dim, from, size_t(p.kv_heads * dim) * sizeof(T));
    });
}

template <class T, class G>
void sigmoid_gate(const SigmoidGate& p) {
    for_rows(p.outer, p.inner, p.outer * p.inner * p.width, [&](int64_t outer, int64_t inner) {
        const T* x = p.x.row<T>(outer, inner);
        const G* gate = p.gate.row<G>(outer, inner);
        T* out = static_cast<T*>(p.out) + (outer * p.inner + inner) * p.width;
        if (p.gate_width == 1) {
            const Vec factor = sigmoid(Vec::fill(to_float(*gate)));
            for_vectors(p.width, [&](int64_t i, auto part) { store(load(x + i, part) * factor, out + i, part); });
        } else {
            for_vectors(p.width, [&](int64_t i, auto part) {
                store(load(x + i, part) * sigmoid(load(gate + i, part)), out + i, part);
            });
        }
    });
}

}  // namespace
}  // namespace qnext

extern "C" bool qnext_qk_norm_rope_gate(const qnext::QkNormRopeGate* p) {
    using namespace qnext;
    for (int64_t t = 0; t < p->tokens; ++t) {
        if (p->positions[t] < 0 || p->positions[t] >= p->max_position) return false;
    }
    with_type(p->dtype, [&](auto x) { qk_norm_rope_gate<decltype(x)>(*p); });
    return true;
}

extern "C" void qnext_sigmoid_gate(const qnext::SigmoidGate* p) {
    using namespace qnext;
    with_type(p->x.dtype, [&](auto x) {
        with_type(p->gate.dtype, [&](auto gate) { sigmoid_gate<decltype(x), decltype(gate)>(*p); });
    });
}
