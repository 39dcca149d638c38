// Products of activations with the rows of a weight matrix [rows, K].
//
// Rows are multiplied in panels of kPanel. A panel holds the first 32 bits of all its rows side by side (a float, or two
// bfloat16), then the next, so that a vector holds the same part of several rows and a result needs no sum across lanes;
// activations are broadcast to it. A matrix whose whole panels are stored so is packed: a step of decode reads it as one
// stream. Other panels are packed on the way.
//
// With AMX activations in bfloat16 are multiplied by matmul_tiles.h.
//
// A result is the sum over blocks of K of one chain of sums each, in one order. It does not depend on how many activations
// or rows are multiplied together, or on who packed the panel. Of weights with scales a block is what has one in common,
// which its chain is multiplied with.
#pragma once

#include <algorithm>
#include <type_traits>

#include "arguments.h"
#include "bytes.h"
#include "int4.h"

namespace qnext {

constexpr int64_t kPanel = 64;
constexpr int kPanelVectors = kPanel / Vec::size;
// Activations that meet a panel at once: their sums, some weights and an activation fill the registers.
constexpr int kTogether = Vec::size == 16 ? 6 : 5;
// So few meet two panels at once, where these have no scales: a processor fetches two streams faster than one.
constexpr int kFew = Vec::size == 16 ? 3 : 1;
// Activations whose products are kept together, and that are converted together where they have to be.
constexpr int64_t kTokens = 48 * kTogether;
constexpr int64_t kAhead = 16;   // steps that are fetched ahead
constexpr int64_t kAheadScaled = 4096;  // bytes, of weights with scales
constexpr int64_t kChain = Vec::size == 16 ? 128 : 64;  // steps of a chain of sums
// Tiles of activations, at most, that meet half as long a piece of a panel: they wait for memory, and a core's first cache
// holds it and as much that is fetched meanwhile. More tiles have the time to read the second cache.
constexpr int64_t kFewTiles = 3;
constexpr int64_t kPiece = 64;

// How activations as they are packed meet weights as they are stored: `w` is a step of a panel, of which vector `v` is read.
struct DotFloat {
    using Packed = float;
    using Weight = float;
    static constexpr int64_t step = 1;    // elements of K
    static constexpr int64_t stored = 1;  // of Weight, which holds those of a row
    static constexpr int parts = 1;
    static Vec weights(const float* w, int v, int) { return Vec::load(w + v * Vec::size); }
    static Vec activation(const float* x, int) { return Vec::fill(*x); }
    static Vec add(Vec total, Vec x, Vec w) { return fma(x, w, total); }
};

#if defined(__AVX512BF16__)

struct DotBFloat16 {
    using Packed = bfloat16;
    using Weight = bfloat16;
    static constexpr int64_t step = 2, stored = 2;
    static constexpr int parts = 1;
    static Vec weights(const bfloat16* w, int v, int) { return {_mm512_loadu_ps(w + v * 2 * Vec::size)}; }
    static Vec activation(const bfloat16* x, int) { return Vec::fill_from(x); }
    static Vec add(Vec total, Vec x, Vec w) {
        return {_mm512_dpbf16_ps(total.v, (__m512bh)x.v, (__m512bh)w.v)};
    }
};

#else

// The even elements, then the odd ones: two bfloat16 in 32 bits are two floats after a shift and a mask.
struct DotBFloat16 {
    using Packed = float;
    using Weight = bfloat16;
    static constexpr int64_t step = 2, stored = 2;
    static constexpr int parts = 2;
#if defined(__AVX512F__)
    static Vec weights(const bfloat16* w, int v, int part) {
        const __m512i pairs = _mm512_loadu_si512(w + v * 2 * Vec::size);
        return {_mm512_castsi512_ps(part ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))
                                         : _mm512_slli_epi32(pairs, 16))};
    }
#else
    static Vec weights(const bfloat16* w, int v, int part) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v * 2 * Vec::size));
        return {_mm256_castsi256_ps(part ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                                         : _mm256_slli_epi32(pairs, 16))};
    }
#endif
    static Vec activation(const float* x, int part) { return Vec::fill(x[part]); }
    static Vec add(Vec total, Vec x, Vec w) { return fma(x, w, total); }
};

