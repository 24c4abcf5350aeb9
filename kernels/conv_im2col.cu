// Unrolling an image and its adjoint, around matrix products of the library. real is float or double. Python side: tinydet/ops/conv_im2col.py
// variants: real=float; real=double
//
// conv_im2col_unroll   one thread per element of columns, channel fastest: grid ceil(N*oh*ow*kh*kw*C / 256), block 256, no shared memory
//   columns[n,i,j,u,v,c] = x[n, i*stride + u*dilation - top, j*stride + v*dilation - left, c], 0 outside the image
// conv_im2col_fold     one thread per pixel and channel, gathers from the windows that read it: no atomics; grid ceil(N*H*W*C / 256)
//   dx[n,row,col,c] = sum over u, v, in that order, of columns[n,i,j,u,v,c] where i*stride + u*dilation - top = row, likewise col

extern "C" __global__
void conv_im2col_unroll(const real* x, real* columns, int N, int H, int W, int C, int oh, int ow, int kh, int kw,
                        int stride, int dilation, int top, int left)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned size = (unsigned)(N * oh * ow) * kh * kw * C;
    if (t >= size) return;
    int c = t % C, v = t / C % kw, u = t / C / kw % kh;
    unsigned window = t / C / kw / kh;
    int j = window % ow, i = window / ow % oh, n = window / ow / oh;
    int row = i * stride + u * dilation - top, col = j * stride + v * dilation - left;
    bool inside = row >= 0 && row < H && col >= 0 && col < W;
    columns[t] = inside ? x[((n * H + row) * W + col) * C + c] : real(0);
}

extern "C" __global__
void conv_im2col_fold(const real* columns, real* dx, int N, int H, int W, int C, int oh, int ow, int kh, int kw,
                      int stride, int dilation, int top, int left)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(N * H * W * C)) return;
    int c = t % C, col = t / C % W + left, row = t / C / W % H + top, n = t / C / W / H;       // in the padded image
    real sum = 0;
    for (int u = 0; u < kh; u++) {
        int i = row - u * dilation;                                     // stride times the row of windows, if it divides it
        if (i < 0 || i % stride || i / stride >= oh) continue;
        for (int v = 0; v < kw; v++) {
            int j = col - v * dilation;
            if (j < 0 || j % stride || j / stride >= ow) continue;
            sum += columns[((((n * oh + i / stride) * ow + j / stride) * kh + u) * kw + v) * C + c];
        }
    }
    dx[t] = sum;
}
