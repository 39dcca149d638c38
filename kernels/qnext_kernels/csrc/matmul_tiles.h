// Products of bfloat16 activations with panels (matmul.h), of which 16 steps of 16 rows are a tile of AMX as they lie there.
//
// A result is one chain of products of tiles over K; of weights with scales one over what has a scale in common, which the
// chain is multiplied with. It does not depend on how many activations are multiplied together: for few, AVX-512 does what a
// tile would, in the same order.
#pragma once

#include "matmul.h"
#include "rows.h"
#include "tiles.h"

namespace qnext {

#if defined(QNEXT_TILES)

// Activations for which tiles, almost empty, take longer than AVX-512.
constexpr int64_t kFewForTiles = 3;

// Activations: as floats [count, width] if they are few, else [tiles of rows, tiles of columns, tiles::kRows, tiles::kColumns];
// zeros behind the last column. What lies behind the last row of a tile is undefined, and no result depends on it.
class TiledActivations {
  public:
    explicit TiledActivations(int64_t k) : k(k), tiles((k + tiles::kColumns - 1) / tiles::kColumns) {}

    // `count` rows; row(i) is where row i lies.
    template <class F>
    void take(int64_t count, F row) {
        const int64_t row_tiles = (count + tiles::kRows - 1) / tiles::kRows;
        if (row_tiles > room) {
            room = row_tiles;
            memory = scratch<bfloat16>(room * tiles * tiles::kSize);
        }
        if (count <= kFewForTiles) return take_few(count, row);
        for (int64_t i = 0; i < count; ++i) {
            const bfloat16* from = row(i);
            bfloat16* to = memory.get() + i / tiles::kRows * tiles * tiles::kSize + i % tiles::kRows * tiles::kColumns;
            int64_t left = k;
            for (; left >= tiles::kColumns; left -= tiles::kColumns, from += tiles::kColumns, to += tiles::kSize)
                _mm512_store_si512(to, _mm512_loadu_si512(from));
            if (left) {
                std::memcpy(to, from, left * sizeof *to);
                std::fill_n(to + left, tiles::kColumns - left, bfloat16{});
            }
        }
    }

    const bfloat16* rows() const { return memory.get(); }

  private:
    template <class F>
    void take_few(int64_t count, F row) {
        const int64_t width = tiles * tiles::kColumns;
        float* to = reinterpret_cast<float*>(memory.get());
        for (int64_t i = 0; i < count; ++i, to += width) {
            const bfloat16* from = row(i);
            for_vectors(k, [&](int64_t at, auto part) { store(load(from + at, part), to + at, part); });
            std::fill(to + k, to + width, 0.0f);
        }
    }

    const int64_t k, tiles;
    int64_t room = 0;
    Scratch<bfloat16> memory;
};

namespace tiles {

constexpr int64_t kStepsElements = kRows * 2 * kPanel;  // of a panel, that one product reads
// Steps of a panel that several tiles of activations meet before the next: 128 KiB of weights, beside activations and what
// is fetched in the second cache.
constexpr int64_t kPieceTiles = 32;

// Weights in memory, or in the second cache: the next step's are fetched to the first, and lines from `at` on to the second.
struct FarWeights {
    const char* at;
    int64_t lines;  // a step

