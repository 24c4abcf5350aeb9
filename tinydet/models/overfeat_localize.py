"""OverFeat's localization (Sermanet et al., 1312.6229, sec. 4): a regressor trained on a frozen trunk, boxes of all scales that merge.

Training: freeze_trunk(net) once; for each image training_scales(); for each scale targets(), loss(), net.backward, or regress_step();
the gradients of the scales add up. (examples/overfeat_localize.py draws one scale a step instead.) The rate is not in the paper: CHOICE,
here and there, 0.05 with momentum 0.9 and gradients clipped to norm 1.
At test time localize() gives five guesses, as evaluate_classification.localization_error takes them.
"""
import copy

import numpy as np

from tinydet import checks
from tinydet.backend import array_module, put, to_numpy
from tinydet.layers import named
from tinydet.models import overfeat
from tinydet.ops import box_loss, boxes as box_ops, merge, offset_pool, softmax_loss

RULES = ("inter", "iou")
MERGINGS = ("merge", "none")
NORMALIZATIONS = ("none", "scales")


# Training (sec. 4.2)

def freeze_trunk(net):
    """Freeze an OverFeat but for its regressor, as sec. 4 trains it: make the optimiser after this. Returns the net.

    net.freeze(False) lets all train again (the paper's future work). Raises ValueError for a net without a regressor.
    """
    if "regressor" not in net.parts:
        raise ValueError("overfeat_localize.freeze_trunk: the net must have a regressor, got Spec.regressor None")
    net.freeze()
    net.parts["regressor"].freeze(False)
    return net


def training_scales(table, image, boxes, sizes=None, keep_aspect=False):
    """One uint8 image (H, W, 3) with its boxes (R, 4) at every scale: a list of views (h, w, 3), each with its boxes, float64.

    sizes: (H, W) of each scale, default table.sizes: the regressor sees the scales of the test. keep_aspect: overfeat.resize_to.
    """
    views = [overfeat.resize_to(table, image, size, keep_aspect) for size in (table.sizes if sizes is None else sizes)]
    return [(view, boxes * _factors(view.shape, image)) for view in views]


def targets(table, h, w, boxes, labels, rule="inter", least=0.5, offset=None):
    """What the regressor must answer at each of the h x w windows of overfeat.windows(table, h, w, offset), in row order (sec. 4.2).

    t = (x1 - wx, y1 - wy, x2 - wx, y2 - wy) / side, for the box that a window at (wx, wy) holds most of; dividing by the side is a
    CHOICE. A window trains if it holds `least` of that box: the 50 % rule, of which the paper says only "overlap". CHOICE "inter":
    intersection / area of the box; option "iou".
    boxes: (R, 4) in pixels of the net's input; labels: (R,) classes >= 0; of Example.usable(), say.
    With several objects a window answers one (CHOICE: the paper has one an image): that it holds most of, of those held equally
    the one of largest IoU with it, then the first.
    Returns edges (h*w, 4) float64, labels (h*w,) int64, trained (h*w,) bool; without boxes nothing trains.
    Raises ValueError for another rule, shapes, a negative label; TypeError for dtypes.
    """
    op = "overfeat_localize.targets"
    if rule not in RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    checks.float_array(op, "boxes", boxes, "(R, 4)")
    checks.integers(op, "labels", labels, (len(boxes),))
    if (labels < 0).any():
        raise ValueError(f"{op}: labels must be at least 0, got {labels.min()}")
    windows, boxes = overfeat.windows(table, h, w, offset), boxes.astype(np.float64)
    if len(boxes) == 0:
        return np.zeros((len(windows), 4)), np.zeros(len(windows), np.int64), np.zeros(len(windows), bool)
    area, iou = box_ops.area(boxes), box_ops.iou(windows, boxes)
    overlap = iou if rule == "iou" else box_ops.intersection(windows, boxes) / np.where(area > 0, area, 1)
    best = np.where(overlap == overlap.max(1, keepdims=True), iou, -1).argmax(1)
    return overfeat.encode(windows, boxes[best]), labels[best].astype(np.int64), overlap.max(1) >= least


