// Depthwise causal convolution with SiLU: prefill, verify and decode sum the same way, so they have the same bits.
//
// In a prefill all outputs come first, then the states: outputs read what the states overwrite. A task is a range of the
// batch's tokens, whichever sequences they belong to, times a block of channels, whose weights stay in the first-level
// cache. An input is read from memory once; the limit is the bandwidth of reading x and writing y. A large y is written
// past the caches, which would not keep it for its reader and would read it first.
//
// In a decode and a verify a task is a few sequences times a block of channels, and the state of a sequence is written
// behind its outputs, while it lies in the cache; the limit is the bandwidth of reading and writing the states.
#include <algorithm>

#include "delta_net.h"
#include "pairs.h"

namespace qnext {

namespace {

constexpr int64_t kChannels = 512;  // of a block
constexpr int64_t kTokens = 128;    // of a task of a prefill, and more where blocks are smaller: it begins with loading weights
constexpr int64_t kSequences = 16;  // of a task of a decode or a verify
constexpr int kTogether = 4;        // tokens that share loads of weights and of earlier inputs
constexpr int64_t kKept = 16 << 20; // bytes of y that a last-level cache may keep for whoever reads them

// The two vectors of kPair neighbouring channels: as they lie in memory, or where all inputs are bfloat16 the even ones and
// the odd ones.
template <bool EvenOdd>
struct Channels {
    template <class E>
    static Pair load(const E* from) {
        if constexpr (EvenOdd)
            return load_pair(from);
        else
            return {Vec::load(from), Vec::load(from + Vec::size)};
    }
    template <class E>
    static void store(Pair x, E* to) {
        if constexpr (EvenOdd) {
            x.store(to);
        } else {
            x.first.store(to);
            x.second.store(to + Vec::size);
        }
    }
    // Where channel c of a block lies among its weights.
    static int64_t place(int64_t c) {
        return EvenOdd ? c / kPair * kPair + c % 2 * Vec::size + c % kPair / 2 : c;
    }
};

// Access to kPair channels, and to the first few of them.
template <bool EvenOdd>
struct Whole : Channels<EvenOdd> {};

template <bool EvenOdd>
struct First {
    int64_t count;
    template <class E>
    Pair load(const E* from) const {
        E padded[kPair] = {};
        std::copy_n(from, count, padded);
        return Channels<EvenOdd>::load(padded);
    }
    template <class E>
    void store(Pair x, E* to) const {
        E padded[kPair];
        Channels<EvenOdd>::store(x, padded);
        std::copy_n(padded, count, to);
    }
};

// Calls f(c, access) for pairs of vectors of `channels` channels.
template <bool EvenOdd, class F>
inline void for_each_pair(int64_t channels, F f) {
    int64_t c = 0;
    for (; c + kPair <= channels; c += kPair) f(c, Whole<EvenOdd>{});
    if (c < channels) f(c, First<EvenOdd>{channels - c});
}

// Inputs of type E before the current one, as a pool of type S keeps them.
template <class S, class E>
inline Vec kept(Vec input) {
    if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<E, float>) {
        bfloat16 rounded[Vec::size];
        input.store(rounded);
        return Vec::load(rounded);
    } else {
        return input;
    }
}

template <class S, class E>
inline Pair kept(Pair input) {
    return {kept<S, E>(input.first), kept<S, E>(input.second)};
}

inline Pair fma(Pair x, Pair weight, Pair total) {
    return {fma(x.first, weight.first, total.first), fma(x.second, weight.second, total.second)};
}

template <class To, class From>
inline To converted(From from) {
    if constexpr (std::is_same_v<To, From>) {
        return from;
    } else {
        To to;
        assign(to, to_float(from));
        return to;
    }
}

// An element as a number: a compiler makes no vectors of a structure.
inline float& plain(float& x) { return x; }
inline uint16_t& plain(bfloat16& x) { return x.bits; }

// `count` elements, rounded as by torch.
template <class From, class To>
void copy(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t count) {
    if (from_stride == 1 && to_stride == 1) {
        if constexpr (std::is_same_v<From, To>)
            std::memcpy(to, from, count * sizeof(To));
        else
            for_each_pair<false>(count, [&](int64_t i, auto part) { part.store(part.load(from + i), to + i); });
    } else {
        for (int64_t i = 0; i < count; ++i) to[i * to_stride] = converted<To>(from[i * from_stride]);
    }
}

// Channels that lie side by side in x, where the first one is element `in_x` of a token.
struct Section {
    int64_t first, channels, in_x;
};

int64_t pieces_of(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

// The blocks of at most kChannels in the order that they lie in: of each head q, k and v; all channels if x is not grouped.
class Sections {
  public:
    explicit Sections(const CausalConv1d& p)
        : p(p), values(p.key_heads ? p.channels / p.key_heads - 2 * p.key_dim : p.channels), of_key(pieces_of(p.key_dim)),
          of_head(2 * of_key + pieces_of(values)) {}

    int64_t count() const { return p.key_heads ? p.key_heads * of_head : of_head; }

    Section operator[](int64_t index) const {
        const int64_t head = index / of_head, i = index % of_head;
        const int64_t part = i < 2 * of_key ? i / of_key : 2;  // q, k or v
        const int64_t from = (i - part * of_key) * kChannels, size = part < 2 ? p.key_dim : values;
        return {part * p.key_heads * p.key_dim + head * size + from, std::min(kChannels, size - from),
                head * p.x_head + part * p.key_dim + from};
    }

  private:
    const CausalConv1d& p;
    const int64_t values, of_key, of_head;
};

// A thread's own memory.
template <class S>
struct Workspace {
    explicit Workspace(int64_t width)
        : weights(scratch<float>(width * kChannels)), inputs(scratch<S>(2 * (width - 1) * kChannels)) {}
    const Scratch<float> weights;  // [width, kChannels]
    const Scratch<S> inputs;       // [2 (width - 1), kChannels]: those of the slot, then tokens
};

// A block of channels. W: width if known here, else 0; T: of the tokens, S: of the state.
template <int W, class T, class S>
class Block {
  public:
    Block(const CausalConv1d& p, Section section, const Workspace<S>& own)
        : p(p), width(W ? W : p.width), history(width - 1), first(section.first), channels(section.channels),
          in_x(section.in_x), weights(own.weights.get()), inputs(own.inputs.get()),
          streams(p.tokens * p.channels * int64_t(sizeof(T)) > kKept && (p.channels | first | channels) % kPair == 0 &&
                  reinterpret_cast<uintptr_t>(p.y) % (kPair * sizeof(T)) == 0) {}

    // Before outputs.
    void load_weights() const {
        // What is computed behind the last channel is thrown away, but has to be defined.
        if (channels % kPair) std::fill_n(weights, width * kChannels, 0.0f);
        with_type(p.weight.dtype, [&](auto type) { load_weights(static_cast<const decltype(type)*>(p.weight.data)); });
    }

    // Outputs of tokens [from, to) of the batch.
    void outputs(int64_t from, int64_t to) const {
        for (int64_t n = 0; n < p.sequences; ++n) {
            const int64_t start = std::max(begin(n), from), stop = std::min(end(n), to);
            if (start < stop) outputs(n, start, stop);
        }
    }

    // Sequence n of a decode or a verify: its outputs, and what it leaves in the pools.
    void step(int64_t n) const {
        const bool one = end(n) - begin(n) == 1;
        if constexpr (W != 0) {
            if (one && is_packed() && slot(n) >= 0 && !p.step_rows.data) return step_packed(n);
        }
        outputs(n, begin(n), end(n));
        keep(n);
    }

    // What sequence n leaves in the pools.
    void keep(int64_t n) const {
        const int64_t slot = this->slot(n), length = end(n) - begin(n);
        if (slot < 0) return;
        if (p.step_rows.data) {
            if (p.step_rows[n] >= 0) keep_steps(n);
            return;
        }
        const int64_t snapshot_slot = p.snapshot_slots.at(n, -1), snapshot_length = p.snapshot_lengths[n];
        if (snapshot_slot >= 0) {
            store(n, snapshot_length - history, snapshot_length, column(p.state, snapshot_slot, 0), p.state);
        }
        const int64_t from = p.every_token ? 1 - history : length - history;
        if (length > 0) store(n, from, length, column(p.state, slot, 0), p.state);
    }

  private:
    static constexpr bool even_odd = std::is_same_v<T, bfloat16> && std::is_same_v<S, bfloat16>;

    int64_t begin(int64_t n) const { return p.query_start_loc.at(n, n); }
    int64_t end(int64_t n) const { return p.query_start_loc.at(n + 1, n + 1); }
    int64_t slot(int64_t n) const { return p.slots[n * p.slot_stride]; }
    const T* x(int64_t t) const { return static_cast<const T*>(p.x) + t * p.x_token + in_x; }
    T* y(int64_t t) const { return static_cast<T*>(p.y) + t * p.channels + first; }
    S* column(const ConvPool& pool, int64_t slot, int64_t index) const {
        return static_cast<S*>(pool.data) + slot * pool.slot + first * pool.channel + index * pool.column;
    }

    // Input i < 0 of sequence n, counted from its first token; none where it is zero.
    const S* earlier(int64_t n, int64_t i) const {
        if (p.has_initial && !p.has_initial[n]) return nullptr;
        return column(p.state, slot(n), p.accepted.at(n, 1) - 1 + history + i);
    }

    template <class E>
    void load_weights(const E* from) const {
        from += first * width;
        int64_t c = 0;
        if constexpr (W == 4 && even_odd && std::is_same_v<E, bfloat16>) {
            for (; c + kPair <= channels; c += kPair) {
                Pair taps[4];
                load_columns(from + c * 4, taps);
                for (int w = 0; w < 4; ++w) taps[w].store(weights + w * kChannels + c);
            }
        }
        for (; c < channels; ++c) {
            const int64_t place = Channels<even_odd>::place(c);
            for (int64_t w = 0; w < width; ++w) weights[w * kChannels + place] = to_float(from[c * width + w]);
        }
    }

    // Input i of sequence n, as the pool keeps it.
    void load_input(int64_t n, int64_t i, S* to, int64_t to_stride) const {
        if (i >= 0) {
            copy(x(begin(n) + i), 1, to, to_stride, channels);
        } else if (const S* from = earlier(n, i)) {
            copy(from, p.state.channel, to, to_stride, channels);
        } else {
            for (int64_t c = 0; c < channels; ++c) to[c * to_stride] = S();
        }
    }

    // Of tokens [start, stop) of sequence n.
    void outputs(int64_t n, int64_t start, int64_t stop) const {
        if (slot(n) < 0) {
            for (int64_t t = start; t < stop; ++t) std::memset(y(t), 0, channels * sizeof(T));
            return;
        }
        const int64_t alone = std::clamp(begin(n) + history, start, stop);
        if (start < alone) behind_history(n, start, alone);
        behind_tokens(alone, stop);
    }

    // Whether a slot is a contiguous [channels, history].
    bool is_packed() const { return p.state.column == 1 && p.state.channel == history; }

    // A sequence of one token in such a slot.
    void step_packed(int64_t n) const {
        S* const place = column(p.state, slot(n), 0);
        const int64_t t = begin(n);
        for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 8
            for (int w = 0; w < W - 1; ++w) plain(inputs[w * kChannels + c]) = plain(place[c * (W - 1) + w]);
        }
        convolve(inputs, kChannels, t);
        S* const kept = inputs + kChannels;
        copy(x(t), 1, kept + (W - 2) * kChannels, 1, channels);
        for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 8
            for (int w = 0; w < W - 1; ++w) plain(place[c * (W - 1) + w]) = plain(kept[w * kChannels + c]);
        }
    }

