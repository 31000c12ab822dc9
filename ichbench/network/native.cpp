// Winograd's F(4, 3) convolution, transposed convolution and instance norm for prediction on a CPU, in single precision.
//
// The same algebra and points as winograd.py, which explains them, but block by block: six rows of a few tiles become points, meet the
// weights and become voxels again before they leave the second-level cache, which is what torch's operations, one whole array at a
// time, cannot do. Images are (sample, z, y, x, channel), channels innermost. Compiled and checked by native.py.

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

constexpr float A = 0.5f, B = 2.0f, ROOT_A = 0.70710678118654752440f, ROOT_B = 1.41421356237309504880f;
// points of three taps, and of two; the last is infinity
constexpr double THREE_TAPS[] = {0, ROOT_A, -ROOT_A, ROOT_B, -ROOT_B}, TWO_TAPS[] = {ROOT_A, -ROOT_A, ROOT_B, -ROOT_B};

// the value of a filter at a point: its powers over the product of the distances to the other points
template <int N>
inline vec at_point(const vec* taps, int n_taps, const double (&points)[N], int point) {
    if (point == N) return taps[n_taps - 1];
    double apart = 1, power = 1;
    for (int other = 0; other < N; other++)
        if (other != point) apart *= points[point] - points[other];
    vec sum = {};
    for (int tap = 0; tap < n_taps; tap++, power *= points[point]) sum += taps[tap] * static_cast<float>(power / apart);
    return sum;
}

// F(4, 3): four neighbouring outputs of a filter with three taps, from six inputs by six products
struct Plain {
    static constexpr int INPUTS = 6, STEP = 4, POINTS = 6;
    static int value_of(int point) { return point; }
    static vec value(const vec taps[3], int value) { return at_point(taps, 3, THREE_TAPS, value); }

    static inline __attribute__((always_inline)) void to_points(const vec d[INPUTS], vec p[POINTS]) {
        vec even = d[4] - B * d[2], odd = d[3] - B * d[1];
        p[1] = even + ROOT_A * odd;
        p[2] = even - ROOT_A * odd;
        p[5] = (d[5] - B * d[3]) - A * odd;
        p[0] = even - A * (d[2] - B * d[0]);
        even = d[4] - A * d[2];
        odd = d[3] - A * d[1];
        p[3] = even + ROOT_B * odd;
        p[4] = even - ROOT_B * odd;
    }

    static inline __attribute__((always_inline)) void to_voxels(const vec m[POINTS], vec y[OUT]) {
        vec near = m[1] + m[2], far = m[3] + m[4];
        y[0] = m[0] + near + far;
        y[2] = A * near + B * far;
        near = ROOT_A * (m[1] - m[2]);
        far = ROOT_B * (m[3] - m[4]);
        y[1] = near + far;
        y[3] = m[5] + A * near + B * far;
    }
};

// Every second output: the middle tap meets four inputs, one each; the outer two are a filter of two taps on the five inputs between
// them, by F(4, 2).
struct Strided {
    static constexpr int INPUTS = 9, STEP = 8, POINTS = 9;
    static int value_of(int point) { return std::max(0, point - 3); }
    static vec value(const vec taps[3], int value) {
        const vec outer[2] = {taps[0], taps[2]};
        return value == 0 ? taps[1] : at_point(outer, 2, TWO_TAPS, value - 1);
    }

    static inline __attribute__((always_inline)) void to_points(const vec d[INPUTS], vec p[POINTS]) {
        for (int k = 0; k < OUT; k++) p[k] = d[2 * k + 1];
        vec odd = d[6] - B * d[2], even = ROOT_A * (d[4] - B * d[0]);
        p[4] = odd + even;
        p[5] = odd - even;
        odd = d[6] - A * d[2];
        even = ROOT_B * (d[4] - A * d[0]);
        p[6] = odd + even;
        p[7] = odd - even;
        p[8] = d[8] - (A + B) * d[4] + d[0];
    }

    static inline __attribute__((always_inline)) void to_voxels(const vec m[POINTS], vec y[OUT]) {
        vec near = m[4] + m[5], far = m[6] + m[7];
        y[0] = m[0] + near + far;
        y[2] = m[2] + A * near + B * far;
        near = ROOT_A * (m[4] - m[5]);
        far = ROOT_B * (m[6] - m[7]);
        y[1] = m[1] + near + far;
        y[3] = m[3] + m[8] + A * near + B * far;
    }
};