def loss(edges, targets):
    """Half the squared distance of the edges, per window that trains (sec. 4.2): value = 0.5 * sum_{trained} |edges - t|^2 / trained.

    edges: (N, h, w, 4) of an SCR, (N, h, w, 4 * K) of a PCR, where the 4 of a target's class count alone: all others, and those of
    windows that do not train, have gradient 0. targets: what targets() gives, one tuple an image. Each call divides by its own
    windows: scales called one by one weigh the same (CHOICE; the paper sums over locations and scales, and names no divisor).
    Returns value (on a GPU a 0-d array there) and the gradient; 0 where nothing trains.
    Raises ValueError for shapes, targets of another number of windows, a class that a PCR has not.
    """
    op = "overfeat_localize.loss"
    checks.float_array(op, "edges", edges, "(N, h, w, 4 or 4 * K)")
    N, h, w, channels = edges.shape
    if channels == 0 or channels % 4 or len(targets) != N or any(len(t) != h * w for t, *_ in targets):
        raise ValueError(f"{op}: edges must have 4 channels a class, and targets {h * w} windows for each of {N} images, got "
                         f"{edges.shape} and {[len(t) for t, *_ in targets]}")
    wanted, labels, trained = map(np.concatenate, zip(*targets))
    K, xp = channels // 4, array_module(edges)
    if K > 1 and labels.size and labels.max() >= K:
        raise ValueError(f"{op}: labels must lie in 0..{K - 1}, got {labels.max()}")
    rows, own = edges.reshape(-1, K, 4), (xp.arange(len(labels)), xp.asarray(labels * (K > 1)))
    value, d = box_loss.l2(rows[own], xp.asarray(wanted.astype(edges.dtype)), xp.asarray(trained))
    dedges = xp.zeros(rows.shape, rows.dtype)
    dedges[own] = d
    return value, dedges.reshape(edges.shape)


def regress_step(net, maps, targets, offset=None):
    """Add the gradient of loss() to the regressor's `grads`, from maps of the trunk; returns the value.

    As net.forward(x, True, offset=offset, heads=("regressor",)), loss and net.backward with a frozen trunk, for less work: maps
    (N, n, m, D), net.parts["trunk"](x), may be kept from one step to the next, and the pooled map gets no gradient.
    offset: (oy, ox), or None: all (forward has (0, 0) by default). targets: as in loss(), for the windows of that offset. Raises as loss().
    """
    p, head = net.table.pool, net.parts["regressor"]
    parts, first = dict(head.parts), next(iter(head.parts))
    parts[first] = copy.copy(parts[first])                          # shares its arrays
    parts[first].input_grad = False
    head = named(parts, input_grad=False)
    pooled = offset_pool.split(offset_pool.forward(maps, p)[0], p)
    if offset is not None:
        pooled = [pooled[p * offset[0] + offset[1]]]
    ys, caches = zip(*(net._run(head, m, train=True) for m in pooled))
    value, dedges = loss(offset_pool.interleave(ys, p) if offset is None else ys[0], targets)
    for dy, cache in zip(offset_pool.split(dedges, p) if offset is None else [dedges], caches):
        if cache is not None:
            head.backward(dy, cache)
    return value


# Test (sec. 4.3)

def localize(net, image, sizes=None, flip=False, fine=True, k=5, centre_only=False, keep_aspect=False, **merging):
    """The k surest classes of a uint8 image (H, W, 3), each with one box: boxes (k, 4) in pixels of the image, labels, scores.

    sizes: the scales (H, W), default net.table.sizes; flip: the mirrored image, too; fine: all offsets of the last pooling.
    centre_only: the window in the middle of each view alone, cut out of it; sizes default to the first (the paper's baseline of
    one centre crop; how it was cut is not said, CHOICE). merging: the options of guesses(). Boxes may reach out of the image.
    """
    sizes = (net.table.sizes[:1] if centre_only else net.table.sizes) if sizes is None else sizes
    return guesses([look(net, image, size, mirrored, fine, centre_only, keep_aspect)
                    for size in sizes for mirrored in (False, True)[:1 + flip]], k, **merging)


