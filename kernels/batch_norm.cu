// Batch normalisation. real is float or double. Python side: tinydet/ops/batch_norm.py
// variants: real=float; real=double
//
// x is read as rows of `columns` numbers: one pixel, or several side by side where C is small; column k is of channel k % C.
// Sums in two levels and a fixed order, so that their bits depend on the shape alone:
//   batch_norm_moments     block 32 x 8: 32 columns of `per` rows, grid slabs * parts; mean and sum of squared differences from it.
//                          A thread adds 8 numbers at a time in real, about a centre near the block's mean, and those sums in double
//   batch_norm_statistics  a block of 128 for each channel: mean[c], var[c] (biased) of the parts' moments
//   batch_norm_sums        geometry of the moments: sum of g and of g * (x - mean), where g = dy, with relu 0 where not y > 0
//   batch_norm_totals      geometry of the statistics: dbeta[c] = sum g, dgamma[c] = sum g * (x - mean) / sqrt(var + eps)
// Static shared memory: 4 KB, 1 KB. Each reads its arrays once, coalesced along the columns.
//
// Elementwise, 4 pixels a thread, `step` pixels apart, so that the channel's constants stay in registers; grid ceil(step * C / 256):
//   batch_norm_forward     y = (x - mean) * gamma / sqrt(var + eps) + beta, with relu 0 where y <= 0; NaN stays
//   batch_norm_backward    dx = gamma / sqrt(var + eps) * g, in training ... * (g - dbeta / pixels - h * dgamma / pixels),
//                          h = (x - mean) / sqrt(var + eps)
// Bound by memory: moments, sums, forward and backward move 4, 8, 8 and 12 bytes a float and take about 10, 15, 25 and 40 instructions; in
// the time that 4 bytes take at 3 TB/s an H100 issues 39. By arithmetic, nothing of it measured.

#define LANES 8
#define CHUNK 8
#define EACH 4

// Sum over the block, the same for all threads: a tree, whose order is fixed.
static __device__ double batch_norm_sum(double value, double* shared)
{
    __syncthreads();                                                // what was in shared is read
    shared[threadIdx.x] = value;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

extern "C" __global__
void __launch_bounds__(256) batch_norm_moments(const real* x, double* partial, int rows, int columns, int per)
{
    __shared__ double sums[2][LANES][32];
    int slabs = (columns + 31) / 32, part = blockIdx.x / slabs, column = blockIdx.x % slabs * 32 + threadIdx.x;
    int lane = threadIdx.y, first = part * per, n = min(per, rows - first), some = min(n, LANES);
    bool here = column < columns;

    sums[0][lane][threadIdx.x] = here && lane < some ? x[(first + lane * n / some) * columns + column] : real(0);
    __syncthreads();
    real centre = 0;
    for (int k = 0; k < some; k++) centre += real(sums[0][k][threadIdx.x]);
    centre /= some;                                                 // of rows spread over the block
    __syncthreads();

    double s = 0, q = 0;
    for (int r = lane; r < n; r += LANES * CHUNK) {
        real value[CHUNK], a = 0, b = 0;
        #pragma unroll
        for (int k = 0; k < CHUNK; k++)
            value[k] = here && r + k * LANES < n ? x[(first + r + k * LANES) * columns + column] : centre;
        #pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            real d = value[k] - centre;
            a += d;
            b = fma(d, d, b);
        }
        s += a;
        q += b;
    }
    sums[0][lane][threadIdx.x] = s;
    sums[1][lane][threadIdx.x] = q;
    __syncthreads();
    if (lane == 0 && here) {
        s = q = 0;
        for (int k = 0; k < LANES; k++) {
            s += sums[0][k][threadIdx.x];
            q += sums[1][k][threadIdx.x];
        }
        partial[2 * part * columns + column] = centre + s / n;
        partial[(2 * part + 1) * columns + column] = q - s * s / n;
    }
}

extern "C" __global__
void __launch_bounds__(128) batch_norm_statistics(const double* partial, real* mean, real* var, int parts, int rows, int columns, int per,
                                                  int C)
{
    __shared__ double shared[128];
    int c = blockIdx.x, side = columns / C, count = parts * side;   // part p / side, column p % side * C + c
    double total = (double)rows * side, m = 0, q = 0;
    for (int p = threadIdx.x; p < count; p += 128)
        m += min(per, rows - p / side * per) * partial[2 * (p / side) * columns + p % side * C + c];
    m = batch_norm_sum(m, shared) / total;
    for (int p = threadIdx.x; p < count; p += 128) {
        double d = partial[2 * (p / side) * columns + p % side * C + c] - m;
        q += partial[(2 * (p / side) + 1) * columns + p % side * C + c] + min(per, rows - p / side * per) * d * d;
    }
    q = batch_norm_sum(q, shared) / total;
    if (threadIdx.x == 0) {
        mean[c] = m;
        var[c] = q < 0 ? 0 : q;                                     // rounding; NaN stays
    }
}

