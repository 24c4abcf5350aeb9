// AP-loss and its error-driven update, without pairs. real is float or double. Python side: tinydet/ops/ap_loss.py
// variants: real=float; real=double
// flags: --fmad=false
// (so that the numbers are those of the CPU to the last bits)
//
// P = min(*positives, C) positives come first in `order`, by rising score; P stays on the device. All arithmetic is double. Scores are
// added up as whole multiples of `unit` modulo 2^64 (fixed), by integer atomics: the order of threads does not show.
// For a negative v: l = #{v - p >= reach}, h = #{v - p > -reach}. See ap_loss.py for what is noted where.
//
// ap_loss_start      a thread for each k <= C: p[k] = score of the k-th positive, q[k] = fixed(p[k]); 0 in q behind them and in above, inside,
//                    sums, w0, w1. Sets bad to 1 if there are more than C positives, else to 0.
// ap_loss_negatives  4 scores a thread, 256 apart: grid ceil(n / 1024), block 256, 128 bytes of shared memory. Two binary searches in p, then
//                    above[l] += 1; if l < h: inside[l] += 1, inside[h] -= 1, sums[l] += fixed(v), sums[h] -= fixed(v). What goes to place 0
//                    and to above[P] is added up in the block before: untrained scores all have l = 0, h = P, and nothing reads place P
//                    of the other two. Sets bad for scores that are not finite, of positives too (the sort has put a NaN behind all
//                    others, so p is not theirs then, nor used), and for labels other than -1, 0, 1.
// ap_loss_positives  a thread a positive, after scans of q, above, inside, sums: b_i, e_i = b_i / (a_i + b_i)
// ap_loss_weights    one block of 256 threads, 256 positives at a time, 192 bytes of shared memory: E, the running minimum of e (or e);
//                    origin, the running maximum of the p that lie more than 2 * reach above the one before; w0 = E / b,
//                    w1 = w0 * (p - origin); g = -E / P of the positives; loss = sum E / P
// ap_loss_gradients  4 scores a thread, after scans of w0, w1: g of the negatives, 0 where ignored; NaN everywhere if bad
// Reads 2 * (scores + labels) and writes g: 14 bytes an entry for float, next to the sort of all entries in front.

#define ENTRIES 4
#define WARPS 8

__device__ unsigned long long fixed(double v, double scale)
{
    double turns = v * scale;
    if (fabs(turns) >= 4503599627370496.0)
        return 0;
    turns -= rint(turns);
    if (turns == 0.5)
        turns = -0.5;
    return (unsigned long long)(long long)rint(turns * 18446744073709551616.0);
}

// l, or with above = true h, of a score v among P positives
__device__ int search(const real* p, int P, double v, double reach, bool above)
{
    int from = 0, to = P;
    while (from < to) {
        int k = from + (to - from) / 2;
        double d = v - (double)p[k];
        if (above ? d > -reach : d >= reach)
            from = k + 1;
        else
            to = k;
    }
    return from;
}

__device__ int how_many(const long long* positives, int C)
{
    return *positives < C ? (int)*positives : C;
}

__device__ bool is_finite(double v)
{
    return v - v == 0;
}

extern "C" __global__
void ap_loss_start(const real* x, const int* order, const long long* positives, real* p, long long* q, int* above, int* inside,
                   long long* sums, double* w0, double* w1, int* bad, int C, double scale)
{
    int k = blockIdx.x * blockDim.x + threadIdx.x, P = how_many(positives, C);
    if (k > C) return;
    q[k] = 0;
    above[k] = 0;
    inside[k] = 0;
    sums[k] = 0;
    w0[k] = 0;
    w1[k] = 0;
    if (k < C)
        p[k] = k < P ? x[order[k]] : real(0);
    if (k < P)
        q[k] = (long long)fixed(x[order[k]], scale);
    if (k == 0)
        *bad = *positives > C;
}

