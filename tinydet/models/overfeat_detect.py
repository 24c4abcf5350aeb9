"""OverFeat (Sermanet et al., 1312.6229, sec. 5) as a detector: one net slid over an image at several scales, boxes that vote.

For each window the classifier names the class or background, trained on negatives found on the fly; the regressor gives the box of the
object (sec. 4); boxes of all scales merge and add up their confidence (sec. 4.3). Both heads and the trunk train together (the paper
trained the regressor alone on a frozen trunk, and names this as future work), from scratch or from a classifier (overfeat.take_over).
"""
import warnings

import numpy as np

from tinydet import checks
from tinydet.backend import array_module, put, to_numpy
from tinydet.data import flip, mean_std, view
from tinydet.models import overfeat
from tinydet.ops import assign as assign_op, box_loss, boxes as box_ops, merge, nms, softmax_loss


# What each window must answer

def assign(windows, boxes, labels, background, positive=0.5, negative=0.3, visible=0.5):
    """What the window at each location must answer (sec. 4.2 and 5).

    label: class of the box of largest IoU if that is >= positive; `background` if it is < negative; else -1, not trained.
    CHOICE, both IoUs: the paper names none. That box is regressed where at least `visible` of its area lies in the window: the paper's
    50 % rule, with overlap = intersection / area of the box (CHOICE), and IoU >= negative, which is ours. Unlike
    overfeat_localize.targets, where a window answers the box that it holds most of, whatever the IoU.
    windows: (M, 4), boxes: (R, 4) float64, in the same pixels; labels: (R,), -1 for a difficult object: windows of
    IoU >= negative with it train neither class nor box. No window answers a box without area.
    Returns labels (M,) int64, edges (M, 4) of overfeat.encode, regress (M,) bool.
    Ties go to the first box; without boxes all is background. Raises as ops.assign.best.
    """
    answer = np.full(len(windows), background, np.int64)
    if len(boxes) == 0:
        return answer, np.zeros((len(windows), 4)), np.zeros(len(windows), bool)
    best, overlap, _, _ = assign_op.best(windows, boxes)
    answer[overlap >= negative] = -1
    answer[overlap >= positive] = labels[best][overlap >= positive]
    chosen = boxes[best]
    inside = np.minimum(windows[:, 2:], chosen[:, 2:]) - np.maximum(windows[:, :2], chosen[:, :2])
    area = box_ops.area(chosen)
    seen = inside.clip(0).prod(1) / np.where(area > 0, area, 1)
    return answer, overfeat.encode(windows, chosen), (overlap >= negative) & (seen >= visible) & (labels[best] >= 0)


def draw(labels, background, rng, most=64, ratio=3, least=8, offending=0.5):
    """Draw which windows of one image to train on (sec. 5: random or most offending negatives), before their scores are known.

    All windows of a class are kept (at most `most`, drawn at random), and max(least, ratio * kept) of the background: `offending` of
    those the ones of largest 1 - p(background), the others drawn uniformly from the rest (CHOICE, half and half: the paper gives no
    numbers). labels: (M,) with -1 for ignored. Returns labels with -1 for the windows of a class that are not kept, and ranks (M,) bool:
    True at r if the background window whose p(background) is the r-th lowest (from 0) is chosen. select() applies them.
    """
    kept = np.flatnonzero((labels >= 0) & (labels != background))
    if len(kept) > most:
        kept = rng.choice(kept, most, replace=False)
    negatives = int((labels == background).sum())
    count = min(max(least, int(ratio * len(kept))), negatives)
    worst = int(count * offending)
    out, ranks = np.where(labels == background, labels, -1), np.arange(len(labels)) < worst
    out[kept] = labels[kept]
    ranks[worst + rng.choice(negatives - worst, count - worst, replace=False)] = True
    return out, ranks