extern "C" __global__
void __launch_bounds__(256) batch_norm_forward(const real* x, const real* mean, const real* var, const real* gamma, const real* beta,
                                               real* y, int pixels, int C, int step, real eps, int relu)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x, first = t / C, c = t % C;
    if (first >= (unsigned)step) return;
    real m = mean[c], scale = 1 / sqrt(var[c] + eps) * gamma[c], b = beta[c], value[EACH];
    #pragma unroll
    for (int k = 0; k < EACH; k++)
        value[k] = first + k * step < (unsigned)pixels ? x[(first + k * step) * C + c] : m;
    #pragma unroll
    for (int k = 0; k < EACH; k++) {
        real z = fma(value[k] - m, scale, b);                       // fma by name: batch_norm_sums and _backward make the same z
        if (first + k * step < (unsigned)pixels)
            y[(first + k * step) * C + c] = relu && z <= 0 ? real(0) : z;
    }
}

extern "C" __global__
void __launch_bounds__(256) batch_norm_sums(const real* dy, const real* x, const real* mean, const real* var, const real* gamma,
                                            const real* beta, double* partial, int rows, int columns, int per, int C, real eps, int relu)
{
    __shared__ double sums[2][LANES][32];
    int slabs = (columns + 31) / 32, part = blockIdx.x / slabs, column = blockIdx.x % slabs * 32 + threadIdx.x, c = column % C;
    int lane = threadIdx.y, first = part * per, n = min(per, rows - first);
    bool here = column < columns;
    real m = mean[c], scale = 1 / sqrt(var[c] + eps) * gamma[c], zero = beta[c];

    double s = 0, q = 0;
    for (int r = lane; r < n; r += LANES * CHUNK) {
        real value[CHUNK], g[CHUNK], a = 0, b = 0;
        #pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            bool inside = here && r + k * LANES < n;
            value[k] = inside ? x[(first + r + k * LANES) * columns + column] : m;
            g[k] = inside ? dy[(first + r + k * LANES) * columns + column] : real(0);
        }
        #pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            real d = value[k] - m, passed = relu && !(fma(d, scale, zero) > 0) ? real(0) : g[k];
            a += passed;
            b = fma(passed, d, b);
        }
        s += a;
        q += b;
    }
    sums[0][lane][threadIdx.x] = s;
    sums[1][lane][threadIdx.x] = q;
    __syncthreads();
    if (lane == 0 && here) {
        s = q = 0;
        for (int k = 0; k < LANES; k++) {
            s += sums[0][k][threadIdx.x];
            q += sums[1][k][threadIdx.x];
        }
        partial[2 * part * columns + column] = s;
        partial[(2 * part + 1) * columns + column] = q;
    }
}

extern "C" __global__
void __launch_bounds__(128) batch_norm_totals(const double* partial, const real* var, real* dgamma, real* dbeta, int parts, int columns,
                                              int C, real eps)
{
    __shared__ double shared[128];
    int c = blockIdx.x, side = columns / C;
    double s = 0, q = 0;
    for (int p = threadIdx.x; p < parts * side; p += 128) {
        s += partial[2 * (p / side) * columns + p % side * C + c];
        q += partial[(2 * (p / side) + 1) * columns + p % side * C + c];
    }
    s = batch_norm_sum(s, shared);
    q = batch_norm_sum(q, shared);
    if (threadIdx.x == 0) {
        dbeta[c] = s;
        dgamma[c] = q * (1 / sqrt(var[c] + eps));
    }
}

extern "C" __global__
void __launch_bounds__(256) batch_norm_backward(const real* dy, const real* x, const real* mean, const real* var, const real* gamma,
                                                const real* beta, const real* dgamma, const real* dbeta, real* dx, int pixels, int C,
                                                int step, real eps, int relu, int training)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x, first = t / C, c = t % C;
    if (first >= (unsigned)step) return;
    real m = mean[c], inverse = 1 / sqrt(var[c] + eps), scale = inverse * gamma[c], zero = beta[c], value[EACH], g[EACH];
    real shift = dbeta[c] / pixels, slope = inverse * dgamma[c] / pixels;
    #pragma unroll
    for (int k = 0; k < EACH; k++) {
        bool inside = first + k * step < (unsigned)pixels;
        value[k] = inside ? x[(first + k * step) * C + c] : m;
        g[k] = inside ? dy[(first + k * step) * C + c] : real(0);
    }
    #pragma unroll
    for (int k = 0; k < EACH; k++) {
        real d = value[k] - m, passed = relu && !(fma(d, scale, zero) > 0) ? real(0) : g[k];
        if (first + k * step < (unsigned)pixels)
            dx[(first + k * step) * C + c] = scale * (training ? passed - shift - d * slope : passed);
    }
}
