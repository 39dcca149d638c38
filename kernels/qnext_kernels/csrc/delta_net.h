// The operations of a Gated DeltaNet layer, and its decode and its verify, which call them (gated_delta_net.cpp).
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

struct GatedDeltaNet {
    const void* qkvz;  // [tokens, key heads, 2 key dim + 2 group * value dim], unit stride along the last
    int64_t dtype, x_token, x_head;
    Floats ba;  // [tokens, key heads, 2 group]
    int64_t ba_token, ba_head, ba_column;
    Floats conv_weight, A_log, dt_bias, norm_weight;  // contiguous
    ConvPool conv_state;
    int64_t conv_dtype;
    void* state;
    int64_t state_dtype, state_slot;
    Indices slots;  // [sequences, slot_columns], contiguous; the convolution's are those of column 0
    int64_t slot_columns;
    Indices query_start_loc, accepted;  // verify
    ConvPool conv_steps;                // verify into step pools
    int64_t conv_steps_step;
    void* steps;
    int64_t steps_dtype, steps_row, steps_step;
    Indices step_rows;
    void* out;  // [tokens, value heads, value dim], contiguous
    int64_t tokens, sequences, key_heads, value_heads, key_dim, value_dim, width;
    int64_t is_verify;
    int64_t state_slots, conv_slots, steps_rows, most_accepted, most_tokens;  // how many there are, a sequence has at most
    double eps;

    // Whether slots, offsets, accepted tokens and rows lie within what they point into.
    bool in_range() const {
        int64_t end = 0;
        for (int64_t n = 0; n < sequences; ++n) {
            for (int64_t c = 0; c < slot_columns; ++c) {
                const int64_t slot = slots[n * slot_columns + c];
                if (slot < -1 || slot >= state_slots || (c == 0 && slot >= conv_slots)) return false;
            }
            if (!is_verify) continue;
            const int64_t start = query_start_loc[n];
            const bool follows = start == end && query_start_loc[n + 1] >= start;
            end = query_start_loc[n + 1];
            if (!follows || end - start > most_tokens || accepted[n] < 1 || accepted[n] > most_accepted) return false;
            if (step_rows.data && (step_rows[n] < -1 || step_rows[n] >= steps_rows)) return false;
        }
        return is_verify ? end == tokens : sequences == tokens;
    }
};

}  // namespace qnext

extern "C" {
// Returns false, having written nothing, where an index is out of range.
__attribute__((visibility("default"))) bool qnext_gated_delta_net(const qnext::GatedDeltaNet* p);
__attribute__((visibility("default"))) void qnext_causal_conv1d(const qnext::CausalConv1d* p);
__attribute__((visibility("default"))) void qnext_gated_delta_rule(const qnext::DeltaRule* p);
}
