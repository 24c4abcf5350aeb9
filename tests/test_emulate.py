"""The emulator of CUDA kernels: right kernels run silently in every mode and order, and every planted bug is told in some."""
import functools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import emulate
from tinydet.emulate import KernelError

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
ORDERS = ("forward", "reverse", "random")
SANITIZED = ("address", "thread", "thread blocks")
i32, f32 = np.int32, np.float32


# Kernels that are right, each with a function that takes launch(grid, block, values) and says whether the answer is right

MATMUL = """extern "C" __global__
void matmul(const real* a, const real* b, real* c, int M, int N, int K)
{
    __shared__ real A[16][16], B[16][16];
    int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, col = blockIdx.x * 16 + x;
    real sum = 0;
    for (int k = 0; k < K; k += 16) {
        A[y][x] = row < M && k + x < K ? a[row * K + k + x] : 0;
        B[y][x] = col < N && k + y < K ? b[(k + y) * N + col] : 0;
        __syncthreads();        // loaded
        #pragma unroll
        for (int i = 0; i < 16; i++) sum += A[y][i] * B[i][x];
        __syncthreads();        // used
    }
    if (row < M && col < N) c[row * N + col] = sum;
}
"""

SUM = """extern "C" __global__
void sum(const real* x, real* total, int n)
{
    __shared__ real part[8];
    int i = blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x % 32;
    real v = i < n ? x[i] : 0;
    for (int by = 16; by; by /= 2) v += __shfl_down_sync(0xffffffff, v, by);
    if (lane == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = lane < 8 ? part[lane] : 0;
        for (int by = 4; by; by /= 2) v += __shfl_xor_sync(0xffffffff, v, by);
        if (lane == 0) atomicAdd(total, v);
    }
}
"""

COUNT = """extern "C" __global__
void count(const int* x, int* counts, int n)
{
    __shared__ int positive;
    if (threadIdx.x == 0) positive = 0;
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && x[i] > 0) atomicAdd(&positive, 1);
    __syncthreads();
    if (threadIdx.x == 0) counts[blockIdx.x] = positive;
}
"""

FOURS = """extern "C" __global__
void fours(const float* x, float* y, int n)
{
    __shared__ float4 held[64];
    int i = blockIdx.x * 64 + threadIdx.x, reader = threadIdx.x ^ 31;
    if (i < n) held[threadIdx.x] = *(const float4*)(x + 4 * i);
    __syncwarp();
    if (i - (int)threadIdx.x + reader < n) ((float4*)y)[i - threadIdx.x + reader] = held[reader];
}
"""

LAST = """__device__ unsigned arrived;
extern "C" __global__
void last(const double* x, double* parts, double* total)
{
    __shared__ bool is_last;
    parts[blockIdx.x * 32 + threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x] * 2;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&arrived, 1u) == gridDim.x - 1;
    __syncthreads();
    if (is_last) {
        __threadfence();
        double sum = 0;
        for (int b = 0; b < gridDim.x; b++) sum += parts[b * 32 + threadIdx.x];
        for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(0xffffffff, sum, by);
        if (threadIdx.x == 0) *total = sum, atomicExch(&arrived, 0u);
    }
}
"""


def matmul(launch):
    rng, M, N, K = np.random.default_rng(0), 37, 29, 45
    a, b, c = rng.standard_normal((M, K)).astype(f32), rng.standard_normal((K, N)).astype(f32), np.full((M, N), np.nan, f32)
    launch((2, 3, 1), (16, 16, 1), [a, b, c, i32(M), i32(N), i32(K)])
    return np.allclose(c, a @ b, atol=1e-4)


def total(launch):
    x, y = np.arange(1000, dtype=f32), np.zeros(1, f32)
    launch((4, 1, 1), (256, 1, 1), [x, y, i32(x.size)])
    return y[0] == x.sum()


def count(launch):
    x, y = np.random.default_rng(0).integers(-9, 9, 500, dtype=i32), np.full(8, -1, i32)
    launch((8, 1, 1), (64, 1, 1), [x, y, i32(x.size)])
    return (y == (np.append(x, np.zeros(12)).reshape(8, 64) > 0).sum(1)).all()


def fours(launch):
    x, y = np.arange(400, dtype=f32), np.full(400, np.nan, f32)
    launch((2, 1, 1), (64, 1, 1), [x, y, i32(100)])
    return (x == y).all()


def last(launch):
    x, parts, y = np.arange(160.), np.full(160, np.nan), np.full(1, np.nan)
    launch((5, 1, 1), (32, 1, 1), [x, parts, y])
    return y[0] == 2 * x.sum()


RIGHT = {"matmul": (MATMUL, matmul), "sum": (SUM, total), "count": (COUNT, count), "fours": (FOURS, fours), "last": (LAST, last)}

# Bugs: one change each, and what becomes of the answer in each mode. right: nobody sees it; wrong: a comparison would; told: KernelError.

