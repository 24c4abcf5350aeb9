"""Oquab et al., "Is object localization for free?" (CVPR 2015): where objects are, learnt from names alone.

The net of oquab.py with head "weak" runs over a frame, a square that holds the photograph in its upper left corner; the largest
cell of each class's map is that class's score in the image, and the one cell that learns. Training: frame() once, rescaled() by
one factor drawn from TRAIN_SCALES for each batch, net.forward, loss(), net.backward. Test: look() at SCALES, then scores() for
what is there, combined() and locate() for where; boxes() for its extent.

Pixels are continuous: the middle of pixel j is j + 0.5. A cell of the map stands for its centre, 32 i + 111 pixels of the net's
input (full net, half a pixel less than the middle of its field; 8 i + 16 small), divided by the factor (CHOICE; more in
oquab.centres). It also sees what lies around, padding included: a
cell's score is not that of the window cut out. Frames are as wide as high, so that one factor goes for both sides.

Unverified, from memory of the paper: frames, masked pooling, the location metric; the boxes are ours, a plain rule where the
paper's could not be confirmed. The loss, the factors and the scales of the test are those of the authors' released code.
"""
import math

import numpy as np

from tinydet import augment, checks, proposals
from tinydet.backend import array_module, put, to_numpy
from tinydet.models import oquab
from tinydet.ops import boxes as box_ops, global_max_pool, logistic_loss, nms

SCALES = (0.5, 0.7, 1, 1.4, 2, 2.8)                     # of the test, factors (the released code) on a frame of 500 pixels
TRAIN_SCALES = (0.7, 1.4)                               # one factor a batch, uniform between these (the released code)
ALIGNMENTS = ("centres", "stretch")
SIDES = (0.12, 0.17, 0.24, 0.34, 0.48, 0.68, 0.96)      # of boxes(), by about sqrt(2) from one to the next
RATIOS = (1, 2, 0.5)                                    # their height / width


# What the net sees

def frame(net, image, side):
    """An image in the corner of a square of `side` pixels, as the net takes it (CVPR 2015, unverified; the corner: the released code).

    Resized (bilinear) so that its longer side is `side`, smaller images too; the mean subtracted; then zeros to the right and below
    (CHOICE: the papers do not say which comes first). image: uint8 (H, W, 3).
    Returns x (side, side, 3), the net's dtype, on the host; factor, frame pixels per pixel of the image; (h, w), the photograph's
    sides in the frame. The shorter side is rounded, halves up, at least 1. Raises ValueError, TypeError for other images and sides.
    """
    checks.small("oquab_weak.frame", 1, side=side)
    factor = side / max(1, *image.shape[:2])
    image, _ = augment.scale(image, np.zeros((0, 4)), factor)
    return augment.in_corner([image], side, side, net.normalise, net.dtype)[0], factor, image.shape[:2]


def rescaled(x, factor, least):
    """Frames at another scale: (N, H', W', 3), both sides max(least, floor(factor * side + 0.5)), dtype and device of x (N, H, W, 3).

    Bilinear between pixel middles, y = (i + 0.5) * H / H', clamped at the border; no antialiasing, also where it shrinks (CHOICE),
    so that it is two matrix products on any device. least: the net's window, below which it has no output.
    Raises ValueError unless factor is positive and finite, and for shapes; TypeError for dtypes.
    """
    op = "oquab_weak.rescaled"
    checks.float_array(op, "x", x, "(N, H, W, 3)")
    checks.small(op, 1, least=least)
    xp, (N, H, W, C) = array_module(x), x.shape
    down, across = (xp.asarray(_between((np.arange(n) + 0.5) * side / n, np.arange(side) + 0.5).astype(x.dtype))
                    for side in (H, W) for n in [_rescaled_side(op, side, factor, least)])
    rows = (down @ x.reshape(N, H, W * C)).reshape(N, len(down), W, C)
    return across @ rows


def _rescaled_side(op, side, factor, least):
    if not 0 < factor < math.inf:
        raise ValueError(f"{op}: factors must be positive and finite, got {factor}")
    return max(least, math.floor(factor * side + 0.5))


def _between(at, knots):
    """(len(at), len(knots)) matrix: row i gives the value at at[i], linear between values at the knots, beyond them the outermost."""
    return np.stack([np.interp(at, knots, one) for one in np.eye(len(knots))], 1)


# Training

def loss(maps, labels, mask=None):
    """The loss of a batch: the best cell per class, then one logistic loss per class (CVPR 2015; the released code).

        f[n,k] = max_{i,j} maps[n,i,j,k];  value = 1/N sum_{n,k} log(1 + exp(-y[n,k] f[n,k]))
        dmaps = -y * sigmoid(-y f) / N at the first largest cell in row order, 0 elsewhere
    maps: (N, h, w, K), what the net's forward gives. labels: (N, K) integers, +1, -1, or 0 (ignored). mask: None, or masks().
    labels and mask may lie on the host. Returns value (on a GPU a 0-d array there), dmaps, and f (N, K).
    Raises ValueError, TypeError as ops.global_max_pool and ops.logistic_loss.
    """
    xp = array_module(maps)
    scores, cache = global_max_pool.forward(maps, mask if mask is None else xp.asarray(mask))
    value, dscores = logistic_loss.loss(scores, xp.asarray(labels), signed=True)
    return value, global_max_pool.backward(dscores, cache), scores


