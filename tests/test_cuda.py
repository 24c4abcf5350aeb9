"""The kernels' text runs on the CPU: g++ compiles it behind a few lines that stand for CUDA, and a loop runs every thread."""
import ctypes
import functools
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import seeds
from tinydet import cuda

SHIM = """
#include <algorithm>
#define __global__
using std::min; using std::max;
struct Index { unsigned x = 0, y = 0, z = 0; };
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
"""
RUN = """
extern "C" void run_%(name)s(unsigned grid, unsigned block, %(parameters)s) {
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++)
            %(name)s(%(arguments)s);
}
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Function: the kernels of a file, compiled with these macros, as a ctypes library that has run_<kernel>(grid, block, ...)."""
    folder = tmp_path_factory.mktemp("kernels")

    @functools.cache
    def build(file, **macros):
        text, out = cuda.source(file), folder / f"{file}{len(list(folder.iterdir()))}.so"
        for name, parameters in re.findall(r"__global__\s+void (\w+)\(([^)]*)\)", text):
            arguments = ", ".join(p.split()[-1] for p in parameters.split(","))
            text += RUN % {"name": name, "parameters": parameters, "arguments": arguments}
        options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
        options += [f"-D{k}={v}" for k, v in macros.items()]
        done = subprocess.run(["g++", *options, "-x", "c++", "-", "-o", out], input=SHIM + text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(out))
    return build


