"""Layers of the straight-line networks in plain NumPy, in evaluation: [N H W C], float64.

They are written from the definitions, independently of the layers of `flax_cnns`, and slow.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def _windows(x, window, stride):
    """Returns all windows that lie entirely inside: [N H' W' C window window]."""
    return sliding_window_view(x, window, axis=(1, 2))[:, ::stride, ::stride]


def conv(x, kernel, bias=0.0, stride=1, padding=0, groups=1):
    """Convolves [N H W C] with kernel [h w C/groups O]; `padding` is a width or (before, after)."""
    around = padding if isinstance(padding, tuple) else (padding, padding)
    x = np.pad(x, ((0, 0), around, around, (0, 0)))
    parts = []
    for part, k in zip(np.split(x, groups, axis=3), np.split(kernel, groups, axis=3)):
        windows = _windows(part, k.shape[:2], stride)
        parts.append(np.tensordot(windows, k, axes=([4, 5, 3], [0, 1, 2])))
    return np.concatenate(parts, axis=3) + bias


def dense(x, kernel, bias=0.0):
    return x @ kernel + bias


def flatten(x):
    """[N H W C] -> [N H*W*C], channels vary fastest."""
    return x.reshape(len(x), -1)


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _starts(size, window, stride, padding, ceil):
    """Returns where the windows begin, in pixels of the unpadded map.

    `ceil` is Caffe's rule: there is a last, incomplete window, unless it would begin in the padding
    at the far end.
    """
    span = size + 2 * padding - window
    n = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (n - 1) * stride >= size + padding:
        n -= 1
    return [i * stride - padding for i in range(n)]


def _pool(x, window, stride, padding, ceil, reduce):
    """Calls reduce(cut, whole) for each window.

    `cut` [N h w C] is the part inside the map. `whole` is the number of pixels of the padded map
    that the window covers.
    """
    n, height, width, channels = x.shape
    rows = _starts(height, window, stride, padding, ceil)
    columns = _starts(width, window, stride, padding, ceil)
    out = np.empty((n, len(rows), len(columns), channels))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            cut = x[:, max(top, 0) : top + window, max(left, 0) : left + window]
            tall = min(top + window, height + padding) - top
            wide = min(left + window, width + padding) - left
            out[:, i, j] = reduce(cut, tall * wide)
    return out


def max_pool(x, window, stride, padding=0, ceil=False):
    return _pool(x, window, stride, padding, ceil, lambda cut, _: cut.max(axis=(1, 2)))


def avg_pool(x, window, stride, padding=0, ceil=False, count_padding=True):
    """Mean over each window: zeros of the padding count, pixels added by rounding up do not."""

    def mean(cut, whole):
        return cut.sum(axis=(1, 2)) / (whole if count_padding else cut.shape[1] * cut.shape[2])

    return _pool(x, window, stride, padding, ceil, mean)


def adaptive_avg_pool(x, size):
    """[N size size C]: row i is the mean of rows floor(i H / size) to ceil((i + 1) H / size)."""
    n, height, width, channels = x.shape
    out = np.empty((n, size, size, channels))
    for i in range(size):
        rows = slice(i * height // size, -(-(i + 1) * height // size))
        for j in range(size):
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            out[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return out


def global_avg_pool(x):
    """[N H W C] -> [N C]."""
    return x.mean(axis=(1, 2))


def local_response_norm(x, size, alpha, beta, k):
    """x / (k + alpha sum x^2)^beta, the sum over `size` channels around each (AlexNet, 3.3)."""
    channels, half = x.shape[3], size // 2
    out = np.empty_like(x)
    for c in range(channels):
        near = x[..., max(c - half, 0) : c + half + 1]
        out[..., c] = x[..., c] / (k + alpha * (near**2).sum(axis=3)) ** beta
    return out


def batch_norm(x, scale, bias, mean, var, epsilon):
    return scale * (x - mean) / np.sqrt(var + epsilon) + bias
