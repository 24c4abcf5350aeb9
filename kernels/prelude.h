// Stands before the text of every kernel file, put there by tinydet/cuda.py and never included: NVRTC finds no headers, and CuPy's
// cache looks at the text alone. kernels/cuda_on_cpu.h has the same names for the CPU (TINY_HOST).
//
// DYN_SHARED(T, name): name, a T* to the dynamic shared memory of the block (the `shared` bytes of the launch), 16-byte aligned.
// block_sum(value, sums): in thread 0, the sum over a block of 256 threads, in an order that never changes. All threads call it; sums:
// eight numbers of shared memory, declared by the kernel.

#ifndef TINY_HOST
#define DYN_SHARED(T, name) extern __shared__ __align__(16) unsigned char name##_raw[]; T* name = (T*)name##_raw
#endif
typedef unsigned char u8;
typedef unsigned short u16;
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

template <class T>
static __device__ __forceinline__ T block_sum(T sum, T* sums)
{
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_down_sync(0xffffffff, sum, d);
    if (threadIdx.x % 32 == 0)
        sums[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 1; w < 8 && threadIdx.x == 0; w++)
        sum += sums[w];
    return sum;
}