MODES = (*ORDERS, *SANITIZED)
LOADED, USED, BARRIER = "__syncthreads();        // loaded", "__syncthreads();        // used", "__syncthreads();"
BUGS = {        # kernel, old text, new text;                                                      forward reverse random address thread blocks
    "no barrier after loading": ("matmul", LOADED, "",                                            "wrong wrong wrong wrong told wrong"),
    "no barrier after using": ("matmul", USED, "",                                                "wrong wrong wrong wrong told wrong"),
    "no barrier before reading warp sums": ("sum", BARRIER, "",                                   "wrong right wrong wrong told wrong"),
    "no barrier of the warp": ("fours", "__syncwarp();", "",                                      "wrong wrong wrong wrong told wrong"),
    "no fence before the last block": ("last", "__threadfence();", "",                            "right right right right right told"),
    "a barrier in one branch": ("count", BARRIER, "if (threadIdx.x != 7) __syncthreads();",       "told told told told told told"),
    "a barrier in each branch": ("count", BARRIER, "if (threadIdx.x < 7) __syncthreads();\n else\n __syncthreads();",
                                 "told told told told told told"),
    "return before a barrier": ("sum", "real v = ", "if (i >= n) return; real v = ",              "told told told told told told"),
    "a mask of half a warp": ("sum", "v += __shfl_down_sync(0xffffffff", "v += __shfl_down_sync(0xffff", "told told told told told told"),
    "lanes missing from a shuffle": ("sum", "if (threadIdx.x < 32)", "if (threadIdx.x < 8)",      "told told told told told told"),
    "a lane that waits elsewhere": ("fours", "__syncwarp();", "if (threadIdx.x % 2) __syncwarp();\n else\n __syncwarp();",
                                    "told told told told told told"),
    "a row too many is stored": ("matmul", "if (row < M &&", "if (row <= M &&",                   "told told told told told told"),
    "a row too few is stored": ("matmul", "if (row < M &&", "if (row < M - 1 &&",                 "wrong wrong wrong wrong wrong wrong"),
    "a loop that drops the tail": ("matmul", "k < K; k +=", "k + 16 <= K; k +=",                  "wrong wrong wrong wrong wrong wrong"),
    "one read past an array": ("count", "i < n &&", "i <= n &&",                                  "right right right told right right"),
    "one read past a shared array": ("matmul", "i < 16; i++", "i <= 16; i++",                     "told told told told told told"),
    "a store far outside": ("fours", "((float4*)y)[", "((float4*)y)[(1 << 28) + ",                "told told told told told told"),
    "a misaligned float4": ("fours", "(x + 4 * i)", "(x + 4 * i - (i > 0))",                      "told told told told told told"),
    "a shift by the word's width": ("count", "> 0)", "> 0 >> 32 * (i == 5))",                     "told told told told told told"),
    "a division by zero": ("count", "x[i] > 0)", "x[i] / x[i] > 0)",                              "told told told told told told"),
    "a const array is written": ("count", "int i = ", "*(int*)x = 3; int i = ",                   "told told told told told told"),
    "a count that is not atomic": ("count", "atomicAdd(&positive, 1)", "positive += 1",           "right right right right told right"),
    "blocks add without atomics": ("sum", "atomicAdd(total, v)", "*total += v",                   "right right right right right told"),
    "shared memory of the block before": ("count", "if (threadIdx.x == 0) positive = 0;", "",     "wrong wrong wrong wrong wrong wrong"),
}


def texts():
    """The right kernels and what the bugs make of them: {name: (kernel, text)}."""
    found = {kernel: (kernel, text) for kernel, (text, _) in RIGHT.items()}
    for bug, (kernel, old, new, _) in BUGS.items():
        assert old in RIGHT[kernel][0] and new != old
        found[bug] = kernel, RIGHT[kernel][0].replace(old, new, 1)
    return found


def together(bodies, name="small.cu"):
    """One module of many texts, since one compiler run is cheaper; each begins at line 1, in its own namespace."""
    text = "".join(f'\ninline namespace n{i} {{\n#line 1 "{name}"\n{body}\n}}' for i, body in enumerate(bodies))
    return emulate.module(name, text, {"real": "float"})


def outcomes():
    """Of all these kernels in the mode and order that are set: {name: outcome}."""
    found = {}
    module = together([text.replace(f"void {kernel}(", f"void {kernel}_{i}(") for i, (kernel, text) in enumerate(texts().values())])
    for i, (name, (kernel, _)) in enumerate(texts().items()):
        try:
            found[name] = "right" if RIGHT[kernel][1](functools.partial(module.launch, f"{kernel}_{i}")) else "wrong"
        except KernelError:
            found[name] = "told"
    return found