// a filter (3 or 1, 3, 3) at all points (x, y, z), `step` apart
template <class Way>
inline void at_points(const vec* w, int points_z, float* to, int64_t step) {
    for (int p = 0; p < points_z; p++) {
        vec plane[9], half[VALUES][3];
        for (int k = 0; k < 9; k++) {
            const vec line[3] = {w[k], points_z > 1 ? w[9 + k] : vec{}, points_z > 1 ? w[18 + k] : vec{}};
            plane[k] = points_z > 1 ? Plain::value(line, p) : w[k];
        }
        for (int x = 0; x < 3; x++) {
            const vec line[3] = {plane[x], plane[3 + x], plane[6 + x]};
            for (int y = 0; y < VALUES; y++) half[y][x] = Way::value(line, y);
        }
        for (int x = 0; x < VALUES; x++)
            for (int y = 0; y < VALUES; y++) store(to + ((x * VALUES + y) * points_z + p) * step, Way::value(half[y], x));
    }
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

struct Image {
    const float* data;
    int64_t channels;
};

struct Convolution {
    Image images[2];  // their channels follow each other
    const float* weights;
    float* out;
    int64_t samples, depth, height, width, channels_out;  // of `out`
    int64_t depth_in, height_in, width_in, stride_z;
    bool along_z;    // whether z has points as well
    int64_t taps_z;  // otherwise 1 or 3: as many slices stand beside each other as channels

    int64_t channels_in, in_step, out_step;        // channels, filled up to whole vectors and panels
    int64_t tiles_x, tiles_y, tiles_z, points_z;   // without `along_z` a slice is a tile along z, and its own point
    int64_t rows, bands_y, bands, bands_at_once;   // a band is `rows` rows of tiles of one tile along z of one sample
    int64_t line, slab, answer;                    // elements of a line of a slab, of a slab (one point along z), of its answer

    template <class Way>
    void plan(int64_t threads) {
        channels_in = taps_z * (images[0].channels + images[1].channels);
        in_step = up_to(channels_in, LANES);
        out_step = up_to(channels_out, PANEL);
        tiles_x = (width + OUT - 1) / OUT;
        tiles_y = (height + OUT - 1) / OUT;
        tiles_z = along_z ? (depth + OUT - 1) / OUT : depth;
        points_z = along_z ? Plain::POINTS : 1;
        // enough tiles for a group, and enough jobs for all threads
        const int64_t wanted = along_z ? 2 * GROUP : GROUP;
        int64_t parts = std::max<int64_t>(1, tiles_y * tiles_x / wanted);
        while (parts < tiles_y && samples * tiles_z * parts < 2 * threads) parts *= 2;
        rows = (tiles_y + std::min(parts, tiles_y) - 1) / std::min(parts, tiles_y);
        bands_y = (tiles_y + rows - 1) / rows;
        bands = samples * tiles_z * bands_y;
        bands_at_once = 1;
        while (2 * bands_at_once * rows * tiles_x <= wanted && bands >= 2 * bands_at_once * threads) bands_at_once *= 2;
        line = (Way::STEP * tiles_x + Way::INPUTS - Way::STEP) * in_step;
        slab = (Way::STEP * rows + Way::INPUTS - Way::STEP) * line;
        answer = OUT * rows * OUT * tiles_x * out_step;
    }
};

template <class Way>
struct Worker {
    static constexpr int POINTS = Way::POINTS;
    const Convolution& c;
    const int64_t in_point, out_point;
    Buffer slabs, answers, in, out;

    explicit Worker(const Convolution& convolution)
        : c(convolution),
          in_point(stride_of(GROUP * c.in_step)),
          out_point(stride_of(GROUP * c.out_step)),
          slabs(c.bands_at_once * c.points_z * c.slab),
          answers(c.along_z ? c.bands_at_once * c.points_z * c.answer : 0),
          in(POINTS * POINTS * in_point),
          out(POINTS * POINTS * out_point) {}

    void operator()(int64_t job) {
        const int64_t first = job * c.bands_at_once, count = std::min(c.bands_at_once, c.bands - first);
        for (int64_t band = 0; band < count; band++) fill(first + band, slabs.data + band * c.points_z * c.slab);
        const int64_t tiles = count * c.rows * c.tiles_x;
        for (int64_t p = 0; p < c.points_z; p++)
            for (int64_t tile = 0; tile < tiles; tile += GROUP) {
                const int64_t n = std::min(GROUP, tiles - tile);
                to_points(p, tile, n);
                for (int q = 0; q < POINTS * POINTS; q++) {
                    const int64_t value = Way::value_of(q / POINTS) * VALUES + Way::value_of(q % POINTS);
                    const float* panels = c.weights + (value * c.points_z + p) * c.in_step * c.out_step;
                    product(in.data + q * in_point, c.in_step, panels, c.in_step, c.channels_in, out.data + q * out_point, c.out_step, n, c.out_step);
                }
                to_voxels(first, p, tile, n);
            }
        if (c.along_z)
            for (int64_t band = 0; band < count; band++) empty(first + band, answers.data + band * c.points_z * c.answer);
    }

    // lines of one band with zeros about the image, at the points along z
    void fill(int64_t band, float* to) const {
        const int64_t sample = band / c.bands_y / c.tiles_z, z = band / c.bands_y % c.tiles_z, y0 = band % c.bands_y * c.rows * Way::STEP - 1;
        const int64_t lines = c.slab / c.line;
        memset(to, 0, static_cast<size_t>(c.points_z * c.slab) * sizeof(float));
        to += c.in_step;
        for (int64_t tap = 0; tap < c.taps_z; tap++)
            for (const Image& image : c.images) {
                const int64_t row = c.width_in * image.channels, slice = z * c.stride_z + tap - c.taps_z / 2;
                const float* from = image.data + (sample * c.depth_in * c.height_in + y0) * row;
                for (int64_t r = std::max<int64_t>(0, -y0); r < std::min(lines, c.height_in - y0); r++) {
                    if (c.along_z) fill_points(from + r * row, image.channels, z * OUT - 1, to + r * c.line);
                    else if (slice >= 0 && slice < c.depth_in) fill_line(from + (slice * c.height_in + r) * row, image.channels, to + r * c.line);
                }
                to += image.channels;
            }
    }

    void fill_line(const float* from, int64_t channels, float* to) const {
        const size_t bytes = static_cast<size_t>(channels) * sizeof(float);
        if (channels == c.in_step) memcpy(to, from, bytes * static_cast<size_t>(c.width_in));
        else for (int64_t x = 0; x < c.width_in; x++) memcpy(to + x * c.in_step, from + x * channels, bytes);
    }

    // `from`: the line in the first slice of the sample
    void fill_points(const float* from, int64_t channels, int64_t z0, float* to) const {
        const int64_t slice = c.height_in * c.width_in * channels;
        for (int64_t x = 0; x < c.width_in; x++)
            for (int64_t channel = 0; channel < channels; channel += LANES) {
                vec d[Plain::INPUTS], p[Plain::POINTS];
                const float* at = from + x * channels + channel;
                for (int64_t k = 0; k < Plain::INPUTS; k++)
                    d[k] = z0 + k >= 0 && z0 + k < c.depth_in ? load_some(at + (z0 + k) * slice, channels - channel) : vec{};
                Plain::to_points(d, p);
                for (int k = 0; k < Plain::POINTS; k++) store_some(to + k * c.slab + x * c.in_step + channel, p[k], channels - channel);
            }
    }

    // where a tile lies, counted over the bands of a job
    struct Place {
        int64_t band, y, x;
    };
    Place place(int64_t tile) const { return {tile / (c.rows * c.tiles_x), tile / c.tiles_x % c.rows, tile % c.tiles_x}; }

    // inputs of `count` tiles from `tile` on, at one point along z -> their values at the points of the plane
    void to_points(int64_t p, int64_t tile, int64_t count) {
        for (int64_t t = 0; t < count; t++) {
            const Place at = place(tile + t);
            const float* corner = slabs.data + (at.band * c.points_z + p) * c.slab + at.y * Way::STEP * c.line + at.x * Way::STEP * c.in_step;
            for (int64_t channel = 0; channel < c.in_step; channel += LANES) {
                vec half[POINTS][Way::INPUTS], d[Way::INPUTS], q[POINTS];
                for (int u = 0; u < Way::INPUTS; u++) {
                    for (int k = 0; k < Way::INPUTS; k++) d[k] = load(corner + k * c.line + u * c.in_step + channel);
                    Way::to_points(d, q);
                    for (int k = 0; k < POINTS; k++) half[k][u] = q[k];
                }
                float* to = in.data + t * c.in_step + channel;
                for (int k = 0; k < POINTS; k++) {
                    Way::to_points(half[k], q);
                    for (int u = 0; u < POINTS; u++) store(to + (u * POINTS + k) * in_point, q[u]);
                }
            }
        }
    }

    // and back: sums over channels at the points -> voxels, or what becomes voxels along z
    void to_voxels(int64_t first, int64_t p, int64_t tile, int64_t count) {
        for (int64_t t = 0; t < count; t++) {
            const Place at = place(tile + t);
            for (int64_t channel = 0; channel < c.channels_out; channel += LANES) {
                const float* from = out.data + t * c.out_step + channel;
                vec half[OUT][POINTS], d[POINTS], v[OUT];
                for (int u = 0; u < POINTS; u++) {
                    for (int k = 0; k < POINTS; k++) d[k] = load(from + (u * POINTS + k) * out_point);
                    Way::to_voxels(d, v);
                    for (int k = 0; k < OUT; k++) half[k][u] = v[k];
                }
                for (int k = 0; k < OUT; k++) {
                    Way::to_voxels(half[k], v);
                    if (c.along_z) {
                        const int64_t voxel = (at.y * OUT + k) * OUT * c.tiles_x + at.x * OUT;
                        float* to = answers.data + (at.band * c.points_z + p) * c.answer + voxel * c.out_step + channel;
                        for (int u = 0; u < OUT; u++) store(to + u * c.out_step, v[u]);
                        continue;
                    }
                    const int64_t slice = (first + at.band) / c.bands_y, row = ((first + at.band) % c.bands_y * c.rows + at.y) * OUT + k;
                    if (row >= c.height) break;
                    float* to = c.out + ((slice * c.height + row) * c.width + at.x * OUT) * c.channels_out + channel;
                    const int64_t columns = std::min<int64_t>(OUT, c.width - at.x * OUT);
                    for (int64_t u = 0; u < columns; u++) store_some(to + u * c.channels_out, v[u], c.channels_out - channel);
                }
            }
        }
    }

    // answers at the points along z -> slices
    void empty(int64_t band, const float* from) const {
        const int64_t sample = band / c.bands_y / c.tiles_z, z = band / c.bands_y % c.tiles_z * OUT, y0 = band % c.bands_y * c.rows * OUT;
        const int64_t slice = c.height * c.width * c.channels_out, slices = std::min<int64_t>(OUT, c.depth - z);
        for (int64_t r = 0; r < std::min(OUT * c.rows, c.height - y0); r++)
            for (int64_t x = 0; x < c.width; x++)
                for (int64_t channel = 0; channel < c.channels_out; channel += LANES) {
                    vec m[Plain::POINTS], v[OUT];
                    for (int k = 0; k < Plain::POINTS; k++) m[k] = load(from + k * c.answer + (r * OUT * c.tiles_x + x) * c.out_step + channel);
                    Plain::to_voxels(m, v);
                    float* to = c.out + (sample * c.depth + z) * slice + ((y0 + r) * c.width + x) * c.channels_out + channel;
                    for (int64_t k = 0; k < slices; k++) store_some(to + k * slice, v[k], c.channels_out - channel);
                }
    }
};

template <class Way>
int convolved(Convolution& c, int64_t threads) {
    c.plan<Way>(threads);
    return in_parallel((c.bands + c.bands_at_once - 1) / c.bands_at_once, threads, [&] { return Worker<Way>(c); });
}

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }

