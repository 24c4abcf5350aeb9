"""Fast R-CNN (Girshick, 1504.08083), the detector that OHEM (Shrivastava, Gupta and Girshick, 1604.03540) trains.

A trunk runs once on the image. Each region proposed for it is max-pooled from the trunk's map to a fixed size (ops/roi_pool.py), and the head says
which class it holds and where the object's box lies. Training needs a few regions of the thousands: ops/ohem.py has the ways to choose.

Differences from the papers' code: boxes are continuous (the regions are made inclusive, x2 - 1, where they are pooled); the background is the
last class, not the first, and images are RGB (fast_rcnn_weights.load_published turns published weights).
"""
import copy
import dataclasses

import numpy as np

from tinydet import augment, checks, weights
from tinydet.backend import array_module, put, scalar, to_numpy
from tinydet.layers import LRN, BatchNorm, Composite, Conv2D, Dropout, Flatten, Linear, MaxPool, ReLU, named
from tinydet.ops import assign, box_voting, boxes as box_ops, nms, ohem, roi_loss, roi_pool, softmax_loss

# Trunks and heads, row by row: ("name", kernel, stride, pad, channels), LRN(...), MaxPool(...); then what the head has. The two published ones as
# 1504.08083's code has them; "small" is ours (CHOICE), with batch norm, for training from scratch


@dataclasses.dataclass(frozen=True)
class Table:
    """trunk: rows; pool: side of the pooled regions; scale: cells of the map a pixel; hidden: outputs of the head's layers; frozen: rows of the
    trunk that do not train when they come from published weights; norm: batch norm behind each convolution."""

    trunk: tuple
    pool: int
    scale: float
    hidden: tuple
    frozen: tuple = ()
    norm: bool = False


def _vgg16():
    rows, blocks = [], ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for b, (channels, count) in enumerate(blocks, 1):
        rows += [(f"conv{b}_{i}", 3, 1, 1, channels) for i in range(1, count + 1)]
        rows += [("max", 2, 2)] * (b < len(blocks))
    return tuple(rows)


TABLES = {
    "small": Table((("conv1", 4, 2, 1, 24), ("conv2", 3, 1, 1, 32), ("max", 2, 2), ("conv3", 3, 1, 1, 64), ("conv4", 3, 1, 1, 64)),
                   5, 1 / 4, (128,), norm=True),
    "VGG_CNN_M_1024": Table((("conv1", 7, 2, 0, 96), ("lrn",), ("max", 3, 2), ("conv2", 5, 2, 1, 256), ("lrn",), ("max", 3, 2),
                             ("conv3", 3, 1, 1, 512), ("conv4", 3, 1, 1, 512), ("conv5", 3, 1, 1, 512)), 6, 1 / 16, (4096, 1024), ("conv1",)),
    "VGG16": Table(_vgg16(), 7, 1 / 16, (4096, 4096), ("conv1_1", "conv1_2", "conv2_1", "conv2_2")),
}