def select(labels, ranks, p_background, background):
    """Labels (N, M) with -1 for the background windows whose rank by p(background) in their image is not True in ranks.

    labels (N, M) integers and ranks (N, M) bool: draw() of each image; p_background: (N, M) float32 or float64, probabilities; background: its
    label. All on one device: on the GPU the scores stay there. Returns labels (N, M), same dtype; N or M may be 0. Ties: first window.
    Raises ValueError for shapes that differ, TypeError for what is no array.
    """
    xp = array_module(p_background)
    checks.array("overfeat_detect.select", "labels", labels)
    checks.same_shape("overfeat_detect.select", labels.shape, ranks=ranks, p_background=p_background)
    key = xp.where(labels == background, p_background, xp.inf)
    rank = xp.argsort(xp.argsort(key, 1, kind="stable"), 1, kind="stable")
    return xp.where((labels != background) | xp.take_along_axis(ranks, rank, 1), labels, -1)


def loss(spec, scores, edges, targets, rng, box_weight=1.0, offset=(0, 0), **drawing):
    """Classification and box loss of a training batch, with its gradients (sec. 4.2 and 5).

    scores (N, h, w, K + 1), edges (N, h, w, 4) from OverFeat.forward at `offset`; targets: for each image boxes (R, 4) in its
    pixels, labels (R,), and the rectangle (x1, y1, x2, y2) that holds the photograph: windows centred outside are not trained.
    value = mean cross-entropy of the selected windows + box_weight * L2 box loss, the latter divided by the boxes kept or the
    images N, whichever is more (CHOICE: batches with hardly a box would otherwise make training diverge). drawing: options of draw().
    Of a net without background class (Spec.background) no window of the background trains; scores then have K channels.
    Returns a dict of numbers (loss, class_loss, box_loss, positives) and dscores, dedges, of the shapes and dtype of scores and edges.
    On a GPU the losses stay there, too.
    Raises ValueError without images, for targets of another number of them, edges that do not fit the scores, a label beyond the channels, and as
    assign; TypeError for dtypes and for options that draw() has not.
    """
    N, h, w, channels = scores.shape
    if not N == len(targets) > 0:
        raise ValueError(f"overfeat_detect.loss: there must be targets for each image, at least one, got {len(targets)} for {N}")
    background = len(spec.classes)
    grid = overfeat.windows(spec.layers, h, w, offset)
    centre = (grid[:, :2] + grid[:, 2:]) / 2
    labels, ranks, wanted, regress = [], [], [], []
    for boxes, names, inside in targets:                            # on the host: from annotations alone
        answer, edge, use = assign(grid, boxes, names, background)
        out = ((centre < inside[:2]) | (centre > inside[2:])).any(1)
        answer[out], use[out] = -1, False
        if not spec.background:
            answer[answer == background] = -1
        for column, values in zip((labels, ranks, wanted, regress), (*draw(answer, background, rng, **drawing), edge, use)):
            column.append(values)
    labels, ranks, wanted, regress = np.stack(labels), np.stack(ranks), np.concatenate(wanted), np.concatenate(regress)
    device = array_module(scores).asarray
    chosen = device(labels)
    if spec.background:
        chosen = select(chosen, device(ranks), softmax_loss.softmax(scores)[..., background].reshape(N, -1), background)
    class_loss, dscores = softmax_loss.loss(scores.reshape(-1, channels), chosen.reshape(-1))
    edge_loss, dedges = box_loss.l2(edges.reshape(-1, 4), device(wanted.astype(edges.dtype)), device(regress))
    few = min(1.0, int(regress.sum()) / N)                          # a handful of boxes must not pull like a full batch
    edge_loss, dedges = few * edge_loss, few * dedges
    values = {"loss": class_loss + box_weight * edge_loss, "class_loss": class_loss, "box_loss": edge_loss,
              "positives": int(((labels >= 0) & (labels != background)).sum())}
    return values, dscores.reshape(scores.shape), box_weight * dedges.reshape(edges.shape)


# Training views and detection

