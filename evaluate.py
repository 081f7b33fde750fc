# SPDX-License-Identifier: MIT
"""How well the codes follow the factors: scores, figures and tables of a run, or of any codes.

    python evaluate.py RUN                  # scores a run and draws its main figures
    python evaluate.py RUN RUN ...          # one table; runs with scores are not scored again
    python evaluate.py RUN --figures        # draws all that the run can have
    python evaluate.py --codes FILE.npz     # scores of arrays z (n, N) and y (n, K)

Letters: n points (images), N codes or tokens, K factors, A attributes, B batch, D token dimension,
C classes of a factor, V bins of a code, M nodes of a tree's level, R importance, H entropy.
"""
import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import train
from data import UNREADABLE, Dataset, InputError, atomic, open_dataset
from diffusion import Diffusion

Array = np.ndarray
FEW = 8  # a factor is constant if fewer points than this leave its commonest value
DDIM_STEPS = 50

# ---- metrics on arrays ----
# z: codes (n, N); y: factors (n, K), of any values that are classes.

def check_codes(z, y):
    """z as float32, y as class numbers 0, 1, .. InputError."""
    z, y = np.asarray(z), np.asarray(y)
    if z.ndim != 2 or y.ndim != 2 or len(z) != len(y) or 0 in z.shape + y.shape:
        raise InputError(f"codes must be (n, N) and factors (n, K), not {z.shape} and {y.shape}")
    if not np.isfinite(z).all() or (y != y).any():  # only NaN differs from itself
        raise InputError("there are NaN or infinite codes or factors")
    classes = np.empty(y.shape, np.int64)
    for k, column in enumerate(y.T):
        values, classes[:, k], count = np.unique(column, return_inverse=True, return_counts=True)
        if len(values) > len(y) / 2 or len(y) - count.max() < FEW:
            raise InputError(f"factor {k} has {len(values)} values in {len(y)} points, one of them "
                             f"{count.max()} times: it is constant, nearly so, or continuous")
    return z.astype(np.float32), classes


def entropy(p):
    """Entropy of each row of p, scaled to sum 1: (rows,)."""
    p = p / p.sum(1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1)  # 0 log 0 = 0


def purity(R):
    """Mean over the rows of R, weighted by their sums, of 1 - entropy in base (row length)."""
    weight = R.sum(1) if R.any() else np.ones(len(R))  # this and 1e-11 as the authors
    row_entropy = entropy(R + 1e-11) / np.log(R.shape[1])
    return float((weight / weight.sum() * (1 - row_entropy)).sum())


def dci(z_train: Array, y_train: Array, z_test: Array, y_test: Array, rounds: int = 100) -> dict:
    """Disentanglement, completeness and informativeness (Eastwood and Williams 2018), [0, 1].

    Gradient-boosted trees, grown in so many rounds, predict each factor from all codes. Also
    returns, as lists, accuracy (K,) and importance (N, K).
    """
    n = len(z_train)
    check_codes(z_train, y_train)  # again: a factor may be nearly constant in this part
    if len(z_test) == 0:
        raise InputError("DCI needs test points")
    z, y = check_codes(np.concatenate([z_train, z_test]), np.concatenate([y_train, y_test]))
    N, K = z.shape[1], y.shape[1]
    if N < 2 or K < 2:
        raise InputError(f"DCI needs 2 codes and 2 factors or more, not {N} and {K}")
    bins, bags = bin_codes(z, n)  # from here on: the trees, at the end of this file
    R = np.zeros((N, K), np.float32)
    right = np.zeros(y.shape, bool)
    for k in range(K):
        classes = torch.from_numpy(y[:, k])
        importance, predicted = boost(bags, bins, classes[:n], int(classes.max()) + 1, rounds)
        R[:, k] = importance / max(importance.sum(), 1e-30)
        right[:, k] = (predicted == classes).numpy()
    return {
        "disentanglement": purity(R),
        "completeness": purity(R.T),
        "informativeness_test": float(right[n:].mean()),
        "accuracy": right[n:].mean(0).tolist(),
        "importance": R.tolist(),
    }


def dci_scores(z, y, points=(10000, 5000)):
    """dci of training and test points drawn without replacement."""
    if len(z) < sum(points):
        raise InputError(f"DCI and swaps need {sum(points)} points, {len(z)} are there")
    rows = np.random.default_rng(0).choice(len(z), sum(points), replace=False)
    fit, test = rows[:points[0]], rows[points[0]:]
    return dci(z[fit], y[fit], z[test], y[test])


