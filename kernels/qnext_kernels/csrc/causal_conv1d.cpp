// Depthwise causal convolution with SiLU: prefill, verify and decode sum the same way, so they have the same bits.
//
// In a prefill all outputs come first, then the states: outputs read what the states overwrite. A task is a range of the
// batch's tokens, whichever sequences they belong to, times a block of channels, whose weights stay in the first-level
// cache. An input is read from memory once; the limit is the bandwidth of reading x and writing y, and close to it the
// vector operations, most of which are SiLU's. A large y is written past the caches, which would not keep it for its reader
// and would read it first.
//
// In a decode and a verify a task is a few sequences times a block of channels, and the state of a sequence is written
// behind its outputs, while it lies in the cache; the limit is the bandwidth of reading and writing the states.
#include <algorithm>

#include "conv_channels.h"
#include "delta_net.h"

namespace qnext {

namespace {

using namespace conv;

constexpr int64_t kChannels = 2048;     // of a block of a prefill: memory is fastest where rows are long
constexpr int64_t kStepChannels = 512;  // of a block of a decode or a verify
constexpr int64_t kTokens = 128;     // of a task of a prefill, more where blocks are smaller: it begins with loading weights
constexpr int64_t kSequences = 16;   // of a task of a decode or a verify
constexpr int kTogether = 4;         // tokens that share loads of weights and of earlier inputs
constexpr int64_t kAhead = 1024;     // channels of so many tokens that are fetched ahead
constexpr int64_t kKept = 16 << 20;  // bytes of y that a last-level cache may keep for whoever reads them

// Channels that lie side by side in x, where the first one is element `in_x` of a token.
struct Section {
    int64_t first, channels, in_x;
};

// The blocks of at most `most` channels in the order that they lie in: of each head q, k and v; all channels if x is not
// grouped.
class Sections {
  public:
    Sections(const CausalConv1d& p, int64_t most)
        : p(p), most(most), values(p.key_heads ? p.channels / p.key_heads - 2 * p.key_dim : p.channels),
          of_key(pieces_of(p.key_dim)), of_head(2 * of_key + pieces_of(values)) {}

    int64_t count() const { return p.key_heads ? p.key_heads * of_head : of_head; }

    Section operator[](int64_t index) const {
        const int64_t head = index / of_head, i = index % of_head;
        const int64_t part = i < 2 * of_key ? i / of_key : 2;  // q, k or v
        const int64_t from = (i - part * of_key) * most, size = part < 2 ? p.key_dim : values;
        return {part * p.key_heads * p.key_dim + head * size + from, std::min(most, size - from),
                head * p.x_head + part * p.key_dim + from};
    }

  private:
    int64_t pieces_of(int64_t channels) const { return (channels + most - 1) / most; }

    const CausalConv1d& p;
    const int64_t most, values, of_key, of_head;
};

// A thread's own memory, for blocks of at most `channels`.
template <class S>
struct Workspace {
    Workspace(int64_t width, int64_t channels)
        : channels(channels), weights(scratch<float>(width * channels)), inputs(scratch<S>(2 * (width - 1) * channels)) {}
    const int64_t channels;
    const Scratch<float> weights;  // [width, channels], or for dot products what load_weight_twos leaves
    const Scratch<S> inputs;       // [2 (width - 1), channels]: those of the slot, then tokens
};

// A block of channels. W: width if known here, else 0; T: of the tokens, S: of the state.
template <int W, class T, class S, Layout L>
class Block {
  public:
    Block(const CausalConv1d& p, Section section, const Workspace<S>& own)
        : p(p), width(W ? W : p.width), history(width - 1), first(section.first), channels(section.channels),
          in_x(section.in_x), stride(own.channels), weights(own.weights.get()), inputs(own.inputs.get()),
          streams(p.tokens * p.channels * int64_t(sizeof(T)) > kKept && (p.channels | first | channels) % kPair == 0 &&
                  reinterpret_cast<uintptr_t>(p.y) % (kPair * sizeof(T)) == 0) {}

    // Before outputs.
    void load_weights() const {
        // What is computed behind the last channel is thrown away, but has to be defined.
        if (channels % kPair) std::fill_n(weights, width * stride, 0.0f);
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
        if constexpr (L == Layout::kDots) {
            this->load_weight_twos(reinterpret_cast<const bfloat16*>(from));
        } else {
            int64_t c = 0;
#if !defined(__AVX512F__)
            if constexpr (W == 4 && L == Layout::kEvenOdd && std::is_same_v<E, bfloat16>) {
                for (; c + kPair <= channels; c += kPair) {
                    Pair taps[4];
                    load_columns(from + c * 4, taps);
                    for (int w = 0; w < 4; ++w) taps[w].store(weights + w * stride + c);
                }
            }
#endif
            for (; c < channels; ++c) {
                const int64_t place = Channels<L>::place(c);
                for (int64_t w = 0; w < width; ++w) weights[w * stride + place] = to_float(from[c * width + w]);
            }
        }
    }

#if defined(__AVX512F__)
    // For each kPair channels the operands of a window's first two inputs and of its last two.
    void load_weight_twos(const bfloat16* from) const {
        for (int64_t c = 0; c < channels; c += kPair) {
            bfloat16 padded[4 * kPair] = {};
            const bool whole = c + kPair <= channels;
            if (!whole) std::copy_n(from + c * 4, (channels - c) * 4, padded);
            Twos twos[2];
            load_twos(whole ? from + c * 4 : padded, twos[0], twos[1]);
            std::memcpy(weights + 2 * c, twos, sizeof(twos));
        }
    }