def launch(kernel, args, threads, block=256):
    """Run a kernel on arrays, then integers, with ceil(threads / block) blocks. The arrays lie between guards while it runs."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    guarded = [np.concatenate([guard := np.full(64, 77, a.dtype), a.ravel(), guard]) for a in arrays]
    pointers = (g[64:].ctypes.data_as(ctypes.c_void_p) for g in guarded)
    kernel(-(-threads // block), block, *pointers, *map(ctypes.c_int, args[len(arrays):]))
    for a, g in zip(arrays, guarded):
        assert (g[:64] == 77).all() and (g[64 + a.size:] == 77).all(), "written outside the array"
        a[...] = g[64:64 + a.size].reshape(a.shape)


# max_pool.cu

def by_definition(x, dy, size, stride, top, left):
    """Output, argmax and dx of max pooling in nested loops; dy (N, oh, ow, C) says how many windows there are."""
    y, argmax, dx = np.empty_like(dy), np.empty(dy.shape, int), np.zeros_like(x)
    for n, i, j, c in np.ndindex(dy.shape):
        inside = [(u, v) for u in range(size) for v in range(size)
                  if 0 <= i * stride + u - top < x.shape[1] and 0 <= j * stride + v - left < x.shape[2]]
        values = np.array([x[n, i * stride + u - top, j * stride + v - left, c] for u, v in inside])
        u, v = inside[values.argmax()]                              # the first of the largest; the first NaN if there is one
        y[n, i, j, c], argmax[n, i, j, c] = values.max(), u * size + v
        dx[n, i * stride + u - top, j * stride + v - left, c] += dy[n, i, j, c]
    return y, argmax, dx


def check_max_pool(kernels, x, size, stride, top=0, left=0, oh=None, ow=None):
    N, H, W, C = x.shape
    oh, ow = oh or (H + top - size) // stride + 1, ow or (W + left - size) // stride + 1
    dtype = np.min_scalar_type(size * size - 1)
    run = kernels("max_pool.cu", real={"float32": "float", "float64": "double"}[x.dtype.name],
                  index_t={"uint8": "unsigned char", "uint16": "unsigned short"}[dtype.name])
    dy = np.random.default_rng(0).integers(-8, 9, (N, oh, ow, C)).astype(x.dtype)                  # sums of integers are exact
    y, argmax, dx = np.full_like(dy, 55), np.full(dy.shape, 201, dtype), np.full_like(x, 55)
    sizes = (N, H, W, C, oh, ow, size, stride, top, left)
    launch(run.run_max_pool_forward, (x, y, argmax, *sizes), threads=y.size)
    launch(run.run_max_pool_backward, (dy, argmax, dx, *sizes), threads=x.size)
    expected = by_definition(x, dy, size, stride, top, left)
    assert_array_equal(y, expected[0], strict=True)
    assert_array_equal(argmax, expected[1])
    assert_array_equal(dx, expected[2], strict=True)


pairs = st.tuples(st.integers(0, 3), st.integers(0, 3))


def ties_and_nans(rng, shape, dtype):
    return rng.choice([-np.inf, -1, 0, 1, 2, np.inf, np.nan], shape, p=[0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1]).astype(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, sides=st.tuples(st.integers(1, 7), st.integers(1, 7)), N=st.integers(1, 2), C=st.integers(1, 3),
       size=st.integers(1, 4), stride=st.integers(1, 5), pads=pairs, more=pairs)
def test_max_pool_is_the_definition(kernels, dtype, seed, sides, N, C, size, stride, pads, more):
    """All sizes, strides and paddings (before and after) below the window's size, over ties, infinities and NaN."""
    rng = np.random.default_rng(seed)
    top, left = (min(p, size - 1) for p in pads)
    oh, ow = ((side + p + min(m, size - 1) - size) // stride + 1 for side, p, m in zip(sides, (top, left), more))
    if min(oh, ow) < 1:
        return
    check_max_pool(kernels, ties_and_nans(rng, (N, *sides, C), dtype), size, stride, top, left, oh, ow)
    check_max_pool(kernels, rng.standard_normal((N, *sides, C)).astype(dtype), size, stride, top, left, oh, ow)


@needs_compiler
@pytest.mark.parametrize("shape, size, stride", [
    ((1, 1, 1, 1), 1, 1), ((1, 3, 5, 17), 1, 1), ((1, 16, 16, 1), 1, 1), ((1, 1, 257, 1), 1, 1), ((1, 4, 258, 1), 4, 1),
    ((3, 22, 14, 11), 3, 2), ((2, 40, 36, 1), 17, 3)])
def test_max_pool_crosses_block_borders_and_needs_wide_indices(kernels, shape, size, stride):
    """1, 255, 256, 257 threads and more; windows above 16 x 16 need two bytes an index."""
    check_max_pool(kernels, np.random.default_rng(0).integers(0, 50, shape).astype(np.float32), size, stride)
    x = np.indices(shape)[1:3].sum(0, dtype=float)                  # the last pixel of each window wins: argmax reaches its end
    check_max_pool(kernels, x, size, stride, size // 2, size // 2)


@needs_compiler
def test_the_harness_sees_a_write_outside_an_array(kernels):
    run = kernels("max_pool.cu", real="float", index_t="unsigned char")
    x, y, argmax = np.ones((1, 4, 4, 1), np.float32), np.zeros((1, 4, 4, 1), np.float32), np.zeros((1, 4, 4, 1), np.uint8)
    with pytest.raises(AssertionError, match="written outside the array"):
        launch(run.run_max_pool_forward, (x, y[:, :3].copy(), argmax, 1, 4, 4, 1, 4, 4, 1, 1, 0, 0), threads=16)


# Finding a kernel

def test_source_is_the_text_of_the_file():
    assert cuda.source("max_pool.cu") == (cuda.KERNELS / "max_pool.cu").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [
    "", "max_pool", "maxpool.cu", "README.md", "../pyproject.toml", "./max_pool.cu", "../kernels/max_pool.cu", "*.cu", None,
    str(cuda.KERNELS / "max_pool.cu"), cuda.KERNELS / "max_pool.cu"])
def test_source_names_the_kernels_that_exist(name):
    with pytest.raises(ValueError, match=r"^cuda\.source: name must be one of .*max_pool\.cu.* in .*kernels, got "):
        cuda.source(name)


def test_source_of_an_installation_without_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "KERNELS", tmp_path / "none")
    with pytest.raises(ValueError, match=r"^cuda\.source: name must be one of no file at all in .*none, got 'max_pool\.cu'$"):
        cuda.source("max_pool.cu")


def test_kernels_keep_to_what_every_compiler_takes():
    """No includes, no early macros: one text for CuPy, for a bare NVRTC and for g++."""
    for path in cuda.KERNELS.glob("*.cu"):
        text = path.read_text(encoding="utf-8")
        assert "#include" not in text and "std::" not in text and f"tinydet/ops/{path.stem}.py" in text
        names = re.findall(r'extern "C" __global__\s+void (\w+)\(', text)
        assert names and all(name.startswith(path.stem) for name in names) and len(names) == text.count("__global__")