def expected(mode):
    return {kernel: "right" for kernel in RIGHT} | {bug: row[3].split()[MODES.index(mode)] for bug, row in BUGS.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels_are_silent_and_bugs_are_not(order):
    with emulate.options(order, seed=3):
        assert outcomes() == expected(order)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", SANITIZED)
def test_right_kernels_are_silent_and_bugs_are_not_in_the_sanitizers(mode):
    assert json.loads(run_sanitized(mode, "print(json.dumps(outcomes()))")) == expected(mode)


def test_every_bug_is_seen():
    """The table itself: whatever is right in one mode is not in another."""
    assert all({"wrong", "told"} & set(row[3].split()) for row in BUGS.values())


def run(code, prefix=(), **environment):
    """Output of Python with this code, after this file's own names."""
    here = Path(__file__).resolve().parent
    words = [*prefix, sys.executable, "-c", f"import json; from test_emulate import *; {code}"]
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", **environment}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 66), done.stderr                  # 66: ThreadSanitizer reported races
    return done.stdout


def run_sanitized(mode, code):
    command = emulate.sanitizer_command(mode)
    if isinstance(command, str):
        pytest.skip(command)
    return run(code, command[1], **command[0])


# What a launch does

def build(body, parameters="int* y", name="small.cu", before="", **macros):
    """A module with one kernel `k`, whose first line is line 2."""
    return emulate.module(name, f'{before}extern "C" __global__ void k({parameters}) {{\n{body}\n}}\n', macros)


def test_threads_and_blocks_have_three_dimensions():
    kernels = build("""int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
        y[i] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x + 10000 * threadIdx.y + 100000 * threadIdx.z;
        if (gridDim.x != 4 || gridDim.y != 3 || gridDim.z != 2 || blockDim.x != 7 || blockDim.y != 6 || blockDim.z != 5) y[i] = -1;""")
    bz, by, bx, tz, ty, tx = np.indices((2, 3, 4, 5, 6, 7))
    for order in ORDERS:
        y = np.full(bx.shape, -5, i32)
        with emulate.options(order):
            kernels.launch("k", (4, 3, 2), (7, 6, 5), [y])
        assert_array_equal(y, bx + 10 * by + 100 * bz + 1000 * tx + 10000 * ty + 100000 * tz)


def test_orders_and_seeds():
    """Threads, releases from a barrier and blocks: forward counts up, reverse down, random is a permutation fixed by its seed."""
    kernels = build("y[atomicAdd(n, 1)] = 100 * blockIdx.x + threadIdx.x; __syncthreads();\n"
                    "y[atomicAdd(n, 1)] = 100 * blockIdx.x + threadIdx.x;", "int* y, int* n")

    def run_in(order, seed=0):
        y = np.full(6 * 2 * 64, -1, i32)
        with emulate.options(order, seed):
            kernels.launch("k", (6, 1, 1), (64, 1, 1), [y, np.zeros(1, i32)])
        assert_array_equal(np.sort(y), np.repeat(np.add.outer(100 * np.arange(6), np.arange(64)), 2))
        return y.reshape(6, 2, 64)

    forward = run_in("forward")
    assert_array_equal(forward, np.add.outer(100 * np.arange(6), np.tile(np.arange(64), (2, 1))))
    assert_array_equal(run_in("reverse"), forward[::-1, :, ::-1])
    draws = [run_in("random", seed) for seed in (0, 1, 2, 2)]
    assert_array_equal(draws[2], draws[3])
    assert not (draws[0] == draws[1]).all() and not (draws[1] == draws[2]).all()
    blocks = draws[0][:, 0, 0] // 100
    assert not (np.diff(blocks) > 0).all() and not (draws[0][0, 0] == draws[0][0, 1]).all()
    with pytest.raises(ValueError, match=r"^emulate\.options: order must be one of forward, reverse, random, got 'sideways'$"):
        with emulate.options("sideways"):
            pass
    assert_array_equal(run_in("forward"), forward)


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(order, width):
    """On two warps of doubles, by the programming guide: a source outside the segment leaves the own value."""
    kernels = build("""int t = threadIdx.x;
        y[t] = __shfl_sync(0xffffffff, x[t], from[t], width);
        y[64 + t] = __shfl_up_sync(0xffffffff, x[t], 3, width);
        y[128 + t] = __shfl_down_sync(0xffffffff, x[t], 3, width);
        y[192 + t] = __shfl_xor_sync(0xffffffff, x[t], 5, width);""", "const double* x, const int* from, double* y, int width")
    rng, t = np.random.default_rng(0), np.arange(64)
    x, source, y = rng.standard_normal(64), rng.integers(0, 32, 64, i32), np.full((4, 64), np.nan)
    with emulate.options(order):
        kernels.launch("k", (1, 1, 1), (64, 1, 1), [x, source, y, i32(width)])
    first, at = t // width * width, t % width
    assert_array_equal(y[0], x[first + source % width])
    assert_array_equal(y[1], x[np.where(at >= 3, t - 3, t)])
    assert_array_equal(y[2], x[np.where(at + 3 < width, t + 3, t)])
    assert_array_equal(y[3], x[np.where((t ^ 5) < first + width, t ^ 5, t)])


@pytest.mark.parametrize("order", ORDERS)
def test_votes_and_sums_of_warps_and_blocks(order):
    kernels = build("""int t = threadIdx.x, yes = x[t] > 0;
        int got[] = {(int)__ballot_sync(0xffffffff, yes), __any_sync(0xffffffff, yes), __all_sync(0xffffffff, yes),
                     __reduce_add_sync(0xffffffff, x[t]), __reduce_min_sync(0xffffffff, x[t]), __reduce_max_sync(0xffffffff, x[t]),
                     __syncthreads_count(yes), __syncthreads_or(yes), __syncthreads_and(yes)};
        for (int i = 0; i < 9; i++) y[96 * i + t] = got[i];""", "const int* x, int* y")
    x = np.concatenate([np.random.default_rng(0).integers(-9, 9, 32), np.arange(1, 33), np.arange(-32, 0)]).astype(i32)
    for values in (x, abs(x) + 1, -abs(x)):
        y, w = np.full((9, 3, 32), -77, i32), values.reshape(3, 32)
        with emulate.options(order, seed=5):
            kernels.launch("k", (1, 1, 1), (96, 1, 1), [values, y])
        ballot = ((w > 0) << np.arange(32)).sum(1).astype(np.uint32).view(i32)
        blocks = [(w > 0).sum(), (w > 0).any(), (w > 0).all()]
        rows = [ballot, (w > 0).any(1), (w > 0).all(1), w.sum(1), w.min(1), w.max(1), *(np.full(3, b) for b in blocks)]
        assert_array_equal(y, np.broadcast_to(np.array(rows, i32)[:, :, None], y.shape))


def test_halves_of_a_warp_can_meet_apart_and_absent_lanes_deliver_nan():
    kernels = build("""int t = threadIdx.x;
        if (t < 16) y[t] = __shfl_xor_sync(0xffff, t, 1); else y[t] = __shfl_xor_sync(0xffff0000, t, 2);""")
    y = np.full(32, -5, i32)
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [y])
    assert_array_equal(y, np.arange(32) ^ np.repeat([1, 2], 16))
    kernels = build("y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);", "const float* x, float* y")
    x, y = np.arange(5, dtype=f32), np.zeros(5, f32)
    kernels.launch("k", (1, 1, 1), (5, 1, 1), [x, y])
    assert_array_equal(y, [1, 0, 3, 2, np.nan])