def look(net, image, size, mirrored=False, fine=True, centre_only=False, keep_aspect=False):
    """What the windows of one view see, one scale of the image or of its mirror image: for guesses(). Arguments: see localize.

    Returns boxes (M, 1, 4), or (M, K, 4) of a PCR, in pixels of the image, un-mirrored, and p (M, K), each window's softmax; float64.
    Raises ValueError for a net without a regressor.
    """
    if "regressor" not in net.parts:
        raise ValueError("overfeat_localize.look: the net must have a regressor, got Spec.regressor None")
    view, side = overfeat.resize_to(net.table, image, size, keep_aspect), net.table.window
    height, width = view.shape[:2]
    x, y = ((width - side) // 2, (height - side) // 2) if centre_only else (0, 0)
    if mirrored:
        view = view[:, ::-1]
    if centre_only:
        view = view[y:y + side, x:x + side]
    pixels = put(net.normalise(view[None]))
    scores, edges = (to_numpy(a)[0].astype(np.float64) for a in (net.dense(pixels) if fine else net.forward(pixels)[:2]))
    h, w, K = scores.shape
    windows = overfeat.windows(net.table, h, w, None if fine else (0, 0)) + (x, y, x, y)
    edges = edges.reshape(h * w, -1, 4)
    boxes = overfeat.decode(windows.repeat(edges.shape[1], 0), edges.reshape(-1, 4))
    if mirrored:
        boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    return (boxes / _factors((height, width), image)).reshape(edges.shape), softmax_loss.softmax(scores.reshape(h * w, K))


def guesses(views, k=5, merging="merge", threshold=0.5, mode="count", match="dissimilarity", least=0.0,
            normalize="none"):
    """The k best (box, class) of what look() saw in the views of one image (sec. 4.3).

    Of each view (CHOICE: of each scale and flip) the k classes of largest p at any window count, with a box from every window,
    that has the confidence p. Then each class for itself (CHOICE), over all views:
    merging "merge": ops.merge (threshold, mode, match: see there) averages boxes and adds up confidence, and the box of largest sum
    stands for the class. mode: CHOICE "count", exact means; the paper's literal "mean" is the other. threshold: CHOICE 0.5.
    "none": the box of the surest window, score p. A class's windows with p < least are left out (CHOICE: 0; merging takes time as
    their square). Which boxes merge does not depend on p: with an SCR and least = 0 the classes that all views
    name merge alike, so that one merge for all of them, their p added as vectors, would give the same boxes and sums.
    normalize "scales": scores are divided by the number of views, to compare images seen at different ones; "none" is the paper's.
    Returns boxes (G, 4), labels (G,) int64, scores (G,), surest first, G <= k. Ties: the lower class, the earlier view, the first
    window. Raises ValueError for k < 1, another merging or normalize, and as ops.merge.
    """
    op = "overfeat_localize.guesses"
    checks.whole(op, 1, k=k)
    if merging not in MERGINGS:
        raise ValueError(f"{op}: merging must be one of {', '.join(MERGINGS)}, got {merging!r}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"{op}: normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    seen, found = {}, []
    for boxes, p in views:
        for label in np.argsort(-p.max(0), kind="stable")[:k].tolist():
            kept = p[:, label] >= least
            seen.setdefault(label, []).append((boxes[kept, label % boxes.shape[1]], p[kept, label]))        # an SCR has one box
    for label in sorted(seen):
        b, s = map(np.concatenate, zip(*seen[label]))
        if merging == "merge":
            b, s, _ = merge.merge(b, s, threshold, mode, match)
        if len(s):
            found.append((b[s.argmax()], label, s.max()))
    found = sorted(found, key=lambda guess: -guess[2])[:k]
    boxes, labels, scores = zip(*found) if found else ((), (), ())
    return np.reshape(boxes, (-1, 4)), np.array(labels, np.int64), np.array(scores, np.float64) / (len(views) if normalize == "scales" else 1)


def _factors(shape, image):
    """What boxes in pixels of the image are multiplied by in a view of that shape (h, w)."""
    return np.tile([shape[1] / image.shape[1], shape[0] / image.shape[0]], 2)
