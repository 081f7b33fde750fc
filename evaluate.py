"""The scores of disentanglement and the pictures: reads a finished run, or anybody's codes.

    python evaluate.py RUN [RUN ...]            # scores and two pictures of a run; several: one table, no scoring again
    python evaluate.py RUN --figures [NAME ...] # the paper's pictures and its bottleneck analysis
    python evaluate.py --codes FILE.npz         # scores of arrays z (n, N) and y (n, K), no model needed

Implements the scores with the protocol of EncDiff's authors, on plain arrays, so that they can be copied; then the
figures. Left out: FID. Exports: dci, factor_vae_score, beta_vae_score, mig, tad, Run, main.

Letters:  n points (images), N codes, K factors, A attributes, C classes (values of a factor), V bins of a code, M nodes
of a tree's level, R importance, H entropy; B batch, D token dimension, Z, h, w the latent's channels and sides.
"""
import argparse
import dataclasses
import inspect
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import train
from data import hold_out, open_dataset, reading, whole
from diffusion import SCHEDULES, Diffusion, end_with
from encoder import number_coder
from model import attention_pictures, rise_of_loss


def checked(z, y, points=1):
    """z (n, N) as float32 and y (n, K) as class numbers 0.. of int64, or ValueError with one sentence."""
    z, y = np.asarray(z), np.asarray(y)
    if z.ndim != 2 or y.ndim != 2 or len(z) != len(y):
        raise ValueError(f"codes must have shape (n, N) and factors (n, K) with one n, not {z.shape} and {y.shape}")
    if not np.isfinite(z).all():
        raise ValueError(f"{(~np.isfinite(z)).any(1).sum()} of {len(z)} points have codes that are NaN or infinite")
    classes = [np.unique(column, return_inverse=True) for column in y.T]
    if constant := [k for k, (values, _) in enumerate(classes) if len(values) < 2]:
        raise ValueError(f"factor {constant[0]} has one value in these {len(y)} points: leave it out, it has no score")
    if len(z) < points:
        raise ValueError(f"DCI needs {points} points, {len(z)} are there: give more, or leave it out by --metrics")
    return z.astype(np.float32), np.stack([inverse for _, inverse in classes], axis=1)


def entropy(p, base=math.e):
    """Entropy of the rows of p (rows, columns), each first divided by its sum, in this base. (rows,)"""
    p = p / p.sum(1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1) / max(np.log(base), 1e-300)      # 0 log 0 = 0


def purity(R):
    """How far rows of importances R (rows, columns) are one column's each: mean of 1 - entropy by weight, [0, 1]."""
    share = R.sum(1) / R.sum() if R.any() else np.full(len(R), 1 / len(R))              # (rows,)
    return float((share * (1 - entropy(R + 1e-11, R.shape[1]))).sum())


# ---- DCI: gradient-boosted trees ------------------------------------------------------------------

