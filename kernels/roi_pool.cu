// RoI max pooling. real is float or double. Python side: tinydet/ops/roi_pool.py
// variants: real=float; real=double
// flags: --fmad=false
// (no fused multiply-add: a last bit of coordinate * scale decides which cells a RoI has)
//
// roi_pool_bins      one thread per RoI and row or column of bins: grid ceil(R * (PH + PW) / 256), block 256, no shared memory
//   bins, lines of R numbers: image (-1 where a RoI's values may not be), PH first rows of the bins, PH rows past their last, PW
//   first columns, PW columns past the last; cut to the map, and empty where not first < past
// roi_pool_forward   one thread per output, channel fastest: grid ceil(R*PH*PW*C / 256), block 256, no shared memory
//   y[r,i,j,c] = max of x[n,h,w,c] over the bin, argmax = h * W + w.  First cell wins a tie, the first NaN wins and stays; 0 and
//   -1 where the bin is empty, NaN and -1 where there is no image
// roi_pool_backward  one thread per input element: block 32 to 256 along the channels of one cell, grid N*H*W * blocks along C
//   dx[n,h,w,c] = sum of dy[r,i,j,c] over the bins whose argmax is this cell, in order of (r,i,j): no atomics. The lanes of a
//   warp look at 32 RoIs, whether they hold the cell; then the warp goes through the bins, at the cell, of those that do.
//
// By arithmetic, nothing of it measured: 2000 RoIs of 225 cells, 7x7, 38 x 63 x 512 floats on an H100. Forward: 4e8 bytes written,
// 1.2e9 read from the cache, 2.5e8 warp instructions, about 0.4 ms. Backward: 38000 warps look at 63 times 32 RoIs, 0.1 ms, and
// read 1.2e9 bytes of argmax, 0.5 ms. The products of fc6 behind it, 2000 x 25088 x 4096, take 10 ms.

#define FAR 1073741824.0f                                           // cells beyond 2^30 are moved there: sums stay in 63 bits

// round(coordinate * scale), halves away from 0, in float as Caffe has it
static __device__ long long roi_pool_cell(real coordinate, float scale)
{
    float cell = (float)coordinate * scale;
    return (long long)round(fmin(fmax(cell, -FAR), FAR));
}

extern "C" __global__
void roi_pool_bins(const real* rois, int* bins, int R, int N, int H, int W, int PH, int PW, float scale, int float_bins)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(R * (PH + PW))) return;
    int r = t % R, k = t / R;
    bool columns = k >= PH;
    int i = columns ? k - PH : k, count = columns ? PW : PH, side = columns ? W : H, line = 1 + (columns ? 2 * PH : 0) + i;
    const real* roi = rois + 5 * r;
    long long start = roi_pool_cell(roi[columns ? 1 : 2], scale), stop = roi_pool_cell(roi[columns ? 3 : 4], scale), first, past;
    long long extent = stop < start ? 1 : stop - start + 1;
    if (float_bins) {
        float bin = (float)extent / (float)count;
        first = (long long)floor((float)i * bin);
        past = (long long)ceil((float)(i + 1) * bin);
    } else {
        first = i * extent / count;
        past = ((i + 1) * extent + count - 1) / count;
    }
    bins[line * R + r] = (int)min(max(start + first, 0LL), (long long)side);
    bins[(line + count) * R + r] = (int)min(max(start + past, 0LL), (long long)side);
    if (k == 0) {
        real n = roi[0], odd = roi[1] - roi[1] + (roi[2] - roi[2]) + (roi[3] - roi[3]) + (roi[4] - roi[4]);
        bins[r] = n >= 0 && n < N && n == floor(n) && odd == 0 ? (int)n : -1;           // odd is NaN where one is not finite
    }
}

extern "C" __global__
void roi_pool_forward(const real* x, const int* bins, real* y, int* argmax, int H, int W, int C, int R, int PH, int PW)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)(R * PH * PW * C)) return;
    int c = t % C, j = t / C % PW, i = t / C / PW % PH, r = t / C / PW / PH;
    int n = bins[r], top = bins[(1 + i) * R + r], bottom = bins[(1 + PH + i) * R + r];
    int left = bins[(1 + 2 * PH + j) * R + r], right = bins[(1 + 2 * PH + PW + j) * R + r];
    real best = n < 0 ? real(NOT_A_NUMBER) : real(0);
    int at = -1;
    for (int h = top; n >= 0 && h < bottom; h++)
        for (int w = left; w < right; w++) {
            real value = x[((n * H + h) * W + w) * C + c];
            if (at < 0 || value > best || (value != value && best == best)) {
                best = value;
                at = h * W + w;
            }
        }
    y[t] = best;
    argmax[t] = at;
}

extern "C" __global__
void __launch_bounds__(256) roi_pool_backward(const real* dy, const int* argmax, const int* bins, real* dx, int H, int W, int C,
                                              int R, int PH, int PW)
{
    int blocks = (C + blockDim.x - 1) / blockDim.x, cell = blockIdx.x / blocks;
    int c = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    int n = cell / (H * W), at = cell % (H * W), h = at / W, w = at % W, lane = threadIdx.x % 32;
    const int *top = bins + R, *bottom = top + PH * R, *left = bottom + PH * R, *right = left + PW * R;
    real sum = 0;
    for (int first = 0; first < R; first += 32) {
        int r = min(first + lane, R - 1), i = 0, j = 0, rows = 0, columns = 0;
        bool holds = (first + lane < R) & (bins[r] == n) & (top[r] <= h) & (h < bottom[(PH - 1) * R + r])
                   & (left[r] <= w) & (w < right[(PW - 1) * R + r]);        // & and not &&: all loads at once
        if (holds) {                                                // in bins that stand side by side: none is left out
            while (bottom[i * R + r] <= h) i++;
            while (i + rows < PH && top[(i + rows) * R + r] <= h) rows++;
            while (right[j * R + r] <= w) j++;
            while (j + columns < PW && left[(j + columns) * R + r] <= w) columns++;
        }
        for (unsigned left_over = __ballot_sync(0xffffffff, holds); left_over; left_over &= left_over - 1) {
            int from = __ffs(left_over) - 1;
            int i0 = __shfl_sync(0xffffffff, i, from), i1 = i0 + __shfl_sync(0xffffffff, rows, from);
            int j0 = __shfl_sync(0xffffffff, j, from), j1 = j0 + __shfl_sync(0xffffffff, columns, from);
            for (int row = i0; row < i1; row++)
                for (int column = j0; column < j1; column++) {
                    int bin = (((first + from) * PH + row) * PW + column) * C + c;
                    if (c < C && argmax[bin] == at)
                        sum += dy[bin];
                }
        }
    }
    if (c < C)
        dx[cell * C + c] = sum;
}
