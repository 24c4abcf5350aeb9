// Convolution as a product of matrices that are read where they stand (implicit GEMM). real is float or double; a block computes BM x BN
// outputs; VEC = 4 reads four neighbours at once (channels in multiples of 4, aligned arrays). Python side: tinydet/ops/conv.py
// variants: real=float, BM=128, BN=128, VEC=4; real=float, BM=128, BN=64, VEC=4; real=float, BM=64, BN=64, VEC=4; real=float, BM=32, BN=32, VEC=4; real=float, BM=64, BN=64, VEC=1; real=float, BM=32, BN=32, VEC=1; real=double, BM=64, BN=64, VEC=1; real=double, BM=32, BN=32, VEC=1
//
// conv_forward   rows are windows (n,i,j), columns output channels: grid ceil(M / BM) * ceil(Cout / BN), block THREADS
//   y[n,i,j,o] = b[o] + sum_{u < kh, v < kw, e < R} x[n, i*stride + row + u*apart, q] * w[first + u*wu + v*wv + e, o],
//   q = (j*stride + col + v*apart) * C + e; then max(0, y) if relu.  x: rows of W*C numbers, 0 outside; w: a matrix of Cout columns.
//   Side by side in the image lie the values under a row of a kernel that is not dilated: one tap (kw = 1) of R = width * C numbers.
//   Dilated: kw taps of R = C. y[n,i,j,0] lies at place + n*yn + i*yi + j*yj: the pixels of an input gradient whose row and column
//   leave one remainder by the stride are such a sum over dy, so this kernel makes input gradients, too.
// conv_dw        rows are weights (u,v,e), columns output channels, a sum over `each` windows: grid (as above, parts), block THREADS
//   parts[p,u,v,e,o] = sum of x[n, i*stride + row + u*apart, q] * dy[n,i,j,o] over the windows p*each .. (p+1)*each - 1
// conv_db        parts[p,o] = sum of dy[m,o] over p*each <= m < (p+1)*each, in double: grid (ceil(Cout / 32), parts), block 256, 2 KB shared
// conv_sum       out[k] = sum of parts[p,k] over p < count, in double and in this order: one thread per k, block 256
//
// Each step of the main loop adds BK products to every output. 128 x 128 floats: 2*BM*BN*BK operations for (BM + BN) * BK numbers from
// memory, 32 a byte (64 x 64: 16, 32 x 32: 8), and a thread's 64 multiply-adds for 4 loads of 16 bytes from shared memory. The numbers of
// the next step are fetched before the arithmetic and stored after it in the other half of shared memory: one barrier a step. A run of
// R numbers takes ceil(R / BK) steps: 3x3 kernels over 3 channels pay for 16 numbers instead of 9, multiples of BK for none.
// Shared: 2 * BK * (BM + 4 + BN) numbers, at most 16640 bytes (16896 in double). The gap of 4 after a row of A keeps the threads that
// turn four neighbours into a column on different banks. A warp reads 4 neighbouring groups of A and 8 of B: no two meet on a bank.

#define BK 8
#define TM (BM >= 64 ? 8 : 4)                   // outputs of a thread: TM x TN, in groups of 4 x 4 that lie BM / GM and BN / GN apart
#define TN (BM * BN >= 8192 ? 8 : 4)
#define GM (TM / 4)
#define GN (TN / 4)
#define THREADS (BM * BN / (TM * TN))           // 256, 128, 128, 64; of these and RESIDENT Python has a table
#define RESIDENT (BM == 32 ? 8 : BM == BN && sizeof(real) == 4 ? 512 / THREADS : 3)     // blocks on a multiprocessor: 2, 3, 4 (double 3), 8
#define LANES (THREADS / BK)                    // threads that fetch one of the BK rows of a matrix whose rows are read
#define FA (BM * BK / 4 / THREADS)              // groups of A that a thread fetches: 1, 2, 1, 1; of B it is one
#define ROW_OF(t) (t / 32 / (BN / TN / 8) * 4 + t % 32 / 8)     // the thread's place in the block: a warp is 4 x 8 threads
#define COLUMN_OF(t) (t / 32 % (BN / TN / 8) * 8 + t % 8)

struct alignas(16) Four { real v[4]; };
struct Shared { Four a[2][BK][BM / 4 + 1], b[2][BK][BN / 4]; };

// Numbers h .. h + VEC - 1 of a group, 0 where they are not `in`
static __device__ __forceinline__ void fetch(Four& to, int h, const real* from, bool in)
{
    if (VEC == 4)
        to = in ? *(const Four*)from : Four{};
    else
        to.v[h] = in ? *from : real(0);
}

