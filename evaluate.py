"""The scores of disentanglement and the pictures: reads a finished run, or anybody's codes.

    python evaluate.py RUN [RUN ...]            # scores of run folders in one table, and two pictures of each
    python evaluate.py RUN --figures [NAME ...] # the paper's pictures and its bottleneck analysis
    python evaluate.py --codes FILE.npz         # scores of arrays z (n, N) and y (n, K), no model needed

Implements the FactorVAE score, DCI, MIG and the beta-VAE score with the protocol of EncDiff's authors; the
functions of the first half work on plain arrays and can be copied without the rest. Then the figures.
Exports: dci, factor_vae_score, beta_vae_score, mig, Run, main.

Letters:  n points (images), N codes, K factors, C classes (values of one factor), V bins of a code,
M nodes of a tree's level, B batch, D token dimension, Z, h, w the latent's channels and sides.
"""
import argparse
import dataclasses
import inspect
import json
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import train
from data import open_dataset
from diffusion import SCHEDULES, Diffusion
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
    for k, (values, _) in enumerate(classes):
        if len(values) < 2:
            raise ValueError(f"factor {k} has one value in these {len(y)} points: leave it out, it cannot be scored")
    if len(z) < points:
        raise ValueError(f"DCI needs {points} points, {len(z)} are there: give more, or leave it out by --metrics")
    return z.astype(np.float32), np.stack([inverse for _, inverse in classes], axis=1)


def entropy(p, base=math.e):
    """Entropy of the rows of p (rows, columns), each first divided by its sum, in this base. (rows,)"""
    p = p / p.sum(1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1) / max(np.log(base), 1e-300)      # 0 log 0 = 0


def purity(R):
    """How far each row of importances R (rows, columns) is one column's alone: the mean of 1 - entropy, [0, 1].

    Rows weigh as much as their share of all importance (Eastwood and Williams 2018, section 2).
    """
    share = R.sum(1) / R.sum() if R.any() else np.full(len(R), 1 / len(R))              # (rows,)
    return float((share * (1 - entropy(R + 1e-11, R.shape[1]))).sum())


# ---- DCI: gradient-boosted trees ------------------------------------------------------------------