def test_shared_memory_is_unset_in_every_block():
    """Static and dynamic: all ones, so NaN or -1, though the block before wrote to it."""
    kernels = build("""__shared__ float a[64]; DYN_SHARED(int, b);
        x[blockIdx.x * 64 + threadIdx.x] = a[threadIdx.x]; y[blockIdx.x * 64 + threadIdx.x] = b[threadIdx.x];
        a[threadIdx.x] = b[threadIdx.x] = 7;""", "float* x, int* y")
    x, y = np.zeros((3, 64), f32), np.zeros((3, 64), i32)
    kernels.launch("k", (3, 1, 1), (64, 1, 1), [x, y], 64 * 4)
    assert np.isnan(x).all() and (y == -1).all()
    with pytest.raises(KernelError, match=r"k: a thread of block \(0,0,0\) wrote outside the dynamic shared memory$"):
        kernels.launch("k", (3, 1, 1), (64, 1, 1), [x, y], 63 * 4)
    largest = build("DYN_SHARED(double, b); b[threadIdx.x * (int)(n / 8 - 1)] = 1; y[threadIdx.x] = sizeof b;", "int* y, int n")
    largest.launch("k", (1, 1, 1), (2, 1, 1), [y, i32(227 << 10)], 227 << 10)


def test_atomics_count_and_return_the_old_value():
    kernels = build("""int t = threadIdx.x;
        old[t] = atomicAdd(&i[0], 2); atomicMax(&i[1], t); atomicMin(&i[2], -t);
        atomicOr(&i[3], 1 << t % 31); atomicAnd(&i[4], ~(1 << t % 31));
        atomicXor(&i[5], t); atomicExch(&i[6], t); atomicCAS(&i[7], t, t + 1); atomicSub(&i[8], t);
        atomicAdd(f, 0.5f); atomicAdd(d, 0.25); atomicAdd(u, 1ull << 40); atomicInc(w, 9u); atomicDec(w + 1, 9u);""",
                    "int* old, int* i, float* f, double* d, unsigned long long* u, unsigned* w")
    old, i, f, d = np.zeros(64, i32), np.array([0, 0, 0, 0, -1, 0, -1, 3, 0], i32), np.zeros(1, f32), np.zeros(1)
    u, w = np.zeros(1, np.uint64), np.zeros(2, np.uint32)
    with emulate.options("random", seed=1):
        kernels.launch("k", (1, 1, 1), (64, 1, 1), [old, i, f, d, u, w])
    assert_array_equal(np.sort(old), 2 * np.arange(64))
    assert not (np.diff(old) > 0).all()
    assert_array_equal(np.delete(i, [6, 7]), [128, 63, -63, 2**31 - 1, -2**31, 0, -2016])
    assert 0 <= i[6] < 64 and i[7] > 3 and (f[0], d[0], u[0], w[0], w[1]) == (32, 16, 2**46, 64 % 10, 10 - 64 % 10 if 64 % 10 else 0)


