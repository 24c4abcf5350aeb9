"""OverFeat (Sermanet et al., 1312.6229) as a detector: one net slid over an image at several scales, boxes that vote.

A trunk runs once on the image. Its last pooling is applied at every offset, so that the head sees a window every `jump` pixels
(sec. 3.3). For each window the classifier names the class or background (sec. 5), the regressor the box of the object
(sec. 4); boxes of all scales merge and add up their confidence (sec. 4.3).

The small net of this file is ours: batch norm and He initialisation (the paper had neither), trunk and both heads trained
together (the paper trained the regressor alone on a frozen trunk, and names this as future work).
"""
import dataclasses
import warnings

import numpy as np

from tinydet import checks, weights
from tinydet.backend import array_module, put, to_numpy
from tinydet.data import flip, mean_std, view
from tinydet.layers import BatchNorm, Composite, Conv2D, Dropout, MaxPool, Sequential
from tinydet.ops import assign as assign_op, box_loss, boxes as box_ops, max_pool, merge, nms, offset_pool, softmax_loss


@dataclasses.dataclass
class Spec:
    """What a trained OverFeat is, apart from its arrays. Saved as JSON beside them."""

    classes: tuple                      # names; label K = len(classes) is the background
    scales: tuple                       # image enlargements at which windows are slid
    k: int = 4                          # side of the heads' first kernel, in pooled cells
    widths: tuple = (16, 32, 64, 64)    # channels of the trunk's convolutions
    hidden: int = 128                   # channels between the two layers of each head
    dropout: float = 0.0
    mean: float = 118.380948            # scalar normalisation of all channels, (x - mean)/std; the release's numbers
    std: float = 61.896913
    pool: int = 2                       # side of the last pooling: pool * pool offsets
    jump: int = 4                       # pixels between neighbouring cells of the trunk's map

    def __post_init__(self):
        """Raise ValueError or TypeError for what describes no net."""
        op = "overfeat.Spec"
        checks.small(op, 1, k=self.k, hidden=self.hidden, pool=self.pool, jump=self.jump, **{f"width {i}": w for i, w in enumerate(self.widths)})
        if not self.classes or not all(isinstance(c, str) for c in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{op}: classes must be different names, at least one, got {self.classes!r}")
        if len(self.widths) != 4 or not self.scales or not all(isinstance(s, (int, float)) and 0 < s < np.inf for s in self.scales):
            raise ValueError(f"{op}: there must be four widths, and scales above 0, got {self.widths!r}, {self.scales!r}")
        if not (0 <= self.dropout < 1 and abs(self.mean) < np.inf and 0 < self.std < np.inf):
            raise ValueError(f"{op}: dropout must lie in [0, 1), mean be finite and std above 0, got {self.dropout}, {self.mean}, {self.std}")

    @property
    def fill(self):
        """Grey value that stands for "nothing": what lies outside an image."""
        return int(self.mean + 0.5)

    @property
    def window(self):
        """Side in pixels of the window that one output of the head stands for."""
        return self.jump * self.pool * self.k


class OverFeat(Composite):
    """The small net of a Spec. Parts: trunk, classifier (K + 1 outputs), regressor (the 4 edges, shared by all classes: SCR)."""

    def __init__(self, spec, rng, dtype=np.float32):
        a, b, c, D = spec.widths

        def conv(Cin, Cout, size, stride=1, pad=0, **more):
            return Conv2D(Cin, Cout, size, stride, pad, rng=rng, dtype=dtype, **more), BatchNorm(Cout, dtype=dtype, relu=True)

        self.spec, self.dtype = spec, np.dtype(dtype)
        super().__init__(
            trunk=Sequential(*conv(3, a, 4, stride=2, pad=1, input_grad=False), *conv(a, b, 3, pad=1), MaxPool(2),
                             *conv(b, c, 3, pad=1), *conv(c, D, 3, pad=1)),
            classifier=Sequential(*conv(D, spec.hidden, spec.k), Dropout(spec.dropout),
                                  Conv2D(spec.hidden, len(spec.classes) + 1, 1, rng=rng, std=0.01, dtype=dtype)),
            regressor=Sequential(*conv(D, spec.hidden, spec.k), Conv2D(spec.hidden, 4, 1, rng=rng, std=0.01, dtype=dtype)))
        self.params["regressor.2.b"][...] = (0, 0, 1, 1)            # untrained, each window answers with itself

    def normalise(self, images):
        """uint8 images (N, H, W, 3) as the float array the net takes."""
        return (np.asarray(images, self.dtype) - self.dtype.type(self.spec.mean)) / self.dtype.type(self.spec.std)

    def forward(self, x, train=False, rng=None, offset=(0, 0)):
        """Both heads at one offset of the last pooling: coarse stride, as in training (sec. 5).

        x: (N, H, W, 3). Returns scores (N, h, w, K + 1), edges (N, h, w, 4) and cache. Window (i, j) stands at
        spec.jump * (spec.pool * i + oy) pixels from the top, likewise from the left: windows().
        """
        oy, ox = offset
        maps, trunk_cache = self.parts["trunk"].forward(x, train, rng)
        pooled, pool_cache = max_pool.forward(maps[:, oy:, ox:], self.spec.pool)
        scores, scores_cache = self.parts["classifier"].forward(pooled, train, rng)
        edges, edges_cache = self.parts["regressor"].forward(pooled, train, rng)
        return scores, edges, (maps.shape, offset, trunk_cache, pool_cache, scores_cache, edges_cache)

    def backward(self, dscores, dedges, cache):
        """Add the gradients of all parameters to `grads`; the image gets none."""
        shape, (oy, ox), trunk_cache, pool_cache, scores_cache, edges_cache = cache
        dpooled = (self.parts["classifier"].backward(dscores, scores_cache)
                   + self.parts["regressor"].backward(dedges, edges_cache))
        dmaps = array_module(dpooled).zeros(shape, dpooled.dtype)
        dmaps[:, oy:, ox:] = max_pool.backward(dpooled, pool_cache)
        self.parts["trunk"].backward(dmaps, trunk_cache)

    def dense(self, x):
        """Both heads at every offset (fine stride, sec. 3.3): scores (N, h, w, K + 1), edges (N, h, w, 4) at spec.jump pixels.

        The heads run on the pooled map of each offset, and the outputs interleave. Raises ValueError if x holds no window.
        """
        p, k = self.spec.pool, self.spec.k
        maps = self.parts["trunk"](x)
        if min(maps.shape[1:3]) < p * k:
            raise ValueError(f"OverFeat.dense: x must hold a window of {self.spec.window} pixels, got {x.shape}")
        pooled = offset_pool.split(offset_pool.forward(maps, p)[0], p)
        heads = (("classifier", len(self.spec.classes) + 1), ("regressor", 4))
        return tuple(offset_pool.interleave([self._head(*head, m) for m in pooled], p) for head in heads)

    def _head(self, name, channels, pooled):
        """A head on one pooled map; an empty map where the offset leaves less than one window."""
        h, w = (max(0, side - self.spec.k + 1) for side in pooled.shape[1:3])
        if min(h, w) == 0:
            return array_module(pooled).zeros((len(pooled), h, w, channels), pooled.dtype)
        return self.parts[name](pooled)


# Windows, boxes relative to them, and what each must answer

def windows(h, w, step, side, offset=(0, 0)):
    """(h*w, 4) windows in row order, float64 pixels: that of output (i, j) spans [oy + step*i, oy + step*i + side) down, likewise across."""
    y, x = np.indices((h, w)).reshape(2, -1) * float(step) + np.array(offset, float)[:, None]
    return np.stack([x, y, x + side, y + side], 1)


def encode(windows, boxes):
    """The edges of boxes (R, 4) relative to windows (R, 4) of side w (sec. 4.2): (x1 - wx, y1 - wy, x2 - wx, y2 - wy)/w.

    Dividing by w is a CHOICE (conditioning only); edges rather than centre and size are the paper's.
    """
    return (boxes - windows[:, [0, 1, 0, 1]]) / (windows[:, 2:3] - windows[:, :1])


def decode(windows, edges):
    """Boxes (R, 4) from edges: the inverse of encode."""
    return edges * (windows[:, 2:3] - windows[:, :1]) + windows[:, [0, 1, 0, 1]]


def assign(windows, boxes, labels, background, positive=0.5, negative=0.3, visible=0.5):
    """What the window at each location must answer (sec. 4.2 and 5; the overlaps are a CHOICE, the paper names none).

    label: class of the box of largest IoU if that is >= positive; `background` if it is < negative; else -1, not trained.
    A box is regressed where IoU >= negative and at least `visible` of its area lies in the window (the paper's 50 % rule).
    windows: (M, 4), boxes: (R, 4) float64, labels: (R,), -1 for a difficult object: windows at it are not trained.
    Returns labels (M,) int64, edges (M, 4), regress (M,) bool.
    Ties go to the first box; without boxes all is background.
    """
    answer = np.full(len(windows), background, np.int64)
    if len(boxes) == 0:
        return answer, np.zeros((len(windows), 4)), np.zeros(len(windows), bool)
    best, overlap, _, _ = assign_op.best(windows, boxes)
    answer[overlap >= negative] = -1
    answer[overlap >= positive] = labels[best][overlap >= positive]
    chosen = boxes[best]
    inside = np.minimum(windows[:, 2:], chosen[:, 2:]) - np.maximum(windows[:, :2], chosen[:, :2])
    seen = inside.clip(0).prod(1) / box_ops.area(chosen)
    return answer, encode(windows, chosen), (overlap >= negative) & (seen >= visible) & (labels[best] >= 0)


def draw(labels, background, rng, most=64, ratio=3, least=8):
    """Draw which windows of one image to train on (sec. 5: random or most offending negatives), before their scores are known.

    All windows of a class are kept (at most `most`, drawn at random), and max(least, ratio * kept) of the background:
    half of those the ones of largest 1 - p(background), half drawn uniformly from the rest (CHOICE; the paper gives no numbers).
    labels: (M,) with -1 for ignored. Returns labels with -1 for the windows of a class that are not kept, and ranks (M,) bool: True
    at r if the background window whose p(background) is the r-th lowest (from 0) is chosen. select() applies them.
    """
    kept = np.flatnonzero((labels >= 0) & (labels != background))
    if len(kept) > most:
        kept = rng.choice(kept, most, replace=False)
    negatives = int((labels == background).sum())
    count = min(max(least, ratio * len(kept)), negatives)
    out, ranks = np.where(labels == background, labels, -1), np.arange(len(labels)) < count // 2
    out[kept] = labels[kept]
    ranks[count // 2 + rng.choice(negatives - count // 2, count - count // 2, replace=False)] = True
    return out, ranks


def select(labels, ranks, p_background, background):
    """Labels (N, M) with -1 for the background windows whose rank by p(background) in their image is not True in ranks.

    labels, ranks (draw() of each image), p_background: (N, M), on one device: on the GPU the scores stay there. Ties: first window.
    """
    xp = array_module(p_background)
    key = xp.where(labels == background, p_background, xp.inf)
    rank = xp.argsort(xp.argsort(key, 1, kind="stable"), 1, kind="stable")
    return xp.where((labels != background) | xp.take_along_axis(ranks, rank, 1), labels, -1)


def loss(spec, scores, edges, targets, rng, box_weight=1.0, offset=(0, 0)):
    """Classification and box loss of a training batch, with its gradients (sec. 4.2 and 5).

    scores (N, h, w, K + 1), edges (N, h, w, 4) from OverFeat.forward at `offset`; targets: for each image boxes (R, 4) in its
    pixels, labels (R,), and the rectangle (x1, y1, x2, y2) that holds the photograph: windows centred outside are not trained.
    value = mean cross-entropy of the selected windows + box_weight * L2 box loss, the latter divided by the boxes kept or the
    images N, whichever is more (CHOICE: batches with hardly a box would otherwise make training diverge).
    Returns a dict of numbers (loss, class_loss, box_loss, positives) and dscores, dedges. On a GPU the losses stay there, too.
    """
    N, h, w, channels = scores.shape
    background = channels - 1
    grid = windows(h, w, spec.jump * spec.pool, spec.window, np.array(offset) * spec.jump)
    centre = (grid[:, :2] + grid[:, 2:]) / 2
    labels, ranks, wanted, regress = [], [], [], []
    for boxes, names, inside in targets:                            # on the host: from annotations alone
        answer, edge, use = assign(grid, boxes, names, background)
        out = ((centre < inside[:2]) | (centre > inside[2:])).any(1)
        answer[out], use[out] = -1, False
        for column, values in zip((labels, ranks, wanted, regress), (*draw(answer, background, rng), edge, use)):
            column.append(values)
    labels, ranks, wanted, regress = np.stack(labels), np.stack(ranks), np.concatenate(wanted), np.concatenate(regress)
    device = array_module(scores).asarray
    p_background = softmax_loss.softmax(scores)[..., background].reshape(N, -1)
    chosen = select(device(labels), device(ranks), p_background, background)
    class_loss, dscores = softmax_loss.loss(scores.reshape(-1, channels), chosen.reshape(-1))
    edge_loss, dedges = box_loss.l2(edges.reshape(-1, 4), device(wanted.astype(edges.dtype)), device(regress))
    few = min(1.0, int(regress.sum()) / N)                          # a handful of boxes must not pull like a full batch
    edge_loss, dedges = few * edge_loss, few * dedges
    values = {"loss": class_loss + box_weight * edge_loss, "class_loss": class_loss, "box_loss": edge_loss,
              "positives": int(((labels >= 0) & (labels != background)).sum())}
    return values, dscores.reshape(scores.shape), box_weight * dedges.reshape(edges.shape)


# Training views and detection

def spec_for(examples, classes, window=None, most=64, least=24, ratio=1.4, most_scales=10, **more):
    """Window, scales and normalisation from the training boxes: how a new data set becomes a Spec.

    With d = sqrt(width * height) of a box: the window is the largest multiple of jump * pool pixels that is not above 0.8 times
    the 5 % quantile of d, within [least, most], unless `window` names another; scales are such that windows of sides about
    `ratio` apart (the paper's ratio) cover all d between the 1 % and the 99 % quantile, in original pixels; at most
    `most_scales`, further apart if need be. Warns if more than 5 % of the boxes are too long for a square window.
    Raises ValueError if there is no box, or for a window that is no positive multiple of jump * pool.
    """
    boxes = np.concatenate([e.usable()[0] for e in examples])
    if len(boxes) == 0:
        raise ValueError("overfeat.spec_for: the training images must hold at least one box, got none")
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    sides, long = np.sqrt(width * height), (width > 2.25 * height) | (height > 2.25 * width)
    if long.mean() > 0.05:
        warnings.warn(f"overfeat.spec_for: {long.sum()} of {len(boxes)} boxes are more than 2.25 times as long as wide: no square window "
                      "overlaps such a box by IoU 0.5, so they are not learnt", stacklevel=2)
    low, small, high = np.quantile(sides, (0.01, 0.05, 0.99))
    cell = Spec.jump * Spec.pool
    if window is not None and (window < cell or window % cell):
        raise ValueError(f"overfeat.spec_for: window must be a positive multiple of {cell} pixels, got {window}")
    k = int(window or np.clip(0.8 * small, least, most)) // cell
    steps = min(most_scales, max(1, round(np.log(high / low) / np.log(ratio))))
    factor = (high / low) ** (1 / steps)
    covered = low * factor ** (np.arange(steps) + 0.5)
    mean, std = mean_std(examples)
    return Spec(tuple(classes), tuple(float(cell * k / side) for side in covered), k, mean=mean, std=std, **more)


def training_view(spec, example, rng, size, near_object=0.8):
    """One square crop of a training image at one of the scales: image uint8 (size, size, 3) and its target for loss().

    The scale is drawn uniformly, times a factor within half a step to the next scale; the crop's place uniformly, or, with
    probability near_object, such that an object of about the window's size lies in it whole. Half of the crops are mirrored.
    size: pixels, at least window + jump * pool. Target: all boxes in pixels of the crop, also those that reach
    out of it, label -1 for difficult ones, and the place of the whole image in the crop.
    """
    if size < spec.window + spec.jump * spec.pool:
        raise ValueError(f"overfeat.training_view: a crop must be at least {spec.window + spec.jump * spec.pool} pixels wide, for a window "
                         f"of {spec.window} at every offset, got {size}")
    boxes, labels = example.boxes, np.where(example.difficult, -1, example.labels)
    index = rng.integers(len(spec.scales))
    step = 1.4 if len(spec.scales) < 2 else spec.scales[0] / spec.scales[1]
    scale = spec.scales[index] * step ** rng.uniform(-0.5, 0.5)
    reach, side = size / scale, spec.window / scale                      # of crop and window, in pixels of the image
    sides = np.sqrt(box_ops.area(boxes))
    fitting = np.flatnonzero((sides > side / step) & (sides < side * step) & (labels >= 0))
    corner = []
    near = len(fitting) and rng.random() < near_object
    box = boxes[rng.choice(fitting)] if near else None
    for axis in (0, 1):
        low, high = sorted((-side / 2, example.size[axis] + side / 2 - reach))
        if near:
            low, high = sorted((box[axis + 2] - reach, box[axis]))
        corner.append(rng.uniform(low, high))
    image = view(example.image(), *corner, scale, size, size, spec.fill)
    boxes = (boxes - np.tile(corner, 2)) * scale
    inside = ((0, 0, *example.size) - np.tile(corner, 2)) * scale
    if rng.random() < 0.5:
        image, boxes = flip(image, boxes)
        inside = np.array([size - inside[2], inside[1], size - inside[0], inside[3]])
    return image, (boxes, labels, inside)


def detect(net, image, **combining):
    """All detections in one image: look() at every scale, then combine() per class (sec. 3.3, 4.3, 5).

    image: uint8 (H, W, 3). Returns boxes (R, 4) float64 in pixels of the image, cut at its border, labels (R,), scores (R,), by
    falling score.
    """
    seen = [look(net, image, scale) for scale in net.spec.scales]
    boxes, labels, scores = combine(*map(np.concatenate, zip(*seen)), **combining)
    boxes = box_ops.clip(boxes, *image.shape[:2])
    kept = box_ops.area(boxes) > 0
    return boxes[kept], labels[kept], scores[kept]


def combine(boxes, probability, merging="merge", threshold=0.5, mode="count", min_score=0.1, limit=300):
    """One list of detections from the windows of all scales.

    boxes: (M, 4), the box that each window gives; probability: (M, K + 1), background last. Each window gives its box to every
    class of probability >= min_score (the paper is silent on pruning: CHOICE). Then per class, merging "merge": greedy
    merging with accumulated confidence (ops.merge: threshold, mode), scores are sums and may pass 1; "nms": ops.nms at IoU
    threshold, scores are probabilities. Returns boxes, labels, scores by falling score (ties: lower label), at most `limit`.
    """
    found = []
    for label in range(probability.shape[1] - 1):
        seen = probability[:, label] >= min_score
        b, s = boxes[seen], probability[seen, label]
        if merging == "merge":
            b, s, _ = merge.merge(b, s, threshold, mode)
        elif merging == "nms":
            kept = nms.nms(b, s, threshold)
            b, s = b[kept], s[kept]
        else:
            raise ValueError(f"overfeat.combine: merging must be merge or nms, got {merging!r}")
        found.append((b, np.full(len(b), label), s))
    boxes, labels, scores = map(np.concatenate, zip(*found))
    best = np.argsort(-scores, kind="stable")[:limit]
    return boxes[best], labels[best], scores[best]


def look(net, image, scale):
    """What the windows of one scale see: the boxes they give (M, 4) in pixels of the image, class probabilities (M, K + 1), float64.

    The image is enlarged `scale` times and framed by half a window of its mean grey, so that windows can centre on objects
    at the border (CHOICE; the paper has no frame).
    """
    spec, frame = net.spec, net.spec.window // 2
    H, W = (max(spec.window, round(side * scale)) + 2 * frame for side in image.shape[:2])
    scores, edges = net.dense(put(net.normalise(view(image, -frame / scale, -frame / scale, scale, W, H, spec.fill)[None])))
    p = softmax_loss.softmax(to_numpy(scores).astype(np.float64))
    grid = (windows(*p.shape[1:3], spec.jump, spec.window) - frame) / scale
    return decode(grid, to_numpy(edges).reshape(-1, 4).astype(np.float64)), p.reshape(len(grid), -1)


# Files

def save(net, path, settings):
    """Write a net with its Spec and dtype, and the settings to use it with (a JSON dict), to a weights file (.npz)."""
    weights.save(path, "overfeat", net, settings)


def load(path):
    """Read a weights file: the net, in the dtype that it was saved in, and the settings. Raises as weights.load."""
    return weights.load(path, "overfeat", _build)


def _build(arrays, spec, dtype):
    spec = Spec(**spec)
    if spec.k ** 2 * spec.widths[-1] * spec.hidden > max(10**7, sum(a.size for a in arrays.values())):
        raise ValueError(f"a net far larger than the file's arrays, k {spec.k}, widths {spec.widths}, hidden {spec.hidden}")
    return OverFeat(spec, np.random.default_rng(0), dtype)