    // Tokens [start, stop), whose windows reach back to the slot.
    void behind_history(int64_t n, int64_t start, int64_t stop) const {
        const int64_t oldest = -history;
        if (const S* const past = earlier(n, oldest); past && p.state.channel == 1 && stop == begin(n) + 1)
            return convolve(past, p.state.column, start);
        for (int64_t i = start - begin(n) + oldest; i < stop - begin(n) - 1; ++i) {
            load_input(n, i, &inputs[(i - oldest) * kChannels], 1);
        }
        for (int64_t t = start; t < stop; ++t) convolve(&inputs[(t - begin(n)) * kChannels], kChannels, t);
    }

    // Tokens [start, stop), with as many tokens of the sequence before them as a window has.
    void behind_tokens(int64_t start, int64_t stop) const {
        int64_t t = start;
        if constexpr (W != 0) {
            if constexpr (even_odd) {
                if (streams)
                    for (; t + kTogether <= stop; t += kTogether) convolve_together<true>(t);
            }
            for (; t + kTogether <= stop; t += kTogether) convolve_together<false>(t);
        }
        for (; t < stop; ++t) convolve(x(t - history), p.x_token, t);
    }

    // Token t behind `history` rows of earlier inputs.
    template <class E>
    void convolve(const E* past, int64_t stride, int64_t t) const {
        const float* taps = weights;
        const T* token = x(t);
        T* out = y(t);
        for_each_pair<even_odd>(channels, [=, taps_of_past = width - 1](int64_t c, auto part) {
            Pair total = {Vec::zero(), Vec::zero()};
            for (int64_t w = 0; w < (W ? W - 1 : taps_of_past); ++w)
                total = fma(kept<S, E>(part.load(past + w * stride + c)), load_pair(taps + w * kChannels + c), total);
            total = fma(part.load(token + c), load_pair(taps + taps_of_past * kChannels + c), total);
            Vec y[] = {total.first, total.second};
            silu_for<T>(y);
            part.store({y[0], y[1]}, out + c);
        });
    }

