"""The emitted functions beside NumPy: odd sizes, strides, borders, and nothing written that should not be."""
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from numba import config, njit
from numpy.testing import assert_allclose, assert_array_equal

from tinydet import simd

ROOT = Path(__file__).resolve().parent.parent
MATRIX = np.array([[1, 2, 0.5], [1, -2, 0.5], [0, 0, 0], [-1, 1, 3.0]])         # rows 0 and 1 differ in signs only
_gather = simd.gather({7: MATRIX, 8: MATRIX[:2, :2]})
_write, _add = (simd.scatter({7: MATRIX}, add) for add in (False, True))


@njit
def multiply(vectors, a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, rows, outer, inner, columns, start, first, i):
    simd.multiply(vectors, a, ia, a_row, a_outer, a_inner, b, ib, b_outer, b_inner, c, ic, c_row, rows, outer, inner, columns, start, first, i)


@njit
def gather(kind, image, i, row, col, r0, r1, c0, c1, n, panels, j, step):
    _gather(kind, image, i, row, col, r0, r1, c0, c1, n, panels, j, step)


@njit
def scatter(add, panels, j, step, image, i, row, col, r0, r1, c0, c1, n):
    if add:
        _add(7, panels, j, step, image, i, row, col, r0, r1, c0, c1, n)
    else:
        _write(7, panels, j, step, image, i, row, col, r0, r1, c0, c1, n)


def random(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 1e-5)])
@pytest.mark.parametrize("vectors", simd.ROWS)
@pytest.mark.parametrize("start", [simd.ZERO, simd.ADD, simd.ROW])
def test_multiply_is_the_matrix_product(dtype, tolerance, vectors, start):
    width, outer, inner = vectors * simd.lanes(dtype), 2, 5
    for rows in (1, simd.SHORT[vectors], simd.ROWS[vectors], simd.ROWS[vectors] + 1, 2 * simd.ROWS[vectors] + simd.SHORT[vectors] + 1):
        written = -(-rows // simd.SHORT[vectors]) * simd.SHORT[vectors]         # never beyond the next short block
        for columns in (width, width - 1, 1):
            a, b, row = random(outer, written + 2, inner, 3, dtype=dtype), random(outer, inner, width + 3, dtype=dtype, seed=1), random(width + 2, dtype=dtype)
            c = random(written + 2, width + 5, dtype=dtype, seed=2)
            before = c.copy()
            multiply(vectors, a.reshape(-1), 1, a[0, 0].size, a[0].size, 3, b.reshape(-1), 2, b[0].size, width + 3,
                     c.reshape(-1), 4, width + 5, rows, outer, inner, columns, start, row, 2)
            sums = np.einsum("irk,ikv->rv", a[:, :rows, :, 1], b[:, :, 2:2 + width])[:, :columns]
            expected = before[:rows, 4:4 + columns] * (start == simd.ADD) + sums + row[2:2 + columns] * (start == simd.ROW)
            assert_allclose(c[:rows, 4:4 + columns], expected, rtol=0, atol=tolerance * 10)
            c[:written, 4:4 + columns] = before[:written, 4:4 + columns]
            assert_array_equal(c, before)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 1e-5)])
@pytest.mark.parametrize("limits", [(0, 3, 0, 3), (-2, 9, -1, 5), (1, 3, 0, 2), (0, 2, 1, 2), (0, 1, 2, 3), (3, 5, 0, 3)])
def test_gather_and_scatter_transform_what_exists(dtype, tolerance, limits):
    L, (r0, r1, c0, c1) = MATRIX, limits
    p, q = L.shape
    lanes, step = simd.lanes(dtype), simd.lanes(dtype) + 3
    for n in (lanes + 1, lanes, lanes - 1, 1, 0):
        image, panels = random(q, q + 1, 2 * lanes, dtype=dtype), np.full(p * p * step + 2, np.nan, dtype)
        gather(7, image.reshape(-1), 3, image[0].size, image[0, 0].size, r0, r1, c0, c1, n, panels, 2, step)
        x = np.zeros((q, q, lanes))
        u, v = np.mgrid[:q, :q]
        exists = (r0 <= u) & (u < r1) & (c0 <= v) & (v < c1)
        x[exists, :n] = image[:, :q, 3:3 + lanes][exists, :n]
        found = panels[2:].reshape(p * p, step)
        assert_allclose(found[:, :lanes].reshape(p, p, lanes), np.einsum("su,uvk,tv->stk", L, x, L), rtol=0, atol=tolerance * 50)
        assert np.isnan(found[:, lanes:]).all()

        for add in (False, True):
            wide, source = random(p, p + 1, 2 * lanes, dtype=dtype), random(q * q * step + 2, dtype=dtype, seed=3)
            before = wide.copy()
            scatter(add, source, 2, step, wide.reshape(-1), 3, wide[0].size, wide[0, 0].size, r0, r1, c0, c1, n)
            y = np.einsum("su,uvk,tv->stk", L, source[2:].reshape(q, q, step)[:, :, :lanes], L)
            s, t = np.mgrid[:p, :p]
            expected, exists = before.copy(), (r0 <= s) & (s < r1) & (c0 <= t) & (t < c1)
            k = min(n, lanes)
            expected[:, :p, 3:3 + k][exists] = (y[:, :, :k] + add * before[:, :p, 3:3 + k])[exists]
            assert_allclose(wide, expected, rtol=0, atol=tolerance * 50)


def test_each_kind_has_its_matrix_and_an_unknown_kind_does_nothing():
    lanes = simd.lanes(np.float64)
    image, panels = random(2, 2, lanes), np.zeros(16 * lanes)
    gather(9, image.reshape(-1), 0, 2 * lanes, lanes, 0, 2, 0, 2, lanes, panels, 0, lanes)
    assert not panels.any()
    gather(8, image.reshape(-1), 0, 2 * lanes, lanes, 0, 2, 0, 2, lanes, panels, 0, lanes)
    assert_allclose(panels[:4 * lanes].reshape(2, 2, lanes), np.einsum("su,uvk,tv->stk", MATRIX[:2, :2], image, MATRIX[:2, :2]), atol=1e-12)
    assert not panels[4 * lanes:].any()


def test_code_on_disk_of_another_simd_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "user.py").write_text("from tinydet import simd\n\n\n@simd.jit\ndef f(x):\n    return x + 1\n")
    monkeypatch.setattr(config, "CACHE_DIR", "")

    def hits():
        spec = importlib.util.spec_from_file_location("user", tmp_path / "user.py")
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # nothing in it is parallel
            spec.loader.exec_module(module)
            assert module.f(1) == 2
        return sum(module.f.stats.cache_hits.values())

    assert (hits(), hits()) == (0, 1)
    (tmp_path / "simd.py").write_text("another text")
    monkeypatch.setattr(simd, "__file__", str(tmp_path / "simd.py"))
    assert (hits(), hits()) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cpu, features, size", [("haswell", "+avx2,+fma", 32), ("generic", "", 16)])
def test_code_for_lesser_cpus_gives_right_results(cpu, features, size, tmp_path):
    """The tests of convolution on code for AVX2, and on code for any 64-bit CPU, in a process of their own."""
    env = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", "from tinydet import simd; print(simd.BYTES)"], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{size}\n"
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("simd", "conv", "conv_direct", "conv_winograd")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
