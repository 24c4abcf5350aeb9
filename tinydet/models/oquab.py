"""The nets of Oquab, Bottou, Laptev and Sivic: transfer (CVPR 2014) and weak supervision (CVPR 2015), and what their cells see.

One Krizhevsky-style net in three parts: a trunk of convolutions, FC6 and FC7 ("features"), and a head. The head of the source task
is FC8; a transferred net has two adaptation layers instead, FCa and FCb: for patches with boxes ("strong", K classes and
background), or for whole images ("weak", K classes, no background). All fully connected layers are convolutions, so that the net
slides over images of any size from one window on (CVPR 2015; the released code); on one window of 224 pixels they are the paper's.
oquab_patches.py has the training and test of strong supervision, oquab_weak.py those of weak supervision.

Sections of the paper are those of the report of November 2013 (HAL hal-00911179) for transfer: net and adaptation layers 3.1, recipe 4.
The table is that of the authors' released code: no grouped convolutions, floor pooling, ReLU -> LRN -> pool, LRN with
k = 1 and alpha / n. Krizhevsky et al. write k = 2 and alpha undivided (unverified): Spec.lrn_k, Spec.divide_by_n.
The convolutions are padded: a cell of the map sees 355 pixels and not 224, and equals the net on a crop of 224 pixels only where the
whole input is that crop.

The small net is ours (CHOICE), to train on a CPU: window 32, a cell every 8 pixels, no LRN; its FCa has 128 units (CHOICE: a first trial had
64 and 96).
"""
import copy
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from tinydet import checks, weights
from tinydet.backend import array_module, to_numpy
from tinydet.layers import LRN, Conv2D, Dropout, MaxPool, Sequential, named

HEADS = ("source", "strong", "weak")
TRAINS = ("head", "fc6", "all")         # what freeze leaves to train
ONES = ("conv2", "conv4", "conv5", "fc6", "fc7")        # biases that start at 1 (Krizhevsky et al., unverified)


@dataclasses.dataclass(frozen=True)
class Table:
    """A net up to FC7, layer by layer; ReLU behind each.

    convs: rows (name, channels, size, stride, pad, norm, pool): a convolution, LRN behind its ReLU if norm, then max pooling of
    (size, stride) in floor mode, or None. pad: as layers.Conv2D takes it, the same down and across.
    k: side of FC6's kernel; hidden: (name, units) of FC6 and FC7; adapt: units of FCa.
    """

    convs: tuple
    k: int
    hidden: tuple
    adapt: int = 2048

    @property
    def window(self):
        """Side in pixels of the smallest image with an output: 224, small 32."""
        side = self.k
        for _, _, size, stride, pad, _, pool in reversed(self.convs):
            side = (side - 1) * pool[1] + pool[0] if pool else side
            side = (side - 1) * stride + size - sum(_pads(pad))
        return side

    @property
    def step(self):
        """Pixels between neighbouring cells of the map, the product of all strides: 32, small 8."""
        return math.prod(stride * (pool[1] if pool else 1) for *_, stride, _, _, pool in self.convs)


_CONVS = (("conv1", 96, 11, 4, (2, 1, 2, 1), True, (3, 2)), ("conv2", 256, 5, 1, 2, True, (3, 2)), ("conv3", 384, 3, 1, 1, False, None),
          ("conv4", 384, 3, 1, 1, False, None), ("conv5", 256, 3, 1, 1, False, (3, 2)))
TABLES = {                              # by the units of FC6 and FC7
    "4096": Table(_CONVS, 6, (("fc6", 4096), ("fc7", 4096))),           # source task of 1000 classes: PRE-1000C, PRE-1000R
    "6144": Table(_CONVS, 6, (("fc6", 6144), ("fc7", 6144))),           # of 1512 classes: PRE-1512
    "small": Table((("conv1", 16, 5, 1, 2, False, (2, 2)), ("conv2", 32, 3, 1, 1, False, (2, 2)), ("conv3", 32, 3, 1, 1, False, (2, 2))),
                   4, (("fc6", 96), ("fc7", 96)), 128),
}


# From the table alone, without arrays

