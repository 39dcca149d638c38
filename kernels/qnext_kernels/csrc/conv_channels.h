// How a convolution has channels in vectors, loads and stores them, and copies inputs from and to pools.
#pragma once

#include <algorithm>

#include "pairs.h"

namespace qnext {
namespace conv {

// How the channels of a block lie in vectors.
enum class Layout {
    kInOrder,  // as they lie in memory
    kEvenOdd,  // those of a pair of vectors as the even ones and the odd ones: inputs of bfloat16
    kDots,     // as dot products have them that multiply two inputs of each at once: weights of bfloat16 too
};

// Access to kPair neighbouring channels.
template <Layout L>
struct Channels {
    template <class E>
    static Pair load(const E* from) {
        if constexpr (L == Layout::kEvenOdd)
            return load_pair(from);
        else
            return {Vec::load(from), Vec::load(from + Vec::size)};
    }
    template <class E>
    static void store(Pair x, E* to) {
        if constexpr (L == Layout::kEvenOdd) {
            x.store(to);
        } else {
            x.first.store(to);
            x.second.store(to + Vec::size);
        }
    }
    static void stream(Pair x, bfloat16* to) { x.stream(to); }
    // Where channel c of a block lies among its weights.
    static int64_t place(int64_t c) {
        return L == Layout::kEvenOdd ? c / kPair * kPair + c % 2 * Vec::size + c % kPair / 2 : c;
    }
};

#if defined(__AVX512F__)

template <>
struct Channels<Layout::kDots> {
    static __m512i load(const bfloat16* from) { return _mm512_loadu_si512(from); }
    static void store(Pair x, bfloat16* to) { _mm512_storeu_si512(to, in_order(x)); }
    static void stream(Pair x, bfloat16* to) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), in_order(x)); }
};

#endif

// Access to kPair channels, and to the first few of them.
template <Layout L>
struct Whole : Channels<L> {};

template <Layout L>
struct First {
    int64_t count;
    template <class E>
    auto load(const E* from) const {
        E padded[kPair] = {};
        std::copy_n(from, count, padded);
        return Channels<L>::load(padded);
    }
    template <class E>
    void store(Pair x, E* to) const {
        E padded[kPair];
        Channels<L>::store(x, padded);
        std::copy_n(padded, count, to);
    }
};

// Calls f(c, access) for pairs of vectors of `channels` channels.
template <Layout L, class F>
inline void for_each_pair(int64_t channels, F f) {
    int64_t c = 0;
    for (; c + kPair <= channels; c += kPair) f(c, Whole<L>{});
    if (c < channels) f(c, First<L>{channels - c});
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
            for_each_pair<Layout::kInOrder>(count, [&](int64_t i, auto part) { part.store(part.load(from + i), to + i); });
    } else {
        for (int64_t i = 0; i < count; ++i) to[i * to_stride] = converted<To>(from[i * from_stride]);
    }
}

}  // namespace conv
}  // namespace qnext
