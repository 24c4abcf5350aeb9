// Stable radix sort of indices by 4- or 8-byte keys, 8 bits a pass from the lowest. Python side: tinydet/ops/sort.py
// variants: word=unsigned; word=unsigned long long
//
// Keys are sorted as whole numbers: by bits, not by arithmetic, as CuPy compiles with -ftz=true, which would make all denormals equal.
// Up to 2048 keys:
// sort_block    all passes in one block of 256 threads, 24 or 32 KB of shared memory; keys and indices stay in registers between passes
// More: sort_words first, grid ceil(n / 256), then passes with three kernels each. A block has `rounds` * 256 keys, each of its 8 warps
// `rounds` * 32 on end; blocks = ceil(n / (256 * rounds)).
// sort_count    table[digit][block] = how many keys of the block have the digit; 1 KB of shared memory
//               (between the two: exclusive scan of the table, 256 * blocks numbers: where the keys of each digit and block go)
// sort_scatter  moves keys and indices there; 8 KB. Bytes: 4-byte keys 12 + 4 + 8 = 24 a pair, 8-byte keys 20 + 4 + 12 = 36, and 4 or 8
//               more from the cache.
// Warps first count their own digits, so each knows its place behind the warps before it; within 32 keys a ballot for every bit finds the
// lanes of the same digit, and a lane comes behind those below it. Integer atomics count only, so no order of threads shows.

#define DIGITS 256
#define WARPS 8
#define ROUNDS 8                                                    // of sort_block, at most

__device__ word sortable(word b, int floating, int descending)
{
    word top = (word)1 << (8 * sizeof(word) - 1), all = ~(word)0;
    word infinity = sizeof(word) == 4 ? (word)0x7f800000 : (word)0x7ff0000000000000ULL;
    if (floating && (b & ~top) > infinity)
        return all;                                                 // NaN comes last either way; no other number has all bits then
    if (floating && b == top)
        b = 0;                                                      // -0 is 0
    word w = floating && b & top ? ~b : b ^ top;                    // negative floats fall as their bits rise
    return descending ? ~w : w;
}

// The place of a lane's key: behind the keys of its digit that the warp has placed, and those of lanes below it. The whole warp calls it.
__device__ int take_place(int* place, int digit)
{
    unsigned peers = 0xffffffff;                                    // lanes of the same digit
    for (int bit = 0; bit < 8; bit++) {
        unsigned ones = __ballot_sync(0xffffffff, digit >> bit & 1);
        peers &= digit >> bit & 1 ? ones : ~ones;
    }
    int rank = __popc(peers & ((1u << threadIdx.x % 32) - 1));
    int at = place[digit] + rank;
    __syncwarp();
    if (rank == 0)
        place[digit] += __popc(peers);
    __syncwarp();
    return at;
}

extern "C" __global__
void sort_block(const word* bits, int* order, int n, int floating, int descending)
{
    __shared__ word words[256 * ROUNDS];
    __shared__ int indices[256 * ROUNDS], place[WARPS][DIGITS], sums[WARPS];
    int t = threadIdx.x, lane = t % 32, warp = t / 32, rounds = (n + 255) / 256, first = warp * rounds * 32 + lane, index[ROUNDS];
    word key[ROUNDS];
    #pragma unroll
    for (int r = 0; r < ROUNDS; r++)
        if (r < rounds) {
            index[r] = first + 32 * r;                              // past the end: the largest key, and by index behind all others
            key[r] = index[r] < n ? sortable(bits[index[r]], floating, descending) : ~(word)0;
        }
    for (int shift = 0; shift < 8 * (int)sizeof(word); shift += 8) {
        for (int w = 0; w < WARPS; w++)
            place[w][t] = 0;
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < ROUNDS; r++)
            if (r < rounds)
                atomicAdd(&place[warp][key[r] >> shift & 255], 1);
        __syncthreads();
        int count = 0;
        for (int w = 0; w < WARPS; w++)
            count += place[w][t];
        int up = count;                                             // of the digits up to this thread's, first in its warp
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(0xffffffff, up, d);
            if (lane >= d)
                up += other;
        }
        if (lane == 31)
            sums[warp] = up;
        __syncthreads();
        int at = up - count;
        for (int w = 0; w < warp; w++)
            at += sums[w];
        for (int w = 0; w < WARPS; w++) {
            count = place[w][t];
            place[w][t] = at;
            at += count;
        }
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < ROUNDS; r++)
            if (r < rounds) {
                int to = take_place(place[warp], key[r] >> shift & 255);
                words[to] = key[r];
                indices[to] = index[r];
            }
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < ROUNDS; r++)
            if (r < rounds) {
                key[r] = words[first + 32 * r];
                index[r] = indices[first + 32 * r];
            }
    }
    #pragma unroll
    for (int r = 0; r < ROUNDS; r++)
        if (r < rounds && first + 32 * r < n)
            order[first + 32 * r] = index[r];
}

extern "C" __global__
void sort_words(const word* bits, word* words, int n, int floating, int descending)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (unsigned)n)
        words[i] = sortable(bits[i], floating, descending);
}

extern "C" __global__
void sort_count(const word* words, int* table, int n, int shift, int rounds)
{
    __shared__ int counts[DIGITS];
    counts[threadIdx.x] = 0;
    __syncthreads();
    unsigned first = blockIdx.x * (256u * rounds) + threadIdx.x;
    for (int r = 0; r < rounds && first + 256 * r < (unsigned)n; r++)
        atomicAdd(&counts[words[first + 256 * r] >> shift & 255], 1);
    __syncthreads();
    table[threadIdx.x * gridDim.x + blockIdx.x] = counts[threadIdx.x];
}

extern "C" __global__
void sort_scatter(const word* words, const int* order, const int* starts, word* moved_words, int* moved_order,
                  int n, int shift, int rounds)
{
    __shared__ int place[WARPS][DIGITS];                            // counts of a warp's digits, then where its next key of each goes
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int w = 0; w < WARPS; w++)
        place[w][threadIdx.x] = 0;
    __syncthreads();
    unsigned first = (blockIdx.x * WARPS + warp) * (32u * rounds);
    for (int r = 0; r < rounds && first + 32 * r + lane < (unsigned)n; r++)
        atomicAdd(&place[warp][words[first + 32 * r + lane] >> shift & 255], 1);
    __syncthreads();
    int at = starts[threadIdx.x * gridDim.x + blockIdx.x];
    for (int w = 0; w < WARPS; w++) {
        int count = place[w][threadIdx.x];
        place[w][threadIdx.x] = at;
        at += count;
    }
    __syncthreads();
    for (int r = 0; r < rounds && first + 32 * r < (unsigned)n; r++) {      // the whole warp goes on or stops
        unsigned i = first + 32 * r + lane;
        word key = i < (unsigned)n ? words[i] : 0;                  // lanes past the end are above all others, in the last round:
        int to = take_place(place[warp], key >> shift & 255);       // nobody comes behind them
        if (i < (unsigned)n) {
            moved_order[to] = shift > 0 ? order[i] : i;             // the first pass finds the indices in order
            if (shift + 8 < 8 * (int)sizeof(word))                  // after the last pass only they are wanted
                moved_words[to] = key;
        }
    }
}