    // The sum of a window's two older inputs and its two newer ones, of kPair channels with such weights.
    QNEXT_INLINE static Pair sum(Twos older, Twos newer, const float* weights) {
        const auto weight = [&](int i) QNEXT_INLINE {
            const float* const from = weights + i * kPair;
            return Twos{_mm512_loadu_si512(from), _mm512_loadu_si512(from + Vec::size)};
        };
        return dot(newer, weight(1), dot(older, weight(0), {Vec::zero(), Vec::zero()}));
    }

    // kTogether tokens behind `past`; write_two: what to do with the sums of tokens i and i + 1.
    template <class P, class Write>
    QNEXT_INLINE static void sum_twos(P part, const T* past, const T* token, int64_t x_stride, const float* weights,
                                      Write write_two) {
        const auto row = [&](const T* from, int i) QNEXT_INLINE { return part.load(from + i * x_stride); };
        __m512i last = row(past, 2);
        Twos two = twos(row(past, 0), row(past, 1)), next = twos(row(past, 1), last);
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; i += 2) {
            const __m512i now = row(token, i), behind = row(token, i + 1);
            const Twos newer = twos(last, now), newest = twos(now, behind);
            write_two(i, sum(two, newer, weights), sum(next, newest, weights));
            two = newer, next = newest, last = behind;
        }
    }
#endif

    // The same with a multiplication for each input; weights lie `stride` apart.
    template <class P, class Write>
    QNEXT_INLINE static void sum_windows(P part, const T* past, const T* token, int64_t x_stride, const float* weights,
                                         int64_t stride, Write write_two) {
        Pair window[kTogether + W - 1], total[kTogether];
#pragma GCC unroll 8
        for (int i = 0; i < W - 1; ++i) window[i] = kept<S, T>(part.load(past + i * x_stride));
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
            window[W - 1 + i] = part.load(token + i * x_stride);
            total[i] = {Vec::zero(), Vec::zero()};
        }
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) {
            const Pair weight = load_pair(weights + w * stride);
#pragma GCC unroll 8
            for (int i = 0; i < kTogether; ++i)
                total[i] = fma(w == W - 1 ? window[i + w] : kept<S, T>(window[i + w]), weight, total[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; i += 2) write_two(i, total[i], total[i + 1]);
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
            for (int w = 0; w < W - 1; ++w) plain(inputs[w * stride + c]) = plain(place[c * (W - 1) + w]);
        }
        convolve(inputs, stride, t);
        S* const kept = inputs + stride;
        copy(x(t), 1, kept + (W - 2) * stride, 1, channels);
        for (int64_t c = 0; c < channels; ++c) {
#pragma GCC unroll 8
            for (int w = 0; w < W - 1; ++w) plain(place[c * (W - 1) + w]) = plain(kept[w * stride + c]);
        }
    }

    // Tokens [start, stop), whose windows reach back to the slot.
    void behind_history(int64_t n, int64_t start, int64_t stop) const {
        const int64_t oldest = -history;
        if (const S* const past = earlier(n, oldest); past && p.state.channel == 1 && stop == begin(n) + 1)
            return convolve(past, p.state.column, start);
        for (int64_t i = start - begin(n) + oldest; i < stop - begin(n) - 1; ++i) {
            load_input(n, i, &inputs[(i - oldest) * stride], 1);
        }
        for (int64_t t = start; t < stop; ++t) convolve(&inputs[(t - begin(n)) * stride], stride, t);
    }

    // Tokens [start, stop), with as many tokens of the sequence before them as a window has.
    void behind_tokens(int64_t start, int64_t stop) const {
        int64_t t = start;
        if constexpr (W != 0) {
            if constexpr (L != Layout::kInOrder) {
                if (streams)
                    for (; t + kTogether <= stop; t += kTogether) convolve_together<true>(t);
            }
            for (; t + kTogether <= stop; t += kTogether) convolve_together<false>(t);
        }
        for (; t < stop; ++t) convolve(x(t - history), p.x_token, t);
    }