def factor_vae_score(z: Array, y: Array, seed: int = 0, votes: tuple = (10000, 5000)) -> float:
    """FactorVAE score (Kim and Mnih 2018, section 4), [0, 1].

    64 points that share a factor's value vote for the code that varies least, relative to its
    deviation over 10,000 points; codes whose deviation is below 0.05 are left out. votes: how many
    to learn from, how many to predict. The 64 are drawn with replacement.
    """
    z, y = check_codes(z, y)
    rng = np.random.default_rng(seed)
    std = z[rng.choice(len(z), min(10000, len(z)), replace=False)].std(0)
    kept = std >= 0.05
    if not kept.any():
        return 0.0
    z = z[:, kept] / std[kept]
    factor = rng.integers(y.shape[1], size=sum(votes))
    code = np.empty(sum(votes), np.int64)
    for vote, k in enumerate(factor):
        shared = np.flatnonzero(y[:, k] == y[rng.integers(len(y)), k])
        code[vote] = z[rng.choice(shared, 64)].var(0).argmin()
    n = votes[0]
    count = np.zeros((z.shape[1], y.shape[1]))
    np.add.at(count, (code[:n], factor[:n]), 1)
    predicted = count.argmax(1)[code[n:]]
    return float((predicted == factor[n:]).mean())


def mig(z: Array, y: Array) -> float:
    """Mutual information gap (Chen et al. 2018, equation 6), [0, 1], of codes in 20 bins.

    The gap between the two codes that tell most of a factor, as a share of its entropy.
    """
    z, y = check_codes(z, y)
    rows = np.random.default_rng(0).choice(len(z), min(10000, len(z)), replace=False)
    z, y = check_codes(z[rows], y[rows])  # again: of these points alone
    n, N = z.shape
    n_bins = 20
    z = z.astype(np.float64) - z.min(0)
    top = np.where(z.max(0) > 0, z.max(0), 1)
    bins = np.minimum(z / top * n_bins, n_bins - 1).astype(np.int64)  # (n, N)
    gaps = []
    for k in range(y.shape[1]):
        C = y[:, k].max() + 1
        cell = (np.arange(N) * n_bins + bins) * C + y[:, k, None]  # (n, N), of code, bin, class
        joint = np.bincount(cell.ravel(), minlength=N * n_bins * C)  # all histograms at once
        joint = joint.reshape(N, n_bins, C) / n  # p(bin, class)
        H_y = entropy(joint.sum(1))
        information = entropy(joint.sum(2)) + H_y - entropy(joint.reshape(N, -1))
        second, first = np.sort(np.append(information, 0))[-2:]  # 0 is there for N = 1
        gaps.append((first - second) / max(H_y[0], 1e-9))
    return float(np.mean(gaps))


def tad(z: Array, y: Array, max_share: float = 0.2) -> dict:
    """TAD (Yeats et al. 2022): how far an attribute's best code is ahead of the second, summed.

    y: attributes (n, A) of two values. A code's quality is the area under its ROC curve. Attributes
    count if their best area is >= 0.75 and no other tells > max_share of their entropy.
    """
    same = (y == y[:1]).sum(0)  # (A,), points with the first one's value
    varies = np.minimum(same, len(y) - same) >= FEW  # one value has no area
    z, a = check_codes(z, y[:, varies])
    if a.max() > 1:
        raise InputError("TAD is for attributes of two values")
    n_1 = a.sum(0)  # (A,), of ones
    n_0 = len(a) - n_1
    rank = np.empty(z.shape)  # (n, N), 1..n
    for j, code in enumerate(z.T):
        _, place, count = np.unique(code, return_inverse=True, return_counts=True)
        rank[:, j] = (count.cumsum() - (count - 1) / 2)[place]  # ties share their mean rank
    area = (rank.T @ a - n_1 * (n_1 + 1) / 2) / (n_1 * n_0)  # (N, A), Mann and Whitney's U
    area = np.maximum(area, 1 - area)
    chance = np.full((1, a.shape[1]), 0.5)  # for N = 1
    second, best = np.sort(np.concatenate([area, chance]), axis=0)[-2:]
    b = 1 - a
    joint = np.stack([a.T @ a, a.T @ b, b.T @ a, b.T @ b], axis=-1)
    H = entropy(np.stack([n_1, n_0], axis=1))
    information = H[:, None] + H - entropy(joint.reshape(-1, 4)).reshape(len(H), -1)
    np.fill_diagonal(information, 0)
    counted = (best >= 0.75) & (information.max(1) <= max_share * H)
    return {"tad": float((best - second)[counted].sum()), "attributes": int(counted.sum())}