class Row(NamedTuple):
    """A convolution of a net. name: "<part>.<layer>"; behind it a ReLU if relu, LRN if norm, max pooling (size, stride) or None."""

    name: str
    Cin: int
    Cout: int
    size: int
    stride: int = 1
    pad: object = 0
    norm: bool = False
    pool: tuple | None = None
    relu: bool = True


def rows(table, outputs, head="source", adapt_kernel=1, width=1.0, adapt=None):
    """All convolutions, as Rows, of the net with so many outputs.

    head: "source": head.fc8; "strong", "weak": head.fca and head.fcb, the last without ReLU (the softmax is the loss's).
    adapt_kernel: side of FCa and FCb, of weak nets alone: 1, as the paper has it, or 3 with padding 1, as the released code.
    width: factor on all channels but the 3 of the image and the outputs, rounded to the nearest number, halves up, at
    least 1. adapt: units of FCa, taken as they are; None: the table's, times width. Raises ValueError, TypeError.
    """
    op = "oquab.rows"
    checks.small(op, 1, outputs=outputs, **({} if adapt is None else {"adapt": adapt}))
    if head not in HEADS or not 0 < width < math.inf:
        raise ValueError(f"{op}: head must be one of {', '.join(HEADS)}, width above 0 and finite, got {head!r}, {width}")
    if adapt_kernel not in (1, 3) or adapt_kernel == 3 and head != "weak":
        raise ValueError(f"{op}: adapt_kernel must be 1, or 3 of a weak net, got {adapt_kernel!r} of a {head} one")

    def scaled(channels):
        return max(1, math.floor(channels * width + 0.5))
    found, C, size = [], 3, table.k
    for name, channels, *more in table.convs:
        found.append(Row(f"trunk.{name}", C, scaled(channels), *more))
        C = scaled(channels)
    for name, units in table.hidden:
        found.append(Row(f"features.{name}", C, scaled(units), size))
        C, size = scaled(units), 1
    if head == "source":
        return [*found, Row("head.fc8", C, outputs, 1, relu=False)]
    units, pad = adapt or scaled(table.adapt), adapt_kernel // 2
    return [*found, Row("head.fca", C, units, adapt_kernel, pad=pad), Row("head.fcb", units, outputs, adapt_kernel, pad=pad, relu=False)]


def parameters(table, outputs, head="source", adapt_kernel=1, width=1.0, adapt=None):
    """Weights and biases of each layer, by name (arguments: rows). Their sum is the net's: 62,378,344 of "4096" with 1000 classes,
    107,422,568 of "6144" with 1512."""
    return {r.name: (r.size ** 2 * r.Cin + 1) * r.Cout for r in rows(table, outputs, head, adapt_kernel, width, adapt)}


def multiply_adds(table, outputs, head="source", adapt_kernel=1, width=1.0, adapt=None, size=None):
    """Multiply-adds of each layer, by name, for one image of size (H, W) pixels, default one window. Other arguments: rows.

    size**2 * Cin * Cout of the layer for each cell of its map; pooling, LRN, ReLU and biases count nothing. Raises as rows and sides.
    """
    H, W = (dict(sides(table, side)) for side in size or (table.window, table.window))
    last = table.hidden[-1][0]

    def cells(name):
        return H.get(name, H[last]) * W.get(name, W[last])
    return {r.name: cells(r.name.split(".")[1]) * r.size ** 2 * r.Cin * r.Cout
            for r in rows(table, outputs, head, adapt_kernel, width, adapt)}


def sides(table, side):
    """[(name, side)] of the maps that an image of that side becomes: each convolution, each pooling ("conv1_pool"), FC6, FC7.

    Floor everywhere: (side + pads - size) // stride + 1. Heads keep the side. Raises ValueError for a side below the window.
    """
    checks.small("oquab.sides", 1, side=side)
    if side < table.window:
        raise ValueError(f"oquab.sides: an image must hold a window of {table.window}x{table.window} pixels, got a side of {side}")
    found = []
    for name, size, stride, (before, after) in _steps(table):
        side = (side + before + after - size) // stride + 1
        found.append((name, side))
    return found


