"""RetinaNet, the one-stage detector that AP-loss (Chen et al., 1904.06373 and 2008.07294) trains.

A backbone and a feature pyramid make maps of several strides. Two heads, shared by all of them, say for every anchor box of every
cell which classes it holds, one yes-or-no score a class, and where the object's box lies. Nearly all answers are "no": AP-loss
ranks the scores of the whole batch against each other instead of weighing them (LOSSES has it and its rivals).

The net, its anchors, labels, box loss and test are those of the papers' released code. Differences: boxes are continuous,
anchors centred at stride * (i + 0.5); images are RGB; the box loss reported is the one whose gradient is taken; difficult objects
are ignored, not dropped; all images of a step are ranked in one list; no step is skipped. The table "small" is ours, for training
from scratch on a CPU.
"""
import dataclasses

import numpy as np

from tinydet import augment, checks, weights
from tinydet.backend import array_module, put, to_numpy
from tinydet.layers import BatchNorm, Composite, Conv2D, MaxPool, ReLU, Residual, Sequential, Shared, Stages, named
from tinydet.ops import (add, ap_loss, assign, auc_loss, box_loss, boxes as box_ops, conv, focal_loss, logistic_loss, nms,
                         smooth_ap, sort, upsample)


@dataclasses.dataclass(frozen=True)
class Table:
    """widths: channels of the five stages C1..C5, in C2..C5 of a ResNet those inside its bottlenecks, which put out 4 times as many;
    blocks: bottlenecks of C2..C5, () for the small backbone; channels: of the pyramid and the heads; depth: hidden layers of each
    head; top: the coarsest level; std: of the hidden layers' weights (None: He's rule)."""

    widths: tuple
    blocks: tuple = ()
    channels: int = 256
    depth: int = 4
    top: int = 7
    std: float = 0.01


