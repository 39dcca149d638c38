// Where the keys or values of a sequence lie in the pages of a cache.
#pragma once

#include <algorithm>

#include "decoder_layer.h"

namespace qnext {

enum class Kind { keys, values };

// Keys or values of one head that follow each other.
template <class T>
class Run {
  public:
    Run() = default;
    Run(const PagedAttention& p, Kind kind, int64_t sequence, int64_t head, int64_t first, int64_t count)
        : data(static_cast<const T*>(kind == Kind::keys ? p.keys : p.values) +
               head * (kind == Kind::keys ? p.key_head : p.value_head)),
          pages(p.block_table), page_stride(kind == Kind::keys ? p.key_block : p.value_block),
          slot_stride(kind == Kind::keys ? p.key_slot : p.value_slot), page_size(p.block_size),
          column(sequence * p.table_row + first / page_size), slots(page_size - first % page_size), left(count),
          at(page() + first % page_size * slot_stride) {}

    // Where the next `size` lie; behind the last, `nothing`.
    void next(int64_t size, const T** to, const T* nothing) {
        Run r = *this;  // in registers
        const T** const end = to + size;
        while (to < end && r.left) {
            if (!r.slots) {
                ++r.column;
                r.at = r.page();
                r.slots = page_size;
            }
            const int64_t count = std::min(std::min<int64_t>(end - to, r.slots), r.left);
            for (const T** const stop = to + count; to < stop; ++to, r.at += slot_stride) {
                asm("" : "+r"(r.at));  // not in vectors, which come after all operations before
                *to = r.at;
            }
            r.slots -= count;
            r.left -= count;
        }
        std::fill(to, end, nothing);
        *this = r;
    }

  private:
    const T* page() const { return data + pages[column] * page_stride; }

    const T* data;
    Indices pages;
    int64_t page_stride, slot_stride, page_size, column;
    int64_t slots, left = 0;  // in the page; in all
    const T* at;              // the next
};

}  // namespace qnext