@pytest.mark.parametrize("real, dtype", [("float", f32), ("double", np.float64)])
def test_mathematics_in_both_precisions(real, dtype):
    """Every function takes real and answers in it: a result in the other precision would not be equal."""
    a, b = dtype(0.3125), dtype(-1.75)
    unary = ("exp exp2 expm1 log log2 log10 log1p sqrt cbrt sin cos tan asin acos atan sinh cosh tanh "
             "floor ceil trunc rint fabs").split()
    binary = {"pow": np.power, "fmod": np.fmod, "atan2": np.arctan2, "hypot": np.hypot, "copysign": np.copysign, "fmin": np.fmin,
              "fmax": np.fmax, "min": np.fmin, "max": np.fmax}
    told = [f"static_assert(sizeof {f}(a) == sizeof(real)); y[{i}] = {f}(a);" for i, f in enumerate(unary)]
    told += [f"static_assert(sizeof {f}(a, b) == sizeof(real)); y[{len(unary) + i}] = {f}(a, b);" for i, f in enumerate(binary)]
    others = {"fma(a, b, real(1))": a * b + 1, "rsqrt(a)": 1 / np.sqrt(a), "abs(-a)": a, "erf(a)": math.erf(a)}
    told += [f"y[{len(told) + i}] = {each};" for i, each in enumerate(others)]
    kernels = build("\n".join(told), "real* y, real a, real b", real=real)
    y = np.zeros(len(told), dtype)
    kernels.launch("k", (1, 1, 1), (1, 1, 1), [y, a, b])
    numpy = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
    expected = [getattr(np, numpy.get(f, f))(a) for f in unary] + [f(a, b) for f in binary.values()] + [*others.values()]
    assert_allclose(y, expected, rtol=4 * np.finfo(dtype).eps)
    kernels = build("""real one = 1, nan = __int_as_float(0x7fffffff), infinite = 1 / (one - 1);
        y[0] = max(nan, one); y[1] = fmax(one, nan); y[2] = isnan(nan) && !isnan(one); y[3] = min(nan, real(2));
        y[4] = isfinite(one) && !isfinite(infinite) && !isfinite(nan) && isinf(infinite);
        y[5] = signbit(real(-0.0));""", "real* y", real=real)
    kernels.launch("k", (1, 1, 1), (1, 1, 1), [y])
    assert_array_equal(y[:6], [1, 1, 1, 2, 1, 1])


def test_integers_and_bits():
    kernels = build("""unsigned u = 0x12345678u; long long l = 1ll << 40;
        long long got[] = {__popc(u), __popcll(l - 1), __clz(1), __clz(0), __clzll(l), __ffs(8), __ffs(0), __ffsll(l),
            __brev(1), __umulhi(u, 16), min(-1, 2), max(3u, 2u), max(l, 5ll), min(7ull, 8ull), abs(-4),
            __float_as_int(1.f), __float_as_uint(-0.f), __double_as_longlong(1.), __float2int_rn(2.5f), __float2int_rd(-2.5f),
            (long long)__longlong_as_double(__double_as_longlong(9)), (long long)__uint_as_float(0x40000000u), __ldg(&u), warpSize,
            make_int4(1, 2, 3, 4).w, make_float2(5, 6).y > 5.5f};
        for (int i = 0; i < sizeof got / 8; i++) y[i] = got[i];""", "long long* y")
    y = np.full(27, -99, np.int64)
    kernels.launch("k", (1, 1, 1), (1, 1, 1), [y])
    assert_array_equal(y, [13, 40, 31, 32, 23, 4, 0, 41, 2**31, 1, -1, 3, 2**40, 7, 4, 0x3f800000, 2**31, 0x3ff << 52, 2, -3, 9, 2,
                           0x12345678, 32, 4, 1, -99])


def test_arrays_in_place_empty_null_and_overlapping():
    kernels = build("int t = threadIdx.x; if (x && t < n) y[t] = x[t] + 1;", "const float* x, float* y, int n")
    y = np.arange(8, dtype=f32)
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [y, y, i32(8)])
    assert_array_equal(y, np.arange(1, 9))
    swapped = build("y[threadIdx.x] += x[threadIdx.x];", "float* y, const float* x")
    swapped.launch("k", (1, 1, 1), (8, 1, 1), [y, y])
    assert_array_equal(y, 2 * np.arange(1, 9))
    y /= 2
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [np.empty(0, f32), np.empty((3, 0), f32), i32(0)])
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [y[3:3], y, i32(0)])
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [None, y, i32(8)])
    kernels.launch("k", (1, 1, 1), (32, 1, 1), [y[:4], y[4:], i32(4)])
    assert_array_equal(y, [1, 2, 3, 4, 2, 3, 4, 5])
    with pytest.raises(KernelError, match=r"^emulate\.launch: small\.cu: k: x and y overlap$"):
        kernels.launch("k", (1, 1, 1), (32, 1, 1), [y[:5], y[1:6], i32(1)])
    assert_array_equal(y, [1, 2, 3, 4, 2, 3, 4, 5])
    both = build("y[0] = a[0] + b[0];", "const float* a, const float* b, float* y")
    both.launch("k", (1, 1, 1), (1, 1, 1), [y, y[2:], np.zeros(1, f32)])


def test_copies_are_aligned_as_their_arrays_are():
    kernels = build("*y = x[0];", "const float4* x, float4* y")
    x = np.arange(32, dtype=f32)
    start = -x.ctypes.data % 16 // 4
    kernels.launch("k", (1, 1, 1), (1, 1, 1), [x[start + 4:][:8], x[start + 16:][:4]])
    assert_array_equal(x[start + 16:][:4], x[start + 4:][:4])
    for first, second in (5, 16), (4, 18):
        with pytest.raises(KernelError, match=r"small\.cu:2: address 0x\w+ of '(const )?struct float4' must be a multiple of 16$"):
            kernels.launch("k", (1, 1, 1), (1, 1, 1), [x[start + first:][:4], x[start + second:][:4]])