// (matrices, in, out) -> (matrices, panels of out, in filled up, PANEL); `to` is all zeros
void pack(const float* from, float* to, int64_t matrices, int64_t channels_in, int64_t channels_out) {
    const int64_t in_step = up_to(channels_in, LANES), out_step = up_to(channels_out, PANEL);
    for (int64_t m = 0; m < matrices; m++)
        for (int64_t i = 0; i < channels_in; i++, from += channels_out)
            for (int64_t o = 0; o < channels_out; o += PANEL)
                memcpy(to + m * in_step * out_step + o * in_step + i * PANEL, from + o, static_cast<size_t>(std::min<int64_t>(PANEL, channels_out - o)) * sizeof(float));
}

// Filters (3 or 1, 3, 3; in, out) as `winograd` takes them: at the points (x, y, and z if `along_z`), then as `pack` does; taps along z
// that are no points are channels. Zeros where channels are filled up must be there.
int point_weights(const float* filters, float* to, int64_t channels_in, int64_t channels_out, int64_t size_z, int64_t along_z, int64_t strided,
                  int64_t threads) {
    const int64_t taps = along_z ? 1 : size_z, points_z = along_z ? Plain::POINTS : 1, points = points_z * VALUES * VALUES;
    const int64_t in_step = up_to(taps * channels_in, LANES), out_step = up_to(channels_out, PANEL), of_point = stride_of(BLOCK_IN * PANEL);
    return in_parallel(out_step / PANEL, threads, [&] {
        return [&, block = std::make_shared<Buffer>(points * of_point)](int64_t panel) {
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t first = 0; first < channels_in; first += BLOCK_IN) {
                    const int64_t count = std::min(BLOCK_IN, channels_in - first);
                    for (int64_t in = 0; in < count; in++)
                        for (int64_t part = 0; part < PANEL; part += LANES) {
                            const int64_t channel = panel * PANEL + part, n = channels_out - channel;
                            const float* from = filters + (tap * 9 * channels_in + first + in) * channels_out + channel;
                            vec w[27];
                            for (int64_t k = 0; k < (along_z ? 27 : 9); k++) w[k] = n > 0 ? load_some(from + k * channels_in * channels_out, n) : vec{};
                            float* at = block->data + in * PANEL + part;
                            strided ? at_points<Strided>(w, 1, at, of_point) : at_points<Plain>(w, static_cast<int>(points_z), at, of_point);
                        }
                    for (int64_t point = 0; point < points; point++) {
                        float* at = to + point * in_step * out_step + panel * PANEL * in_step + (tap * channels_in + first) * PANEL;
                        memcpy(at, block->data + point * of_point, static_cast<size_t>(count * PANEL) * sizeof(float));
                    }
                }
        };
    });
}

