// The router's choice of experts, and SwiGLU's middle.
#include <algorithm>
#include <limits>

#include "decoder_layer.h"

namespace qnext {

struct SiluAndMul {
    Rows x;
    void* out;  // contiguous
    int64_t outer, inner, width;  // of the result
};

namespace {

// e^(x − max(x)) into `out` [padded(size)]; returns their sum.
template <class T>
float exponentials(const T* x, int64_t size, float* out) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    Vec top = Vec::fill(lowest), total = Vec::zero();
    for_vectors(size, [&](int64_t i, auto part) { top = max(top, load(x + i, part, lowest)); });
    top = Vec::fill(largest(top));
    for_vectors(size, [&](int64_t i, auto part) {
        const Vec e = exp(load(x + i, part, lowest) - top);
        e.store(out + i);
        total = total + e;
    });
    return sum(total);
}

// The `count` largest values and their indices, largest first, of equals the lower index first.
void largest_first(const float* values, int64_t size, int64_t count, float* chosen, int32_t* ids) {
    for (int64_t i = 0; i < size; ++i) {
        // NaN is larger than nothing: whatever the values, the indices are valid and differ.
        if (i >= count && !(values[i] > chosen[count - 1])) continue;
        int64_t place = std::min(i, count - 1);
        for (; place > 0 && values[i] > chosen[place - 1]; --place) {
            chosen[place] = chosen[place - 1];
            ids[place] = ids[place - 1];
        }
        chosen[place] = values[i];
        ids[place] = int32_t(i);
    }
}

template <class T>
void topk_softmax(const TopkSoftmax& p) {
    for_rows(1, p.tokens, p.tokens * p.experts, [&](int64_t, int64_t t) {
        const Scratch<float> values = scratch<float>(padded(p.experts));
        const float total = exponentials(p.logits.row<T>(0, t), p.experts, values.get());
        float* weights = p.weights + t * p.top_k;
        largest_first(values.get(), p.experts, p.top_k, weights, p.ids + t * p.top_k);
        float chosen = 0.0f;
        for (int64_t j = 0; j < p.top_k; ++j) chosen += weights[j] /= total;
        if (!p.renormalize) return;
        for (int64_t j = 0; j < p.top_k; ++j) weights[j] /= chosen;
    });
}

template <class T>
void silu_and_mul(const SiluAndMul& p) {
    for_rows(p.outer, p.inner, p.outer * p.inner * p.width, [&](int64_t outer, int64_t inner) {
        const T *gate = p.x.row<T>(outer, inner), *up = gate + p.width;
        T* out = static_cast<T*>(p.out) + (outer * p.inner + inner) * p.width;
        for_vectors(p.width, [&](int64_t i, auto part) {
            store(silu(load(gate + i, part)) * load(up + i, part), out + i, part);
        });
    });
}

}  // namespace
}  // namespace qnext

extern "C" void qnext_topk_softmax(const qnext::TopkSoftmax* p) {
    qnext::with_type(p->logits.dtype, [&](auto logit) { qnext::topk_softmax<decltype(logit)>(*p); });
}

extern "C" __attribute__((visibility("default"))) void qnext_silu_and_mul(const qnext::SiluAndMul* p) {
    qnext::with_type(p->x.dtype, [&](auto x) { qnext::silu_and_mul<decltype(x)>(*p); });
}