#endif

// The even column, then the odd one.
template <class W>
struct DotBytes {
    using Packed = float;
    using Weight = W;
    using Decoded = DotFloat;  // how they meet weights that are decoded beforehand, with the same result
    static constexpr int64_t step = 2, stored = 2;
    static constexpr int parts = 2;
    static Vec weights(const W* w, int v, int part) { return byte_column(w, v, part); }
    static Vec activation(const float* x, int part) { return Vec::fill(x[part]); }
    static Vec add(Vec total, Vec x, Vec w) { return fma(x, w, total); }
};

// The same of weights in int4.
template <class S>
struct DotInt4 : DotBytes<float8> {
    using Weight = int4<S>;
    static constexpr int64_t stored = 1;
    static Vec weights(const Weight* w, int v, int part) { return int4_column(w, v, part); }
};

#if defined(__AVX512BF16__)

template <class W>
struct DotBytePairs : DotBFloat16 {
    using Weight = W;
    using Decoded = DotBFloat16;
    static Vec weights(const W* w, int v, int) { return {_mm512_castsi512_ps(byte_pairs(w, v))}; }
};

template <class S>
struct DotInt4Pairs : DotBFloat16 {
    using Weight = int4<S>;
    using Decoded = DotBFloat16;
    static constexpr int64_t stored = 1;
    static Vec weights(const Weight* w, int v, int) { return int4_pairs(w, v); }
};

#else

template <class W>
using DotBytePairs = DotBytes<W>;
template <class S>
using DotInt4Pairs = DotInt4<S>;

#endif

#if defined(__AVX512BF16__) && !defined(__AVX512VBMI__)
using DotFloat8Pairs = DotBytes<float8>;
#else
using DotFloat8Pairs = DotBytePairs<float8>;
#endif

// Of activations T with weights W: of the same type, or with scales.
DotFloat dot_of(float, float);
DotBFloat16 dot_of(bfloat16, bfloat16);
DotBytes<float8> dot_of(float, float8);
DotFloat8Pairs dot_of(bfloat16, float8);
DotInt4<float> dot_of(float, int4<float>);
DotInt4Pairs<bfloat16> dot_of(bfloat16, int4<bfloat16>);
DotBytes<int8<float>> dot_of(float, int8<float>);
DotBytePairs<int8<bfloat16>> dot_of(bfloat16, int8<bfloat16>);
template <class T, class W = T>
using Dot = decltype(dot_of(T(), W()));
template <class T, class W = T>
using Packed = typename Dot<T, W>::Packed;

// Calls f with a value of the C++ type of activations, and one of that of weights.
template <class F>
void with_types(int64_t dtype, int64_t stored, F f) {
    with_type(dtype, [&](auto type) {
        switch (stored) {
            case kFloat8: return f(type, float8());
            case kInt4: return f(type, int4<decltype(type)>());
            case kInt8: return f(type, int8<decltype(type)>());
            default: return f(type, type);
        }
    });
}