    // kTogether tokens from t on, with the same sums; Streams: past the caches.
    template <bool Streams>
    void convolve_together(int64_t t) const {
        const float* taps = weights;
        const T *past = x(t - history), *token = x(t);
        T* out = y(t);
        for_each_pair<even_odd>(channels, [=, x_stride = p.x_token, y_stride = p.channels](int64_t c, auto part) {
            Vec total[2 * kTogether];
            Pair window[kTogether + W - 1];
#pragma GCC unroll 8
            for (int i = 0; i < W - 1; ++i) window[i] = kept<S, T>(part.load(past + i * x_stride + c));
#pragma GCC unroll 8
            for (int i = 0; i < kTogether; ++i) {
                window[W - 1 + i] = part.load(token + i * x_stride + c);
                _mm_prefetch(reinterpret_cast<const char*>(token + (kTogether + i) * x_stride + c), _MM_HINT_T0);
            }
#pragma GCC unroll 8
            for (int w = 0; w < W; ++w) {
                const Pair tap = load_pair(taps + w * kChannels + c);
#pragma GCC unroll 8
                for (int i = 0; i < kTogether; ++i) {
                    Pair sum = w ? Pair{total[2 * i], total[2 * i + 1]} : Pair{Vec::zero(), Vec::zero()};
                    sum = fma(w == W - 1 ? window[i + w] : kept<S, T>(window[i + w]), tap, sum);
                    total[2 * i] = sum.first, total[2 * i + 1] = sum.second;
                }
            }
            silu_for<T>(total);
#pragma GCC unroll 8
            for (int i = 0; i < kTogether; ++i) {
                const Pair y = {total[2 * i], total[2 * i + 1]};
                if constexpr (Streams)
                    y.stream(out + i * y_stride + c);
                else
                    part.store(y, out + i * y_stride + c);
            }
        });
    }