# "small" is a CHOICE, for objects of 30 to 200 pixels in images of about 240x320
TABLES = {
    "small": Table((16, 24, 48, 64, 96), (), 48, 2, 6, None),
    "resnet50": Table((64, 64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet101": Table((64, 64, 128, 256, 512), (3, 4, 23, 3)),
}


@dataclasses.dataclass
class Spec:
    """What a RetinaNet is, apart from its arrays. Saved as JSON beside them. Defaults: the papers' code.

    stride_first: a ResNet's blocks halve the map in their first 1x1 convolution (MSRA's and Caffe's nets), not in the 3x3 one
    (torchvision's).
    mean, std: of the pixels, one for each channel, RGB. side, octaves, ratios: anchors of a level of stride s are side * s *
    octave pixels wide and high, at equal area in ratios height / width. target_std: by which the four numbers of a box are
    divided. prior: the probability that an untrained classifier gives; 0.01 is a bias of -log(99). The ranking losses do not see
    it, a constant on all scores.
    """

    classes: tuple
    table: str = "small"
    stride_first: bool = True
    mean: tuple = (122.7717, 115.9465, 102.9801)
    std: tuple = (1.0, 1.0, 1.0)
    side: float = 4.0
    octaves: tuple = (1.0, 2 ** 0.5)
    ratios: tuple = (0.5, 1.0, 2.0)
    target_std: tuple = (0.1, 0.1, 0.2, 0.2)
    prior: float = 0.01

    def __post_init__(self):
        """Raise ValueError or TypeError for what describes no net."""
        op = "retinanet.Spec"
        if self.table not in TABLES:
            raise ValueError(f"{op}: table must be one of {', '.join(TABLES)}, got {self.table!r}")
        for name in ("classes", "mean", "std", "octaves", "ratios", "target_std"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise TypeError(f"{op}: {name} must be a tuple, got {getattr(self, name)!r}")
        if not self.classes or not all(isinstance(c, str) for c in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{op}: classes must be different names, at least one, got {self.classes!r}")
        if not isinstance(self.stride_first, bool):
            raise TypeError(f"{op}: stride_first must be True or False, got {self.stride_first!r}")
        for name, count in (("mean", 3), ("std", 3), ("target_std", 4), ("octaves", None), ("ratios", None)):
            values, least = np.array(getattr(self, name), float), -np.inf if name == "mean" else 0
            if values.shape != (count or max(1, len(values)),) or not ((values > least) & (values < np.inf)).all():
                raise ValueError(f"{op}: {name} must hold {count or 'one or more'} finite numbers{' above 0' * (least == 0)}, got "
                                 f"{getattr(self, name)!r}")
        if not (0 < self.side < np.inf and 0 < self.prior < 1):
            raise ValueError(f"{op}: side must be finite and above 0, prior lie in (0, 1), got {self.side}, {self.prior}")

    @property
    def background(self):
        """The label of an anchor without object: one more than those of the classes."""
        return len(self.classes)

    @property
    def levels(self):
        """The pyramid's levels; that of level l has a stride of 2^l pixels."""
        return tuple(range(3, TABLES[self.table].top + 1))

    @property
    def per_cell(self):
        """Anchors of a cell."""
        return len(self.ratios) * len(self.octaves)


class RetinaNet(Composite):
    """The net of a Spec. Parts: backbone (C1..C5), pyramid (P3 to the coarsest), classifier and regressor, shared by all levels.

    Heads: hidden layers N(0, 0.01^2), outputs N(0, 0.01^2) and N(0, 0.001^2), biases 0 but for the prior's. Backbone by He's
    rule; the pyramid N(0, 1 / inputs), which keeps the variance where no ReLU follows (CHOICE). The small table has He's rule in
    the hidden layers and a batch norm behind each output of the pyramid, without which it diverged at rates at which it trains
    now (CHOICE).
    pretrained=True: a ResNet's C1 and C2 (conv1, layer1) do not train, nor does any of its batch norms, whose averages stay: as
    the paper has it for published weights (retinanet_weights.load_published). Without, the batch norms train on the batch's
    statistics (CHOICE).
    """

    def __init__(self, spec, rng, dtype=np.float32, pretrained=False):
        self.spec, self.table, self.dtype = spec, TABLES[spec.table], np.dtype(dtype)
        table = self.table
        backbone, widths = (_resnet(table, spec.stride_first, rng, dtype) if table.blocks else _small(table, rng, dtype))
        if pretrained and table.blocks:
            for leaf in backbone.leaves().values():
                leaf.freeze(isinstance(leaf, BatchNorm))
            for stage in ("C1", "C2"):
                backbone.parts[stage].freeze()

        def head(out, std):
            hidden = {f"conv{k}": Conv2D(table.channels, table.channels, 3, pad=1, rng=rng, std=table.std, dtype=dtype, relu=True)
                      for k in range(1, table.depth + 1)}
            output = Conv2D(table.channels, spec.per_cell * out, 3, pad=1, rng=rng, std=std, dtype=dtype)
            return Shared(named(hidden | {"out": output}))

        super().__init__(backbone=backbone, pyramid=Pyramid(widths, table.channels, table.top, rng, dtype, not table.blocks),
                         classifier=head(spec.background, 0.01), regressor=head(4, 0.001))
        self.params["classifier.layer.out.b"][...] = -np.log((1 - spec.prior) / spec.prior)

    def normalise(self, images):
        """uint8 images (N, H, W, 3), RGB, as the array of the net's dtype that it takes: (images - mean) / std. Works on the host."""
        mean, std = (np.array(v, self.dtype) for v in (self.spec.mean, self.spec.std))
        return (np.asarray(images, self.dtype) - mean) / std

    def forward(self, x, train=False, rng=None):
        """Scores (N, A, K), no sigmoid, and box deltas (N, A, 4), normalised, of the anchors of images x (N, H, W, 3), and cache.

        Rows in the order of anchors(). x: from normalise(), the net's dtype. Any H and W >= 1. train: batch norms that are not frozen
        take the batch's statistics and move their averages. rng is not used.
        N = 0 gives empty results, but a ValueError where batch norms train. Raises as conv.forward: ValueError for another shape and
        images without a pixel, TypeError for another dtype than the net's.
        """
        maps, backbone_cache = self.parts["backbone"].forward(x, train, rng)
        levels, pyramid_cache = self.parts["pyramid"].forward(maps[2:], train, rng)
        found, caches = [], []
        for name, width in (("classifier", self.spec.background), ("regressor", 4)):
            ys, cache = self.parts[name].forward(levels, train, rng)
            rows = [y.reshape(len(x), y.shape[1] * y.shape[2] * self.spec.per_cell, width) for y in ys]
            found.append(array_module(x).concatenate(rows, 1))
            caches.append((cache, [y.shape for y in ys]))
        return *found, (backbone_cache, pyramid_cache, caches)

    def backward(self, dscores, ddeltas, cache):
        """Add the gradients of all parameters to `grads`; the image gets none. dscores (N, A, K), ddeltas (N, A, 4): from loss()."""
        backbone_cache, pyramid_cache, caches = cache
        each = []
        for name, dy, (head_cache, shapes) in zip(("classifier", "regressor"), (dscores, ddeltas), caches):
            ends = np.cumsum([0] + [h * w * self.spec.per_cell for _, h, w, _ in shapes]).tolist()
            dys = [dy[:, first:end].reshape(shape) for first, end, shape in zip(ends, ends[1:], shapes)]
            each.append(self.parts[name].backward(dys, head_cache))
        dmaps = self.parts["pyramid"].backward([a + b for a, b in zip(*each)], pyramid_cache)
        self.parts["backbone"].backward([None, None, *dmaps], backbone_cache)


class Pyramid(Composite):
    """Feature pyramid (Lin et al.; the papers' code): a list of C3, C4, C5 to a list of P3, P4, ..., all of `channels`.

    1x1 laterals; each but the coarsest plus the merged map above it, enlarged twice (nearest); then 3x3 outputs. P6: 3x3 of
    stride 2 on C5; each further level: ReLU, then 3x3 of stride 2 on the one before. norm: batch norm behind every output.
    """

    def __init__(self, widths, channels, top, rng, dtype, norm=False):
        def layer(Cin, size, **more):
            made = Conv2D(Cin, channels, size, pad=size // 2, rng=rng, std=np.sqrt(1 / (size * size * Cin)), dtype=dtype, **more)
            return Sequential(made, BatchNorm(channels, dtype=dtype)) if norm and size == 3 else made

        parts = {f"lateral{k}": layer(width, 1) for k, width in zip((3, 4, 5), widths)}
        parts |= {f"output{k}": layer(channels, 3) for k in (3, 4, 5)}
        for k in range(6, top + 1):
            parts[f"output{k}"] = layer(widths[-1], 3, stride=2) if k == 6 else Sequential(ReLU(), layer(channels, 3, stride=2))
        super().__init__(**parts)
        self.top = top

    def forward(self, xs, train=False, rng=None):
        """xs: C3, C4, C5, (N, h, w, C) each. Returns the list P3, P4, ..., (N, h, w, channels) each, fine to coarse, and cache."""
        ps, caches, merged = {}, {}, None
        for k in (5, 4, 3):
            lateral, caches[f"lateral{k}"] = self.parts[f"lateral{k}"].forward(xs[k - 3])
            if merged is not None:
                above, caches[f"above{k}"] = upsample.forward(merged, 2, lateral.shape[1:3])
                lateral, caches[f"sum{k}"] = add.forward(lateral, above)
            merged = lateral
            ps[k], caches[f"output{k}"] = self.parts[f"output{k}"].forward(merged, train)
        for k in range(6, self.top + 1):
            ps[k], caches[f"output{k}"] = self.parts[f"output{k}"].forward(xs[2] if k == 6 else ps[k - 1], train)
        return [ps[k] for k in range(3, self.top + 1)], caches

    def backward(self, dys, cache):
        """dys: a gradient for each level. Returns those of C3, C4, C5."""
        dys, dxs, dabove = list(dys), [], None
        dlast = None                                                    # of what the coarsest level left sees: in the end C5
        for k in range(self.top, 5, -1):
            dy = dys[k - 3] if dlast is None else dys[k - 3] + dlast
            dlast = self.parts[f"output{k}"].backward(dy, cache[f"output{k}"])
        for k in (3, 4, 5):
            dmerged = self.parts[f"output{k}"].backward(dys[k - 3], cache[f"output{k}"])
            dmerged = dmerged if dabove is None else dmerged + dabove
            if k < 5:
                dmerged, dup = add.backward(dmerged, cache[f"sum{k}"])
                dabove = upsample.backward(dup, cache[f"above{k}"])
            dxs.append(self.parts[f"lateral{k}"].backward(dmerged, cache[f"lateral{k}"]))
        return dxs if dlast is None else [*dxs[:2], dxs[2] + dlast]


class PlainConv2D(Conv2D):
    """A Conv2D without bias, as published nets have it in front of a batch norm. layers.fold leaves it as it is."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.zero = self.params.pop("b")
        self.grads.pop("b")

    def forward(self, x, train=False, rng=None):
        """y (N, oh, ow, Cout) and cache of x (N, H, W, Cin), in the dtype of w; train and rng are not used. Raises as conv.forward."""
        return conv.forward(x, self.params["w"], self.zero, self.stride, self.pad, self.dilation)

    def backward(self, dy, cache):
        """Add the gradient of w to `grads` unless frozen; return dx (N, H, W, Cin), or None with input_grad=False. dy: the shape and dtype
        of y. Raises as conv.backward."""
        dx, dw, _ = conv.backward(dy, cache, self.input_grad, not self.frozen)
        self._add(w=dw)
        return dx

    def to(self, put):
        """As Layer.to: the zeros that stand for the bias move, too. Returns the layer."""
        self.zero = put(self.zero)
        return super().to(put)


def _small(table, rng, dtype):
    """The small backbone and the channels of C3, C4, C5: each stage halves the map, those from C3 on have a second convolution.
    CHOICE."""
    stages, Cin = {}, 3
    for k, C in enumerate(table.widths, 1):
        layers = []
        for stride in (2, 1) if k > 2 else (2,):
            layers += [Conv2D(Cin, C, 3, stride, 1, rng=rng, dtype=dtype, input_grad=k > 1), BatchNorm(C, dtype=dtype, relu=True)]
            Cin = C
        stages[f"C{k}"] = Sequential(*layers, input_grad=k > 1)
    return named(stages, Stages, input_grad=False), table.widths[2:]


def _resnet(table, stride_first, rng, dtype):
    """A ResNet of bottlenecks without its last layer, and the channels of C3, C4, C5 (He et al., 1512.03385)."""
    C = table.widths[0]
    first = PlainConv2D(3, C, 7, 2, 3, rng=rng, dtype=dtype, input_grad=False)
    stages = {"C1": named({"conv1": first, "bn1": BatchNorm(C, dtype=dtype, relu=True)}, input_grad=False)}
    for k, (width, count) in enumerate(zip(table.widths[1:], table.blocks), 2):
        blocks = [MaxPool(3, 2, 1)] * (k == 2)
        for b in range(count):
            blocks.append(_bottleneck(C, width, 2 if k > 2 and b == 0 else 1, stride_first, rng, dtype))
            C = 4 * width
        names = ["pool"] * (k == 2) + [str(b) for b in range(count)]
        stages[f"C{k}"] = named(dict(zip(names, blocks)))
    return named(stages, Stages, input_grad=False), tuple(4 * width for width in table.widths[2:])


def _bottleneck(Cin, width, stride, stride_first, rng, dtype):
    """relu(branch(x) + shortcut(x)); the shortcut is x itself where shapes allow it."""
    def pair(k, Cin, C, size, stride=1, relu=True):
        layer = PlainConv2D(Cin, C, size, stride, size // 2, rng=rng, dtype=dtype)
        return {f"conv{k}": layer, f"bn{k}": BatchNorm(C, dtype=dtype, relu=relu)}

    first, second = (stride, 1) if stride_first else (1, stride)
    branch = named(pair(1, Cin, width, 1, first) | pair(2, width, width, 3, second) | pair(3, width, 4 * width, 1, relu=False))
    plain = stride == 1 and Cin == 4 * width
    shortcut = None if plain else named(pair("", Cin, 4 * width, 1, stride, relu=False))
    return named({"sum": Residual(branch, shortcut), "relu": ReLU()})


# Anchors, and what each must answer

def cells(spec, height, width):
    """Rows and columns of the map of each level, for images of that size: rounded up. A list of pairs."""
    return [(-(-height // 2 ** k), -(-width // 2 ** k)) for k in spec.levels]


def anchors(spec, height, width):
    """The anchor boxes of images of height x width pixels (the papers' code): (A, 4) float64, pixels of the net's input.

    Levels from fine to coarse, in a level rows, columns, then ratios, then octaves. Level k has stride s = 2^k, cell (i, j) its
    centre at (s * (j + 0.5), s * (i + 0.5)); with side a = side * s * octave and ratio r a box is a / sqrt(r) wide, a * sqrt(r)
    high. Nothing is rounded or cut at the image's border.
    """
    checks.small("retinanet.anchors", 1, height=height, width=width)
    found = []
    for k, (h, w) in zip(spec.levels, cells(spec, height, width)):
        stride = 2 ** k
        ratio, octave = (v.ravel() for v in np.meshgrid(np.array(spec.ratios, float), np.array(spec.octaves, float), indexing="ij"))
        half = spec.side * stride * octave / 2
        half = np.stack([half / np.sqrt(ratio), half * np.sqrt(ratio)], 1)
        y, x = np.indices((h, w)).reshape(2, -1)
        centre = (np.stack([x, y], 1) + 0.5)[:, None] * stride
        found.append(np.concatenate([centre - half, centre + half], 2).reshape(-1, 4))
    return np.concatenate(found)


@dataclasses.dataclass
class Targets:
    """What the anchors of an image must answer. labels: (A,) int64, K is the background, -1 is ignored; deltas: (A, 4) float64,
    normalised, zeros but where an anchor holds an object."""

    labels: np.ndarray
    deltas: np.ndarray


def label(spec, anchors, boxes, labels, difficult=None, positive=0.5, negative=0.4):
    """What each anchor of an image must answer (the papers' code).

    An anchor holds an object if its largest IoU is >= positive, or if no anchor overlaps some object more than it does: all that
    tie (to 1e-9, CHOICE: equal overlaps differ in their last bits), which needs an overlap above 0. It answers with the class and
    box of the object that IT overlaps most, the first of equals, even if another object forced it. Else it is background where
    that IoU is < negative, and else ignored.
    Difficult objects are no objects; anchors that hold none and overlap one by at least `negative` are ignored (CHOICE: the
    papers' code drops such objects, so that anchors there are background: give it Example.usable()).
    Deltas: boxes.encode divided by target_std.
    anchors: (A, 4), boxes: (G, 4) with area, float32 or float64; labels: (G,) integers in 0..K-1, difficult: (G,) bool. Returns
    Targets.
    Without objects all is background. Raises ValueError for NaN, infinity, shapes, boxes without area, labels and thresholds
    out of range, TypeError for dtypes.
    """
    op = "retinanet.label"
    for name, found in (("anchors", anchors), ("boxes", boxes)):
        checks.float_array(op, name, found, "(R, 4)")
        checks.finite(op, **{name: found})
    checks.integers(op, "labels", labels, (len(boxes),))
    if not 0 <= negative <= positive <= 1:
        raise ValueError(f"{op}: negative and positive must be overlaps, 0 <= negative <= positive <= 1, got {negative}, {positive}")
    if not ((labels >= 0) & (labels < spec.background)).all():
        raise ValueError(f"{op}: labels must lie in 0..{spec.background - 1}, got {labels.min()}..{labels.max()}")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"{op}: boxes must have area, got {boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)][0].tolist()}")
    difficult = np.zeros(len(boxes), bool) if difficult is None else checks.booleans(op, "difficult", difficult, len(boxes))
    anchors, boxes = anchors.astype(np.float64, copy=False), boxes.astype(np.float64, copy=False)
    usable = ~difficult
    answer, deltas = np.full(len(anchors), spec.background, np.int64), np.zeros((len(anchors), 4))
    held = np.zeros(len(anchors), bool)
    if len(anchors) and usable.any():
        objects = boxes[usable]
        best, overlap, _, most = assign.best(anchors, objects)
        held = overlap >= positive
        for r in np.flatnonzero((most > 0) & (most < positive)):        # the best anchors of the others hold something already
            held |= box_ops.iou(anchors, objects[r:r + 1])[:, 0] >= most[r] * (1 - 1e-9)
        answer[overlap >= negative] = -1
        answer[held] = labels[usable][best[held]]
        deltas[held] = box_ops.encode(anchors[held], objects[best[held]]) / np.array(spec.target_std)
    if len(anchors) and not usable.all():
        _, overlap, _, _ = assign.best(anchors, boxes[~usable])
        answer[~held & (overlap >= negative)] = -1
    return Targets(answer, deltas)


def entries(labels, K):
    """labels (N, A), K for the background and -1 for ignored, as one yes-or-no answer a class (N, A, K) int8: 1, 0, -1
    (1904.06373; its code).

    An anchor of a class is 1 there and 0 for the K - 1 others. On the device of labels. Flattened, entry ((n * A + m) * K + k) is anchor m
    of image n and class k, as that of the scores.
    """
    xp, labels = array_module(labels), labels[..., None]
    return xp.where(labels < 0, -1, labels == xp.arange(K)).astype(np.int8)


# Losses: from the scores (N, A, K) of a batch and their labels (N, A, K), 1, 0 or -1 for ignored, to a value and its gradient

def _cross_entropy(scores, labels, ratio=3):
    """Cross-entropy of the positive entries and `ratio` times as many of the hardest negative ones, divided by the number of
    positive entries.

    The rival CE + OHEM of the paper's Table 2, unverified; that the 3:1 of SSD is meant, over entries, is a CHOICE.
    Equal scores in order of index; without positive entries value and gradient are 0. The hardest are those of the highest
    scores: nothing waits for a GPU.
    """
    xp, x, y = array_module(scores), scores.reshape(-1), labels.reshape(-1)
    order = sort.argsort(xp.where(y == 0, x, x.dtype.type(-np.inf)), descending=True)
    rank = xp.empty_like(order)
    rank[order] = xp.arange(len(order), dtype=order.dtype)
    easy = (y == 0) & (rank >= ratio * (y == 1).sum())
    value, gradient = focal_loss.loss(x, xp.where(easy, -1, y).astype(np.int8), alpha=None, gamma=0.0)
    return value, gradient.reshape(scores.shape)


LOSSES = {"ap": ap_loss.ap_loss, "auc": auc_loss.auc_loss, "smooth_ap": smooth_ap.smooth_ap, "focal": focal_loss.loss,
          "ce": _cross_entropy}


def loss(scores, deltas, targets, name="ap", per_image=False, box_weight=1.0, **options):
    """Classification and box loss of a training batch, with the gradients to train on (the papers' code).

    value = class loss + box_weight * mean over the four numbers of all anchors that hold an object of smooth L1 (beta 1); without
    any the latter is 0.
    scores: (N, A, K), deltas: (N, A, 4) from RetinaNet.forward; targets: Targets of each image. name: one of LOSSES; options:
    those of its function (ap: delta, interpolated; auc: delta; smooth_ap: delta; focal: alpha, gamma, normalizer; ce: ratio).
    The entries of the batch are ranked, or counted, together, across images, levels and classes (sec. 3.4, unverified; the code);
    per_image=True: those of each image alone, the mean over the images, of which those without an object count as 0 in a ranking loss.
    Returns a dict of numbers (loss, class_loss, box_loss, positives: anchors that hold an object) and dscores, ddeltas. For "ap"
    dscores is the paper's update, no derivative (ops/ap_loss.py). On a GPU all stays there, the losses too. The papers' code skips a
    step whose loss is exactly 0, for which a GPU would have to be waited for: not so here (CHOICE).
    dscores (N, A, K) and ddeltas (N, A, 4) have the dtype of scores and deltas; box_weight is in ddeltas, not in box_loss.
    Raises ValueError for another name, targets that do not fit, and a box_weight that is not finite or below 0; TypeError for options
    that the function does not have; else as that function.
    """
    op = "retinanet.loss"
    if name not in LOSSES:
        raise ValueError(f"{op}: name must be one of {', '.join(LOSSES)}, got {name!r}")
    N, A, K = scores.shape
    if [len(t.labels) for t in targets] != [A] * N:
        raise ValueError(f"{op}: targets must be {N}, of {A} anchors each, got {[len(t.labels) for t in targets]}")
    if not 0 <= box_weight < np.inf:
        raise ValueError(f"{op}: box_weight must be finite and not negative, got {box_weight}")
    xp = array_module(scores)
    classes = np.stack([t.labels for t in targets]) if N else np.zeros((0, A), np.int64)
    if classes.size and not -1 <= classes.min() <= classes.max() <= K:
        raise ValueError(f"{op}: labels of targets must lie in -1..{K}, got {classes.min()}..{classes.max()}")
    held = ((classes >= 0) & (classes < K)).reshape(-1)
    wanted = np.concatenate([np.zeros((0, 4)), *(t.deltas for t in targets)]).astype(scores.dtype.name)
    labels = entries(xp.asarray(classes), K)
    if per_image and N > 1:
        values, gradients = zip(*(LOSSES[name](scores[n], labels[n], **options) for n in range(N)))
        class_loss, dscores = sum(values) / N, xp.stack(gradients) / N
    else:
        class_loss, dscores = LOSSES[name](scores, labels, **options)
    boxes, ddeltas = box_loss.smooth_l1(deltas.reshape(-1, 4), xp.asarray(wanted), xp.asarray(held))
    boxes, ddeltas = boxes / 4, ddeltas.reshape(deltas.shape) * (box_weight / 4)
    values = {"loss": class_loss + box_weight * boxes, "class_loss": class_loss, "box_loss": boxes, "positives": int(held.sum())}
    return values, dscores, ddeltas


# Training views and detection

VIEWS = ("ssd", "crop", "mirror")


def training_view(spec, example, rng, height, width, views="ssd", upside_down=False, most=4.0, axes=None):
    """One view of a training image, warped to height x width: uint8 image, boxes, labels, difficult, in its pixels.

    views: one of VIEWS: the chain of augment.ssd, with `most` for its expansion and axes for its PCA lighting; "crop": a part of
    3/4 to 1 of each side, mirrored half of the time (CHOICE: for sets that are soon learnt); "mirror": that alone. upside_down:
    also mirrored top to bottom half of the time, for images without an up (CHOICE).
    Returns image uint8 (height, width, 3), boxes (R, 4) float64 in its pixels, labels (R,) int64, difficult (R,) bool; a crop may leave
    no box. The published nets train at 512x512 (the papers' code). Raises ValueError for other views.
    """
    if views not in VIEWS:
        raise ValueError(f"retinanet.training_view: views must be one of {', '.join(VIEWS)}, got {views!r}")
    image, boxes, kept = example.image(), example.boxes, np.arange(len(example.boxes))
    if views == "ssd":
        image, boxes, kept = augment.ssd(image, boxes, kept, rng, (width, height), spec.mean, axes, most)
    else:
        if views == "crop":
            image, boxes, kept = augment.random_crop(image, boxes, rng)
        image, boxes = augment.random_flip(image, boxes, rng)
        image, boxes = augment.resize(image, boxes, width, height)
    if upside_down:
        image, boxes = augment.random_flip(image, boxes, rng, upside_down=True)
    return image, boxes, example.labels[kept], example.difficult[kept]


def batch(net, images, multiple=1):
    """Images (at least one) as one array for the net, normalised: in the upper left corner, the rest 0 (the mean); sides rounded
    up to a multiple."""
    H, W = (-(-max(image.shape[k] for image in images) // multiple) * multiple for k in (0, 1))
    return augment.in_corner(images, H, W, net.normalise, net.dtype)


@dataclasses.dataclass(frozen=True)
class Testing:
    """How detections are made (the papers' code). short, longest: of the image in pixels; multiple: its sides are filled up to one.

    top: so many (anchor, class) pairs of each level go on, of which those with a probability above min_score (of the coarsest
    level all above 0) give boxes; nms: IoU within a class; limit: boxes of an image. The ranking losses do not fix a
    probability's meaning: keep min_score low.
    """

    short: int = 500
    longest: int = 833
    multiple: int = 32
    top: int = 1000
    min_score: float = 0.01
    nms: float = 0.5
    limit: int = 100

    def __post_init__(self):
        """Raise ValueError or TypeError for what cannot be."""
        op = "retinanet.Testing"
        checks.small(op, 1, short=self.short, longest=self.longest, multiple=self.multiple, top=self.top, limit=self.limit)
        if not (0 <= self.min_score < 1 and 0 <= self.nms <= 1):
            raise ValueError(f"{op}: min_score must lie in [0, 1) and nms in [0, 1], got {self.min_score!r}, {self.nms!r}")


def detect(net, image, testing=Testing()):
    """All detections in one image. image: uint8 (H, W, 3).

    Returns boxes (R, 4) float64 in pixels of the image, cut at its border, labels (R,) int64, scores (R,) float64, probabilities, by
    falling score, ties in the order of candidates(). Boxes of which nothing is left in the image are dropped. The net runs on its backend,
    the rest on the host.
    """
    H, W = image.shape[:2]
    scaled, _ = augment.scale(image, np.zeros((0, 4)), augment.short_side_factor(image, testing.short, testing.longest))
    x = batch(net, [scaled], testing.multiple)
    scores, deltas, _ = net.forward(put(x))
    scores, deltas = (to_numpy(a)[0].astype(np.float64) for a in (scores, deltas))
    rows, labels, p = candidates(net.spec, scores, *x.shape[1:3], testing)
    boxes = box_ops.decode(anchors(net.spec, *x.shape[1:3])[rows], deltas[rows] * np.array(net.spec.target_std))
    boxes = box_ops.clip(boxes * np.tile([W / scaled.shape[1], H / scaled.shape[0]], 2), H, W)
    seen = box_ops.area(boxes) > 0
    boxes, labels, p = boxes[seen], labels[seen], p[seen]
    kept = nms.nms(boxes, p, testing.nms, groups=labels, limit=testing.limit)
    return boxes[kept], labels[kept], p[kept]


def candidates(spec, scores, height, width, testing):
    """The pairs of anchor and class of each level that may become detections (Testing: top, min_score).

    scores: (A, K) float64 of an input of height x width pixels. Returns anchors (M,), labels (M,), probabilities (M,): level by
    level, by falling score, ties in order of anchor, then class.
    """
    shapes, found, first = cells(spec, height, width), [], 0
    for n, (h, w) in enumerate(shapes):
        p = logistic_loss.sigmoid(scores[first:first + h * w * spec.per_cell].ravel())
        seen = np.flatnonzero(p > (testing.min_score if n + 1 < len(shapes) else 0))
        best = seen[np.argsort(-p[seen], kind="stable")[:testing.top]]
        found.append((first + best // spec.background, best % spec.background, p[best]))
        first += h * w * spec.per_cell
    return tuple(map(np.concatenate, zip(*found)))


# Files

def save(net, path, settings):
    """Write a net with its Spec and dtype, and the settings to use it with (a JSON dict), to a weights file (.npz)."""
    weights.save(path, "retinanet", net, settings)


def load(path):
    """Read a weights file: the net, in the dtype that it was saved in, nothing frozen, and the settings. Raises as weights.load."""
    return weights.load(path, "retinanet", _build)


def _build(arrays, spec, dtype):
    spec = Spec(**spec)
    wanted, found = (3, 3, TABLES[spec.table].channels, spec.per_cell * spec.background), arrays["classifier.layer.out.w"].shape
    if found != wanted:                                                 # said before a large net is made
        raise ValueError(f"a net of table {spec.table}, whose classifier.layer.out.w must have shape {wanted}, got {found}")
    return RetinaNet(spec, np.random.default_rng(0), dtype)
