// Winograd's convolutions in the plane and, without strides, along z as well. The same algebra and points as winograd.py, which explains them.

#pragma once

#include "native_common.h"

namespace {

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