inline int64_t panels_of(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

// The type of the scales of weights in W.
template <class W>
struct ScaleOf {
    using type = float;
};
template <class S>
struct ScaleOf<int4<S>> {
    using type = S;
};
template <class S>
struct ScaleOf<int8<S>> {
    using type = S;
};
template <class W>
using Scale = typename ScaleOf<W>::type;
template <class W>
constexpr bool kInGroups = false;
template <class S>
constexpr bool kInGroups<int4<S>> = true;
template <class S>
constexpr bool kInGroups<int8<S>> = true;
template <class W>
constexpr bool kHalfBytes = false;
template <class S>
constexpr bool kHalfBytes<int4<S>> = true;

// Elements of K that lie side by side in a panel: 32 bits, or two with scales; and of W, which hold those of a row.
template <class W>
constexpr int64_t kStep = std::is_same_v<W, float> ? 1 : 2;
template <class W>
constexpr int64_t kStored = kHalfBytes<W> ? 1 : kStep<W>;

template <class W>
int64_t steps_of(int64_t k) {
    return (k + kStep<W> - 1) / kStep<W>;
}

// Of W, which hold so many elements, whole steps of them.
template <class W>
int64_t stored_in(int64_t elements) {
    return kHalfBytes<W> ? elements / kStep<W> : elements;
}

// A panel of `rows` rows, zeros behind their last element and behind the last of them.
template <class T>
void pack_panel(const T* w, int64_t rows, int64_t k, T* to) {
    constexpr int64_t step = kStep<T>, width = Vec::size * step;
    const int64_t steps = steps_of<T>(k);
    for (int64_t r = 0; r < kPanel; r += Vec::size) {
        for (int64_t s = 0; s < steps; s += Vec::size) {
            Vec block[Vec::size];
            for (int i = 0; i < Vec::size; ++i) {
                T row[width] = {};
                const T* from = w + (r + i) * k + s * step;
                const int64_t count = r + i < rows ? std::min(width, k - s * step) : 0;
                if (count < width) {
                    std::copy_n(from, count, row);
                    from = row;
                }
                block[i] = Vec::load(reinterpret_cast<const float*>(from));
            }
            transpose(block);
            for (int64_t i = 0; i < std::min<int64_t>(Vec::size, steps - s); ++i)
                block[i].store(reinterpret_cast<float*>(to + ((s + i) * kPanel + r) * step));
        }
    }
}

template <class W>
void pack_bytes(const W* w, int64_t rows, int64_t k, W* to) {
    const int64_t steps = steps_of<W>(k);
    if (rows < kPanel || k % 2) std::fill_n(to, steps * 2 * kPanel, W{});
    // Lines of some rows at a time stay in the first cache.
    for (int64_t first = 0; first < k; first += 64)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = first; i < std::min(first + 64, k); ++i)
                to[i / 2 * 2 * kPanel + byte_place(r, i % 2)] = {packed_byte(w[r * k + i])};
}

inline void pack_panel(const float8* w, int64_t rows, int64_t k, float8* to) { pack_bytes(w, rows, k, to); }

template <class S>
void pack_panel(const int8<S>* w, int64_t rows, int64_t k, int8<S>* to) {
    pack_bytes(w, rows, k, to);
}

template <class S>
void pack_panel(const int4<S>* w, int64_t rows, int64_t k, int4<S>* to) {
    const int64_t steps = steps_of<int4<S>>(k);
    std::fill_n(to, steps * kPanel, int4<S>{});
    for (int64_t first = 0; first < steps; first += 64)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = first; i < std::min(first + 64, steps); ++i)
                for (int odd = 0; odd < 2; ++odd) {
                    const int code = (w[r * steps + i].columns >> 4 * odd & 15) ^ kInt4Flip;
                    to[i * kPanel + int4_byte(r, odd)].columns |= uint8_t(code << int4_shift(r, odd));
                }
}

// To [groups, kPanel] the scales [rows, groups] of a panel in groups, zeros for rows that it does not have.
template <class S>
void pack_scales(const S* scales, int64_t rows, int64_t groups, S* to) {
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = 0; r < kPanel; ++r) to[g * kPanel + r] = r < rows ? scales[r * groups + g] : S{};
}

// A panel of weights, and its scales: in e4m3 one for every block of columns, else kPanel for every group of them.
template <class W>
struct Panel {
    const W* data;
    const Scale<W>* scales;
    int64_t group;
};

// A weight matrix [rows, K]; if it is packed, K is whole steps, and rows behind the last whole panel lie as they are.
template <class W>
struct Matrix {
    const W* data;
    int64_t rows, k;
    bool packed;
    const Scale<W>* scales = nullptr;  // in e4m3 [blocks of rows, blocks of columns], else [rows, groups] or packed
    int64_t group = 0;                 // columns of a row that share a scale, where they are in groups

    // Of W, room for a panel and its scales in groups.
    static int64_t panel_size(int64_t k) {
        const int64_t scales = kInGroups<W> ? k / kFewestInGroup * kPanel * int64_t(sizeof(Scale<W>)) : 0;
        return steps_of<W>(k) * kStored<W> * kPanel + scales;
    }

