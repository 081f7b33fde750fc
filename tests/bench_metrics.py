"""Agreement and speed of evaluate.py's DCI beside scikit-learn's trees, in the full protocol:

    python tests/bench_metrics.py [RUN ...]     # scored runs, whose codes.npz may be added

10,000 training and 5,000 test points, 20 codes, the six factors of 3D Shapes. Writes
.github/results/bench_metrics.json. Half an hour on two cores, nearly all of it scikit-learn's.
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import GradientBoostingClassifier

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import dci, purity  # noqa: E402
from train import machine, write_json  # noqa: E402

SIZES, N, TRAIN, TEST = np.array([10, 10, 10, 8, 4, 15]), 20, 10000, 5000
NAMES = ("disentanglement", "completeness", "informativeness_test")


def made_up():
    """Name -> codes (15,000, 20) of factors y (15,000, 6), which come first."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, SIZES, (TRAIN + TEST, 6))
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


def cases():
    """Yields name, z (15,000, N) and y (15,000, K)."""
    for folder in sys.argv[1:]:
        arrays = np.load(Path(folder) / "codes.npz")
        rows = np.random.default_rng(0).choice(len(arrays["z"]), TRAIN + TEST, replace=False)
        yield f"run {Path(folder).name}", arrays["z"][rows], arrays["y"][rows]
    y, codes = made_up()
    for name, z in codes.items():
        yield name, z.astype(np.float32), y


def trees(z, y):
    """Importance (N,) and test accuracy of scikit-learn's trees for one factor; seconds."""
    start = time.monotonic()
    model = GradientBoostingClassifier(random_state=0).fit(z[:TRAIN], y[:TRAIN])
    accuracy = model.score(z[TRAIN:], y[TRAIN:])
    return model.feature_importances_, accuracy, time.monotonic() - start


def main():
    rows = []
    with ProcessPoolExecutor(2) as pool:            # two factors side by side; seconds are summed
        for name, z, y in cases():
            start = time.monotonic()
            scores = dci(z[:TRAIN], y[:TRAIN], z[TRAIN:], y[TRAIN:])
            ours = time.monotonic() - start
            importance, accuracy, seconds = zip(*pool.map(trees, [z] * y.shape[1], y.T))
            R = np.stack(importance, axis=1)        # (N, K)
            rows.append({
                "codes": name,
                "ours": [round(scores[key], 4) for key in NAMES],
                "scikit_learn": [round(x, 4) for x in (purity(R), purity(R.T), np.mean(accuracy))],
                "seconds": [round(ours, 1), round(sum(seconds), 1)],
            })
            print(rows[-1], flush=True)
            contents = {"columns": NAMES, "machine": machine(torch.device("cpu")), "rows": rows}
            write_json(ROOT / ".github/results/bench_metrics.json", contents)


if __name__ == "__main__":
    main()