def test_types_of_parameters():
    kernels = emulate.module("types.cu", """
        // extern "C" __global__ void gone(int x)
        extern "C" __global__ void __launch_bounds__(256, 2) k(const float4 * __restrict__ a, unsigned char* b, /* of rows */ bool c,
            unsigned long long d, short const* e, double f, int g[]) {}
        extern "C" __global__ void none() {}""")
    assert kernels.kernels == {
        "k": [("a", True, True, f32), ("b", True, False, np.uint8), ("c", False, False, bool), ("d", False, False, np.uint64),
              ("e", True, True, np.int16), ("f", False, False, np.float64), ("g", True, False, i32)], "none": []}
    kernels.launch("none", (1, 1, 1), (1, 1, 1), [])


# What is refused

def test_values_that_do_not_fit():
    kernels = build("", "const float* x, double* y, int n")
    x, y = np.zeros(4, f32), np.zeros(4)
    readonly = y.copy()
    readonly.flags.writeable = False

    def refused(error, text, *values, grid=(1, 1, 1), block=(1, 1, 1), kernel="k", shared=0):
        with pytest.raises(error) as caught:
            kernels.launch(kernel, grid, block, list(values), shared)
        assert str(caught.value) == f"emulate.launch: {text}"
    refused(ValueError, "kernel must be one of k in small.cu, got 'j'", kernel="j")
    refused(TypeError, "small.cu: k takes 3 values (x, y, n), got 2", x, y)
    refused(TypeError, "small.cu: k: x must be an array of float32, got ndarray float64", y, y, i32(1))
    refused(TypeError, "small.cu: k: x must be an array of float32, got float32 float32", f32(1), y, i32(1))
    refused(TypeError, "small.cu: k: x must be an array of float32, got list ", [1.], y, i32(1))
    refused(TypeError, "small.cu: k: n must be a number of int32, got int ", x, y, 1)
    refused(TypeError, "small.cu: k: n must be a number of int32, got int64 int64", x, y, np.int64(1))
    refused(TypeError, "small.cu: k: n must be a number of int32, got ndarray int32", x, y, np.array(1, i32))
    refused(ValueError, "small.cu: k: x must be C-contiguous", np.zeros(8, f32)[::2], y, i32(1))
    refused(ValueError, "small.cu: k: y must be C-contiguous and writable", x, readonly, i32(1))
    refused(TypeError, "grid and block must be three integers, shared one, got (1, 1), (1, 1, 1), 0", x, y, i32(1), grid=(1, 1))
    refused(TypeError, "grid and block must be three integers, shared one, got (1, 1, 1), (1, 1, 0.5), 0", x, y, i32(1), block=(1, 1, .5))
    kernels.launch("k", (1, 1, 1), (1, 1, 1), [x, y, i32(1)])


@pytest.mark.parametrize("what, value, text", [
    ("grid", (0, 1, 1), "grid must be 1 .. 2147483647, 1 .. 65535, 1 .. 65535, got 0, 1, 1"), ("grid", (1, 65536, 1), "grid must be"),
    ("grid", (1, 1, 65536), "grid must be"), ("grid", (2**31, 1, 1), "grid must be"), ("grid", (1, -1, 1), "grid must be"),
    ("block", (1025, 1, 1), "block must be 1 .. 1024, 1 .. 1024, 1 .. 64, at most 1024 threads, got 1025, 1, 1"),
    ("block", (32, 33, 1), "block must be"), ("block", (1, 1, 65), "block must be"), ("block", (0, 1, 1), "block must be"),
    ("shared", 227 * 1024 + 1, "shared must be 0 .. 232448 bytes, got 232449"), ("shared", -1, "shared must be")])
def test_limits(what, value, text):
    kernels = build("atomicAdd(y, 1);")
    y = np.zeros(1, i32)
    with pytest.raises(KernelError) as caught:
        kernels.launch("k", **{"grid": (1, 1, 1), "block": (1, 1, 1), "values": [y], what: value})
    assert str(caught.value).startswith(f"emulate.launch: small.cu: k: {text}")
    kernels.launch("k", (2, 65535, 1), (1, 1, 1), [y])
    kernels.launch("k", (1, 1, 65535), (1, 1, 1), [y])
    kernels.launch("k", (1, 1, 1), (16, 1, 64), [y])
    assert y[0] == 3 * 65535 + 1024


# What is told

