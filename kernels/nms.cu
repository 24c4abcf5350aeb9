// Greedy non-maximum suppression. real is float or double. Python side: tinydet/ops/nms.py
// variants: real=float; real=double
// flags: --fmad=false
// (no fused multiply-add: a last bit decides at the threshold. CuPy's -ftz=true makes float areas below 1.2e-38 0, no others.)
//
// nms_mask    one bit for every pair of boxes in order of score: bit j of mask[i][j / 64] = i suppresses j, for j > i of the same group.
//             Grid (words, words), words = ceil(n / 64), blocks of 64 threads, one a row i, 64 boxes j in shared memory (1.75 or 3 KB);
//             blocks below the diagonal end at once, what they stand for is never read. Those on it look for values that may not be.
// nms_reduce  one block of 256 or 1024 threads goes through the words in order: one thread settles the 64 boxes of a word among each
//             other, then a warp for each box kept ORs its row onto `gone`, n bits of dynamic shared memory (4 bytes * 2 * words).
//             As it goes by score, it writes the result in order and stops at `limit`; info = (number kept, not 0 if a value is bad).
//
// All boxes share one mask and one block, whatever their groups. Memory n^2 / 8 bytes: 4.5 MB for 6000 boxes. By arithmetic, nothing of it
// measured: 80 groups of 200 boxes make 1.3e8 pairs of ~20 operations, 0.1 ms at 25 Top/s, and 250 words to reduce, 0.6 ms at 2.5 us each.
// Apart by group they would be 4 words deep, but bringing the groups together takes a sort by 8-byte keys, 25 launches of 10 us or more.

extern "C" __global__
void nms_mask(const real* boxes, const real* scores, const long long* groups, const int* order, unsigned long long* mask, int* info,
              int n, real threshold, int inclusive, real one, real largest_area)
{
    __shared__ real x1[64], y1[64], x2[64], y2[64], area[64];
    __shared__ long long group[64];
    int t = threadIdx.x, column = blockIdx.x, row = blockIdx.y;
    if (column < row) return;                                       // the whole block
    if (column * 64 + t < n) {
        int b = order[column * 64 + t];
        x1[t] = boxes[4 * b];
        y1[t] = boxes[4 * b + 1];
        x2[t] = boxes[4 * b + 2];
        y2[t] = boxes[4 * b + 3];
        area[t] = fmax(x2[t] - x1[t] + one, real(0)) * fmax(y2[t] - y1[t] + one, real(0));
        group[t] = groups[b];
        if (column == row) {                                        // checks.finite and checks.areas
            real sum = x1[t] - x1[t] + (y1[t] - y1[t]) + (x2[t] - x2[t]) + (y2[t] - y2[t]) + (scores[b] - scores[b]);
            real w = fabs(x2[t] / 2 - x1[t] / 2), h = fabs(y2[t] / 2 - y1[t] / 2);
            if (sum != 0 || w > largest_area / fmax(h, real(1)))
                atomicOr(&info[1], 1);
        }
    }
    __syncthreads();
    int i = row * 64 + t;
    if (i >= n) return;
    const real* a = boxes + 4 * order[i];
    real a1 = a[0], b1 = a[1], a2 = a[2], b2 = a[3];
    real own = fmax(a2 - a1 + one, real(0)) * fmax(b2 - b1 + one, real(0));
    long long mine = groups[order[i]];
    unsigned long long bits = 0;
    for (int k = row == column ? t + 1 : 0; k < min(64, n - column * 64); k++) {
        real w = fmax(fmin(a2, x2[k]) - fmax(a1, x1[k]) + one, real(0));
        real h = fmax(fmin(b2, y2[k]) - fmax(b1, y1[k]) + one, real(0));
        real inter = w * h, all = own + area[k] - inter;
        bool over = inclusive ? inter >= threshold * all : inter > threshold * all;
        if (over && all > 0 && group[k] == mine)
            bits |= 1ULL << k;
    }
    mask[i * gridDim.x + column] = bits;
}

// mask as 32-bit halves: shared memory ORs those without a loop
extern "C" __global__
void nms_reduce(const unsigned* mask, const int* order, long long* kept, int* info, int n, int limit)
{
    DYN_SHARED(unsigned, gone);
    __shared__ unsigned long long among[64], keep;                  // the word's own columns, and which of its boxes are kept
    int t = threadIdx.x, halves = (n + 63) / 64 * 2, count = 0;
    for (int k = t; k < halves; k += blockDim.x)
        gone[k] = 0;
    for (int word = 0; 64 * word < n && count < limit; word++) {
        const unsigned* rows = mask + 64 * word * halves;
        if (t < 64 && 64 * word + t < n)
            among[t] = rows[t * halves + 2 * word] | (unsigned long long)rows[t * halves + 2 * word + 1] << 32;
        __syncthreads();                                            // and the rows of the word before lie on `gone`
        if (t == 0) {
            unsigned long long left = ~(gone[2 * word] | (unsigned long long)gone[2 * word + 1] << 32), chosen = 0;
            if (n - 64 * word < 64)
                left &= (1ULL << (n - 64 * word)) - 1;
            for (int c = count; left && c < limit; c++) {
                int b = __ffsll(left) - 1;
                chosen |= 1ULL << b;
                left &= ~(among[b] | 1ULL << b);
            }
            keep = chosen;
        }
        __syncthreads();
        unsigned long long chosen = keep;
        if (t < 64 && (chosen >> t & 1))
            kept[count + __popcll(chosen & ((1ULL << t) - 1))] = order[64 * word + t];
        for (int b = t / 32; b < 64; b += blockDim.x / 32)
            if (chosen >> b & 1)
                for (int k = 2 * word + 2 + t % 32; k < halves; k += 32)
                    if (unsigned bits = rows[b * halves + k])
                        atomicOr(&gone[k], bits);
        count += __popcll(chosen);
    }
    if (t == 0)
        info[0] = count;
}
