"""The loops that a user of NumPy writes, compiled by numba: about ten lines for each way that arrays lie.

Sums have the type of the weight, and fastmath allows numba to reorder them, without which it makes no vectors of them.
"""

import numpy as np
from numba import njit, prange
from workload import EPS


@njit(parallel=True, fastmath=True)
def planes(x, weight, bias, y):
    """A statistic for each x[n, c]; weight and bias for each [c, h]: of a group of h channels, or of one."""
    n, c, h, w = x.shape
    t = weight.dtype.type
    for i in prange(n * c):
        a, b = i // c, i % c
        total, square = t(0), t(0)
        for j in range(h):
            for k in range(w):
                total += x[a, b, j, k]
        mean = total / t(h * w)
        for j in range(h):
            for k in range(w):
                square += (x[a, b, j, k] - mean) ** 2
        rstd = t(1) / np.sqrt(square / t(h * w) + t(EPS))
        for j in range(h):
            scale, shift = weight[b, j] * rstd, bias[b, j]
            for k in range(w):
                y[a, b, j, k] = (x[a, b, j, k] - mean) * scale + shift


@njit(parallel=True, fastmath=True)
def masked(x, where, weight, bias, y):
    """A statistic for each x[n, c], of what `where` names; weight and bias for each [c]."""
    n, c, m = x.shape
    t = weight.dtype.type
    for i in prange(n * c):
        a, b = i // c, i % c
        count, total, square = t(0), t(0), t(0)
        for k in range(m):
            count += t(where[a, b, k])
            total += x[a, b, k] * t(where[a, b, k])
        mean = total / count
        for k in range(m):
            square += (x[a, b, k] - mean) ** 2 * t(where[a, b, k])
        scale, shift = weight[b] / np.sqrt(square / count + t(EPS)), bias[b]
        for k in range(m):
            y[a, b, k] = (x[a, b, k] - mean) * scale + shift


@njit(parallel=True, fastmath=True)
def pixels(x, weight, bias, y):
    """A statistic for each x[n, :, c]; weight and bias for each [c]."""
    n, m, c = x.shape
    t = weight.dtype.type
    for i in prange(n):
        total, square = np.zeros_like(weight), np.zeros_like(weight)
        for j in range(m):
            for k in range(c):
                total[k] += x[i, j, k]
        mean = total / t(m)
        for j in range(m):
            for k in range(c):
                square[k] += (x[i, j, k] - mean[k]) ** 2
        scale = weight / np.sqrt(square / t(m) + t(EPS))
        for j in range(m):
            for k in range(c):
                y[i, j, k] = (x[i, j, k] - mean[k]) * scale[k] + bias[k]


@njit(parallel=True, fastmath=True)
def rows(x, weight, bias, y):
    """A statistic for each x[n]; weight and bias for each member."""
    n, m = x.shape
    t = weight.dtype.type
    for i in prange(n):
        total, square = t(0), t(0)
        for k in range(m):
            total += x[i, k]
        mean = total / t(m)
        for k in range(m):
            square += (x[i, k] - mean) ** 2
        rstd = t(1) / np.sqrt(square / t(m) + t(EPS))
        for k in range(m):
            y[i, k] = (x[i, k] - mean) * rstd * weight[k] + bias[k]
