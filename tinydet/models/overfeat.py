"""The two nets of OverFeat (Sermanet et al., 1312.6229), and how they classify an image: slid over it at several scales (sec. 3).

A trunk runs once on the image. Its last pooling is applied at every offset ("fine stride", sec. 3.3), so that the classifier, whose
fully connected layers are convolutions, sees a window every `jump` pixels and not every `step`. Per scale and class the best window
counts; scales and mirrored images are averaged. The regressor (sec. 4) sees the same windows.

Where the paper contradicts itself, this file takes what its Tables 1 and 3 and the released weights say:
    The text mixes the two nets: "layers 1-5", 221x221 crops, 2x3x2x3 subsampling, the offsets {0, 1, 2}, the 5x5 classifier and
    Table 5 fit the accurate net only (its conv6 is the text's layer 5). The fast net has windows of 231 pixels (on 221 its last map
    is 5x5, less than the 6x6 that its classifier needs), a last pooling of 2x2, and so the offsets {0, 1}: in general 0..pool - 1.
    Table 1 gives layer 2 of the fast net an input of 24; that is what the layer puts out, its input is 28.
    Table 5 and Fig. 8 speak of 256 channels where the trunk ends; both nets have 1024.
Table 4 counts 145 and 144 million parameters, 2810 and 5369 million connections (unverified); the tables below give 145,920,872 and
144,656,488, 2,801,403,904 and 5,355,446,784.

The small net is ours, to train on a CPU: four convolutions with batch norm (the paper had none), a cell of its map every 4 pixels.
overfeat_localize.py trains the regressor on a trained trunk, overfeat_detect.py all of a net with a background class.
"""
import dataclasses
import math
from collections import namedtuple
from typing import NamedTuple

import numpy as np

from tinydet import augment, checks, weights
from tinydet.backend import array_module, put, to_numpy
from tinydet.layers import BatchNorm, Composite, Conv2D, Dropout, MaxPool, ReLU, named
from tinydet.ops import conv, max_pool, offset_pool, softmax_loss

NO_BOXES = np.zeros((0, 4))             # augment moves boxes along with an image