// Filters (size_z, 3, 3) over the channels of two images of the same size (the second may have none); strides (stride_z, 1, 1) or, if
// `strided`, (stride_z, 2, 2). 0, or 1 where memory ran out.
int winograd(const float* first, int64_t channels_first, const float* second, int64_t channels_second, int64_t depth_in, int64_t height_in,
             int64_t width_in, const float* weights, float* out, int64_t samples, int64_t depth, int64_t height, int64_t width,
             int64_t channels_out, int64_t size_z, int64_t stride_z, int64_t along_z, int64_t strided, int64_t threads) {
    Convolution c;
    c.images[0] = {first, channels_first};
    c.images[1] = {second, channels_second};
    c.weights = weights, c.out = out, c.along_z = along_z != 0, c.taps_z = along_z ? 1 : size_z;
    c.depth_in = depth_in, c.height_in = height_in, c.width_in = width_in, c.stride_z = stride_z;
    c.samples = samples, c.depth = depth, c.height = height, c.width = width, c.channels_out = channels_out;
    return strided ? convolved<Strided>(c, threads) : convolved<Plain>(c, threads);
}

// Transposed convolution whose stride is its kernel: every voxel becomes a box. weights: `pack` of one matrix (in, box z, y, x, out).
int up(const float* in, const float* weights, const float* bias, float* out, int64_t slices, int64_t height, int64_t width,
       int64_t channels_in, int64_t channels_out, int64_t box_z, int64_t box_y, int64_t box_x, int64_t threads) {
    const int64_t in_step = up_to(channels_in, LANES), columns = box_z * box_y * box_x * channels_out, out_step = up_to(columns, PANEL);
    return in_parallel(slices * height, threads, [&] {
        return [&, answer = std::make_shared<Buffer>(width * out_step)](int64_t job) {
            product(in + job * width * channels_in, channels_in, weights, in_step, channels_in, answer->data, out_step, width, out_step);
            const int64_t slice = job / height, y = job % height;
            for (int64_t x = 0; x < width; x++)
                for (int64_t box = 0; box < box_z * box_y * box_x; box++) {
                    const int64_t bz = box / box_x / box_y, by = box / box_x % box_y, bx = box % box_x;
                    const float* from = answer->data + x * out_step + box * channels_out;
                    float* to = out + (((slice * box_z + bz) * height * box_y + y * box_y + by) * width * box_x + x * box_x + bx) * channels_out;
                    for (int64_t channel = 0; channel < channels_out; channel += LANES) {
                        const int64_t n = channels_out - channel;
                        store_some(to + channel, load_some(from + channel, n) + load_some(bias + channel, n), n);
                    }
                }
        };
    });
}

