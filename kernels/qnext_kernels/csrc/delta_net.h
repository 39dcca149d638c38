// The operations of a Gated DeltaNet layer that its decode and its verify call too (gated_delta_net.cpp).
#pragma once

#include "arguments.h"

namespace qnext {

// Strides of a pool: from a slot to the next, from a channel to the next, from an input to the next.
struct ConvPool {
    void* data;
    int64_t slot, channel, column;
};

struct CausalConv1d {
    const void* x;  // [tokens, channels], unit stride along the channels
    void* y;        // [tokens, channels], contiguous
    int64_t dtype, x_token;
    Floats weight;  // [channels, width], contiguous
    ConvPool state;
    int64_t state_dtype;
    Indices slots;
    int64_t slot_stride;
    Indices query_start_loc;  // none: one token a sequence
    const bool* has_initial;  // prefill
    Indices snapshot_slots, snapshot_lengths;
    Indices accepted;  // verify
    ConvPool steps;    // verify into a step pool, of the dtype of the state
    int64_t steps_step;
    Indices step_rows;
    int64_t tokens, sequences, channels, width;
    int64_t every_token;  // verify: the inputs behind each token are kept
    // With key heads, x is what a projection leaves of each, x_head apart: its q and its k, of key_dim channels, and its v.
    int64_t key_heads, key_dim, x_head;
};

struct DeltaRule {
    const void *q, *k, *v;
    void* out;  // [tokens, value heads, value dim], contiguous
    int64_t dtype;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    Floats a, b;
    int64_t a_token, b_token;
    Floats A_log, dt_bias;
    void* state;
    int64_t state_dtype, state_slot;
    Indices slots;
    int64_t slot_columns;
    Indices accepted;          // verify
    Indices query_start_loc;   // none: one token a sequence
    const bool* has_initial;   // prefill
    Indices snapshot_slots, snapshot_lengths;
    void* steps;  // verify into a step pool
    int64_t steps_dtype, steps_row, steps_step;
    Indices step_rows;
    int64_t sequences, key_heads, value_heads, key_dim, value_dim;
    int64_t every_token;  // verify: the state behind each token is kept
    int64_t recurrent;    // prefill: token by token
};

}  // namespace qnext

extern "C" {
__attribute__((visibility("default"))) void qnext_causal_conv1d(const qnext::CausalConv1d* p);
__attribute__((visibility("default"))) void qnext_gated_delta_rule(const qnext::DeltaRule* p);
}
