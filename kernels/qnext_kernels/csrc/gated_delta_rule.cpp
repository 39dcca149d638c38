// The gated delta rule. Verify and decode run token by token, the same steps, so they have the same bits. A prefill runs
// in blocks of 16 tokens (delta_chunk.h) and token by token behind the last whole block, or token by token altogether
// where its bits must not depend on how it is split.
//
// Rows of the state are independent of each other, and a few of them stay in the first-level cache for a tile of tokens.
// Token by token the physical limit is 4 vector operations an element of the state; a decode reads and writes the state
// once.
#include <algorithm>

#include "delta_chunk.h"

namespace qnext {

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

namespace {

constexpr int kTile = kBlockTokens; // tokens whose keys and queries lie in the cache together; divides kChunk
constexpr int kGroups = 8;          // groups of kRows that do so: their steps overlap, one group's would wait for each other
constexpr int kChunk = 64;          // where a split prefill would round the state
constexpr int kRecurrentTokens = 4; // a last chunk of at most so many tokens rounds behind each, as decodes do
constexpr int kRows = 4;

constexpr int kAhead = 2048;  // elements of the state that are fetched ahead: what lies behind is the next head's

struct Token {
    float log_decay, decay, beta, kq;
};

// One token's step for kRows rows of the state, from `src` to `dst` (which may be the same), and with Kept past the
// caches to `kept`, which is not read again before long.
//   S' = decay S + δ kᵀ with δ = β (v − decay S k);  o = S' q = decay S q + δ (k · q)
template <bool Kept>
inline void step(const float* src, float* dst, float* kept, int64_t stride, const float* k, const float* q, Token token,
                 const float* v, float* o) {
    Vec sk[kRows], sq[kRows];
    for (int r = 0; r < kRows; ++r) sk[r] = sq[r] = Vec::zero();
    for (int64_t i = 0; i < stride; i += Vec::size) {
        const Vec ki = Vec::load(k + i), qi = Vec::load(q + i);
        for (int r = 0; r < kRows; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(src + r * stride + i + kAhead), _MM_HINT_T0);
            const Vec s = Vec::load(src + r * stride + i);
            sk[r] = fma(s, ki, sk[r]);
            sq[r] = fma(s, qi, sq[r]);
        }
    }
    alignas(16) float delta[kRows];
    const __m128 decay = _mm_set1_ps(token.decay);
    const __m128 held = _mm_mul_ps(decay, sums(sk[0], sk[1], sk[2], sk[3]));
    const __m128 d = _mm_mul_ps(_mm_sub_ps(_mm_loadu_ps(v), held), _mm_set1_ps(token.beta));
    _mm_store_ps(delta, d);
    const __m128 old = _mm_mul_ps(decay, sums(sq[0], sq[1], sq[2], sq[3]));
    _mm_storeu_ps(o, _mm_fmadd_ps(d, _mm_set1_ps(token.kq), old));
    const Vec decays = Vec::fill(token.decay);
    Vec deltas[kRows];
    for (int r = 0; r < kRows; ++r) deltas[r] = Vec::fill(delta[r]);
    for (int64_t i = 0; i < stride; i += Vec::size) {
        const Vec ki = Vec::load(k + i);
        for (int r = 0; r < kRows; ++r) {
            const Vec s = fma(ki, deltas[r], Vec::load(src + r * stride + i) * decays);
            s.store(dst + r * stride + i);
            if constexpr (Kept) s.stream(kept + r * stride + i);
        }
    }
}

template <class T>
void load_row(const T* from, int64_t size, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + Vec::size <= size; i += Vec::size) Vec::load(from + i).store(to + i);
    for (; i < size; ++i) to[i] = to_float(from[i]);
    for (; i < width; ++i) to[i] = 0.0f;
}

template <class T>
void store_row(const float* from, int64_t size, T* to) {
    int64_t i = 0;
    for (; i + Vec::size <= size; i += Vec::size) Vec::load(from + i).store(to + i);
    for (; i < size; ++i) assign(to[i], from[i]);
}

// [width] floats, zero beyond `size`, divided by their length (ε 1e-6) and multiplied by `scale`.
template <class T>
void load_normalised(const T* from, int64_t size, float scale, float* to, int64_t width) {
    load_row(from, size, to, width);
    Vec squares = Vec::zero();
    for (int64_t i = 0; i < width; i += Vec::size) squares = fma(Vec::load(to + i), Vec::load(to + i), squares);
    const Vec factor = Vec::fill(scale / std::sqrt(sum(squares) + 1e-6f));
    for (int64_t i = 0; i < width; i += Vec::size) (Vec::load(to + i) * factor).store(to + i);
}

