// All decoder layers of a step without prefills, one after the other in one call: what Python prepares for a layer once
// stays, and only what the step changes is filled in. The layers are the calls that the model makes otherwise
// (decoder_layer.cpp, gated_delta_net.cpp, paged_attention.cpp), so the bits are theirs.
#include "decoder_layer.h"
#include "delta_net.h"

namespace qnext {

// What the sequences of a step have in the pools of a group of Gated DeltaNet layers.
struct NetStep {
    Indices slots;  // [sequences, slot_columns], contiguous
    int64_t slot_columns, sequences;
    Indices query_start_loc, accepted;  // of a verify, else none
    int64_t most_accepted;
};

// The same of a group of attention layers.
struct AttentionStep {
    Indices slot_mapping, block_table;
    int64_t table_row, table_width, sequences;
    Indices seq_lens, query_start_loc;
};

// A layer without what a step fills in, of either kind.
struct StackLayer {
    int64_t is_attention, group;  // the group's place among the steps of its kind
    NormLinears inputs;
    GatedDeltaNet net;
    NormHeads heads;
    StoreKv store;
    PagedAttention attention;
    LinearNormExperts block;
};

struct DecoderStack {
    const StackLayer* layers;
    int64_t count;
    const NetStep* nets;
    const AttentionStep* attentions;
    Indices positions;
    const void *hidden, *residual;  // [tokens, width]; residual: or none
    int64_t hidden_token, residual_token, dtype, tokens, width;
    void *out, *total;  // [tokens, width], contiguous: hidden states and residual behind the last layer
};

namespace {

class Stack {
  public:
    explicit Stack(const DecoderStack& p) : p(p), bytes(p.dtype == kFloat32 ? 4 : 2) {}

    // False, having written nothing, where an index is out of range.
    bool run() {
        for (int64_t n = 0; n < p.count; ++n)
            if (!in_range(p.layers[n])) return false;
        for (int64_t t = 0; t < p.tokens; ++t) {
            const int64_t token = p.residual ? t * p.residual_token : t * p.hidden_token;
            std::memcpy(static_cast<char*>(p.total) + t * p.width * bytes,
                        static_cast<const char*>(p.residual ? p.residual : p.hidden) + token * bytes, p.width * bytes);
        }
        for (int64_t n = 0; n < p.count; ++n) {
            const StackLayer& layer = p.layers[n];
            if (layer.is_attention)
                attend(layer, n == 0);
            else
                mix(layer, n == 0);
        }
        return true;
    }

  private:
    Scratch<char> rows(int64_t width) const { return scratch<char>(p.tokens * width * bytes); }

    GatedDeltaNet net_of(const StackLayer& layer) const {
        GatedDeltaNet net = layer.net;
        const NetStep& step = p.nets[layer.group];
        net.slots = step.slots, net.slot_columns = step.slot_columns, net.sequences = step.sequences;
        net.query_start_loc = step.query_start_loc, net.accepted = step.accepted, net.tokens = p.tokens;
        net.is_verify = step.query_start_loc.data != nullptr;
        net.most_tokens = net.most_accepted = step.most_accepted;
        return net;
    }

    StoreKv store_of(const StackLayer& layer) const {
        StoreKv store = layer.store;
        store.slots = p.attentions[layer.group].slot_mapping, store.tokens = p.tokens;
        return store;
    }

    PagedAttention attention_of(const StackLayer& layer) const {
        PagedAttention attention = layer.attention;
        const AttentionStep& step = p.attentions[layer.group];
        attention.block_table = step.block_table, attention.table_row = step.table_row;
        attention.table_width = step.table_width, attention.sequences = step.sequences;
        attention.seq_lens = step.seq_lens, attention.query_start_loc = step.query_start_loc;
        attention.tokens = p.tokens;
        return attention;
    }

    bool in_range(const StackLayer& layer) const {
        if (!layer.is_attention) return net_of(layer).in_range();
        for (int64_t t = 0; t < p.tokens; ++t)
            if (p.positions[t] < 0 || p.positions[t] >= layer.heads.heads.max_position) return false;
        return store_of(layer).in_range() && attention_of(layer).in_range();
    }

    // The residual stream lies in `total`, and is added to in place.
    RmsNorm norm_of(RmsNorm norm, bool first) const {
        norm.inner = p.tokens;
        norm.x = first ? Rows{p.hidden, p.dtype, 0, p.hidden_token} : Rows{p.out, p.dtype, 0, p.width};
        if (first && !p.residual) return norm;
        norm.residual = {p.total, p.dtype, 0, p.width}, norm.total = p.total;
        return norm;
    }

    void mix(const StackLayer& layer, bool first) const {
        NormLinears inputs = layer.inputs;
        const Scratch<char> qkvz = rows(inputs.first.rows), ba = rows(inputs.second.rows);
        inputs.norm = norm_of(inputs.norm, first);
        inputs.first.tokens = inputs.second.tokens = p.tokens;
        inputs.first.out = qkvz.get(), inputs.second.out = ba.get();
        qnext_norm_linears(&inputs);
        GatedDeltaNet net = net_of(layer);
        const Scratch<char> mixed = rows(net.value_heads * net.value_dim);
        net.qkvz = qkvz.get(), net.x_token = inputs.first.rows;
        net.ba.data = ba.get(), net.ba_token = inputs.second.rows, net.out = mixed.get();
        qnext_gated_delta_net(&net);
        finish(layer, mixed.get(), nullptr);
    }

    void attend(const StackLayer& layer, bool first) const {
        NormHeads inputs = layer.heads;
        QkNormRopeGate& heads = inputs.heads;
        const int64_t queries = heads.heads * heads.head_dim, keys = heads.kv_heads * heads.head_dim;
        const Scratch<char> q = rows(queries), gate = rows(queries), k = rows(keys), v = rows(keys), mixed = rows(queries);
        inputs.norm = norm_of(inputs.norm, first);
        inputs.qkv.tokens = heads.tokens = p.tokens;
        heads.positions = p.positions;
        heads.q = q.get(), heads.k = k.get(), heads.v = v.get(), heads.gate = gate.get();
        qnext_norm_heads(&inputs);
        StoreKv store = store_of(layer);
        store.k = k.get(), store.v = v.get();
        qnext_store_kv(&store);
        PagedAttention attention = attention_of(layer);
        attention.q = q.get(), attention.out = mixed.get();
        qnext_paged_attention(&attention);
        finish(layer, mixed.get(), gate.get());
    }

    void finish(const StackLayer& layer, const void* mixed, const void* gate) const {
        LinearNormExperts block = layer.block;
        block.out.x = mixed, block.out.x_token = block.out.k;
        if (gate) {
            block.gate.x = {mixed, p.dtype, 0, block.out.k}, block.gate.gate = {gate, p.dtype, 0, block.out.k};
            block.gate.outer = 1, block.gate.inner = p.tokens, block.gate.width = block.gate.gate_width = block.out.k;
        }
        block.norm.residual = {p.total, p.dtype, 0, p.width}, block.norm.total = p.total;
        block.norm.inner = block.out.tokens = block.router.tokens = block.choice.tokens = block.experts.tokens = p.tokens;
        block.experts.out = p.out;
        qnext_linear_norm_experts(&block);
    }

    const DecoderStack& p;
    const int64_t bytes;
};

}  // namespace
}  // namespace qnext

// Returns false, having written nothing, where an index is out of range.
extern "C" __attribute__((visibility("default"))) bool qnext_decoder_stack(const qnext::DecoderStack* p) {
    return qnext::Stack(*p).run();
}
