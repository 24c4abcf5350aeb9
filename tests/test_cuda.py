"""Finding kernels, and what launch() refuses before any kernel runs. What kernels compute is tested with their ops."""
import re
import shutil

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fake_cupy
from tinydet import cuda, emulate

needs_emulator = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

SAXPY = """// y += a * x.
// variants: real=float; real=double
extern "C" __global__
void saxpy(const real* x, real* y, real a, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}

extern "C" __global__ void __launch_bounds__(256, 2)
saxpy_other(const float4* v, const unsigned char* u, long long* sums, size_t n) { }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """KERNELS with a kernel file of its own."""
    shutil.copy(cuda.KERNELS / "prelude.h", tmp_path)
    shutil.copy(cuda.KERNELS / "cuda_on_cpu.h", tmp_path)
    (tmp_path / "saxpy.cu").write_text(SAXPY.replace("unsigned char", "u8"))
    monkeypatch.setattr(cuda, "KERNELS", tmp_path)
    return tmp_path


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


@pytest.mark.parametrize("file", cuda.files())
def test_kernels_keep_to_the_dialect(file):
    """No includes, no std::, one op's stem, and a signature and variants that cuda.py can read: one text for CuPy, NVRTC and g++."""
    text, stem = cuda.source(file), file.removesuffix(".cu")
    assert "#include" not in text and "std::" not in text and "__activemask" not in text
    assert re.search(rf"tinydet/(ops/{stem}|optim)\.py", text)
    kernels = cuda.signatures(text)
    assert kernels and len(kernels) == text.count("__global__") and all(name.startswith(stem) for name in kernels)
    macros = {name for v in cuda.variants(text) for name in v}
    types = {p[0] for parameters in kernels.values() for p in parameters}
    assert types <= cuda.DTYPES.keys() | cuda.VECTORS.keys() | macros
    assert all(v.keys() == macros for v in cuda.variants(text))
    assert not re.search(r"atomicAdd\(\s*&?\(?(float|double|real)", text)


def test_signatures_variants_and_flags():
    assert cuda.signatures(SAXPY) == {
        "saxpy": (("real", True, True, "x"), ("real", True, False, "y"), ("real", False, False, "a"), ("int", False, False, "n")),
        "saxpy_other": (("float4", True, True, "v"), ("unsigned char", True, True, "u"), ("long long", True, False, "sums"),
                        ("size_t", False, False, "n"))}
    assert cuda.variants(SAXPY) == [{"real": "float"}, {"real": "double"}] and cuda.flags(SAXPY) == ()
    text = "// variants: real=float, T=8; real=double, T=16\n// flags: --fmad=false -G\n"
    assert cuda.variants(text) == [{"real": "float", "T": "8"}, {"real": "double", "T": "16"}]
    assert cuda.flags(text) == ("--fmad=false", "-G")
    assert cuda.options(text, [("real", "float")]) == ("-Dreal=float", "--fmad=false", "-G")
    assert cuda.variants("no line") == [{}] and cuda.signatures("void f(int x)") == {}


# What launch() does and refuses

