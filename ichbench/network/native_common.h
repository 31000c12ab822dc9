// What the kernels share: vectors, memory, threads, matrix products.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>


namespace {


// floats of a vector; tests name widths that the processor lacks, which the compiler then puts together
#if defined(ICHBENCH_LANES)
constexpr int LANES = ICHBENCH_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// rows and columns of a matrix product that are summed in registers: with a row of weights and one input, 15 of 16
constexpr int PANEL = 2 * LANES, ROWS = 6;
// outputs of a tile along one axis, and the values of a filter that they need
constexpr int OUT = 4, VALUES = 6;
// tiles whose points are held together
constexpr int64_t GROUP = 24;
// channels whose filters go to the points together
constexpr int64_t BLOCK_IN = 16;
// elements of a norm's block: they stay in the first-level cache
constexpr int64_t NORM_ELEMENTS = 1 << 12;

typedef float vec __attribute__((vector_size(LANES * 4)));
// a vector in an array of floats
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vec load(const float* from) { return *reinterpret_cast<const loose*>(from); }
inline void store(float* to, vec value) { *reinterpret_cast<loose*>(to) = value; }

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// a cache line more, so that arrays whose size is a power of two do not all meet in the same lines of a cache
int64_t stride_of(int64_t n) { return n + 16; }

struct Buffer {
    float* data;
    explicit Buffer(int64_t elements) : data(nullptr) {
        void* found = nullptr;
        if (posix_memalign(&found, 64, static_cast<size_t>(std::max<int64_t>(elements, 16)) * sizeof(float)) != 0) throw std::bad_alloc();
        data = static_cast<float*>(found);
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// Every job 0 to `jobs` by `threads` threads, each with a worker of its own; 0, or 1 where memory ran out.
template <class Make>
int in_parallel(int64_t jobs, int64_t threads, Make make) {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto run = [&] {
        try {
            auto worker = make();
            for (int64_t job = next++; job < jobs && !failed; job = next++) worker(job);
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < std::min(threads, jobs); n++) others.emplace_back(run);
    } catch (...) {
        // no more threads to be had: those that run do all the jobs
    }
    run();
    for (auto& other : others) other.join();
    return failed;
}

// n rows of K inputs times one panel of weights (K, PANEL)
template <int N>
inline __attribute__((always_inline)) void rows_by_panel(const float* in, int64_t in_step, const float* panel, int64_t K, float* out, int64_t out_step) {
    vec sums[N][2] = {};
    for (int64_t k = 0; k < K; k++, panel += PANEL) {
        const vec left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const float value = in[n * in_step + k];
            sums[n][0] += value * left;
            sums[n][1] += value * right;
        }
    }
    for (int n = 0; n < N; n++) {
        store(out + n * out_step, sums[n][0]);
        store(out + n * out_step + LANES, sums[n][1]);
    }
}

// (rows, K) times panels (columns / PANEL, panel_rows, PANEL), of whose rows K count -> (rows, columns)
void product(const float* in, int64_t in_step, const float* panels, int64_t panel_rows, int64_t K, float* out, int64_t out_step, int64_t rows,
             int64_t columns) {
    for (int64_t column = 0; column < columns; column += PANEL, out += PANEL, panels += panel_rows * PANEL) {
        int64_t row = 0;
        for (; row + ROWS <= rows; row += ROWS) rows_by_panel<ROWS>(in + row * in_step, in_step, panels, K, out + row * out_step, out_step);
        const float* rest = in + row * in_step;
        float* to = out + row * out_step;
        switch (rows - row) {
            case 5: rows_by_panel<5>(rest, in_step, panels, K, to, out_step); break;
            case 4: rows_by_panel<4>(rest, in_step, panels, K, to, out_step); break;
            case 3: rows_by_panel<3>(rest, in_step, panels, K, to, out_step); break;
            case 2: rows_by_panel<2>(rest, in_step, panels, K, to, out_step); break;
            case 1: rows_by_panel<1>(rest, in_step, panels, K, to, out_step); break;
            default: break;
        }
    }
}

// up to LANES channels from an array whose last element is the last one that may be read
inline vec load_some(const float* from, int64_t n) {
    if (n >= LANES) return load(from);
    vec value = {};
    memcpy(&value, from, static_cast<size_t>(n) * sizeof(float));
    return value;
}

inline void store_some(float* to, vec value, int64_t n) {
    if (n >= LANES) store(to, value);
    else memcpy(to, &value, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace
