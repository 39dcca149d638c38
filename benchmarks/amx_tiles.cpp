// Loads and products of tiles in the first cache, with four to eight tiles in use; amx_tiles.py compiles and calls it.
#include <chrono>

#include "tiles.h"

#if !defined(QNEXT_TILES)
#error "needs AMX"
#endif

using namespace qnext::tiles;

namespace {

alignas(64) char data[4 * kRows * 64];

template <int Tile, int Place>
QNEXT_INLINE inline void load_place() {
    load<Tile>(data + Place * kRows * 64, 64);
}

// What multiplies two tiles of rows (places 0 and 1) with two of columns (2 and 3), or as many as there are sums for.
template <int Used>
QNEXT_INLINE inline void multiply_all() {
    load_place<4, 0>();
    load_place<6, 2>();
    multiply<0, 4, 6>();
    if constexpr (Used == 8) {
        load_place<7, 3>();
        multiply<1, 4, 7>();
        load_place<5, 1>();
        multiply<2, 5, 6>();
        multiply<3, 5, 7>();
    } else if constexpr (Used == 7) {
        load_place<5, 1>();
        multiply<2, 5, 6>();
        load_place<6, 3>();
        multiply<1, 4, 6>();
        multiply<3, 5, 6>();
    } else if constexpr (Used == 6) {
        load_place<4, 1>();
        multiply<2, 4, 6>();
        load_place<6, 3>();
        multiply<3, 4, 6>();
        load_place<4, 0>();
        multiply<1, 4, 6>();
    } else {
        load_place<6, 3>();
        multiply<1, 4, 6>();
        if constexpr (Used == 5) {
            load_place<6, 1>();
            multiply<2, 4, 6>();
        }
    }
}

// Seconds of a product.
template <int Used>
double time(int rounds) {
    constexpr int products = Used > 5 ? 4 : Used - 2;
    configure({kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows});
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) multiply_all<Used>();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    release();
    return seconds.count() / rounds / products;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) double seconds_of_product(int used, int rounds) {
    switch (used) {
        case 4: return time<4>(rounds);
        case 5: return time<5>(rounds);
        case 6: return time<6>(rounds);
        case 7: return time<7>(rounds);
        default: return time<8>(rounds);
    }
}