def spec_for(examples, classes, window=None, most=64, least=24, ratio=1.4, most_scales=10, table="small", pool=None, **more):
    """Window, scales and normalisation from the training boxes: how a new data set becomes a Spec.

    With d = sqrt(width * height) of a box: the window is the largest that the table can have (k = 1, 2, ..; of the small net the
    multiples of 8 pixels), but not above 0.8 times the 5 % quantile of d, within [least, most], unless `window` names another; scales
    are such that windows of sides about `ratio` apart (the paper's ratio, unverified) cover all d between the 1 % and the 99 %
    quantile, in original pixels; at most `most_scales`, further apart if need be. Warns if more than 5 % of the boxes are too long for
    a square window. pool: default 2 for the small net (CHOICE: its table, a classifier's, has 3), else the table's.
    more: fields of the Spec in place of these: an SCR that starts from the window, no dropout (CHOICE: the paper is silent for this
    stage), He's rule, a background class.
    Raises ValueError if there is no box, for a window that the table cannot have, and as Spec: for a PCR.
    """
    boxes = np.concatenate([e.usable()[0] for e in examples])
    if len(boxes) == 0:
        raise ValueError("overfeat_detect.spec_for: the training images must hold at least one box, got none")
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    sides, long = np.sqrt(width * height), (width > 2.25 * height) | (height > 2.25 * width)
    if long.mean() > 0.05:
        warnings.warn(f"overfeat_detect.spec_for: {long.sum()} of {len(boxes)} boxes are more than 2.25 times as long as wide: no square window "
                      "overlaps such a box by IoU 0.5, so they are not learnt", stacklevel=2)
    low, small, high = np.quantile(sides, (0.01, 0.05, 0.99))
    pool = 2 if pool is None and table == "small" else pool
    narrow = overfeat.Spec(tuple(classes), table, k=1, pool=pool).layers
    first, cell = narrow.window, narrow.step
    if window is not None and (window < first or (window - first) % cell):
        raise ValueError(f"overfeat_detect.spec_for: window must be {first}, {first + cell}, {first + 2 * cell}, .. pixels, got {window}")
    k = 1 + max(0, int(window or np.clip(0.8 * small, least, most)) - first) // cell
    side = first + cell * (k - 1)
    steps = min(most_scales, max(1, round(np.log(high / low) / np.log(ratio))))
    factor = (high / low) ** (1 / steps)
    covered = low * factor ** (np.arange(steps) + 0.5)
    if "mean" not in more:
        more["mean"], more["std"] = mean_std(examples)
    fields = {"regressor": "SCR", "dropout": 0.0, "init": None, "from_window": True, "background": True, **more}
    return overfeat.Spec(tuple(classes), table, k=k, pool=pool, scales=tuple(float(side / d) for d in covered), **fields)


def training_view(spec, example, rng, size, near_object=0.8, mirrored=0.5):
    """One square crop of a training image at one of the scales: image uint8 (size, size, 3) and its target for loss().

    The scale is drawn uniformly, times a factor within half a step to the next scale; the crop's place uniformly, or, with
    probability near_object, such that an object of about the window's size lies in it whole. mirrored: share of the crops that are
    mirrored; 0 where a mirrored object is another one, such as a letter.
    size: pixels, at least window + step. Target: all boxes in pixels of the crop, also those that reach
    out of it, label -1 for difficult ones, and the place of the whole image in the crop.
    With spec.context a third, for coarser(): the crop around the same centre at the next coarser scale, uint8 (size, size, 3), and how
    many times coarser it is; 0 at the coarsest scale, where the crop is made as for the others, for batch norm's sake, and not used.
    """
    window = spec.layers.window
    if size < window + spec.layers.step:
        raise ValueError(f"overfeat_detect.training_view: a crop must be at least {window + spec.layers.step} pixels wide, for a window "
                         f"of {window} at every offset, got {size}")
    boxes, labels = example.boxes, np.where(example.difficult, -1, example.labels)
    index = rng.integers(len(spec.scales))
    step = 1.4 if len(spec.scales) < 2 else spec.scales[0] / spec.scales[1]
    scale = spec.scales[index] * step ** rng.uniform(-0.5, 0.5)
    reach, side = size / scale, window / scale                      # of crop and window, in pixels of the image
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
    photograph = example.image()
    image = view(photograph, *corner, scale, size, size, spec.fill)
    last = index + 1 == len(spec.scales)
    times = step if last else spec.scales[index] / spec.scales[index + 1]
    wider = [view(photograph, *(np.array(corner) + reach / 2 * (1 - times)), scale / times, size, size, spec.fill)] if spec.context else []
    boxes = (boxes - np.tile(corner, 2)) * scale
    inside = ((0, 0, *example.size) - np.tile(corner, 2)) * scale
    if rng.random() < mirrored:
        image, boxes = flip(image, boxes)
        inside = np.array([size - inside[2], inside[1], size - inside[0], inside[3]])
        wider = [other[:, ::-1] for other in wider]
    return image, (boxes, labels, inside), *((other, 0 if last else times) for other in wider)