// Write the first `room` numbers of a group, which are 4 or none where VEC is 4
static __device__ __forceinline__ void put(real* to, const Four& from, int room)
{
    if (VEC == 4) {
        if (room > 0) *(Four*)to = from;
    } else
        for (int h = 0; h < 4; h++)
            if (h < room) to[h] = from.v[h];
}

// acc = the sum over all steps. load(a, b) fetches this thread's groups of the next step, store(half, a, b) puts them into shared memory
template <class Load, class Store>
static __device__ __forceinline__ void multiply(real (&acc)[TM][TN], const Shared& s, int steps, int tm, int tn, Load load, Store store)
{
    Four a[FA], b;
    for (int r = 0; r < TM; r++)
        for (int c = 0; c < TN; c++)
            acc[r][c] = 0;
    if (steps > 0) {
        load(a, b);
        store(0, a, b);
    }
    __syncthreads();
    for (int step = 0; step < steps; step++) {
        int half = step & 1;
        if (step + 1 < steps) load(a, b);
        #pragma unroll
        for (int k = 0; k < BK; k++) {
            Four left[GM], right[GN];
            #pragma unroll
            for (int g = 0; g < GM; g++) left[g] = s.a[half][k][g * (BM / TM) + tm];
            #pragma unroll
            for (int g = 0; g < GN; g++) right[g] = s.b[half][k][g * (BN / TN) + tn];
            #pragma unroll
            for (int r = 0; r < TM; r++)
                #pragma unroll
                for (int c = 0; c < TN; c++)
                    acc[r][c] += left[r / 4].v[r % 4] * right[c / 4].v[c % 4];
        }
        if (step + 1 < steps) store(half ^ 1, a, b);
        __syncthreads();
    }
}

extern "C" __global__
void __launch_bounds__(THREADS, RESIDENT)
conv_forward(const real* x, const real* w, const real* b, real* y, int M, int H, int W, int C, int Cout, int oh, int ow, int stride,
             int row, int col, int kh, int kw, int R, int apart, int first, int wu, int wv, int place, int yn, int yi, int yj, int relu)
{
    __shared__ Shared s;
    int t = threadIdx.x, across = (Cout + BN - 1) / BN, m0 = blockIdx.x / across * BM, o0 = blockIdx.x % across * BN;
    int tm = ROW_OF(t), tn = COLUMN_OF(t);
    int ea = t % 2 * 4, ma = t / 2, eb = t / LANES, ob = o0 + t % LANES * 4;                        // what it fetches of A and B
    int image[FA], top[FA], left[FA];
    for (int f = 0; f < FA; f++) {
        int m = m0 + f * (THREADS / 2) + ma;
        image[f] = m / ow / oh * H;
        top[f] = m < M ? m / ow % oh * stride + row : -(1 << 30);                                   // far outside
        left[f] = (m % ow * stride + col) * C + ea;
    }
    int u = 0, v = 0, e = 0;                                                                        // of the next step
    auto load = [&](Four (&a)[FA], Four& bs) {
        #pragma unroll
        for (int f = 0; f < FA; f++) {
            int line = top[f] + u * apart, q = left[f] + v * apart * C + e;
            bool in = (unsigned)line < (unsigned)H;
            #pragma unroll
            for (int h = 0; h < 4; h += VEC)
                fetch(a[f], h, x + (int)((unsigned)(image[f] + line) * W * C + q + h), in && (unsigned)(q + h) < (unsigned)(W * C) && e + ea + h < R);
        }
        #pragma unroll
        for (int h = 0; h < 4; h += VEC)
            fetch(bs, h, w + ((first + u * wu + v * wv + e + eb) * Cout + ob + h), e + eb < R && ob + h < Cout);
        e += BK;
        if (e >= R) {
            e = 0;
            if (++v == kw) { v = 0; u++; }
        }
    };
    auto store = [&](int half, const Four (&a)[FA], const Four& bs) {
        #pragma unroll
        for (int f = 0; f < FA; f++)
            #pragma unroll
            for (int h = 0; h < 4; h++)
                ((real*)s.a[half][ea + h])[f * (THREADS / 2) + ma] = a[f].v[h];
        s.b[half][eb][t % LANES] = bs;
    };
    real acc[TM][TN];
    multiply(acc, s, kh * kw * ((R + BK - 1) / BK), tm, tn, load, store);

    #pragma unroll
    for (int g = 0; g < GN; g++) {
        int o = o0 + g * (BN / GN) + tn * 4;
        Four bias;
        #pragma unroll
        for (int h = 0; h < 4; h++) bias.v[h] = o + h < Cout ? b[o + h] : real(0);
        #pragma unroll
        for (int r = 0; r < TM; r++) {
            int m = m0 + r / 4 * (BM / GM) + tm * 4 + r % 4;
            real* at = y + (place + m / ow / oh * yn + m / ow % oh * yi + m % ow * yj + o);
            Four out;
            #pragma unroll
            for (int h = 0; h < 4; h++) {
                out.v[h] = acc[r][g * 4 + h] + bias.v[h];
                if (relu && out.v[h] <= 0) out.v[h] = 0;                                            // NaN stays
            }
            put(at, out, m < M ? Cout - o : 0);
        }
    }
}