def map_side(table, side):
    """Side of the scores' map: floor((side - window) / step) + 1. Raises ValueError for a side below the window."""
    return sides(table, side)[-1][1]


def fields(table, adapt_kernel=1):
    """What one cell of each map sees: [(name, field, stride, first)], in pixels of the image, names as in sides and FCa, FCb.

    field: side of the receptive field; stride: pixels between neighbouring cells; first: the first pixel that cell 0 sees, below 0
    in the padding. A layer of size k, stride s and padding p before turns (field, stride, first) into
    (field + (k - 1) * stride, stride * s, first - p * stride). FC7 of the full nets: 355, 32, -66.
    adapt_kernel: 1 or 3, as of rows; it is not checked here.
    """
    field, stride, first, found = 1, 1, 0, []
    adapt = adapt_kernel, 1, _pads(adapt_kernel // 2)
    for name, size, s, (before, _) in [*_steps(table), ("fca", *adapt), ("fcb", *adapt)]:
        field, stride, first = field + (size - 1) * stride, stride * s, first - before * stride
        found.append((name, field, stride, first))
    return found


def centres(table, n, adapt_kernel=1):
    """(n,) float64: where the cells of a scores' map of side n look, in pixels of the image: step * i + first + field // 2.

    32 i + 111 of the full nets, 8 i + 16 of the small one; FCa and FCb of any kernel keep it. Of an even field
    (small: 48) that is its middle. Of an odd one (355) it is the index of the middle pixel, whose own middle is 32 i + 111.5 where
    pixels are continuous, as in oquab_weak.py: half a pixel less (CHOICE).
    """
    _, field, stride, first = fields(table, adapt_kernel)[-1]
    return stride * np.arange(n, dtype=np.float64) + first + field // 2


def _pads(pad):
    """Padding (before, after) along either axis."""
    return checks.padding("oquab.Table", pad)[:2]


def _steps(table):
    """(name, size, stride, (before, after)) of all that slides over a map, to FC7."""
    found = []
    for name, _, size, stride, pad, _, pool in table.convs:
        found.append((name, size, stride, _pads(pad)))
        if pool:
            found.append((f"{name}_pool", *pool, (0, 0)))
    return found + [(name, 1 if i else table.k, 1, (0, 0)) for i, (name, _) in enumerate(table.hidden)]


# The net

@dataclasses.dataclass
class Spec:
    """What a net is, apart from its arrays.

    classes: names of its outputs; a strong net has one more, the last: background. table: a name of TABLES. head, width, adapt,
    adapt_kernel: see rows. dropout: behind FC6, FC7 and FCa; inverted (CHOICE), or classical as in the papers:
    unscaled in training, times 1 - dropout at test time. Dropping maps is the weak head's; behind FC6 single values drop (CHOICE).
    init: None: weights by He's rule, biases 0 (CHOICE). A number: N(0, init^2), biases 1 in conv2, conv4, conv5, fc6
    and fc7, else 0; 0.01 is Krizhevsky's (unverified).
    lrn_k, divide_by_n: of LRN, where the table has it. mean, std: what normalise takes, for all channels (CHOICE: about ImageNet's;
    the papers subtract the training mean and do not divide).
    """

    classes: tuple
    table: str = "small"
    head: str = "source"
    width: float = 1.0
    adapt: int | None = None
    adapt_kernel: int = 1
    dropout: float = 0.5
    inverted: bool = True
    init: float | None = None
    lrn_k: float = 1.0
    divide_by_n: bool = True
    mean: float = 115.0
    std: float = 58.0

    def __post_init__(self):
        """Raise ValueError or TypeError for what describes no net."""
        op = "oquab.Spec"
        if self.table not in TABLES:
            raise ValueError(f"{op}: table must be one of {', '.join(TABLES)}, got {self.table!r}")
        if not self.classes or not all(isinstance(c, str) for c in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{op}: classes must be different names, at least one, got {self.classes!r}")
        if not (0 <= self.dropout < 1 and abs(self.mean) < np.inf and 0 < self.std < np.inf and 0 < self.lrn_k < np.inf):
            raise ValueError(f"{op}: dropout must lie in [0, 1), mean be finite, std and lrn_k above 0, got {self.dropout}, {self.mean}, "
                             f"{self.std}, {self.lrn_k}")
        if self.init is not None and not 0 < self.init < np.inf:
            raise ValueError(f"{op}: init must be None, or above 0 and finite, got {self.init}")
        if not isinstance(self.inverted, bool) or not isinstance(self.divide_by_n, bool):
            raise TypeError(f"{op}: inverted and divide_by_n must be True or False, got {self.inverted!r}, {self.divide_by_n!r}")
        rows(self.layers, self.outputs, *self._how)

    @property
    def _how(self):
        """What rows takes behind the number of outputs."""
        return self.head, self.adapt_kernel, self.width, self.adapt

    @property
    def layers(self):
        """The Table."""
        return TABLES[self.table]

    @property
    def outputs(self):
        """Number of the head's outputs: K, and of a strong net K + 1."""
        return len(self.classes) + (self.head == "strong")


class Oquab(Sequential):
    """The net of a Spec. Parts: trunk (convolutions, LRN, poolings), features (FC6, its dropout, FC7), head.

    Heads: source: drop, fc8; strong and weak: drop, fca, fca_drop, fcb, the weak one dropping whole maps, the same for all images of
    a batch (the released code). FC7's dropout stands first in the head: frozen features are those without it.
    A part that is frozen as a whole runs in test mode, whatever forward is told: what frozen_part gives may be kept.
    """

    def __init__(self, spec, rng, dtype=np.float32):
        self.spec, self.table, self.dtype = spec, spec.layers, np.dtype(dtype)

        def drop(by_map=False):
            return Dropout(spec.dropout, by_map, spec.inverted)
        parts = {"trunk": {}, "features": {}, "head": {"drop": drop(spec.head == "weak")}}
        for i, r in enumerate(rows(self.table, spec.outputs, *spec._how)):
            part, name = r.name.split(".")
            layers = parts[part]
            layers[name] = Conv2D(r.Cin, r.Cout, r.size, r.stride, r.pad, rng=rng, std=spec.init, dtype=dtype, relu=r.relu,
                                  input_grad=i > 0)
            if spec.init is not None and name in ONES:
                layers[name].params["b"][...] = 1
            if r.norm:
                layers[f"{name}_norm"] = LRN(k=spec.lrn_k, divide_by_n=spec.divide_by_n)
            if r.pool:
                layers[f"{name}_pool"] = MaxPool(*r.pool)
            if name in ("fc6", "fca"):
                layers[f"{name}_drop"] = drop(part == "head" and spec.head == "weak")
        parts = {part: named(layers, input_grad=part != "trunk") for part, layers in parts.items()}
        super().__init__(*parts.values(), input_grad=False)
        self.parts = parts

    def normalise(self, images):
        """uint8 images (N, H, W, 3), RGB, 0..255, as the array the net takes: (x - mean) / std, same shape, the net's dtype, on the host."""
        return (np.asarray(images, self.dtype) - self.dtype.type(self.spec.mean)) / self.dtype.type(self.spec.std)

    def __call__(self, x):
        """The scores of x at test time, without the cache. Shapes and errors: forward."""
        self._check("forward", x)
        return super().__call__(x)

    def forward(self, x, train=False, rng=None):
        """Scores of x (N, H, W, 3) at every cell, no softmax: (N, h, w, outputs), and cache. Sides: map_side, places: centres.

        x: float32 or float64, as normalise gives it. train: dropout, whose masks come from rng (a numpy Generator), in the parts that
        are not frozen. Raises ValueError for another shape, where x holds no window, and for dropout without rng; TypeError for dtypes.
        """
        self._check("forward", x)
        caches = []
        for part in self.parts.values():
            x, cache = part.forward(x, train and not part.frozen, rng)
            caches.append(cache)
        return x, caches

    def features(self, x):
        """Y7 (N, h, w, F) of x at test time: FC7 behind its ReLU, without its dropout; F: units of FC7. Raises as forward."""
        self._check("features", x)
        return self.parts["features"](self.parts["trunk"](x))

    def _check(self, name, x):
        checks.float_array(f"Oquab.{name}", "x", x, "(N, H, W, 3)")
        if min(x.shape[1:3]) < self.table.window:
            raise ValueError(f"Oquab.{name}: x must hold a window of {self.table.window} pixels, got {x.shape}")


# What trains, and what is computed once

def freeze(net, trains):
    """Freeze all but what transfer trains (paper of 2014, sec. 3.1, "fc6": sec. 4): make the optimiser after this.

    trains: "head": trunk, FC6 and FC7 stay (FCa and FCb train; of a source net FC8). "fc6": FC6 trains too, trunk and FC7 stay
    (PRE-1512U, actions). "all": nothing stays. Returns the net. Raises ValueError for another name.
    """
    _known("freeze", trains)
    net.freeze(False)
    net.parts["trunk"].freeze(trains != "all")
    net.parts["features"].freeze(trains == "head")
    net.parts["features"].parts["fc7"].freeze(trains != "all")
    return net


def frozen_part(net, x, trains):
    """What rest(net, trains) takes, of x (N, H, W, 3), at test time: "head": Y7; "fc6": the trunk's map; "all": x itself.

    It may be kept from one step to the next. Raises as freeze and net.forward.
    """
    _known("frozen_part", trains)
    net._check("forward", x)
    return x if trains == "all" else net.features(x) if trains == "head" else net.parts["trunk"](x)


def rest(net, trains):
    """What comes behind frozen_part, as a layer that shares the net's arrays: "head": the head; "fc6": features and head; "all": the net.

    backward gives no gradient for its input. Call freeze first. Raises ValueError as freeze.
    """
    _known("rest", trains)
    if trains == "all":
        return net
    head, features = net.parts["head"], net.parts["features"]
    return _first(head) if trains == "head" else named({"features": _first(features), "head": head}, input_grad=False)


def _known(name, trains):
    if trains not in TRAINS:
        raise ValueError(f"oquab.{name}: trains must be one of {', '.join(TRAINS)}, got {trains!r}")


def _first(part):
    """The part, sharing its arrays, without a gradient for its input."""
    parts = dict(part.parts)
    first = next(name for name, layer in parts.items() if layer.params)
    parts[first] = copy.copy(parts[first])
    parts[first].input_grad = False
    return named(parts, input_grad=False)


# Files, and what one net takes over from another

def take_over(net, source):
    """Copy trunk and features, C1 to FC7, of another net, whose head may be another: how transfer starts. Returns the layers' names.

    Raises ValueError naming the fields of the Specs that must agree and do not: those that decide what FC7 says of an image.
    """
    keys = ["table", "width", "mean", "std", "lrn_k", "divide_by_n", "inverted"] + ["dropout"] * (not net.spec.inverted)
    mine, theirs = ({key: getattr(n.spec, key) for key in keys} for n in (net, source))
    if differ := [key for key in keys if mine[key] != theirs[key]]:
        raise ValueError(f"oquab.take_over: both nets must have one {', '.join(differ)}, got {[mine[key] for key in differ]} and "
                         f"{[theirs[key] for key in differ]}")
    for part in ("trunk", "features"):
        given = source.parts[part].arrays()
        for name, array in net.parts[part].arrays().items():
            array[...] = array_module(array).asarray(to_numpy(given[name]))
    return [f"{part}.{name}" for part in ("trunk", "features") for name, layer in net.parts[part].leaves().items() if layer.params]


def save(net, path, settings):
    """Write a net with its Spec and dtype, and the settings to use it with (a JSON dict), to a weights file (.npz)."""
    weights.save(path, "oquab", net, settings)


def load(path):
    """Read a weights file: the net, in the dtype that it was saved in, nothing frozen, and the settings. Raises as weights.load."""
    return weights.load(path, "oquab", _build)


def _build(arrays, spec, dtype):
    spec = Spec(**spec)
    weights.fits(sum(parameters(spec.layers, spec.outputs, *spec._how).values()), arrays)
    return Oquab(spec, np.random.default_rng(0), dtype)
