"""What `python -m tinydet.gradcheck` proves: every op, layer, loss and update of the engine, with inputs that stay off the kinks.

A case is drawn anew from every generator it is given: shapes, strides, paddings, options and values.
"""
import dataclasses
from collections.abc import Callable

import numpy as np

from tinydet import layers, optim
from tinydet.backend import BACKENDS, array_module, put, to_numpy, use
from tinydet.ops import (add, ap_loss, auc_loss, batch_norm, box_loss, concat, conv, dropout, focal_loss, global_max_pool, linear, logistic_loss, lrn,
                         map_loss, max_pool, offset_pool, relu, roi_loss, roi_pool, softmax_loss, upsample)


@dataclasses.dataclass
class Case:
    """One thing to prove.

    op: stem of the op's file, or class of the layer or optimiser. what: the function and variant. kind and draw(rng):
    - "gradient": forward, backward, inputs for gradcheck.check_grad;
    - "loss": a function and its inputs, for gradcheck.check_loss;
    - "definition": pairs (got, expected): an update that is no derivative of a loss, against its definition;
    - "no gradient": draw is None; `why` says what tests it instead.
    float32: the bound on |float32 - float64| / max(1, |float64|) of results and gradients; None: float64 only.
    """

    op: str
    what: str
    kind: str
    draw: Callable | None
    float32: float | None = None
    why: str = ""
    on: tuple = BACKENDS                # fewer for a stem that only the CPU has


def like(x, a):
    """A fixed array of a case, on the backend in use, in x's dtype."""
    return put(a.astype(x.dtype))