@dataclasses.dataclass(frozen=True)
class Table:
    """A net, layer by layer; ReLU behind each convolution but the heads' last; batch norm before it if `norm`.

    trunk: rows (name, channels, size, stride, pad, pool): a convolution, then max pooling of side and stride `pool` (1: none). The
    last row's pooling is the one applied at every offset; it is not a layer of the trunk.
    k: side in pooled cells of both heads' first kernel; what follows is 1x1. classifier, regressor: (name, channels) of their
    hidden layers; the last layers ("out") are not listed.
    """

    trunk: tuple
    k: int
    classifier: tuple
    regressor: tuple = (("fc1", 4096), ("fc2", 1024))
    norm: bool = False

    @property
    def pool(self):
        """Side of the last pooling: pool * pool offsets."""
        return self.trunk[-1][5]

    @property
    def step(self):
        """Pixels between neighbouring windows of the coarse stride: the product of all strides and poolings."""
        return math.prod(stride * pool for *_, stride, _, pool in self.trunk)

    @property
    def jump(self):
        """Pixels between neighbouring cells of the trunk's map: those between windows of the fine stride."""
        return self.step // self.pool

    @property
    def window(self):
        """Side in pixels of the window that one output stands for: of the smallest image with an output."""
        side = self.k
        for *_, size, stride, pad, pool in reversed(self.trunk):
            side = (side * pool - 1) * stride + size - 2 * pad
        return side

    @property
    def least(self):
        """The smallest side at which every offset has a window. At least + step * q all offsets have maps of one size, and the last
        window ends at the border, as Table 5 has it."""
        return self.window + (self.pool - 1) * self.jump

    @property
    def sizes(self):
        """The six scales (H, W): TEST_SIZES; for other nets as many coarse steps above `least` (CHOICE)."""
        return tuple(tuple(self.least + self.step * ((side - 245) // 36) for side in size) for size in TEST_SIZES)


TABLES = {
    "fast": Table((("conv1", 96, 11, 4, 0, 2), ("conv2", 256, 5, 1, 0, 2), ("conv3", 512, 3, 1, 1, 1), ("conv4", 1024, 3, 1, 1, 1),
                   ("conv5", 1024, 3, 1, 1, 2)), 6, (("fc6", 3072), ("fc7", 4096))),
    "accurate": Table((("conv1", 96, 7, 2, 0, 3), ("conv2", 256, 7, 1, 0, 2), ("conv3", 512, 3, 1, 1, 1), ("conv4", 512, 3, 1, 1, 1),
                       ("conv5", 1024, 3, 1, 1, 1), ("conv6", 1024, 3, 1, 1, 3)), 5, (("fc7", 4096), ("fc8", 4096))),
    "small": Table((("conv1", 16, 4, 2, 1, 1), ("conv2", 32, 3, 1, 1, 2), ("conv3", 64, 3, 1, 1, 1), ("conv4", 64, 3, 1, 1, 3)),
                   5, (("fc5", 128),), (("fc5", 128),), norm=True),
}
TEST_SIZES = ((245, 245), (281, 317), (317, 389), (389, 461), (425, 497), (461, 569))       # (H, W) of Table 5, for the accurate net


# From the table alone, without arrays

class Row(NamedTuple):
    """A convolution of a net. name: "<part>.<layer>"; pool: side of the max pooling behind it (1: none); relu: behind it, too."""

    name: str
    Cin: int
    Cout: int
    size: int
    stride: int = 1
    pad: int = 0
    pool: int = 1
    relu: bool = True


def rows(table, classes=1000, width=1.0, regressor=None):
    """All convolutions, as Rows, of the net with so many classes.

    width: factor on all channels but the 3 of the image and the outputs of the heads, rounded to the nearest number, halves up, at
    least 1. regressor: None, "SCR" (4 edges, shared by all classes) or "PCR" (4 for each class). Raises ValueError, TypeError.
    """
    op = "overfeat.rows"
    checks.small(op, 1, classes=classes)
    if not 0 < width < math.inf or regressor not in (None, "SCR", "PCR"):
        raise ValueError(f"{op}: width must be above 0 and finite, regressor None, 'SCR' or 'PCR', got {width}, {regressor!r}")

    def scaled(channels):
        return max(1, math.floor(channels * width + 0.5))
    found, C = [], 3
    for name, channels, *more in table.trunk:
        found.append(Row(f"trunk.{name}", C, scaled(channels), *more))
        C = scaled(channels)
    heads = {"classifier": (table.classifier, classes)}
    if regressor:
        heads["regressor"] = table.regressor, 4 * (classes if regressor == "PCR" else 1)
    for part, (hidden, outputs) in heads.items():
        Cin, size = C, table.k
        for name, channels in hidden:
            found.append(Row(f"{part}.{name}", Cin, scaled(channels), size))
            Cin, size = scaled(channels), 1
        found.append(Row(f"{part}.out", Cin, outputs, size, relu=False))
    return found


def parameters(table, classes=1000, width=1.0, regressor=None):
    """Weights and biases of each layer, by name (arguments: rows), with gamma and beta of its batch norm. Their sum is the
    net's; what context adds is not counted."""
    return {r.name: (r.size ** 2 * r.Cin + 1 + 2 * (table.norm and r.relu)) * r.Cout for r in rows(table, classes, width, regressor)}


def multiply_adds(table, classes=1000, width=1.0, regressor=None, size=None):
    """Multiply-adds of each layer, by name, for one image of size (H, W), default one window, at coarse stride. As parameters."""
    H, W = size or (table.window, table.window)
    coarse = outputs(table, H, W).coarse
    maps = dict(zip((f"trunk.{row[0]}" for row in table.trunk), zip(_sides(table, H), _sides(table, W))))
    return {r.name: math.prod(maps.get(r.name, coarse)) * r.size ** 2 * r.Cin * r.Cout
            for r in rows(table, classes, width, regressor)}


Outputs = namedtuple("Outputs", "trunk pooled coarse fine")


def outputs(table, H, W):
    """Sizes (h, w) of what an image of H x W pixels becomes, as Outputs: the trunk's map, its pooled map at offset (0, 0), the heads'
    maps at coarse and fine stride. Floor everywhere (sec. 3.3; the released code): fine = n - pool * k + 1 for a trunk map of n.

    Raises ValueError where the image holds no window: 231x231 pixels for the fast net, 221x221 for the accurate one.
    """
    checks.small("overfeat.outputs", 1, H=H, W=W)
    if min(H, W) < table.window:
        raise ValueError(f"overfeat.outputs: an image must hold a window of {table.window}x{table.window} pixels, got {H}x{W}")
    p, k = table.pool, table.k
    maps = [_sides(table, side)[-1] for side in (H, W)]
    return Outputs(*zip(*((n, n // p, n // p - k + 1, n - p * k + 1) for n in maps)))


def _sides(table, side):
    """The sides of the maps that the trunk's convolutions make of an image of that side."""
    found = []
    for *_, size, stride, pad, pool in table.trunk:
        found.append((side + 2 * pad - size) // stride + 1)
        side = found[-1] // pool
    return found


def windows(table, h, w, offset=None):
    """(h*w, 4) windows of a head's map of h x w, in row order: (x1, y1, x2, y2), float64 pixels of the net's input.

    Output (r, c) stands for [jump * c, jump * c + window) across, likewise down; at one offset (oy, ox), output (i, j) for what
    begins at jump * (pool * j + ox). In padded trunks it also sees what lies around.
    """
    (oy, ox), step = offset or (0, 0), table.jump if offset is None else table.step
    y, x = np.indices((h, w), float).reshape(2, -1) * step + np.array([[oy], [ox]]) * table.jump
    return np.stack([x, y, x + table.window, y + table.window], 1)


def encode(windows, boxes):
    """The edges of boxes (R, 4) relative to windows (R, 4) of side w (sec. 4.2): (x1 - wx, y1 - wy, x2 - wx, y2 - wy)/w.

    Both in pixels of the net's input; returns (R, 4), no unit, as what the regressor puts out.
    Dividing by w is a CHOICE (conditioning only); edges rather than centre and size are the paper's.
    """
    return (boxes - windows[:, [0, 1, 0, 1]]) / (windows[:, 2:3] - windows[:, :1])


def decode(windows, edges):
    """Boxes (R, 4), in the windows' pixels, from windows and edges (R, 4): the inverse of encode."""
    return edges * (windows[:, 2:3] - windows[:, :1]) + windows[:, [0, 1, 0, 1]]


# The net

@dataclasses.dataclass
class Spec:
    """What an OverFeat is, apart from its arrays.

    classes: their names. table: a name of TABLES; k, pool: those of the table unless given. width, regressor: see rows.
    dropout: of the classifier's hidden layers, inverted (CHOICE: the released nets have no scaling layer); the regressor has none
    (CHOICE: the paper is silent). init: standard deviation of all weights, the paper's; None: He's rule, which nets of small width
    need to train, and 0.01 for the heads' last layers (CHOICE). mean, std: the release's numbers, for all channels.
    from_window: the regressor's last biases start at (0, 0, 1, 1), so that each window answers with about itself (CHOICE).
    Of detectors: background: one more class, the last (sec. 5); scales: enlargements at which windows are slid over an image, finest
    first; context: the classifier sees the next coarser scale, too. With any of these a regressor is an SCR: overfeat_detect has
    one box a window.
    """

    classes: tuple
    table: str = "accurate"
    width: float = 1.0
    regressor: str | None = None
    dropout: float = 0.5
    init: float | None = 0.01
    mean: float = 118.380948
    std: float = 61.896913
    from_window: bool = False
    k: int | None = None
    pool: int | None = None
    background: bool = False
    scales: tuple = ()
    context: bool = False

    def __post_init__(self):
        """Raise ValueError or TypeError for what describes no net."""
        op = "overfeat.Spec"
        if self.table not in TABLES:
            raise ValueError(f"{op}: table must be one of {', '.join(TABLES)}, got {self.table!r}")
        if not self.classes or not all(isinstance(c, str) for c in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{op}: classes must be different names, at least one, got {self.classes!r}")
        if not (0 <= self.dropout < 1 and abs(self.mean) < np.inf and 0 < self.std < np.inf):
            raise ValueError(f"{op}: dropout must lie in [0, 1), mean be finite and std above 0, got {self.dropout}, {self.mean}, "
                             f"{self.std}")
        if self.init is not None and not 0 < self.init < np.inf:
            raise ValueError(f"{op}: init must be None, or above 0 and finite, got {self.init}")
        if not all(isinstance(s, (int, float)) and 0 < s < np.inf for s in self.scales) or list(self.scales) != sorted(self.scales)[::-1]:
            raise ValueError(f"{op}: scales must be above 0, the largest first, got {self.scales!r}")
        if self.regressor == "PCR" and self.detector:
            raise ValueError(f"{op}: the regressor of a detector must be None or 'SCR', one box a window, got 'PCR' with "
                             f"background {self.background}, scales {self.scales!r}, context {self.context}")
        checks.small(op, 1, **{name: v for name, v in (("k", self.k), ("pool", self.pool)) if v is not None})
        rows(self.layers, self.outputs, self.width, self.regressor)

    @property
    def layers(self):
        """The Table, with this net's k and pool."""
        table = TABLES[self.table]
        *trunk, last = table.trunk
        return dataclasses.replace(table, k=self.k or table.k, trunk=(*trunk, (*last[:-1], self.pool or last[-1])))

    @property
    def outputs(self):
        """Number of the classifier's outputs."""
        return len(self.classes) + self.background

    @property
    def detector(self):
        """Whether this is a detector's, not a classifier's."""
        return bool(self.background or self.context or self.scales)

    @property
    def fill(self):
        """Grey value that stands for "nothing": what lies outside an image."""
        return int(self.mean + 0.5)


class OverFeat(Composite):
    """The net of a Spec. Parts: trunk (to the last convolution's ReLU), classifier (K outputs), regressor and context if the Spec has them.

    Weights N(0, init^2), biases 0 (CHOICE: the paper does not say) but for Spec.from_window. Layers by the names of the table and "out";
    context is one convolution from the trunk's channels to those of the classifier's first, at every offset (forward).
    """

    def __init__(self, spec, rng, dtype=np.float32):
        self.spec, self.table, self.dtype = spec, spec.layers, np.dtype(dtype)
        parts, last = {}, self.table.trunk[-1][0]
        for r in rows(self.table, spec.outputs, spec.width, spec.regressor):
            part, name = r.name.split(".")
            layers = parts.setdefault(part, {})
            norm, std = self.table.norm and r.relu, 0.01 if spec.init is None and not r.relu else spec.init
            joined = spec.context and part == "classifier" and not layers and r.relu        # ReLU comes after what context adds
            layers[name] = Conv2D(r.Cin, r.Cout, r.size, r.stride, r.pad, rng=rng, std=std, dtype=dtype,
                                  relu=r.relu and not norm and not joined, input_grad=len(parts) > 1 or len(layers) > 0)
            if norm:
                layers[f"{name}_norm"] = BatchNorm(r.Cout, dtype=dtype, relu=True)
            elif joined:
                layers[f"{name}_relu"] = ReLU()
            if r.pool > 1 and name != last:
                layers[f"{name}_pool"] = MaxPool(r.pool)
            if part == "classifier" and r.relu:
                layers[f"{name}_drop"] = Dropout(spec.dropout)
        composed = {part: named(layers, input_grad=part != "trunk") for part, layers in parts.items()}
        if spec.context:
            _, _, Cin, Cout = next(iter(parts["classifier"].values())).params["w"].shape
            composed["context"] = Conv2D(Cin, Cout, self.table.k, dilation=self.table.pool, rng=rng, std=spec.init, dtype=dtype)
        super().__init__(**composed)
        if spec.regressor and spec.from_window:
            self.params["regressor.out.b"].reshape(-1, 4)[...] = (0, 0, 1, 1)

    def normalise(self, images):
        """uint8 images (N, H, W, 3), RGB, as the float array the net takes: (x - mean) / std."""
        return (np.asarray(images, self.dtype) - self.dtype.type(self.spec.mean)) / self.dtype.type(self.spec.std)

    def forward(self, x, train=False, rng=None, offset=(0, 0), heads=("classifier", "regressor"), coarser=None):
        """The heads at one offset of the last pooling (coarse stride), or with offset=None at all of them (fine stride, sec. 3.3).

        x: (N, H, W, 3), of normalise(). train: batch norm by the batch, and dropout, drawn from rng (which only dropout needs).
        Returns scores (N, h, w, K), no softmax, edges (N, h, w, 4), or 4 * K with PCR, and cache; None for a head
        that the net has not or that `heads` does not name. Sizes: outputs(); places: windows(). In training the paper shows
        single windows: h = w = 1.
        coarser: of a net with context (sec. 5), (x2, down, across): the images at the next coarser scale, (N, H2, W2, 3), and for each
        row and column of the outputs the row and column of x2's fine map that sees the same centre, as one-hot matrices (N, h, h2),
        (N, w, w2); rows of zeros, or coarser=None: there is no coarser scale. The classifier's first layer then acts on the features of
        both windows side by side: y = w * s + b + w2 * s2, s2 from x2, which is the sum of two convolutions (CHOICE: concatenated).
        Raises ValueError where x holds no window at the offset, or coarser is given to a net without context.
        """
        p, trunk = self.table.pool, self.parts["trunk"]
        self._check("forward", x, offset or (0, 0))
        maps, trunk_cache = trunk.forward(x, train, rng)
        if offset is None:
            s, pool_cache = offset_pool.forward(maps, p)
            pooled = offset_pool.split(s, p)
        else:
            s, pool_cache = max_pool.forward(maps[:, offset[0]:, offset[1]:], p)
            pooled = [s]
        added, context_cache = self._context(coarser, train, rng)
        added = [added] * len(pooled) if added is None or offset is not None else offset_pool.split(added, p)
        found, caches = [], []
        for head, more in zip(self._heads(heads), (added, [None] * len(pooled))):
            runs = [self._run(head, m, train, rng, a) for m, a in zip(pooled, more)] if head else []
            ys = [y for y, _ in runs]
            found.append(None if not head else ys[0] if offset is not None else offset_pool.interleave(ys, p))
            caches.append([c for _, c in runs])
        return *found, (maps.shape, offset, heads, trunk_cache, pool_cache, pooled, caches, context_cache)

    def backward(self, dscores, dedges, cache):
        """Add the gradients of all parameters to `grads`; the image gets none, and nothing is returned.

        dscores, dedges: of the shapes that forward returned; None for a head that has no gradient. cache: forward's.

        At all offsets (sec. 3.3) the heads' gradients add up over the offsets, and a cell of the trunk's map adds up those of all
        the tiles that it won.
        """
        shape, offset, heads, trunk_cache, pool_cache, pooled, caches, context_cache = cache
        p, xp = self.table.pool, array_module(pooled[0])
        dpooled, dadded = [xp.zeros(m.shape, m.dtype) for m in pooled], []
        for head, dy, head_caches in zip(self._heads(heads), (dscores, dedges), caches):
            if head is None or dy is None:
                continue
            for d, part, c in zip(dpooled, [dy] if offset is not None else offset_pool.split(dy, p), head_caches):
                if isinstance(c, tuple):                            # _run with context
                    first, rest = _split(head)
                    dadded.append(rest.backward(part, c[1]))
                    d += first.backward(dadded[-1], c[0])
                elif c is not None:
                    d += head.backward(part, c)
                elif context_cache and head is self.parts["classifier"]:       # an offset without a window
                    dadded.append(xp.zeros((*part.shape[:3], context_cache[-1]), part.dtype))
        if context_cache and dadded:
            self._context_backward(dadded[0] if offset is not None else offset_pool.interleave(dadded, p), context_cache)
        if offset is None:
            dmaps = offset_pool.backward(offset_pool.interleave(dpooled, p), pool_cache)
        else:
            dmaps = xp.zeros(shape, dpooled[0].dtype)
            dmaps[:, offset[0]:, offset[1]:] = max_pool.backward(dpooled[0], pool_cache)
        self.parts["trunk"].backward(dmaps, trunk_cache)

    def _context(self, coarser, train=False, rng=None):
        """What the coarser scale adds to the classifier's first layer (N, h, w, .), and cache; None and None without one."""
        if coarser is None:
            return None, None
        if "context" not in self.parts:
            raise ValueError("OverFeat.forward: coarser must be None for a net without context")
        x2, down, across = coarser
        self._check("forward", x2)
        maps, trunk_cache = self.parts["trunk"].forward(x2, train, rng)
        s, pool_cache = offset_pool.forward(maps, self.table.pool)
        z, cache = self.parts["context"].forward(s)
        N, h2, w2, C = z.shape
        if down.shape[::2] != (N, h2) or across.shape[::2] != (N, w2):
            raise ValueError(f"OverFeat.forward: coarser must have matrices (N, h, {h2}) and (N, w, {w2}), N {N}, got {down.shape} and "
                             f"{across.shape}")
        rows = (down @ z.reshape(N, h2, w2 * C)).reshape(N, -1, w2, C)
        return across[:, None] @ rows, (trunk_cache, pool_cache, cache, down, across, C)

    def _context_backward(self, dadded, context_cache):
        trunk_cache, pool_cache, cache, down, across, C = context_cache
        N, h2, w2 = len(dadded), down.shape[2], across.shape[2]
        drows = across.transpose(0, 2, 1)[:, None] @ dadded
        dz = (down.transpose(0, 2, 1) @ drows.reshape(N, -1, w2 * C)).reshape(N, h2, w2, C)
        self.parts["trunk"].backward(offset_pool.backward(self.parts["context"].backward(dz, cache), pool_cache), trunk_cache)

    def dense(self, x, route="offsets", heads=("classifier", "regressor"), coarser=None):
        """The heads at every offset, at test time: F (N, n - pool * k + 1, m - pool * k + 1, .) for a trunk map of n x m.

        route "offsets" (sec. 3.3): the heads on the pooled map of each offset, interleaved; "dilated" (sec. 3.3): one run on the
        max pool of stride 1, the k x k kernel dilated by `pool` (the paper's skip-kernels). Both give the same F, up to rounding.
        coarser: see forward. Returns scores and edges as forward; F[:, ::pool, ::pool] is what the coarse stride has of F.
        Raises ValueError for another route, and where x holds no window.
        """
        if route not in ("offsets", "dilated"):
            raise ValueError(f"OverFeat.dense: route must be 'offsets' or 'dilated', got {route!r}")
        p = self.table.pool
        self._check("dense", x)
        s = offset_pool.forward(self.parts["trunk"](x), p)[0]
        both = list(zip(self._heads(heads), (self._context(coarser)[0], None)))
        if route == "dilated":
            return tuple(head and _dilated(head, s, p, added) for head, added in both)
        pooled = offset_pool.split(s, p)
        more = [[None] * len(pooled) if added is None else offset_pool.split(added, p) for _, added in both]
        return tuple(head and offset_pool.interleave([self._run(head, m, added=a)[0] for m, a in zip(pooled, m_)], p)
                     for (head, _), m_ in zip(both, more))

    def _heads(self, names):
        return [self.parts.get(name) if name in names else None for name in ("classifier", "regressor")]

    def _run(self, head, pooled, train=False, rng=None, added=None):
        """y and cache of a head on one pooled map; an empty map and None where the offset leaves less than one window.

        added: joins the first layer's output; cache is then a tuple, those of the first layer and of the rest.
        """
        h, w = (max(0, side - self.table.k + 1) for side in pooled.shape[1:3])
        if min(h, w) == 0:
            return array_module(pooled).zeros((len(pooled), h, w, len(head.parts["out"].params["b"])), pooled.dtype), None
        if added is None:
            return head.forward(pooled, train, rng)
        first, rest = _split(head)
        y, cache = first.forward(pooled, train, rng)
        y, rest_cache = rest.forward(y + added, train, rng)
        return y, (cache, rest_cache)

    def _check(self, name, x, offset=(0, 0)):
        checks.float_array(f"OverFeat.{name}", "x", x, "(N, H, W, 3)")
        if not all(0 <= o < self.table.pool for o in offset):
            raise ValueError(f"OverFeat.{name}: offset must lie in 0..{self.table.pool - 1}, got {offset}")
        if any(side < self.table.window + self.table.jump * o for side, o in zip(x.shape[1:3], offset)):
            raise ValueError(f"OverFeat.{name}: x must hold a window of {self.table.window} pixels"
                             + f" at the offset {offset}" * any(offset) + f", got {x.shape}")


def _split(head):
    """A head's first layer, and the rest as one."""
    (_, first), *rest = head.parts.items()
    return first, named(dict(rest))


def _dilated(head, s, p, added=None):
    first, rest = _split(head)
    y = conv.forward(s, first.params["w"], first.params["b"], dilation=p, relu=first.relu)[0]
    return rest(y if added is None else y + added)


# Classification (sec. 3.1 to 3.3)

def training_view(table, image, rng, short=256):
    """One window at random of the image of short side `short` (aspect kept), half of them mirrored: uint8 (window, window, 3).

    CHOICE: one view a call; the paper draws 5 an image, and mirrors each. short: 256 is the paper's; smaller for smaller nets.
    The rate: optim.step_schedule(5e-2, (30, 50, 60, 70, 80), 0.5). Raises ValueError for a short side below the window.
    """
    image, side = _short_side("training_view", table, image, short), table.window
    y, x = (rng.integers(n - side + 1) for n in image.shape[:2])
    view = image[y:y + side, x:x + side]
    return np.ascontiguousarray(view[:, ::-1] if rng.random() < 0.5 else view)


def ten_views(table, image, short=256):
    """The four corners and the centre of the image of short side `short`, then the same mirrored: uint8 (10, window, window, 3).

    The baseline of Table 2 (unverified). Corners of the whole image are a CHOICE: Krizhevsky et al. cut a square out of it first.
    image: uint8 (H, W, 3); short: pixels. Raises ValueError for a short side below the window.
    """
    image, side = _short_side("ten_views", table, image, short), table.window
    H, W = (n - side for n in image.shape[:2])
    views = np.stack([image[y:y + side, x:x + side] for y, x in ((0, 0), (0, W), (H, 0), (H, W), (H // 2, W // 2))])
    return np.concatenate([views, views[:, :, ::-1]])


def _short_side(name, table, image, short):
    if short < table.window:
        raise ValueError(f"overfeat.{name}: short must be at least the window's {table.window} pixels, got {short}")
    return augment.scale(image, NO_BOXES, short / min(image.shape[:2]))[0]


def resize_to(table, image, size, keep_aspect=False):
    """The image at one scale, size (H, W) as Table 5 has it for landscape: bilinear, uint8.

    CHOICE, the paper is silent: exactly H x W, and W x H for a portrait. keep_aspect=True: the short side becomes H, the long one the
    nearest of least + step * q (halves up).
    """
    short, long = size
    if keep_aspect:
        exact = short * max(image.shape[:2]) / min(image.shape[:2])
        long = table.least + table.step * max(0, math.floor((exact - table.least) / table.step + 0.5))
    height, width = (short, long) if image.shape[1] >= image.shape[0] else (long, short)
    return augment.resize(image, NO_BOXES, width, height)[0]


def vote(maps):
    """The mean over maps (h, w, K), one a scale and flip, of each class's largest value in the map: (K,) float64 (sec. 3.3).

    Maps may differ in h and w. Raises ValueError for no map, an empty one, and maps of different K.
    """
    if not maps or any(m.ndim != 3 or not m.size or m.shape[2] != maps[0].shape[2] for m in maps):
        raise ValueError(f"overfeat.vote: maps must be arrays (h, w, K) of one K, at least one, got {[m.shape for m in maps]}")
    return np.mean([np.asarray(m, np.float64).max((0, 1)) for m in maps], 0)


def classify(net, image, sizes=None, flip=True, fine=True, probabilities=True, keep_aspect=False):
    """What the net says of a uint8 image (H, W, 3) at test time: a number for each class, (K,) float64; the largest is its answer.

    sizes: the scales (H, W), default net.table.sizes (the paper's "4 scales" are the first, second, fourth and sixth); flip: the
    mirrored image, too; fine: all offsets of the last pooling. probabilities: softmax at each window before the vote (CHOICE: the
    paper does not say), else the scores.
    """
    views = [resize_to(net.table, image, size, keep_aspect) for size in (net.table.sizes if sizes is None else sizes)]
    views += [view[:, ::-1] for view in views] * flip
    return vote([class_maps(net, view[None], probabilities, fine)[0] for view in views])


def classify_ten(net, image, short=256, probabilities=True):
    """As classify, from ten_views: the mean over the views."""
    return vote(list(class_maps(net, ten_views(net.table, image, short), probabilities, False)))


def committee(nets, image, **how):
    """The mean of classify(net, image, **how), (K,) float64, over several nets of the same classes (not checked)."""
    return np.mean([classify(net, image, **how) for net in nets], 0)


def class_maps(net, images, probabilities=True, fine=True):
    """The classifier's maps of uint8 images (N, H, W, 3): (N, h, w, K), float64 on the host. Options: see classify.

    Sizes h, w: outputs(), fine or coarse. Raises ValueError where the images hold no window, or are no (N, H, W, 3).
    """
    x, heads = put(net.normalise(images)), ("classifier",)
    scores = to_numpy(net.dense(x, heads=heads)[0] if fine else net.forward(x, heads=heads)[0]).astype(np.float64)
    return softmax_loss.softmax(scores) if probabilities else scores


# Files, and what one net takes over from another

def take_over(net, other):
    """Copy into net the layers of another OverFeat, part by part from the first on, as far as they have the same names and shapes, but for
    the output layers: how a detector starts from a classifier (sec. 5). Both must see pixels alike: give net's Spec the other's mean and
    std. Returns the names of the layers.

    Raises ValueError where a layer of the trunk has no counterpart, or mean and std differ.
    """
    mine, theirs, taken = net.leaves(), other.leaves(), []
    for part in net.parts:
        for name in (n for n in mine if n.split(".")[0] == part):
            shapes, wanted = ({k: a.shape for k, a in leaves[name].arrays().items()} if name in leaves else None for leaves in (theirs, mine))
            if name.endswith(".out") or shapes != wanted:
                if part == "trunk":
                    raise ValueError(f"overfeat.take_over: the trunks must have the same layers, got {name} of shapes {wanted} and {shapes}")
                break
            taken += [name] * bool(wanted)
    if (net.spec.mean, net.spec.std) != (other.spec.mean, other.spec.std):
        raise ValueError(f"overfeat.take_over: both nets must have one mean and std, got {net.spec.mean}, {net.spec.std} and "
                         f"{other.spec.mean}, {other.spec.std}")
    xp = array_module(next(iter(net.params.values())))
    for name in taken:
        for key, array in mine[name].arrays().items():
            array[...] = xp.asarray(to_numpy(theirs[name].arrays()[key]))
    return taken


def save(net, path, settings):
    """Write a net with its Spec and dtype, and the settings to use it with (a JSON dict), to a weights file (.npz)."""
    weights.save(path, "overfeat", net, settings)


def load(path):
    """Read a weights file: the net, in the dtype that it was saved in, nothing frozen, and the settings. Raises as weights.load."""
    return weights.load(path, "overfeat", _build)


def _build(arrays, spec, dtype):
    spec = Spec(**spec)
    weights.fits(sum(parameters(spec.layers, spec.outputs, spec.width, spec.regressor).values()), arrays)
    return OverFeat(spec, np.random.default_rng(0), dtype)
