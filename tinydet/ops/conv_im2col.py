"""Convolution on CUDA as three matrix products of the library (cuBLAS) around an unrolled image: the plain way, for conv.unrolled().

    columns[(n,i,j), (u,v,c)] = x[n, i*stride + u*dilation - top, j*stride + v*dilation - left, c], 0 outside the image
    y = columns w + b,   dw = columns^T dy,   dx = fold(dy w^T), fold: every pixel adds up the columns that hold it

columns has kh * kw / stride^2 times the size of x. So images go in groups whose columns have at most `room` numbers, or one at a time.
CUDA only (the CPU's ways: conv.method), for contiguous arrays.
"""
from tinydet import cuda
from tinydet.backend import array_module


def forward(x, w, b, stride, pad, dilation, size, room):
    """y of conv.forward, size (oh, ow)."""
    K, Cout = w[..., 0].size, w.shape[3]
    y = cuda.empty(x, (len(x), *size, Cout))
    for at, sizes in _groups(x, w, size, stride, pad, dilation, room):
        array_module(x).matmul(_unroll(x[at], K, sizes), w.reshape(K, Cout), out=y[at].reshape(-1, Cout))
    y += b
    return y


def backward(dy, x, w, stride, pad, dilation, need_dx, need_dw, room):
    """dx and dw of conv.backward, each None where it is not needed. dw adds up the groups in order."""
    xp, K, Cout = array_module(x), w[..., 0].size, w.shape[3]
    dx = cuda.empty(x, x.shape) if need_dx else None
    dw = xp.zeros((K, Cout), x.dtype) if need_dw else None
    for at, sizes in _groups(x, w, dy.shape[1:3], stride, pad, dilation, room):
        rows = dy[at].reshape(-1, Cout)
        if need_dw:
            dw += xp.matmul(_unroll(x[at], K, sizes).T, rows)
        if need_dx:
            columns = xp.matmul(rows, w.reshape(K, Cout).T)
            cuda.launch("conv_im2col.cu", "conv_im2col_fold", (columns, dx[at], *sizes), threads=dx[at].size)
    return dx, dw.reshape(w.shape) if need_dw else None


def _groups(x, w, size, stride, pad, dilation, room):
    """Slices of the images, and for each the numbers that the kernels take."""
    (N, H, W, C), (kh, kw, _, _), (oh, ow) = x.shape, w.shape, size
    some = max(1, room // (oh * ow * kh * kw * C))
    for n in range(0, N, some):
        yield slice(n, n + some), (min(some, N - n), H, W, C, oh, ow, kh, kw, stride, dilation, pad[0], pad[2])


def _unroll(x, K, sizes):
    N, oh, ow = sizes[0], *sizes[4:6]
    columns = cuda.empty(x, (N * oh * ow, K))
    cuda.launch("conv_im2col.cu", "conv_im2col_unroll", (x, columns, *sizes), threads=columns.size)
    return columns
