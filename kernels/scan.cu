// Prefix sums. item is the type of the array, total the one in which sums are kept. Python side: tinydet/ops/scan.py
// variants: item=int, total=long long; item=long long, total=long long; item=float, total=double; item=double, total=double
//
// A block of 256 threads has a tile of 2048 items, each of its 8 warps 256 items on end: 8 rounds of 32, one item a lane, so that loads
// are coalesced. Three launches: totals of the tiles, their own exclusive scan (these kernels again, until one tile holds them), then
//
// scan_totals   totals[b] = sum of tile b: grid ceil(n / 2048), 64 bytes of shared memory
// scan_write    y[i] = starts[b] (0 if there is one tile only) + the sum of tile b before i, with x[i] if inclusive: the same grid
//
// Items are read twice and written once. The order of all additions follows from n alone. Each y is rounded to item once.

#define ROUNDS 8
#define WARPS 8

extern "C" __global__
void scan_totals(const item* x, total* totals, int n)
{
    __shared__ total sums[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned first = (blockIdx.x * WARPS + warp) * (32 * ROUNDS) + lane;        // unsigned: the last tile may reach past 2^31
    total sum = 0;
    for (int r = 0; r < ROUNDS; r++)
        if (first + 32 * r < (unsigned)n)
            sum += x[first + 32 * r];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0)
        totals[blockIdx.x] = sum;
}

extern "C" __global__
void scan_write(const item* x, const total* starts, item* y, int n, int inclusive)
{
    __shared__ total sums[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned first = (blockIdx.x * WARPS + warp) * (32 * ROUNDS) + lane;
    total within[ROUNDS], sum = 0;                                  // sum: of the warp's rounds so far
    for (int r = 0; r < ROUNDS; r++) {
        total up = first + 32 * r < (unsigned)n ? x[first + 32 * r] : 0;
        for (int d = 1; d < 32; d *= 2) {                           // up: of the lanes up to this one
            total other = __shfl_up_sync(0xffffffff, up, d);
            if (lane >= d)
                up += other;
        }
        total before = __shfl_up_sync(0xffffffff, up, 1);
        within[r] = sum + (inclusive ? up : lane > 0 ? before : 0);
        sum += __shfl_sync(0xffffffff, up, 31);
    }
    if (lane == 0)
        sums[warp] = sum;
    __syncthreads();
    total start = gridDim.x > 1 ? starts[blockIdx.x] : 0;
    for (int w = 0; w < warp; w++)
        start += sums[w];
    for (int r = 0; r < ROUNDS; r++)
        if (first + 32 * r < (unsigned)n)
            y[first + 32 * r] = start + within[r];
}
