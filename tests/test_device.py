"""On a GPU everything stays there: checked without one, on the stand-in for CuPy of fake_cupy.py and the emulated kernels."""
import contextlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import fake_cupy
from tinydet import draw, emulate, layers, optim, scenes, to_numpy, train, use
from tinydet.backend import put
from tinydet.cases import CASES
from tinydet.models import fast_rcnn, overfeat, overfeat_detect
from tinydet.ops import focal_loss, logistic_loss, roi_loss, softmax_loss

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))
DIFFERENTIABLE = [c for c in CASES if c.kind in ("gradient", "loss")]


@pytest.fixture(autouse=True)
def cupy():
    with fake_cupy.installed() as module:
        yield module


def flat(y):
    return [np.array(to_numpy(a)) for a in (y if isinstance(y, (list, tuple)) else [y])]


def run(case, name, refuse):
    """Result and gradients of a case on a backend; refuse: let every copy to the host fail meanwhile."""
    with use(name) as put:
        *functions, inputs = case.draw(np.random.default_rng(0))
        xs = [put(x) for x in inputs]
        guard = fake_cupy.no_copies if refuse else contextlib.nullcontext
        if case.kind == "loss":
            with guard():
                value, *grads = functions[0](*xs)
            return flat(value) + sum(map(flat, grads), [])
        with guard():
            y, cache = functions[0](*xs)[:2]
        rng = np.random.default_rng(9)
        dys = [put(rng.standard_normal(a.shape)) for a in flat(y)]
        with guard():
            grads = functions[1](dys if isinstance(y, (list, tuple)) else dys[0], cache)
        return flat(y) + flat(grads)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: f"{c.op} {c.what}".strip())
def test_no_op_copies_to_the_host_and_all_take_what_cupy_takes(case):
    for a, b in zip(run(case, "cuda", True), run(case, "emulated", False), strict=True):
        assert_allclose(a, b, rtol=1e-13, atol=1e-13)


# Training

def small_net(dtype=np.float32):
    spec = overfeat_detect.spec_for(EXAMPLES, scenes.CLASSES, width=0.1, dropout=0.2)
    return overfeat.OverFeat(spec, np.random.default_rng(0), dtype)


EXAMPLES = scenes.scenes(2, seed=5)


def trainer(net, crops=2):
    """The step of examples/overfeat.py, without its threads."""
    def prepare(i):
        rng = np.random.default_rng([7, i])
        images, targets = zip(*(overfeat_detect.training_view(net.spec, EXAMPLES[j % 2], rng, 56) for j in range(crops)))
        return net.normalise(np.stack(images)), targets, rng

    def step(i, prepared):
        images, targets, rng = prepared
        scores, edges, cache = net.forward(put(images), train=True, rng=rng, offset=(i % 2, 1))
        values, dscores, dedges = overfeat_detect.loss(net.spec, scores, edges, targets, rng, offset=(i % 2, 1))
        net.backward(dscores, dedges, cache)
        return values
    return prepare, step


@pytest.mark.parametrize("make", [lambda net: optim.SGD(net, 0.9, 1e-4), lambda net: optim.SGD(net, 0.9, 1e-4, form="caffe", clip=0.5),
                                  lambda net: optim.AdaGrad(net)])
def test_a_training_step_never_copies_to_the_host(make):
    with use("cuda") as put:
        net = small_net().to(put)
        optimizer = make(net)
        prepare, step = trainer(net)
        prepared = [prepare(i) for i in range(3)]
        before = [to_numpy(w).copy() for w in net.params.values()]
        with fake_cupy.no_copies():
            for i in range(3):
                values = step(i, prepared[i])
                optimizer.step(0.01)
        assert fake_cupy.launches.count("max_pool_forward") == 6 and {"conv_forward", "sgd_step"} & set(fake_cupy.launches)
        assert all(np.isfinite(v) for v in train.numbers(values).values())
        optimizer.check()
        assert all(not np.array_equal(a, to_numpy(w)) for a, w in zip(before, net.params.values()))


def test_a_copy_in_a_step_is_seen():
    with use("cuda") as put:
        x = put(np.arange(4.0))
        for copy in (lambda: float(x.sum()), lambda: bool((x > 0).all()), lambda: x[x > 1], lambda: x.get(), lambda: x.sum().item(),
                     lambda: int(x.max()), lambda: to_numpy(x), lambda: x.tolist()):
            with pytest.raises(AssertionError, match="copies from the GPU to the host"), fake_cupy.no_copies():
                copy()
        for mix in (lambda: x + np.ones(4), lambda: np.exp(x), lambda: np.asarray(x), lambda: np.concatenate([x, x]), lambda: x.sum(initial=0)):
            with pytest.raises(TypeError):
                mix()


