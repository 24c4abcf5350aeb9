import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from conftest import BACKENDS, RUNNING, seeds
from tinydet import emulate, to_numpy, use
from tinydet.ops import sort
from tinydet.ops.sort import argsort

backends = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("descending", [False, True])


def by_definition(keys, descending):
    """Stable: by key, then by index; NaN behind all else either way."""
    def rank(i):
        nan = keys[i] != keys[i]
        return nan, 0 if nan else -keys[i] if descending else keys[i], i
    keys = keys.tolist()
    return np.array(sorted(range(len(keys)), key=rank), np.int32)


def run(backend, keys, *args):
    with use(backend) as put:
        return to_numpy(argsort(put(keys), *args))


def values(dtype):
    """Those that a sort by bits could get wrong: ends, both zeros, denormals, infinities, every NaN."""
    if np.dtype(dtype).kind == "i":
        ends = np.iinfo(dtype)
        return np.array([ends.min, ends.min + 1, -256, -255, -1, 0, 1, 255, 256, 65536, ends.max - 1, ends.max], dtype)
    f, bits = np.finfo(dtype), np.uint32 if dtype == "float32" else np.uint64
    nans = np.array([np.nan, -np.nan], dtype)
    loud = (nans.view(bits) + bits(5)).view(dtype)                     # NaN with other bits behind it
    return np.concatenate([np.array([0, f.smallest_subnormal, f.tiny, f.eps, 1, 1 + f.eps, 256, f.max, np.inf], dtype),
                           -np.array([0, f.smallest_subnormal, f.tiny, f.eps, 1, 1 + f.eps, 256, f.max, np.inf], dtype), nans, loud])


@backends
@given(seed=seeds, n=st.integers(0, 70), dtype=st.sampled_from(sort.DTYPES), descending=st.booleans())
def test_order_is_the_definition(backend, seed, n, dtype, descending):
    keys = np.random.default_rng(seed).choice(values(dtype), n)
    before = keys.tobytes()
    assert_array_equal(run(backend, keys, descending), by_definition(keys, descending), strict=True)
    assert keys.tobytes() == before


@backends
@both
@pytest.mark.parametrize("dtype", sort.DTYPES)
def test_order_is_the_definition_in_several_blocks(backend, descending, dtype, monkeypatch):
    monkeypatch.setattr(sort, "BLOCK", 0)
    for n in (1, 40, 2049):
        keys = np.random.default_rng(n).choice(values(dtype), n)
        assert_array_equal(run(backend, keys, descending), by_definition(keys, descending), strict=True)


@backends
@both
@pytest.mark.parametrize("dtype", sort.DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 255, 256, 257, 1000, 2047, 2048, 2049, 4097, 5000])
def test_block_borders_ties_and_strides(backend, descending, dtype, n):
    rng = np.random.default_rng(n)
    many = rng.integers(-2**31, 2**31, n).astype(dtype)
    if dtype[0] == "f":
        many /= 3
    for keys in (many[::-1], rng.integers(0, 3, n).astype(dtype), np.repeat(many, 2)[::2], many)[:4 if n < 1000 else 2]:
        sign = -1 if descending else 1
        expected = np.argsort(sign * keys.astype(np.float64), kind="stable")                # exact: below 2^53
        assert_array_equal(run(backend, keys, descending), expected.astype(np.int32), strict=True)


@backends
def test_rising_order_is_the_default_and_sorting_twice_changes_nothing(backend):
    keys = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    keys[::9] = np.nan
    order = run(backend, keys)
    assert_array_equal(order, np.argsort(keys, kind="stable"))
    assert_array_equal(run(backend, keys[order]), np.arange(300))
    assert_array_equal(np.sort(order), np.arange(300))


@backends
def test_more_keys_than_the_fewest_rounds_of_all_blocks(backend, monkeypatch):
    """The blocks are few, so each takes more rounds."""
    monkeypatch.setattr(sort, "BLOCKS", 2)
    keys = np.random.default_rng(0).integers(0, 500, 5000).astype(np.int32)
    assert_array_equal(run(backend, keys), np.argsort(keys, kind="stable"))


@pytest.mark.skipif("emulated" not in RUNNING, reason="needs g++")
@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("n", [600, 3000])
def test_any_order_of_threads_gives_the_same(dtype, n):
    keys = np.random.default_rng(0).integers(0, 50, n).astype(dtype)
    for order in ("reverse", "random"):
        with emulate.options(order=order, seed=1):
            assert_array_equal(run("emulated", keys, True), np.argsort(-keys, kind="stable"))


@backends
@pytest.mark.parametrize("keys, error, message", [
    ([1, 2], TypeError, "keys must be an array, got list"),
    (np.zeros(3, bool), TypeError, "keys must be int32, int64, float32 or float64, got bool"),
    (np.zeros((2, 3)), ValueError, r"keys must have shape \(n,\), n < 2\^31, got \(2, 3\)"),
])
def test_errors(backend, keys, error, message):
    with use(backend) as put, pytest.raises(error, match=r"^sort\.argsort: " + message):
        argsort(keys if isinstance(keys, list) else put(keys))
