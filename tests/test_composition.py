"""Nets with branches, several inputs and several outputs: residual blocks, pyramids, shared heads; freezing and folding them."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from conftest import BACKENDS, distinct
from tinydet import use
from tinydet.cases import of_layer
from tinydet.gradcheck import check_grad
from tinydet.layers import (BatchNorm, Composite, Concat, Conv2D, Fork, GlobalMaxPool, Linear, MaxPool, ReLU, Residual, Sequential, Shared,
                            Stages, fold)
from tinydet.ops import add, upsample
from tinydet.optim import SGD


def conv(Cin, Cout, size=3, seed=0, **options):
    layer = Conv2D(Cin, Cout, size, rng=np.random.default_rng(seed), dtype=np.float64, **{"pad": size // 2, **options})
    layer.params["b"] += 0.1
    return layer


def norm(C, **options):
    layer = BatchNorm(C, dtype=np.float64, **options)
    rng = np.random.default_rng(C)
    for a in layer.arrays().values():
        a += rng.random(C)
    return layer


class Pyramid(Composite):
    """A small retina: residual stages, two laterals joined from the top down, and one head with two outputs shared by both levels."""

    def __init__(self):
        super().__init__(
            stages=Stages(Sequential(conv(2, 3, stride=2), norm(3)), Residual(conv(3, 3, seed=1), None), conv(3, 4, stride=2, seed=2)),
            fine=conv(3, 2, 1, seed=3), coarse=conv(4, 2, 1, seed=4),
            heads=Shared(Fork(scores=conv(2, 2, seed=5), edges=conv(2, 1, 1, seed=6))))

    def forward(self, x, train=False, rng=None):
        (_, low, high), stages = self.parts["stages"].forward(x, train, rng)
        coarse, coarse_cache = self.parts["coarse"].forward(high)
        lateral, fine_cache = self.parts["fine"].forward(low)
        up, up_cache = upsample.forward(coarse, 2, lateral.shape[1:3])
        fine, add_cache = add.forward(lateral, up)
        ((s1, e1), (s2, e2)), heads = self.parts["heads"].forward([fine, coarse], train, rng)
        return [s1, e1, s2, e2], (stages, coarse_cache, fine_cache, up_cache, add_cache, heads)

    def backward(self, dys, cache):
        stages, coarse_cache, fine_cache, up_cache, add_cache, heads = cache
        dfine, dcoarse = self.parts["heads"].backward([dys[:2], dys[2:]], heads)
        dlateral, dup = add.backward(dfine, add_cache)
        dlow = self.parts["fine"].backward(dlateral, fine_cache)
        dhigh = self.parts["coarse"].backward(dcoarse + upsample.backward(dup, up_cache), coarse_cache)
        return self.parts["stages"].backward([None, dlow, dhigh], stages)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_pyramid_with_shared_heads(backend):
    with use(backend) as put:
        assert check_grad(*of_layer(Pyramid(), distinct((1, 6, 5, 2), 0)), put=put) < 1e-7


@pytest.mark.parametrize("heads", [
    lambda: Fork(scores=Shared(conv(2, 3)), edges=Shared(conv(2, 1, seed=1))), lambda: Shared(Fork(scores=conv(2, 3), edges=conv(2, 1, seed=1)))])
def test_two_heads_over_a_pyramid_in_either_order(heads):
    """A Fork of shared heads sends back one gradient a level, the sum of both heads'."""
    xs = [distinct((1, 4, 3, 2), 0), distinct((1, 2, 2, 2), 1)]
    assert check_grad(*of_layer(heads(), xs)) < 1e-7


def test_fork_of_shared_heads_is_shared_fork():
    xs = [distinct((1, 4, 3, 2), 0), distinct((1, 2, 2, 2), 1)]
    a, b = Fork(s=Shared(conv(2, 3)), e=Shared(conv(2, 1, seed=1))), Shared(Fork(s=conv(2, 3), e=conv(2, 1, seed=1)))
    (s, e), a_cache = a.forward(xs)
    pairs, b_cache = b.forward(xs)
    for level in range(2):
        assert_array_equal(s[level], pairs[level][0])
        assert_array_equal(e[level], pairs[level][1])
    for x, y in zip(a.backward([s, e], a_cache), b.backward(pairs, b_cache), strict=True):
        assert_allclose(x, y, rtol=1e-12)