def bin_codes(z, n, V):
    """Cuts codes z into at most V bins each, made for the first n points. Returns index, the bin of each, like z,
    and bags: V, and for an embedding bag the points in all bins of all codes and where each bin starts.

    DEVIATION: a tree tries at most V - 1 thresholds a code; scikit-learn's, which the authors use, try all.
    """
    index = []
    for code in torch.as_tensor(z).t():
        values, count = code[:n].unique(return_counts=True)                             # ascending
        edges = (values[:-1] + values[1:]) / 2                      # midway, as scikit-learn's trees
        if len(values) > V:                 # half of the edges in the widest gaps, half after equally many points
            widest = values.diff().topk(V // 2).indices
            even = torch.searchsorted(count.cumsum(0), torch.arange(1, V // 2) * n // (V // 2))
            edges = edges[torch.cat([widest, even.clamp(max=len(edges) - 1)]).unique()]
        index.append(torch.bucketize(code.contiguous(), edges))     # bin v holds edge v-1 < z <= edge v
    index = torch.stack(index, dim=1)                                                   # (n + n_test, N), 0..V-1
    bag = (index[:n] + V * torch.arange(index.shape[1])).t().flatten()                  # (N*n,), 0..N*V-1
    count = torch.bincount(bag, minlength=V * index.shape[1])                           # (N*V,)
    return index, (V, bag.argsort(stable=True) % n, count.cumsum(0) - count)            # (N*n,), (N*V,)


def best_splits(bags, residual, node, M, lots):
    """The best split of each of the M nodes of one level of C trees: the largest decrease of squared error.

    residual, node: (n, C), the targets of the trees and the node 0..M-1 of each point. Returns (M, C) each: the
    decrease (0: nothing to split), the code, the bin up to which points go left. Codes that do equally well draw lots.
    """
    (V, points, starts), (n, C) = bags, residual.shape
    inside = (node[:, None, :] == torch.arange(M)[:, None]).float()                     # (n, M, C)
    table = torch.stack([residual[:, None, :] * inside, inside], dim=1)                 # (n, 2, M, C)
    below = F.embedding_bag(points, table.view(n, -1), starts, mode="sum")              # (N*V, 2 * M * C)
    below = below.view(-1, V, 2, M, C).cumsum(1)                                        # (N, V, 2, M, C)
    total = below[0, -1]                                            # (2, M, C): all points, whichever the code
    (sum_l, n_l), (sum_r, n_r) = below.unbind(2), (total - below).unbind(2)             # (N, V, M, C) each
    decrease = sum_l ** 2 / n_l + sum_r ** 2 / n_r - total[0] ** 2 / total[1]           # nan or inf: a side is empty
    decrease = decrease.nan_to_num(0, 0, 0).clamp(min=0)                                # (N, V, M, C)
    gain, place = decrease.max(1)                                                       # (N, M, C) each, of every code
    best = gain.max(0).values                                                           # (M, C)
    code = ((gain == best) * (1 + torch.rand(gain.shape, generator=lots))).argmax(0)    # (M, C)
    return best, code, torch.where(best > 1e-9, place.gather(0, code[None])[0], V)


def boost(bags, index, y, C, rounds=100, depth=3, rate=0.1):
    """Gradient-boosted classification trees (Friedman 2001, algorithm 6), with scikit-learn's conventions.

    bags, index: from bin_codes, of n training points and after them the test's; y: (n,) int64, 0..C-1. A
    round's trees, one a class (one in all for two), grow together. Returns the importance of each code (N,), its
    decrease of squared error summed over all trees, and the class predicted for every point (n + n_test,).
    """
    n, newton, lots = len(y), (C - 1) / C if C > 2 else 1.0, torch.Generator().manual_seed(0)
    one_hot = F.one_hot(y, C).float()                                                   # (n, C)
    start = one_hot.mean(0).clamp(min=1e-12).log()                                      # (C,)
    if C == 2:                                                      # one tree: the log odds of class 1
        start, one_hot = start[1:] - start[:1], one_hot[:, 1:]
    scores, importance = start.repeat(len(index), 1), torch.zeros(index.shape[1])       # (n + n_test, C), (N,)
    for _ in range(rounds):
        p = scores[:n].softmax(1) if C > 2 else scores[:n].sigmoid()                    # (n, C)
        residual = one_hot - p                                                          # minus the loss's gradient
        node = torch.zeros_like(scores, dtype=torch.int64)                              # (n + n_test, C)
        for level in range(depth):
            decrease, code, threshold = best_splits(bags, residual, node[:n], 2 ** level, lots)         # (M, C) each
            importance.index_add_(0, code.flatten(), decrease.flatten() / n)
            value = index.gather(1, code.gather(0, node))           # (n + n_test, C), bin of the code asked for
            node = 2 * node + (value > threshold.gather(0, node))                       # left 2m, right 2m + 1
        leaves = torch.zeros(2 ** depth, residual.shape[1])                             # (leaves, C)
        top = leaves.scatter_add(0, node[:n], residual)
        bottom = leaves.scatter_add(0, node[:n], p * (1 - p))       # Friedman's |r| (1 - |r|), newton his (K - 1) / K
        scores += rate * torch.where(bottom > 1e-12, newton * top / bottom, 0).gather(0, node)  # a Newton step a leaf
    return importance.numpy(), scores.argmax(1) if C > 2 else (scores[:, 0] > 0).long()


def dci(z_train, y_train, z_test, y_test, V=256):
    """Disentanglement, completeness, informativeness (Eastwood and Williams 2018).

    z_train, z_test: codes (n, N) float; y_train, y_test: factors (n, K) int. Returns a dict: disentanglement,
    completeness, informativeness_train and informativeness_test (mean accuracy), all in [0, 1]; accuracy (K, of the
    test points); importance (N, K), whose columns sum to 1. Deterministic. Raises ValueError.
    """
    n = len(z_train)
    z, y = checked(np.concatenate([z_train, z_test]), np.concatenate([y_train, y_test]))
    (index, bags), right, importance = bin_codes(z, n, V), [], []
    for column in torch.from_numpy(y).t():
        gain, guess = boost(bags, index, column[:n], int(column.max()) + 1)
        importance.append(gain / max(gain.sum(), 1e-30)), right.append(guess == column)
    R, right = np.stack(importance, axis=1), torch.stack(right).double()                # (N, K), (K, n + n_test)
    return dict(disentanglement=purity(R), completeness=purity(R.T), informativeness_train=right[:, :n].mean().item(),
                informativeness_test=right[:, n:].mean().item(), accuracy=right[:, n:].mean(1).tolist(), importance=R)


# ---- the other scores -----------------------------------------------------------------------------

def partners(y, first, rng):
    """Draws a factor for each point, (points,), and for each of its rows in `first` (points, batch) another row,
    like `first`, that has the same value of this factor. y: (n, K)."""
    factor, second = rng.integers(y.shape[1], size=len(first)), np.empty_like(first)
    for k, column in enumerate(y.T):
        order, counts, values = np.argsort(column, kind="stable"), np.bincount(column), column[first[factor == k]]
        place = (rng.random(values.shape) * counts[values]).astype(np.int64)            # which of those with the value
        second[factor == k] = order[(counts.cumsum() - counts)[values] + place]
    return factor, second


def factor_vae_score(z, y, seed=0, votes=(10000, 5000), batch=64, points=10000, least=0.05):
    """FactorVAE score (Kim and Mnih 2018). z: codes (n, N) float; y: factors (n, K) int.

    A vote: `batch` rows that share one factor's value elect the code that varies least among them, relative to its
    standard deviation over `points` rows, which must be `least` or more. votes: how many learn which factor each code
    stands for, how many test it. Returns the latter's accuracy, [0, 1]; 0 without codes. Raises ValueError.
    """
    z, y = checked(z, y)
    rng = np.random.default_rng(seed)
    deviation = z[rng.choice(len(z), min(points, len(z)), replace=False)].std(0)        # (N,)
    live = deviation >= least
    if not live.any():
        return 0.0
    z = z[:, live] / deviation[live]                                                    # (n, N live)
    factor, rows = partners(y, rng.integers(len(z), size=(sum(votes), 1)).repeat(batch, 1), rng)        # (votes, batch)
    elected = np.concatenate([z[part].var(axis=1).argmin(axis=1) for part in np.array_split(rows, 8)])  # (votes,)
    count = np.zeros((z.shape[1], y.shape[1]))                                          # (N live, K)
    np.add.at(count, (elected[:votes[0]], factor[:votes[0]]), 1)
    return float((count.argmax(1)[elected[votes[0]:]] == factor[votes[0]:]).mean())


def beta_vae_score(z, y, seed=0, points=(10000, 5000), batch=64):
    """beta-VAE score (Higgins et al. 2017): can a linear classifier tell which factor pairs share?

    z: codes (n, N) float; y: factors (n, K) int. A point is the mean of |difference| over `batch` pairs, each pair
    sharing its value of one factor. Returns the accuracy on the second of `points`, [0, 1]. Raises ValueError.
    """
    z, y = checked(z, y)
    rng = np.random.default_rng(seed)
    first = rng.integers(len(z), size=(sum(points), batch))                             # rows, (points, batch)
    factor, second = partners(y, first, rng)                                            # (points,), (points, batch)
    x = np.abs(z[first] - z[second]).mean(1)                                            # (points, N)
    # DEVIATION: standardised, so that a code's scale does not matter; scikit-learn's classifier would get x as it is
    x = (x - x[:points[0]].mean(0)) / (x[:points[0]].std(0) + 1e-12)                    # (points, N)
    x, target = F.pad(torch.from_numpy(x), (0, 1), value=1.0), torch.from_numpy(factor) # (points, N + 1), with a bias
    weight = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)                    # (N + 1, K)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        penalty = weight[:-1].square().sum() / (2 * points[0])                          # as scikit-learn's C = 1
        loss = F.cross_entropy(x[:points[0]] @ weight, target[:points[0]]) + penalty
        loss.backward()
        return loss
    optimizer.step(closure)
    return ((x[points[0]:] @ weight).argmax(1) == target[points[0]:]).float().mean().item()


def mig(z, y, seed=0, points=10000, n_bins=20):
    """Mutual information gap (Chen et al. 2018). z: codes (n, N) float; y: factors (n, K) int.

    The mean over factors of the gap between the two codes that know most of it, as a share of its entropy, [0, 1];
    over `points` rows, each code cut into n_bins equally wide bins. Raises ValueError.
    """
    z, y = checked(z, y)
    rows = np.random.default_rng(seed).choice(len(z), min(points, len(z)), replace=False)
    z, n, N = z[rows].astype(np.float64) - z[rows].min(0), len(rows), z.shape[1]
    v = np.minimum(z / np.where(z.max(0) > 0, z.max(0), 1) * n_bins, n_bins - 1).astype(np.int64)       # (n, N)
    gaps = []
    for column in y[rows].T:
        C = column.max() + 1
        cell = (np.arange(N) * n_bins + v) * C + column[:, None]                        # (n, N)
        joint = np.bincount(cell.ravel(), minlength=N * n_bins * C).reshape(N, n_bins, C) / n
        H_y = entropy(joint.sum(1))                                                     # (N,), all equal
        information = entropy(joint.sum(2)) + H_y - entropy(joint.reshape(N, -1))
        second, first = np.sort(np.append(information, 0))[-2:]     # with one code, the second knows nothing
        gaps.append((first - second) / H_y[0])
    return float(np.mean(gaps))


def dci_scores(z, y, seed=0, points=(10000, 5000), V=256):
    """dci of as many training and test rows, drawn without replacement."""
    z, y = checked(z, y, sum(points))
    fit, test = np.split(np.random.default_rng(seed).choice(len(z), sum(points), replace=False), points[:1])
    return dci(z[fit], y[fit], z[test], y[test], V)


def tad(z, y, seed=0, least=0.75, most=0.2):
    """TAD (Yeats et al. 2022): how far one code is ahead of all others in telling an attribute, summed.

    z: codes (n, N) float; y: attributes (n, A) of 0 and 1. Counted are attributes that some code tells with an area
    under the ROC curve of `least` or more, and of whose entropy no other attribute tells more than the share `most`.
    Returns tad, 0 or more, and attributes, how many were counted. Exact, by ranks; no draws, so no seed is used.
    """
    z, a = checked(z, y[:, (y != y[:1]).any(0)])                    # an attribute of one value tells nothing
    if a.max() > 1:
        raise ValueError("TAD is of attributes of 0 and 1, and there are factors of more values: see --metrics")
    n, n_1 = len(a), a.sum(0)                                       # n_1 (A,): how many are 1
    rank = [(np.searchsorted(code, z[:, k]) + np.searchsorted(code, z[:, k], "right") + 1) / 2      # ties share a rank
            for k, code in enumerate(np.sort(z, axis=0).T)]                             # N of (n,)
    area = (np.stack(rank) @ a - n_1 * (n_1 + 1) / 2) / (n_1 * (n - n_1))               # (N, A), by the sum of ranks
    second, best = np.sort(np.vstack([np.maximum(area, 1 - area), np.full(a.shape[1], 0.5)]), axis=0)[-2:]
    both = np.stack([x.T @ w for x in (a, 1 - a) for w in (a, 1 - a)], axis=-1)         # (A, A, 4)
    H = entropy(np.stack([n_1, n - n_1], axis=1))                                       # (A,)
    told = (H[:, None] + H - entropy(both.reshape(-1, 4)).reshape(len(H), -1)) * (1 - np.eye(len(H)))   # (A, A)
    counted = (best >= least) & (told.max(1) <= most * H)                               # (A,)
    return dict(tad=float((best - second)[counted].sum()), attributes=int(counted.sum()))


METRICS = {"factor_vae": factor_vae_score, "dci": dci_scores, "mig": mig, "beta_vae": beta_vae_score, "tad": tad}
USUAL = ["dci", "factor_vae", "mig", "beta_vae"]                    # where factors are known; DCI needs 15,000 points
PSNR_IMAGES, DDIM_STEPS, ETA = 256, 50, 0.0


def score_codes(z, y, metrics, seed=0):
    """The named metrics of codes z (n, N) with factors y (n, K): scores, the protocol's constants, and seconds."""
    scores, protocol, seconds = {}, {}, {}
    if metrics and y is None:
        raise ValueError("these images have neither factors nor attributes, by which codes could be scored")
    for name in metrics:
        started = time.monotonic()
        result = METRICS[name](z, y, seed)
        for score, value in (result if isinstance(result, dict) else {name: result}).items():
            scores[score] = value.round(4).tolist() if isinstance(value, np.ndarray) else value
        defaults = inspect.signature(METRICS[name]).parameters.values()
        protocol[name] = {p.name: p.default for p in defaults if p.name not in ("z", "y", "seed")}
        seconds[name] = round(time.monotonic() - started, 2)
    return scores, protocol, seconds


# ---- a finished run -------------------------------------------------------------------------------

class Run:
    """A finished run, from its folder alone. data: another data file to look at with it."""
    def __init__(self, folder, data=None, device="auto"):
        self.data, self.device, self.importance = data, train.choose_device(device), None  # by DCI, (N, K), later
        self.folder = Path(folder) / f"on-{Path(data).stem}" if data else Path(folder)  # where results go
        self.settings, self.vae, self.encoder, self.unet, self.step = train.load_run(folder, self.device)
        self.seconds = max([x["seconds"] for x in train.read_log(folder) if x["stage"] == "tokens"], default=0.0)
        self.ds = open_dataset(data or self.settings.data, self.settings.cache, "" if data else self.settings.dataset)
        self.folder.mkdir(exist_ok=True)
        self.diffusion = train.build_diffusion(self.settings).to(self.device)
        self.images = lambda index: self.ds.images(index).to(self.device)               # (B,) -> (B, 3, 64, 64)
        self.noise = lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.lacks = {f: f"--{name} {value}" for f, name, value in NEEDS if getattr(self.settings, name) != value}

    def rows(self, n, seed=0):
        """Numbers of n different images (all, if there are fewer), in the order drawn: (n,) int64."""
        return np.random.default_rng(seed).choice(len(self.ds), min(n, len(self.ds)), replace=False)

    def codes(self, batch_size=512):
        """One number for each token: z (n, N) float32; and y: factors (n, K), attributes (n, A) or None.

        Of all images, or settings.score_images of them: self.index. Kept in the run folder for the next time.
        DEVIATION: principal components of vector and slot tokens are found over 10,000 images, not over all.
        """
        self.index = np.sort(self.rows(self.settings.score_images or len(self.ds)))
        y = self.ds.attributes[self.index] if self.ds.attribute_names else None
        y = self.ds.factors(self.index).numpy() if self.ds.factor_names else y
        kept = self.folder / f"codes-{self.step}.npy"
        if kept.exists() and not self.data and (z := np.load(kept)).shape == (len(self.index), self.settings.tokens):
            return z, y
        code = number_coder(self.encoder, (self.images(part) for part in np.array_split(self.rows(10000), 40)))
        parts = tqdm(np.array_split(self.index, -(-len(self.index) // batch_size)), desc="codes", unit="batch")
        z = torch.cat([code(self.images(part)).cpu() for part in parts]).numpy()        # (n, N)
        if self.data is None:
            with whole(kept) as temporary, open(temporary, "wb") as file:
                np.save(file, z)
        return z, y

    def decode(self, tokens, desc=None):
        """Pictures (B, 3, 64, 64) in [-1, 1] that these tokens (B, N, D) alone describe.

        DEVIATION: 50 steps of DDIM with eta 0 from one starting noise for all (the authors': 200 steps, eta 1),
        so that pictures differ only where their tokens do.
        """
        noise, pictures = self.noise((1, *train.latent_shape(self.settings))), []
        for part in tqdm(tokens.split(128), desc=desc, leave=False):
            x_T = noise.repeat(len(part), 1, 1, 1)                                      # (B, Z, h, w)
            x_0 = self.diffusion.ddim_sample(lambda x, t: self.unet(x, t, part), x_T, DDIM_STEPS, ETA)
            pictures.append(self.vae.decode(x_0).clamp(-1, 1))                          # (B, 3, 64, 64)
        return torch.cat(pictures)


# ---- drawing --------------------------------------------------------------------------------------

FONT, GAP = ImageFont.load_default(13), 2
COLOURS = {"linear": "#1f77b4", "sqrt_linear": "#ff7f0e", "sqrt": "#2ca02c", "cosine": "#d62728"}
T_TICKS = [(str(t), t / 1000) for t in range(0, 1001, 200)]


class Canvas:
    """A white sheet and the few things that figures need. box: (x, y, width, height) in pixels."""
    def __init__(self, width, height):
        self.image = Image.new("RGB", (int(width), int(height)), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, anchor="mm", colour="black"):
        self.pen.text((x, y), text, colour, FONT, anchor)

    def axes(self, box, x_ticks, y_ticks, x_label="", title="", curves=()):
        """A frame. Ticks: pairs (label, place), place 0 left or bottom, 1 right or top. curves: (places, colour)."""
        x, y, w, h = box
        self.pen.rectangle((x, y, x + w, y + h), outline="black")
        for label, place in x_ticks:
            self.pen.line((x + place * w, y + h, x + place * w, y + h + 4), "black")
            self.text(x + place * w, y + h + 12, label)
        for label, place in y_ticks:
            self.pen.line((x - 4, y + h - place * h, x, y + h - place * h), "black")
            self.text(x - 8, y + h - place * h, label, "rm")
        for places, colour in curves:                               # evenly spaced from left to right
            self.pen.line([(x + i / len(places) * w, y + h - v * h) for i, v in enumerate(places)], colour, 2)
        self.text(x + w / 2, y + h + 30, x_label), self.text(x + w / 2, y - 12, title)


def grid(rows, labels, notes=()):
    """An Image of `rows` of pictures, each (columns, 3, H, W) in [-1, 1], flush right, its label to the left.

    Picture j of row i begins at x = width - (columns_i - j) (W + 2), y = i (H + 2). notes: lines of text below.
    """
    H, W = (side + GAP for side in rows[0].shape[2:])
    width = int(max(FONT.getlength(label) + len(row) * W for row, label in zip(rows, labels))) + 20
    sheet = Canvas(width, len(rows) * H + 18 * len(notes))
    for i, (row, label) in enumerate(zip(rows, labels)):
        sheet.text(width - len(row) * W - 8, i * H + H // 2, label, "rm")
        row = F.pad(row.clamp(-1, 1), (0, GAP, 0, GAP), value=1).permute(2, 0, 3, 1)    # (H, columns, W, 3)
        pixels = ((row.flatten(1, 2) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        sheet.image.paste(Image.fromarray(pixels), (width - pixels.shape[1], i * H))
    for i, note in enumerate(notes):
        sheet.text(width - 8, len(rows) * H + 18 * i + 9, note, "rm")
    return sheet.image


# ---- figures: each writes one PNG (and perhaps more) into the run folder ---------------------------

def reconstruction(run):
    """Originals, autoencoder only, rebuilt from tokens, difference. Returns mse (pixels in [0, 1]) and psnr (dB)."""
    images = run.images(run.rows(PSNR_IMAGES, seed=1))                                  # (B, 3, 64, 64)
    rebuilt = run.decode(run.encoder(images), "reconstruction")                         # (B, 3, 64, 64)
    first_stage = run.vae.decode(run.vae.encode(images)).clamp(-1, 1)                   # (B, 3, 64, 64)
    mse = [(x - images).square().mean().item() / 4 for x in (first_stage, rebuilt)]
    notes = [f"{name}: MSE {e:.5f}, PSNR {-10 * math.log10(e):.1f} dB ({len(images)} pictures)"
             for name, e in zip(("autoencoder only", "from tokens"), mse)]
    grid([x[:10] for x in (images, first_stage, rebuilt, rebuilt - images)],
         ["original", "autoencoder only", "from tokens", "difference"], notes).save(run.folder / "reconstruction.png")
    return dict(mse=mse[1], psnr=-10 * math.log10(mse[1]))


def token_names(run):
    """All tokens, ordered by the factor they follow, idle ones (importance < 0.02) last; those not idle; all names."""
    order = list(range(run.settings.tokens))
    if run.importance is None:                                      # no factors, or no DCI
        return order, order, [f"token {n}" for n in order]
    factor, weight = np.argmax(run.importance, 1), np.max(run.importance, 1)            # (N,) each
    names = [f"token {n}: {run.ds.factor_names[factor[n]].replace('_', ' ')} {w:.2f}" if w >= 0.02
             else f"token {n}: idle" for n, w in enumerate(weight)]
    order = np.lexsort((-weight, factor, weight < 0.02)).tolist()
    return order, order[:(weight >= 0.02).sum()], names


def swap(run, columns=8):
    """The paper's grid: sources along the top; below, in every row one token of the target is put into each."""
    index = run.rows(2000, seed=2)
    if run.importance is not None:                                  # sources that share nothing with the target
        differ = (run.ds.factors(index) != run.ds.factors(index[:1])).all(1).numpy()
        index = np.concatenate([index[:1], index[differ]])
    images = run.images(index[:columns + 1])                                            # the target first
    target, sources = run.encoder(images).split([1, columns := len(images) - 1])        # (1, N, D), (columns, N, D)
    order, _, names = token_names(run)
    edits = sources.repeat(1 + len(names), 1, 1, 1)                                     # (1 + N, columns, N, D)
    edits[range(1, 1 + len(names)), :, order] = target[0, order, None]                  # row by row one token's
    pictures = run.decode(edits.flatten(0, 1), "swap").unflatten(0, (-1, columns))      # (1 + N, columns, 3, H, W)
    names = ["target, sources", "sources, rebuilt", *(names[n] for n in order)]
    grid([images, *pictures], names).save(run.folder / "swap.png")


def traversal(run, columns=9):
    """One row a used token: its scalar goes from the 1st to the 99th percentile over the data; also as a GIF."""
    _, used, names = token_names(run)
    z = torch.from_numpy(np.quantile(run.codes()[0][:, used], np.linspace(0.01, 0.99, columns), axis=0)).float()
    edits = run.encoder.scalars(run.images(run.rows(1, seed=3))).repeat(len(used), columns, 1)  # (rows, columns, N)
    edits[range(len(used)), :, used] = z.t().to(edits)
    pictures = run.decode(run.encoder.tokens_of(edits.flatten(0, 1)), "traversal").unflatten(0, (-1, columns))
    sheet = lambda columns: grid(pictures[:, columns], [names[n] for n in used])
    sheet(range(columns)).save(run.folder / "traversal.png")
    frames = [sheet([j]) for j in [*range(columns), *range(columns - 2, 0, -1)]]
    frames[0].save(run.folder / "traversal.gif", save_all=True, append_images=frames[1:], duration=150, loop=0)


def attention(run, count=3):
    """Each used token's cross-attention map over pictures, mean over heads and blocks, for three ranges of t."""
    images = run.images(run.rows(count, seed=4))                                        # (count, 3, 64, 64)
    again = lambda x: x.repeat_interleave(9, 0)                     # nine t for every picture
    x_0, tokens, shares = again(run.vae.encode(images)), again(run.encoder(images)), []
    for lowest in (667, 333, 0):
        maps, t = [], torch.arange(lowest, lowest + 333, 37, device=run.device).repeat(count)
        run.unet(run.diffusion.q_sample(x_0, t, run.noise(x_0.shape)), t, tokens, maps)
        shares.append(attention_pictures(maps, images.shape[-1]).unflatten(0, (count, 9)).mean(1))
    shares = torch.cat(shares).transpose(0, 1)[:, :, None]                              # (N, 3 count, 1, 64, 64)
    _, used, names = token_names(run)
    red = torch.tensor([1.0, -0.6, -1.0], device=run.device)[:, None, None]             # (3, 1, 1)
    grey = (0.5 * images.mean(1, keepdim=True) + 0.3).repeat(3, 3, 1, 1)                # (3 count, 3, 64, 64)
    rows = [images.repeat(3, 1, 1, 1), *(torch.lerp(grey, red, 0.8 * shares[n] / shares[n].max()) for n in used)]
    note = "early, middle and late in sampling (t 667 to 963, 333 to 629, 0 to 296); each row has its own scale"
    grid(rows, ["picture", *(names[n] for n in used)], [note]).save(run.folder / "attention.png")


def bottleneck(run):
    """The paper's bottleneck curve for the four schedules, with our latents and at the paper's scale; also as CSV."""
    sheet, columns = Canvas(860, 330), {"t": np.arange(1000)}
    for x, mean_square, factor, title in ((60, 1.0, 1, "KL per dimension, unit-variance latents"),
                                          (480, 67.6, 2, "twice the KL, mean square 67.6: as in the paper")):
        kl = {name: factor * Diffusion(name).kl_to_noise(mean_square).numpy() for name in SCHEDULES}
        columns.update({f"{name}_{mean_square:g}": values for name, values in kl.items()})
        top = 4 * math.ceil(max(values.max() for values in kl.values()) / 4)
        sheet.axes((x, 30, 350, 230), T_TICKS, [(f"{top * v / 4:g}", v / 4) for v in range(5)], "t", title,
                   [(values / top, COLOURS[name]) for name, values in kl.items()])
        for j, name in enumerate(kl):
            sheet.text(x + 330, 50 + 18 * j, name, "rm", COLOURS[name])
    sheet.image.save(run.folder / "bottleneck.png")
    values, head = np.stack([*columns.values()], axis=1), ",".join(columns)             # (1000, 9)
    np.savetxt(run.folder / "bottleneck.csv", values, "%.6g", ",", header=head, comments="")


def when(run):
    """Which token matters when: a heat map tokens x t of rise_of_loss, below the bottleneck curve."""
    images = run.images(run.rows(64, seed=5))                                           # (B, 3, 64, 64)
    x_0, tokens, kl = run.vae.encode(images), run.encoder(images), run.diffusion.kl_to_noise().cpu().numpy()
    rise = np.stack([rise_of_loss(run.unet, run.diffusion, x_0, tokens, run.noise(x_0.shape), t).cpu().numpy()
                     for t in tqdm(range(25, 1000, 50), desc="when", leave=False)], 1)  # (N, levels)
    (order, _, names), top, colour = token_names(run), rise.max(), COLOURS[run.settings.schedule]
    sheet, height = Canvas(700, 240 + 18 * len(names)), 18 * len(names)
    sheet.axes((190, 30, 480, 110), [], [("0", 0), (f"{kl.max():.1f}", 1)], "",
               f"bottleneck: KL per dimension, {run.settings.schedule}", [(kl / kl.max(), colour)])
    shade = 255 - np.clip(rise[order] / top, 0, 1)[..., None] * np.array([235, 185, 115])       # white to dark blue
    sheet.image.paste(Image.fromarray(shade.round().astype(np.uint8)).resize((480, height), Image.NEAREST), (190, 190))
    sheet.axes((190, 190, 480, height), T_TICKS, [(names[n], 1 - (i + 0.5) / len(order)) for i, n in enumerate(order)],
               "t", f"rise of the loss when the token is another picture's (dark: {top:.3f})")
    sheet.image.save(run.folder / "when.png")


FIGURES = {f.__name__: f for f in (reconstruction, swap, traversal, attention, bottleneck, when)}
NEEDS = [("traversal", "encoder", "scalar"), ("attention", "conditioning", "cross-attention"),
         *((name, "objective", "diffusion") for name in ("attention", "bottleneck", "when"))]


# ---- the command ----------------------------------------------------------------------------------

COLUMNS = {"factor_vae": "FactorVAE", "disentanglement": "DCI D", "completeness": "DCI C",
           "informativeness_test": "DCI I", "mig": "MIG", "beta_vae": "beta-VAE", "tad": "TAD", "psnr": "PSNR",
           "parameters": "parameters", "step": "steps", "minutes": "minutes"}


def table(results):
    """Prints a line for each setting: what differs and is no default, n seeds, means over them +- their deviations."""
    settings, lines = [{**r["settings"], "steps": r.get("step")} for r in results], {}  # steps: those taken
    differ = [k for k, v in settings[0].items() if k not in train.NOT_COMPARED and any(s.get(k) != v for s in settings)]
    for r, s in zip(results, settings):
        name = ", ".join([r["data"], *(f"{k} {s[k]}" for k in differ if s.get(k) != getattr(train.Settings, k, None))])
        lines.setdefault(name, []).append({**r, **r["scores"]})
    columns, width = [c for c in COLUMNS if any(c in {**r, **r["scores"]} for r in results)], max(map(len, lines))
    print(f"{'':{width}}  runs", *(f"{COLUMNS[c]:>16}" for c in columns))
    for key, rows in lines.items():
        values = np.array([[row.get(c, math.nan) for c in columns] for row in rows], dtype=float)       # (seeds, ..)
        means = [f"{m:.0f}" if c in ("parameters", "step") else f"{m:.3f}" for c, m in zip(columns, values.mean(0))]
        spreads = [f" +- {s:.3f}" if s else "" for s in values.std(0, ddof=min(1, len(rows) - 1))]
        print(f"{key:{width}}  {len(rows):4}", *(f"{mean + spread:>16}" for mean, spread in zip(means, spreads)))


def held_out(run, z, y):
    """MSE of rebuilding, and accuracy of trees that learned from seen codes, of seen and unseen images apart."""
    parts, result = hold_out(run.ds, run.settings.holdout, run.settings.holdout_factors), {}
    seen, unseen = (np.random.default_rng(0).permutation(np.flatnonzero(np.isin(run.index, part))) for part in parts)
    n = min(10000, 2 * len(seen) // 3)                              # seen images from which the trees learn
    for name, rows in (("seen", seen[n:n + 5000]), ("unseen", unseen[:5000])):
        if not len(rows):
            continue                                                # none of them is among the images that are scored
        images = run.images(run.index[rows[:PSNR_IMAGES]])                              # (B, 3, 64, 64)
        rebuilt = run.decode(run.encoder(images), name)                                 # (B, 3, 64, 64)
        result[name] = dict(images=len(rows), mse=(rebuilt - images).square().mean().item() / 4)
        if run.ds.factor_names:
            result[name].update(zip(run.ds.factor_names, dci(z[seen[:n]], y[seen[:n]], z[rows], y[rows])["accuracy"]))
        print(f"{name} images:", *(f"{key} {value:.4g}" for key, value in result[name].items()))
    return result


def score_run(run, metrics, again=True):
    """Scores a run (if not done before, or `again`), draws two pictures; returns what it writes into scores.json."""
    started, file, s = time.monotonic(), run.folder / "scores.json", run.settings
    old = json.loads(file.read_text()) if file.exists() else {}
    old = old if [old.get(k) for k in ("step", "data")] == [run.step, run.ds.name] else {}      # of this checkpoint
    if old and not again:                                           # else what is not measured now stays
        return old
    z, y = run.codes()
    usual = USUAL[len(z) < 15000:] if run.ds.factor_names else ["tad"] if run.ds.attribute_names else []
    scores, protocol, seconds = score_codes(z, y, metrics or usual, s.seed)
    run.importance = scores.get("importance", old.get("scores", {}).get("importance"))
    scores.update(reconstruction(run)), swap(run)
    protocol["psnr"] = dict(images=PSNR_IMAGES, ddim_steps=DDIM_STEPS if s.objective == "diffusion" else 1, eta=ETA)
    seconds["all"] = round(time.monotonic() - started, 2)           # also the codes and the two pictures
    new = dict(scores=scores, seconds=seconds, protocol=protocol)
    result = dict(data=run.ds.name, step=run.step, seed=s.seed, images=len(z), factors=run.ds.factor_names,
                  **{key: {**old.get(key, {}), **new[key]} for key in new}, minutes=round(run.seconds / 60, 2),
                  parameters=sum(p.numel() for part in (run.encoder, run.unet) for p in part.parameters()),
                  settings=dataclasses.asdict(s))
    train.write_json(file, result)
    if (s.holdout or s.holdout_factors) and not run.data:
        train.write_json(file, {**result, "held_out": held_out(run, z, y)})
    return result


def main(argv=None):
    """Scores runs or codes and prints a table, or draws figures. ValueError or OSError with one clear sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; of several, only unscored ones are scored")
    parser.add_argument("--codes", metavar="FILE", help="an .npz file with arrays z (n, N) and y (n, K) to score")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="only these scores")
    parser.add_argument("--figures", nargs="*", choices=FIGURES, help="draw these figures, or all, instead of scoring")
    parser.add_argument("--data", help="another data file to look at with the runs")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps [the first of cuda, mps, cpu that is there]")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.codes) or args.codes and (args.data or args.figures is not None):
        raise ValueError("name run folders, or codes with --codes FILE (no pictures, no --data), and not both")
    results = []
    if args.codes:
        with open(args.codes, "rb") as file, reading(f"{args.codes} (wanted: .npz, arrays z (n, N) and y (n, K))"):
            z, y = (np.lib.npyio.NpzFile(file)[name].astype(float) for name in ("z", "y"))
        named = zip(("scores", "protocol", "seconds"), score_codes(z, y, args.metrics or USUAL))
        results = [dict(data=args.codes, settings={}, **dict(named))]
    runs = [Run(folder, args.data, args.device) for folder in args.runs]
    for run, f in ((run, f) for run in runs for f in args.figures or [] if f in run.lacks):
        raise ValueError(f"figure {f} needs a run with {run.lacks[f]}, which {run.folder} is not")
    for run in runs:
        if args.figures is None:
            results.append(score_run(run, args.metrics, again=len(runs) == 1 or bool(args.metrics)))
            continue
        if run.ds.factor_names and len((codes := run.codes())[0]) >= 15000:             # else rows are named by number
            run.importance = dci_scores(*codes, run.settings.seed)["importance"]
        for name in tqdm(args.figures or [f for f in FIGURES if f not in run.lacks], desc="figures"):
            FIGURES[name](run)
    if results:
        table(json.loads(json.dumps(results)))                      # tuples become lists, as in scores.json
    return results


if __name__ == "__main__":
    end_with(main)