REPORTS = [           # body of a kernel, its first line is line 2; report
    ("if (threadIdx.x != 3)\n__syncthreads();", "block (0,0,0) thread (3,0,0): it returned while others wait at the barrier in line 3"),
    ("if (threadIdx.x == 0) return;\n__syncthreads();",
     "block (0,0,0) thread (1,0,0) small.cu:3: it waits at a barrier, but thread (0,0,0) has returned"),
    ("if (threadIdx.x < 2) __syncthreads(); else\n__syncthreads();",
     "block (0,0,0) thread (2,0,0) small.cu:3: it waits at this barrier, others at the one in line 2"),
    ("if (threadIdx.x != 3) __syncwarp();",
     "block (0,0,0) thread (3,0,0): it returned while thread (0,0,0) waits for it in line 2, mask ffffffff"),
    ("if (threadIdx.x == 0) return;\n__syncwarp();",
     "block (0,0,0) thread (1,0,0) small.cu:3: it waits for thread (0,0,0), which has returned"),
    ("__syncwarp(threadIdx.x % 32 ? 0xffffffff : 3);",
     "block (0,0,0) thread (1,0,0) small.cu:2: it waits here with mask ffffffff, thread (0,0,0) in line 2 with mask 00000003"),
    ("if (threadIdx.x == 9) __syncwarp(); else\n__syncwarp();",
     "block (0,0,0) thread (9,0,0) small.cu:2: it waits here with mask ffffffff, thread (0,0,0) in line 3 with mask ffffffff"),
    ("__syncwarp(threadIdx.x ? 0xffffffff : 1);__syncwarp(~1u << (threadIdx.x == 0));",
     "block (0,0,0) thread (0,0,0) small.cu:2: mask fffffffc of a warp collective must name its caller, lane 0"),
    ("if (threadIdx.x % 32 == 4) __syncthreads(); else\n__syncwarp();\n__syncthreads();",
     "block (0,0,0) thread (63,0,0) small.cu:3: deadlock, it waits for lanes 00000010 of its warp, thread (36,0,0) at the barrier in line 2"),
    ("if (threadIdx.x % 32 == 0) __syncwarp(3); else __syncwarp(~1u);",
     "block (0,0,0) thread (1,0,0): it returned while thread (0,0,0) waits for it in line 2, mask 00000003"),
    ("__shared__ int a[4][8];\ny[a[1][threadIdx.x]] = 0;", "block (0,0,0) thread (8,0,0) small.cu:3: index 8 lies outside 'int [8]'"),
    ("__shared__ int a[4][8];\ny[a[1][threadIdx.x - 1]] = 0;",
     "block (0,0,0) thread (0,0,0) small.cu:3: index 4294967295 lies outside 'int [8]'"),
    ("int a[4] = {};\ny[0] = a[(int)threadIdx.x - 3];", "block (0,0,0) thread (0,0,0) small.cu:3: index -3 lies outside 'int [4]'"),
    ("assert(threadIdx.x < 5);", "block (0,0,0) thread (5,0,0) small.cu:2: assert(threadIdx.x < 5) failed"),
    ("y[0] /= threadIdx.x - 5;", "block (0,0,0) thread (5,0,0) small.cu:2: it divides an integer by 0"),
    ("y[0] = 1 << (threadIdx.x + 20);", "block (0,0,0) thread (12,0,0) small.cu:2: it shifts 'int' by 32 bits"),
    ("int* p = 0; if (threadIdx.x == 7)\np[0] = 1;", "block (0,0,0) thread (7,0,0) small.cu:3: it uses a null pointer to 'int'"),
    ("y[64] = 1;", "a thread wrote outside y, to byte 256 of 256 (mode 'address' tells where)"),
    ("y[-1] = 1;", "a thread wrote outside y, to byte -4 of 256 (mode 'address' tells where)"),
    ("y[threadIdx.x + 256] = 1;", "a thread wrote outside y, to byte 1024 of 256 (mode 'address' tells where)")]


@pytest.mark.parametrize("i", range(len(REPORTS)))
def test_reports_name_thread_and_line(i):
    kernels = together([f'extern "C" __global__ void k{i}(int* y) {{\n{body}\n}}' for i, (body, _) in enumerate(REPORTS)])
    y = np.ones(64, i32)
    with pytest.raises(KernelError) as caught:
        kernels.launch(f"k{i}", (1, 1, 1), (64, 1, 1), [y])
    assert str(caught.value) == f"emulate.launch: small.cu: k{i}: {REPORTS[i][1]}"
    assert_array_equal(y, np.ones(64))                              # a launch that fails changes nothing


def test_crashes_become_reports_and_the_next_launch_works():
    deep = "__device__ int deep(int n) { volatile char a[1000]; a[n % 1000] = n; return n ? deep(n - 1) + a[n % 1000] : 0; }\n"
    body = "if (n == 0) y[threadIdx.x] = 1;\nelse if (n == 1)\ny[1ll << 40] = 1;\nelse y[0] = deep(n);"
    kernels = build(body, "int* y, int n", before=deep)
    wild = r"thread \(0,0,0\): it touches memory at 0x\w+, in no array, in small\.cu:5$"
    for n, told in (1, wild), (5000, r"its stack of 256 KB overflows, in small\.cu:1$"):
        for _ in range(3):
            with pytest.raises(KernelError, match=told):
                kernels.launch("k", (1, 1, 1), (64, 1, 1), [np.zeros(64, i32), i32(n)])
            y = np.zeros(64, i32)
            kernels.launch("k", (1, 1, 1), (64, 1, 1), [y, i32(0)])
            assert (y == 1).all()
    waiting = build("__syncthreads(); if (threadIdx.x == n) return; __syncthreads();\n"
                    "y[threadIdx.x] = __syncthreads_count(1);", "int* y, int n")
    for n in (5, -1, 0, -1):
        y = np.zeros(64, i32)
        if n < 0:
            waiting.launch("k", (1, 1, 1), (64, 1, 1), [y, i32(n)])
            assert (y == 64).all()
        else:
            with pytest.raises(KernelError, match="has returned|it returned"):
                waiting.launch("k", (1, 1, 1), (64, 1, 1), [y, i32(n)])


