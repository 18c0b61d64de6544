// y = x w^T for few and for many rows, weights in float32, bfloat16, int8 or int4.
//
// Every y[r][j] is bit for bit a function of x[r] and w[j] alone: the same with one row as with 512, on any number of
// threads. So the sum over k has one order, whatever the tile: WIDTH lanes side by side (or, quantised, group after
// group of 32), added up in one way at the end.
#pragma once
#include <cstdint>

#include "team.h"

namespace mimoflash {

enum Kind { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

constexpr int GROUP = 32;  // inputs that share a scale
constexpr int PANEL = 16;  // outputs stored interleaved

inline int groups(int k) { return (k + GROUP - 1) / GROUP; }

// n outputs of k inputs. F32, BF16: row-major (n, k), PyTorch's own memory. INT8, INT4: as kernels/quantize.py packs
// them, in G = groups(k) and panels of 16 outputs, the last ones filled up (activations are 0 where there is no input):
//   INT8 data (panels, G, 8, 16, 4) int8: 4 neighbouring inputs of 16 outputs to a line of 64 bytes
//   INT4 data (panels, G, 4, 16, 4) uint8: the same lines, an even one in the low and the next in the high four bits
//   scales, mins (panels, G, 16) bfloat16: w = scale * data (+ min, INT4)
struct Matrix {
    int32_t kind, n, k;
    const void* data;
    const void* scales;
    const void* mins;
};

// x (rows, k) with `stride` floats from row to row. For INT8 and INT4 also, filled by quantise(), x = scale * q:
struct Activations {
    const float* x;
    int64_t stride;
    int rows, k;
    int8_t* q;       // (rows, 32 G)
    float* scale;    // (rows, G)
    int32_t* sum;    // (rows, G) of q
};

// y[out_rows[i]] (= or +=) x[in_rows[i]] . w^T for i < rows; without a list of rows it is 0, 1, 2, ...
struct LinearJob {
    const Matrix* w;
    const Activations* x;
    const int32_t* in_rows;
    const int32_t* out_rows;
    int rows;
    float* y;
    int64_t y_stride;
    bool add;
};

// Rows dealt over the team; the caller puts a barrier after it.
void quantise(Team& team, Activations& x);

// All jobs' blocks dealt over the team. Their inputs are ready, and nothing else has been dealt since the last barrier;
// the caller puts a barrier after it.
void linear(Team& team, const LinearJob* jobs, int count);

}  // namespace mimoflash
