// Focal loss. real is float or double. Python side: tinydet/ops/focal_loss.py
// variants: real=float; real=double
//
// focal_loss_entries   4 entries a thread, 256 apart: grid ceil(n / 1024), block 256, 72 or 80 bytes of shared memory
//   label 1: t = +1, weight = yes / N;  0: t = -1, weight = no / N;  -1 counts nowhere; any other (labels are int8) makes NaN
//   z = t * x,  p = sigmoid(z),  fade = weight * (1 - p)^gamma;  dx = t * fade * (gamma * p * log(p) - (1 - p))
//   partials[b] = sum over the block of -fade * log(p), in double
//   N = normalizer, or if that is 0 the number of positives, at least 1

#define ENTRIES 4

extern "C" __global__
void focal_loss_entries(const real* x, const u8* labels, const long long* positives, real* dx, double* partials, int n,
                        double normalizer, double yes, double no, real gamma)
{
    __shared__ double sums[8];
    __shared__ real weights[2];                                     // of label 0, of label 1; divided once a block, as double is slow
    if (threadIdx.x < 2) {
        double by = normalizer > 0 ? normalizer : *positives > 1 ? *positives : 1;
        weights[threadIdx.x] = (threadIdx.x ? yes : no) / by;
    }
    __syncthreads();
    double sum = 0;
    unsigned first = blockIdx.x * (256 * ENTRIES) + threadIdx.x;
    for (int e = 0; e < ENTRIES && first + 256 * e < (unsigned)n; e++) {
        unsigned i = first + 256 * e;
        int label = (signed char)labels[i];
        real d = 0;
        if (label < -1 || label > 1) {
            d = NOT_A_NUMBER;
            sum += d;
        } else if (label >= 0) {
            real t = label ? 1 : -1, z = t * x[i], small = exp(-fabs(z));
            real p = (z >= 0 ? real(1) : small) / (1 + small), rest = (z <= 0 ? real(1) : small) / (1 + small);
            real log_p = -((z < 0 ? -z : real(0)) + log1p(small));  // p, 1 - p and log(p), each exact for large |z|
            real fade = weights[label] * (gamma == 2 ? rest * rest : pow(rest, gamma));
            sum -= fade * log_p;
            d = t * fade * (gamma * (p > 0 ? p * log_p : real(0)) - rest);
        }
        dx[i] = d;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = sum;
}