@needs_emulator
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_a_launch(folder, dtype, n):
    x, y = np.arange(n, dtype=dtype), np.ones(n, dtype)
    cuda.launch("saxpy.cu", "saxpy", (x, y, 2, n), threads=n)
    assert_array_equal(y, 2 * np.arange(n, dtype=dtype) + 1, strict=True)
    cuda.launch("saxpy.cu", "saxpy", (x, y, 1.5, n), grid=(-(-n // 64), 1, 1), block=64)
    assert_array_equal(y, np.arange(n, dtype=dtype) * dtype(3.5) + 1, strict=True)


F, D = np.ones(8, np.float32), np.ones(8)


@pytest.mark.parametrize("args, error, message", [
    ((F, F, 1), TypeError, r"takes 4 arguments \(x, y, a, n\), got 3"),
    ((F, D, 1, 8), TypeError, r"y must be float32, as real is elsewhere, got float64"),
    ((F, [1.0], 1, 8), TypeError, r"y must be float32, as real is elsewhere, got list"),
    ((F.astype(np.float16), F.astype(np.float16), 1, 8), TypeError, r"variants \(real=float; real=double\), got \{'real': 'None'\}|got \{'real': None\}"),
    ((F.astype(int), F.astype(int), 1, 8), TypeError, r"variants .*'long long'"),
    ((F[::2], F, 1, 4), ValueError, r"x must be C-contiguous, got strides \(8,\) for shape \(4,\)"),
    ((np.ones((3, 2), np.float32).T, F, 1, 4), ValueError, r"x must be C-contiguous"),
    ((F, np.broadcast_to(np.float32(1), 1), 1, 1), ValueError, r"y is written and must be writable"),
    ((F, F, "1", 8), TypeError, r"a must be a number, got str"),
    ((F, F, F, 8), TypeError, r"a must be a number, got ndarray"),
    ((F, F, 1, 8.5), ValueError, r"n must be an integer that int32 holds, got 8\.5"),
    ((F, F, 1, 2**31), ValueError, r"n must be an integer that int32 holds, got 2147483648"),
    ((F, F, 1, -2**31 - 1), ValueError, r"n must be an integer that int32 holds"),
    ((F, F, 1, float("nan")), ValueError, r"n must be an integer that int32 holds, got nan"),
    ((np.lib.stride_tricks.as_strided(F, (2**31,), (0,)), F, 1, 8), ValueError, r"x must (have fewer than 2\^31 elements|be C-contiguous)"),
])
def test_bad_arguments_are_named(folder, args, error, message):
    with pytest.raises(error, match=rf"^cuda\.launch: saxpy\.cu: saxpy.*{message}"):
        cuda.launch("saxpy.cu", "saxpy", args, threads=8)


def test_other_kernels_files_and_macros_are_named(folder):
    with pytest.raises(ValueError, match=r"^cuda\.launch: kernel must be one of saxpy, saxpy_other in saxpy\.cu, got 'sax'"):
        cuda.launch("saxpy.cu", "sax", (F,), threads=1)
    with pytest.raises(ValueError, match=r"^cuda\.source: name must be one of .*saxpy\.cu.* got 'none\.cu'"):
        cuda.launch("none.cu", "sax", (F,), threads=1)
    with pytest.raises(TypeError, match=r"variants \(real=float; real=double\), got \{'T': '8', 'real': 'float'\}"):
        cuda.launch("saxpy.cu", "saxpy", (F, F, 1, 8), threads=8, T=8)


@pytest.mark.parametrize("v, message", [
    (D, r"v must be float32, got float64"), (F[:6], r"v must hold whole float4 at an aligned address, got 6 elements"),
    (np.frombuffer(bytearray(64), np.float32)[1:9], r"v must hold whole float4 at an aligned address, got 8 elements")])
def test_vectors_must_be_whole_and_aligned(folder, v, message):
    args = v, np.zeros(1, np.uint8), np.zeros(1, np.int64), 1
    text = (folder / "saxpy.cu").read_text().replace("// variants: real=float; real=double\n", "")
    (folder / "vectors.cu").write_text(text.replace("saxpy", "vectors"))
    if v.ctypes.data % 16 == 0 and "aligned" in message and v.size == 8:
        args = (np.frombuffer(bytearray(68), np.float32)[2:10], *args[1:])
    with pytest.raises((TypeError, ValueError), match=rf"^cuda\.launch: vectors\.cu: vectors_other: {message}"):
        cuda.launch("vectors.cu", "vectors_other", args, threads=1)


@needs_emulator
def test_cupy_arrays_go_to_cupys_executor_with_exact_types(folder):
    """On the stand-in for CuPy, whose kernels take arrays and NumPy numbers alone."""
    with fake_cupy.installed() as cupy:
        x, y = cupy.asarray(np.arange(300.0)), cupy.asarray(np.ones(300))
        with fake_cupy.no_copies():
            cuda.launch("saxpy.cu", "saxpy", (x, y, 2, 300), threads=300)
        assert_array_equal(y.get(), 2 * np.arange(300.0) + 1)
        assert fake_cupy.launches == ["saxpy"]
        with pytest.raises(TypeError, match=r"saxpy: y must be a cupy array, as the first array is, got ndarray"):
            cuda.launch("saxpy.cu", "saxpy", (x, np.ones(300), 2, 300), threads=300)
        assert cuda.empty(x, (2, 3), np.uint8).shape == (2, 3) and isinstance(cuda.empty(x, 3), cupy.ndarray)


@needs_emulator
def test_cupys_executor_is_asked_for_shared_memory_and_refuses_another_device(folder, monkeypatch):
    with fake_cupy.installed() as cupy:
        x, y = cupy.asarray(F), cupy.asarray(F.copy())
        cuda.launch("saxpy.cu", "saxpy", (x, y, 1, 8), threads=8, shared=60_000)
        kernel = cuda._compiled("saxpy.cu", cuda.source("saxpy.cu"), (("real", "float"),), "saxpy")
        assert kernel.max_dynamic_shared_size_bytes == 60_000
        monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
        with pytest.raises(ValueError, match=r"x must lie on the current device 1, got device 0"):
            cuda.launch("saxpy.cu", "saxpy", (x, y, 1, 8), threads=8)


def test_a_kernel_without_arrays_is_refused(folder):
    (folder / "none.cu").write_text('extern "C" __global__ void none(int n) { }')
    with pytest.raises(TypeError, match=r"^cuda\.launch: none\.cu: none must have an array among its parameters"):
        cuda.launch("none.cu", "none", (1,), threads=8)


def test_empty_holds_what_nobody_writes():
    assert np.isnan(cuda.empty(F, (2, 3))).all() and cuda.empty(F, (2, 3)).dtype == np.float32
    assert (cuda.empty(F, 3, np.int64) == -1).all() and (cuda.empty(F, (0, 3), np.uint8) == 255).all()