def test_fit_reads_the_numbers_of_a_step_once_and_trains_as_numpy_does(tmp_path):
    found = {}
    for name in ("numpy", "emulated", "cuda"):
        with use(name) as put:
            net = small_net(np.float64).to(put)
            run = train.Run(tmp_path / name, {})
            fake_cupy.copies.clear()
            prepare, step = trainer(net)
            train.fit(run, net, optim.SGD(net, 0.9, 1e-4), lambda i: 0.02, 4, step, every=10, prepare=prepare, workers=0)
            if name == "cuda":                                          # the losses, the optimiser's word; at the end a look at all and the checkpoint
                assert len(fake_cupy.copies) == 2 * 4 + 2 * len(net.arrays()) + len(net.params), fake_cupy.copies
            found[name] = [record["loss"] for record in run.metrics()], {k: to_numpy(v) for k, v in net.arrays().items()}
            again = small_net(np.float64).to(put)
            assert run.restore(again, optim.SGD(again, 0.9, 1e-4)) == 4
            for k, v in again.arrays().items():
                assert_array_equal(to_numpy(v), found[name][1][k])
    for name in ("emulated", "cuda"):
        assert_allclose(found[name][0], found["numpy"][0], rtol=1e-6)
        for k, v in found[name][1].items():
            assert_allclose(v, found["numpy"][1][k], rtol=1e-6, atol=1e-9)


def test_a_gradient_that_is_not_finite_stops_the_update_on_the_gpu_and_is_named_by_check():
    with use("cuda") as put:
        net = small_net().to(put)
        for make in (lambda: optim.SGD(net), lambda: optim.SGD(net, clip=1.0), lambda: optim.AdaGrad(net)):
            optimizer = make()
            before = {k: to_numpy(w).copy() for k, w in net.params.items()}
            net.grads["trunk.conv1.w"][0, 0, 0, 0] = np.inf
            with fake_cupy.no_copies():
                optimizer.step(0.1)
            with pytest.raises(FloatingPointError, match=r"the gradient of trunk\.conv1\.w is not finite"):
                optimizer.check()
            for k, w in net.params.items():
                assert_array_equal(to_numpy(w), before[k])
            for g in net.grads.values():
                g[...] = 0


def test_detection_gives_the_boxes_of_the_host():
    found = {}
    for name in ("numpy", "cuda"):
        with use(name) as put:
            net = small_net(np.float64).to(put)
            net.spec.scales = net.spec.scales[-1:]
            found[name] = overfeat_detect.detect(net, EXAMPLES[0].image(), merging="nms", threshold=0.4)
    for a, b in zip(*found.values()):
        assert isinstance(b, np.ndarray) and len(a) == len(b)
        assert_allclose(b, a, rtol=1e-9, atol=1e-9)


def test_nets_move_save_and_fold(tmp_path):
    with use("cuda") as put:
        net = small_net(np.float64)
        assert net.to(put) is net and all(not isinstance(a, np.ndarray) for a in [*net.arrays().values(), *net.grads.values()])
        folded, x = layers.fold(net.parts["trunk"]), put(np.random.default_rng(0).standard_normal((1, 24, 24, 3)))
        assert_allclose(to_numpy(folded(x)), to_numpy(net.parts["trunk"](x)), rtol=1e-9, atol=1e-9)
        overfeat.save(net, tmp_path / "net.npz", {})
        loaded, _ = overfeat.load(tmp_path / "net.npz")
        net.to(to_numpy)
    for (k, a), b in zip(net.arrays().items(), loaded.arrays().values()):
        assert_array_equal(a, b, strict=True, err_msg=k)


@pytest.mark.parametrize("loss", [lambda x, y: focal_loss.loss(x, y)[0], lambda x, y: logistic_loss.loss(x, y, signed=True)[0],
                                  lambda x, y: softmax_loss.loss(x, y[:, 0])[0],
                                  lambda x, y: roi_loss.loss(x, put(np.ones((3, 8))), y[:, 0], put(np.zeros((3, 4))))[0]])
