// Offset pooling (OverFeat): max pooling of stride 1. real is float or double, index_t u8, u16 or unsigned, as size * size - 1 needs;
// SIZE is the tile's size where the compiler shall know it, 0 where the argument `tile` says it. Python side: tinydet/ops/offset_pool.py
// variants: real=float, index_t=u8, SIZE=3; real=double, index_t=u8, SIZE=3; real=float, index_t=u8, SIZE=0; real=double, index_t=u8, SIZE=0; real=float, index_t=u16, SIZE=0; real=double, index_t=u16, SIZE=0; real=float, index_t=unsigned, SIZE=0; real=double, index_t=unsigned, SIZE=0
//
// offset_pool_forward   s[n,i,j,c] = max_{u,v < size} x[n, i + u, j + v, c]; argmax = u * size + v.  First pixel in row order wins a
//   tie, the first NaN wins and stays. A thread makes ROWS outputs, one below the other: the maximum along each input row that it
//   reads serves all of them (a tie in a row goes to the left, one between rows to the upper: row order).
// offset_pool_backward  dx[n,row,col,c] = sum of ds over the tiles whose argmax is this pixel, in row order; ROWS pixels a thread, each
//   ds and argmax that it reads serves all of them: no atomics.
// Geometry: threads along j * C + c, along which x and s both are contiguous: no division by C; block at most 256, grid N * strips of
// ROWS rows * blocks along a row. No shared memory.
//
// By arithmetic, nothing of it measured: for float 9 bytes an output (x 4, s 4, argmax 1), so 3 TB/s are 330 G outputs a second, 1.5 in a
// clock of each of the 132 SMs of an H100, which issues 85 instructions in that time. Size 3, ROWS = 8: (ROWS + 2) * 3 / ROWS = 3.75 loads, which L1 answers, and 60
// machine instructions an output; backward twice the loads and 93 instructions. Each row leaves L2 1.25 times. Other sizes: ROWS = 4, as
// every row that is read is tried on every output of the thread.

#define ROWS (SIZE ? 8 : 4)                                         // as in tinydet/ops/offset_pool.py

extern "C" __global__
void offset_pool_forward(const real* x, real* s, index_t* argmax, int H, int W, int C, int tile)
{
    const int size = SIZE ? SIZE : tile;
    int h = H - size + 1, line = (W - size + 1) * C, strips = (h + ROWS - 1) / ROWS, blocks = (line + blockDim.x - 1) / blockDim.x;
    int t = blockIdx.x % blocks * blockDim.x + threadIdx.x, strip = blockIdx.x / blocks;
    int n = strip / strips, i = strip % strips * ROWS;
    if (t >= line) return;
    real best[ROWS] = {};
    int at[ROWS] = {};
    #pragma unroll
    for (int r = 0; r < size + ROWS - 1; r++) {
        if (i + r >= H) break;
        const real* row = x + (n * H + i + r) * W * C + t;
        real most = row[0];                                         // of this row of the tiles
        int column = 0;
        #pragma unroll
        for (int v = 1; v < size; v++) {
            real value = row[v * C];
            if (!(value <= most) && most == most) {
                most = value;
                column = v;
            }
        }
        #pragma unroll
        for (int k = 0; k < ROWS; k++) {
            int u = r - k;
            if (u == 0 || (u > 0 && u < size && !(most <= best[k]) && best[k] == best[k])) {
                best[k] = most;
                at[k] = u * size + column;
            }
        }
    }
    #pragma unroll
    for (int k = 0; k < ROWS; k++)
        if (i + k < h) {
            s[(n * h + i + k) * line + t] = best[k];
            argmax[(n * h + i + k) * line + t] = at[k];
        }
}

extern "C" __global__
void offset_pool_backward(const real* ds, const index_t* argmax, real* dx, int H, int W, int C, int tile)
{
    const int size = SIZE ? SIZE : tile;
    int h = H - size + 1, line = (W - size + 1) * C, strips = (H + ROWS - 1) / ROWS, blocks = (W * C + blockDim.x - 1) / blockDim.x;
    int t = blockIdx.x % blocks * blockDim.x + threadIdx.x, strip = blockIdx.x / blocks;
    int n = strip / strips, row = strip % strips * ROWS;
    if (t >= W * C) return;
    real sum[ROWS] = {};
    #pragma unroll
    for (int r = 1 - size; r < ROWS; r++) {                         // tiles that begin in row + r
        bool there = row + r >= 0 && row + r < h;
        if (!SIZE && !there) continue;                              // with SIZE the loads of all rows go out together
        int first = (n * h + row + r) * line + t;
        #pragma unroll
        for (int v = size - 1; v >= 0; v--) {                       // and in column col - v: the first tile first
            bool inside = there && t >= v * C && t - v * C < line;
            int place = inside ? (int)argmax[first - v * C] : -1;
            real g = inside ? ds[first - v * C] : real(0);
            #pragma unroll
            for (int k = 0; k < ROWS; k++)
                if (k - r >= 0 && k - r < size && place == (k - r) * size + v)
                    sum[k] += g;
        }
    }
    #pragma unroll
    for (int k = 0; k < ROWS; k++)
        if (row + k < H)
            dx[(n * H + row + k) * W * C + t] = sum[k];
}
