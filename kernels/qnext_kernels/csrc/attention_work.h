// How attention over a paged cache is shared out: tiles of queries, and partitions of their keys.
#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "decoder_layer.h"

namespace qnext {

constexpr int64_t kBlock = 48;
constexpr int64_t kPartition = 576, kBlocks = kPartition / kBlock;
constexpr int64_t kTileRows = 64;

struct Shape {
    // most_rows: queries of all heads of a group that meet a block together: the more, the more often what is fetched is used.
    Shape(const PagedAttention& p, int64_t most_rows)
        : group(p.heads / p.kv_heads), lanes((group + kRows - 1) / kRows * kRows),
          width((p.head_dim + kPair - 1) / kPair * kPair), tokens(tokens_of(p, group, most_rows)) {}
    // Eight tiles a thread are enough.
    static int64_t tokens_of(const PagedAttention& p, int64_t group, int64_t most_rows) {
        int64_t most = 1;  // of a sequence: memory for more would be cleared by the system in each call
        for (int64_t n = 0; n < p.sequences; ++n) most = std::max(most, p.query_start_loc[n + 1] - p.query_start_loc[n]);
        const int64_t share = p.query_start_loc[p.sequences] * p.kv_heads / (8 * omp_get_max_threads());
        return std::clamp<int64_t>(std::clamp(share, kTileRows / group, most_rows / group), 1, most);
    }
    int64_t group, lanes, width, tokens;  // query heads a key-value head, also in whole kRows; in whole pairs; tokens a tile
};

// Neighbouring query tokens of one sequence, and the query heads of one key-value head.
struct Tile {
    int64_t sequence, kv_head, token, tokens, keys;  // keys: of the last token
    int64_t parts() const { return (keys + kPartition - 1) / kPartition; }
};

// Partitions of the keys of a tile, from `first` to before `last`.
struct Parts {
    const Tile* tile;
    int64_t first, last;
    int64_t begin() const { return first * kBlocks; }
    int64_t end() const { return (std::min(last * kPartition, tile->keys) + kBlock - 1) / kBlock; }
};

}  // namespace qnext
