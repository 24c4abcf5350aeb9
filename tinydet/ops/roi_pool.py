"""RoI max pooling: what a map holds of each region, as a map of fixed size (Fast R-CNN)."""
import numpy as np
from numba import get_num_threads, njit, prange

from tinydet import checks, cuda
from tinydet.backend import array_module, pick

FAR = 2**30             # cells beyond are moved there
SLAB = 64               # channels that a thread scatters, at least (Numba)


def forward(x, rois, size, scale, float_bins=False):
    """Largest value in each of PH x PW bins of every region (Fast R-CNN, 1504.08083, sec. 2.1; Caffe's code).

    RoI (n, x1, y1, x2, y2) has rows ys = round(y1 * scale) to round(y2 * scale) of image n's map, both included: rh rows, only
    row ys if the second is above it; columns likewise. y[r,i,j,c] = max x[n,h,w,c] over the cells of bin (i, j) in the map,
        ys + floor(i * rh / PH) <= h < ys + ceil((i + 1) * rh / PH), columns likewise:
    neighbours share a row of which both have a part, and bins of a RoI of fewer rows repeat them.
    x: (N, H, W, C) float32 or float64. rois: (R, 5), same dtype, inclusive pixels of the image, as in Caffe: for a continuous
    box (x1, y1, x2 - 1, y2 - 1). size: (PH, PW) or one number. scale: cells a pixel, such as 1/16. Returns y (R, PH, PW, C), cache.
    Coordinates, scale and their product are float32, as in Caffe, for both dtypes of x; halves round away from 0, cells end at
    -2^30 and 2^30. Bins are computed in integers; float_bins=True takes Caffe's i * (rh / PH) in float32, which at times gives a
    bin a row more (the last of 7 for rh 57), for parity with its nets.
    Ties go to the first cell in row order; the first NaN in a bin wins it, y is NaN there (Caffe starts below all finite numbers,
    with a strict >, and so passes over NaN and -inf). A bin without a cell in the map gives y = 0 and no gradient.
    R = 0 gives an empty y. Raises ValueError for shapes, NaN or infinite coordinates, an image index that is no integer in 0..N-1
    (rois on a GPU are not looked at: y is NaN there, dx gets nothing) and a scale that is not positive; TypeError for dtypes.
    """
    op = "roi_pool.forward"
    checks.float_array(op, "x", x, "(N, H, W, C)")
    checks.float_array(op, "rois", rois, "(R, 5)")
    checks.same_dtype(op, x=x, rois=rois)
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(size) != 2:
        raise ValueError(f"{op}: size must be a number or (PH, PW), got {size}")
    for side in size:
        checks.small(op, 1, size=side)
    if not 1e-30 < scale < 1e30:
        raise ValueError(f"{op}: scale must lie between 1e-30 and 1e30, got {scale}")
    if x.shape[1] * x.shape[2] >= 2**31:
        raise ValueError(f"{op}: x must have fewer than 2^31 cells in a map, got {x.shape}")
    checks.finite(op, rois=rois)
    if checks.on_host(rois):
        n = rois[:, 0]
        if (bad := (n != np.floor(n)) | (n < 0) | (n >= len(x))).any():
            raise ValueError(f"{op}: rois[:, 0] must be indices of the {len(x)} images, got {n[bad][0]:g}")
    run = pick(x, numpy=_forward_numpy, numba=_forward_numba, cuda=_forward_cuda)
    y, argmax, bins = run(x, rois, size, float(scale), bool(float_bins))        # argmax: int32, h * W + w, -1 for an empty bin
    return y, (x.shape, x.dtype, argmax, bins)


def backward(dy, cache):
    """dx: each dy[r,i,j,c] goes to the cell that won its bin; a cell adds up all it won, in order of (r, i, j) on every backend.

    Fast R-CNN, Eq. 4. RoI coordinates get no gradient. A RoI with y2 above y1 keeps its gradient, which Caffe's GPU code loses.
    dy: (R, PH, PW, C), the dtype of y. Returns dx (N, H, W, C), same dtype, zeros for R = 0. Raises ValueError for a shape, TypeError for a dtype.
    """
    shape, dtype, argmax, bins = cache
    checks.gradient("roi_pool.backward", argmax.shape, dtype, dy)
    return pick(dy, numpy=_backward_numpy, numba=_backward_numba, cuda=_backward_cuda)(dy, shape, argmax, bins)


def _bins(rois, shape, size, scale, float_bins):
    """(1 + 2 PH + 2 PW, R) int32: image of a RoI, its bins' first rows in the map, their rows past the last, columns likewise."""
    with np.errstate(over="ignore"):                            # to infinity, which ends at FAR
        cells = (rois[:, 1:].astype(np.float32) * np.float32(scale)).astype(float)
    cells = np.copysign(np.floor(np.abs(cells) + 0.5), cells).clip(-FAR, FAR).astype(int)      # float64: + 0.5 is exact
    lines = [rois[None, :, 0]]
    for axis, count in enumerate(size):
        start, stop = cells[:, 1 - axis], cells[:, 3 - axis]
        extent, i = np.maximum(stop - start + 1, 1), np.arange(count + 1)[:, None]
        if float_bins:
            edge = i.astype(np.float32) * (extent.astype(np.float32) / np.float32(count))
            first, past = np.floor(edge[:-1]).astype(int), np.ceil(edge[1:]).astype(int)
        else:
            first, past = i[:-1] * extent // count, -(-i[1:] * extent // count)
        lines += [(start + edge).clip(0, shape[1 + axis]) for edge in (first, past)]
    return np.concatenate(lines).astype(np.int32)