class Bins:
    """Codes cut into at most V bins each, so that a tree only has to look at V - 1 thresholds.

    A code with few values keeps each in a bin of its own. A histogram over all bins of all codes is a sum of
    the rows of a table that are in each bin: an embedding bag, in PyTorch's words.
    DEVIATION: at most V - 1 thresholds a code (scikit-learn, which the authors call, tries all).
    """

    def __init__(self, z, V):
        self.V, self.edges = V, []
        for code in torch.as_tensor(z).t():
            values, count = code.unique(return_counts=True)                             # ascending
            edges = (values[:-1] + values[1:]) / 2                  # midway, as scikit-learn's trees
            if len(values) > V:             # half of the edges in the widest gaps, half after equally many points
                widest = values.diff().topk(V // 2).indices
                even = torch.searchsorted(count.cumsum(0), torch.arange(1, V // 2) * len(code) // (V // 2))
                edges = edges[torch.cat([widest, even.clamp(max=len(edges) - 1)]).unique()]
            self.edges.append(edges)
        self.index = self.of(z)                                                         # (n, N), 0..V-1
        bag = self.index + V * torch.arange(self.index.shape[1])                        # (n, N), 0..N*V-1
        self.rows = bag.t().flatten().argsort(stable=True) % len(z)                     # (N*n,) bag by bag
        count = torch.bincount(bag.flatten(), minlength=V * bag.shape[1])               # (N*V,)
        self.offsets = count.cumsum(0) - count                                          # (N*V,) where a bag starts

    def of(self, z):
        """Bin of every code: z (n, N) -> (n, N) int64, 0..V-1; bin v holds edge v-1 < z <= edge v."""
        return torch.stack([torch.bucketize(code.contiguous(), edges)
                            for code, edges in zip(torch.as_tensor(z).t(), self.edges)], dim=1)


def best_splits(bins, residual, node, parents):
    """The best split of every node of one level of C trees: the largest decrease of squared error (Friedman 2001).

    residual, node: (n, C), the targets of the C trees (1 for two classes) and the node 0..M-1 of each point.
    parents: the third value returned for the level above (None at the top); less its left children's sums, these
    are its right children's. Returns the decrease (M, C) (0: nothing to split), a pair of (M, C), the code and the
    bin up to which points go left, and the sums (N, V, 2, M, C) of residuals and points in all bins up to each.
    """
    n, C = residual.shape
    lefts = 1 if parents is None else parents.shape[3]
    inside = (node[:, None, :] == 2 * torch.arange(lefts)[:, None]).float()             # (n, M/2, C)
    table = torch.stack([residual[:, None, :] * inside, inside], dim=1)                 # (n, 2, M/2, C)
    below = F.embedding_bag(bins.rows, table.view(n, -1), bins.offsets, mode="sum")     # (N*V, 2 * M/2 * C)
    below = below.view(-1, bins.V, 2, lefts, C).cumsum(1)                               # (N, V, 2, M/2, C)
    if parents is not None:
        below = torch.stack([below, parents - below], dim=4).flatten(3, 4)              # (N, V, 2, M, C)
    total = below[0, -1]                                                                # (2, M, C)
    (sum_l, n_l), (sum_r, n_r) = below.unbind(2), (total - below).unbind(2)             # (N, V, M, C) each
    decrease = sum_l ** 2 / n_l + sum_r ** 2 / n_r                                      # nan or inf: a side is empty
    decrease = (decrease - total[0] ** 2 / total[1]).nan_to_num(0, 0, 0).clamp(min=0)
    best, place = decrease.flatten(0, 1).max(0)                                         # (M, C); first code wins
    return best, (place // bins.V, torch.where(best > 1e-9, place % bins.V, bins.V)), below


def boost(bins, index, y, C, rounds=100, depth=3, rate=0.1):
    """Gradient-boosted classification trees (Friedman 2001, algorithm 6), with scikit-learn's conventions.

    bins: of the n training codes; index: (n + n_test, N) from bins.of, training points first; y: (n,) int64
    classes 0..C-1. All trees of a round are grown together, one a class (one in all for two classes).
    Returns the importance of each code (N,), its decrease of squared error summed over all trees, and the
    class predicted for every point (n + n_test,).
    """
    n, newton = len(y), (C - 1) / C if C > 2 else 1.0
    one_hot = F.one_hot(y, C).float()                                                   # (n, C)
    start = one_hot.mean(0).clamp(min=1e-12).log()                                      # (C,)
    if C == 2:                                                      # one tree: the log odds of class 1
        start, one_hot = start[1:] - start[:1], one_hot[:, 1:]
    scores, importance = start.repeat(len(index), 1), torch.zeros(index.shape[1])       # (n + n_test, C), (N,)
    for _ in range(rounds):
        p = scores[:n].softmax(1) if C > 2 else scores[:n].sigmoid()                    # (n, C)
        residual = one_hot - p                                                          # minus the loss's gradient
        node, sums = torch.zeros_like(scores, dtype=torch.int64), None                  # (n + n_test, C)
        for _ in range(depth):
            decrease, (code, threshold), sums = best_splits(bins, residual, node[:n], sums)     # (M, C) each
            importance.index_add_(0, code.flatten(), decrease.flatten() / n)
            value = index.gather(1, code.gather(0, node))           # (n + n_test, C), bin of the code asked for
            node = 2 * node + (value > threshold.gather(0, node))                       # left 2m, right 2m + 1
        leaves = torch.zeros(2 ** depth, residual.shape[1])                             # (leaves, C)
        top = leaves.scatter_add(0, node[:n], residual)
        bottom = leaves.scatter_add(0, node[:n], p * (1 - p))
        step = torch.where(bottom > 1e-12, newton * top / bottom, 0)                    # one Newton step a leaf
        scores += rate * step.gather(0, node)
    return importance.numpy(), scores.argmax(1) if C > 2 else (scores[:, 0] > 0).long()


def dci(z_train, y_train, z_test, y_test, V=256):
    """Disentanglement, completeness, informativeness (Eastwood and Williams 2018, section 2).

    z_train, z_test: codes (n, N) float; y_train, y_test: factors (n, K) int. Returns a dict with
    disentanglement and completeness in [0, 1], informativeness_train and informativeness_test (mean
    accuracy, [0, 1]), accuracy (K numbers, of the test points) and importance (N, K), whose columns sum to 1.
    Deterministic. Two codes that are copies share nothing: the first takes all the importance (scikit-learn
    draws lots). Raises ValueError.
    """
    n = len(z_train)
    z, y = checked(np.concatenate([z_train, z_test]), np.concatenate([y_train, y_test]))
    bins = Bins(z[:n], V)
    index, right, importance = bins.of(z), [], []
    for column in torch.from_numpy(y).t():
        gain, guess = boost(bins, index, column[:n], int(column.max()) + 1)
        importance.append(gain / gain.sum() if gain.any() else gain)
        right.append(guess == column)
    R, right = np.stack(importance, axis=1), torch.stack(right).double()                # (N, K), (K, n + n_test)
    return dict(disentanglement=purity(R), completeness=purity(R.T), importance=R,
                accuracy=right[:, n:].mean(1).tolist(), informativeness_train=right[:, :n].mean().item(),
                informativeness_test=right[:, n:].mean().item())


# ---- the other scores -----------------------------------------------------------------------------

def sharing(column, values, rng):
    """For each of `values` (any shape) the number of a row, drawn at random, in which `column` (n,) has it."""
    order, counts = np.argsort(column, kind="stable"), np.bincount(column)
    return order[(counts.cumsum() - counts)[values] + (rng.random(values.shape) * counts[values]).astype(np.int64)]


def factor_vae_score(z, y, seed=0, votes=(10000, 5000), batch=64, points=10000, least=0.05):
    """FactorVAE score (Kim and Mnih 2018, section 4). z: codes (n, N) float; y: factors (n, K) int.

    A vote: `batch` rows that share the value of one factor elect the code that varies least among them, relative
    to its standard deviation over `points` rows, which must be `least` or more. votes: how many learn which factor
    each code stands for, how many test it. Returns the latter's accuracy, [0, 1]; 0 without codes. ValueError.
    """
    z, y = checked(z, y)
    rng = np.random.default_rng(seed)
    deviation = z[rng.choice(len(z), min(points, len(z)), replace=False)].std(0)        # (N,)
    live = deviation >= least
    if not live.any():
        return 0.0
    z = z[:, live] / deviation[live]                                                    # (n, N live)
    factor, elected = rng.integers(y.shape[1], size=sum(votes)), np.empty(sum(votes), dtype=np.int64)
    for k, column in enumerate(y.T):
        mine = np.flatnonzero(factor == k)
        value = column[rng.integers(len(column), size=len(mine))]                       # (votes on k,)
        rows = sharing(column, value[:, None].repeat(batch, 1), rng)                    # (votes on k, batch)
        elected[mine] = z[rows].var(axis=1).argmin(axis=1)
    count = np.zeros((z.shape[1], y.shape[1]))                                          # (N live, K)
    np.add.at(count, (elected[:votes[0]], factor[:votes[0]]), 1)
    return float((count.argmax(1)[elected[votes[0]:]] == factor[votes[0]:]).mean())


def beta_vae_score(z, y, seed=0, points=(10000, 5000), batch=64):
    """beta-VAE score (Higgins et al. 2017, appendix): can a linear classifier tell which factor pairs share?

    z: codes (n, N) float; y: factors (n, K) int. A point is the mean of |difference| over `batch` pairs,
    each pair sharing its value of one factor. Returns the accuracy on the second of `points`, [0, 1].
    """
    z, y = checked(z, y)
    rng = np.random.default_rng(seed)
    factor, x = rng.integers(y.shape[1], size=sum(points)), np.empty((sum(points), z.shape[1]), dtype=np.float32)
    for k, column in enumerate(y.T):
        mine = np.flatnonzero(factor == k)
        first = rng.integers(len(z), size=(len(mine), batch))                           # rows, (points of k, batch)
        x[mine] = np.abs(z[first] - z[sharing(column, column[first], rng)]).mean(1)     # (points of k, N)
    x = (x - x[:points[0]].mean(0)) / (x[:points[0]].std(0) + 1e-12)                    # so that the penalty is fair
    x, target = torch.from_numpy(x), torch.from_numpy(factor)
    x = F.pad(x, (0, 1), value=1.0)                                                     # (points, N + 1), for the bias
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
    """Mutual information gap (Chen et al. 2018, equation 6). z: codes (n, N) float; y: factors (n, K) int.

    Each code is cut into n_bins equally wide bins over `points` rows. Returns the mean over factors of the
    gap between the two codes that know most about it, as a share of the factor's entropy, [0, 1].
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
    rows = np.random.default_rng(seed).choice(len(z), sum(points), replace=False)
    return dci(z[rows[:points[0]]], y[rows[:points[0]]], z[rows[points[0]:]], y[rows[points[0]:]], V)


METRICS = {"factor_vae": factor_vae_score, "dci": dci_scores, "mig": mig, "beta_vae": beta_vae_score}
PSNR_IMAGES, DDIM_STEPS, ETA = 256, 50, 0.0


def score_codes(z, y, metrics, seed=0):
    """The named metrics of codes z (n, N) with factors y (n, K): scores, the protocol's constants, and seconds."""
    scores, protocol, seconds = {}, {}, {}
    for name in metrics:
        started = time.monotonic()
        result = METRICS[name](z, y, seed)
        scores.update(result if isinstance(result, dict) else {name: result})
        defaults = inspect.signature(METRICS[name]).parameters.values()
        protocol[name] = {p.name: p.default for p in defaults if p.name not in ("z", "y", "seed")}
        seconds[name] = round(time.monotonic() - started, 2)
    return scores, protocol, seconds


# ---- a finished run -------------------------------------------------------------------------------

class Run:
    """A finished run, from its folder alone. data: another data file to look at with it."""
    def __init__(self, folder, data=None, device="auto"):
        self.data, self.device = data, train.choose_device(device)
        self.folder = Path(folder) / f"on-{Path(data).stem}" if data else Path(folder)  # where results go
        self.settings, self.vae, self.encoder, self.unet, self.step = train.load_run(folder, self.device)
        self.seconds = max([x["seconds"] for x in train.read_log(folder) if x["stage"] == "tokens"], default=0.0)
        self.ds = open_dataset(data or self.settings.data or None)
        self.folder.mkdir(exist_ok=True)
        self.diffusion = train.build_diffusion(self.settings).to(self.device)
        self.importance = None                                      # (N, K) by DCI, once it is known

    def images(self, index):
        """index: (B,) ints. Returns (B, 3, 64, 64) in [-1, 1]."""
        return self.ds.images(index).to(self.device)

    def rows(self, n, seed=0):
        """Numbers of n different images, in the order drawn: (n,) int64."""
        return np.random.default_rng(seed).choice(len(self.ds), n, replace=False)

    def noise(self, shape):
        """Standard normal numbers, always the same, on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def codes(self, batch_size=512):
        """One number for each token and image: z (n, N) float32, and the factors y (n, K) of these images.

        All images, or settings.score_images of them; kept in the run folder and read from there the next time.
        DEVIATION: principal components of vector and slot tokens are found over 10,000 images, not over all.
        """
        n = min(self.settings.score_images or len(self.ds), len(self.ds))
        index = np.arange(n) if n == len(self.ds) else np.sort(self.rows(n))
        y, kept = self.ds.factors(index).numpy(), self.folder / f"codes-{self.step}.npy"
        if kept.exists() and self.data is None:
            z = np.load(kept)
            if z.shape == (n, self.settings.tokens):
                return z, y
        code = number_coder(self.encoder, (self.images(part) for part in np.array_split(self.rows(min(n, 10000)), 40)))
        parts = np.array_split(index, -(-n // batch_size))
        z = torch.cat([code(self.images(part)).cpu() for part in tqdm(parts, desc="codes", unit="batch")]).numpy()
        if self.data is None:
            train.write_whole(kept, lambda path: np.save(path, z))
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
    """A sheet of `rows` of pictures, each (columns, 3, H, W) in [-1, 1], with its label left of it; an Image.

    All rows end at the right edge: picture j of row i begins at x = width - (columns_i - j) (W + 2),
    y = i (H + 2). notes: lines of text below.
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
    mse = [((x - images) / 2).square().mean().item() for x in (first_stage, rebuilt)]
    notes = [f"{name}: MSE {e:.5f}, PSNR {-10 * math.log10(e):.1f} dB ({len(images)} pictures)"
             for name, e in zip(("autoencoder only", "from tokens"), mse)]
    grid([x[:10] for x in (images, first_stage, rebuilt, rebuilt - images)],
         ["original", "autoencoder only", "from tokens", "difference"], notes).save(run.folder / "reconstruction.png")
    return dict(mse=mse[1], psnr=-10 * math.log10(mse[1]))


def token_names(run):
    """The tokens that are used, ordered by the factor they follow, the idle ones, and a name for every token."""
    if run.importance is None:                                      # data without factors
        return list(range(run.settings.tokens)), [], [f"token {n}" for n in range(run.settings.tokens)]
    factor, weight = run.importance.argmax(1), run.importance.max(1)                    # (N,) each
    order = np.lexsort((-weight, factor)).tolist()
    names = [f"token {n}: {run.ds.factor_names[factor[n]].replace('_', ' ')} {w:.2f}" if w >= 0.02
             else f"token {n}: idle" for n, w in enumerate(weight)]
    return [n for n in order if weight[n] >= 0.02], [n for n in order if weight[n] < 0.02], names


def swap(run, columns=8):
    """The paper's grid: sources along the top; below, in every row one token of the target is put into each."""
    index = run.rows(2000, seed=2)
    if run.importance is not None:                                  # sources that share nothing with the target
        differ = (run.ds.factors(index) != run.ds.factors(index[:1])).all(1).numpy()
        index = np.concatenate([index[:1], index[differ]])
    images = run.images(index[:columns + 1])                                            # the target first
    target, sources = run.encoder(images).split([1, columns])                           # (1, N, D), (columns, N, D)
    used, idle, names = token_names(run)
    edits = sources.repeat(1 + len(names), 1, 1, 1)                                     # (1 + N, columns, N, D)
    for row, n in enumerate(used + idle):
        edits[row + 1, :, n] = target[:, n]
    pictures = run.decode(edits.flatten(0, 1), "swap").unflatten(0, (-1, columns))      # (1 + N, columns, 3, H, W)
    names = ["target, sources", "sources, rebuilt", *(names[n] for n in used + idle)]
    grid([images, *pictures], names).save(run.folder / "swap.png")


def traversal(run, columns=9):
    """One row a used token: its scalar goes from the 1st to the 99th percentile over the data; also as a GIF."""
    used, _, names = token_names(run)
    z = torch.from_numpy(np.quantile(run.codes()[0][:, used], np.linspace(0.01, 0.99, columns), axis=0)).float()
    base = run.encoder.scalars(run.images(run.rows(1, seed=3)))                         # (1, N)
    edits = base.repeat(len(used), columns, 1)                                          # (rows, columns, N)
    for row, n in enumerate(used):
        edits[row, :, n] = z[:, row].to(edits)
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
    used, _, names = token_names(run)
    red = torch.tensor([1.0, -0.6, -1.0], device=run.device)[:, None, None]             # (3, 1, 1)
    grey = (0.5 * images.mean(1, keepdim=True) + 0.3).repeat(3, 3, 1, 1)                # (3 count, 3, 64, 64)
    rows = [torch.lerp(grey, red, 0.8 * shares[n] / shares[n].max()) for n in used]
    sheet = grid([images.repeat(3, 1, 1, 1), *rows], ["picture", *(names[n] for n in used)],
                 ["early, middle and late in sampling (t from 999, 666, 333 down); each row has its own scale"])
    sheet.save(run.folder / "attention.png")


def bottleneck(run):
    """The paper's bottleneck curve for the four schedules, with our latents and at the paper's scale; also as CSV."""
    sheet, head, columns = Canvas(860, 330), ["t"], [np.arange(1000)]
    for i, (mean_square, factor, title) in enumerate([(1.0, 1, "KL per dimension, unit-variance latents"),
                                                      (67.6, 2, "twice the KL, mean square 67.6: as in the paper")]):
        kl = {name: factor * Diffusion(name).kl_to_noise(mean_square).numpy() for name in SCHEDULES}
        top, box = 4 * math.ceil(max(v.max() for v in kl.values()) / 4), (60 + 420 * i, 30, 350, 230)
        sheet.axes(box, T_TICKS, [(f"{top * v / 4:g}", v / 4) for v in range(5)], "t", title,
                   [(values / top, COLOURS[name]) for name, values in kl.items()])
        for j, name in enumerate(kl):
            sheet.text(box[0] + 330, 50 + 18 * j, name, "rm", COLOURS[name])
        head, columns = head + [f"{name}_{mean_square:g}" for name in kl], columns + list(kl.values())
    sheet.image.save(run.folder / "bottleneck.png")
    np.savetxt(run.folder / "bottleneck.csv", np.stack(columns, 1), "%.6g", ",", header=",".join(head), comments="")


def when(run):
    """Which token matters when: a heat map tokens x t of rise_of_loss, below the bottleneck curve."""
    images = run.images(run.rows(64, seed=5))                                           # (B, 3, 64, 64)
    x_0, tokens, kl = run.vae.encode(images), run.encoder(images), run.diffusion.kl_to_noise().cpu().numpy()
    rise = np.stack([rise_of_loss(run.unet, run.diffusion, x_0, tokens, run.noise(x_0.shape), t).cpu().numpy()
                     for t in tqdm(range(25, 1000, 50), desc="when", leave=False)], 1)  # (N, levels)
    used, idle, names = token_names(run)
    order, top, colour = used + idle, rise.max(), COLOURS[run.settings.schedule]
    sheet, height = Canvas(700, 240 + 18 * len(names)), 18 * len(names)
    sheet.axes((190, 30, 480, 110), [], [("0", 0), (f"{kl.max():.1f}", 1)],
               title=f"bottleneck: KL per dimension, {run.settings.schedule}", curves=[(kl / kl.max(), colour)])
    shade = 255 - np.clip(rise[order] / top, 0, 1)[..., None] * np.array([235, 185, 115])       # white to dark blue
    sheet.image.paste(Image.fromarray(shade.round().astype(np.uint8)).resize((480, height), Image.NEAREST), (190, 190))
    sheet.axes((190, 190, 480, height), T_TICKS, [(names[n], 1 - (i + 0.5) / len(order)) for i, n in enumerate(order)],
               "t", f"rise of the loss when the token is another picture's (dark: {top:.3f})")
    sheet.image.save(run.folder / "when.png")


FIGURES = {f.__name__: f for f in (reconstruction, swap, traversal, attention, bottleneck, when)}
NEEDS = {"traversal": dict(encoder="scalar"), "attention": dict(conditioning="cross-attention", objective="diffusion"),
         "bottleneck": dict(objective="diffusion"), "when": dict(objective="diffusion")}


# ---- the command ----------------------------------------------------------------------------------

COLUMNS = {"factor_vae": "FactorVAE", "disentanglement": "DCI D", "completeness": "DCI C",
           "informativeness_test": "DCI I", "mig": "MIG", "beta_vae": "beta-VAE", "psnr": "PSNR",
           "parameters": "parameters", "step": "steps", "minutes": "minutes"}


def table(results):
    """Prints one line for each setting among the results: the mean over its seeds, +- their deviation, and n."""
    settings = [{k: v for k, v in r["settings"].items() if k not in train.NOT_COMPARED} for r in results]
    differ, lines = [k for k in settings[0] if any(s.get(k) != settings[0][k] for s in settings)], {}
    for r, s in zip(results, settings):
        lines.setdefault(", ".join([r["data"], *(f"{k} {s.get(k)}" for k in differ)]), []).append({**r, **r["scores"]})
    columns, width = [c for c in COLUMNS if c in {**results[0], **results[0]["scores"]}], max(map(len, lines))
    print(f"{'':{width}}  runs", *(f"{COLUMNS[c]:>16}" for c in columns))
    for key, rows in lines.items():
        values = np.array([[row[c] for c in columns] for row in rows], dtype=float)     # (seeds, columns)
        texts = [f"{m:.0f}" if m > 999 else f"{m:.3f}" for m in values.mean(0)]
        spread = [f" +- {v:.3f}" if v else "" for v in values.std(0, ddof=len(values) > 1)]
        print(f"{key:{width}}  {len(rows):4}", *(f"{a + b:>16}" for a, b in zip(texts, spread)))


def score_run(run, metrics):
    """Scores a run, draws reconstruction.png and swap.png, writes scores.json; returns what that holds."""
    started, file = time.monotonic(), run.folder / "scores.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    old = old if old.get("step") == run.step else {}                # what is not measured now stays
    z, y = run.codes()
    scores, protocol, seconds = score_codes(z, y, metrics, run.settings.seed)
    importance = scores.pop("importance", old.get("importance"))
    run.importance = None if importance is None else np.array(importance)
    scores.update(reconstruction(run)), swap(run)
    protocol["psnr"] = dict(images=PSNR_IMAGES, ddim_steps=DDIM_STEPS, eta=ETA)
    seconds["all"] = round(time.monotonic() - started, 2)           # also the codes and the two pictures
    measured = dict(scores=scores, seconds=seconds, protocol=protocol)
    result = dict(data=run.ds.name, step=run.step, seed=run.settings.seed, images=len(z), factors=run.ds.factor_names,
                  **{key: {**old.get(key, {}), **new} for key, new in measured.items()},
                  parameters=sum(p.numel() for part in (run.encoder, run.unet) for p in part.parameters()),
                  minutes=round(run.seconds / 60, 2), settings=dataclasses.asdict(run.settings),
                  importance=None if run.importance is None else run.importance.round(4).tolist())
    train.write_json(file, result)
    return result


def main(argv=None):
    """Scores runs or codes and prints a table, or draws figures. ValueError or OSError with one clear sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders that train.py wrote")
    parser.add_argument("--codes", metavar="FILE", help="an .npz file with arrays z (n, N) and y (n, K) to score")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="only these scores")
    parser.add_argument("--figures", nargs="*", choices=FIGURES, help="draw these figures, or all, instead of scoring")
    parser.add_argument("--data", help="another data file to look at with the runs")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps [the first of cuda, mps, cpu that is there]")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.codes) or args.codes and (args.data or args.figures is not None):
        raise ValueError("name run folders, or codes with --codes FILE (no pictures, no --data), and not both")
    results = []
    if args.codes:
        try:
            with np.load(args.codes) as file:
                z, y = file["z"], file["y"]
        except (KeyError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile):
            raise ValueError(f"{args.codes} is not an .npz file with arrays z (n, N) and y (n, K)") from None
        scores, protocol, seconds = score_codes(z, y, args.metrics)
        results = [dict(data=args.codes, settings={}, scores=scores, protocol=protocol, seconds=seconds)]
    for run in (Run(folder, args.data, args.device) for folder in args.runs):
        if args.figures is None:
            results.append(score_run(run, args.metrics))
            continue
        codes = run.codes()                                         # too few for DCI: rows are named by number
        run.importance = dci_scores(*codes, run.settings.seed)["importance"] if len(codes[0]) >= 15000 else None
        for name in tqdm(args.figures or FIGURES, desc="figures"):
            lacks = [f"--{k} {v}" for k, v in NEEDS.get(name, {}).items() if getattr(run.settings, k) != v]
            if not lacks:
                FIGURES[name](run)
            elif args.figures:
                raise ValueError(f"{run.folder} has no figure {name}: that is of runs with {' '.join(lacks)}")
    if results:
        table(results)
    return results


if __name__ == "__main__":
    train.end_with(main)
