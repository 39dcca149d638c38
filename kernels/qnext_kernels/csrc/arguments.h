// What Python passes: pointers with the dtype that they point to, and strides in elements.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vec.h"

namespace qnext {

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat8 = 2, kInt4 = 3, kInt8 = 4 };  // behind bfloat16: of weights

// A float tensor of either dtype that is read element by element.
struct Floats {
    const void* data;
    int64_t dtype;
    float operator[](int64_t i) const {
        return dtype == kFloat32 ? static_cast<const float*>(data)[i] : to_float(static_cast<const bfloat16*>(data)[i]);
    }
};

// int32 or int64 indices; without data, `missing` everywhere.
struct Indices {
    const void* data;
    int64_t is_int64;
    int64_t at(int64_t i, int64_t missing) const {
        if (!data) return missing;
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
    int64_t operator[](int64_t i) const { return at(i, 0); }
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Memory of one thread, aligned to a cache line.
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

template <class T>
Scratch<T> scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return Scratch<T>(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

// Whether so many multiplications or elements are worth waking threads for: below, that takes longer than the work.
inline bool worth_threads(int64_t multiplications) { return multiplications > 1 << 18; }

// Whether tasks of one size leave threads without work for a fifth of the time at most.
inline bool keep_busy(int64_t tasks, int64_t threads) {
    return 5 * tasks >= 4 * ((tasks + threads - 1) / threads) * threads;
}

// Calls f with a value of the C++ type of a dtype.
template <class F>
void with_type(int64_t dtype, F f) {
    if (dtype == kFloat32)
        f(float());
    else
        f(bfloat16());
}

}  // namespace qnext