    // The panel from row `first` on, in place or in `memory`, which holds panel_size(k) elements.
    Panel<W> panel(int64_t first, W* memory) const {
        static_assert(kScaleBlock % kPanel == 0, "a panel lies in one block of rows");
        const W* const from = data + stored_in<W>(first * k);
        const bool in_place = packed && first + kPanel <= rows;
        const int64_t count = std::min(kPanel, rows - first);
        if (!in_place) pack_panel(from, count, k, memory);
        if constexpr (kInGroups<W>) {
            const int64_t groups = k / group;
            const Scale<W>* const own = scales + first * groups;
            if (in_place) return {from, own, group};
            const auto to = reinterpret_cast<Scale<W>*>(memory + steps_of<W>(k) * kStored<W> * kPanel);
            pack_scales(own, count, groups, to);
            return {memory, to, group};
        } else {
            const int64_t blocks = (k + kScaleBlock - 1) / kScaleBlock;
            return {in_place ? from : memory, scales ? scales + first / kScaleBlock * blocks : nullptr, kScaleBlock};
        }
    }
};

// Rows of activations as products with weights W read them.
template <class T, class W = T>
class Activations {
    using Packed = qnext::Packed<T, W>;

  public:
    explicit Activations(int64_t k)
        : k(k), width(steps_of<W>(k) * kStep<W>), direct(std::is_same_v<T, Packed> && width == k) {}

    // `count` rows, at most kTokens; row(i) is where row i lies.
    template <class F>
    void take(int64_t count, F row) {
        if (count > room) {
            room = count;
            places = scratch<const Packed*>(room);
            if (!direct) memory = scratch<Packed>(room * width);
        }
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (std::is_same_v<T, Packed>) {
                if (direct) {
                    places[i] = row(i);
                    continue;
                }
            }
            Packed* to = memory.get() + i * width;
            convert(row(i), to);
            places[i] = to;
        }
    }

    const Packed* const* rows() const { return places.get(); }

  private:
    void convert(const T* from, Packed* to) const {
        int64_t i = 0;
        for (; i + Vec::size <= k; i += Vec::size) Vec::load(from + i).store(to + i);
        for (; i < k; ++i) assign(to[i], to_float(from[i]));
        for (; i < width; ++i) assign(to[i], 0.0f);
    }

    const int64_t k, width;
    const bool direct;
    int64_t room = 0;
    Scratch<const Packed*> places;
    Scratch<Packed> memory;
};

// Where in bytes from a piece on to fetch, and how much further with every step.
struct Fetch {
    int64_t from, step;
};

// Steps of a panel, all or a part of one chain.
struct Piece {
    static constexpr bool scaled = false, decodes = false, short_chains = false;
    int64_t first, steps;
    bool begins_chain, ends_chain;
    int64_t at;  // its first step in the memory of a panel
    Piece part(int) const { return *this; }
};

// What the rows of a panel are multiplied with behind a chain: all of one in e4m3 with the same.
struct OfBlock {
    static constexpr bool short_chains = false;
    float scale;
    Vec get(int) const { return Vec::fill(scale); }
    OfBlock part(int) const { return *this; }
};

// Each of one in groups with its own.
template <class S>
struct OfRows {
    static constexpr bool short_chains = true;
    const S* scales;
    Vec get(int v) const { return Vec::load(scales + v * Vec::size); }
    OfRows part(int v) const { return {scales + v * Vec::size}; }
    OfRows behind(int64_t chains) const { return {scales + chains * kPanel}; }
};

inline OfBlock scales_of(const Panel<float8>& panel, int64_t chain) { return {panel.scales[chain] * kFloat8Unit}; }

template <class W, class = std::enable_if_t<kInGroups<W>>>
OfRows<Scale<W>> scales_of(const Panel<W>& panel, int64_t chain) {
    return {panel.scales + chain * kPanel};
}

// A whole chain of a panel, which is multiplied with scales.
template <class Scales>
struct ScaledChain {
    static constexpr bool scaled = true, decodes = false, begins_chain = true, ends_chain = true;
    static constexpr bool short_chains = Scales::short_chains;  // of which a block may have several
    int64_t first, steps, at;
    Scales scales;
    // Of the panel's vectors those from `v` on.
    ScaledChain part(int v) const { return {first, steps, at, scales.part(v)}; }
    // So many chains further on.
    ScaledChain behind(int64_t chains) const {
        return {first + chains * steps, steps, at + chains * steps, scales.behind(chains)};
    }
};

