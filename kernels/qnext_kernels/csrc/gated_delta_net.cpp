// Decode and verify of all that lies between the projections of a Gated DeltaNet layer: the convolution, the delta rule and
// the gated norm one after the other, reading what the projections wrote where it lies. They are the operations' own
// functions, each with its own division among threads, so the bits are theirs; what one leaves to the next is small beside
// the states and stays in the cache.
#include "delta_net.h"
#include "rows.h"

namespace qnext {

namespace {

template <class T>
void convolve(const GatedDeltaNet& p, T* convolved, int64_t channels) {
    CausalConv1d conv{};
    conv.x = p.qkvz, conv.y = convolved, conv.dtype = p.dtype, conv.x_token = p.x_token;
    conv.weight = p.conv_weight, conv.state = p.conv_state, conv.state_dtype = p.conv_dtype;
    conv.slots = p.slots, conv.slot_stride = p.slot_columns;
    conv.query_start_loc = p.query_start_loc, conv.accepted = p.accepted;
    conv.steps = p.conv_steps, conv.steps_step = p.conv_steps_step, conv.step_rows = p.step_rows;
    conv.tokens = p.tokens, conv.sequences = p.sequences, conv.channels = channels, conv.width = p.width;
    conv.every_token = p.is_verify;
    conv.key_heads = p.key_heads, conv.key_dim = p.key_dim, conv.x_head = p.x_head;
    qnext_causal_conv1d(&conv);
}

template <class T>
void apply_rule(const GatedDeltaNet& p, const T* convolved, int64_t channels) {
    const int64_t group = p.value_heads / p.key_heads, gates = p.tokens * p.value_heads;
    const Scratch<float> a = scratch<float>(gates), b = scratch<float>(gates);
    for (int64_t i = 0; i < gates; ++i) {
        const int64_t head = i % p.value_heads;
        const int64_t of_key = i / p.value_heads * p.ba_token + head / group * p.ba_head;
        b[i] = p.ba[of_key + head % group * p.ba_column];
        a[i] = p.ba[of_key + (group + head % group) * p.ba_column];
    }
    DeltaRule rule{};
    const int64_t keys = p.key_heads * p.key_dim;
    rule.q = convolved, rule.k = convolved + keys, rule.v = convolved + 2 * keys, rule.out = p.out, rule.dtype = p.dtype;
    rule.q_token = rule.k_token = rule.v_token = channels;
    rule.q_head = rule.k_head = p.key_dim, rule.v_head = p.value_dim;
    rule.a = {a.get(), kFloat32}, rule.b = {b.get(), kFloat32}, rule.a_token = rule.b_token = p.value_heads;
    rule.A_log = p.A_log, rule.dt_bias = p.dt_bias;
    rule.state = p.state, rule.state_dtype = p.state_dtype, rule.state_slot = p.state_slot;
    rule.slots = p.slots, rule.slot_columns = p.slot_columns;
    rule.accepted = p.accepted, rule.query_start_loc = p.query_start_loc;
    rule.steps = p.steps, rule.steps_dtype = p.steps_dtype, rule.steps_row = p.steps_row, rule.steps_step = p.steps_step;
    rule.step_rows = p.step_rows;
    rule.sequences = p.sequences, rule.key_heads = p.key_heads, rule.value_heads = p.value_heads;
    rule.key_dim = p.key_dim, rule.value_dim = p.value_dim, rule.every_token = p.is_verify;
    qnext_gated_delta_rule(&rule);
}

// In place.
template <class T, class W>
void norm(const GatedDeltaNet& p, const W* weight) {
    const int64_t group = p.value_heads / p.key_heads, before_z = 2 * p.key_dim + group * p.value_dim;
    for_rows(p.tokens, p.value_heads, p.tokens * p.value_heads * p.value_dim, [&](int64_t t, int64_t head) {
        T* const out = static_cast<T*>(p.out) + (t * p.value_heads + head) * p.value_dim;
        const T* const of_key = static_cast<const T*>(p.qkvz) + t * p.x_token + head / group * p.x_head;
        gated_rms_norm_row(out, of_key + before_z + head % group * p.value_dim, weight, p.value_dim, float(p.eps), out);
    });
}

}  // namespace
}  // namespace qnext

extern "C" bool qnext_gated_delta_net(const qnext::GatedDeltaNet* p) {
    using namespace qnext;
    if (!p->in_range()) return false;
    const int64_t channels = 2 * p->key_heads * p->key_dim + p->value_heads * p->value_dim;
    with_type(p->dtype, [&](auto token) {
        using T = decltype(token);
        const Scratch<T> convolved = scratch<T>(p->tokens * channels);
        convolve(*p, convolved.get(), channels);
        apply_rule(*p, convolved.get(), channels);
        with_type(p->norm_weight.dtype, [&](auto weight) {
            norm<T>(*p, static_cast<const decltype(weight)*>(p->norm_weight.data));
        });
    });
    return true;
}
