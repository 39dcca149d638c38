// What lies before and behind the token mixer of a decoder layer, each as one call: at a decode step an operation takes
// less time than calling it. They are the operations' own functions one after the other, so the bits are theirs.
#include "decoder_layer.h"

namespace qnext {

namespace {

// Contiguous rows of a dtype that one operation writes and the next reads.
class Between {
  public:
    Between(int64_t rows, int64_t width, int64_t dtype)
        : memory(scratch<char>(rows * width * (dtype == kFloat32 ? sizeof(float) : sizeof(bfloat16)))), width(width),
          dtype(dtype) {}
    void* data() const { return memory.get(); }
    Rows rows() const { return {memory.get(), dtype, 0, width}; }

  private:
    Scratch<char> memory;
    int64_t width, dtype;
};

void project(Linear linear, const Between& x) {
    linear.x = x.data(), linear.x_token = linear.k;
    qnext_linear(&linear);
}

// Returns what is normalised.
Between normalise(RmsNorm norm) {
    Between normed(norm.inner, norm.width, norm.x.dtype);
    norm.out = normed.data();
    qnext_rms_norm(&norm);
    return normed;
}

bool heads(const NormHeads& p) {
    const Between projected(p.qkv.tokens, p.qkv.rows, p.qkv.dtype);
    Linear qkv = p.qkv;
    qkv.out = projected.data();
    project(qkv, normalise(p.norm));
    QkNormRopeGate heads = p.heads;
    heads.qkv = projected.data();
    return qnext_qk_norm_rope_gate(&heads);
}

void add_projected(const LinearNormExperts& p, RmsNorm& norm, const Between& projected) {
    Linear out = p.out;
    out.out = projected.data();
    norm.x = projected.rows();
    if (!p.gate.x.data) {
        qnext_linear(&out);
        return;
    }
    const Between gated(out.tokens, out.k, out.dtype);
    SigmoidGate gate = p.gate;
    gate.out = gated.data();
    qnext_sigmoid_gate(&gate);
    project(out, gated);
}

void experts(const LinearNormExperts& p) {
    const int64_t tokens = p.out.tokens;
    const Between projected(tokens, p.out.rows, p.out.dtype), logits(tokens, p.router.rows, p.router.dtype);
    RmsNorm norm = p.norm;
    add_projected(p, norm, projected);
    const Between normed = normalise(norm);
    Linear router = p.router;
    router.out = logits.data();
    project(router, normed);
    const Scratch<float> weights = scratch<float>(tokens * p.choice.top_k);
    const Scratch<int32_t> ids = scratch<int32_t>(tokens * p.choice.top_k);
    TopkSoftmax choice = p.choice;
    choice.logits = logits.rows(), choice.weights = weights.get(), choice.ids = ids.get();
    qnext_topk_softmax(&choice);
    Experts experts = p.experts;
    experts.x = normed.data(), experts.x_token = experts.hidden;
    experts.weights = weights.get(), experts.ids = {ids.get(), false};
    qnext_experts(&experts);
}

}  // namespace
}  // namespace qnext

extern "C" void qnext_norm_linears(const qnext::NormLinears* p) {
    const qnext::Between normed = qnext::normalise(p->norm);
    qnext::project(p->first, normed);
    qnext::project(p->second, normed);
}

extern "C" bool qnext_norm_heads(const qnext::NormHeads* p) {
    return qnext::heads(*p);
}

extern "C" void qnext_linear_norm_experts(const qnext::LinearNormExperts* p) {
    qnext::experts(*p);
}