// (samples, voxels, channels) in place: (x - mean) / sqrt(variance + eps) * weight + bias, then times `slope` where it is negative.
// Means and variances of blocks are put together in double precision, always in the same order.
int norm_act(float* x, const float* weight, const float* bias, int64_t samples, int64_t voxels, int64_t channels, double eps, double leaky_slope,
             int64_t threads) {
    const float slope = static_cast<float>(leaky_slope);
    const int64_t step = up_to(channels, LANES), block = std::max<int64_t>(1, NORM_ELEMENTS / channels), blocks = (voxels + block - 1) / block;
    try {
        Buffer moments(samples * blocks * 2 * step), scales(samples * 2 * step);
        in_parallel(samples * blocks, threads, [&] {
            return [&](int64_t job) {
                const int64_t first = job % blocks * block, count = std::min(block, voxels - first);
                const float* from = x + (job / blocks * voxels + first) * channels;
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    const int64_t n = channels - channel;
                    // about the first voxel: what is constant has no variance
                    const vec start = load_some(from + channel, n);
                    vec sum = {}, squares = {};
                    for (int64_t v = 1; v < count; v++) sum += load_some(from + v * channels + channel, n) - start;
                    const vec mean = start + sum / static_cast<float>(count);
                    for (int64_t v = 0; v < count; v++) {
                        const vec d = load_some(from + v * channels + channel, n) - mean;
                        squares += d * d;
                    }
                    store(moments.data + job * 2 * step + channel, mean);
                    store(moments.data + (job * 2 + 1) * step + channel, squares);
                }
            };
        });
        std::vector<double> mean(channels), squares(channels);
        for (int64_t sample = 0; sample < samples; sample++) {
            std::fill(mean.begin(), mean.end(), 0);
            std::fill(squares.begin(), squares.end(), 0);
            for (int64_t b = 0; b < blocks; b++) {
                const double before = static_cast<double>(b * block), count = static_cast<double>(std::min(block, voxels - b * block));
                const double share = count / (before + count);
                const float* of_block = moments.data + (sample * blocks + b) * 2 * step;
                for (int64_t channel = 0; channel < channels; channel++) {
                    const double apart = of_block[channel] - mean[channel];
                    mean[channel] += apart * share;
                    squares[channel] += of_block[step + channel] + apart * apart * before * share;
                }
            }
            float* found = scales.data + sample * 2 * step;
            for (int64_t channel = 0; channel < channels; channel++) {
                found[channel] = static_cast<float>(mean[channel]);
                found[step + channel] = static_cast<float>(weight[channel] / std::sqrt(squares[channel] / static_cast<double>(voxels) + eps));
            }
        }
        return in_parallel(samples * blocks, threads, [&] {
            return [&](int64_t job) {
                const int64_t first = job % blocks * block, count = std::min(block, voxels - first);
                const float* means = scales.data + job / blocks * 2 * step;
                float* at = x + (job / blocks * voxels + first) * channels;
                for (int64_t channel = 0; channel < channels; channel += LANES) {
                    const int64_t n = channels - channel;
                    const vec mean = load(means + channel), scale = load(means + step + channel), shift = load_some(bias + channel, n);
                    for (int64_t v = 0; v < count; v++) {
                        // the mean is taken off alone: close to it the difference is exact
                        const vec y = (load_some(at + v * channels + channel, n) - mean) * scale + shift;
                        store_some(at + v * channels + channel, y > 0 ? y : y * slope, n);
                    }
                }
            };
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