def test_a_residual_block_is_the_sum_of_its_two_ways():
    x, branch, shortcut = distinct((1, 4, 4, 2), 0), conv(2, 3, stride=2), conv(2, 3, 1, seed=1, stride=2)
    assert_array_equal(Residual(branch, shortcut)(x), branch(x) + shortcut(x))
    assert_array_equal(Residual(conv(2, 2))(x), conv(2, 2)(x) + x)
    assert set(Residual(branch, shortcut).params) == {"branch.w", "branch.b", "shortcut.w", "shortcut.b"}
    with pytest.raises(ValueError, match=r"^add\.forward: b must have shape \(1, 2, 2, 3\), got \(1, 4, 4, 2\)"):
        Residual(branch).forward(x)


def test_fork_stages_shared_and_concat_run_their_parts():
    x, a, b = distinct((1, 4, 4, 2), 0), conv(2, 3), conv(2, 1, seed=1)
    for found, expected in zip(Fork(a=a, b=b)(x), (a(x), b(x)), strict=True):
        assert_array_equal(found, expected)
    assert_array_equal(Concat(a=a, b=b)(x), np.concatenate([a(x), b(x)], -1))
    for found, expected in zip(Stages(a, ReLU())(x), (a(x), np.maximum(a(x), 0)), strict=True):
        assert_array_equal(found, expected)
    for found, expected in zip(Shared(a)([x, x[:, :3]]), (a(x), a(x[:, :3])), strict=True):
        assert_array_equal(found, expected)


@pytest.mark.parametrize("name, outputs", [("Fork", 2), ("Stages", 2), ("Shared", 2)])
def test_an_output_without_gradient_may_be_none(name, outputs):
    """None is the same as zeros: for each output in turn, and for all of them no gradient at all."""
    net = {"Fork": lambda: Fork(a=conv(2, 3), b=conv(2, 2, seed=1)), "Stages": lambda: Stages(conv(2, 3), conv(3, 2, seed=1)),
           "Shared": lambda: Shared(conv(2, 3))}[name]
    x = distinct((1, 4, 4, 2), 0)
    x = [x, x + 1] if name == "Shared" else x
    for missing in range(outputs):
        found = []
        for zero in (lambda y: None, np.zeros_like):
            layer = net()
            ys, caches = layer.forward(x)
            dx = layer.backward([zero(y) if k == missing else y for k, y in enumerate(ys)], caches)
            found.append([*(d for d in (dx if name == "Shared" else [dx]) if d is not None and d.any()), *layer.grads.values()])
        for a, b in zip(*found, strict=True):
            assert_array_equal(a, b)
    layer = net()
    ys, caches = layer.forward(x)
    dx = layer.backward([None, None], caches)
    assert (dx == [None, None] if name == "Shared" else dx is None) and not any(g.any() for g in layer.grads.values())
    with pytest.raises(ValueError, match=rf"^{name}\.backward: gradients must be 2, one for each output, got 1"):
        layer.backward(ys[:1], caches)


@pytest.mark.parametrize("kind", [Sequential, Stages])
def test_backward_ends_at_the_first_layer_that_trains_where_no_one_asks_for_dx(kind):
    def net(input_grad):
        return kind(conv(2, 3).freeze(), ReLU(), conv(3, 3, seed=1), conv(3, 1, seed=2).freeze(), input_grad=input_grad)
    x, found = distinct((1, 4, 4, 2), 0), []
    for input_grad in (True, False):
        layer = net(input_grad)
        y, caches = layer.forward(x)
        if not input_grad:
            caches[0] = caches[1] = "nobody looks here"
        dx = layer.backward(y, caches)
        assert (dx is None) != input_grad
        found.append(layer.grads)
    for k, g in found[0].items():
        assert_array_equal(g, found[1][k])
        assert g.any() == (k in ("2.w", "2.b"))
    layer = net(False).freeze()
    y, caches = layer.forward(x)
    assert layer.backward(y, [None] * 4) is None                        # nothing trains


def test_frozen_parameters_stay_to_the_bit_and_the_others_train():
    net = Pyramid()
    net.parts["stages"].freeze()
    assert not net.frozen and net.parts["stages"].frozen
    assert set(net.trained) == {k for k in net.params if not k.startswith("stages.")}
    before = {k: v.copy() for k, v in net.arrays().items()}
    sgd = SGD(net, 0.9, 0.1)
    for _ in range(2):
        ys, cache = net.forward(distinct((1, 6, 5, 2), 0), True)
        net.backward(ys, cache)
        sgd.step(0.01)
    for k, v in net.arrays().items():
        assert (v.tobytes() == before[k].tobytes()) == k.startswith("stages."), k


