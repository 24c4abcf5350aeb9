// Losses of box regression. real is float or double. Python side: tinydet/ops/box_loss.py
// variants: real=float; real=double
//
// 4 numbers a thread, 256 apart: grid ceil(R * D / 1024), block 256, 64 bytes of shared memory. kept, at least 1: rows of mask true.
// With d = x - target in rows that are kept, and 0 elsewhere, whatever they hold:
// box_loss_l2          dx = d / kept,                     partials[b] = sum over the block of d^2 / 2, in double, divided by kept
// box_loss_smooth_l1   dx = (d / beta or sign(d)) / kept,  partials[b] = ... of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2

#define NUMBERS 4

extern "C" __global__
void box_loss_l2(const real* x, const real* target, const bool* mask, const long long* count, real* dx, double* partials, int n, int D)
{
    __shared__ double sums[8];
    double sum = 0, kept = *count > 1 ? *count : 1;
    unsigned first = blockIdx.x * (256 * NUMBERS) + threadIdx.x;
    for (int e = 0; e < NUMBERS && first + 256 * e < (unsigned)n; e++) {
        unsigned i = first + 256 * e;
        real d = mask[i / D] ? x[i] - target[i] : real(0);
        sum += d * d;
        dx[i] = d / (real)kept;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum / 2 / kept;
}

extern "C" __global__
void box_loss_smooth_l1(const real* x, const real* target, const bool* mask, const long long* count, real* dx, double* partials,
                        int n, int D, real beta)
{
    __shared__ double sums[8];
    double sum = 0, kept = *count > 1 ? *count : 1;
    real half = beta / 2;
    unsigned first = blockIdx.x * (256 * NUMBERS) + threadIdx.x;
    for (int e = 0; e < NUMBERS && first + 256 * e < (unsigned)n; e++) {
        unsigned i = first + 256 * e;
        real slope = 0;
        if (mask[i / D]) {
            real d = x[i] - target[i], size = fabs(d);
            bool inside = size < beta;                              // never where beta is 0
            sum += inside ? d * d / (4 * half) : size - half;
            slope = inside ? d / (2 * half) : d > 0 ? real(1) : d < 0 ? real(-1) : d;       // d: 0 or NaN
        }
        dx[i] = slope / (real)kept;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum / kept;
}
