// Global max pooling. real is float or double. Python side: tinydet/ops/global_max_pool.py
// variants: real=float; real=double
//
// global_max_pool_forward   y[n,c] = max_p x[n,p,c] over the positions p < P that mask allows, argmax its p; the first wins a tie, the
//   first NaN wins. With none allowed y is NaN, argmax -1. Block 32 x LANES: 32 channels of an image, each of the LANES takes every
//   LANES-th position, then one the best of them; grid N * ceil(C / 32), static shared memory 4 (float) or 6 KB.
//   mask: bool (N, P, M), M = C, or 1 where a channel serves all, or 0 where there is none and all are allowed.
// global_max_pool_backward  dx[n,p,c] = dy[n,c] where p is argmax[n,c], else 0: one thread per element, grid ceil(N*P*C / 256)

#define LANES 16

// Whether value at place wins over best at `at`; -1: nothing there yet.
static __device__ bool global_max_pool_wins(real value, int place, real best, int at)
{
    if (place < 0 || at < 0) return at < 0 && place >= 0;
    if (value == best || (value != value && best != best)) return place < at;
    return value > best || value != value;
}

extern "C" __global__
void __launch_bounds__(512) global_max_pool_forward(const real* x, const bool* mask, real* y, int* argmax, int P, int C, int M)
{
    __shared__ real value[LANES][32];
    __shared__ int place[LANES][32];
    int slabs = (C + 31) / 32, n = blockIdx.x / slabs, c = blockIdx.x % slabs * 32 + threadIdx.x, lane = threadIdx.y;
    real best = NOT_A_NUMBER;
    int at = -1;
    if (c < C)
        for (int p = lane; p < P; p += LANES) {
            real v = x[(n * P + p) * C + c];
            if ((M == 0 || mask[(n * P + p) * M + (M == 1 ? 0 : c)]) && global_max_pool_wins(v, p, best, at)) {
                best = v;
                at = p;
            }
        }
    value[lane][threadIdx.x] = best;
    place[lane][threadIdx.x] = at;
    __syncthreads();
    if (lane == 0 && c < C) {
        for (int k = 1; k < LANES; k++)
            if (global_max_pool_wins(value[k][threadIdx.x], place[k][threadIdx.x], best, at)) {
                best = value[k][threadIdx.x];
                at = place[k][threadIdx.x];
            }
        y[n * C + c] = best;
        argmax[n * C + c] = at;
    }
}

extern "C" __global__
void global_max_pool_backward(const real* dy, const int* argmax, real* dx, int size, int P, int C)
{
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= (unsigned)size) return;
    int p = t / C % P, k = t / C / P * C + t % C;                   // k: n, c
    dx[t] = p == argmax[k] ? dy[k] : real(0);
}