def test_one_layer_in_two_places_is_refused():
    layer = conv(2, 2)
    with pytest.raises(ValueError, match="^Sequential: a layer must stand in one place, got it as 0 and 2: use Shared"):
        Sequential(layer, ReLU(), layer)
    with pytest.raises(ValueError, match="^Fork: a layer must stand in one place, got it as a.0 and b.branch: use Shared"):
        Fork(a=Sequential(layer), b=Residual(layer))
    relu = ReLU()
    Sequential(relu, conv(2, 2), relu)                                  # nothing to train: no harm


def test_leaves_are_the_layers_by_their_full_names():
    net = Fork(a=Sequential(conv(2, 2), ReLU()), b=Residual(conv(2, 2, seed=1)))
    assert {k: type(v).__name__ for k, v in net.leaves().items()} == {"a.0": "Conv2D", "a.1": "ReLU", "b.branch": "Conv2D"}
    assert [k.rsplit(".", 1)[0] for k in net.params] == ["a.0", "a.0", "b.branch", "b.branch"]


def test_fold_answers_as_the_net_does_with_fewer_layers():
    net = Sequential(conv(2, 3), norm(3), ReLU(), Residual(Sequential(conv(3, 3, seed=1), norm(3)), conv(3, 3, 1, seed=2)), norm(3),
                     MaxPool(2), conv(3, 2), norm(2), norm(2), GlobalMaxPool(), Linear(2, 2, rng=np.random.default_rng(0), dtype=np.float64))
    x, before = distinct((2, 6, 5, 2), 0), {k: v.copy() for k, v in net.arrays().items()}
    folded = fold(net)
    assert_allclose(folded(x), net(x), rtol=1e-12, atol=1e-12)
    y, cache = folded.forward(x)
    folded.backward(y, cache)
    assert not any(g.any() for g in net.grads.values()) and any(g.any() for g in folded.grads.values())
    kinds = [type(layer).__name__ for layer in folded.leaves().values()]
    assert kinds.count("BatchNorm") == 1 and kinds.count("Conv2D") == 4           # the one behind the sum has no convolution to go into
    assert set(folded.params) == {k for k in net.params if not k.startswith(("1.", "3.branch.1.", "7.", "8."))}
    for a in folded.arrays().values():
        a += 1
    for k, v in net.arrays().items():
        assert_array_equal(v, before[k])
    assert folded.grads.keys() == folded.params.keys() and net.parts.keys() != folded.parts.keys()


def test_fold_keeps_the_relu_of_a_batch_norm_in_its_place():
    """And folds nothing through it."""
    net = Sequential(conv(2, 3), norm(3), norm(3, relu=True), norm(3), conv(3, 2, seed=1), norm(2, relu=True))
    x, folded = distinct((2, 6, 5, 2), 0), fold(net)
    assert (net(x) == 0).any()
    assert_allclose(folded(x), net(x), rtol=1e-12, atol=1e-12)
    assert {k: repr(layer) for k, layer in folded.leaves().items()} == {
        "0": "Conv2D 3x3/1 2 -> 3, pad 1 + ReLU", "3": "BatchNorm", "4": "Conv2D 3x3/1 3 -> 2, pad 1 + ReLU"}


def test_fold_leaves_a_convolution_of_another_kind_alone():
    class Rectified(Conv2D):
        def forward(self, x, train=False, rng=None):
            y, cache = super().forward(x, train, rng)
            return np.maximum(y, 0), cache
    net = Sequential(Rectified(2, 3, 3, rng=np.random.default_rng(0), dtype=np.float64), norm(3))
    x = distinct((1, 4, 4, 2), 0)
    assert_array_equal(fold(net)(x), net(x))


def test_fold_keeps_what_reads_every_stage():
    """In Stages the output of a convolution is used itself: its batch norm must stay."""
    net = Stages(conv(2, 3), norm(3))
    x = distinct((1, 4, 4, 2), 0)
    for a, b in zip(fold(net)(x), net(x), strict=True):
        assert_array_equal(a, b)