def _forward_numpy(x, rois, size, scale, float_bins):
    (PH, PW), C, bins = size, x.shape[3], _bins(rois, x.shape, size, scale, float_bins)
    y, argmax = np.zeros((len(rois), PH, PW, C), x.dtype), np.full((len(rois), PH, PW, C), -1, np.int32)
    image, top, bottom, left, right = np.split(bins, np.cumsum([1, PH, PH, PW]))
    for r, i, j in np.ndindex(y.shape[:3]):
        cells = x[image[0, r], top[i, r]:bottom[i, r], left[j, r]:right[j, r]]
        if cells.size:
            k = cells.reshape(-1, C).argmax(0)                  # the first of the largest, or the first NaN
            y[r, i, j] = cells.reshape(-1, C)[k, np.arange(C)]
            argmax[r, i, j] = (top[i, r] + k // cells.shape[1]) * x.shape[2] + left[j, r] + k % cells.shape[1]
    return y, argmax, bins


def _backward_numpy(dy, shape, argmax, bins):
    N, H, W, C = shape
    dx, won = np.zeros((N, H * W, C), dy.dtype), argmax >= 0
    r, _, _, c = np.nonzero(won)
    np.add.at(dx, (bins[0, r], argmax[won], c), dy[won])        # add, never assign: a cell may win many bins
    return dx.reshape(shape)


# Numba: forward a row of bins at a time, with a loop over channels for each cell, which becomes vector code. Backward scatters:
# each task has channels of an image to itself, so that no two write to one place, and cells add in the order of the reference

def _forward_numba(x, rois, size, scale, float_bins):
    shape, bins = (len(rois), *size, x.shape[3]), _bins(rois, x.shape, size, scale, float_bins)
    y, argmax = np.empty(shape, x.dtype), np.empty(shape, np.int32)
    _pool(np.ascontiguousarray(x), y, argmax, bins)
    return y, argmax, bins


def _backward_numba(dy, shape, argmax, bins):
    N, H, W, C = shape
    dx, flat = np.zeros((N, H * W, C), dy.dtype), (argmax.shape[0], argmax.shape[1] * argmax.shape[2], C)
    _unpool(np.ascontiguousarray(dy).reshape(flat), argmax.reshape(flat), dx, bins[0], max(SLAB, -(-N * C // get_num_threads())))
    return dx.reshape(shape)


@njit(cache=True, parallel=True)
def _pool(x, y, argmax, bins):
    (R, PH, PW, _), W = y.shape, x.shape[2]
    for line in prange(R * PH):
        r, i = divmod(np.int64(line), PH)
        n, top, bottom = bins[0, r], bins[1 + i, r], bins[1 + PH + i, r]
        for j in range(PW):
            left, right = bins[1 + 2 * PH + j, r], bins[1 + 2 * PH + PW + j, r]
            best, place = y[r, i, j], argmax[r, i, j]
            best[:], place[:] = 0, -1
            if top < bottom and left < right:
                best[:], place[:] = x[n, top, left], top * W + left
            for h in range(top, bottom):
                for w in range(left, right):
                    _win(x[n, h, w], best, place, np.int32(h * W + w))


@njit(cache=True)
def _win(x, best, place, here):
    """Let the channels of a cell challenge the best so far. A NaN wins, and stays."""
    for c in range(len(x)):
        value, old = x[c], best[c]
        wins = (old == old) & (not value <= old)
        best[c] = value if wins else old
        place[c] = here if wins else place[c]


@njit(cache=True, parallel=True)
def _unpool(dy, argmax, dx, image, slab):
    (R, bins, C), slabs = dy.shape, -(-dy.shape[2] // slab)
    for task in prange(len(dx) * slabs):
        n, first = task // slabs, task % slabs * slab
        for r in range(R):
            if image[r] == n:
                for k in range(bins):
                    for c in range(np.uintp(first), np.uintp(min(C, first + slab))):     # signed, it could count from the end
                        at = argmax[r, k, c]
                        if at >= 0:
                            dx[n, np.uintp(at), c] += dy[r, k, c]


# CUDA: kernels/roi_pool.cu

def _forward_cuda(x, rois, size, scale, float_bins):
    xp, (N, H, W, C), R, (PH, PW) = array_module(x), x.shape, len(rois), size
    bins, argmax = (cuda.empty(x, shape, np.int32) for shape in ((1 + 2 * PH + 2 * PW, R), (R, PH, PW, C)))
    x, rois, y = xp.ascontiguousarray(x), xp.ascontiguousarray(rois), cuda.empty(x, argmax.shape)
    cuda.launch("roi_pool.cu", "roi_pool_bins", (rois, bins, R, N, H, W, PH, PW, scale, float_bins), threads=R * (PH + PW))
    cuda.launch("roi_pool.cu", "roi_pool_forward", (x, bins, y, argmax, H, W, C, R, PH, PW), threads=y.size)
    return y, argmax, bins


def _backward_cuda(dy, shape, argmax, bins):
    (N, H, W, C), (R, PH, PW, _) = shape, argmax.shape
    dy, dx, block = array_module(dy).ascontiguousarray(dy), cuda.empty(dy, shape), min(256, -(-C // 32) * 32)
    cuda.launch("roi_pool.cu", "roi_pool_backward", (dy, argmax, bins, dx, H, W, C, R, PH, PW),
                grid=N * H * W * -(-C // max(1, block)), block=block)
    return dx
