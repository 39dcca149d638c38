// AMX: eight registers of 16 rows of 64 bytes each, and products of bfloat16 between them.
//
// A product adds 32 columns to each of its elements at once: a chain of fused multiply-adds over the even ones and one over the
// odd ones, each from zero; their sum is added to what the element was. Subnormal numbers count as zero. An element does not
// depend on the other rows. With QNEXT_EMULATE_TILES all this is done by AVX-512, slowly and with the same bits: for tests on
// processors without AMX.
//
// A core whose other thread is awake has only some ten registers for the tiles of each of them, one of which is new with every
// load and product. So with all eight in use operations wait for each other; with six they take half as long. One that is not
// written, or zero, is none. Such a core waits longer for the second cache, too.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__) || defined(QNEXT_EMULATE_TILES)

#define QNEXT_TILES

namespace qnext::tiles {

constexpr int64_t kRows = 16;
constexpr int64_t kColumns = 32;               // of bfloat16
constexpr int64_t kSize = kRows * kColumns;    // of bfloat16
constexpr int64_t kNumTiles = 8;

// Subnormal numbers, read or written, are zero as long as one lives, as they are in products of tiles. (They take a
// processor long, e^−∞ among them.)
class FlushSubnormals {
  public:
    FlushSubnormals() : mode(_mm_getcsr()) { _mm_setcsr(mode | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(mode); }

  private:
    const unsigned mode;
};

#if defined(QNEXT_EMULATE_TILES)

struct State {
    alignas(64) uint32_t tiles[kNumTiles][kRows][16];
    uint8_t rows[kNumTiles];
};
inline thread_local State state;

inline void configure(const uint8_t (&rows)[kNumTiles]) {
    std::memcpy(state.rows, rows, sizeof rows);
    std::memset(state.tiles, 0, sizeof state.tiles);
}

inline void release() {}

template <int Tile>
void zero() {
    std::memset(state.tiles[Tile], 0, sizeof state.tiles[Tile]);
}

template <int Tile>
void load(const void* from, int64_t stride) {
    zero<Tile>();
    for (int r = 0; r < state.rows[Tile]; ++r)
        std::memcpy(state.tiles[Tile][r], static_cast<const char*>(from) + r * stride, 64);
}

template <int Tile>
void store(void* to, int64_t stride) {
    for (int r = 0; r < state.rows[Tile]; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, state.tiles[Tile][r], 64);
}

// C += A · B, whose rows hold pairs of columns.
template <int C, int A, int B>
void multiply() {
    const FlushSubnormals flush;
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    for (int m = 0; m < state.rows[C]; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < state.rows[B]; ++k) {
            const __m512i a = _mm512_set1_epi32(int(state.tiles[A][m][k])), b = _mm512_load_si512(state.tiles[B][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                                  _mm512_castsi512_ps(_mm512_and_si512(b, high)), odd);
        }
        float* to = reinterpret_cast<float*>(state.tiles[C][m]);
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
    }
}

#else

// As the processor reads it.
struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

// How many rows each tile has; all are zero then.
inline void configure(const uint8_t (&rows)[kNumTiles]) {
    Configuration configuration;
    for (int i = 0; i < kNumTiles; ++i) {
        configuration.row_bytes[i] = rows[i] ? 64 : 0;
        configuration.rows[i] = rows[i];
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
}

inline void release() { asm volatile("tilerelease" ::); }

// The compiler's own functions take the numbers of tiles as text, which a template's are not.
template <int Tile>
QNEXT_INLINE inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

template <int Tile>
QNEXT_INLINE inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
QNEXT_INLINE inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

// C += A · B, whose rows hold pairs of columns.
template <int C, int A, int B>
QNEXT_INLINE inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// What a tile is about to be loaded from, into the first cache.
QNEXT_INLINE inline void fetch(const void* from, int64_t stride) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) _mm_prefetch(static_cast<const char*>(from) + r * stride, _MM_HINT_T0);
}

// The first four, where sums are kept.
QNEXT_INLINE inline void zero_sums() {
    zero<0>();
    zero<1>();
    zero<2>();
    zero<3>();
}

}  // namespace qnext::tiles

#endif
