// A piece of a linear layer: what one thread works out at a time.
#pragma once
#include <algorithm>

#include "linear.h"
#include "vector.h"

namespace mimoflash {

constexpr int COLUMNS = 48;  // outputs a piece: a multiple of every tile's width and of PANEL
constexpr int ROWS = 128;    // rows a piece

struct Piece {
    const LinearJob& job;
    int column, columns, row, rows;

    int in(int i) const { return job.in_rows ? job.in_rows[row + i] : row + i; }
    int out(int i) const { return job.out_rows ? job.out_rows[row + i] : row + i; }
    const float* x(int i) const { return job.x->x + in(i) * job.x->stride; }
    float* y(int i) const { return job.y + out(i) * job.y_stride; }
    void put(int i, int j, float value) const {
        float* to = y(i) + j;
        *to = job.add ? *to + value : value;
    }
};

}  // namespace mimoflash
