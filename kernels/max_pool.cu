// Max pooling. real is float or double (-Dreal=...), index_t is unsigned char or unsigned short (-Dindex_t=...), as size * size - 1
// needs. Python side: tinydet/ops/max_pool.py. All arrays are C-contiguous and of less than 2^31 elements.
//
// max_pool_forward    one thread per output, channel fastest: grid ceil(N*oh*ow*C / 256), block 256, no shared memory
//   y[n,i,j,c] = max_{u,v < size} x[n, i*stride + u - top, j*stride + v - left, c] over the pixels inside the image (each window
//   holds one); argmax = u * size + v.  First pixel wins a tie, the first NaN wins and stays.
// max_pool_backward   one thread per input element, gathers from the windows that cover it: no atomics; grid ceil(N*H*W*C / 256)
//   dx[n,row,col,c] = sum of dy[n,i,j,c] over the windows (i,j) whose argmax is this pixel, in row order

extern "C" __global__
void max_pool_forward(const real* x, real* y, index_t* argmax, int N, int H, int W, int C, int oh, int ow,
                      int size, int stride, int top, int left)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(N * oh * ow * C)) return;
    int c = t % C, j = t / C % ow, i = t / C / ow % oh, n = t / C / ow / oh;
    int row = i * stride - top, col = j * stride - left;            // the window's first pixel, perhaps outside
    real best = 0;
    int at = -1;
    for (int u = max(0, -row); u < min(size, H - row); u++)
        for (int v = max(0, -col); v < min(size, W - col); v++) {
            real value = x[((n * H + row + u) * W + col + v) * C + c];
            if (at < 0 || value > best || (value != value && best == best)) {
                best = value;
                at = u * size + v;
            }
        }
    y[t] = best;
    argmax[t] = at;
}

extern "C" __global__
void max_pool_backward(const real* dy, const index_t* argmax, real* dx, int N, int H, int W, int C, int oh, int ow,
                       int size, int stride, int top, int left)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(N * H * W * C)) return;
    int c = t % C, col = t / C % W + left, row = t / C / W % H + top, n = t / C / W / H;       // in the padded image
    real sum = 0;
    for (int i = max(0, row - size + stride) / stride; i <= min(oh - 1, row / stride); i++)     // / of non-negatives only
        for (int j = max(0, col - size + stride) / stride; j <= min(ow - 1, col / stride); j++) {
            int window = ((n * oh + i) * ow + j) * C + c;
            if (argmax[window] == (row - i * stride) * size + col - j * stride)
                sum += dy[window];
        }
    dx[t] = sum;
}