def coarser(spec, pairs, offset=None):
    """What OverFeat.forward takes as `coarser`, apart from the images' normalisation, for square crops.

    pairs: for each image what training_view gives third; offset: of the outputs, as in forward. Returns images uint8 (N, size, size, 3),
    down (N, h, h2) and across (N, w, w2) float32. A window looks at that of nearest centre (CHOICE; ties: the lower), in a coarser crop
    around the same centre.
    """
    images, times = zip(*pairs)
    table, size = spec.layers, len(images[0])
    fine = overfeat.outputs(table, size, size).fine[0]
    centres = np.arange(fine) * table.jump + table.window / 2
    axes = [centres, centres] if offset is None else [centres[o::table.pool] for o in offset]
    found = [np.stack([_looks_at(table, size / 2 + (c - size / 2) / t, fine) if t else np.zeros((len(c), fine), np.float32) for t in times])
             for c in axes]
    return np.stack(images), *found


def _looks_at(table, centres, count):
    """(len(centres), count) one-hot float32: which of `count` fine windows along an axis has its centre nearest, in pixels."""
    nearest = np.ceil((centres - table.window / 2) / table.jump - 0.5).clip(0, count - 1)
    return (nearest[:, None] == np.arange(count)).astype(np.float32)


def detect(net, image, normalize="none", **combining):
    """All detections in one image: look() at every scale, then combine() per class (sec. 3.3, 4.3, 5).

    image: uint8 (H, W, 3). normalize: "none", or "scales": merged scores, which are sums over the windows of all scales, are divided by
    the number of scales (CHOICE: the paper is silent). Returns boxes (R, 4) float64 in pixels of the image, cut at its border,
    labels (R,), scores (R,), by falling score. Raises ValueError for another normalize and a net without scales, and as look and combine.
    """
    if normalize not in ("none", "scales"):
        raise ValueError(f"overfeat_detect.detect: normalize must be none or scales, got {normalize!r}")
    if not net.spec.scales:
        raise ValueError("overfeat_detect.detect: the net must have scales, got none")
    seen = [look(net, image, i) for i in range(len(net.spec.scales))]
    boxes, p = map(np.concatenate, zip(*seen))
    boxes, labels, scores = combine(boxes, p, len(net.spec.classes), **combining)
    boxes = box_ops.clip(boxes, *image.shape[:2])
    kept = box_ops.area(boxes) > 0
    if normalize == "scales" and combining.get("merging", "merge") == "merge":
        scores = scores / len(net.spec.scales)
    return boxes[kept], labels[kept], scores[kept]