def masks(net, side, factor, size, boxes, labels, K):
    """Where the max of each class may look in masked pooling, "strong + weak" (CVPR 2015; unverified).

    Returns bool (N, h, w, K), on the host, for loss().
    A class that has boxes looks at the cells whose centre lies in one of them, the border counts; where none does it looks
    everywhere (CHOICE), as classes without boxes do. side: of the frames; factor: they were rescaled by; size: (h, w) of the maps.
    boxes, labels: of each frame (R, 4), in its pixels before rescaling, and (R,) classes below K.
    Raises ValueError for maps of another size than the frame's, for shapes, for labels outside 0..K-1; TypeError for dtypes.
    """
    op = "oquab_weak.masks"
    if len(boxes) != len(labels):
        raise ValueError(f"{op}: boxes and labels must be of as many frames, got {len(boxes)} and {len(labels)}")
    y, x = (_centres(op, net, side, factor, n) for n in size)
    found = np.ones((len(boxes), *size, K), bool)
    for n, (b, own) in enumerate(zip(boxes, labels)):
        checks.float_array(op, f"boxes[{n}]", b, "(R, 4)")
        checks.integers(op, f"labels[{n}]", own, (len(b),))
        if len(own) and not 0 <= own.min() <= own.max() < K:
            raise ValueError(f"{op}: labels[{n}] must lie in 0..{K - 1}, got {own.min()}..{own.max()}")
        across = (b[:, :1] <= x) & (x <= b[:, 2:3])
        down = (b[:, 1:2] <= y) & (y <= b[:, 3:])
        for k in np.unique(own):
            inside = (down[own == k, :, None] & across[own == k, None]).any(0)
            found[n, :, :, k] = inside | ~inside.any()
    return found


def _centres(op, net, side, factor, n):
    """Centres (n,) of the n cells of a map, in pixels of the frame before it was rescaled. Raises ValueError unless the map has n.

    They are divided by what the rounded side really is, not by the factor.
    """
    pixels = _rescaled_side(op, side, factor, net.table.window)
    if n != (cells := oquab.map_side(net.table, pixels)):
        raise ValueError(f"{op}: maps of a frame of {side} pixels at scale {factor:g} must have {cells} cells a side, got {n}")
    return oquab.centres(net.table, n, net.spec.adapt_kernel) * side / pixels


# Test (the released code)

def look(net, x, scales=SCALES):
    """The maps of a frame x (side, side, 3), on the host, at every scale: a list of (h, w, K) float64, raw scores, on the host.

    Row D of the results, "full images", not slid over (the authors' slides; unverified): a frame of net.table.window, scales (1,).
    Raises ValueError without scales, and as rescaled.
    """
    if not len(scales):
        raise ValueError("oquab_weak.look: scales must hold at least one factor, got none")
    x = put(x[None])
    return [to_numpy(net(rescaled(x, factor, net.table.window)))[0].astype(np.float64) for factor in scales]


def scores(maps):
    """(K,) float64, the score of every class: the max of each map, averaged over the scales (the released code).

    maps: of look(), at least one. Raw scores, not probabilities: their mean is taken before any sigmoid.
    """
    return np.mean([m.max((0, 1)) for m in maps], 0)


# Where (CVPR 2015; unverified)

def combined(net, maps, scales, side, size, align="centres"):
    """One map of the photograph from those of all scales: (h, w, K) float64, the mean of the maps interpolated at every pixel of it.

    align "centres" (CHOICE): a cell holds at its centre, (32 i + 111) / factor in a full net; bilinear between centres, beyond the
    outermost ones their value. "stretch": each map is resized, bilinear, to the side x side pixels of the frame, as if its cells
    tiled it. maps: of look() at these scales; side: of the frame; size: (h, w) of the photograph in it.
    Raises ValueError for another align, maps that do not fit the scales or the frame, or size beyond it.
    """
    op = "oquab_weak.combined"
    if align not in ALIGNMENTS:
        raise ValueError(f"{op}: align must be one of {', '.join(ALIGNMENTS)}, got {align!r}")
    if len(maps) != len(scales) or not len(maps):
        raise ValueError(f"{op}: there must be a map for each scale, at least one, got {len(maps)} and {len(scales)}")
    if not all(1 <= n <= side for n in size):
        raise ValueError(f"{op}: size must lie in the frame of {side} pixels, got {tuple(size)}")
    total = np.zeros((*size, maps[0].shape[2]))
    for m, factor in zip(maps, scales):
        down, across = (_between(np.arange(pixels) + 0.5, centres if align == "centres" else (np.arange(n) + 0.5) * side / n)
                        for pixels, n in zip(size, m.shape) for centres in [_centres(op, net, side, factor, n)])
        total += across @ np.tensordot(down, m, 1)
    return total / len(maps)