    // Token t behind `history` rows of earlier inputs.
    template <class E>
    void convolve(const E* past, int64_t past_stride, int64_t t) const {
        const T* token = x(t);
        T* out = y(t);
        for_each_pair<L>(channels, [=, weights = weights, stride = stride, earlier = width - 1](
                                       int64_t c, auto part) QNEXT_INLINE {
            Pair total = {Vec::zero(), Vec::zero()};
            if constexpr (L == Layout::kDots) {
                const auto row = [&](int i) QNEXT_INLINE { return part.load(past + i * past_stride + c); };
                total = sum(twos(row(0), row(1)), twos(row(2), part.load(token + c)), weights + 2 * c);
            } else {
                for (int64_t w = 0; w < (W ? W - 1 : earlier); ++w) {
                    const Pair input = kept<S, E>(part.load(past + w * past_stride + c));
                    total = fma(input, load_pair(weights + w * stride + c), total);
                }
                total = fma(part.load(token + c), load_pair(weights + earlier * stride + c), total);
            }
            Vec y[] = {total.first, total.second};
            silu_for<T>(y);
            part.store({y[0], y[1]}, out + c);
        });
    }

    // kTogether tokens from t on, with the same sums; Streams: past the caches.
    template <bool Streams>
    void convolve_together(int64_t t) const {
        const T *past = x(t - history), *token = x(t);
        T* out = y(t);
        // What lies kAhead further in the tokens of a block, one kTogether behind the other.
        const int64_t x_stride = p.x_token, further = kTogether * x_stride - channels;
        const int64_t turn = channels - kAhead % channels, ahead = kAhead + kAhead / channels * further;
        for_each_pair<L>(channels, [=, weights = weights, stride = stride, y_stride = p.channels](
                                       int64_t c, auto part) QNEXT_INLINE {
            const T* const fetched = token + c + ahead + (c < turn ? 0 : further);
#pragma GCC unroll 8
            for (int i = 0; i < kTogether; ++i)
                _mm_prefetch(reinterpret_cast<const char*>(fetched + i * x_stride), _MM_HINT_T0);
            // What SiLU makes of the sums of tokens i and i + 1.
            const auto write_two = [&](int i, Pair sum, Pair next) QNEXT_INLINE {
                Vec y[] = {sum.first, sum.second, next.first, next.second};
                silu_for<T>(y);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    T* const to = out + (i + j) * y_stride + c;
                    if constexpr (Streams)
                        Channels<L>::stream({y[2 * j], y[2 * j + 1]}, to);
                    else
                        part.store({y[2 * j], y[2 * j + 1]}, to);
                }
            };
            if constexpr (L == Layout::kDots)
                sum_twos(part, past + c, token + c, x_stride, weights + 2 * c, write_two);
            else
                sum_windows(part, past + c, token + c, x_stride, weights + c, stride, write_two);
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
    const int64_t width, history, first, channels, in_x, stride;  // of a row of the workspace: stride
    float* const weights;
    S* const inputs;
    const bool streams;
};

template <int W, class T, class S, Layout L>
void prefill(const CausalConv1d& p) {
    const Sections blocks(p, kChannels);
    const int64_t count = blocks.count();
    const int64_t tokens = std::clamp(kTokens * kChannels * count / std::max<int64_t>(p.channels, 1), kTokens, 2 * kTokens);
    const int64_t ranges = (p.tokens + tokens - 1) / tokens;
#pragma omp parallel if (worth_threads(p.tokens * p.channels * 8))
    {
        const Workspace<S> own(p.width, kChannels);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < ranges * count; ++task) {
            const int64_t from = task / count * tokens;
            const Block<W, T, S, L> block(p, blocks[task % count], own);
            block.load_weights();
            block.outputs(from, std::min(from + tokens, p.tokens));
        }
        _mm_sfence();  // what was streamed comes before what tells others that this is done
#pragma omp for
        for (int64_t task = 0; task < p.sequences * count; ++task) {
            Block<W, T, S, L>(p, blocks[task % count], own).keep(task / count);
        }
    }
}

// A decode or a verify.
template <int W, class T, class S, Layout L>
void step(const CausalConv1d& p) {
    const Sections blocks(p, kStepChannels);
    const int64_t count = blocks.count(), ranges = (p.sequences + kSequences - 1) / kSequences;
#pragma omp parallel if (worth_threads(p.tokens * p.channels * 8))
    {
        const Workspace<S> own(p.width, kStepChannels);
#pragma omp for
        for (int64_t task = 0; task < ranges * count; ++task) {
            const Block<W, T, S, L> block(p, blocks[task % count], own);
            block.load_weights();
            const int64_t from = task / count * kSequences;
            for (int64_t n = from; n < std::min(from + kSequences, p.sequences); ++n) block.step(n);
        }
        _mm_sfence();
    }
}

template <int W, class T, class S, Layout L>
void causal_conv1d(const CausalConv1d& p) {
    if (p.has_initial)
        prefill<W, T, S, L>(p);
    else
        step<W, T, S, L>(p);
}

template <int W, class T, class S>
void causal_conv1d(const CausalConv1d& p) {
    if constexpr (!std::is_same_v<T, bfloat16> || !std::is_same_v<S, bfloat16>) {
        causal_conv1d<W, T, S, Layout::kInOrder>(p);
    } else {
#if defined(__AVX512F__)
        if constexpr (W == 4) {
            if (p.weight.dtype == kBFloat16) return causal_conv1d<W, T, S, Layout::kDots>(p);
        }
#endif
        causal_conv1d<W, T, S, Layout::kEvenOdd>(p);
    }
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