def token_groups(importance):
    """(N, K) -> for each factor the tokens whose largest importance it has, if any."""
    importance = np.array(importance)
    owner = np.where(importance.any(1), importance.argmax(1), -1)  # (N,)
    return [np.flatnonzero(owner == k) for k in range(importance.shape[1])]


def nearest_factors(ds, images, wanted):
    """Factors (B, K) of the nearest images of ds, in squared error.

    Candidates per image: the wanted one, with factors wanted (B, K), and all that differ from it in
    one factor.
    """
    nearest = []
    for image, factors in zip(images.cpu(), wanted):
        candidates = [factors]
        for k, size in enumerate(ds.factor_sizes):
            for value in range(size):
                candidates.append(factors.copy())
                candidates[-1][k] = value
        index = ds.index(np.stack(candidates))
        error = (ds.images(index) - image).square().mean((1, 2, 3))
        nearest.append(candidates[error.argmin()])
    return np.stack(nearest)


def swap_accuracy(
    ds: Dataset, encode: Callable, decode: Callable, importance: Array, pairs: int = 64
) -> dict:
    """If all tokens of one factor come from another image, does just that factor change? (Ours.)

    encode: images (B, 3, 64, 64) -> tokens (B, N, D); decode: back; importance: DCI's, (N, K);
    pairs: number of them per factor. Returns three shares of the pairs under each factor's name:
    exact (the nearest image is the wanted one), moved (it has the wanted value of this factor),
    kept (it has those of all others). Also the mean and the worst of exact, and reconstruction:
    exact when nothing is swapped.
    """
    sizes = np.array(ds.factor_sizes)
    groups = token_groups(importance)
    rng = np.random.default_rng(0)
    sources = rng.integers(sizes, size=(pairs, len(sizes)))  # factors, (pairs, K)
    tokens = encode(ds.images(ds.index(sources)))  # (pairs, N, D)
    scores = {}
    for k, name in enumerate(ds.factor_names):
        targets = rng.integers(sizes, size=sources.shape)
        step = rng.integers(1, sizes[k], size=pairs)  # to another value
        targets[:, k] = (sources[:, k] + step) % sizes[k]
        wanted = sources.copy()
        wanted[:, k] = targets[:, k]
        swapped = tokens.clone()
        swapped[:, groups[k]] = encode(ds.images(ds.index(targets)))[:, groups[k]]
        right = nearest_factors(ds, decode(swapped), wanted) == wanted  # (pairs, K)
        scores[name] = {
            "exact": float(right.all(1).mean()),
            "moved": float(right[:, k].mean()),
            "kept": float(np.delete(right, k, axis=1).all(1).mean()),
        }
    exact = [score["exact"] for score in scores.values()]
    scores["mean"] = float(np.mean(exact))
    scores["worst"] = min(exact)
    right = nearest_factors(ds, decode(tokens), sources) == sources
    scores["reconstruction"] = float(right.all(1).mean())
    return scores


# ---- loading a run ----

def kept_scores(folder):
    """What scores.json in a folder holds, {} without one. InputError."""
    path = Path(folder) / "scores.json"
    if not path.exists():
        return {}
    keys = {"data", "scores", "step", "ddim_steps"}
    return train.read_json(path, keys, "remove it to score anew")


