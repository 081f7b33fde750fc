"""Agreement and speed of evaluate.py's DCI beside scikit-learn's trees:

    python tests/bench_metrics.py                       # made-up codes
    python tests/bench_metrics.py RUN [--points 3000]   # the codes of a scored run
    python tests/bench_metrics.py RUN --draws 5 --ours-alone    # how far the points matter

Trains on so many points, in the protocol 10,000, and tests on half as many. Writes
bench_metrics-NAME.json into this folder. Nearly all of its time is scikit-learn's: ten core-minutes
for 10,000 points, 20 codes and the six factors of 3D Shapes, in proportion to points, codes and
the sum of all factors' sizes (59).
"""
import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import GradientBoostingClassifier

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import dci, purity  # noqa: E402
from train import machine, write_json  # noqa: E402

SIZES, N = np.array([10, 10, 10, 8, 4, 15]), 20
NAMES = ("disentanglement", "completeness", "informativeness_test")


def made_up(n):
    """Factors y (n, 6), and name -> codes (n, 20)."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, SIZES, (n, 6))
    factors = (y - (SIZES - 1) / 2) / (SIZES / 3.46)            # unit variance
    noise = rng.standard_normal((len(y), N))
    one, first = np.eye(6, N), np.arange(N) < 6
    codes = {
        "one to one, the rest noise": factors @ one + np.where(first, 0.02, 1) * noise,
        "one to one, 14 dead": factors @ one + np.where(first, 0.1, 0) * noise,
        "one to one, each 3 times": (factors + 0.1 * noise[:, :6])[:, np.arange(N) % 6],
        "noise": noise,
    }
    for amount in (0.1, 0.3, 1.0):
        mix = np.eye(6)[np.arange(N) % 6].T + amount * rng.standard_normal((6, N))
        codes[f"linear mixture, {amount} off the axes"] = factors @ mix + 0.1 * noise
    codes["discrete: rounded mixtures"] = np.round(factors @ (one + 0.3 * mix))
    return y, codes


def cases(run, n, draws):
    """Yields name, z (n, N) and y (n, K)."""
    if run:
        arrays = np.load(run / "codes.npz")
        for seed in range(draws):                       # 0: the points that evaluate.py draws
            rows = np.random.default_rng(seed).choice(len(arrays["z"]), n, replace=False)
            yield f"{run.name}, draw {seed}", arrays["z"][rows], arrays["y"][rows]
        return
    y, codes = made_up(n)
    for name, z in codes.items():
        yield name, z.astype(np.float32), y


def trees(z, y, n):
    """Importance (N,) and test accuracy of scikit-learn's trees for one factor; seconds."""
    start = time.monotonic()
    model = GradientBoostingClassifier(random_state=0).fit(z[:n], y[:n])
    accuracy = model.score(z[n:], y[n:])
    return model.feature_importances_, accuracy, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--points", type=int, default=10000)
    parser.add_argument("--draws", type=int, default=1, help="choices of the points of RUN")
    parser.add_argument("--ours-alone", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="factors side by side")
    args = parser.parse_args()
    n = args.points
    name = args.run.name if args.run else "made-up"
    rows = []
    with ProcessPoolExecutor(args.workers) as pool:     # seconds are summed over factors
        for label, z, y in cases(args.run, n + n // 2, args.draws):
            start = time.monotonic()
            scores = dci(z[:n], y[:n], z[n:], y[n:])
            row = {
                "codes": label,
                "ours": [round(scores[key], 4) for key in NAMES],
                "ours_accuracy": [round(share, 4) for share in scores["accuracy"]],
                "ours_seconds": round(time.monotonic() - start, 1),
            }
            rows.append(row)
            if not args.ours_alone:
                importance, accuracy, seconds = zip(*pool.map(partial(trees, z, n=n), y.T))
                R = np.stack(importance, axis=1)        # (N, K)
                theirs = (purity(R), purity(R.T), float(np.mean(accuracy)))
                row["scikit_learn"] = [round(score, 4) for score in theirs]
                row["scikit_learn_accuracy"] = [round(share, 4) for share in accuracy]
                row["scikit_learn_seconds"] = round(sum(seconds), 1)
            print(row, flush=True)
            contents = {
                "columns": NAMES, "points": n,
                "machine": machine(torch.device("cpu"), "tests/bench_metrics.py", sys.argv[1:]),
                "rows": rows,
            }
            write_json(Path(f"bench_metrics-{name}.json"), contents)


if __name__ == "__main__":
    main()
