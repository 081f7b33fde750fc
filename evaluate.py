"""The scores of disentanglement and the pictures: reads a finished run, or anybody's codes.

    python evaluate.py RUN [RUN ...]            # scores and pictures of run folders, one table
    python evaluate.py --codes FILE.npz         # scores of arrays z (n, N) and y (n, K), no model needed

Implements the FactorVAE score (Kim and Mnih 2018), DCI (Eastwood and Williams 2018), MIG (Chen et al.
2018) and the beta-VAE score (Higgins et al. 2017) with the protocol that EncDiff's authors use. The
functions of the first half work on plain arrays and can be copied without the rest.

Exports: dci, factor_vae_score, beta_vae_score, mig, principal_directions, Run, main.

Letters:  n points (images), N codes, K factors, C classes (values of one factor), V bins of a code,
M nodes of a tree's level, B batch, D token dimension, Z, h, w the latent's channels and sides.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


# ---- checks ---------------------------------------------------------------------------------------

def checked(z, y, points=1):
    """z (n, N) as float32 and y (n, K) as class numbers 0.. of int64, or ValueError with one sentence."""
    z, y = np.asarray(z), np.asarray(y)
    if z.ndim != 2 or y.ndim != 2 or len(z) != len(y):
        raise ValueError(f"codes must have shape (n, N) and factors (n, K) with one n, not {z.shape} and {y.shape}")
    if not np.isfinite(z).all():
        raise ValueError(f"{(~np.isfinite(z)).any(1).sum()} of {len(z)} points have codes that are NaN or infinite")
    if len(z) < points:
        raise ValueError(f"{points} points are needed and {len(z)} are there: give more, or ask for fewer")
    classes = [np.unique(column, return_inverse=True) for column in y.T]
    for k, (values, _) in enumerate(classes):
        if len(values) < 2:
            raise ValueError(f"factor {k} has one value in these {len(y)} points: leave it out, it cannot be scored")
    return z.astype(np.float32), np.stack([inverse for _, inverse in classes], axis=1)


def entropy(p, base):
    """Entropy of the rows of p (rows, columns), each first divided by its sum, in this base. (rows,)"""
    p = p / p.sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1) / np.log(base)


# ---- DCI: gradient-boosted trees ------------------------------------------------------------------

class Bins:
    """Codes cut into at most V bins each, so that a tree only has to look at V - 1 thresholds.

    A code with few values keeps each in a bin of its own. A histogram over all bins of all codes is a sum
    of rows of a table (n, columns), the rows of each bin: an embedding bag, PyTorch's name for just that.
    """

    def __init__(self, z, V):
        self.V, self.edges = V, []
        for code in torch.as_tensor(z).t():
            values = code.unique()                                                      # ascending
            if len(values) > V:                                     # ends of V equally full bins
                values = code.sort().values[torch.arange(1, V + 1) * len(code) // V - 1].unique()
                upper = code.unique()[torch.searchsorted(code.unique(), values[:-1]) + 1]
            else:
                upper = values[1:]
            self.edges.append((values[:-1] + upper) / 2)            # midway, as scikit-learn's trees
        self.index = self.of(z)                                                         # (n, N), 0..V-1
        bag = self.index + V * torch.arange(self.index.shape[1])                        # (n, N), 0..N*V-1
        order = bag.t().flatten().argsort(stable=True)                                  # (N*n,) bag by bag
        self.rows = order % len(z)                                                      # (N*n,)
        count = torch.bincount(bag.flatten(), minlength=V * bag.shape[1])               # (N*V,)
        self.offsets = count.cumsum(0) - count                                          # (N*V,) where a bag starts

    def of(self, z):
        """Bin of every code: z (n, N) -> (n, N) int64, 0..V-1; bin v holds edge v-1 < z <= edge v."""
        return torch.stack([torch.bucketize(code.contiguous(), edges)
                            for code, edges in zip(torch.as_tensor(z).t(), self.edges)], dim=1)

    def histogram(self, table):
        """Sums of table (n, columns) over the points of each bin: (N, V, columns)."""
        sums = F.embedding_bag(self.rows, table, self.offsets, mode="sum")              # (N*V, columns)
        return sums.view(-1, self.V, table.shape[1])


def best_splits(bins, residual, node, M):
    """The best split of each of M nodes of C trees: the largest decrease of squared error (Friedman 2001).

    residual, node: (n, C), the trees' targets and the node 0..M-1 each point is in. Returns, each (M, C),
    the decrease (0: nothing to split), the code and the bin up to which points go left.
    """
    n, C = residual.shape
    inside = (node[:, None, :] == torch.arange(M)[:, None]).float()                     # (n, M, C)
    table = torch.cat([residual[:, None, :] * inside, inside], dim=1)                   # (n, 2M, C)
    left = bins.histogram(table.view(n, -1)).cumsum(1).view(-1, bins.V, 2, M, C)        # (N, V, 2, M, C)
    right = left[:, -1:] - left
    (sum_l, n_l), (sum_r, n_r) = left.unbind(2), right.unbind(2)                        # (N, V, M, C) each
    total = left[0, -1]                                                                 # (2, M, C)
    decrease = sum_l ** 2 / n_l + sum_r ** 2 / n_r - total[0] ** 2 / total[1]
    decrease = decrease.masked_fill((n_l < 0.5) | (n_r < 0.5), 0)                       # one side empty: no split
    best, place = decrease.flatten(0, 1).clamp(min=0).max(0)                            # (M, C); first code wins
    return best, place // bins.V, torch.where(best > 1e-9, place % bins.V, bins.V)


def boost(bins, test_index, y, C, rounds=100, depth=3, rate=0.1):
    """Gradient-boosted classification trees (Friedman 2001, algorithm 6), with scikit-learn's conventions.

    bins: of the training codes; test_index: (n_test, N) from bins.of; y: (n,) int64 classes 0..C-1. All
    trees of a round are grown together, one a class (one in all for two classes). Returns the importance
    of each code (N,), its mean decrease of squared error over all trees, and the classes predicted for
    training and test points.
    """
    n, N = bins.index.shape
    prior = torch.bincount(y, minlength=C).float() / n                                  # (C,)
    one_hot = F.one_hot(y, C).float()                                                   # (n, C)
    start = prior.clamp(min=1e-12).log()
    if C == 2:                                                      # one tree: the log odds of class 1
        start, one_hot = (start[1] - start[0])[None], one_hot[:, 1:]
    scores = [start.repeat(len(index), 1) for index in (bins.index, test_index)]        # (n, C) and (n_test, C)
    newton = (C - 1) / C if C > 2 else 1.0
    importance = torch.zeros(N)
    for _ in range(rounds):
        p = scores[0].softmax(1) if C > 2 else scores[0].sigmoid()                      # (n, C)
        residual = one_hot - p                                                          # minus the loss's gradient
        nodes = [torch.zeros_like(s, dtype=torch.int64) for s in scores]
        for level in range(depth):
            decrease, code, threshold = best_splits(bins, residual, nodes[0], 2 ** level)       # (M, C) each
            importance.index_add_(0, code.flatten(), decrease.flatten() / n)
            for i, index in enumerate((bins.index, test_index)):
                value = index.gather(1, code.gather(0, nodes[i]))                       # (n, C) bin of the code asked for
                nodes[i] = 2 * nodes[i] + (value > threshold.gather(0, nodes[i]))       # left 2m, right 2m + 1
        leaves = torch.zeros(2 ** depth, residual.shape[1])                             # (leaves, C)
        top = leaves.scatter_add(0, nodes[0], residual)
        bottom = leaves.scatter_add(0, nodes[0], p * (1 - p))
        step = torch.where(bottom > 1e-12, newton * top / bottom, 0)                    # one Newton step a leaf
        scores = [s + rate * step.gather(0, node) for s, node in zip(scores, nodes)]
    guess = [s.argmax(1) if C > 2 else (s[:, 0] > 0).long() for s in scores]
    return importance.numpy(), guess[0], guess[1]


def dci(z_train, y_train, z_test, y_test, V=256):
    """Disentanglement, completeness, informativeness (Eastwood and Williams 2018, section 2).

    z_train, z_test: codes (n, N) float; y_train, y_test: factors (n, K) int. Returns a dict with
    disentanglement and completeness in [0, 1], informativeness_train and informativeness_test (mean
    accuracy, [0, 1]) and importance (N, K), whose columns sum to 1. Deterministic. Two codes that are
    copies share nothing: the first takes all the importance (scikit-learn draws lots). Raises ValueError.
    """
    n = len(np.asarray(z_train))
    z, y = checked(np.concatenate([z_train, z_test]), np.concatenate([y_train, y_test]))
    bins = Bins(z[:n], V)
    test_index, accuracy, importance = bins.of(z[n:]), [], []
    for column in torch.from_numpy(y).t():
        gain, guess_train, guess_test = boost(bins, test_index, column[:n], int(column.max()) + 1)
        importance.append(gain / gain.sum() if gain.any() else gain)
        accuracy.append([(guess_train == column[:n]).float().mean().item(),
                         (guess_test == column[n:]).float().mean().item()])
    R = np.stack(importance, axis=1)                                                    # (N, K)
    N, K = R.shape
    share = R.sum(1) / R.sum() if R.any() else np.full(N, 1 / N)                        # (N,) of each code
    disentanglement = (share * (1 - entropy(R + 1e-11, K))).sum()
    share = R.sum(0) / R.sum() if R.any() else np.full(K, 1 / K)                        # (K,) of each factor
    completeness = (share * (1 - entropy(R.T + 1e-11, N))).sum()
    train, test = np.mean(accuracy, axis=0)
    return dict(disentanglement=float(disentanglement), completeness=float(completeness),
                informativeness_train=float(train), informativeness_test=float(test), importance=R)