class Run:
    """A finished run: its data, its networks (the U-Net's moving average), frozen. InputError.

    data: where its data is now; out: where results go; device, cache. Empty: the run's.
    """

    def __init__(
        self, folder: str, data: str = "", out: str = "", device: str = "", cache: str = ""
    ):
        self.info = train.read_run(folder)
        self.cfg = cfg = train.config_of(self.info)
        self.ds = open_dataset(data or cfg.data, cache or cfg.cache)
        other = self.ds.checksum() != self.info["data"]["checksum"]
        if other and not out:
            raise InputError(f"{folder} was trained on other data: to try this, add --out FOLDER")
        self.out = Path(out or folder)
        self.out.mkdir(parents=True, exist_ok=True)
        self.ddim_steps = DDIM_STEPS
        self.device = train.choose_device(device or cfg.device)
        train.allow_tf32(False)
        self.vae = train.build_vae(cfg)
        self.encoder = train.build_encoder(cfg)
        self.unet = train.build_unet(cfg)
        first = train.load_checkpoint(Path(folder) / "vae.pt", vae=self.vae)
        parts = dict(encoder=self.encoder, ema=self.unet)
        second = train.load_checkpoint(Path(folder) / "model.pt", **parts)
        self.step = second["step"]
        self.exported = "unet" not in second  # only its average
        self.info["seconds"] = {"vae": first["seconds"], "tokens": second["seconds"]}
        for network in (self.vae, self.encoder, self.unet):
            network.to(self.device).eval().requires_grad_(False)
        self.diffusion = Diffusion(cfg.schedule).to(self.device)
        kept = kept_scores(self.out) or ({} if other else kept_scores(folder))
        self.importance = kept.get("scores", {}).get("importance")  # DCI's, (N, K), or None

    def encode(self, images):
        """Tokens (B, N, D) of images (B, 3, 64, 64) in [-1, 1]."""
        return self.encoder(images.to(self.device))

    def decode(self, tokens):
        """Images (B, 3, 64, 64) in [-1, 1] from tokens (B, N, D).

        DEVIATION: 50 DDIM steps, eta 0, from one noise for all (the authors: 200, eta 1).
        """
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(1, *train.latent_shape(self.cfg), generator=generator)
        x_T = x_T.repeat(len(tokens), 1, 1, 1).to(self.device)  # (B, Z, h, w)
        denoise = partial(self.unet, tokens=tokens)
        if self.cfg.objective == "diffusion":
            x_0 = self.diffusion.ddim_sample(denoise, x_T, self.ddim_steps)
        else:  # the ablation's Decoder
            x_0 = denoise(x_T, None)
        return self.vae.decode(x_0).clamp(-1, 1)

    def rows(self, n, seed=0):
        """Indices of n different images, drawn at random."""
        rng = np.random.default_rng(seed)
        return rng.choice(len(self.ds), min(n, len(self.ds)), replace=False)

    def images(self, n, seed):
        return self.ds.images(self.rows(n, seed)).to(self.device)


@torch.no_grad()
def compute_codes(encoder, ds, index):
    """One number per token, (n, N): its scalar, else its first principal component."""
    device = next(encoder.parameters()).device
    scalar = hasattr(getattr(encoder, "head", None), "scalars")  # yours may have no head
    network = encoder.scalars if scalar else encoder
    codes = []
    for start in tqdm(range(0, len(index), 500), "codes", leave=False):
        images = ds.images(index[start:start + 500]).to(device)
        codes.append(network(images).cpu())
    codes = torch.cat(codes)  # (n, N) or (n, N, D)
    if codes.ndim == 3:
        codes = principal_components(codes)
    return codes.numpy()


def score_on_the_way(encoder, ds):
    """DCI disentanglement and FactorVAE score while training: rough, of few images and trees."""
    if not ds.factor_names or len(ds) < 3500:
        return {}
    index = np.random.default_rng(0).choice(len(ds), 3500, replace=False)
    y = ds.factors(index).numpy()
    encoder.eval()
    z = compute_codes(encoder, ds, index)
    encoder.train()
    try:
        D = dci(z[:2500], y[:2500], z[2500:], y[2500:], rounds=30)["disentanglement"]
        score = factor_vae_score(z, y, votes=(1000, 1000))
    except InputError:  # a factor of too many values, say
        return {}
    return {"disentanglement": round(D, 3), "factor_vae": round(score, 3)}


def principal_components(tokens):
    """The first principal component of each token: (n, N, D) -> (n, N)."""
    x = (tokens - tokens.mean(0)).transpose(0, 1)           # (N, n, D)
    vectors = torch.linalg.eigh(x.mT @ x).eigenvectors      # (N, D, D), ascending
    return (x @ vectors[:, :, -1:]).squeeze(2).t()          # (n, N)


# ---- figures: each returns a sheet ----

