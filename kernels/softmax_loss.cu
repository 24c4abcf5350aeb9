// Softmax cross-entropy, mean over the rows that have a label. real is float or double. Python side: tinydet/ops/softmax_loss.py
// variants: real=float; real=double
//
// softmax_loss_rows   a warp a row, for any K: grid ceil(R / 8), block 256, 64 bytes of shared memory
//   dx[r,k] = (exp(x[r,k] - top) / sum_j exp(x[r,j] - top) - (k == labels[r])) / count, 0 where labels[r] = -1
//   partials[b] = sum over the block's rows of log(sum_j exp(x[r,j] - top)) - (x[r,labels[r]] - top), in double, divided by count
//   count, at least 1, is the number of labels other than -1. Any other label outside 0..K-1 makes its row and the value NaN.
// x is read three times, twice from the cache; lanes stand side by side along k.

#define WARPS 8

extern "C" __global__
void softmax_loss_rows(const real* x, const long long* labels, const long long* count, real* dx, double* partials, int R, int K)
{
    __shared__ double losses[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = blockIdx.x * WARPS + warp;
    double loss = 0, n = *count > 1 ? *count : 1;
    if (r < R && labels[r] == -1)
        for (int k = lane; k < K; k += 32)
            dx[r * K + k] = 0;
    if (r < R && labels[r] != -1) {                                 // the whole warp or none of it
        const real* row = x + r * K;
        real top = -INFINITE, sum = 0;
        for (int k = lane; k < K; k += 32)
            top = fmax(top, row[k]);                                // passes NaN over, which the sum brings back
        for (int d = 16; d > 0; d /= 2)
            top = fmax(top, __shfl_xor_sync(0xffffffff, top, d));
        for (int k = lane; k < K; k += 32)
            sum += exp(row[k] - top);
        for (int d = 16; d > 0; d /= 2)
            sum += __shfl_xor_sync(0xffffffff, sum, d);
        bool known = labels[r] >= 0 && labels[r] < K;
        int label = known ? (int)labels[r] : 0;
        loss = known ? log(sum) - (row[label] - top) : (real)NOT_A_NUMBER;
        for (int k = lane; k < K; k += 32)
            dx[r * K + k] = known ? (exp(row[k] - top) / sum - (k == label)) / (real)n : (real)NOT_A_NUMBER;
    }
    loss = block_sum(lane == 0 ? loss : 0.0, losses);                       // each lane of a warp has it
    if (threadIdx.x == 0)
        partials[blockIdx.x] = loss / n;
}
