"""What a net and a run accept from a file: the same names, shapes and dtypes, finite, and else nothing at all."""
import json
import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tinydet import files
from tinydet.layers import BatchNorm, Conv2D, Sequential, load
from tinydet.models import overfeat
from tinydet.optim import SGD
from tinydet.train import Run


def make(dtype=np.float32, blocks=1):
    rng = np.random.default_rng(0)
    return Sequential(*(part for _ in range(blocks) for part in (Conv2D(2, 2, 1, rng=rng, dtype=dtype), BatchNorm(2, dtype=dtype))))


def copies(arrays):
    return {k: v.copy() for k, v in arrays.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert_array_equal(a[k], b[k], strict=True)


# A net

def test_load_copies_in_place_and_byte_order_and_strides_do_not_count():
    net, other = make(), make()
    for k, v in other.arrays().items():
        v += np.arange(1, v.size + 1).reshape(v.shape)
    kept = net.arrays()
    load(net, {k: v.astype(">f4").T.copy().T for k, v in other.arrays().items()})
    assert all(v is kept[k] for k, v in net.arrays().items())
    assert_same(net.arrays(), other.arrays())


def refused(net, arrays, told, **options):
    before = copies(net.arrays())
    with pytest.raises(ValueError) as error:
        load(net, arrays, "a.npz", **options)
    assert str(error.value) == f"layers.load: {told}"
    assert_same(net.arrays(), before)


def test_load_names_all_that_differs_and_copies_nothing():
    arrays = {k: v + 1 for k, v in make().arrays().items()}
    for change, told in (
            ({"1.mean": None}, "a.npz lacks the array 1.mean"),
            ({"0.b": np.zeros(3, np.float32)}, "a.npz: 0.b must have shape (2,), got (3,)"),
            ({"0.b": np.zeros((), np.float32)}, "a.npz: 0.b must have shape (2,), got ()"),             # would broadcast
            ({"0.w": np.zeros((2, 2), np.float32)}, "a.npz: 0.w must have shape (1, 1, 2, 2), got (2, 2)"),
            ({"0.b": np.zeros(2)}, "a.npz: 0.b must be float32, got float64"),
            ({"0.b": np.zeros(2, bool)}, "a.npz: 0.b must be float32, got bool"),
            ({"0.b": np.array([None, 1])}, "a.npz: 0.b must be float32, got object"),
            ({"0.b": np.array([0, np.nan], np.float32)}, "a.npz: 0.b must be finite, got NaN or infinity"),
            ({"2.w": np.zeros(3)}, "a.npz holds arrays that the model lacks: 2.w"),
            ({"0.w": None, "1.var": None, "ü/x": np.ones(1), "0.b": np.zeros((0, 2)), "1.beta": np.float32([1, np.inf])},
             "a.npz lacks the arrays 0.w, 1.var; a.npz holds arrays that the model lacks: ü/x; "
             "a.npz: 0.b must have shape (2,), got (0, 2); 0.b must be float32, got float64; "
             "1.beta must be finite, got NaN or infinity")):
        refused(make(), {k: v for k, v in (arrays | change).items() if v is not None}, told)


def test_a_long_list_of_what_differs_is_cut():
    refused(make(), {**make().arrays(), **{f"n{i:02}": np.ones(1) for i in range(39)}},
            "a.npz holds arrays that the model lacks: n00, n01, n02, n03, n04, n05, n06, n07, and 31 more")
    net = make(blocks=2)                                            # 12 arrays
    refused(net, {}, f"a.npz lacks the arrays {', '.join(list(net.arrays())[:8])}, and 4 more")
    wrong = "; ".join(f"{k} must be float32, got float64" for k in list(net.arrays())[:8])
    refused(net, {k: v.astype(np.float64) for k, v in net.arrays().items()}, f"a.npz: {wrong}; and 4 more")


@pytest.mark.parametrize("own, given", [(np.float32, np.float64), (np.float64, np.float32), (np.float32, np.float16)])
def test_load_converts_floating_dtypes_on_request(own, given):
    net = make(own)
    arrays = {k: np.linspace(-1, 2, v.size).reshape(v.shape).astype(given) for k, v in net.arrays().items()}
    refused(net, {**net.arrays(), "0.w": arrays["0.w"]}, f"a.npz: 0.w must be {np.dtype(own)}, got {np.dtype(given)}")
    load(net, arrays, cast=True)
    assert_same(net.arrays(), {k: v.astype(own) for k, v in arrays.items()})
    refused(net, {**arrays, "0.b": np.zeros(2, int)}, f"a.npz: 0.b must be {np.dtype(own)}, got int64", cast=True)


def test_load_refuses_what_conversion_makes_infinite():
    net = make()
    arrays = {**make(np.float64).arrays(), "0.b": np.array([1e300, 0])}
    refused(net, arrays, "a.npz: 0.b must be finite, got NaN or infinity", cast=True)


def test_a_saved_net_keeps_its_dtype(tmp_path):
    for dtype in (np.float32, np.float64):
        net = overfeat.OverFeat(overfeat.Spec(("a",), "small", 0.1), np.random.default_rng(1), dtype)
        overfeat.save(net, tmp_path / "w.npz", {})
        other = overfeat.load(tmp_path / "w.npz")[0]
        assert other.dtype == dtype
        assert_same(other.arrays(), net.arrays())


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"dtype": ["float32"]}, {"settings": 3}, {"spec": 3}, {"spec": {"classes": 3}},
                                    {"spec": {"classes": ["a"], "scales": [1], "widths": [4, 4]}}])
