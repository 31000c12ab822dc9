// Winograd's convolution, transposed convolution and instance norm for prediction on a CPU, in single precision.
//
// Block by block: six rows of a few tiles become points, meet the weights and become voxels again before they leave the second-level
// cache, which is what torch's operations, one whole array at a time, cannot do. Images are (sample, z, y, x, channel), channels
// innermost. Compiled and checked by native.py.

#include "native_winograd.h"

extern "C" {

int64_t lanes() { return LANES; }

// (in, out) -> (panels of out, in filled up, PANEL). Zeros where channels are filled up must be there.
int pack(const float* from, float* to, int64_t channels_in, int64_t channels_out) {
    const int64_t in_step = up_to(channels_in, LANES);
    for (int64_t i = 0; i < channels_in; i++, from += channels_out)
        for (int64_t o = 0; o < channels_out; o += PANEL)
            memcpy(to + o * in_step + i * PANEL, from + o, static_cast<size_t>(std::min<int64_t>(PANEL, channels_out - o)) * sizeof(float));
    return 0;
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

// Transposed convolution whose stride is its kernel: every voxel becomes a box. weights: `pack` of (in, box z, y, x, out).
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
        const int failed = in_parallel(samples * blocks, threads, [&] {
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
        if (failed) return failed;
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
