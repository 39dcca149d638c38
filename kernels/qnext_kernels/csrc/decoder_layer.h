// The operations of a decoder layer that are called by themselves and as parts of one call (decoder_layer.cpp).
#pragma once

#include "rows.h"

namespace qnext {

struct RmsNorm {
    Rows x, residual;
    const void* weight;  // [width]
    int64_t weight_dtype;
    void *out, *total;  // contiguous; x + residual, where there is a residual, in `total`
    int64_t outer, inner, width;
    double eps;
};

struct QkNormRopeGate {
    const void* qkv;
    int64_t dtype, qkv_token;  // stride
    Indices positions;
    Floats q_weight, k_weight, cos_sin;
    int64_t cos_sin_row;       // stride
    void *q, *k, *v, *gate;    // contiguous
    int64_t tokens, heads, kv_heads, head_dim, rotary_dim, max_position;
    double eps;
};

struct SigmoidGate {
    Rows x, gate;
    void* out;  // contiguous
    int64_t outer, inner, width, gate_width;
};

struct Linear {
    const void *x, *weight, *bias;  // [tokens, k] with a stride, [rows, k] as it is or packed, [rows] or none
    void* out;                      // [tokens, rows], contiguous
    int64_t dtype, x_token, tokens, rows, k, packed;
};

struct TopkSoftmax {
    Rows logits;
    float* weights;  // [tokens, top_k], contiguous
    int32_t* ids;    // [tokens, top_k], contiguous
    int64_t tokens, experts, top_k, renormalize;
};

struct Experts {
    const void* x;   // [tokens, hidden], stride between tokens
    const void* w13; // [experts, 2, middle, hidden], contiguous; each matrix as it is or packed
    const void* w2;  // [experts, hidden, middle], contiguous; each matrix as it is or packed
    const float* weights;
    Indices ids;     // [tokens, top_k]
    const void *shared_w13, *shared_w2, *shared_gate;  // of the shared expert and [hidden], or none; packed as the others
    void* out;       // [tokens, hidden], contiguous
    int64_t dtype, x_token, tokens, top_k, experts, hidden, middle, shared_middle, packed;

    int64_t choices() const { return top_k + (shared_w13 != nullptr); }
};

}  // namespace qnext

extern "C" {
__attribute__((visibility("default"))) void qnext_rms_norm(const qnext::RmsNorm* p);
// Returns false, having written nothing, where a position lies outside of the table.
__attribute__((visibility("default"))) bool qnext_qk_norm_rope_gate(const qnext::QkNormRopeGate* p);
__attribute__((visibility("default"))) void qnext_sigmoid_gate(const qnext::SigmoidGate* p);
__attribute__((visibility("default"))) void qnext_linear(const qnext::Linear* p);
__attribute__((visibility("default"))) void qnext_topk_softmax(const qnext::TopkSoftmax* p);
// Returns false, having written nothing, where an id is no expert.
__attribute__((visibility("default"))) bool qnext_experts(const qnext::Experts* p);
}
