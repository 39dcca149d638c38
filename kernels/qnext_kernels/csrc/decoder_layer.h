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
    // [blocks of rows, blocks of columns] floats of a weight in e4m3; in groups [rows, k / group] of the dtype, packed
    // as the weight is; or none
    const void* scale;
    void* out;                      // [tokens, rows], contiguous
    int64_t dtype, stored;  // the latter of the weight
    int64_t x_token, tokens, rows, k, group, packed;  // group: of a weight in groups, else 0
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
    const void* w13_scale;  // of each matrix as that of a linear, or none
    const void* w2;  // [experts, hidden, middle], contiguous; each matrix as it is or packed
    const void* w2_scale;
    const float* weights;
    Indices ids;     // [tokens, top_k]
    // Of the shared expert and [hidden], or none; stored and packed as the others, or beside int4 in int8 in groups of
    // the same size or without scales.
    const void* shared_w13;
    const void* shared_w13_scale;
    const void* shared_w2;
    const void* shared_w2_scale;
    const void* shared_gate;
    void* out;       // [tokens, hidden], contiguous
    int64_t dtype, stored, shared_stored;  // the latter two of weights, and the same where no expert is shared
    int64_t x_token, tokens, top_k, experts, hidden, middle, shared_middle, group, packed;

    int64_t choices() const { return top_k + (shared_w13 != nullptr); }
};

struct PagedAttention {
    const void *q, *gate, *keys, *values;  // gate: or none
    void* out;                             // [tokens, heads, head_dim], contiguous
    int64_t dtype;
    int64_t q_token, q_head, gate_token, gate_head;  // strides
    int64_t key_block, key_slot, key_head, value_block, value_slot, value_head;
    Indices block_table;
    int64_t table_row;
    Indices seq_lens, query_start_loc;
    int64_t sequences, heads, kv_heads, head_dim, block_size, causal;
    int64_t tokens, blocks, table_width;
    double scale;

    // Whether offsets, lengths and the blocks that are read lie within what they point into.
    bool in_range() const {
        for (int64_t n = 0; n < sequences; ++n) {
            const int64_t start = query_start_loc[n], end = query_start_loc[n + 1], length = seq_lens[n];
            if (start > end || end - start > length || length > table_width * block_size) return false;
            for (int64_t i = 0; i * block_size < length; ++i) {
                const int64_t block = block_table[n * table_row + i];
                if (block < 0 || block >= blocks) return false;
            }
        }
        return query_start_loc[0] == 0 && query_start_loc[sequences] == tokens;
    }
};

struct StoreKv {
    const void *k, *v;
    void *keys, *values;
    int64_t element_bytes;
    int64_t k_token, k_head, v_token, v_head;
    int64_t key_block, key_slot, key_head, value_block, value_slot, value_head;
    Indices slots;
    int64_t tokens, kv_heads, head_dim, block_size, blocks;

    bool in_range() const {
        for (int64_t t = 0; t < tokens; ++t)
            if (slots[t] < -1 || slots[t] >= blocks * block_size) return false;
        return true;
    }
};

// Before Gated DeltaNet: its two projections of the normalised x + residual. What one operation leaves to the next is null.
struct NormLinears {
    RmsNorm norm;
    Linear first, second;
};

// Before attention: heads of the normalised x + residual.
struct NormHeads {
    RmsNorm norm;
    Linear qkv;
    QkNormRopeGate heads;
};

// Behind the mixer: its output gated, where it has a gate, and projected; then the experts of the normalised sum.
struct LinearNormExperts {
    SigmoidGate gate;  // without x: none
    Linear out;
    RmsNorm norm;
    Linear router;
    TopkSoftmax choice;
    Experts experts;
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
// Both return false, having written nothing, where an index is out of range.
__attribute__((visibility("default"))) bool qnext_paged_attention(const qnext::PagedAttention* p);
__attribute__((visibility("default"))) bool qnext_store_kv(const qnext::StoreKv* p);
__attribute__((visibility("default"))) void qnext_norm_linears(const qnext::NormLinears* p);
// Returns false where a position lies outside of the table; then no result is complete.
__attribute__((visibility("default"))) bool qnext_norm_heads(const qnext::NormHeads* p);
__attribute__((visibility("default"))) void qnext_linear_norm_experts(const qnext::LinearNormExperts* p);
}
