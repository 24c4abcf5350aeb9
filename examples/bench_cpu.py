"""Time tinydet on this CPU beside PyTorch: every op, whole training steps, dense evaluation, memory.

    python examples/bench_cpu.py --json cpu.json
    python examples/bench_cpu.py --only conv boxes --match VGG16 --turns 3
    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python examples/bench_cpu.py --only conv --json avx2.json
    python examples/bench_cpu.py --show cpu.json avx2.json

One process, float32; ours, PyTorch NCHW and PyTorch channels_last in turn, each first equally often. Before it is timed every row is
checked: ops against float64 (the NumPy backend), nets and box ops against the peer. A ratio is ours / theirs, of the medians; in
brackets the quartiles of the turns' ratios. The first turn of a row compiles and does not count; short rows run
once untimed before each turn. GFLOP/s counts the direct method's
multiply-adds twice: Winograd's can pass the machine's sgemm. Without PyTorch (pip install torch) its columns stay empty.
Figures worth quoting need 20 turns, an idle machine and two threads each (NUMBA_NUM_THREADS, OPENBLAS_NUM_THREADS, --threads). tinydet
sets OMP_WAIT_POLICY=PASSIVE, which PyTorch's threads follow; set it to ACTIVE for PyTorch's own. The third command runs AVX2 code on
both sides, without its last two variables only on ours. A JSON file is gone on with, also when the code has changed, unless --fresh.
"""
import argparse
import gc
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import tinydet                                                      # before numpy: sets how BLAS threads wait
import numba
import numpy as np
import timing

from tinydet import files, layers, optim, use
from tinydet.models import overfeat
from tinydet.ops import assign, batch_norm, box_voting, conv, conv_direct, linear, lrn, max_pool, merge, nms, offset_pool, soft_nms, softmax_loss

try:
    import torch                                                    # after tinydet, as in a program that uses both
    from torch.nn import functional as F
except ImportError:
    torch = F = None

FORMATS = ("nchw", "channels_last") if torch else ()
PEERS = ("nchw", "channels_last", "numpy", "direct")
TARGETS = {"conv 3x3 s1": [("nchw", 0.75, 0.60)], "conv 5x5 s1": [("nchw", 0.65, None)], "conv 7x7 s1": [("nchw", 0.65, None)],
           "conv image": [("nchw", 0.65, None)], "conv 3x3 s2": [("nchw", 0.95, None)],
           "step demo": [("nchw", 0.75, None), ("channels_last", 0.90, None)], "step OverFeat-fast": [("nchw", 0.75, None)],
           "dense": [("nchw", 0.80, None)], "nms 10k": [("numpy", 0.10, None)], "memory step": [("nchw", 1.5, None)],
           "memory nms": [("linear", 1.5, None)]}                   # part: (peer, most for each row, most for the geometric mean)