// The same, whose weights are kept, decoded, for the tiles that meet them next.
template <class D, class Scales>
struct DecodedChain : ScaledChain<Scales> {
    using Chain = ScaledChain<Scales>;
    static constexpr bool decodes = true;
    typename D::Decoded::Weight* decoded;
    DecodedChain part(int v) const { return {Chain::part(v), decoded + v * int64_t(sizeof(Vec) / sizeof(*decoded))}; }
    DecodedChain behind(int64_t chains) const {
        return {Chain::behind(chains), decoded + chains * this->steps * D::step * kPanel};
    }
};

// To c[p] [A, kPanel], or added to it, the products of the steps of `piece` of A activations with V vectors of rows of each
// of P panels; to `open` where it does not end a chain. Meanwhile `Lines` lines are fetched a step.
template <class D, int A, int V, int P, int Lines, class Piece>
QNEXT_INLINE inline void add_tile(const typename D::Packed* const* x, const typename D::Weight* const* panels, Piece piece,
                                  Fetch fetch, float* const* c, float* open) {
    constexpr int64_t row = kPanel * D::stored;
    constexpr bool few = A <= kFew && !Piece::decodes;
    Vec total[P][A][V];
    const typename D::Packed* from[A];
    const typename D::Weight* w[P];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) from[a] = x[a] + piece.first * D::step;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
        w[p] = panels[p] + piece.at * row;
#pragma GCC unroll 8
        for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                total[p][a][v] = piece.begins_chain ? Vec::zero() : Vec::load(open + a * kPanel + v * Vec::size);
    }
    for (int64_t s = 0; s < piece.steps; ++s) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
            for (int line = 0; line < Lines; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(w[p]) + fetch.from + s * fetch.step + line * 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int part = 0; part < D::parts; ++part) {
            // Of the two that meet, the fewer are kept in registers.
            Vec activations[few ? A : 1], weights[few ? 1 : P][few ? 1 : V];
            if constexpr (few) {
#pragma GCC unroll 8
                for (int a = 0; a < A; ++a) activations[a] = D::activation(from[a] + s * D::step, part);
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) {
                        weights[0][0] = D::weights(w[p] + s * row, v, part);
#pragma GCC unroll 8
                        for (int a = 0; a < A; ++a)
                            total[p][a][v] = D::add(total[p][a][v], activations[a], weights[0][0]);
                    }
            } else {
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) weights[p][v] = D::weights(w[p] + s * row, v, part);
                // Not before all are decoded: for all that a compiler knows, a store changes what comes next.
                if constexpr (Piece::decodes) {
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v)
                        weights[0][v].store(reinterpret_cast<float*>(piece.decoded) + (s * D::parts + part) * kPanel +
                                            v * Vec::size);
                }
#pragma GCC unroll 8
                for (int a = 0; a < A; ++a) {
                    activations[0] = D::activation(from[a] + s * D::step, part);
#pragma GCC unroll 2
                    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
                        for (int v = 0; v < V; ++v)
                            total[p][a][v] = D::add(total[p][a][v], activations[0], weights[p][v]);
                }
            }
        }
    }
    const bool adds = piece.ends_chain && piece.first >= (Piece::scaled ? 1 : kChain);
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
        Vec scales[V];
        if constexpr (Piece::scaled) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) scales[v] = piece.scales.get(v);
        }
#pragma GCC unroll 8
        for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                float* to = (piece.ends_chain ? c[p] : open) + a * kPanel + v * Vec::size;
                const Vec sum = total[p][a][v];
                if constexpr (Piece::scaled)
                    (adds ? fma(scales[v], sum, Vec::load(to)) : scales[v] * sum).store(to);
                else
                    (adds ? Vec::load(to) + sum : sum).store(to);
            }
    }
}

// Neither this nor the next is inlined: among the surrounding loops the compiler would keep sums in memory instead of
// registers.
template <class D, int A, int V, int P, int Lines, class Piece>
__attribute__((noinline)) void multiply_tile(const typename D::Packed* const* x, const typename D::Weight* const* panels,
                                             Piece piece, Fetch fetch, float* const* c, float* open) {
    add_tile<D, A, V, P, Lines>(x, panels, piece, fetch, c, open);
}

