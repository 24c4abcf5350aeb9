// Local response normalisation across channels. real is float or double. Python side: tinydet/ops/lrn.py
// variants: real=float; real=double
//
// lrn_forward   y_c = x_c * s_c^(-beta), s_c = k + a * sum_{|j - c| <= half} x_j^2 over the channels that exist; one thread per element,
//   channel fastest: grid ceil(size / 256), block 256, no shared memory; the neighbours come from L1
// lrn_backward  dx_c = dy_c * s_c^(-beta) - slope * x_c * sum_{|j - c| <= half} dy_j * x_j * s_j^(-beta - 1), slope = 2 * a * beta; same
//   geometry. The terms of the block's elements and of `half` on either side are made once, in (block + 2 * half) reals of dynamic
//   shared memory; a window stays in its pixel.
// 12 and 16 bytes a float moved. With a window of 5 and beta = 0.75, which two square roots do, about 95 and 125 instructions; in the time
// that memory takes at 3 TB/s an H100 issues 118 and 158. Other powers take more. By arithmetic, nothing of it measured.

static __device__ real lrn_scale(real x, real s, real beta)         // x * s^(-beta)
{
    if (beta == real(0.75)) {
        real root = sqrt(s);
        return x / (root * sqrt(root));
    }
    return x * pow(s, -beta);
}

extern "C" __global__
void lrn_forward(const real* x, real* y, real* s, int size, int C, int half, real a, real beta, real k)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)size) return;
    int c = t % C;
    real sum = 0;
    for (int j = max(-half, -c); j <= min(half, C - 1 - c); j++) {
        real near = x[(int)t + j];
        sum += near * near;
    }
    s[t] = k + a * sum;
    y[t] = lrn_scale(x[t], k + a * sum, beta);
}

extern "C" __global__
void lrn_backward(const real* dy, const real* x, const real* s, real* dx, int size, int C, int half, real slope, real beta)
{
    DYN_SHARED(real, term);                                         // term[half + k]: of element first + k
    unsigned first = blockIdx.x * blockDim.x, t = first + threadIdx.x;
    int c = t % C;
    real own = 0;
    if (t < (unsigned)size) {
        own = lrn_scale(dy[t], s[t], beta);
        term[half + threadIdx.x] = own * x[t] / s[t];
    }
    for (int h = threadIdx.x; h < 2 * half; h += blockDim.x) {      // left of the block, then right of it
        int k = h < half ? h - half : h - half + blockDim.x;
        unsigned e = first + k;                                     // left of x: wraps round to a number above size
        if (e < (unsigned)size)
            term[half + k] = lrn_scale(dy[e], s[e], beta) * x[e] / s[e];
    }
    __syncthreads();
    if (t >= (unsigned)size) return;
    real sum = 0;
    for (int j = max(-half, -c); j <= min(half, C - 1 - c); j++)
        sum += term[half + (int)threadIdx.x + j];
    dx[t] = own - slope * x[t] * sum;
}
