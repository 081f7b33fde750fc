"""The scores of evaluate.py against scikit-learn, against loops that follow the definitions, and on codes whose
scores are known."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score, roc_auc_score

import evaluate
from encoder import principal_directions
from evaluate import beta_vae_score, dci, factor_vae_score, mig

ROOT = Path(__file__).resolve().parent.parent
SIZES = (4, 3, 2)                                                   # of the factors; two classes grow one tree


def points(n, seed=0):
    """Factors (n, 3) and codes (n, 3) that follow one each, with a little noise."""
    rng = np.random.default_rng(seed)
    y = np.stack([rng.integers(0, size, n) for size in SIZES], 1)
    return y, y - (np.array(SIZES) - 1) / 2 + 0.05 * rng.standard_normal(y.shape)


def mixed(n, how_much, extra, seed=0):
    """Codes (n, 3 + extra) that mix the factors more or less, with noise."""
    y, z = points(n, seed)
    rng = np.random.default_rng(99)
    mix = np.eye(3, 3 + extra) + how_much * rng.standard_normal((3, 3 + extra))
    return y, z @ mix + 0.2 * np.random.default_rng(seed + 1).standard_normal((n, 3 + extra))


# ---- DCI ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how_much, extra", [(0.0, 0), (0.1, 2), (0.5, 2), (1.0, 0)])
def test_dci_is_scikit_learns(how_much, extra):
    """With a bin for every point the trees are the same trees, up to ties and rounding."""
    y, z = mixed(300, how_much, extra)
    y_test, z_test = mixed(200, how_much, extra, seed=5)
    z, z_test = z.astype(np.float32), z_test.astype(np.float32)
    ours = dci(z, y, z_test, y_test, V=300)
    importance, accuracy = [], []
    for k in range(3):
        trees = GradientBoostingClassifier(random_state=0).fit(z, y[:, k])
        importance.append(trees.feature_importances_)
        accuracy.append([trees.score(z, y[:, k]), trees.score(z_test, y_test[:, k])])
    assert np.abs(ours["importance"] - np.stack(importance, 1)).max() < 0.02
    train, test = np.mean(accuracy, axis=0)
    assert abs(ours["informativeness_train"] - train) < 0.01 and abs(ours["informativeness_test"] - test) < 0.02
    coarse = dci(z, y, z_test, y_test, V=64)
    for name in ("disentanglement", "completeness", "informativeness_test"):
        assert abs(coarse[name] - ours[name]) < 0.04


def test_dci_of_known_codes():
    y, z = points(600)
    y_test, z_test = points(300, seed=1)
    rng = np.random.default_rng(2)
    one_to_one = dci(z, y, z_test, y_test)
    assert one_to_one["disentanglement"] > 0.97 and one_to_one["completeness"] > 0.97
    assert one_to_one["informativeness_test"] > 0.99
    assert np.array_equal(one_to_one["importance"].argmax(0), [0, 1, 2])
    assert np.allclose(one_to_one["importance"].sum(0), 1)
    permuted = dci(z[:, [2, 0, 1]], y, z_test[:, [2, 0, 1]], y_test)
    for name in ("disentanglement", "completeness", "informativeness_test"):
        assert abs(permuted[name] - one_to_one[name]) < 0.005       # not 0: of equal splits lots decide
    noise = dci(rng.standard_normal((600, 5)), y, rng.standard_normal((300, 5)), y_test)
    assert noise["disentanglement"] < 0.1 and noise["completeness"] < 0.1
    assert abs(noise["informativeness_test"] - np.mean([1 / s for s in SIZES])) < 0.1
    constant = dci(np.ones((600, 5)), y, np.ones((300, 5)), y_test)
    assert constant["disentanglement"] < 1e-6 and not constant["importance"].any()


def test_completeness_and_disentanglement_are_not_the_same():
    y, _ = points(600)
    y_test, _ = points(300, seed=1)
    split = lambda y: np.stack([y[:, 0] // 2, y[:, 0] % 2, y[:, 1], y[:, 2]], 1).astype(float)     # two codes for one factor
    scores = dci(split(y), y, split(y_test), y_test)
    assert scores["disentanglement"] > 0.99 and scores["completeness"] < 0.9
    shared = lambda y: np.stack([y[:, 0] + 4 * y[:, 1], y[:, 2]], 1).astype(float)                 # one code for two
    scores = dci(shared(y), y, shared(y_test), y_test)
    assert scores["completeness"] > 0.99 and scores["disentanglement"] < 0.8


def test_dead_and_duplicate_codes():
    y, z = points(600)
    y_test, z_test = points(300, seed=1)
    more = lambda z: np.concatenate([np.zeros((len(z), 1)), z, z[:, :1]], 1)            # dead, the three, a copy
    scores = dci(more(z), y, more(z_test), y_test)
    assert scores["disentanglement"] > 0.97 and not scores["importance"][0].any()
    first, copy = scores["importance"][[1, 4], 0]
    assert first + copy > 0.99 and min(first, copy) > 0.3           # they draw lots, as in scikit-learn
    theirs = GradientBoostingClassifier(random_state=0).fit(more(z), y[:, 0]).feature_importances_
    assert min(theirs[[1, 4]]) > 0.3


# ---- FactorVAE score, beta-VAE score, MIG against their definitions --------------------------------

def factor_vae_by_loops(z, y, rng, votes, batch):
    """Kim and Mnih 2018, section 4, word by word."""
    deviation = z.std(0)
    count = np.zeros((z.shape[1], y.shape[1]))
    right = 0
    for vote in range(sum(votes)):
        k = rng.integers(y.shape[1])
        rows = rng.choice(np.flatnonzero(y[:, k] == y[rng.integers(len(y)), k]), batch)
        variance = [np.var(z[rows, n] / deviation[n]) if deviation[n] >= 0.05 else math.inf for n in range(z.shape[1])]
        d = int(np.argmin(variance))
        if vote < votes[0]:
            count[d, k] += 1
        else:
            right += count[d].argmax() == k
    return right / votes[1]


@pytest.mark.parametrize("how_much", [0.0, 0.3, 1.0])
def test_factor_vae_score_is_its_definition(how_much):
    y, z = mixed(2000, how_much, 2)
    z[:, 1] = 0.01 * z[:, 1]                                        # under 0.05: may not vote
    ours = [factor_vae_score(z, y, seed, votes=(400, 400)) for seed in range(5)]
    loops = [factor_vae_by_loops(z, y, np.random.default_rng(seed), (400, 400), 64) for seed in range(5)]
    assert abs(np.mean(ours) - np.mean(loops)) < 0.05
    assert ours[0] == factor_vae_score(z, y, 0, votes=(400, 400))


def test_factor_vae_score_of_known_codes():
    y, z = points(2000)
    assert factor_vae_score(z, y) > 0.999 and factor_vae_score(z[:, ::-1], y) > 0.999
    assert factor_vae_score(np.random.default_rng(0).standard_normal((2000, 4)), y) < 0.45
    assert factor_vae_score(0.01 * z, y) == 0.0                     # all pruned
    assert 0.6 < factor_vae_score(z[:, :2], y) < 0.72               # one factor of three has no code


def beta_vae_by_loops(z, y, rng, points, batch):
    """Higgins et al. 2017, with scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression
    x, target = [], []
    for _ in range(sum(points)):
        k = rng.integers(y.shape[1])
        a = rng.integers(len(y), size=batch)
        b = [rng.choice(np.flatnonzero(y[:, k] == y[i, k])) for i in a]
        x.append(np.abs(z[a] - z[b]).mean(0)), target.append(k)
    x = (np.array(x) - np.mean(x, 0)) / np.std(x, 0)
    model = LogisticRegression(max_iter=1000).fit(x[:points[0]], target[:points[0]])
    return model.score(x[points[0]:], target[points[0]:])