def distinct(rng, *shape):
    """Values at least 0.25 apart and at least 0.125 from 0, of both signs, in random order: no kink within a small step."""
    size = int(np.prod(shape))
    return (rng.permutation(size).reshape(shape) - size // 2 + 0.5) / 4


def _map(rng, low=1, high=5):
    """(N, H, W, C) with sides from low to high, drawn apart, and up to 3 channels."""
    return distinct(rng, int(rng.integers(1, 3)), *(int(s) for s in rng.integers(low, high + 1, 2)), int(rng.integers(1, 4)))


def _conv(rng):
    kh, kw, stride, dilation = (int(v) for v in rng.integers(1, 4, 4))
    pad = tuple(int(p) for p in rng.integers(0, 3, 4))
    x = _map(rng, 1 + 2 * dilation, 7)                                  # the largest kernel fits without padding
    w, b = rng.standard_normal((kh, kw, x.shape[3], 2)), rng.standard_normal(2)
    return lambda x, w, b: conv.forward(x, w, b, stride, pad, dilation), conv.backward, [x, w, b]


def _square(size, stride=1):
    """A kernel that ops/conv.py hands to conv_winograd.py or, with a stride, to conv_direct.py."""
    def case(rng):
        x, w, b = (rng.standard_normal(s) for s in ((2, size + 4, size + 5, 2), (size, size, 2, 3), (3,)))
        return lambda x, w, b: conv.forward(x, w, b, stride, (1, 0, 2, 1)), conv.backward, [x, w, b]
    return case


def _conv_relu(rng):
    x, w, b = (rng.standard_normal(s) for s in ((2, 5, 6, 2), (3, 3, 2, 3), (3,)))
    while abs(conv.forward(put(x), put(w), put(b), 1, 1)[0]).min() < 0.01:
        b += 0.01                                                       # off the kink
    return lambda x, w, b: conv.forward(x, w, b, 1, 1, relu=True), conv.backward, [x, w, b]


def _conv_im2col(rng):
    """The baseline on a GPU; on the CPU the usual way."""
    def unrolled(f):
        def run(*args):
            with conv.unrolled():
                return f(*args)
        return run
    x, w, b = (rng.standard_normal(s) for s in ((2, 7, 6, 2), (3, 2, 2, 3), (3,)))
    return unrolled(lambda x, w, b: conv.forward(x, w, b, 2, (1, 0, 2, 1), 2)), unrolled(conv.backward), [x, w, b]


def _max_pool(overlap, ceil):
    def draw(rng):
        size = int(rng.integers(2, 4))
        stride = int(rng.integers(1, size)) if overlap else size + int(rng.integers(0, 2))
        pad = tuple(int(p) for p in rng.integers(0, size, 4))
        return lambda x: max_pool.forward(x, size, stride, pad, ceil), max_pool.backward, [_map(rng, 3, 7)]
    return draw


def _roi_pool(float_bins):
    """Regions inside, across the border, outside and malformed."""
    def draw(rng):
        x, R = _map(rng, 1, 6), int(rng.integers(1, 5))
        rois = np.concatenate([rng.integers(0, len(x), (R, 1)), rng.integers(-16, 64, (R, 4))], 1)
        size = tuple(int(s) for s in rng.integers(1, 5, 2))
        return lambda x: roi_pool.forward(x, like(x, rois), size, 1 / 8, float_bins), roi_pool.backward, [x]
    return draw


def _roi_loss(**options):
    def draw(rng):
        R = int(rng.integers(1, 5))
        labels, targets = rng.integers(-1, 3, R), rng.integers(-8, 8, (R, 4)).astype(float)      # differences keep off 0 and beta
        deltas = np.repeat(targets[:, None], 3, 1) + distinct(rng, R, 3, 4)
        return (lambda s, d: roi_loss.loss(s, d, put(labels), like(s, targets), **options)), [rng.standard_normal((R, 3)), deltas.reshape(R, 12)]
    return draw


def _lrn(k, divide, beta):
    def draw(rng):
        size = int(rng.choice([1, 3, 5]))
        x = rng.standard_normal((1, 2, 3, int(rng.integers(1, 8))))
        return lambda x: lrn.forward(x, size, 0.5, beta, k, divide), lrn.backward, [x]
    return draw


def _batch_norm(frozen, relu):
    def draw(rng):
        C = int(rng.integers(1, 4))
        x, gamma, beta = rng.standard_normal((2, 3, 2, C)), *rng.standard_normal((2, C))
        given = (rng.standard_normal(C), rng.random(C) + 0.5) if frozen else ()

        def forward(x, gamma, beta, relu=relu):
            run = batch_norm.forward_frozen if frozen else batch_norm.forward
            return run(x, gamma, beta, *(like(x, a) for a in given), relu=relu)
        while relu and abs(forward(*map(put, (x, gamma, beta)), False)[0]).min() < 0.01:
            beta += 0.01                                                # off the kink
        return forward, batch_norm.backward, [x, gamma, beta]
    return draw


def _fold(rng):
    x, w = rng.standard_normal((1, 4, 5, 3)), rng.standard_normal((3, 3, 3, 2))
    b, gamma, beta, mean = rng.standard_normal((4, 2))
    var = rng.random(2) + 0.5
    x, w, b, gamma, beta, mean, var = map(put, (x, w, b, gamma, beta, mean, var))
    expected = batch_norm.forward_frozen(conv.forward(x, w, b)[0], gamma, beta, mean, var)[0]
    return [(conv.forward(x, *batch_norm.fold(w, b, gamma, beta, mean, var))[0], expected)]


def _dropout(by_map, inverted):
    def draw(rng):
        seed = int(rng.integers(1 << 30))
        return lambda x: dropout.forward(x, 0.4, np.random.default_rng(seed), by_map, inverted), dropout.backward, [_map(rng)]
    return draw


def _global_max_pool(masked):
    def draw(rng):
        x = _map(rng)
        mask = rng.random(x.shape) < 0.5
        mask[:, 0, 0] |= ~mask.any((1, 2))
        return lambda x: global_max_pool.forward(x, put(mask) if masked else None), global_max_pool.backward, [x]
    return draw


def _upsample(rng):
    x, factor = _map(rng), int(rng.integers(1, 4))
    size = tuple(side * factor - int(rng.integers(0, factor)) for side in x.shape[1:3])
    return lambda x: upsample.forward(x, factor, size), upsample.backward, [x]


def _concat(rng):
    axis = int(rng.integers(-1, 3))
    shape = [2, 3, 4]
    xs = []
    for _ in range(3):
        shape[axis] = int(rng.integers(0, 4))
        xs.append(rng.standard_normal(shape))
    return lambda *xs: concat.forward(xs, axis), concat.backward, xs


def _scores(loss, low, **options):
    """A loss of scores (R, K) and labels (R, K) from `low` to 1."""
    def draw(rng):
        x = 3 * rng.standard_normal((int(rng.integers(1, 6)), 3))
        labels = rng.integers(low, 2, x.shape)
        return lambda x: loss(x, put(labels), **options), [x]
    return draw


def _ap_loss(delta, interpolated):
    """The update, no derivative of the loss, is that of sum C_ij (s_j - s_i), C the reference's weights at the drawn scores: sum g_k s_k."""
    def draw(rng):
        x = 2 * rng.standard_normal(12)
        labels = rng.permutation([1, 1, 1, 0, 0, 0, 0, 0, *rng.integers(-1, 2, 4)])
        with use("numpy"):
            frozen = ap_loss.ap_loss(x, labels, delta, interpolated)[1]
        return lambda x: ((x * like(x, frozen)).sum(), ap_loss.ap_loss(x, put(labels), delta, interpolated)[1]), [x]
    return draw


def _map_loss(ap):
    """The finite step, no derivative of the loss, is that of f_i smoothed by a box of half width delta, the other scores frozen: for a jump of
    f_i at b, jump / (2 delta) * (max(s_i + delta - b, 0) - max(s_i - delta - b, 0))."""
    def draw(rng):
        n, C, delta = 8, 2, 0.6                                         # 0.1 off the scores
        x, corner = distinct(rng, n, C), rng.uniform(0, 12, (n, 2))
        boxes, images = np.concatenate([corner, corner + rng.uniform(8, 14, (n, 2))], 1).round(1), np.arange(n) % 2
        objects, labels, at = boxes[[0, 1, 2, 5]] + 0.5, np.array([0, 1, 1, 0]), images[[0, 1, 2, 5]]
        points, jumps = np.zeros((2, n, C, 4 * n))
        for i, c in np.ndindex(n, C):
            b, values, *_ = map_loss.profile(x, boxes, images, objects, labels, at, window=i, label=c, ap=ap)
            points[i, c, :len(b)], jumps[i, c, :len(b)] = b, np.diff(values)

        def loss(x):
            xp, (b, jump) = array_module(x), (like(x, a) for a in (points, jumps))
            reached = xp.maximum(x[:, :, None] + delta - b, 0) - xp.maximum(x[:, :, None] - delta - b, 0)
            g = map_loss.loss(x, like(x, boxes), images, objects.astype(x.dtype), labels, at, ap=ap, delta=delta)[1]
            return -(jump * reached).sum() / (2 * delta * C), g
        return loss, [x]
    return draw


def _softmax_loss(rng):
    x = 3 * rng.standard_normal((5, int(rng.integers(1, 5))))
    labels = rng.integers(-1, x.shape[1], 5)
    return lambda x: softmax_loss.loss(x, put(labels)), [x]


def _box_loss(loss, **options):
    def draw(rng):
        R = int(rng.integers(1, 6))
        target, mask = rng.integers(-8, 8, (R, 4)).astype(float), rng.random(R) < 0.7      # differences keep off 0 and beta
        return lambda x: loss(x, like(x, target), put(mask), **options), [target + distinct(rng, R, 4)]
    return draw


# Layers: gradients of the input and of every parameter, in training; each output of several has a gradient of its own

def _conv_layer(rng, Cout=2, size=3, **options):
    return layers.Conv2D(2, Cout, size, rng=rng, dtype=np.float64, **{"pad": size // 2, **options})


def _norm():
    return layers.BatchNorm(2, dtype=np.float64)


LAYERS = {
    "Conv2D": lambda rng: _conv_layer(rng, stride=2, pad=(2, 1, 0, 1)),
    "Linear": lambda rng: layers.Sequential(layers.Flatten(), layers.Linear(5 * 4 * 2, 3, rng=rng, dtype=np.float64)),
    "Flatten": lambda rng: layers.Flatten(),
    "BatchNorm": lambda rng: _norm(),
    "ReLU": lambda rng: layers.ReLU(),
    "LRN": lambda rng: layers.LRN(3, 0.01),
    "MaxPool": lambda rng: layers.MaxPool(3, 2, 1, ceil=True),
    "OffsetPool": lambda rng: layers.OffsetPool(2),
    "GlobalMaxPool": lambda rng: layers.GlobalMaxPool(),
    "Upsample": lambda rng: layers.Upsample(2),
    "Dropout": lambda rng: layers.Dropout(0.3),
    "Sequential": lambda rng: layers.Sequential(_conv_layer(rng), _norm(), layers.MaxPool(2)),
    "Stages": lambda rng: layers.Stages(_conv_layer(rng), layers.MaxPool(2), _conv_layer(rng)),
    "Residual": lambda rng: layers.Residual(layers.Sequential(_conv_layer(rng, stride=2), _norm()), _conv_layer(rng, size=1, stride=2)),
    "Fork": lambda rng: layers.Fork(scores=_conv_layer(rng), edges=_conv_layer(rng, Cout=1)),
    "Shared": lambda rng: layers.Shared(_conv_layer(rng)),
    "Concat": lambda rng: layers.Concat(a=_conv_layer(rng), b=layers.MaxPool(3, 1, 1)),
}


def of_layer(layer, x, seed=0):
    """forward, backward and inputs (x, then every parameter that trains) of a layer in training, for gradcheck.check_grad.

    The layer moves to the backend in use; the inputs are NumPy arrays.
    x: an array, or a list of arrays for a layer that takes a list. seed: of dropout's generator.
    """
    layer.to(put)
    several = isinstance(x, list)
    count, names = len(x) if several else 1, list(layer.trained)

    def forward(*inputs):
        for name, p in zip(names, inputs[count:]):
            layer.params[name][...] = p
        return layer.forward(list(inputs[:count]) if several else inputs[0], True, np.random.default_rng(seed))

    def backward(dy, cache):
        for g in layer.grads.values():
            g[...] = 0
        dx = layer.backward(dy, cache)
        return [*(dx if several else [dx]), *(layer.grads[name].copy() for name in names)]
    return forward, backward, [*(x if several else [x]), *(to_numpy(layer.params[name]).copy() for name in names)]


def _layer(name):
    def draw(rng):
        layer, x = LAYERS[name](rng), distinct(rng, 2, 5, 4, 2)
        for p in layer.params.values():
            p += rng.standard_normal(p.shape) / 2                       # biases that are not 0, gammas that are not 1
        return of_layer(layer, [x, distinct(rng, 1, 3, 3, 2)] if name == "Shared" else x, int(rng.integers(1 << 30)))
    return draw


# Optimisers: no gradient, three steps of a parameter against the rule, number by number

def _optimiser(make, rule):
    """rule(w, g, state, lr) gives the next w and state of one number; state starts as None."""
    def draw(rng):
        layer = layers.Layer(w=rng.standard_normal((2, 3)), b=rng.standard_normal(3))
        expected = {k: [(float(w), None) for w in p.ravel()] for k, p in layer.params.items()}
        optimiser = make(layer.to(put))
        for lr in (0.1, 0.1, 0.01):
            for k in layer.grads:
                gradient = rng.standard_normal(layer.grads[k].shape)
                layer.grads[k] += put(gradient)
                expected[k] = [rule(w, float(gi), state, lr, k) for (w, state), gi in zip(expected[k], gradient.ravel())]
            optimiser.step(lr)
        return [(layer.params[k], np.reshape([w for w, _ in expected[k]], layer.params[k].shape)) for k in expected]
    return draw


def _plain(w, g, v, lr, name):
    v = 0.9 * (v or 0) + g + (0.1 * w if name == "w" else 0)
    return w - lr * v, v


def _caffe(w, g, v, lr, name):
    v = 0.9 * (v or 0) + lr * (g + (0.1 * w if name == "w" else 0))
    return w - v, v


def _adagrad(w, g, m, lr, name):
    g = g + 0.1 * w
    m = (1e-10 if m is None else m) + g * g
    return w - lr * g / m ** 0.5, m


def _clip_norm(rng):
    grads = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    norm = sum(float(v) ** 2 for g in grads.values() for v in g.ravel()) ** 0.5
    expected = [(g * (0.5 / norm)) for g in grads.values()]
    grads = {k: put(g) for k, g in grads.items()}
    return [(optim.clip_norm(grads, 0.5), norm), *zip(grads.values(), expected)]


def _clip_value(rng):
    grads = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    expected = [np.array([min(max(float(v), -0.5), 0.5) for v in g.ravel()]).reshape(g.shape) for g in grads.values()]
    grads = {k: put(g) for k, g in grads.items()}
    optim.clip_value(grads, 0.5)
    return list(zip(grads.values(), expected))


def _schedules(rng):
    """Both schedules at 40 times, by the formulas of their docstrings."""
    at, factor, warmup = sorted(rng.integers(0, 30, 3).tolist()), float(rng.random()), int(rng.integers(1, 9))
    step, cosine = optim.step_schedule(0.1, at, factor), optim.cosine_schedule(0.1, 30, warmup)
    risen = [0.1 * (t + 1) / warmup if t < warmup else 0.05 * (1 + np.cos(np.pi * min(t - warmup, 30 - warmup) / (30 - warmup))) for t in range(40)]
    return [(np.array([step(t) for t in range(40)]), np.array([0.1 * factor ** len([a for a in at if a <= t]) for t in range(40)])),
            (np.array([cosine(t) for t in range(40)]), np.array(risen))]


def _running_averages(rng):
    """run = 0.9 run + 0.1 batch, over three batches; the variance counts m - 1."""
    layer, mean, var = _norm().to(put), np.zeros(2), np.ones(2)
    for _ in range(3):
        x = rng.standard_normal((2, 3, 4, 2))
        layer.forward(put(x), train=True)
        mean, var = 0.9 * mean + 0.1 * x.mean((0, 1, 2)), 0.9 * var + 0.1 * x.var((0, 1, 2), ddof=1)
    return [(layer.state["mean"], mean), (layer.state["var"], var)]


CASES = [
    Case("conv", "stride, padding on each side, dilation", "gradient", _conv, 1e-5),
    *(Case("conv_winograd", f"{r}x{r}", "gradient", _square(r), 1e-5, on=("numpy", "numba")) for r in (3, 4, 5, 7)),
    Case("conv_direct", "4x4, stride 3", "gradient", _square(4, 3), 1e-5, on=("numpy", "numba")),
    Case("conv_im2col", "stride 2, dilation 2, asymmetric padding", "gradient", _conv_im2col, 1e-5),
    Case("conv", "with ReLU", "gradient", _conv_relu, 1e-5),
    Case("linear", "", "gradient", lambda rng: (linear.forward, linear.backward, [rng.standard_normal(s) for s in ((4, 3), (3, 2), 2)]), 1e-5),
    Case("relu", "", "gradient", lambda rng: (relu.forward, relu.backward, [_map(rng)]), 0),
    Case("max_pool", "overlapping, floor", "gradient", _max_pool(True, False), 1e-6),
    Case("max_pool", "overlapping, ceil", "gradient", _max_pool(True, True), 1e-6),
    Case("max_pool", "apart, ceil", "gradient", _max_pool(False, True), 1e-6),
    Case("offset_pool", "", "gradient", lambda rng: (lambda x: offset_pool.forward(x, 2), offset_pool.backward, [_map(rng, 2)]), 1e-6),
    Case("roi_pool", "integer bins", "gradient", _roi_pool(False), 1e-6),
    Case("roi_pool", "Caffe's bins", "gradient", _roi_pool(True), 1e-6),
    Case("global_max_pool", "", "gradient", _global_max_pool(False), 0),
    Case("global_max_pool", "masked", "gradient", _global_max_pool(True), 0),
    Case("lrn", "k 1, alpha / n", "gradient", _lrn(1.0, True, 0.75), 1e-5),
    Case("lrn", "k 2, alpha undivided", "gradient", _lrn(2.0, False, 0.6), 1e-5),
    Case("batch_norm", "training", "gradient", _batch_norm(False, False), 1e-5),
    Case("batch_norm", "frozen", "gradient", _batch_norm(True, False), 1e-5),
    Case("batch_norm", "training, with ReLU", "gradient", _batch_norm(False, True), 1e-5),
    Case("batch_norm", "frozen, with ReLU", "gradient", _batch_norm(True, True), 1e-5),
    Case("batch_norm", "fold into conv", "definition", _fold),
    Case("dropout", "inverted", "gradient", _dropout(False, True), 1e-6),
    Case("dropout", "by map, classical", "gradient", _dropout(True, False), 1e-6),
    Case("dropout", "classical at test time", "gradient", lambda rng: (lambda x: dropout.forward_test(x, 0.4), dropout.backward, [_map(rng)]), 1e-6),
    Case("upsample", "", "gradient", _upsample, 1e-6),
    Case("add", "", "gradient", lambda rng: (add.forward, add.backward, [rng.standard_normal((2, 3)) for _ in "ab"]), 1e-6),
    Case("concat", "", "gradient", _concat, 1e-6),
    Case("softmax_loss", "", "loss", _softmax_loss, 1e-5),
    Case("logistic_loss", "labels -1, 0, 1", "loss", _scores(logistic_loss.loss, -1, signed=True), 1e-5),
    Case("logistic_loss", "labels 0, 1", "loss", _scores(logistic_loss.loss, 0, signed=False), 1e-5),
    Case("focal_loss", "alpha 0.25, gamma 2", "loss", _scores(focal_loss.loss, -1), 1e-5),
    Case("focal_loss", "gamma 0, no alpha", "loss", _scores(focal_loss.loss, -1, alpha=None, gamma=0), 1e-5),
    Case("ap_loss", "surrogate with frozen weights", "loss", _ap_loss(1.0, True), 1e-5),
    Case("ap_loss", "surrogate with frozen weights, plain, hard step", "loss", _ap_loss(0.0, False), 1e-5),
    Case("map_loss", "smoothed profiles", "loss", _map_loss("prec"), 1e-5),
    Case("map_loss", "smoothed profiles, interpolated", "loss", _map_loss("interp"), 1e-5),
    Case("auc_loss", "", "loss", _scores(auc_loss.auc_loss, -1), 1e-5),
    Case("roi_loss", "", "loss", _roi_loss(), 1e-5),
    Case("roi_loss", "focal, gamma 2", "loss", _roi_loss(gamma=2.0), 1e-5),
    Case("box_loss", "l2", "loss", _box_loss(box_loss.l2), 1e-5),
    Case("box_loss", "smooth_l1, beta 1", "loss", _box_loss(box_loss.smooth_l1), 1e-5),
    Case("box_loss", "smooth_l1, beta 0", "loss", _box_loss(box_loss.smooth_l1, beta=0), 1e-5),
    *(Case(name, "in training", "gradient", _layer(name)) for name in LAYERS),
    Case("BatchNorm", "running averages", "definition", _running_averages),
    Case("SGD", "plain form", "definition", _optimiser(lambda net: optim.SGD(net, 0.9, 0.1), _plain)),
    Case("SGD", "Caffe form", "definition", _optimiser(lambda net: optim.SGD(net, 0.9, 0.1, form="caffe"), _caffe)),
    Case("AdaGrad", "", "definition", _optimiser(lambda net: optim.AdaGrad(net, weight_decay=0.1), _adagrad)),
    Case("clip_norm", "", "definition", _clip_norm),
    Case("clip_value", "", "definition", _clip_value),
    Case("schedules", "step_schedule, cosine_schedule", "definition", _schedules),
    *(Case(op, what, "no gradient", None, why=f"tests/test_{op}.py compares it with its definition") for op, what in (
        ("assign", "a choice of boxes and anchors"), ("boxes", "targets are constants of training"), ("nms", "a choice of boxes"),
        ("ohem", "a choice of regions"), ("scan", "sums of indices and counts"), ("sort", "a choice of order"),
        ("soft_nms", "a choice of boxes and their scores"), ("box_voting", "applied to detections only"),
        ("merge", "applied to detections only"), ("smooth_ap", "array code; its gradient by differences there"))),
]