VARIABLES = ("OPENBLAS_THREAD_TIMEOUT", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_CPU_NAME",
             "NUMBA_CPU_FEATURES", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

CONVS = {                                                           # part: (k, stride, pad), then name, Cin, Cout, H, W; batch 8
    "3x3 s1": ((3, 1, 1), ("OverFeat fast 3", 256, 512, 12, 12), ("OverFeat fast 4", 512, 1024, 12, 12), ("OverFeat fast 5", 1024, 1024, 12, 12),
               ("OverFeat accurate 3", 256, 512, 15, 15), ("OverFeat accurate 4", 512, 512, 15, 15), ("OverFeat accurate 5", 512, 1024, 15, 15),
               ("OverFeat accurate 6", 1024, 1024, 15, 15), ("VGG16 conv3_1", 128, 256, 56, 56), ("VGG16 conv3_2", 256, 256, 56, 56),
               ("VGG16 conv3_2 at 28", 256, 256, 28, 28), ("VGG16 conv4_1", 256, 512, 28, 28), ("VGG16 conv4_2", 512, 512, 28, 28),
               ("VGG16 conv5", 512, 512, 14, 14), ("small net 3", 32, 64, 60, 80), ("small net 5", 96, 96, 30, 40),
               ("small net 6", 96, 128, 30, 40), ("small net 7", 128, 128, 30, 40), ("small net 8", 128, 24, 30, 40),
               ("demo 2, crop 96", 16, 32, 48, 48), ("demo 3, crop 96", 32, 64, 24, 24), ("demo 4, crop 96", 64, 64, 24, 24),
               ("demo 2, crop 192", 16, 32, 96, 96), ("demo 3, crop 192", 32, 64, 48, 48), ("demo 4, crop 192", 64, 64, 48, 48)),
    "5x5 s1": ((5, 1, 0), ("OverFeat fast 2", 96, 256, 28, 28)), "7x7 s1": ((7, 1, 0), ("OverFeat accurate 2", 96, 256, 36, 36)),
    "image": ((11, 4, 0), ("OverFeat fast 1", 3, 96, 231, 231)), "image ": ((7, 2, 0), ("OverFeat accurate 1", 3, 96, 221, 221)),
    "4x4 s2 on images": ((4, 2, 1), ("demo 1, crop 96", 3, 16, 96, 96), ("demo 1, crop 192", 3, 16, 192, 192)),
    "3x3 s2": ((3, 2, 1), ("small net 1", 3, 16, 240, 320), ("small net 2", 16, 32, 120, 160), ("small net 4", 64, 96, 60, 80)),
    "heads": ((4, 1, 0), ("demo head, window 32", 64, 128, 12, 12)), "heads ": ((8, 1, 0), ("demo head, window 64", 64, 128, 24, 24)),
    "fc as conv": ((6, 1, 0), ("OverFeat fast 6", 1024, 3072, 6, 6)), "fc as conv ": ((5, 1, 0), ("OverFeat accurate 7", 1024, 4096, 5, 5)),
    "1x1": ((1, 1, 0), ("demo classifier", 128, 7, 9, 9), ("bottleneck", 256, 64, 56, 56), ("OverFeat accurate 8, dense", 4096, 4096, 5, 7))}
LINEARS = (("AlexNet fc6", 9216, 4096), ("OverFeat fast 7", 3072, 4096), ("OverFeat fast 8", 4096, 1000))      # batch 8

# Nets: Cout, k, stride, pad, pool. OverFeat's tables 1 and 3; of the accurate net the last pool, between rows 6 and 7, stands apart
FAST = ((96, 11, 4, 0, 2), (256, 5, 1, 0, 2), (512, 3, 1, 1, 0), (1024, 3, 1, 1, 0), (1024, 3, 1, 1, 2),
        (3072, 6, 1, 0, 0), (4096, 1, 1, 0, 0), (1000, 1, 1, 0, 0))
ACCURATE = ((96, 7, 2, 0, 3), (256, 7, 1, 0, 2), (512, 3, 1, 1, 0), (512, 3, 1, 1, 0), (1024, 3, 1, 1, 0), (1024, 3, 1, 1, 0),
            (4096, 5, 1, 0, 0), (4096, 1, 1, 0, 0), (1000, 1, 1, 0, 0))
SMALL = ((16, 3, 2, 1, 0), (32, 3, 2, 1, 0), (64, 3, 1, 1, 0), (96, 3, 2, 1, 0), (96, 3, 1, 1, 0), (128, 3, 1, 1, 0), (128, 3, 1, 1, 0),
         (24, 3, 1, 1, 0))
SCALES = ((245, 245), (281, 317), (317, 389), (389, 461), (425, 497), (461, 569))                              # OverFeat, table 5


# Rows. Each group yields (part, name, make); make() builds, checks, and returns the sides to time and what else the row tells

def conv_rows(quick):
    for part, ((k, stride, pad), *rows) in CONVS.items():
        for name, Cin, Cout, H, W in rows:
            N, Cin, Cout, H, W = (1, min(Cin, 16), min(Cout, 16), max(k, H // 8), max(k, W // 8)) if quick else (8, Cin, Cout, H, W)
            flops = 6 * N * Cin * Cout * k * k * ((H + 2 * pad - k) // stride + 1) * ((W + 2 * pad - k) // stride + 1)
            yield (f"conv {part.strip()}", f"{name}: {Cin}->{Cout} {k}x{k}/{stride} {H}x{W}",
                   partial(conv_sides, (N, H, W, Cin), Cout, k, stride, pad, flops=flops))
    for name, Cin, Cout in LINEARS:
        Cin, Cout = (Cin // 64, Cout // 8) if quick else (Cin, Cout)
        yield "linear", f"{name}: {Cin}->{Cout}", partial(
            op, linear.forward, linear.backward, {"x": (8, Cin), "w": (Cin, Cout), "b": (Cout,)}, F and F.linear, 5e-5, 48 * Cin * Cout)


def conv_sides(x, Cout, k, stride, pad, **more):
    return op(lambda x, w, b: conv.forward(x, w, b, stride, pad), conv.backward, {"x": x, "w": (k, k, x[3], Cout), "b": (Cout,)},
              lambda x, w, b: F.conv2d(x, w, b, stride, pad), 5e-5 if k == 3 else 2e-4, **more)


def way_rows(quick):
    """What conv.method chooses beside conv_direct, which serves every shape: forward and all gradients."""
    for Cin, Cout, side, k, pad in ((512, 512, 14, 3, 1), (256, 256, 28, 3, 1), (64, 64, 24, 3, 1), (16, 32, 48, 3, 1), (64, 128, 12, 4, 0),
                                    (96, 256, 28, 5, 0), (96, 256, 36, 7, 0), (256, 64, 56, 1, 0), (1024, 3072, 6, 6, 0), (512, 2048, 7, 5, 0)):
        Cin, Cout = (min(Cin, 16), min(Cout, 16)) if quick else (Cin, Cout)
        yield "ways", f"{Cin}->{Cout} {k}x{k}/1 {side}x{side}", partial(ways, (1 if quick else 8, side, side, Cin), Cout, k, pad)


def ways(shape, Cout, k, pad):
    x, w, b = normal(*shape), normal(k, k, shape[3], Cout), np.zeros(Cout, np.float32)
    y, cache = conv.forward(x, w, b, 1, pad)

    def direct():
        conv_direct.forward(x, w, b, 1, (pad,) * 4, 1, y.shape[1:3])
        conv_direct.backward(y, x, w, 1, (pad,) * 4, 1, True, True)
        y.sum((0, 1, 2))                                                # db
    return {"ours": lambda: conv.backward(y, conv.forward(x, w, b, 1, pad)[1]), "direct": direct}, {"way": conv.method(x, w, 1, (pad,) * 4, 1)}


def op_rows(quick, part="ops", **more):
    N, side = (1, 12) if quick else (8, 56)
    maps, channels = {"x": (N, side, side, 64)}, {"gamma": (64,), "beta": (64,)}
    for name, forward, backward, shapes, theirs in (
            ("max_pool 2", lambda x: max_pool.forward(x, 2), max_pool.backward, maps, lambda x: F.max_pool2d(x, 2)),
            ("max_pool 3/2, padded", lambda x: max_pool.forward(x, 3, 2, 1), max_pool.backward, maps, lambda x: F.max_pool2d(x, 3, 2, 1)),
            ("offset_pool 3", lambda x: offset_pool.forward(x, 3), offset_pool.backward, maps, lambda x: F.max_pool2d(x, 3, 1)),
            ("batch_norm + relu", partial(batch_norm.forward, relu=True), batch_norm.backward, {**maps, **channels},
             lambda x, gamma, beta: F.relu(F.batch_norm(x, None, None, gamma, beta, training=True))),
            ("lrn", lrn.forward, lrn.backward, {"x": (N, side // 2, side // 2, 96)}, lambda x: F.local_response_norm(x, 5))):
        yield part, name, partial(op, forward, backward, shapes, theirs, **more)
    if part == "ops":
        labels = np.random.default_rng(2).integers(0, 81, N * side * side)
        yield "ops", "softmax_loss, 81 classes", partial(
            op, lambda x: softmax_loss.loss(x, labels), lambda dy, dx: dx, {"x": (len(labels), 81)},
            lambda x: F.cross_entropy(x, torch.from_numpy(labels)))
        yield "ops", "SGD, 10 arrays of " + ("1 k" if quick else "1 M"), partial(sgd, 32 if quick else 1000)


def numpy_rows(quick):
    """Numba beside the NumPy reference, for the ops that have both: the net's convolutions, the ops above, boxes."""
    N, side = (1, 16) if quick else (16, 64)
    for H, Cin, Cout, k, stride, pad in ((2 * side, 3, 16, 4, 2, 1), (side, 16, 32, 3, 1, 1), (side // 2, 64, 64, 3, 1, 1),
                                         (side // 4, 64, 128, 4, 1, 0)):
        yield "numpy", f"conv {Cin}->{Cout} {k}x{k}/{stride} {H}x{H}", partial(conv_sides, (N, H, H, Cin), Cout, k, stride, pad, numpy=True)
    yield from op_rows(quick, "numpy", numpy=True)
    boxes, scores = proposals(200 if quick else 2000)
    groups, kept = np.random.default_rng(0).integers(0, 80, len(boxes)), nms.nms(boxes, scores, 0.3)
    for name, run in ((f"nms {len(boxes)} boxes, 80 groups", lambda: nms.nms(boxes, scores, 0.5, groups=groups)),
                      (f"soft_nms {len(boxes)} boxes", lambda: soft_nms.soft_nms(boxes, scores)),
                      (f"box_voting {len(kept)} of {len(boxes)} boxes", lambda: box_voting.box_voting(boxes[kept], boxes, scores)),
                      ("merge 150 boxes", lambda: merge.merge(boxes[:150], scores[:150]))):
        yield "numpy", name, partial(beside_numpy, run)


def box_rows(quick):
    for size, kind, make in ((1, "clustered", proposals), (1, "spread", spread), (10, "clustered", proposals), (10, "spread", spread),
                             (50, "clustered", proposals)):             # 50k spread boxes take NumPy more than a minute
        boxes, scores = make(size * (20 if quick else 1000))
        yield f"nms {size}k", f"nms {size}k boxes, {kind}", partial(beside_numpy, lambda b=boxes, s=scores: nms.nms(b, s, 0.5))
    anchors, objects = proposals(2000 if quick else 100000)[0], proposals(2500)[0][::50]
    yield "assign", f"assign.best {len(anchors)} anchors, 50 boxes", partial(beside_numpy, lambda: assign.best(anchors, objects))


def step_rows(quick):
    yield "step demo", "demo detector, crops of 96, batch 32", partial(step, demo, quick)
    yield "step demo", "small net, 240x320, batch 8", partial(step, small, quick)
    yield "step OverFeat-fast", "OverFeat-fast, 231x231, batch 16", partial(step, fast, quick)


def dense_rows(quick):
    yield "dense", "OverFeat-accurate, six scales, fine stride", partial(dense, quick)


def memory_rows(quick):
    yield "memory step", "OverFeat-fast step", partial(step_memory, quick)
    yield "memory nms", "nms 200k boxes", partial(nms_memory, 1000 if quick else 50000)


GROUPS = {"conv": conv_rows, "ways": way_rows, "ops": op_rows, "boxes": box_rows, "numpy": numpy_rows, "step": step_rows, "dense": dense_rows,
          "memory": memory_rows}


# Ops: forward and every gradient

AXES = {("x", 4): (0, 3, 1, 2), ("y", 4): (0, 3, 1, 2), ("w", 4): (3, 2, 0, 1), ("w", 2): (1, 0)}              # ours to PyTorch's


def tensor(name, a, layout):
    """A copy of one of our arrays in PyTorch's order of axes, which its name (x, w, dy, ...) tells."""
    t = torch.from_numpy(np.array(a.transpose(AXES.get((name[-1], a.ndim), range(a.ndim))), order="C"))
    return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and t.ndim == 4 else t


def array(name, a):
    return a if torch is None or not isinstance(a, torch.Tensor) else a.detach().numpy().transpose(
        np.argsort(AXES.get((name[-1], a.ndim), range(a.ndim))))


def off(found, wanted):
    """Largest difference, relative to the largest value."""
    if np.shape(found) != np.shape(wanted):
        raise ValueError(f"the shapes differ: {np.shape(found)}, {np.shape(wanted)}")
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def op(forward, backward, shapes, theirs=None, limit=2e-4, flops=0, numpy=False):
    """The sides of one op on random inputs. Raises ValueError if an output or gradient is more than limit off."""
    rng = np.random.default_rng(0)
    inputs = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    if "w" in inputs:
        inputs["w"] /= np.float32(np.sqrt(inputs["w"][..., 0].size))
    if "gamma" in inputs:
        inputs["x"] = np.round(64 * inputs["x"]) / 64               # no value so near relu's kink that rounding moves it across

    def gradients(dy, cache):
        grads = backward(dy, cache)
        return grads if isinstance(grads, tuple) else (grads,)

    def ours():
        y, cache = forward(*inputs.values())[:2]
        return y, *gradients(dy, cache)

    with use("numpy"):
        y, cache = forward(*(a.astype(np.float64) for a in inputs.values()))[:2]
        dy = rng.standard_normal(y.shape).astype(np.float32) if np.ndim(y) else np.ones((), np.float32)
        wanted = y, *gradients(dy.astype(np.float64), cache)
    sides = {"ours": ours, **({"numpy": on_numpy(ours)} if numpy else {})}
    for layout in () if numpy else FORMATS[:1 + any(a.ndim == 4 for a in inputs.values())]:
        leaves = [tensor(k, a, layout).requires_grad_() for k, a in inputs.items()]

        def peer(leaves=leaves, up=tensor("dy", dy, layout)):
            y = theirs(*leaves)
            return y, *torch.autograd.grad(y, leaves, up)
        sides[layout] = peer
    names = ("y", *(f"d{k}" for k in inputs))
    error = {side: {k: off(array(k, a), b) for k, a, b in zip(names, run(), wanted)} for side, run in sides.items()}
    for side, e in error.items():
        if not max(e.values()) <= limit:
            raise ValueError(f"{side} is off by {e} of the largest value, more than {limit:g}")
    return sides, {"error": error, "flops": flops}


def sgd(side):
    """One update of ten side x side arrays. Ours also refuses what is not finite and clears the gradients."""
    w, g = normal(2, 10, side, side)
    layer = layers.Layer(**{str(i): a.copy() for i, a in enumerate(w)})
    for i, a in enumerate(g):
        layer.grads[str(i)][...] = a
    optimizer = optim.SGD(layer, 0.9)
    sides, updated = {"ours": lambda: optimizer.step(0.01)}, {"ours": layer.params.values()}
    if torch:
        updated["nchw"] = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in w]
        for p, a in zip(updated["nchw"], g):
            p.grad = torch.from_numpy(a)
        sides["nchw"] = torch.optim.SGD(updated["nchw"], 0.01, momentum=0.9).step
    for name, run in sides.items():
        run()
        if not off(np.stack([array("p", p) for p in updated[name]]), w - 0.01 * g.astype(np.float64)) <= 1e-6:
            raise ValueError(f"the update of {name} is wrong")
    return sides, {}


# Boxes, beside the NumPy backend: nms as a greedy loop of vectorised steps, assignment by the matrix of all overlaps

def on_numpy(run):
    def numpy():
        with use("numpy"):
            return run()
    return numpy


def beside_numpy(run):
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (run(), on_numpy(run)()))):
        if off(a, b) > 1e-4 if a.dtype.kind == "f" else not np.array_equal(a, b):
            raise ValueError("the Numba and the NumPy version differ")
    return {"ours": run, "numpy": on_numpy(run)}, {}


def proposals(R):
    """R float32 boxes about R/50 objects, as a detector finds them, and scores."""
    rng = np.random.default_rng(0)
    objects, side = rng.uniform(0, 1000, (R // 50 + 1, 2)), rng.uniform(20, 200, (R // 50 + 1, 2))
    which = rng.integers(0, len(objects), R)
    corner, side = objects[which] + rng.normal(0, 0.1, (R, 2)) * side[which], side[which] * rng.uniform(0.8, 1.2, (R, 2))
    return np.concatenate([corner, corner + side], 1).astype(np.float32), rng.random(R).astype(np.float32)


def spread(R):
    """R float32 boxes of 20 to 60 pixels, of which nms at 0.5 keeps about 94 %, and scores."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40 * R ** 0.5, (R, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 60, (R, 2))], 1).astype(np.float32), rng.random(R).astype(np.float32)


# Nets, the same in both

def sequential(table, quick=False, Cin=3, norm=False, last_relu=False):
    """A net from rows of a table above; quick: a sixteenth of the channels. The image needs no gradient, in PyTorch neither."""
    rng = SimpleNamespace(standard_normal=partial(np.random.default_rng(0).standard_normal, dtype=np.float32))   # float64 is twice as large
    parts, image = [], Cin == 3
    for i, (Cout, k, stride, pad, pool) in enumerate(table):
        Cout = Cout // 16 if quick else Cout
        parts.append(layers.Conv2D(Cin, Cout, k, stride, pad, rng=rng, std=float(np.sqrt(2 / (k * k * Cin))), input_grad=i > 0 or not image))
        if i < len(table) - 1 or last_relu:
            parts.append(layers.BatchNorm(Cout, relu=True) if norm else layers.ReLU())
        parts += [layers.MaxPool(pool)] * (pool > 0)
        Cin = Cout
    return layers.Sequential(*parts, input_grad=not image)


def torch_net(layer):
    """The PyTorch module with a copy of the layer's weights, as its users write it: relu in place."""
    nn = torch.nn
    if isinstance(layer, layers.Composite):
        parts = {name: torch_net(part) for name, part in layer.parts.items()}
        return nn.Sequential(*parts.values()) if isinstance(layer, layers.Sequential) else nn.ModuleDict(parts)
    if isinstance(layer, layers.Conv2D):
        kh, kw, Cin, Cout = layer.params["w"].shape
        module = nn.utils.skip_init(nn.Conv2d, Cin, Cout, (kh, kw), layer.stride, layer.pad, layer.dilation)
        module.weight.data, module.bias.data = (tensor(k, layer.params[k], "nchw") for k in "wb")
        return module
    if isinstance(layer, layers.BatchNorm):
        module = nn.BatchNorm2d(len(layer.params["gamma"]), layer.eps, 1 - layer.momentum)
        return nn.Sequential(module, nn.ReLU(inplace=True)) if getattr(layer, "relu", False) else module
    if isinstance(layer, layers.MaxPool):
        return nn.MaxPool2d(layer.size, layer.stride, layer.pad, ceil_mode=layer.ceil)
    if isinstance(layer, (layers.ReLU, layers.Dropout)):
        return nn.ReLU(inplace=True) if isinstance(layer, layers.ReLU) else nn.Dropout(layer.p)
    raise TypeError(f"bench_cpu.torch_net: knows no {layer!r}")


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def demo(quick):
    """The demo detector: images, net, our loss with its gradients, PyTorch's loss of model and images."""
    N, side = (2, 48) if quick else (32, 96)
    net = overfeat.OverFeat(overfeat.Spec(tuple("abcdef"), "small", regressor="SCR", dropout=0.0, init=None, k=4, pool=2, background=True),
                            np.random.default_rng(0))
    labels = np.random.default_rng(1).integers(0, 7, (N, side // 8 - 3, side // 8 - 3))

    def loss(scores, edges):
        value, d = softmax_loss.loss(scores.reshape(-1, 7), labels.ravel())
        return value + float(np.mean(edges * edges)), d.reshape(scores.shape), edges * (2 / edges.size)

    def theirs(model, x):
        pooled = F.max_pool2d(model["trunk"](x), 2)
        return F.cross_entropy(model["classifier"](pooled), torch.from_numpy(labels)) + model["regressor"](pooled).square().mean()
    return normal(N, side, side, 3), net, loss, theirs


def small(quick):
    return (normal(1, 48, 64, 3) if quick else normal(8, 240, 320, 3), sequential(SMALL, norm=True),
            lambda y: (float(np.mean(y * y)), y * (2 / y.size)), lambda model, x: model(x).square().mean())


def fast(quick):
    N = 2 if quick else 16
    labels = np.random.default_rng(1).integers(0, 62 if quick else 1000, N)

    def loss(y):
        value, dy = softmax_loss.loss(y.reshape(N, -1), labels)
        return value, dy.reshape(y.shape)
    return (normal(N, 231, 231, 3), sequential(FAST, quick), loss,
            lambda model, x: F.cross_entropy(model(x).flatten(1), torch.from_numpy(labels)))


def step(build, quick, wanted=("ours", *FORMATS)):
    """Forward, loss, backward, SGD update of one net. The losses of the first two steps must agree: the second shows the gradients."""
    x, net, loss, theirs = build(quick)
    rng, sides, lr = np.random.default_rng(0), {}, 1e-4
    for layout in (side for side in wanted if side != "ours"):
        model, images = torch_net(net), tensor("x", x, layout)
        model = model.to(memory_format=torch.channels_last) if layout == "channels_last" else model

        def peer(model=model, images=images, optimizer=torch.optim.SGD(model.parameters(), lr, momentum=0.9)):
            value = theirs(model, images)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            return value.item()
        sides[layout] = peer
    if "ours" in wanted:
        optimizer = optim.SGD(net, 0.9)

        def ours():
            *ys, cache = net.forward(x, True, rng)
            value, *dys = loss(*ys)
            net.backward(*dys, cache)
            optimizer.step(lr)
            return value
        sides = {"ours": ours, **sides}
    else:
        net = None                                                      # its memory is not PyTorch's
    losses = {side: [run(), run()] for side, run in sides.items()}
    if not all(np.allclose(found, losses[wanted[0]], rtol=1e-4, atol=0) for found in losses.values()):
        raise ValueError(f"the losses of the first two steps differ: {losses}")
    return sides, {"first losses": losses[wanted[0]]}


def dense(quick):
    """The paper's six scales of one image: offset pooling and the classifier on every offset's map, beside the dilated network."""
    trunk = sequential(ACCURATE[:6], quick, last_relu=True)
    head = sequential(ACCURATE[6:], quick, ACCURATE[5][0] // (16 if quick else 1))
    images = [normal(1, H, W, 3) for H, W in SCALES[:2 if quick else 6]]

    def ours():
        found = []
        for x in images:
            maps = offset_pool.split(offset_pool.forward(trunk(x), 3)[0], 3)
            y = head(np.concatenate(maps))                              # all nine are of one size here: the weights are read once
            found.append(offset_pool.interleave(list(y[:, None]), 3))
        return found

    crops = np.concatenate([images[-1][:, :221, x:x + 221] for x in range(0, 96, 12)])

    def cropped():
        return head(max_pool.forward(trunk(crops), 3)[0])
    sides = {"ours": ours}
    for layout in FORMATS:
        model = torch.nn.Sequential(torch_net(trunk), torch.nn.MaxPool2d(3, 1), torch_net(head))
        model[2][0].dilation = (3, 3)                                   # every offset at once: the paper's skip-kernels
        model = model.to(memory_format=torch.channels_last) if layout == "channels_last" else model

        @torch.inference_mode()
        def peer(model=model, inputs=[tensor("x", x, layout) for x in images]):
            return [model(x) for x in inputs]
        sides[layout] = peer
    found, windows = ours(), sum(((H - 221) // 12 + 1) * ((W - 221) // 12 + 1) for H, W in SCALES[:len(images)])
    if sum(y[..., 0].size for y in found) != windows:
        raise ValueError(f"there are {windows} windows, got maps of {[y.shape for y in found]}")
    apart = max([0, *(off(array("y", a), b) for side in FORMATS for a, b in zip(sides[side](), found))])
    if not apart <= 1e-3:
        raise ValueError(f"the maps differ from PyTorch's by {apart} of the largest value")
    return {**sides, "eight windows": cropped}, {"apart from PyTorch": apart, "windows": windows}


# Memory, in fresh processes

def probe(what, quick):
    """In the fresh process: print the peak before and after the work, as JSON."""
    if what.isdigit():
        boxes, scores = proposals(int(what))
        nms.nms(boxes[:100], scores[:100], 0.5)                         # compiles
        before = timing.peak()
        nms.nms(boxes, scores, 0.5)
    else:
        before = timing.peak()
        step(fast, quick, (what,))                                      # two steps
    print(json.dumps([before, timing.peak()]))


def fresh(what, quick):
    return timing.fresh(__file__, ["--probe", what, "--threads", torch.get_num_threads() if torch else 1] + ["--quick"] * quick)


def step_memory(quick):
    """All processes import the same. The ratio is the larger of that of the peaks and that of what came on top of the imports."""
    found = {side: fresh(side, quick) for side in ("ours", *FORMATS)}
    base, most = found["ours"]
    return {}, {"MB after imports, at the peak": found,
                "ratio": {k: max(most / b, (most - base) / (b - a)) for k, (a, b) in found.items() if k != "ours"}}


def nms_memory(R):
    """What 4 R boxes add beside four times what R boxes add; less than a MB counts as one."""
    one, four = (after - before for before, after in (fresh(str(n), False) for n in (R, 4 * R)))
    return {}, {f"MB for {R} boxes": one, f"for {4 * R}": four, "ratio": {"linear": four / max(4 * one, 4)}}


# Measuring and telling

def measure(sides, turns):
    """Milliseconds of every turn (timing.measure)."""
    return {side: 1e3 * np.array(t) for side, t in timing.measure(sides, turns).items()}


def measured(part, name, make, turns, sgemm):
    """One row, of plain values."""
    sides, facts = make()
    speed = facts.pop("flops", 0) / 1e6
    times = measure(sides, turns) if sides else {}
    ms, peers = {k: float(np.median(t)) for k, t in times.items()}, [k for k in times if k in PEERS]
    row = {"part": part, "row": name, "ms": ms, "ratio": {k: ms["ours"] / ms[k] for k in peers},
           "quartiles": {k: np.quantile(times["ours"] / times[k], (0.25, 0.75)).tolist() for k in peers}, **facts}
    if speed:
        row |= {"GFLOP/s": speed / ms["ours"], "of sgemm": speed / ms["ours"] / sgemm}
    if "eight windows" in ms:
        row["times faster than cropping every window (sampled: a batch of eight; extrapolated)"] = (
            ms["eight windows"] * row["windows"] / 8 / ms["ours"])
    return row


HEAD = f"{'':50}{'ours ms':>10}  {'/ NCHW':22}{'/ channels_last':22}{'/ NumPy':22}{'/ direct':22}GFLOP/s  of sgemm  largest error / largest value"


def line(row):
    text = f"{row['row']:50}" + (f"{row['ms']['ours']:10.2f}  " if row["ms"] else " " * 12)
    for peer in PEERS:
        cell = [f"{row['ratio'][peer]:.3g}"] if peer in row["ratio"] else []
        cell += ["[{:.3g}, {:.3g}]".format(*row["quartiles"][peer])] if peer in row["quartiles"] else []
        text += f"{' '.join(cell):22}"
    text += f"{row['GFLOP/s']:7.0f}{row['of sgemm']:10.0%}  " if "GFLOP/s" in row else " " * 19
    told = ("part", "row", "group", "ms", "ratio", "quartiles", "error", "GFLOP/s", "of sgemm")
    return text + "  ".join([f"{k} {v:.0e}" for k, v in row.get("error", {}).get("ours", {}).items()]
                            + [f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items() if k not in told])


def verdicts(rows):
    """For every part and peer: rows, geometric mean and worst ratio, target, whether it is met, and the largest errors of the part."""
    told = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        error = {}
        for side, k, v in ((side, k, v) for row in mine for side, e in row.get("error", {}).items() for k, v in e.items()):
            error.setdefault(side, {}).setdefault(k, v)
            error[side][k] = max(v, error[side][k])
        for peer, each, mean in TARGETS.get(part, [(peer, None, None) for peer in PEERS]):
            if ratios := [row["ratio"][peer] for row in mine if peer in row["ratio"]]:
                worst, average = max(ratios), float(np.exp(np.mean(np.log(ratios))))
                told.append({"part": part, "peer": peer, "rows": len(ratios), "mean": average, "worst": worst, "target each": each,
                             "target mean": mean, "met": None if each is None else worst <= each and (mean is None or average <= mean), "error": error})
    return told


def tell(rows):
    print(f"\n{'part':22}{'beside':15}rows   mean  worst  {'target':32}largest error")
    for v in verdicts(rows):
        target = "" if v["met"] is None else (f"{v['target each']:g} each" + (f", mean {v['target mean']:g}" if v["target mean"] else "")
                                              + (": met" if v["met"] else ": MISSED"))
        print(f"{v['part']:22}{v['peer']:15}{v['rows']:4}{v['mean']:7.3f}{v['worst']:7.3f}  {target:32}"
              + "; ".join(" ".join([side, *(f"{k} {e:.0e}" for k, e in v["error"][side].items())])
                          for side in ("ours", v["peer"]) if side in v["error"]))


def read(path):
    result = files.read_json(path)
    if not isinstance(result, dict) or not {"settings", "rows"} <= result.keys():
        raise ValueError(f"bench_cpu: {path} must be a file that --json wrote")
    return result


def show(paths):
    """The ratios of several JSON files side by side, then what each file says of the targets."""
    results = {path: read(path) for path in paths}
    ratios = [{(row["part"], row["row"], peer): r for row in result["rows"] for peer, r in row["ratio"].items()} for result in results.values()]
    print(f"{'ours / theirs':64}" + "".join(f"{Path(path).stem:>12}" for path in results))
    for key in dict.fromkeys(k for r in ratios for k in r):
        print(f"{key[1]:50}{key[2]:14}" + "".join(f"{r[key]:12.3f}" if key in r else " " * 12 for r in ratios))
    for path, result in results.items():
        print(f"\n{path}: {result.get('date')}, {result['settings']}")
        tell(result["rows"])


def settings(args):
    """What the rows of one file must share."""
    try:
        cpu = next(s.split(":", 1)[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "turns": args.turns, "quick": args.quick,
            "threads": {"PyTorch": args.threads if torch else None, "Numba": numba.get_num_threads()},
            "versions": {"python": platform.python_version(), "tinydet": tinydet.__version__, "numpy": np.__version__,
                         "numba": numba.__version__, "torch": torch and torch.__version__},
            "environment": {k: os.environ.get(k) for k in VARIABLES}}


def main(args):
    if args.show:
        return show(args.show)
    if torch:
        torch.set_num_threads(args.threads)
    if args.probe:
        return probe(args.probe, args.quick)
    told, rows = settings(args), {}
    if args.json and Path(args.json).exists():
        before = read(args.json)
        if changed := [f"{k} was {before['settings'].get(k)}, is {v}" for k, v in told.items() if before["settings"].get(k) != v]:
            raise ValueError(f"bench_cpu: {args.json} holds rows of other settings ({'; '.join(changed)}): name another file, or delete it")
        rows = {(row["group"], row["row"]): row for row in before["rows"]}
    a = normal(*[256 if args.quick else 2048] * 2)
    sgemm = 2 * len(a)**3 / np.median(measure({"": lambda: a @ a}, 5)[""]) / 1e6
    print(f"{told}\nsgemm {sgemm:.0f} GFLOP/s. The first turn of every row compiles (seconds to minutes) and does not count.\n{HEAD}", flush=True)
    wanted = [(group, *row) for group in args.only for row in GROUPS[group](args.quick) if args.match in row[1]]
    for i, (group, part, name, make) in enumerate(wanted, 1):
        kept = (group, name) in rows and not args.fresh
        try:
            row = rows[group, name] if kept else {"group": group, **measured(part, name, make, args.turns, sgemm)}
        except ValueError as error:
            raise ValueError(f"bench_cpu: {name}: {error}") from None
        rows[group, name] = row
        print(f"{line(row)}  ({i}/{len(wanted)}{', kept' if kept else ''})", flush=True)
        if args.json:
            files.write(args.json, json.dumps({"settings": told, "date": time.strftime("%Y-%m-%d %H:%M"), "sgemm GFLOP/s": sgemm,
                                               "rows": list(rows.values()), "summary": verdicts(list(rows.values()))}, indent=1) + "\n")
        gc.collect()                                                    # this row's arrays, before the next row's
    tell([rows[group, name] for group, _, name, _ in wanted])
    if args.turns < 20:
        print("fewer than 20 turns: not for quoting")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--match", default="", metavar="TEXT", help="only rows whose name holds it")
    parser.add_argument("--turns", type=int, default=20, help="timed turns of a row (%(default)s; figures that are quoted need 20)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of PyTorch (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all to it after every row; rows that it holds are not measured again")
    parser.add_argument("--fresh", action="store_true", help="measure them again")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works: the times mean nothing")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="print JSON files side by side and measure nothing")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("turns", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    timing.check_json(parser, args.json)
    try:
        main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