@pytest.mark.parametrize("how_much", [0.0, 2.0])
def test_beta_vae_score_is_its_definition(how_much):
    y, z = mixed(500, how_much, 0)
    z = z + (3 if how_much else 0) * np.random.default_rng(3).standard_normal(z.shape)
    ours = [beta_vae_score(z, y, seed, points=(300, 200), batch=8) for seed in range(5)]
    loops = [beta_vae_by_loops(z, y, np.random.default_rng(seed), (300, 200), 8) for seed in range(5)]
    assert abs(np.mean(ours) - np.mean(loops)) < 0.06
    assert (np.mean(loops) > 0.99) == (how_much == 0)               # one easy case and one hard


def mig_by_loops(z, y, n_bins=20):
    """Chen et al. 2018, equation 6, with sums over all pairs of values."""
    gaps = []
    for k in range(y.shape[1]):
        H = -sum(p * math.log(p) for p in (np.mean(y[:, k] == c) for c in np.unique(y[:, k])))
        information = []
        for n in range(z.shape[1]):
            v = np.digitize(z[:, n], np.histogram(z[:, n], n_bins)[1][1:-1])
            total = 0.0
            for b in np.unique(v):
                for c in np.unique(y[:, k]):
                    p = np.mean((v == b) & (y[:, k] == c))
                    total += p * math.log(p / (np.mean(v == b) * np.mean(y[:, k] == c))) if p else 0
            information.append(total)
        first, second = sorted(information)[::-1][:2]
        gaps.append((first - second) / H)
    return np.mean(gaps)


@pytest.mark.parametrize("how_much, extra", [(0.0, 0), (0.2, 2), (1.0, 1)])
def test_mig_is_its_definition(how_much, extra):
    y, z = mixed(1500, how_much, extra)
    assert abs(mig(z, y) - mig_by_loops(z, y)) < 1e-9
    assert mig(np.concatenate([z, np.zeros((1500, 1))], 1), y) == pytest.approx(mig(z, y))      # a dead code