FONT = ImageFont.load_default(16)  # can be read on a phone
TARGET = 2  # a seed: in the built-in world its first image has three different hues


def grid(rows):
    """One sheet. rows: label -> (columns, 3, 64, 64) in [-1, 1]."""
    left = math.ceil(max(map(FONT.getlength, rows))) + 8
    width = left + 64 * len(next(iter(rows.values())))
    sheet = Image.new("RGB", (width, 64 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, row) in enumerate(rows.items()):
        pen.text((left - 4, 64 * i + 32), label, "black", FONT, anchor="rm")
        strip = torch.cat(list(row), dim=2).permute(1, 2, 0)  # (64, columns * 64, 3)
        pixels = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        sheet.paste(Image.fromarray(pixels.numpy()), (left, 64 * i))
    return sheet


def used_tokens(run):
    """Label -> token, ordered by factor: whose largest importance is >= 0.02; else every token."""
    used = {}
    if run.importance is not None:
        for k, group in enumerate(token_groups(run.importance)):
            for n in group:
                weight = run.importance[n][k]
                if weight >= 0.02:
                    used[f"token {n}: {run.ds.factor_names[k]} {weight:.2f}"] = n
    return used or {f"token {n}": n for n in range(run.cfg.tokens)}


def reconstruction(run):
    """From the autoencoder alone, and from tokens."""
    images = run.images(10, seed=1)
    return grid({
        "image": images,
        "autoencoder": run.vae.decode(run.vae.encode(images)),
        "from tokens": run.decode(run.encode(images)),
    })


def target_and_sources(run):
    """Eight images: a target, and seven that differ from it in every factor."""
    rows = run.rows(2000, seed=TARGET)
    if run.ds.factor_names:
        y = run.ds.factors(rows).numpy()
        differ = (y != y[0]).all(1)
        hues = [k for k, name in enumerate(run.ds.factor_names) if name.endswith("hue")]
        differ &= ~np.isin(y[:, hues], y[0, hues]).any(1)  # nor has any surface its hues
        rows = np.append(rows[:1], rows[differ])
    return run.ds.images(rows[:8]).to(run.device)


def swap(run):
    """First a target and its sources, then a row per factor: the sources, whose tokens of this
    factor are the target's. Without importance a row per token.
    """
    images = target_and_sources(run)
    tokens = run.encode(images)
    groups = {f"token {n}": [n] for n in range(run.cfg.tokens)}
    if run.importance is not None:
        groups = dict(zip(run.ds.factor_names, token_groups(run.importance)))
    blank = torch.ones_like(images[:1])
    rows = {"target, sources": images}
    for label, group in groups.items():
        swapped = tokens[1:].clone()
        swapped[:, group] = tokens[0, group]
        rows[label] = torch.cat([blank, run.decode(swapped)]) if len(swapped) else blank
    return grid(rows)


def traversal(run):
    """One row per used token: its scalar from the 1st to the 99th percentile of 1,000 images."""
    scalars = run.encoder.scalars(run.images(1000, seed=3))  # (1000, N)
    values = scalars.quantile(torch.linspace(0.01, 0.99, 9, device=run.device), dim=0)  # (9, N)
    rows = {}
    for label, n in used_tokens(run).items():
        edited = scalars[:1].repeat(9, 1)
        edited[:, n] = values[:, n]
        rows[label] = run.decode(run.encoder.head.tokens_of(edited))
    return grid(rows)


def attention(run):
    """One row per used token: images, bright where cross attention reads it at t = 500.

    The sum over blocks and mean over heads; each row is divided by its own largest value.
    """
    images = run.images(10, seed=4)
    x_0 = run.vae.encode(images)
    t = torch.full((len(images),), 500, device=run.device)
    torch.manual_seed(0)
    x_t = run.diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    attn_maps = []
    run.unet(x_t, t, run.encode(images), attn_maps)
    weight = 0  # (B, N, 64, 64)
    for attn in attn_maps:  # (B, heads, H * W, N)
        attn = attn.mean(1).transpose(1, 2)
        attn = attn.unflatten(2, (math.isqrt(attn.shape[2]), -1))  # (B, N, H, W)
        weight = weight + F.interpolate(attn, (64, 64), mode="bilinear")
    rows = {"image": images}
    for label, n in used_tokens(run).items():
        rows[label] = (images + 1) * weight[:, n, None] / weight[:, n].max() - 1
    return grid(rows)


FIGURES = {  # and the configuration each needs
    "reconstruction": (reconstruction, {}),
    "swap": (swap, {}),
    "traversal": (traversal, {"encoder": "scalar"}),
    "attention": (attention, {"conditioning": "cross-attention", "objective": "diffusion"}),
}


def draw(run, names):
    """Draws into run.out those of these figures that the run can have."""
    for name in names:
        figure, needs = FIGURES[name]
        if needs.items() <= vars(run.cfg).items():
            figure(run).save(run.out / f"{name}.png")
            print(f"drew {run.out / name}.png", file=sys.stderr)


# ---- the command ----

OF_FACTORS = dict(dci=dci_scores, factor_vae=factor_vae_score, mig=mig)


def psnr(run):
    """In dB, of the mean squared error: from tokens, and by the autoencoder alone."""
    images = run.images(256, seed=1)
    decoded = {
        "psnr_autoencoder": run.vae.decode(run.vae.encode(images)).clamp(-1, 1),
        "psnr": run.decode(run.encode(images)),
    }
    scores = {}
    for key, x in decoded.items():
        mse = F.mse_loss(x, images).item() / 4  # of images in [0, 1], half as wide as [-1, 1]
        scores[key] = -10 * math.log10(max(mse, 1e-10))
    return scores


def add_scores(result, name, metric, *inputs):
    """Adds what the metric returns to the result, or prints why not."""
    print(f"{name} ..", file=sys.stderr)
    try:
        scores = metric(*inputs)
    except InputError as error:
        print(f"{name} is left out: {error}")
        return
    if name == "swap" or not isinstance(scores, dict):
        scores = {name: scores}
    result["scores"].update(scores)


def score_file(path):
    """Scores of the arrays z (n, N) and y (n, K) in an .npz file. InputError."""
    try:
        arrays = np.load(path)
        z, y = arrays["z"].astype(np.float32), arrays["y"]
    except UNREADABLE:
        raise InputError(f"{path} is missing or no .npz of z (n, N) and y (n, K)") from None
    check_codes(z, y)
    result = {"data": {"name": Path(path).name}, "scores": {}}
    for name, metric in OF_FACTORS.items():
        add_scores(result, name, metric, z, y)
    return result


def score_run(run, n, argv):
    """Scores n images (0: all). Writes codes.npz, two figures and scores.json, which it returns."""
    index = np.sort(run.rows(n or len(run.ds)))
    z = compute_codes(run.encoder, run.ds, index)
    y = np.empty((len(index), 0))  # neither factors nor attributes
    for place in ("data", "cache", "out", "vae"):  # of this machine
        del run.info["config"][place]
    result = dict(
        scores={},
        step=run.step,
        data=dict(name=run.ds.name, factors=run.ds.factor_names, checksum=run.ds.checksum()),
        images=len(index),
        ddim_steps=run.ddim_steps,
        machine=train.machine(run.device, "evaluate.py", argv),
        run=run.info,
    )
    if run.ds.factor_names:
        y = run.ds.factors(index).numpy()
        for name, metric in OF_FACTORS.items():
            add_scores(result, name, metric, z, y)
        run.importance = R = result["scores"].get("importance")
        if R is not None:
            add_scores(result, "swap", swap_accuracy, run.ds, run.encode, run.decode, R)
    elif run.ds.attributes is not None:
        y = run.ds.attributes[index]
        add_scores(result, "tad", tad, z, y)
    add_scores(result, "psnr", psnr, run)
    draw(run, ["reconstruction", "swap"])
    with atomic(run.out / "codes.npz") as temporary:
        np.savez(temporary, z=z, y=y)
    train.write_json(run.out / "scores.json", result)
    return result


def name_setting(result):
    """The data, and what differs from the preset. InputError: a run of another version."""
    data = result["data"]
    name = data["name"]
    if data.get("checksum") not in (None, name):  # arrays have none, the world's is its name
        name += f" ({data['checksum']})"
    if "run" in result:
        cfg = vars(train.config_of(result["run"])) | {"steps": result["step"]}  # done, not wanted
        usual = vars(train.Config(**train.PRESETS[cfg["preset"]]))
        for key in sorted(cfg.keys() - {"seed", "device", "cuda_graphs"}):
            if cfg[key] != usual[key]:
                name += f", {key} {cfg[key]}"
        if result["ddim_steps"] != DDIM_STEPS:
            name += f", ddim_steps {result['ddim_steps']}"
    return name


COLUMNS = {
    "factor_vae": "FactorVAE", "disentanglement": "DCI D", "completeness": "DCI C",
    "informativeness_test": "DCI I", "mig": "MIG", "swap": "swap", "tad": "TAD", "psnr": "PSNR",
}


def table(results):
    """Prints a line per setting: its runs, then means +- deviations over those with a score."""
    settings = {}
    for result in results:
        scores = dict(result["scores"])
        if "swap" in scores:
            scores["swap"] = scores["swap"]["mean"]
        settings.setdefault(name_setting(result), []).append(scores)
    width = max(map(len, settings))
    columns = [key for key in COLUMNS if any(key in result["scores"] for result in results)]
    print(f"{'':{width}} runs", *(f"{COLUMNS[key]:>14}" for key in columns))
    for name, runs in settings.items():
        line = f"{name:{width}} {len(runs):4}"
        for key in columns:
            values = [scores[key] for scores in runs if key in scores]
            cell = f"{np.mean(values):.3f}" if values else ""
            if len(values) > 1:
                cell += f" +- {np.std(values, ddof=1):.3f}"
            line += f" {cell:>14}"
        print(line)


def parse(argv):
    """The flags, checked. InputError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders")
    add("--codes", metavar="FILE", help="an .npz of z (n, N) and y (n, K) to score instead")
    add("--figures", action="store_true", help="only draw: all that the run can have")
    add("--images", type=int, default=50000, help="how many are scored; 0: all [50000]")
    add("--ddim-steps", type=int, default=DDIM_STEPS, help="of sampling, 10 to 1000 [50]")
    add("--data", default="", help="where the data is now; other data: with --out")
    add("--cache", default="", help="folder for unpacked data [the run's]")
    add("--out", default="", help="folder for results [the run's]")
    add("--device", default="", help="cpu, cuda, mps or auto [the run's]")
    args = parser.parse_args(argv)
    args.out = os.path.expanduser(args.out)
    args.cache = os.path.expanduser(args.cache)
    if bool(args.runs) == bool(args.codes) or (args.codes and args.figures):
        raise InputError("name runs, or --codes FILE without --figures")
    if len(args.runs) > 1 and (args.out or args.data or args.cache):
        raise InputError("--out, --data and --cache are for one run alone")
    if args.images < 0 or not 10 <= args.ddim_steps <= 1000:
        raise InputError("--images is 0 or more, --ddim-steps 10 to 1000")
    return args


def main(argv: list[str]) -> list:
    """Scores runs or codes, or draws figures. Returns the results. InputError."""
    args = parse(argv)
    several = len(args.runs) > 1
    results = []
    if args.codes:
        results.append(score_file(args.codes))
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            train.write_json(Path(args.out) / "scores.json", results[0])
    for folder in args.runs:
        try:
            result = kept_scores(folder) if several and not args.figures else {}
            if not result:
                run = Run(folder, args.data, args.out, args.device, args.cache)
                run.ddim_steps = args.ddim_steps
                if args.figures:
                    draw(run, FIGURES)
                    continue
                if run.exported and not args.out and (run.out / "scores.json").exists():
                    raise InputError(f"{folder} was exported with its scores: add --out FOLDER")
                result = score_run(run, args.images, argv)
            name_setting(result)  # an InputError here leaves it out
            results.append(result)
        except InputError as error:
            if not several:
                raise
            print(f"{folder} is left out: {error}")
    if results:
        table(results)
    return results


# ---- gradient-boosted trees, for dci: skip on first reading ----

def bin_codes(z, n):
    """Cuts each code of z (n + n_test, N) into at most V bins, made for the first n points.

    Returns bins like z, and bags: V, the points of all bins, bin after bin (N * n,), and where each
    bin begins there (N * V,).
    DEVIATION: with more than V values a tree tries V - 1 thresholds per code, scikit-learn's all.
    """
    V = n if n <= 2000 and z.shape[1] <= 64 else 256
    columns = []
    for code in torch.as_tensor(z).t():
        values, count = code[:n].unique(return_counts=True)
        edges = (values[:-1] + values[1:]) / 2  # midway, as scikit-learn
        if len(values) > V:  # half in the widest gaps, half after equal counts
            widest = values.diff().topk(V // 2).indices
            share = torch.arange(1, V // 2) * n // (V // 2)
            even = torch.searchsorted(count.cumsum(0), share).clamp(max=len(edges) - 1)
            edges = edges[torch.cat([widest, even]).unique()]
        columns.append(torch.bucketize(code.contiguous(), edges))  # edge v-1 < bin v <= edge v
    bins = torch.stack(columns, dim=1)
    N = bins.shape[1]
    bag = (bins[:n] + V * torch.arange(N)).t().flatten()  # (N * n,), 0..N*V-1
    count = torch.bincount(bag, minlength=V * N)
    return bins, (V, bag.argsort(stable=True) % n, count.cumsum(0) - count)


def best_splits(bags, residual, node, M, generator):
    """The best split of each of the M nodes of a level, in C trees that grow together.

    residual: (n, C), the targets; node: (n, C), each point's. Returns, (M, C) each: the decrease of
    squared error, the code, the bin up to which points go left (V: all of them do).
    embedding_bag sums a table's rows over bags of points: here, a histogram of every code at once.
    """
    V, points, starts = bags
    n, C = residual.shape
    inside = (node[:, None, :] == torch.arange(M)[:, None]).float()  # (n, M, C)
    table = torch.stack([residual[:, None, :] * inside, inside], dim=1)  # (n, 2, M, C)
    sums = F.embedding_bag(points, table.view(n, -1), starts, mode="sum")  # (N*V, 2*M*C)
    left = sums.view(-1, V, 2, M, C).cumsum(1)  # (N, V, 2, M, C)
    total = left[0, -1]  # (2, M, C), of any code
    sum_left, n_left = left.unbind(2)  # (N, V, M, C) each
    sum_right, n_right = (total - left).unbind(2)
    decrease = sum_left**2 / n_left + sum_right**2 / n_right - total[0] ** 2 / total[1]
    decrease = decrease.nan_to_num(0, 0, 0).clamp(min=0)  # one side is empty
    gain, place = decrease.max(1)  # (N, M, C): each code's best
    best = gain.max(0).values
    tie_break = 1 + torch.rand(gain.shape, generator=generator)  # at random, as scikit-learn
    code = ((gain == best) * tie_break).argmax(0)  # (M, C)
    place = place.gather(0, code[None])[0]
    return best, code, torch.where(best > 1e-9, place, V)


def boost(bags, bins, y, C, rounds):
    """Gradient-boosted trees (Friedman 2001, algorithm 6), one per class and round: scikit-learn's.

    bins: (n + n_test, N); y: classes (n,). Returns importance (N,) and predicted classes of all
    points, (n + n_test,).
    """
    max_depth, learning_rate = 3, 0.1
    n = len(y)
    generator = torch.Generator().manual_seed(0)
    target = F.one_hot(y, C).float()
    start = target.mean(0).clamp(min=1e-12).log()  # (C,): log prior
    shrink = (C - 1) / C
    scores = start.repeat(len(bins), 1)  # (n + n_test, C)
    importance = torch.zeros(bins.shape[1])
    for _ in range(rounds):
        p = scores[:n].softmax(1)
        residual = target - p  # minus the gradient of the loss
        node = torch.zeros_like(scores, dtype=torch.int64)
        for depth in range(max_depth):
            M = 2**depth
            decrease, code, place = best_splits(bags, residual, node[:n], M, generator)
            importance.index_add_(0, code.flatten(), decrease.flatten() / n)
            value = bins.gather(1, code.gather(0, node))  # of the node's code
            node = 2 * node + (value > place.gather(0, node))  # left 2m, right 2m + 1
        zeros = torch.zeros(2**max_depth, C)
        numerator = zeros.scatter_add(0, node[:n], residual)
        denominator = zeros.scatter_add(0, node[:n], p * (1 - p))
        newton = shrink * numerator / denominator.clamp(1e-12)
        newton = newton.clamp(-100, 100)  # DEVIATION: else they may diverge for 183 classes
        scores += learning_rate * newton.gather(0, node)  # a Newton step in each leaf
    return importance.numpy(), scores.argmax(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped")