// Rows `first` to `last` of one value head of one sequence. T: of the tokens, S: of the state, P: of the step pool.
template <class T, class S, class P>
class Head {
  public:
    Head(const DeltaRule& p, int64_t sequence, int64_t head, int64_t first, int64_t last)
        : p(p), n(sequence), head(head), first(first), rows(last - first), width(padded(p.key_dim)),
          row_groups((rows + kRows - 1) / kRows), state(scratch<float>(row_groups * kRows * width)),
          keys(scratch<float>(kTile * width)), queries(scratch<float>(kTile * width)) {}

    void run() {
        const int64_t begin = p.query_start_loc.at(n, n), end = p.query_start_loc.at(n + 1, n + 1);
        const int64_t columns = p.slot_columns;
        const int64_t accepted = std::clamp<int64_t>(p.accepted.at(n, 1), 1, columns);
        const int64_t slot = p.slots[n * columns + accepted - 1];
        if (slot < 0) return clear(begin, end);
        const bool starts_at_zero = p.has_initial && !p.has_initial[n];
        if (p.every_token)
            verify(begin, end, slot);
        else
            prefill(begin, end, slot, starts_at_zero);
    }

  private:
    // The pool holds floats in whole vectors and groups of rows: steps can read and write it where it lies.
    template <class Pool>
    bool in_place() const {
        return std::is_same_v<Pool, float> && width == p.key_dim && rows % kRows == 0;
    }

    void prefill(int64_t begin, int64_t end, int64_t slot, bool starts_at_zero) {
        const int64_t snapshot_slot = p.snapshot_slots.at(n, -1);
        const int64_t snapshot_at = snapshot_slot < 0 ? -1 : begin + p.snapshot_lengths[n];
        const bool direct = in_place<S>() && begin < end;
        float* current = direct ? reinterpret_cast<float*>(place(slot)) : state.get();
        if (starts_at_zero)
            std::fill_n(current, row_groups * kRows * width, 0.0f);
        else if (!direct)
            load(place(slot));
        for (int64_t start = begin; start < end; start += kTile) {
            if (start == snapshot_at) store(current, place(snapshot_slot));
            const int64_t stop = std::min(start + kTile, end);
            const int64_t chunk = begin + (start - begin) / kChunk * kChunk;
            const bool rounds = std::min(chunk + kChunk, end) - chunk <= kRecurrentTokens;
            prepare(start, stop);
            fetch(stop, std::min(stop + kTile, end));
            if (stop - start == kBlockTokens && !p.recurrent)
                advance_block(start, current);
            else
                advance_tokens(start, stop, current, rounds);
            if (stop == end || (stop - begin) % kChunk == 0)
                for (int64_t g = 0; g < row_groups; ++g) round<S>(g);
        }
        if (end == snapshot_at) store(current, place(snapshot_slot));
        if (!direct && begin < end) store(current, place(slot));
    }

    void advance_tokens(int64_t start, int64_t stop, float* current, bool rounds) {
        for (int64_t first_group = 0; first_group < row_groups; first_group += kGroups) {
            for (int64_t t = start; t < stop; ++t) {
                for (int64_t g = first_group; g < std::min(first_group + kGroups, row_groups); ++g) {
                    advance<false>(g, t, t - start, current, current, nullptr);
                    if (rounds) round<S>(g);
                }
            }
        }
    }

    // All tokens of a tile at once.
    void advance_block(int64_t start, float* current) {
        alignas(64) float log_decay[kBlockTokens], beta[kBlockTokens];
        alignas(64) float v[kBlockTokens * Vec::size], o[kBlockTokens * Vec::size];
        for (int t = 0; t < kBlockTokens; ++t) log_decay[t] = tokens[t].log_decay, beta[t] = tokens[t].beta;
        if (!block) block = std::make_unique<DeltaBlock>(width);
        block->prepare(keys.get(), queries.get(), log_decay, beta);
        for (int64_t row = 0; row < rows; row += Vec::size) {
            const int64_t count = std::min<int64_t>(Vec::size, rows - row);
            for (int t = 0; t < kBlockTokens; ++t) {
                const T* from = static_cast<const T*>(p.v) + (start + t) * p.v_token + head * p.v_head + first + row;
                load_row(from, count, v + t * Vec::size, Vec::size);
            }
            block->advance(current + row * width, count, v, o);
            for (int t = 0; t < kBlockTokens; ++t) {
                T* to = static_cast<T*>(p.out) + ((start + t) * p.value_heads + head) * p.value_dim + first + row;
                store_row(o + t * Vec::size, count, to);
            }
        }
    }