def combine(boxes, probability, classes, merging="merge", threshold=0.5, mode="count", min_score=0.1, limit=300, argmax=False,
            most=2000):
    """One list of detections from the windows of all scales.

    boxes: (M, 4), the box that each window gives; probability: (M, classes), or (M, classes + 1) with the background last.
    classes: their number, at least 1. Each window gives its box to every class of probability >= min_score, and a class takes those of its
    `most` surest windows (the paper is silent on pruning: CHOICE; merging takes time as their square). argmax: windows that are surest of
    the background give none (CHOICE: off).
    Then per class, merging "merge": greedy merging with accumulated confidence (ops.merge: threshold, mode), scores are sums and may
    pass 1; "nms": ops.nms at IoU threshold, scores are probabilities. mode: CHOICE "count", exact means; the paper's literal "mean"
    is the other. threshold: CHOICE 0.5 (examples/overfeat.py has its own). Both defaults are those of overfeat_localize.guesses.
    Returns boxes (R, 4), labels (R,), scores (R,) by falling score (ties: lower label), at most `limit`; M = 0 gives empty ones.
    Raises ValueError for another merging and classes below 1, TypeError for classes that are no integer, and as ops.merge and ops.nms.
    """
    checks.whole("overfeat_detect.combine", 1, classes=classes)
    if argmax:
        objects = probability.argmax(1) < classes
        boxes, probability = boxes[objects], probability[objects]
    found = []
    for label in range(classes):
        seen = np.flatnonzero(probability[:, label] >= min_score)
        if len(seen) > most:
            seen = np.sort(seen[np.argsort(-probability[seen, label], kind="stable")[:most]])
        b, s = boxes[seen], probability[seen, label]
        if merging == "merge":
            b, s, _ = merge.merge(b, s, threshold, mode)
        elif merging == "nms":
            kept = nms.nms(b, s, threshold)
            b, s = b[kept], s[kept]
        else:
            raise ValueError(f"overfeat_detect.combine: merging must be merge or nms, got {merging!r}")
        found.append((b, np.full(len(b), label), s))
    boxes, labels, scores = map(np.concatenate, zip(*found))
    best = np.argsort(-scores, kind="stable")[:limit]
    return boxes[best], labels[best], scores[best]


def look(net, image, index=0):
    """What the windows of one scale, net.spec.scales[index], see: the boxes they give (M, 4) in pixels of the image, class probabilities
    (M, K + 1), the background last if the net has one; float64.

    The image is enlarged that many times and framed by half a window of its mean grey, so that windows can centre on objects
    at the border (CHOICE; the paper has no frame). image: uint8 (H, W, 3). Raises ValueError for a net without a regressor and an index
    that no scale has.
    """
    spec, table = net.spec, net.table
    if "regressor" not in net.parts:
        raise ValueError("overfeat_detect.look: the net must have a regressor, got Spec.regressor None")
    if not 0 <= index < len(spec.scales):
        raise ValueError(f"overfeat_detect.look: index must be one of {len(spec.scales)} scales, got {index}")
    x, frame = _framed(net, image, spec.scales[index])
    other = None
    if spec.context and index + 1 < len(spec.scales):
        x2, _ = _framed(net, image, spec.scales[index + 1])
        found = []
        for side, side2 in zip(x.shape[1:3], x2.shape[1:3]):
            n, n2 = (overfeat.outputs(table, s, s).fine[0] for s in (side, side2))
            centres = np.arange(n) * table.jump + table.window / 2 - frame
            found.append(put(_looks_at(table, centres * spec.scales[index + 1] / spec.scales[index] + frame, n2)[None].astype(net.dtype)))
        other = (put(x2), *found)
    scores, edges = (to_numpy(a).astype(np.float64) for a in net.dense(put(x), coarser=other))
    p = softmax_loss.softmax(scores)
    grid = (overfeat.windows(table, *p.shape[1:3]) - frame) / spec.scales[index]
    return overfeat.decode(grid, edges.reshape(-1, 4)), p.reshape(len(grid), -1)


def _framed(net, image, scale):
    """The image at a scale in its frame, (1, H, W, 3) as the net takes it, and the frame's width in pixels."""
    window, frame = net.table.window, net.table.window // 2
    H, W = (max(window, round(side * scale)) + 2 * frame for side in image.shape[:2])
    return net.normalise(view(image, -frame / scale, -frame / scale, scale, W, H, net.spec.fill)[None]), frame
