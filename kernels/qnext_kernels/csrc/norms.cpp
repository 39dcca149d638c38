// RMSNorm of rows: zero-centred with an optional residual, and gated.
#include "decoder_layer.h"

namespace qnext {

struct GatedRmsNorm {
    Rows x, z;
    const void* weight;  // [width]
    int64_t weight_dtype;
    void* out;  // contiguous
    int64_t outer, inner, width;
    double eps;
};

namespace {

template <class T>
void add(const T* a, const T* b, int64_t width, T* out) {
    for_vectors(width, [&](int64_t i, auto part) { store(load(a + i, part) + load(b + i, part), out + i, part); });
}

template <class T, class W>
void rms_norm(const RmsNorm& p) {
    for_rows(p.outer, p.inner, p.outer * p.inner * p.width, [&](int64_t outer, int64_t inner) {
        const int64_t place = (outer * p.inner + inner) * p.width;
        const T* x = p.x.row<T>(outer, inner);
        if (p.residual.data) {
            T* total = static_cast<T*>(p.total) + place;
            add(x, p.residual.row<T>(outer, inner), p.width, total);
            x = total;
        }
        const W* weight = static_cast<const W*>(p.weight);
        T* out = static_cast<T*>(p.out) + place;
        const Vec scale = Vec::fill(inverse_rms(x, p.width, float(p.eps))), one = Vec::fill(1.0f);
        for_vectors(p.width, [&](int64_t i, auto part) {
            store(load(x + i, part) * scale * (one + load(weight + i, part)), out + i, part);
        });
    });
}

// Rows of z lie apart in a projection, where a processor does not foresee the next one.
constexpr int64_t kAhead = 16;

template <class Z>
void fetch(const Z* row, int64_t width) {
    for (int64_t i = 0; i < width; i += int64_t(64 / sizeof(Z))) __builtin_prefetch(row + i);
}

template <class T, class Z, class W>
void gated_rms_norm(const GatedRmsNorm& p) {
    for_rows(p.outer, p.inner, p.outer * p.inner * p.width, [&](int64_t outer, int64_t inner) {
        const T* x = p.x.row<T>(outer, inner);
        const Z* z = p.z.row<Z>(outer, inner);
        const int64_t ahead = outer * p.inner + inner + kAhead;
        fetch(p.z.row<Z>(ahead / p.inner, ahead % p.inner), p.width);
        const W* weight = static_cast<const W*>(p.weight);
        T* out = static_cast<T*>(p.out) + (outer * p.inner + inner) * p.width;
        gated_rms_norm_row(x, z, weight, p.width, float(p.eps), out);
    });
}

}  // namespace
}  // namespace qnext

extern "C" void qnext_rms_norm(const qnext::RmsNorm* p) {
    using namespace qnext;
    with_type(p->x.dtype, [&](auto x) {
        with_type(p->weight_dtype, [&](auto weight) { rms_norm<decltype(x), decltype(weight)>(*p); });
    });
}

extern "C" __attribute__((visibility("default"))) void qnext_gated_rms_norm(const qnext::GatedRmsNorm* p) {
    using namespace qnext;
    with_type(p->x.dtype, [&](auto x) {
        with_type(p->z.dtype, [&](auto z) {
            with_type(p->weight_dtype, [&](auto w) { gated_rms_norm<decltype(x), decltype(z), decltype(w)>(*p); });
        });
    });
}