def test_a_net_of_another_description_is_refused(tmp_path, change):
    good = {"model": "overfeat", "spec": {"classes": ["a"], "scales": [1]}, "settings": {}}
    files.write_arrays(tmp_path / "w.npz", {}, good | change)
    with pytest.raises(ValueError, match=r"^overfeat\.load: .*w\.npz must describe a net of overfeat, got: "):
        overfeat.load(tmp_path / "w.npz")


# A run

@pytest.fixture
def kept(tmp_path):
    """A run with a checkpoint after step 3, its net and optimiser (other values since), and what the checkpoint holds."""
    run, net = Run(tmp_path, {}), make()
    optimizer = SGD(net, 0.9)
    for k, v in optimizer.state.items():
        v += np.arange(1, v.size + 1).reshape(v.shape)
    run.checkpoint(3, net, optimizer)
    arrays, meta = files.read_arrays(tmp_path / "checkpoint.npz")
    for v in [*net.arrays().values(), *optimizer.state.values()]:
        v += 100
    return run, net, optimizer, arrays, meta


def test_restore_brings_back_net_and_optimizer(kept):
    run, net, optimizer, arrays, _ = kept
    assert run.restore(net, optimizer) == 3
    assert_same(arrays, {f"net/{k}": v for k, v in net.arrays().items()} | {f"optimizer/{k}": v for k, v in optimizer.state.items()})


@pytest.mark.parametrize("change, told", [
    ({"optimizer/0.w": None}, "layers.load: PATH lacks the array optimizer/0.w"),
    ({"optimizer/0.b": np.ones(3, np.float32)}, "layers.load: PATH: optimizer/0.b must have shape (2,), got (3,)"),
    ({"optimizer/0.b": np.ones(2)}, "layers.load: PATH: optimizer/0.b must be float32, got float64"),
    ({"optimizer/0.b": np.full(2, np.nan, np.float32)}, "layers.load: PATH: optimizer/0.b must be finite, got NaN or infinity"),
    ({"optimizer/9.w": np.ones(2)}, "layers.load: PATH holds arrays that the model lacks: optimizer/9.w"),
    ({"net/0.b": np.ones(2), "optimizer/0.w": None},
     "layers.load: PATH lacks the array optimizer/0.w; PATH: 0.b must be float32, got float64"),
    ({"0.w": np.ones(2)}, "train.Run: PATH must hold arrays of net/ and optimizer/ only, got 0.w")])
def test_a_checkpoint_that_does_not_fit_changes_neither_net_nor_optimizer(kept, change, told):
    run, net, optimizer, arrays, meta = kept
    path = run.folder / "checkpoint.npz"
    files.write_arrays(path, {k: v for k, v in (arrays | change).items() if v is not None}, meta)
    before = copies(net.arrays()), copies(optimizer.state)
    with pytest.raises(ValueError) as error:
        run.restore(net, optimizer)
    assert str(error.value) == told.replace("PATH", str(path))
    assert_same(net.arrays(), before[0])
    assert_same(optimizer.state, before[1])


@pytest.mark.parametrize("meta", [{}, *({"steps": bad} for bad in (-1, 2.0, True, "3", None, math.nan)), [3], 3])
def test_a_checkpoint_must_say_how_many_steps_were_done(kept, meta):
    run, net, optimizer, arrays, _ = kept
    files.write_arrays(run.folder / "checkpoint.npz", arrays, meta)
    before = copies(net.arrays())
    with pytest.raises(ValueError, match=r"^train\.Run: .*\.npz must say how many steps were done, an integer >= 0, got "):
        run.restore(net, optimizer)
    assert_same(net.arrays(), before)


def test_a_checkpoint_made_before_the_format_had_a_version_is_refused(kept):
    run, net, optimizer, arrays, meta = kept
    np.savez(run.folder / "checkpoint.npz", **arrays, meta=np.array(json.dumps(meta)))
    with pytest.raises(ValueError, match=r"^files\.read_arrays: .*checkpoint\.npz must be .*, got: a file without a format version"):
        run.restore(net, optimizer)