@dataclasses.dataclass
class Spec:
    """What a Fast R-CNN is, apart from its arrays. Saved as JSON beside them.

    short, longest: training scales (the short side of the image in pixels, as the paper has it: 600) and the limit of the long side (1000).
    mean, std: of the pixels, one for each channel; target_mean, target_std: by which the four numbers of a box are normalised, four for all classes
    or four for each (fixed numbers, as in Detectron, or those of the training regions, as in the paper's code: target_statistics).
    float_bins: Caffe's bins in float32 where regions are pooled, for parity with nets trained there (ops/roi_pool.py).
    """

    classes: tuple
    table: str = "small"
    short: tuple = (600,)
    longest: int = 1000
    dropout: float = 0.5
    mean: tuple = (122.7717, 115.9465, 102.9801)
    std: tuple = (1.0, 1.0, 1.0)
    target_mean: tuple = (0.0, 0.0, 0.0, 0.0)
    target_std: tuple = (0.1, 0.1, 0.2, 0.2)
    float_bins: bool = False

    def __post_init__(self):
        """Raise ValueError or TypeError for what describes no net."""
        op = "fast_rcnn.Spec"
        if self.table not in TABLES:
            raise ValueError(f"{op}: table must be one of {', '.join(TABLES)}, got {self.table!r}")
        for name in ("classes", "short"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise TypeError(f"{op}: {name} must be a tuple, got {getattr(self, name)!r}")
        if not self.classes or not all(isinstance(c, str) for c in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{op}: classes must be different names, at least one, got {self.classes!r}")
        checks.small(op, 16, longest=self.longest, **{f"short {i}": s for i, s in enumerate(self.short)})
        for name, count, least in (("mean", 3, -np.inf), ("std", 3, 0), ("target_mean", 4, -np.inf), ("target_std", 4, 0)):
            values = np.array(getattr(self, name), float)
            shapes = [(count,)] + [(len(self.classes), 4)] * (count == 4)
            if values.shape not in shapes or not ((values > least) & (values < np.inf)).all():
                raise ValueError(f"{op}: {name} must hold {count} finite numbers{' above 0' if least == 0 else ''}"
                                 f"{', or as many for each class' * (count == 4)}, got {getattr(self, name)!r}")
        if not self.short or not 0 <= self.dropout < 1:
            raise ValueError(f"{op}: there must be a short side, and dropout lie in [0, 1), got {self.short!r}, {self.dropout}")

    @property
    def background(self):
        """The label of the background: the last."""
        return len(self.classes)

    def normalisation(self):
        """target_mean and target_std of each class, two arrays (K, 4)."""
        return tuple(np.broadcast_to(np.array(v, float), (len(self.classes), 4)) for v in (self.target_mean, self.target_std))


class FastRCNN(Composite):
    """The net of a Spec. Parts: trunk (images to a map), head (pooled regions to numbers), classifier (K + 1), regressor (4 * (K + 1)).

    Weights of trunk and hidden layers by He's rule, classifier N(0, 0.01^2), regressor N(0, 0.001^2) (1504.08083), biases 0.
    pretrained=True: the table's frozen layers do not train, as the paper has it for published weights.
    """

    def __init__(self, spec, rng, dtype=np.float32, pretrained=False):
        self.spec, self.table, self.dtype = spec, TABLES[spec.table], np.dtype(dtype)
        trunk, channels = {}, 3
        for k, (name, *row) in enumerate(self.table.trunk):
            if name == "max":
                trunk[f"pool{k}"] = MaxPool(*row, ceil=True)                        # Caffe's pooling
            elif name == "lrn":
                trunk[f"lrn{k}"] = LRN(5, 5e-4, 0.75, 2.0)
            else:
                kernel, stride, pad, out = row
                trunk[name] = Conv2D(channels, out, kernel, stride, pad, rng=rng, dtype=dtype, relu=not self.table.norm)
                if pretrained and name in self.table.frozen:
                    trunk[name].freeze()
                if self.table.norm:
                    trunk[f"{name}_norm"] = BatchNorm(out, dtype=dtype, relu=True)
                channels = out
        head, width, K = {"flatten": Flatten()}, self.table.pool ** 2 * channels, spec.background
        for k, hidden in enumerate(self.table.hidden, 6):
            head |= {f"fc{k}": Linear(width, hidden, rng=rng, dtype=dtype), f"relu{k}": ReLU(), f"drop{k}": Dropout(spec.dropout)}
            width = hidden
        super().__init__(trunk=named(trunk, input_grad=False), head=named(head), classifier=Linear(width, K + 1, rng=rng, std=0.01, dtype=dtype),
                         regressor=Linear(width, 4 * (K + 1), rng=rng, std=0.001, dtype=dtype))

    def normalise(self, images):
        """uint8 images (N, H, W, 3) as the float array the net takes."""
        mean, std = (np.array(v, self.dtype) for v in (self.spec.mean, self.spec.std))
        return (np.asarray(images, self.dtype) - mean) / std

    def features(self, x, train=False, rng=None):
        """The trunk's map of images x (N, H, W, 3), and its cache."""
        return self.parts["trunk"].forward(x, train, rng)

    def regions(self, maps, rois, train=False, rng=None):
        """What the head says of regions: scores (R, K + 1), deltas (R, 4 * (K + 1)), normalised, and cache.

        rois: (R, 5), image index and continuous box in pixels of x, in the map's dtype. Pooled as Caffe does it, last pixels inclusive.
        Raises as roi_pool.forward.
        """
        last_pixel = array_module(rois).asarray([0, 0, 0, 1, 1], rois.dtype)
        pooled, pool_cache = roi_pool.forward(maps, rois - last_pixel, self.table.pool, self.table.scale, self.spec.float_bins)
        hidden, head_cache = self.parts["head"].forward(pooled, train, rng)
        scores, scores_cache = self.parts["classifier"].forward(hidden, train, rng)
        deltas, deltas_cache = self.parts["regressor"].forward(hidden, train, rng)
        return scores, deltas, (pool_cache, head_cache, scores_cache, deltas_cache)

    def backward_head(self, dscores, ddeltas, cache):
        """Add the head's gradients to `grads`, and return that of the pooled regions: for a trunk that does not train."""
        _, head_cache, scores_cache, deltas_cache = cache
        dhidden = self.parts["classifier"].backward(dscores, scores_cache) + self.parts["regressor"].backward(ddeltas, deltas_cache)
        return self.parts["head"].backward(dhidden, head_cache)

    def backward_regions(self, dscores, ddeltas, cache):
        """Add the head's gradients to `grads`, and return that of the map."""
        return roi_pool.backward(self.backward_head(dscores, ddeltas, cache), cache[0])

    def forward(self, x, rois, train=False, rng=None):
        """Scores and deltas of regions of images x, and cache."""
        maps, trunk_cache = self.features(x, train, rng)
        scores, deltas, cache = self.regions(maps, rois, train, rng)
        return scores, deltas, (trunk_cache, cache)

    def backward(self, dscores, ddeltas, cache):
        """Add the gradients of all parameters to `grads`; the image gets none."""
        trunk_cache, regions_cache = cache
        self.parts["trunk"].backward(self.backward_regions(dscores, ddeltas, regions_cache), trunk_cache)


# Regions and what each must answer

@dataclasses.dataclass
class Regions:
    """The regions of one image with their answers. boxes: (R, 4) float64, pixels of the net's input; labels: (R,) int64, K is the background, -1 is
    ignored; targets: (R, 4), normalised; overlaps: (R,) largest IoU with an object."""

    boxes: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    overlaps: np.ndarray


HIGH = 0.5                          # IoU from which a region holds an object (1504.08083, sec. 2.3)


def label(spec, proposals, boxes, labels, difficult=None, append=True):
    """What each region of an image must answer (1504.08083, sec. 2.3; 1604.03540).

    The label is that of the object of largest IoU, first wins, where that is >= HIGH, else the background; the target of the box is that object,
    coded by boxes.encode and normalised. Regions whose IoU with a difficult object is >= HIGH are ignored: such objects are always "hard"
    (CHOICE); but not those that overlap another object at least as much, the object itself among them (CHOICE).
    append=True (training only): the objects themselves, the difficult ones aside, are regions, too. They stand first.
    proposals: (M, 4), boxes: (G, 4) float64, labels: (G,) integers, difficult: (G,) bool. Returns Regions. Proposals outside the image or without
    area are background like others (proposals.clean drops them). Raises ValueError for NaN or infinity, labels out of range and other shapes,
    TypeError for other dtypes.
    """
    for name, found in (("proposals", proposals), ("boxes", boxes)):
        checks.float_array("fast_rcnn.label", name, found, "(R, 4)")
        checks.finite("fast_rcnn.label", **{name: found})
    checks.integers("fast_rcnn.label", "labels", labels, (len(boxes),))
    if not ((labels >= 0) & (labels < spec.background)).all():
        raise ValueError(f"fast_rcnn.label: labels must lie in 0..{spec.background - 1}, got {labels.min()}..{labels.max()}")
    difficult = np.zeros(len(boxes), bool) if difficult is None else checks.booleans("fast_rcnn.label", "difficult", difficult, len(boxes))
    proposals, boxes = proposals.astype(np.float64, copy=False), boxes.astype(np.float64, copy=False)
    usable = ~difficult
    regions = np.concatenate([boxes[usable], proposals]) if append else proposals
    R, background = len(regions), spec.background
    answer, targets, overlaps = np.full(R, background), np.zeros((R, 4)), np.zeros(R)
    if R and usable.any():
        best, overlaps, _, _ = assign.best(regions, boxes[usable])
        positive = overlaps >= HIGH
        answer[positive] = labels[usable][best[positive]]
        coded = box_ops.encode(regions[positive], boxes[usable][best[positive]])
        mean, std = spec.normalisation()
        targets[positive] = (coded - mean[answer[positive]]) / std[answer[positive]]
    if R and not usable.all():
        _, ignored, _, _ = assign.best(regions, boxes[~usable])
        answer[(ignored >= HIGH) & (ignored > overlaps)] = -1
    return Regions(regions, answer, targets, overlaps)


def target_statistics(spec, regions, per_class=True):
    """Mean and standard deviation of the boxes' four numbers over training regions: what target_mean and target_std should be (1504.08083's code).

    Over all regions of a class, E[v] and sqrt(E[v^2] - E[v]^2), for each class alone or all together. A class of fewer than two
    regions, or whose numbers hardly differ (below 1e-3), takes those of all classes, and those at least 1e-3 (CHOICE; the code would divide by 0).
    regions: Regions, as label() gives them with this spec. Returns two tuples, of 4 numbers or of K times 4.
    Raises ValueError if no region holds an object.
    """
    old_mean, old_std = spec.normalisation()
    labels = np.concatenate([np.zeros(0, int), *(r.labels for r in regions)])
    coded = np.concatenate([np.zeros((0, 4)), *(r.targets for r in regions)])
    held = (labels >= 0) & (labels < spec.background)
    if not held.any():
        raise ValueError(f"fast_rcnn.target_statistics: some region must hold an object, got {len(labels)} that do not")
    labels, coded = labels[held], coded[held] * old_std[labels[held]] + old_mean[labels[held]]
    mean, std = coded.mean(0), coded.std(0).clip(1e-3)
    if per_class:
        each = [coded[labels == k] for k in range(spec.background)]
        known = [len(v) > 1 and v.std(0).min() >= 1e-3 for v in each]
        mean = [v.mean(0) if good else mean for v, good in zip(each, known)]
        std = [v.std(0) if good else std for v, good in zip(each, known)]
    return _tuples(mean), _tuples(std)


def _tuples(values):
    return tuple(map(tuple, values)) if np.ndim(values) == 2 else tuple(map(float, values))


def fold_targets(net):
    """A copy of the net whose regressor gives the boxes' numbers themselves: W[:, 4c+k] * std, b * std + mean (the paper's code at export).

    The background's four outputs stay. Keep the net itself for training on.
    """
    mean, std = (np.concatenate([v, fill]).ravel() for v, fill in zip(net.spec.normalisation(), (np.zeros((1, 4)), np.ones((1, 4)))))
    folded = copy.deepcopy(net)
    folded.spec = dataclasses.replace(net.spec, target_mean=(0.0,) * 4, target_std=(1.0,) * 4)
    w, b = (folded.parts["regressor"].params[name] for name in "wb")
    xp = array_module(w)
    w[...] = w * xp.asarray(std.astype(w.dtype))
    b[...] = b * xp.asarray(std.astype(b.dtype)) + xp.asarray(mean.astype(b.dtype))
    return folded


# One training step

SAMPLERS = ("random", "ohem", "ssd", "focal", "all")
ACCUMULATE = ("mean_of_means", "global_mean")


@dataclasses.dataclass
class Sampler:
    """Which regions train, and how their losses add up.

    random: Fast R-CNN's quotas (fraction, low; 1504.08083, sec. 2.3). ohem: the hardest (threshold, per_label; 1604.03540, ops/ohem.py).
    ssd: all of a class and `ratio` times as many of the hardest background, both terms divided by the former (SSD's released code). focal: all,
    each faded by (1 - p)^gamma. all: all regions, the mean (the paper's B = 2048).
    batch: regions of a step; each of its N images gives batch // N, at least 1 (not used by ssd, focal and all).
    accumulate: "mean_of_means": the mean over the images of the means over each one's regions (Caffe's iter_size), "global_mean": over all
    regions (not used by ssd and focal). chunk: regions scored at a time, in which nothing is kept for backward.
    low: background whose largest IoU with an object is below it never trains (bg_lo); None is 0.1 for random, as Fast R-CNN has it, else 0.
    noisy: dropout in the scoring pass, as the released prototxt has it; without, the choice depends on nothing random.
    Raises ValueError or TypeError for settings out of range.
    """

    name: str = "ohem"
    batch: int = 128
    fraction: float = 0.25
    low: float = None
    threshold: float = 0.7
    per_label: bool = True
    ratio: int = 3
    gamma: float = 2.0
    accumulate: str = "mean_of_means"
    chunk: int = 512
    noisy: bool = False

    def __post_init__(self):
        op = "fast_rcnn.Sampler"
        if self.name not in SAMPLERS or self.accumulate not in ACCUMULATE:
            raise ValueError(f"{op}: name must be one of {', '.join(SAMPLERS)} and accumulate of {', '.join(ACCUMULATE)}, got {self.name!r}, "
                             f"{self.accumulate!r}")
        checks.whole(op, 1, batch=self.batch, chunk=self.chunk, ratio=self.ratio)
        if self.low is None:
            self.low = 0.1 if self.name == "random" else 0.0
        if not (0 <= self.fraction <= 1 and 0 <= self.low <= HIGH and (self.gamma == 0 or 1 <= self.gamma < np.inf)):
            raise ValueError(f"{op}: fraction must lie in [0, 1], low in [0, {HIGH}] and gamma be 0, or finite and at least 1, got "
                             f"{self.fraction!r}, {self.low!r}, {self.gamma!r}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"{op}: threshold must be None or lie in [0, 1], got {self.threshold!r}")


def score(net, maps, rois, labels, targets, sampler, rng=None):
    """The read-only pass: the loss of every region (R,), in chunks of which nothing is kept (1604.03540, sec. 4.2).

    rois: (R, 5), labels: (R,), targets: (R, 4), as on_device makes them. Returns (R,), the map's dtype, 0 for ignored regions.
    It touches no gradient and no running average: heads have no batch norm.
    """
    parts = []
    for first in range(0, len(rois), sampler.chunk):
        some = slice(first, first + sampler.chunk)
        scores, deltas, _ = net.regions(maps, rois[some], sampler.noisy, rng)
        parts.append(roi_loss.each(scores, deltas, labels[some], targets[some]))
    return array_module(maps).concatenate(parts) if parts else maps[:0, 0, 0, 0]


def choose(net, maps, regions, arrays, sampler, batch, rng):
    """Indices (int64) of the regions of an image that train, on the device of maps. arrays: their rois, labels and targets there.

    batch: of this image. Order: that of ohem.select, random or ssd; all and focal: of index. Raises as they do.
    """
    put = array_module(maps).asarray
    if sampler.name != "random" and sampler.low > 0:
        labels = np.where(regions.overlaps < sampler.low, -1, regions.labels)
        regions, arrays = dataclasses.replace(regions, labels=labels), [arrays[0], put(labels), arrays[2]]
    if sampler.name == "random":
        return put(ohem.random(regions.labels, regions.overlaps, batch, rng, sampler.fraction, sampler.low, HIGH))
    if sampler.name in ("all", "focal"):
        return put(np.flatnonzero(regions.labels >= 0))
    losses = score(net, maps, *arrays, sampler, rng)
    if sampler.name == "ssd":                                           # ranks the background alone, which has no box loss
        return put(ohem.ssd(to_numpy(losses), regions.labels, regions.overlaps, sampler.ratio, HIGH))
    return ohem.select(losses, arrays[0][:, 1:], arrays[1], batch, sampler.threshold, sampler.per_label)


def on_device(maps, n, regions):
    """rois, labels and targets of the regions of image n, where maps lies, as score() and roi_loss take them.

    maps: (N, h, w, C) of net.features; n: 0..N - 1; regions: the Regions of that image. Returns a list: rois (R, 5), n and the box in pixels of
    the net's input, and targets (R, 4), both in the maps' dtype; between them labels (R,) int64. Nothing is checked.
    """
    put = array_module(maps).asarray
    return [rois_of(maps, n, regions), put(regions.labels), put(regions.targets.astype(maps.dtype.name))]


def rois_of(maps, n, regions):
    """The regions of image n as net.regions takes them, where maps lies."""
    return array_module(maps).asarray(np.column_stack([np.full(len(regions.boxes), float(n)), regions.boxes]).astype(maps.dtype.name))


def mean_loss(net, x, regions, chunk=512):
    """Mean loss of all regions of images x, ignored ones left out, whatever trains the net: the curve that OHEM compares (1604.03540).

    Running averages and no dropout, so it is the loss of the net as it would be used; nothing changes. x: as step() takes it; regions: a list
    of N Regions. chunk: regions scored at a time. Returns a float, NaN without regions.
    """
    maps, _ = net.features(x)
    losses = [to_numpy(score(net, maps, *on_device(maps, n, r), Sampler("all", chunk=chunk)))[r.labels >= 0] for n, r in enumerate(regions)]
    losses = np.concatenate([np.zeros(0), *losses])
    return float(losses.mean(dtype=np.float64)) if len(losses) else float("nan")


def step(net, x, regions, sampler, rng):
    """Forward, choice of regions, loss and backward for the images x (N, H, W, 3); regions: a list of N Regions. Gradients add up in `net.grads`.

    The trunk runs once; where the choice needs losses, the head runs on all regions first, and then on those chosen (the "two networks" of
    1604.03540, sec. 4.2). Returns a dict of numbers, "loss" first, with the share of the regions chosen that hold an object, and the list of the
    indices chosen in each image. On a GPU the numbers stay there; read are the counts of the chosen, one an image. Raises ValueError unless there are
    Regions for each image, else as choose().
    """
    if len(regions) != len(x):
        raise ValueError(f"fast_rcnn.step: there must be Regions for each of {len(x)} images, got {len(regions)}")
    maps, trunk_cache = net.features(x, True, rng)
    values, chosen, dscores, ddeltas, cache = head_step(net, maps, regions, sampler, rng)
    net.parts["trunk"].backward(net.backward_regions(dscores, ddeltas, cache), trunk_cache)
    return values, chosen


def head_step(net, maps, regions, sampler, rng):
    """The part of step() behind the trunk, from its maps (N, h, w, C) to the gradients of scores and deltas; none in `net.grads` yet.

    Returns what step() does, and dscores, ddeltas and cache, for net.backward_regions or, with a trunk that does not train, backward_head.
    """
    N, K, dtype, xp = len(maps), net.spec.background, maps.dtype, array_module(maps)
    chosen, picked = [], []
    for n, r in enumerate(regions):
        arrays = on_device(maps, n, r)
        chosen.append(choose(net, maps, r, arrays, sampler, max(1, sampler.batch // N), rng))
        picked.append([a[chosen[-1]] for a in arrays])
    rois, labels, targets = (xp.concatenate(column) for column in zip(*picked))
    count, positive = len(rois), (labels < K).sum()
    if sampler.name in ("ssd", "focal"):
        weights = xp.full(count, 1.0) / xp.maximum(positive, 1)
    elif sampler.accumulate == "global_mean":
        weights = xp.full(count, 1 / max(1, count))
    else:
        weights = xp.asarray(np.repeat([1 / (N * max(1, len(c))) for c in chosen], [len(c) for c in chosen]))
    gamma = sampler.gamma if sampler.name == "focal" else 0.0
    scores, deltas, cache = net.regions(maps, rois, True, rng)
    value, dscores, ddeltas = roi_loss.loss(scores, deltas, labels, targets, weights.astype(dtype), gamma=gamma)
    return {"loss": value, "regions": count, "positive": scalar(positive / max(1, count))}, chosen, dscores, ddeltas, cache


# Training images and detection

def training_image(spec, example, proposals, rng, mirror=True, jitter=0, most=None):
    """One image at one of the training scales, with its proposals: uint8 (h, w, 3), proposals, boxes, labels, difficult, in its pixels.

    Mirrored half of the time (CHOICE: the papers' list holds every image twice), the scale drawn from spec.short (1504.08083, 1604.03540).
    jitter: copies of each object, of which every edge moves by up to a tenth of the side, stand before the proposals (IoU >= 0.64;
    CHOICE, numbers and all). most: so many of the proposals, drawn anew each time, where there are more (CHOICE; the papers have about 2000).
    """
    if most is not None and len(proposals) > most:
        proposals = proposals[np.sort(rng.choice(len(proposals), most, replace=False))]
    image, boxes = example.image(), np.concatenate([example.boxes, jittered(example.boxes, jitter, example.size[::-1], rng), proposals])
    if mirror:
        image, boxes = augment.random_flip(image, boxes, rng)
    short = spec.short[rng.integers(len(spec.short))]
    image, boxes = augment.scale(image, boxes, augment.short_side_factor(image, short, spec.longest))
    count = len(example.boxes)
    return image, boxes[count:], boxes[:count], example.labels, example.difficult


def jittered(boxes, copies, size, rng):
    """Copies of boxes (G, 4), of which every edge moves by up to a tenth of the side: (copies * G, 4), cut at the image, (height, width) large."""
    near = np.repeat(boxes, copies, 0)
    near = near + rng.uniform(-0.1, 0.1, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
    return box_ops.clip(near, *size)


def batch(net, images):
    """uint8 images (h, w, 3) of different sizes as one array (N, H, W, 3) of the net's dtype, normalised: in the upper left corner, the rest 0
    (the mean); at least 32 pixels a side."""
    H, W = (max(32, *(image.shape[k] for image in images)) for k in (0, 1))
    return augment.in_corner(images, H, W, net.normalise, net.dtype)


@dataclasses.dataclass(frozen=True)
class Testing:
    """How detections are made (the papers' code). short, longest: scales, each region at the one where its area is nearest 224^2 (`near`).

    min_score, nms, limit: a class keeps what scores more, NMS at this IoU, then the best `limit` of an image over all classes (ties at the last
    score are cut by order, CHOICE). iterate: the boxes that score more than both `again` and min_score (CHOICE: what counts as high-scoring) go in
    as regions once more, for all classes (CHOICE), and of both lists the kept boxes become the score-weighted mean of those of their class that
    overlap by at least `vote` (MR-CNN's iterative boxes and voting, 1505.01749). chunk: regions that go through the head together.
    scores: "softmax", the class's probability, or "raw", its output as it is, as nets trained for mAP rank (fast_rcnn_map.py): then there is no
    min_score, and no iterate. per_class: the best so many of a class in an image before NMS (Fast R-CNN's code: 100); None: all.
    """

    short: tuple = (600,)
    longest: int = 1000
    near: float = 224.0
    min_score: float = 0.05
    nms: float = 0.3
    limit: int = 100
    iterate: bool = False
    again: float = 0.05
    vote: float = 0.5
    chunk: int = 512
    scores: str = "softmax"
    per_class: int = None

    def __post_init__(self):
        """Raise ValueError or TypeError for what cannot test."""
        op = "fast_rcnn.Testing"
        if self.scores not in ("softmax", "raw") or self.iterate and self.scores == "raw":
            raise ValueError(f"{op}: scores must be softmax, or raw without iterate, got {self.scores!r}, iterate {self.iterate}")
        if not self.short:
            raise ValueError(f"{op}: short must hold at least one side, got {self.short!r}")
        checks.small(op, 16, longest=self.longest, **{f"short {i}": s for i, s in enumerate(self.short)})
        checks.whole(op, 1, limit=self.limit, chunk=self.chunk, **({} if self.per_class is None else {"per_class": self.per_class}))
        for name, least, most in (("near", 0, np.inf), ("min_score", 0, 1), ("nms", 0, 1), ("again", 0, 1), ("vote", 0, 1)):
            if not (least <= getattr(self, name) <= most and getattr(self, name) < np.inf):
                raise ValueError(f"{op}: {name} must be a number from {least} to {most}, got {getattr(self, name)!r}")


def detect(net, image, proposals, testing):
    """All detections in one image. image: uint8 (H, W, 3), proposals (M, 4) float64, in its pixels.

    Returns boxes (R, 4) float64, cut at the image, labels (R,), scores (R,), by falling score (ties: lower label, then order of proposals).
    Boxes of which nothing is left in the image are dropped. Raises ValueError for proposals with NaN or infinity or of another shape.
    """
    checks.float_array("fast_rcnn.detect", "proposals", proposals, "(R, 4)")
    checks.finite("fast_rcnn.detect", proposals=proposals)
    proposals = proposals.astype(np.float64, copy=False)
    factors = np.array([augment.short_side_factor(image, s, testing.longest) for s in testing.short])
    pyramid = [net.features(put(batch(net, [augment.scale(image, np.zeros((0, 4)), f)[0]])))[0] for f in factors]
    p, boxes = look(net, image, pyramid, factors, proposals, testing)
    if testing.iterate and len(p):
        rows, labels = np.nonzero(p[:, :-1] > max(testing.min_score, testing.again))
        again_p, again = look(net, image, pyramid, factors, boxes[rows, labels], testing)
        p, boxes = np.concatenate([p, again_p]), np.concatenate([boxes, again])
    found = []
    lowest = testing.min_score if testing.scores == "softmax" else -np.inf
    for k in range(net.spec.background):
        seen = np.flatnonzero((p[:, k] > lowest) & (box_ops.area(boxes[:, k]) > 0))
        if testing.per_class is not None and len(seen) > testing.per_class:
            seen = np.sort(seen[np.argsort(-p[seen, k], kind="stable")[:testing.per_class]])
        b, s = boxes[seen, k], p[seen, k]
        kept = nms.nms(b, s, testing.nms)
        voted = box_voting.box_voting(b[kept], b, s, testing.vote) if testing.iterate else b[kept]
        found.append((voted, np.full(len(kept), k), s[kept]))
    boxes, labels, scores = map(np.concatenate, zip(*found))
    best = np.argsort(-scores, kind="stable")[:testing.limit]
    return boxes[best], labels[best], scores[best]


def look(net, image, pyramid, factors, regions, testing):
    """Class probabilities, or raw scores, (M, K + 1) and boxes (M, K, 4) of regions (M, 4), float64, in pixels of the image, cut at its border.

    Each region is pooled at the scale where its area is nearest near^2 (ties: the first). Regions without area give probability 0, score -inf;
    of one that lies outside the image every bin is empty, and the head sees zeros.
    image: (H, W, 3), of which only the size counts; pyramid: a list of S maps (1, h, w, C), of net.features, on the net's device; factors: (S,)
    NumPy array, float, pixels of the net's input for each pixel of the image; regions: float64, in pixels of the image, finite.
    The results lie on the host. M = 0 gives empty ones. Raises as boxes.area for regions of another shape or dtype, and as roi_pool.forward for
    infinite ones; NaN counts as without area (detect() refuses both). That there is a map for each factor is not checked.
    """
    K, spec, softmax = net.spec.background, net.spec, testing.scores == "softmax"
    p, boxes = np.full((len(regions), K + 1), 0.0 if softmax else -np.inf), np.zeros((len(regions), K, 4))
    mean, std = spec.normalisation()
    area = box_ops.area(regions)
    level = abs(area[:, None] * factors ** 2 - testing.near ** 2).argmin(1)
    for n, (maps, factor) in enumerate(zip(pyramid, factors)):
        mine = np.flatnonzero((level == n) & (area > 0))
        for first in range(0, len(mine), testing.chunk):
            some = mine[first:first + testing.chunk]
            rois = np.column_stack([np.zeros(len(some)), regions[some] * factor]).astype(net.dtype)
            scores, deltas, _ = net.regions(maps, put(rois))
            scores = to_numpy(scores).astype(np.float64)
            p[some] = softmax_loss.softmax(scores) if softmax else scores
            deltas = to_numpy(deltas).reshape(-1, K + 1, 4)[:, :K].astype(np.float64) * std + mean
            for k in range(K):
                boxes[some, k] = box_ops.clip(box_ops.decode(regions[some], deltas[:, k]), *image.shape[:2])
    return p, boxes


# Files

def save(net, path, settings):
    """Write a net with its Spec and dtype, and the settings to use it with (a JSON dict), to a weights file (.npz)."""
    weights.save(path, "fast_rcnn", net, settings)


def load(path):
    """Read a weights file: the net, in the dtype that it was saved in, and the settings. Raises as weights.load."""
    return weights.load(path, "fast_rcnn", _build)


def _build(arrays, spec, dtype):
    spec = Spec(**spec)
    table = TABLES[spec.table]
    channels = [row[4] for row in table.trunk if len(row) == 5][-1]
    wanted, found = (table.pool ** 2 * channels, table.hidden[0]), arrays["head.fc6.w"].shape
    if found != wanted:                                                 # said before a net of half a gigabyte is made
        raise ValueError(f"a net of table {spec.table}, whose head.fc6.w must have shape {wanted}, got {found}")
    return FastRCNN(spec, np.random.default_rng(0), dtype)
