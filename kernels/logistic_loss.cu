// Logistic loss. real is float or double. Python side: tinydet/ops/logistic_loss.py
// variants: real=float; real=double
//
// logistic_loss_entries   4 entries a thread, 256 apart: grid ceil(n / 1024), block 256, 64 bytes of shared memory
//   t = +1 for label 1, -1 for label -1 (is_signed) or 0 (not); the third label counts nowhere, any other (labels are int8) makes NaN
//   dx = -t * sigmoid(-t * x) / rows,  partials[b] = sum over the block of log(1 + exp(-t * x)), in double, divided by rows

#define ENTRIES 4

extern "C" __global__
void logistic_loss_entries(const real* x, const u8* labels, real* dx, double* partials, int n, int rows, int is_signed)
{
    __shared__ double sums[8];
    double sum = 0;
    unsigned first = blockIdx.x * (256 * ENTRIES) + threadIdx.x;
    for (int e = 0; e < ENTRIES && first + 256 * e < (unsigned)n; e++) {
        unsigned i = first + 256 * e;
        int label = (signed char)labels[i];
        real d = 0;
        if (label < -1 || label > 1) {
            d = NOT_A_NUMBER;
            sum += d;
        } else if (label != (is_signed ? 0 : -1)) {
            real t = label > 0 ? 1 : -1, z = -t * x[i], small = exp(-fabs(z));
            sum += (z > 0 ? z : real(0)) + log1p(small);
            d = -t * ((z >= 0 ? real(1) : small) / (1 + small)) / rows;
        }
        dx[i] = d;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum / rows;
}