@pytest.mark.parametrize("wrong", [2, 255, 256, 257, -2, -257, 2**31, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan(loss, wrong):
    with use("cuda") as put:
        x = put(np.ones((3, 2)))
        assert np.isfinite(to_numpy(loss(x, put(np.array([[0, 1], [1, 0], [-1, 1]])))))
        assert np.isnan(to_numpy(loss(x, put(np.array([[0, 1], [wrong, 0], [1, 1]])))))


def example(name):
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))                               # programs import what they share from there, as if called
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_run_on_the_gpu(tmp_path, monkeypatch, capsys):
    """Training, evaluation, pictures; then detection with the weights: as a user calls them, with --backend cuda."""
    train_it, detect = example("overfeat"), example("detect")
    monkeypatch.setattr(overfeat_detect, "spec_for", lambda examples, classes, window, original=overfeat_detect.spec_for, **more: original(
        examples, classes, window, width=0.1, most_scales=1, **more))
    args = train_it.arguments(["--backend", "cuda", "--scenes", "3", "--steps", "2", "--batch", "1", "--out", str(tmp_path), "--name", "a"])
    with use(args.backend) as put:
        train_it.main(args, put)
    assert (tmp_path / "a" / "detections.png").is_file() and "conv_dw" in fake_cupy.launches and "sgd_step" in fake_cupy.launches
    draw.save(Image.fromarray(EXAMPLES[0].image()[:80, :80]), tmp_path / "picture.png")
    args = detect.arguments(["--backend", "cuda", "--weights", str(tmp_path / "a" / "weights.npz"), "--min-score", "0.9", "--out", str(tmp_path / "d"),
                             str(tmp_path / "picture.png")])
    with use(args.backend) as put:
        detect.main(args, put)
    assert (tmp_path / "d" / "picture.png").is_file()


def test_ohem_runs_on_the_gpu(tmp_path, monkeypatch):
    train_it = example("ohem")
    table = fast_rcnn.Table((("conv1", 4, 2, 1, 4), ("max", 2, 2), ("conv2", 3, 1, 1, 6)), 3, 1 / 4, (8,), norm=True)
    monkeypatch.setitem(fast_rcnn.TABLES, "small", table)
    args = train_it.arguments(["--backend", "cuda", "--scenes", "3", "--steps", "1", "--images", "2", "--out", str(tmp_path), "--short", "32", "--most", "40",
                               "--least", "0.3", "--share", "0.2"])
    with use(args.backend) as put:
        train_it.main(args, put)
    assert (tmp_path / "ohem" / "results.json").is_file()
    assert "roi_pool_forward" in fake_cupy.launches


def test_adagrad_keeps_gradients_while_one_is_not_finite():
    with use("cuda") as put:
        net = layers.Layer(a=np.ones(3), b=np.ones(2)).to(put)
        optimizer = optim.AdaGrad(net)
        net.grads["a"][...] = 2
        net.grads["b"][0] = np.nan
        optimizer.step(0.1)
        assert_array_equal(to_numpy(net.grads["a"]), [2, 2, 2])
        assert_array_equal(to_numpy(net.params["a"]), [1, 1, 1])


def test_arrays_of_two_machines_are_refused():
    with use("cuda"):
        with pytest.raises(TypeError, match=r"^conv\.forward: arrays must all be NumPy's or all CuPy's, got x cupy|fake_cupy, w numpy"):
            small_net().forward(put(np.zeros((1, 56, 56, 3), np.float32)))


def test_the_stand_in_has_nothing_that_cupy_lacks():
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "cupy")
        real = pytest.importorskip("cupy", reason="CuPy is not installed")
    for name in fake_cupy.FUNCTIONS + fake_cupy.SYNCHRONISE + fake_cupy.CONSTANTS:
        assert hasattr(real, name), name
    for name in fake_cupy.METHODS:
        assert hasattr(real.ndarray, name), name


def test_overfeat_classifies_and_localizes_on_the_gpu(tmp_path, monkeypatch):
    classify, localize = example("overfeat_classify"), example("overfeat_localize")
    monkeypatch.setattr(overfeat, "TEST_SIZES", ((245, 245),) * 6)          # the smallest scale, six times
    common = ["--backend", "cuda", "--canvases", "3", "--eval-canvases", "1", "--steps", "1", "--batch", "2", "--out", str(tmp_path)]
    with use("cuda") as put:
        classify.main(classify.arguments([*common, "--width", "0.1"]), put)
        localize.main(localize.arguments(common), put)
        localize.main(localize.arguments([*common, "--train-all", "--fine-training", "--name", "all"]), put)
    assert (tmp_path / "overfeat_classify" / "maps.png").is_file() and (tmp_path / "overfeat_localize" / "boxes.png").is_file()
    assert {"offset_pool_forward", "conv_dw"} <= set(fake_cupy.launches)