extern "C" __global__
void ap_loss_negatives(const real* x, const u8* labels, const real* p, const long long* positives, int* above, int* inside,
                       long long* sums, int* bad, int n, int C, double reach, double scale)
{
    __shared__ unsigned long long totals[WARPS];
    __shared__ int counts[WARPS], counts_beyond[WARPS];
    int P = how_many(positives, C), count = 0, beyond = 0;
    unsigned long long total = 0;
    unsigned first = blockIdx.x * (256 * ENTRIES) + threadIdx.x;
    for (int r = 0; r < ENTRIES && first + 256 * r < (unsigned)n; r++) {
        double v = x[first + 256 * r];
        int label = (signed char)labels[first + 256 * r];
        if (label < -1 || label > 1 || (label >= 0 && !is_finite(v)))
            atomicOr(bad, 1);
        else if (label == 0 && P > 0) {
            int h = search(p, P, v, reach, true), l = search(p, h, v, reach, false);
            if (l == P)
                beyond++;
            else if (l > 0)
                atomicAdd(&above[l], 1);
            if (l < h) {
                unsigned long long q = fixed(v, scale);
                if (l == 0) {
                    count++;
                    total += q;
                } else {
                    atomicAdd(&inside[l], 1);
                    atomicAdd((unsigned long long*)&sums[l], q);
                }
                if (h < P) {
                    atomicAdd(&inside[h], -1);
                    atomicAdd((unsigned long long*)&sums[h], 0 - q);
                }
            }
        }
    }
    count = block_sum(count, counts);
    beyond = block_sum(beyond, counts_beyond);
    total = block_sum(total, totals);
    if (threadIdx.x == 0 && count > 0) {
        atomicAdd(&inside[0], count);
        atomicAdd((unsigned long long*)&sums[0], total);
    }
    if (threadIdx.x == 0 && beyond > 0)
        atomicAdd(&above[P], beyond);
}

extern "C" __global__
void ap_loss_positives(const real* p, const long long* q, const long long* q_before, const long long* positives, const int* above,
                       const int* inside, const long long* sums, double* e, double* b, int C, double reach, double slope, double unit)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x, P = how_many(positives, C);
    if (i >= P) return;
    int lo = search(p, P, p[i], reach, false), hi = search(p, P, p[i], reach, true);
    unsigned long long own = q[i], among = q_before[hi] - q_before[lo] - (unsigned long long)(hi - lo) * own;
    unsigned long long within = sums[i] - (unsigned long long)inside[i] * own;
    double a = (P - hi) + 0.5 * (hi - lo + 1) + slope * (unit * (double)(long long)among);
    double found = (above[P] - above[i]) + 0.5 * inside[i] + slope * (unit * (double)(long long)within);
    b[i] = fmax(0.0, found);
    e[i] = b[i] / (a + b[i]);
}

extern "C" __global__
void ap_loss_weights(const real* p, const int* order, const double* e, const double* b, const long long* positives, const int* bad,
                     double* w0, double* w1, double* origin, real* g, double* loss, int C, double reach, int interpolated)
{
    __shared__ double lows[WARPS], highs[WARPS], sums[WARPS];
    int P = how_many(positives, C), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum = 0, low = 2, high = -INFINITE;                      // of all tiles before
    for (int first = 0; first < P; first += 256) {
        int k = first + threadIdx.x;
        double own = k < P ? e[k] : 2, least = own, from = -INFINITE;
        if (k < P && (k == 0 || (double)p[k] - (double)p[k - 1] > 2 * reach))
            from = p[k];
        for (int d = 1; d < 32; d *= 2) {
            double lower = __shfl_up_sync(0xffffffff, least, d), higher = __shfl_up_sync(0xffffffff, from, d);
            if (lane >= d) {
                least = fmin(least, lower);
                from = fmax(from, higher);
            }
        }
        if (lane == 31) {
            lows[warp] = least;
            highs[warp] = from;
        }
        __syncthreads();
        least = fmin(least, low);
        from = fmax(from, high);
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) {
                least = fmin(least, lows[w]);
                from = fmax(from, highs[w]);
            }
            low = fmin(low, lows[w]);
            high = fmax(high, highs[w]);
        }
        __syncthreads();
        if (k < P) {
            if (!interpolated)
                least = own;
            double w = b[k] > 0 ? least / b[k] : 0;
            w0[k] = w;
            w1[k] = w * (p[k] - from);
            origin[k] = from;
            g[order[k]] = 0 - least / P;
            sum += least;
        }
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        *loss = *bad ? (double)NOT_A_NUMBER : sum / (P > 0 ? P : 1);
}

extern "C" __global__
void ap_loss_gradients(const real* x, const u8* labels, const real* p, const long long* positives, const double* w0, const double* w1,
                       const double* origin, const int* bad, real* g, int n, int C, double reach, double slope)
{
    int P = how_many(positives, C);
    unsigned first = blockIdx.x * (256 * ENTRIES) + threadIdx.x;
    for (int r = 0; r < ENTRIES && first + 256 * r < (unsigned)n; r++) {
        unsigned i = first + 256 * r;
        double v = x[i], total = 0;
        if (*bad)
            g[i] = NOT_A_NUMBER;
        else if (labels[i] != 1) {
            if (labels[i] == 0 && P > 0) {
                int h = search(p, P, v, reach, true), l = search(p, h, v, reach, false);
                total = w0[l];
                if (l < h) {
                    double w = w0[h] - w0[l];
                    total += 0.5 * w + slope * ((v - origin[l]) * w - (w1[h] - w1[l]));
                }
                total = fmax(0.0, total) / P;
            }
            g[i] = total;
        }
    }
}
