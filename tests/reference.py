"""Every normalization in float64 NumPy, written from the papers and sharing nothing with the library.

Each takes x of shape (N, C, *) and returns a `Step`: the output, and the statistics that the running buffers are to
move towards (``var`` already with the correction they use).
"""

from typing import NamedTuple

import numpy as np


class Step(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def per_channel(v, ndim):
    return np.asarray(v, dtype=np.float64).reshape(1, -1, *[1] * (ndim - 2))


def axes(x):
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def values(x):
    """(C, number of values of a channel)."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def affine(x_hat, weight, bias):
    y = x_hat if weight is None else x_hat * per_channel(weight, x_hat.ndim)
    return y if bias is None else y + per_channel(bias, x_hat.ndim)


def standardize(x, mean, var, weight, bias, eps):
    mean, var = per_channel(mean, x.ndim), per_channel(var, x.ndim)
    return affine((x - mean) / np.sqrt(var + eps), weight, bias)


def batch_norm(x, weight=None, bias=None, eps=1e-5):
    """Ioffe & Szegedy, Alg. 1."""
    v = values(x)
    mean, var = v.mean(1), v.var(1)
    return Step(standardize(x, mean, var, weight, bias, eps), mean, v.var(1, ddof=1))


def ghost_batch_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """Hoffer et al., Alg. 1, for groups given as lists of example indices; one update, by group size."""
    y, mean, var = np.empty_like(x), 0.0, 0.0
    for members in groups:
        part = batch_norm(x[members], weight, bias, eps)
        y[members] = part.y
        mean = mean + part.mean * (len(members) / len(x))
        var = var + part.var * (len(members) / len(x))
    return Step(y, mean, var)


def batch_renorm(x, running_mean, running_var, r_max, d_max, weight=None, bias=None, eps=1e-5):
    """Ioffe 2017 (arXiv:1702.03275), Alg. 1; σ is √(variance + ε)."""
    plain = batch_norm(x, None, None, eps)
    mean, sigma = plain.mean, np.sqrt(values(x).var(1) + eps)
    running_sigma = np.sqrt(np.asarray(running_var, dtype=np.float64) + eps)
    r = np.clip(sigma / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / running_sigma, -d_max, d_max)
    y = affine(plain.y * per_channel(r, x.ndim) + per_channel(d, x.ndim), weight, bias)
    return Step(y, plain.mean, plain.var)


def masked_batch_norm(x, mask, weight=None, bias=None, eps=1e-5):
    """Statistics of the valid positions only, for a mask (N, *); every position is normalized by them."""
    valid = np.stack([x[:, c][mask] for c in range(x.shape[1])])
    mean, var = valid.mean(1), valid.var(1)
    corrected = valid.var(1, ddof=1) if valid.shape[1] > 1 else np.full(len(valid), np.nan)
    return Step(standardize(x, mean, var, weight, bias, eps), mean, corrected)


def adaptive_batch_norm(x, running_mean, running_var, alpha, weight=None, bias=None, eps=1e-5):
    """Mix source statistics with this batch's, correction=0 (Schneider et al. 2020, You et al. 2021)."""
    v = values(x)
    mean = (1 - alpha) * np.asarray(running_mean, np.float64) + alpha * v.mean(1)
    var = (1 - alpha) * np.asarray(running_var, np.float64) + alpha * v.var(1)
    return standardize(x, mean, var, weight, bias, eps)


def lp_batch_norm(x, p, centered, weight=None, bias=None, eps=1e-5):
    """Santurkar et al. §3.3: subtract the mean, divide by the average l_p norm of the values (before shifting)."""
    v = values(x)
    mean = v.mean(1)
    magnitudes = np.abs(v - mean[:, None] if centered else v)
    scale = magnitudes.max(1) if p == np.inf else (magnitudes**p).mean(1) ** (1 / p)
    square = scale**2
    n = v.shape[1]
    corrected = square * n / (n - 1) if p == 2 and centered else square
    return Step(standardize(x, mean, square, weight, bias, eps), mean, corrected)


def noisy_batch_norm(x, scale, shift, weight=None, bias=None, eps=1e-5):
    """Santurkar et al., Alg. 1: the output of BN times ``scale`` plus ``shift``, both given and of x's shape."""
    plain = batch_norm(x, weight, bias, eps)
    return Step(plain.y * scale + shift, plain.mean, plain.var)


def cross_replica_batch_norm(shards, weight=None, bias=None, eps=1e-5):
    """BN over all processes' examples, of unequal numbers: one output a process, one pair of statistics."""
    whole = batch_norm(np.concatenate(shards), weight, bias, eps)
    ends = np.cumsum([len(shard) for shard in shards])[:-1]
    return Step(np.split(whole.y, ends), whole.mean, whole.var)


def moved(running, batch, momentum):
    """The running statistic after one step; ``momentum`` weighs the new batch."""
    return (1 - momentum) * np.asarray(running, dtype=np.float64) + momentum * np.asarray(batch, dtype=np.float64)


def debiased(batches, momentum):
    """Adam's way: an exponential average from zero, divided by its total weight (Kingma & Ba, §3)."""
    average, weight = 0.0, 0.0
    for batch in batches:
        average = (1 - momentum) * average + momentum * np.asarray(batch, dtype=np.float64)
        weight = (1 - momentum) * weight + momentum
    return average / weight


def merged(means, variances):
    """Statistics of the mixture of several processes' distributions, each weighing alike: total variance."""
    means, variances = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    return means.mean(0), variances.mean(0) + means.var(0)