    // The state behind token t goes to its place; the next token continues from what a pool can hold.
    void verify(int64_t begin, int64_t end, int64_t slot) {
        const bool direct = in_place<S>() && (!p.steps || in_place<P>());
        const float* from = direct ? reinterpret_cast<const float*>(place(slot)) : state.get();
        if (!direct) load(place(slot));
        for (int64_t start = begin; start < end; start += kTile) {
            const int64_t stop = std::min(start + kTile, end);
            prepare(start, stop);
            for (int64_t t = start; t < stop; ++t) {
                P* step = step_place(t - begin);
                S* target = p.steps ? nullptr : slot_place(t - begin);
                float* const kept = direct ? reinterpret_cast<float*>(step) : nullptr;
                verify_token(t, t - start, from, direct && target ? reinterpret_cast<float*>(target) : kept);
                from = state.get();
                if (direct) continue;
                for (int64_t g = 0; g < row_groups; ++g) p.steps ? round<P>(g) : round<S>(g);
                if (step) store(state.get(), step);
                if (target) store(state.get(), target);
            }
        }
        _mm_sfence();  // what was streamed comes before what tells others that this is done
    }

    // The state behind token t, to `state` and to `kept`, unless that is none.
    void verify_token(int64_t t, int64_t in_tile, const float* from, float* kept) {
        const bool streams = kept && reinterpret_cast<uintptr_t>(kept) % sizeof(Vec) == 0;
        for (int64_t g = 0; g < row_groups; ++g) {
            if (streams)
                advance<true>(g, t, in_tile, from, state.get(), kept);
            else
                advance<false>(g, t, in_tile, from, state.get(), nullptr);
        }
        if (kept && !streams) std::copy_n(state.get(), rows * width, kept);
    }

    S* place(int64_t slot) const {
        return static_cast<S*>(p.state) + slot * p.state_slot + (head * p.value_dim + first) * p.key_dim;
    }

    S* slot_place(int64_t t) const {
        const int64_t slot = p.slots[n * p.slot_columns + t];
        return slot < 0 ? nullptr : place(slot);
    }

    P* step_place(int64_t t) const {
        const int64_t row = p.step_rows.at(n, -1);
        if (!p.steps || row < 0) return nullptr;
        P* step = static_cast<P*>(p.steps) + row * p.steps_row + t * p.steps_step;
        return step + (head * p.value_dim + first) * p.key_dim;
    }

    void clear(int64_t begin, int64_t end) const {
        for (int64_t t = begin; t < end; ++t) {
            std::memset(static_cast<T*>(p.out) + (t * p.value_heads + head) * p.value_dim + first, 0, rows * sizeof(T));
        }
    }

    void load(const S* from) {
        for (int64_t r = 0; r < row_groups * kRows; ++r) {
            if (r < rows)
                load_row(from + r * p.key_dim, p.key_dim, state.get() + r * width, width);
            else
                std::fill_n(state.get() + r * width, width, 0.0f);
        }
    }

    template <class Pool>
    void store(const float* from, Pool* to) const {
        for (int64_t r = 0; r < rows; ++r) store_row(from + r * width, p.key_dim, to + r * p.key_dim);
    }

    // What a pool can hold of a group of rows.
    template <class Pool>
    void round(int64_t g) {
        if constexpr (!std::is_same_v<Pool, float>) {
            for (float* x = state.get() + g * kRows * width; x < state.get() + (g + 1) * kRows * width; x += Vec::size) {
                Pool rounded[Vec::size];
                Vec::load(x).store(rounded);
                Vec::load(rounded).store(x);
            }
        }
    }

    // What tokens [start, stop) will read: their rows lie too far apart for a processor to foresee it.
    void fetch(int64_t start, int64_t stop) const {
        const int64_t key_head = head / (p.value_heads / p.key_heads);
        const auto lines = [](const T* from, int64_t size) {
            for (int64_t i = 0; i < size; i += 64 / sizeof(T))
                _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
        };
        for (int64_t t = start; t < stop; ++t) {
            lines(static_cast<const T*>(p.k) + t * p.k_token + key_head * p.k_head, p.key_dim);
            lines(static_cast<const T*>(p.q) + t * p.q_token + key_head * p.q_head, p.key_dim);
            lines(static_cast<const T*>(p.v) + t * p.v_token + head * p.v_head + first, rows);
        }
    }