// As multiply_tile of one panel and some whole chains in a row, for tiles of A activations one after the other: a processor
// begins with a tile before the last is stored. `fetch` is from the first chain on.
template <class D, int A, int V, class Piece>
__attribute__((noinline)) void multiply_tiles(const typename D::Packed* const* x, int64_t tiles,
                                              const typename D::Weight* panel, Piece piece, int64_t chains, Fetch fetch,
                                              float* c) {
    const int64_t chain = piece.steps * kPanel * D::stored * int64_t(sizeof(*panel));
    for (int64_t tile = 0; tile < tiles; ++tile, x += A, c += A * kPanel) {
        if constexpr (Piece::short_chains) {
            for (int64_t n = 0; n < chains; ++n) {
                add_tile<D, A, V, 1, 1>(x, &panel, piece.behind(n), {fetch.from - n * chain, fetch.step}, &c, nullptr);
                fetch.from += piece.steps * fetch.step;
            }
        } else {
            add_tile<D, A, V, 1, 1>(x, &panel, piece, fetch, &c, nullptr);
            fetch.from += piece.steps * fetch.step;
        }
    }
}

// Calls f with `count`, 1 to N, as a constant.
template <int N, class F>
QNEXT_INLINE inline void with_count(int64_t count, F f) {
    if constexpr (N > 1) {
        if (count < N) return with_count<N - 1>(count, f);
    }
    f(std::integral_constant<int, N>());
}

// Vectors of a panel beside which the sums of all kTogether fit in the registers.
constexpr int kVectorsTogether = Vec::size == 16 ? kPanelVectors : 2;

template <class D, int P, int Lines, class Piece>
QNEXT_INLINE inline void multiply_panels(const typename D::Packed* const* x, int64_t count,
                                         const typename D::Weight* const* panels, Piece piece, Fetch fetch,
                                         float* const* c, float* open) {
    with_count<kTogether>(count, [&](auto a) {
        if constexpr (a <= kFew) {
            multiply_tile<D, a, kPanelVectors, P, Lines>(x, panels, piece, fetch, c, open);
        } else {
            for (int p = 0; p < P; ++p) {
                for (int v = 0; v < kPanelVectors; v += kVectorsTogether) {
                    const typename D::Weight* panel = panels[p] + v * Vec::size * D::stored;
                    float* to = c[p] + v * Vec::size;
                    constexpr int lines = kVectorsTogether == kPanelVectors ? Lines : 1;
                    multiply_tile<D, a, kVectorsTogether, 1, lines>(x, &panel, piece.part(v), fetch, &to,
                                                                    open + v * Vec::size);
                }
            }
        }
    });
}

// To c [count, kPanel] chains of one panel in a row for tiles, none of few activations, which share in fetching.
template <class D, class Piece>
QNEXT_INLINE inline void multiply_chains(const typename D::Packed* const* x, int64_t count, const typename D::Weight* panel,
                                         Piece piece, int64_t chains, Fetch fetch, float* c) {
    const int64_t tiles = (count + kTogether - 1) / kTogether;
    // Tiles of one activation more come behind the others.
    const int64_t size = count / tiles, larger = count % tiles;
    const auto run = [&](int64_t tile, int64_t num_tiles, int64_t begin, int64_t together) {
        const Fetch share{fetch.from + chains * piece.steps * fetch.step * tile, fetch.step};
        with_count<kTogether>(together, [&](auto a) {
            if constexpr (a > kFew) {
                for (int v = 0; v < kPanelVectors; v += kVectorsTogether)
                    multiply_tiles<D, a, kVectorsTogether>(x + begin, num_tiles, panel + v * Vec::size * D::stored,
                                                           piece.part(v), chains, share,
                                                           c + begin * kPanel + v * Vec::size);
            }
        });
    };
    run(0, tiles - larger, 0, size);
    if (larger) run(tiles - larger, larger, (tiles - larger) * size, size + 1);
}

// As `multiply`, for one panel and more than kFewTiles tiles, all of which meet a chain of the panel before the next.
template <class T>
void multiply_many(const Packed<T>* const* x, int64_t count, const T* panel, int64_t k, float* c) {
    static_assert((kFewTiles * kTogether + 1) / (kFewTiles + 1) > kFew, "none of many tiles is of few activations");
    constexpr int64_t row = kPanel * 4;  // bytes
    const int64_t steps = steps_of<T>(k), tiles = (count + kTogether - 1) / kTogether;
    for (int64_t first = 0; first == 0 || first < steps; first += kChain) {
        const Piece chain{first, std::min(kChain, steps - first), true, true, first};
        multiply_chains<Dot<T>>(x, count, panel, chain, 1, {kChain * row, row / tiles}, c);
    }
}

