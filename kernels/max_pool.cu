// Max pooling. real is float or double, index_t u8, u16 or unsigned, as size * size - 1 needs. Python side: tinydet/ops/max_pool.py
// variants: real=float, index_t=u8; real=double, index_t=u8; real=float, index_t=u16; real=double, index_t=u16; real=float, index_t=unsigned; real=double, index_t=unsigned
//
// max_pool_forward    one thread per output, channel fastest: grid ceil(N*oh*ow*C / 256), block 256, no shared memory
//   y[n,i,j,c] = max_{u,v < size} x[n, i*stride + u - top, j*stride + v - left, c] over the pixels inside the image (each window
//   holds one); argmax = u * size + v.  First pixel wins a tie, the first NaN wins and stays.
// max_pool_backward   ROWS input elements, one below the other, per thread, which share its divisions; each gathers from the windows that
//   cover it: no atomics. Threads along col * C + c, block at most 256, grid N * ceil(H / ROWS) * blocks along a row
//   dx[n,row,col,c] = sum of dy[n,i,j,c] over the windows (i,j) whose argmax is this pixel, in row order
// By arithmetic, nothing of it measured: for 2x2 windows 2 apart, float, 21 bytes an output and 5 an input element, in which time at 3 TB/s
// an H100 issues 200 and 50 instructions; forward takes about 130, backward, bound by its divisions, 75.

#define ROWS 4                                                      // as in tinydet/ops/max_pool.py

extern "C" __global__
void max_pool_forward(const real* x, real* y, index_t* argmax, int N, int H, int W, int C, int oh, int ow,
                      int size, int stride, int top, int left)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(N * oh * ow * C)) return;
    int c = t % C, j = t / C % ow, i = t / C / ow % oh, n = t / C / ow / oh;
    int row = i * stride - top, col = j * stride - left;            // the window's first pixel, perhaps outside
    real best = 0;
    unsigned at = 0;
    bool found = false;
    for (int u = max(0, -row); u < min(size, H - row); u++)
        for (int v = max(0, -col); v < min(size, W - col); v++) {
            real value = x[((n * H + row + u) * W + col + v) * C + c];
            if (!found || value > best || (value != value && best == best)) {
                best = value;
                at = (unsigned)u * size + v;
                found = true;
            }
        }
    y[t] = best;
    argmax[t] = at;
}

extern "C" __global__
void max_pool_backward(const real* dy, const index_t* argmax, real* dx, int H, int W, int C, int oh, int ow, int size, int stride,
                       int top, int left)
{
    int line = W * C, strips = (H + ROWS - 1) / ROWS, blocks = (line + blockDim.x - 1) / blockDim.x;
    int t = blockIdx.x % blocks * blockDim.x + threadIdx.x, strip = blockIdx.x / blocks, n = strip / strips, first = strip % strips * ROWS;
    if (t >= line) return;
    int c = t % C, col = t / C + left, right = col / stride, reach = (size - 1) / stride;       // col: in the padded image
    for (int k = 0; k < ROWS && first + k < H; k++) {
        int row = first + k + top, last = row / stride;
        real sum = 0;
        for (int i = max(0, last - reach); i <= min(oh - 1, last); i++)
            for (int j = max(0, right - reach); j <= min(ow - 1, right); j++) {
                int u = row - i * stride, v = col - j * stride, window = ((n * oh + i) * ow + j) * C + c;
                if (u < size && v < size && argmax[window] == (unsigned)u * size + v)
                    sum += dy[window];
            }
        dx[(n * H + first + k) * line + t] = sum;
    }
}