    // Keys, queries and gates of tokens [start, stop).
    void prepare(int64_t start, int64_t stop) {
        const int64_t key_head = head / (p.value_heads / p.key_heads);
        const float rate = -std::exp(p.A_log[head]), bias = p.dt_bias[head];
        for (int64_t t = start; t < stop; ++t) {
            float* k = keys.get() + (t - start) * width;
            float* q = queries.get() + (t - start) * width;
            const T* k_from = static_cast<const T*>(p.k) + t * p.k_token + key_head * p.k_head;
            const T* q_from = static_cast<const T*>(p.q) + t * p.q_token + key_head * p.q_head;
            load_normalised(k_from, p.key_dim, 1.0f, k, width);
            load_normalised(q_from, p.key_dim, 1.0f / std::sqrt(float(p.key_dim)), q, width);
            Vec kq = Vec::zero();
            for (int64_t i = 0; i < width; i += Vec::size) kq = fma(Vec::load(k + i), Vec::load(q + i), kq);
            const float a = p.a[t * p.a_token + head] + bias, b = p.b[t * p.b_token + head];
            const float softplus = std::log1p(std::exp(-std::fabs(a))) + std::max(a, 0.0f);
            tokens[t - start] = {rate * softplus, std::exp(rate * softplus), 1.0f / (1.0f + std::exp(-b)), sum(kq)};
        }
    }

    // Group g of the rows at `from` becomes that at `to`, and at `kept`, behind token t.
    template <bool Kept>
    void advance(int64_t g, int64_t t, int64_t in_tile, const float* from, float* to, float* kept) {
        const int64_t count = std::min<int64_t>(kRows, rows - g * kRows), row = first + g * kRows;
        const T* v_from = static_cast<const T*>(p.v) + t * p.v_token + head * p.v_head + row;
        T* out = static_cast<T*>(p.out) + (t * p.value_heads + head) * p.value_dim + row;
        float v[kRows] = {}, o[kRows];
        for (int64_t r = 0; r < count; ++r) v[r] = to_float(v_from[r]);
        const int64_t offset = g * kRows * width;
        float* const also = Kept ? kept + offset : nullptr;
        step<Kept>(from + offset, to + offset, also, width, keys.get() + in_tile * width,
                   queries.get() + in_tile * width, tokens[in_tile], v, o);
        for (int64_t r = 0; r < count; ++r) assign(out[r], o[r]);
    }

    const DeltaRule& p;
    const int64_t n, head, first, rows, width, row_groups;
    Scratch<float> state, keys, queries;
    std::unique_ptr<DeltaBlock> block;  // of a prefill
    Token tokens[kTile];
};

template <class T, class S, class P>
void delta_rule(const DeltaRule& p) {
    const int64_t heads = p.sequences * p.value_heads;
    // Whole heads if there are enough for every thread: what is prepared for a head is then prepared once.
    int64_t parts = 1;
    while (heads * parts < 2 * omp_get_max_threads() && p.value_dim / (2 * parts) >= 8 * kRows) parts *= 2;
    const int64_t rows = (p.value_dim + parts - 1) / parts;
    const int64_t work = p.query_start_loc.at(p.sequences, p.sequences) * p.value_heads * p.value_dim * p.key_dim;
#pragma omp parallel for schedule(dynamic, 1) if (worth_threads(work))
    for (int64_t task = 0; task < heads * parts; ++task) {
        const int64_t first = task % parts * rows, head = task / parts;
        if (first < p.value_dim)
            Head<T, S, P>(p, head / p.value_heads, head % p.value_heads, first, std::min(first + rows, p.value_dim)).run();
    }
}

}  // namespace
}  // namespace qnext

extern "C" __attribute__((visibility("default"))) void qnext_gated_delta_rule(const qnext::DeltaRule* p) {
    using namespace qnext;
    with_type(p->dtype, [&](auto token) {
        with_type(p->state_dtype, [&](auto state) {
            with_type(p->steps_dtype, [&](auto step) { delta_rule<decltype(token), decltype(state), decltype(step)>(*p); });
        });
    });
}