// c[p] [count, kPanel] = the products of `count` activations with one or two panels.
//
// All activations meet a piece of a panel before the next. Those of one tile fetch what they are about to read; several
// tiles share in fetching the next piece: what comes behind a panel in memory is mostly the panel that is needed next.
// They meet one panel after the other, so that what is read and what is fetched stay in that cache.
//
// Not inlined: where a file calls it several times, a compiler would make calls of the functions above.
template <class T>
__attribute__((noinline)) void multiply(const Packed<T>* const* x, int64_t count, const Panel<T>* panels,
                                        int64_t num_panels, int64_t k, float* const* c) {
    constexpr int64_t row = kPanel * 4;  // bytes
    const int64_t steps = steps_of<T>(k), tiles = (count + kTogether - 1) / kTogether;
    if (num_panels == 2 && tiles > 1) {
        for (int p = 0; p < 2; ++p) multiply<T>(x, count, panels + p, 1, k, c + p);
        return;
    }
    if (tiles > kFewTiles) return multiply_many<T>(x, count, panels[0].data, k, c[0]);
    const T* const weights[] = {panels[0].data, num_panels == 2 ? panels[1].data : nullptr};
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, 4> four;
    const int64_t length = tiles == 1 ? kChain : kPiece;
    alignas(64) float open[kFewTiles * kTogether * kPanel];  // sums that a piece leaves to the next
    for (int64_t first = 0; first == 0 || first < steps; first += length) {
        const int64_t some = std::min(length, steps - first), end = first + some;
        const Piece piece{first, some, first % kChain == 0, end % kChain == 0 || end == steps, first};
        for (int64_t tile = 0, a = 0; tile < tiles; ++tile) {
            const int64_t together = (count - a) / (tiles - tile);
            float* const to[] = {c[0] + a * kPanel, num_panels == 2 ? c[1] + a * kPanel : nullptr};
            const auto run = [&](auto num, auto lines, Fetch fetch) {
                multiply_panels<Dot<T>, num, lines>(x + a, together, weights, piece, fetch, to, open + a * kPanel);
            };
            if (tiles > 1)
                run(one, two, {length * row + some * row / tiles * tile, row / tiles});
            else if (num_panels == 1)
                run(one, four, {kAhead * row, row});
            else
                run(two, four, {kAhead * row, row});
            a += together;
        }
    }
}

// To c [A, kPanel] the products of a single tile with V vectors, from vector `from` on, of a panel of weights that
// have scales. Chains are short: their sums meet those of the chains before without a way through memory.
template <class D, int A, int V, class W>
__attribute__((noinline)) void multiply_scaled(const typename D::Packed* const* x, const Panel<W>& panel, int64_t steps,
                                               int from, float* c) {
    constexpr int64_t row = kPanel * D::stored;
    constexpr int64_t lines = V == kPanelVectors ? row * int64_t(sizeof(W)) / 64 : 1;
    const int64_t length = panel.group / D::step;
    const W* w = panel.data + from * Vec::size * D::stored;
    Vec result[A][V];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) result[a][v] = Vec::fill(-0.0f);  // added to it, a sum stays as it is, a zero's sign too
    for (int64_t first = 0; first < steps; first += length) {
        const int64_t end = std::min(first + length, steps);
        Vec total[A][V];
#pragma GCC unroll 8
        for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) total[a][v] = Vec::zero();
        for (int64_t s = first; s < end; ++s, w += row) {
#pragma GCC unroll 8
            for (int64_t line = 0; line < lines; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(w) + kAheadScaled + line * 64, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int part = 0; part < D::parts; ++part) {
                Vec activations[A];
#pragma GCC unroll 8
                for (int a = 0; a < A; ++a) activations[a] = D::activation(x[a] + s * D::step, part);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    const Vec weights = D::weights(w, v, part);
#pragma GCC unroll 8
                    for (int a = 0; a < A; ++a) total[a][v] = D::add(total[a][v], activations[a], weights);
                }
            }
        }
        const auto scales = scales_of(panel, first / length).part(from);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const Vec scale = scales.get(v);