    // Inputs [from, to) of sequence n, from column 0 of `place` on. Ascending: a column's old content has been read.
    void store(int64_t n, int64_t from, int64_t to, S* place, const ConvPool& pool) const {
        for (int64_t i = from; i < to; ++i) load_input(n, i, place + (i - from) * pool.column, pool.channel);
    }

    void keep_steps(int64_t n) const {
        // Steps that share memory share all but the last input.
        const bool shared = p.steps_step == p.steps.column;
        for (int64_t t = 0; t < end(n) - begin(n); ++t) {
            const int64_t known = shared && t > 0 ? history - 1 : 0;
            S* place = column(p.steps, p.step_rows[n], known) + t * p.steps_step;
            store(n, t + 1 - history + known, t + 1, place, p.steps);
        }
    }

    const CausalConv1d& p;
    const int64_t width, history, first, channels, in_x;
    float* const weights;
    S* const inputs;
    const bool streams;
};

template <int W, class T, class S>
void prefill(const CausalConv1d& p) {
    const Sections blocks(p);
    const int64_t count = blocks.count();
    const int64_t tokens = std::clamp(kTokens * kChannels * count / std::max<int64_t>(p.channels, 1), kTokens, 2 * kTokens);
    const int64_t ranges = (p.tokens + tokens - 1) / tokens;
#pragma omp parallel if (worth_threads(p.tokens * p.channels * 8))
    {
        const Workspace<S> own(p.width);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < ranges * count; ++task) {
            const int64_t from = task / count * tokens;
            const Block<W, T, S> block(p, blocks[task % count], own);
            block.load_weights();
            block.outputs(from, std::min(from + tokens, p.tokens));
        }
        _mm_sfence();  // what was streamed comes before what tells others that this is done
#pragma omp for
        for (int64_t task = 0; task < p.sequences * count; ++task) {
            Block<W, T, S>(p, blocks[task % count], own).keep(task / count);
        }
    }
}

// A decode or a verify.
template <int W, class T, class S>
void step(const CausalConv1d& p) {
    const Sections blocks(p);
    const int64_t count = blocks.count(), ranges = (p.sequences + kSequences - 1) / kSequences;
#pragma omp parallel if (worth_threads(p.tokens * p.channels * 8))
    {
        const Workspace<S> own(p.width);
#pragma omp for
        for (int64_t task = 0; task < ranges * count; ++task) {
            const Block<W, T, S> block(p, blocks[task % count], own);
            block.load_weights();
            const int64_t from = task / count * kSequences;
            for (int64_t n = from; n < std::min(from + kSequences, p.sequences); ++n) block.step(n);
        }
        _mm_sfence();
    }
}

template <int W, class T, class S>
void causal_conv1d(const CausalConv1d& p) {
    if (p.has_initial)
        prefill<W, T, S>(p);
    else
        step<W, T, S>(p);
}

}  // namespace
}  // namespace qnext

void qnext_causal_conv1d(const qnext::CausalConv1d* p) {
    using namespace qnext;
    with_type(p->dtype, [&](auto token) {
        with_type(p->state_dtype, [&](auto state) {
            if (p->width == 4)
                causal_conv1d<4, decltype(token), decltype(state)>(*p);
            else
                causal_conv1d<0, decltype(token), decltype(state)>(*p);
        });
    });
}
