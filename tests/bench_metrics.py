"""Agreement and speed of evaluate.py's DCI against scikit-learn's, in the full protocol. Run by hand:

    python tests/bench_metrics.py [RUN ...]             # the codes of finished runs may be added

Ten thousand training and five thousand test points, 20 codes, the six factors of 3D Shapes. Prints a table and
writes it to .github/results/bench_metrics.json; rows that are there are not measured again (delete the file for that).
Takes about half an hour on two cores, nearly all scikit-learn's.
"""
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import Run, dci, entropy                              # noqa: E402
from train import end_with                                          # noqa: E402

SIZES, N, TRAIN, TEST = (10, 10, 10, 8, 4, 15), 20, 10000, 5000
RESULTS = ROOT / ".github/results/bench_metrics.json"
NAMES = ("disentanglement", "completeness", "informativeness_test")


def cases():
    """Name -> codes z (15,000, 20) of factors y (15,000, 6)."""
    for path in sys.argv[1:]:
        z, y = Run(path).codes()
        rows = np.random.default_rng(0).choice(len(z), TRAIN + TEST, replace=False)
        yield f"run {Path(path).name}", y[rows], z[rows]
    rng = np.random.default_rng(0)
    y = np.stack([rng.integers(0, size, TRAIN + TEST) for size in SIZES], 1)
    f = (y - (np.array(SIZES) - 1) / 2) / (np.array(SIZES) / 3.46)                      # unit variance
    noise = lambda scale, n=N: scale * rng.standard_normal((len(y), n))
    one = np.eye(6, N)
    yield "one to one, the rest noise", y, f @ one + np.where(np.arange(N) < 6, 0.02, 1) * noise(1)
    for how_much in (0.1, 0.3, 1.0):
        mix = np.eye(6)[np.arange(N) % 6].T + how_much * rng.standard_normal((6, N))
        yield f"linear mixture, {how_much} off the axes", y, f @ mix + noise(0.1)
    yield "noise", y, noise(1)
    yield "one to one, 14 dead", y, f @ one + np.where(np.arange(N) < 6, 0.1, 0) * noise(1)
    yield "one to one, each 3 times", y, (f @ np.eye(6) + noise(0.1, 6))[:, np.arange(N) % 6]
    yield "discrete: the factors, rounded mixtures", y, np.round(f @ (np.eye(6, N) + 0.3 * rng.standard_normal((6, N))))


def trees(z, y):
    """Importance (N,) and test accuracy of scikit-learn's trees for one factor, and their seconds."""
    from sklearn.ensemble import GradientBoostingClassifier
    started = time.monotonic()
    model = GradientBoostingClassifier(random_state=0).fit(z[:TRAIN], y[:TRAIN])
    accuracy = model.score(z[TRAIN:], y[TRAIN:])
    return model.feature_importances_, accuracy, time.monotonic() - started


def scikit_learn(z, y, pool):
    """DCI as the authors compute it, and the seconds of all its trees.

    The library works on one core, a factor after the other; here two factors run side by side, and the seconds
    are added up.
    """
    importance, accuracy, seconds = zip(*pool.map(trees, [z] * 6, y.T))
    R = np.stack(importance, 1)                                                         # (N, K)
    weight = lambda total: total / total.sum()
    return (float((weight(R.sum(1)) * (1 - entropy(R + 1e-11, 6))).sum()),
            float((weight(R.sum(0)) * (1 - entropy(R.T + 1e-11, N))).sum()), float(np.mean(accuracy))), sum(seconds)


def main():
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    with ProcessPoolExecutor(2) as pool:
        for name, y, z in cases():
            if name in [row["codes"] for row in table]:
                continue
            z = z.astype(np.float32)
            started = time.monotonic()
            scores = dci(z[:TRAIN], y[:TRAIN], z[TRAIN:], y[TRAIN:])
            ours, seconds = [scores[n] for n in NAMES], time.monotonic() - started
            theirs, their_seconds = scikit_learn(z, y, pool)
            row = dict(codes=name, ours=[round(x, 4) for x in ours], scikit_learn=[round(x, 4) for x in theirs],
                       seconds=[round(seconds, 1), round(their_seconds, 1)])
            table.append(row)
            print("| {} | {} | {} | {} | {:.1f} | {:.1f} |".format(
                name, *(f"{a:.3f} / {b:.3f}" for a, b in zip(ours, theirs)), *row["seconds"]), flush=True)
            RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    end_with(main)