#pragma GCC unroll 8
            for (int a = 0; a < A; ++a) result[a][v] = fma(scale, total[a][v], result[a][v]);
        }
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) result[a][v].store(c + a * kPanel + (from + v) * Vec::size);
}

// The same with weights that have scales. The first of several tiles decodes a block of a panel, one chain or some short
// ones, for all of them: of short ones alone each would read a line of memory of each activation.
template <class T, class W, class = std::enable_if_t<!std::is_same_v<T, W>>>
__attribute__((noinline)) void multiply(const Packed<T, W>* const* x, int64_t count, const Panel<W>* panels,
                                        int64_t num_panels, int64_t k, float* const* c) {
    using D = Dot<T, W>;
    using Decoded = typename D::Decoded;
    using Scales = decltype(scales_of(panels[0], 0));
    static_assert((kTogether + 2) / 2 > kFew, "no tile behind the first is of few activations");
    constexpr int64_t row = kPanel * D::stored, factor = D::step / Decoded::step;  // row: bytes
    static_assert(sizeof(W) == 1, "bytes");
    if (num_panels == 2) {
        for (int p = 0; p < 2; ++p) multiply<T>(x, count, panels + p, 1, k, c + p);
        return;
    }
    const int64_t steps = steps_of<W>(k), tiles = (count + kTogether - 1) / kTogether, length = panels[0].group / D::step;
    if (steps == 0) {
        std::fill_n(c[0], count * kPanel, 0.0f);
        return;
    }
    if (tiles == 1) {
        return with_count<kTogether>(count, [&](auto a) {
            // Sums of a chain and of all chains: for one activation half a panel's fill the registers of AVX2.
            constexpr int vectors = a > kFew ? kVectorsTogether : Vec::size == 16 ? kPanelVectors : kPanelVectors / 2;
            for (int v = 0; v < kPanelVectors; v += vectors) multiply_scaled<D, a, vectors>(x, panels[0], steps, v, c[0]);
        });
    }
    alignas(64) typename Decoded::Weight decoded[kScaleBlock * kPanel];
    const int64_t together = count / tiles, share = row / tiles, block = kScaleBlock / D::step;
    for (int64_t begin = 0; begin < steps; begin += block) {
        const int64_t end = std::min(begin + block, steps), chain_steps = std::min(length, end - begin);
        const ScaledChain<Scales> encoded{begin, chain_steps, begin, scales_of(panels[0], begin / length)};
        // All tiles share in fetching what is decoded next.
        const int64_t chains = (end - begin) / chain_steps, next = block * row;
        with_count<kTogether>(together, [&](auto a) {
            constexpr int vectors = a <= kFew ? kPanelVectors : kVectorsTogether;
            const DecodedChain<D, Scales> chain{encoded, decoded};
            for (int v = 0; v < kPanelVectors; v += vectors)
                multiply_tiles<D, a, vectors>(x, 1, panels[0].data + v * Vec::size * D::stored, chain.part(v), chains,
                                              {next, share}, c[0] + v * Vec::size);
        });
        const ScaledChain<Scales> chain{begin * factor, chain_steps * factor, 0, encoded.scales};
        const typename Decoded::Weight* const panel = decoded;
        const int64_t ahead = reinterpret_cast<intptr_t>(panels[0].data + begin * row) - reinterpret_cast<intptr_t>(panel);
        const Fetch fetch{ahead + next + (end - begin) * share, share / factor};
        multiply_chains<Decoded>(x + together, count - together, panel, chain, chains, fetch, c[0] + together * kPanel);
    }
}

// Results of `multiply` for two panels.
class Products {
  public:
    explicit Products(int64_t most)
        : memory(scratch<float>(2 * most * kPanel)), panels{memory.get(), memory.get() + most * kPanel} {}
    float* const* get() const { return panels; }
    const float* row(int64_t panel, int64_t activation) const { return panels[panel] + activation * kPanel; }

  private:
    const Scratch<float> memory;
    float* const panels[2];
};

}  // namespace qnext