def test_mig_of_known_codes():
    y, z = points(5000)
    assert mig(z, y) > 0.95
    assert mig(z[:, [0, 0, 1, 1, 2, 2]], y) < 1e-9                  # everything twice: no gap
    assert mig(np.random.default_rng(0).standard_normal((5000, 4)), y) < 0.02


# ---- TAD ------------------------------------------------------------------------------------------

def attributes(n=4000, seed=0):
    """Five attributes: three free ones, a copy of the first with errors, and one that no code tells; and 4 codes."""
    rng = np.random.default_rng(seed)
    a = (rng.random((n, 5)) < [0.5, 0.3, 0.2, 0.5, 0.5]).astype(int)
    a[:, 3] = np.where(rng.random(n) < 0.02, 1 - a[:, 0], a[:, 0])
    z = a[:, [0, 1, 2, 2]] + np.array([1.0, 0.5, 0.7, 1.5]) * rng.standard_normal((n, 4))
    return z, a


def test_tad_is_its_definition():
    """Yeats et al. 2022, with scikit-learn's areas and informations."""
    z, a = attributes()
    z[:, 3] = np.round(z[:, 3])                                     # ties
    z[:, 0] *= -1                                                   # a detector turned round
    total, counted = 0.0, []
    for k in range(5):
        areas = sorted(max(roc_auc_score(a[:, k], z[:, n]), 1 - roc_auc_score(a[:, k], z[:, n])) for n in range(4))
        H = mutual_info_score(a[:, k], a[:, k])
        told = max(mutual_info_score(a[:, k], a[:, j]) / H for j in range(5) if j != k)
        if areas[-1] >= 0.75 and told <= 0.2:
            total, counted = total + areas[-1] - areas[-2], [*counted, k]
    scores = evaluate.tad(z, a)
    assert counted == [1, 2]                                        # 0 and 3 tell each other, 4 is told by no code
    assert scores["tad"] == pytest.approx(total) and scores["attributes"] == 2
    assert evaluate.tad(z, a, most=1.0)["attributes"] == 4
    with_constant = np.concatenate([a, np.ones((len(a), 1), int)], 1)                   # counts as told by no code
    assert evaluate.tad(z, with_constant) == scores
    with pytest.raises(ValueError, match="attributes of 0 and 1"):
        evaluate.tad(z, a + a[:, ::-1])


# ---- the rest -------------------------------------------------------------------------------------

def test_principal_directions_against_numpy():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((200, 3, 5)) * [1, 2, 3, 9, 4] + 7)
    mean, direction = principal_directions(tokens)
    for n in range(3):
        first = np.linalg.svd((tokens[:, n] - tokens[:, n].mean(0)).numpy())[2][0]
        assert abs(abs(direction[n] @ torch.from_numpy(first)) - 1) < 1e-9
        assert direction[n].abs().max() == direction[n].max()
    assert torch.allclose(mean, tokens.mean(0))


GOOD = points(50)


@pytest.mark.parametrize("z, y, word", [
    (np.where(np.arange(50)[:, None] == 3, np.nan, GOOD[1]), GOOD[0], "1 of 50 points"),
    (GOOD[1][:40], GOOD[0], "one n"), (GOOD[1][:, 0], GOOD[0], "shape"),
    (GOOD[1], np.where([True, True, False], GOOD[0], 1), "factor 2 has one value")])
def test_wrong_input_is_one_sentence(z, y, word):
    for score in (factor_vae_score, beta_vae_score, mig, evaluate.dci_scores):
        with pytest.raises(ValueError, match=word):
            score(z, y)


def test_too_few_points():
    with pytest.raises(ValueError, match="DCI needs 15000 points, 50 are there"):
        evaluate.dci_scores(GOOD[1], GOOD[0])


def test_anybodys_codes(tmp_path, capsys):
    y, z = points(15000)
    np.savez(tmp_path / "codes.npz", z=z, y=y)
    result, = evaluate.main(["--codes", str(tmp_path / "codes.npz"), "--metrics", "factor_vae", "mig"])
    assert result["scores"]["factor_vae"] > 0.99 and set(result["scores"]) == {"factor_vae", "mig"}
    assert "FactorVAE" in capsys.readouterr().out


@pytest.mark.parametrize("flags, word", [(["no/run"], "no run"), (["--codes", "no.npz"], "no.npz"), ([], "name run folders"),
                                         (["--codes", "x.npz", "--metrics", "magic"], "invalid choice"),
                                         (["--codes", "README.md"], "z \\(n, N\\)"), (["--tokns"], "unrecognized")])
def test_command_line_ends_with_2_and_no_traceback(flags, word):
    import re
    done = subprocess.run([sys.executable, "evaluate.py", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and re.search(word, done.stderr) and "Traceback" not in done.stderr