def locate(map, factor):
    """The surest point of every class: points (K, 2) float64, (x, y) in pixels of the image, and confidences (K,).

    The middle of the first largest pixel of a combined map (h, w, K), in row order, divided by the frame's factor; its value is the
    confidence (CVPR 2015; unverified). Where cells at the border win, the map is flat out to it, and the first pixel is the
    border's own: at scale 2.8 up to 39.6 pixels of the frame off the centre. Raises ValueError for shapes, TypeError for dtypes.
    """
    checks.float_array("oquab_weak.locate", "map", map, "(h, w, K)")
    h, w, K = map.shape
    flat = map.reshape(h * w, K)
    best = flat.argmax(0)
    return (np.stack([best % w, best // w], 1) + 0.5) / factor, flat[best, np.arange(K)]


def boxes(map, factor, size, sides=SIDES, ratios=RATIOS, step=0.15, threshold=0.3, limit=300):
    """Boxes that stand out of a combined map (h, w, K). Ours, the paper's could not be confirmed: all CHOICE.

    Boxes of every size and shape slide over the map; score = mean inside - mean in the ring around: the box of the same centre
    and twice the area, less the box, cut at the border. Those with score > 0 go through NMS, class by class.
    map: float; raw scores, or their sigmoid, with which a bump of a class that is not there counts little.
    factor: of frame(); size: (H, W) of the image, at which boxes are cut. sides: root of the area, shares of the map's longer
    side; ratios: height / width; step: shares of a box's side (proposals.windows, cut). Corners are rounded to whole pixels of
    the map. The defaults give about 13,000 boxes. One without a ring, because it fills the map, is left out; if all do, their
    score is the mean inside. threshold: IoU of the NMS; limit: most boxes, over all classes.
    Of a plateau 1.5 times as high as wide, or of another shape than ratios holds, the best box may be a part (IoU 0.3).
    Returns boxes (R, 4) float64 in pixels of the image, labels (R,) int64, scores (R,), best first; ties: as proposals.windows
    orders them, then the lower class. Raises ValueError, TypeError for shapes, dtypes, NaN, and as proposals.windows and ops.nms.
    """
    op = "oquab_weak.boxes"
    checks.float_array(op, "map", map, "(h, w, K)")
    checks.finite(op, map=map)
    (h, w, K), least = map.shape, map.min((0, 1)).astype(np.float64)
    sums = np.zeros((h + 1, w + 1, K))
    sums[1:, 1:] = (map - least).cumsum(0).cumsum(1)                # less the least: a constant map gives 0, without rounding
    found = proposals.windows(w, h, [side * max(h, w) for side in sides], ratios, step, cut=True)
    inner = _whole(found, h, w)
    inner = inner[box_ops.area(inner) > 0]
    middle, half = (inner[:, :2] + inner[:, 2:]) / 2, (inner[:, 2:] - inner[:, :2]) * math.sqrt(0.5)
    outer = _whole(np.concatenate([middle - half, middle + half], 1), h, w)
    (total, area), (wider, more) = _inside(sums, inner), _inside(sums, outer)
    ring = more - area
    kept = ring > 0 if ring.any() else ring == 0
    inner, total, area, wider, ring = (a[kept] for a in (inner, total, area, wider, ring))
    score = total / area[:, None] - (wider - total) / ring[:, None] if ring.any() else total / area[:, None] + least
    at, labels = np.nonzero(score > 0)
    found, score = box_ops.clip(inner[at] / factor, *size), score[at, labels]
    best = nms.nms(found, score, threshold, limit=limit, groups=labels)
    return found[best], labels[best], score[best]


def detect(net, image, side, scales=SCALES, align="centres"):
    """Boxes of one image (uint8 (H, W, 3)) from its labels alone: frame, look, combined, and boxes() of the map's sigmoid.

    side: of the frame. Returns boxes (R, 4) in pixels of the image, labels (R,), scores (R,), best first. Raises as those.
    """
    x, factor, size = frame(net, image, side)
    heat = combined(net, look(net, x, scales), scales, side, size, align)
    return boxes(logistic_loss.sigmoid(heat), factor, image.shape[:2])


def _whole(boxes, h, w):
    """Boxes rounded to whole pixels, halves up, and cut at the map."""
    return box_ops.clip(np.floor(boxes + 0.5), h, w)


def _inside(sums, boxes):
    """(M, K) sums of the map inside the boxes, from its integral image, and their areas (M,)."""
    x1, y1, x2, y2 = boxes.astype(np.int64).T
    return sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1], (x2 - x1) * (y2 - y1)