extern "C" __global__
void __launch_bounds__(THREADS, RESIDENT)
conv_dw(const real* x, const real* dy, real* parts, int K, int H, int W, int C, int Cout, int N, int oh, int ow, int stride,
        int row, int col, int kw, int R, int apart, int each)
{
    __shared__ Shared s;
    int t = threadIdx.x, across = (Cout + BN - 1) / BN, m0 = blockIdx.x / across * BM, o0 = blockIdx.x % across * BN;
    int tm = ROW_OF(t), tn = COLUMN_OF(t);
    int part = blockIdx.y, p = part * each, end = p + min(each, N * oh * ow - p), ob = o0 + t % LANES * 4;
    p += t / LANES;                                                                                 // the window that is fetched next
    int down[FA][4 / VEC], right[FA][4 / VEC];                                                      // from its corner to the numbers
    #pragma unroll
    for (int f = 0; f < FA; f++)
        #pragma unroll
        for (int h = 0; h < 4; h += VEC) {
            int m = m0 + (f * LANES + t % LANES) * 4 + h;
            down[f][h / VEC] = m < K ? m / R / kw * apart : -(1 << 30);
            right[f][h / VEC] = m / R % kw * apart * C + m % R;
        }
    int j = p % ow, i = p / ow % oh, n = p / ow / oh;
    int dj = BK % ow, di = BK / ow % oh, dn = BK / ow / oh;                                         // from a window to that BK further on
    auto load = [&](Four (&a)[FA], Four& b) {
        #pragma unroll
        for (int f = 0; f < FA; f++)
            #pragma unroll
            for (int h = 0; h < 4; h += VEC) {
                int line = i * stride + row + down[f][h / VEC], q = (j * stride + col) * C + right[f][h / VEC];
                fetch(a[f], h, x + (int)((unsigned)(n * H + line) * W * C + q), p < end && (unsigned)line < (unsigned)H && (unsigned)q < (unsigned)(W * C));
            }
        #pragma unroll
        for (int h = 0; h < 4; h += VEC)
            fetch(b, h, dy + (p * Cout + ob + h), p < end && ob + h < Cout);
        p += BK, j += dj, i += di, n += dn;
        if (j >= ow) j -= ow, i++;
        if (i >= oh) i -= oh, n++;
    };
    auto store = [&](int half, const Four (&a)[FA], const Four& b) {
        #pragma unroll
        for (int f = 0; f < FA; f++) s.a[half][t / LANES][f * LANES + t % LANES] = a[f];
        s.b[half][t / LANES][t % LANES] = b;
    };
    real acc[TM][TN];
    multiply(acc, s, (each + BK - 1) / BK, tm, tn, load, store);

    #pragma unroll
    for (int r = 0; r < TM; r++)
        #pragma unroll
        for (int g = 0; g < GN; g++) {
            int m = m0 + r / 4 * (BM / GM) + tm * 4 + r % 4, o = o0 + g * (BN / GN) + tn * 4;
            const real* sums = acc[r] + g * 4;
            put(parts + ((part * K + m) * Cout + o), Four{sums[0], sums[1], sums[2], sums[3]}, m < K ? Cout - o : 0);
        }
}

extern "C" __global__
void conv_db(const real* dy, real* parts, int M, int Cout, int each)
{
    __shared__ double sums[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, o = blockIdx.x * 32 + lane;
    int part = blockIdx.y, begin = part * each, end = begin + min(each, M - begin);
    double sum = 0;
    for (int m = begin + warp; m < end && o < Cout; m += 8)
        sum += dy[m * Cout + o];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && o < Cout) {
        for (int k = 1; k < 8; k++) sum += sums[k][lane];
        parts[part * Cout + o] = sum;
    }
}

extern "C" __global__
void conv_sum(const real* parts, real* out, int count, int size)
{
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= size) return;
    double sum = 0;
    for (int p = 0; p < count; p++)
        sum += parts[p * size + k];
    out[k] = sum;
}