def test_printf():
    """Seen when the launch ends, also in a file or pipe."""
    kernel = r"""build(r'printf("%d of %d\n", threadIdx.x, n);', "int n")"""
    told = run(f'{kernel}.launch("k", (1, 1, 1), (3, 1, 1), [i32(3)]); os.write(1, b"after")', PYTHONUNBUFFERED="")
    assert told == "0 of 3\n1 of 3\n2 of 3\nafter"


def test_switches_without_assembly(monkeypatch):
    """On other processors than x86-64."""
    monkeypatch.setitem(emulate.MODES, "ucontext", ["-O1", "-DEMULATE_UCONTEXT"])
    monkeypatch.setenv("TINYDET_EMULATED_MODE", "ucontext")
    assert outcomes() == expected("forward")


# Compiling

def test_compile_errors_name_the_line():
    told = r"^emulate\.module: small\.cu must compile, g\+\+ says:\n(.*\n)*small\.cu:3:5: error: .*undeclared_name"
    with pytest.raises(KernelError, match=told):
        build("\n    undeclared_name = 1;")


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"^emulate\.module: mode must be one of plain, debug, address, thread, thread blocks, got 'fast'$"):
        emulate.module("count.cu", COUNT, mode="fast")
    told = r"^emulate\.module: mode 'thread' needs Python started as emulate\.sanitizer_command\('thread'\) says$"
    with pytest.raises(RuntimeError, match=told):
        emulate.module("count.cu", COUNT, mode="thread")
    monkeypatch.setenv("TINYDET_EMULATED_MODE", "slow")
    with pytest.raises(ValueError, match="got 'slow'$"):
        emulate.module("count.cu", COUNT)
    monkeypatch.delenv("TINYDET_EMULATED_MODE")
    monkeypatch.setenv("PATH", "")
    assert emulate.missing() == emulate.sanitizer_command("address") == "the emulator of CUDA kernels needs g++ on the PATH"
    with pytest.raises(RuntimeError, match=r"^emulate\.module: the emulator of CUDA kernels needs g\+\+ on the PATH$"):
        emulate.module("new.cu", COUNT)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert emulate.missing() == "the emulator of CUDA kernels needs Linux"


def test_several_modules_at_once():
    wanted = [(f"{name}.cu", RIGHT[name][0], {"real": "float"}, "// before it\n") for name in ("sum", "fours", "last")]
    with ThreadPoolExecutor() as pool:
        modules = list(pool.map(lambda each: emulate.module(*each[:3], prelude=each[3]), wanted))
    for module, name in zip(modules, ("sum", "fours", "last")):
        assert module.name == f"{name}.cu" and RIGHT[name][1](functools.partial(module.launch, name))
    assert emulate.module(*wanted[0][:3], prelude=wanted[0][3]) is emulate.module(*wanted[0][:3], prelude=wanted[0][3])


def test_a_prelude_shifts_no_line():
    text = 'extern "C" __global__ void k(integer* y) {\n assert(*y == N); }'
    module = emulate.module("k.cu", text, {"N": 2}, prelude="typedef int integer;\n\n")
    with pytest.raises(KernelError, match="k.cu:2: assert"):
        module.launch("k", (1, 1, 1), (1, 1, 1), [np.zeros(1, i32)])


def test_libraries_are_kept_by_content(tmp_path):
    """Two processes at once build one; a third compiles nothing; another header, macro, mode, prelude or text compiles anew."""
    cache, header = tmp_path / "cache", tmp_path / "other.h"
    environment = {"TINYDET_CACHE": str(cache), "TINYDET_EMULATED_MODE": ""}
    code = "assert count(functools.partial(emulate.module('count.cu', COUNT, {'A': 1}).launch, 'count'))"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run(code, **environment), range(2)))
    [library] = cache.iterdir()
    written = library.stat().st_mtime_ns
    no_compiler = ("start = subprocess.run; "
                   "subprocess.run = lambda words, **_: start(words, **_) if '-dumpfullversion' in words else 1 / 0; ")
    run(no_compiler + code, **environment)
    assert library.stat().st_mtime_ns == written and list(cache.iterdir()) == [library]
    header.write_text(emulate.HEADER.read_text() + "// changed\n")
    run("from pathlib import Path; emulate.module('count.cu', COUNT, {'A': 2}); emulate.module('count.cu', COUNT, {'A': 1}, 'debug');"
        "emulate.module('count.cu', COUNT + ' ', {'A': 1}); emulate.module('count.cu', COUNT, {'A': 1}, prelude=' ');"
        f"emulate.HEADER = Path({str(header)!r}); {code}", **environment)
    assert len(list(cache.iterdir())) == 6


def test_no_leftovers_of_a_failed_build_and_no_need_of_a_home(tmp_path):
    failed = "import pytest\nwith pytest.raises(KernelError): emulate.module('bad.cu', 'bad')\n"
    run(failed, TINYDET_CACHE=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run("assert count(functools.partial(emulate.module('count.cu', COUNT).launch, 'count'))",
        TINYDET_CACHE=str(tmp_path / "file"), TMPDIR=str(temporary))
    assert not list(temporary.iterdir())                            # where it was kept until Python ended