    QNEXT_INLINE void fetch_lines() {
        for (int64_t i = 0; i < lines; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
    QNEXT_INLINE static void fetch_next(const bfloat16* w) { fetch(w + kStepsElements, kPanel * 4); }
};

// Weights in the first cache.
struct NearWeights {
    QNEXT_INLINE static void fetch_lines() {}
    QNEXT_INLINE static void fetch_next(const bfloat16*) {}
};

// Tiles of activations that meet a panel together: one meets all of it, two meet half of it.
struct One {
    static constexpr int64_t rows = kRows, columns = kPanel;

    static void configure(int64_t count) {
        const auto n = uint8_t(count);
        tiles::configure({n, n, n, n, n, 0, kRows, 0});
    }
    template <class Weights>
    QNEXT_INLINE static void add(const bfloat16* x, int64_t, const bfloat16* w) {
        constexpr int64_t row = kPanel * 4;
        load<4>(x, 64);
        load<6>(w, row);
        multiply<0, 4, 6>();
        fetch(x + kSize, 64);
        Weights::fetch_next(w);
        load<6>(w + 32, row);
        multiply<1, 4, 6>();
        Weights::fetch_next(w + 32);
        load<6>(w + 64, row);
        multiply<2, 4, 6>();
        Weights::fetch_next(w + 64);
        load<6>(w + 96, row);
        multiply<3, 4, 6>();
        Weights::fetch_next(w + 96);
    }
};

struct Two {
    static constexpr int64_t rows = 2 * kRows, columns = kPanel / 2;

    static void configure(int64_t count) {
        const auto n = uint8_t(count - kRows);
        tiles::configure({kRows, kRows, n, n, kRows, n, kRows, 0});
    }
    // next: elements from the first tile of rows to the second
    template <class Weights>
    QNEXT_INLINE static void add(const bfloat16* x, int64_t next, const bfloat16* w) {
        constexpr int64_t row = kPanel * 4;
        load<6>(w, row);
        load<4>(x, 64);
        multiply<0, 4, 6>();
        Weights::fetch_next(w);
        load<5>(x + next, 64);
        multiply<2, 5, 6>();
        fetch(x + kSize, 64);
        load<6>(w + 32, row);
        multiply<1, 4, 6>();
        Weights::fetch_next(w + 32);
        multiply<3, 5, 6>();
        fetch(x + next + kSize, 64);
    }
};

// Calls f(tile of sums, its place in c) for each of the four.
template <class Together, class F>
QNEXT_INLINE inline void for_sums(F f) {
    constexpr bool one = std::is_same_v<Together, One>;
    f(std::integral_constant<int, 0>(), 0);
    f(std::integral_constant<int, 1>(), 16);
    f(std::integral_constant<int, 2>(), one ? 32 : kRows * kPanel);
    f(std::integral_constant<int, 3>(), one ? 48 : kRows * kPanel + 16);
}

// To c the products of `steps` tiles of columns, and those of `rest`, where there is one, with one more; added to what is
// there, or not.
template <class Together, class Weights>
QNEXT_INLINE inline void multiply(const bfloat16* x, int64_t next, const bfloat16* w, int64_t steps, const bfloat16* rest,
                                  Weights& weights, bool adds, float* c) {
    constexpr int64_t row = kPanel * 4;
    if (adds)
        for_sums<Together>([&](auto tile, int64_t place) { load<tile>(c + place, row); });
    else
        zero_sums();
    for (int64_t s = 0; s < steps; ++s, x += kSize, w += kStepsElements) {
        weights.fetch_lines();
        Together::template add<Weights>(x, next, w);
    }
    if (rest) Together::template add<NearWeights>(x, next, rest);
    for_sums<Together>([&](auto tile, int64_t place) { store<tile>(c + place, row); });
}

// Calls f(first, count, One or Two) for the activations that are multiplied together.
template <class F>
QNEXT_INLINE inline void for_rows_together(int64_t count, F f) {
    int64_t first = 0;
    for (; count - first > kRows; first += Two::rows) f(first, std::min(count - first, Two::rows), Two());
    if (first < count) f(first, count - first, One());
}

// `columns` of a panel, zeros behind them up to a tile's width.
template <class D>
__attribute__((noinline)) void decode(const typename D::Weight* w, int64_t columns, bfloat16* to) {
    constexpr int64_t row = kPanel * D::stored, ahead = kScaleBlock / D::step * row;
    const int64_t steps = (columns + 1) / 2;
    for (int64_t s = 0; s < steps; ++s, w += row, to += 2 * kPanel) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < row; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + ahead + line, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) D::weights(w, v, 0).store(reinterpret_cast<float*>(to) + v * Vec::size);
    }
    const int64_t missing = (steps + kRows - 1) / kRows * kRows - steps;
    std::fill_n(to, missing * 2 * kPanel, bfloat16{});
}

// What a product of tiles adds to `total` [A, kPanel], for `steps` steps of a panel, at most kRows, and A activations
// [A, width].
template <class D, int A>
__attribute__((noinline)) void add_few(const float* x, int64_t width, const typename D::Weight* w, int64_t steps,
                                       int64_t ahead, float* total) {
    constexpr int64_t row = kPanel * D::stored;
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    Vec even[A][kPanelVectors], odd[A][kPanelVectors];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) even[a][v] = odd[a][v] = Vec::zero();
    for (int64_t s = 0; s < steps; ++s, w += row, x += 2) {
#pragma GCC unroll 8
        for (int64_t byte = 0; byte < row * int64_t(sizeof *w); byte += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w) + ahead + byte, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
            const __m512i pairs = _mm512_castps_si512(D::weights(w, v, 0).v);
            const Vec first{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
            const Vec second{_mm512_castsi512_ps(_mm512_and_si512(pairs, high))};
#pragma GCC unroll 8
            for (int a = 0; a < A; ++a) {
                even[a][v] = fma(Vec::fill(x[a * width]), first, even[a][v]);
                odd[a][v] = fma(Vec::fill(x[a * width + 1]), second, odd[a][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
            float* to = total + a * kPanel + v * Vec::size;
            (Vec::load(to) + (even[a][v] + odd[a][v])).store(to);
        }
}

// Adds to `total` [count, kPanel] the products of `columns` columns of a panel, from column `begin` on, with few activations.
template <class D>
void add_few(const bfloat16* activations, int64_t count, int64_t width, const typename D::Weight* w, int64_t begin,
             int64_t columns, float* total) {
    constexpr int64_t ahead = std::is_same_v<typename D::Weight, bfloat16> ? 2 * kAhead * kPanel * 4 : kAheadScaled;
    const float* x = reinterpret_cast<const float*>(activations) + begin;
    const int64_t steps = (columns + 1) / 2;
    with_count<kFewForTiles>(count, [&](auto a) {
        for (int64_t s = 0; s < steps; s += kRows)
            add_few<D, a>(x + 2 * s, width, w + (begin / 2 + s) * kPanel * D::stored, std::min(kRows, steps - s), ahead, total);
    });
}

// to [count, kPanel] = sums times their scales, added to it or not.
template <class Scales>
QNEXT_INLINE inline void add_scaled(const float* sums, int64_t count, Scales scales, bool adds, float* to) {
    for (int v = 0; v < kPanelVectors; ++v) {
        const Vec scale = scales.get(v);
        for (int64_t i = v * Vec::size; i < count * kPanel; i += kPanel)
            (adds ? fma(scale, Vec::load(sums + i), Vec::load(to + i)) : scale * Vec::load(sums + i)).store(to + i);
    }
}

}  // namespace tiles

// c[p] [count, kPanel] = the products of `count` activations with one or two panels.
template <class T>
__attribute__((noinline)) void multiply(const bfloat16* x, int64_t count, const Panel<bfloat16>* panels, int64_t num_panels,
                                        int64_t k, float* const* c) {
    const int64_t whole = k / tiles::kColumns, left = k % tiles::kColumns;
    const int64_t next = (whole + (left != 0)) * tiles::kSize;
    alignas(64) bfloat16 rest[tiles::kStepsElements];
    if (count <= kFewForTiles) {
        const tiles::FlushSubnormals flush;
        constexpr int64_t block = tiles::kColumns;
        for (int64_t p = 0; p < num_panels; ++p) std::fill_n(c[p], count * kPanel, 0.0f);
        for (int64_t begin = 0; begin < k; begin += block) {
            const int64_t columns = std::min(block, k - begin);
            for (int64_t p = 0; p < num_panels; ++p)
                tiles::add_few<Dot<bfloat16>>(x, count, next / tiles::kRows, panels[p].data, begin, columns, c[p]);
        }
        return;
    }
    for (int64_t p = 0; p < num_panels; ++p) {
        const bfloat16* const w = panels[p].data;
        if (left) {
            const int64_t elements = steps_of<bfloat16>(left) * 2 * kPanel;
            std::copy_n(w + whole * tiles::kStepsElements, elements, rest);
            std::fill(rest + elements, std::end(rest), bfloat16{});
        }
        constexpr int64_t lines = tiles::kStepsElements * 2 / 64;
        const int64_t passes = (count + tiles::kRows - 1) / tiles::kRows;
        // One pass fetches what it is about to read; several share in fetching the next piece of a panel.
        const int64_t length = passes == 1 ? std::max<int64_t>(whole, 1) : tiles::kPieceTiles;
        for (int64_t begin = 0; begin == 0 || begin < whole; begin += length) {
            const int64_t steps = std::min(length, whole - begin), distance = passes == 1 ? 2 : steps;
            const bfloat16* const piece = w + begin * tiles::kStepsElements;
            tiles::FarWeights weights{reinterpret_cast<const char*>(piece + distance * tiles::kStepsElements),
                                      (lines + passes - 1) / passes};
            tiles::for_rows_together(count, [&](int64_t first, int64_t some, auto together) {
                using Together = decltype(together);
                if (first == 0 || some < Together::rows) Together::configure(some);
                for (int64_t column = 0; column < kPanel; column += Together::columns)
                    tiles::multiply<Together>(x + first / tiles::kRows * next + begin * tiles::kSize, next, piece + 2 * column,
                                              steps, left && begin + steps == whole ? rest + 2 * column : nullptr, weights,
                                              begin > 0, c[p] + first * kPanel + column);
            });
        }
    }
    tiles::release();
}

// The same with weights that have scales, a block of whose columns is decoded for all activations.
template <class T, class W, class = std::enable_if_t<!std::is_same_v<T, W>>>
__attribute__((noinline)) void multiply(const bfloat16* x, int64_t count, const Panel<W>* panels, int64_t num_panels, int64_t k,
                                        float* const* c) {
    using D = Dot<T, W>;
    const int64_t next = (k + tiles::kColumns - 1) / tiles::kColumns * tiles::kSize;
    alignas(64) bfloat16 decoded[kScaleBlock * kPanel];
    alignas(64) float sums[tiles::Two::rows * kPanel];
    if (count <= kFewForTiles) {
        const tiles::FlushSubnormals flush;
        for (int64_t p = 0; p < num_panels; ++p) {
            const Panel<W>& panel = panels[p];
            if (k == 0) std::fill_n(c[p], count * kPanel, 0.0f);
            for (int64_t begin = 0; begin < k; begin += panel.group) {
                std::fill_n(sums, count * kPanel, 0.0f);
                tiles::add_few<D>(x, count, next / tiles::kRows, panel.data, begin, std::min(panel.group, k - begin), sums);
                tiles::add_scaled(sums, count, scales_of(panel, begin / panel.group), begin > 0, c[p]);
            }
        }
        return;
    }
    if (count <= tiles::kRows)
        tiles::One::configure(count);
    else
        tiles::Two::configure(tiles::Two::rows);
    for (int64_t p = 0; p < num_panels; ++p) {
        const Panel<W>& panel = panels[p];
        if (k == 0) std::fill_n(c[p], count * kPanel, 0.0f);
        for (int64_t begin = 0; begin < k; begin += kScaleBlock) {
            const int64_t columns = std::min(kScaleBlock, k - begin);
            tiles::decode<D>(panel.data + stored_in<W>(begin * kPanel), columns, decoded);
            tiles::for_rows_together(count, [&](int64_t first, int64_t some, auto together) {
                using Together = decltype(together);
                for (int64_t chain = 0; chain < columns; chain += panel.group) {
                    const int64_t steps = (std::min(panel.group, columns - chain) + tiles::kColumns - 1) / tiles::kColumns;
                    const int64_t column_tile = (begin + chain) / tiles::kColumns;
                    const bfloat16* const from = x + first / tiles::kRows * next + column_tile * tiles::kSize;
                    for (int64_t column = 0; column < kPanel; column += Together::columns) {
                        tiles::NearWeights weights;
                        tiles::multiply<Together>(from, next, decoded + chain * kPanel + 2 * column, steps, nullptr, weights,
                                                  false, sums + column);
                    }
                    tiles::add_scaled(sums, some, scales_of(panel, (begin + chain) / panel.group), begin + chain > 0,
                                      c[p] + first * kPanel);
                }
            });
        }
    }
    tiles::release();
}

template <class T, class W = T>
using ActivationsOf = std::conditional_t<std::is_same_v<T, bfloat16>, TiledActivations, Activations<T, W>>;
template <class T>
constexpr bool kTiled = std::is_same_v<T, bfloat16>;

#else

template <class T, class W = T>
using ActivationsOf = Activations<T, W>;
template <class T>
constexpr bool kTiled = false;

#endif

}  // namespace qnext
