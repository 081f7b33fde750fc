"""The metrics of evaluate.py: against scikit-learn, against loops that follow the definitions, and
on codes whose scores are known."""
import math
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score

import evaluate
from data import InputError
from evaluate import beta_vae_score, dci, factor_vae_score, mig

SIZES = (4, 3, 2)                                               # two classes grow one tree


def points(n, seed=0):
    """Factors (n, 3), and codes (n, 3) that follow one each with a little noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, SIZES, (n, 3))
    return y, y - (np.array(SIZES) - 1) / 2 + 0.05 * rng.standard_normal(y.shape)


def mixed(n, how_much, extra, seed=0):
    """Codes (n, 3 + extra) that mix the factors more or less, with noise."""
    y, z = points(n, seed)
    mix = np.eye(3, 3 + extra) + how_much * np.random.default_rng(9).standard_normal((3, 3 + extra))
    return y, z @ mix + 0.2 * np.random.default_rng(seed + 1).standard_normal((n, 3 + extra))


# ---- DCI -----------------------------------------------------------------------------------------

def dci_by_scikit_learn(z, y, z_test, y_test):
    importance, accuracy = [], []
    for k in range(y.shape[1]):
        trees = GradientBoostingClassifier(random_state=0).fit(z, y[:, k])
        importance.append(trees.feature_importances_)
        accuracy.append(trees.score(z_test, y_test[:, k]))
    R = np.stack(importance, axis=1)
    return R, evaluate.purity(R), evaluate.purity(R.T), np.mean(accuracy)


@pytest.mark.parametrize("how_much, extra", [(0.1, 2), (1.0, 0)])
def test_dci_is_scikit_learns(how_much, extra):
    """The trees are the same trees, up to ties and rounding."""
    y, z = mixed(300, how_much, extra)
    y_test, z_test = mixed(200, how_much, extra, seed=5)
    z, z_test = z.astype(np.float32), z_test.astype(np.float32)
    ours = dci(z, y, z_test, y_test)
    R, D, C, accuracy = dci_by_scikit_learn(z, y, z_test, y_test)
    assert np.abs(ours["importance"] - R).max() < 0.02
    assert abs(ours["disentanglement"] - D) < 0.01 and abs(ours["completeness"] - C) < 0.01
    assert abs(ours["informativeness_test"] - accuracy) < 0.02
    assert abs(dci(z, y, z_test, y_test, max_bins=64)["disentanglement"] - D) < 0.04


def test_dci_of_few_points_tries_all_thresholds():
    """1,500 points, 3 of 7 codes noise: with 255 thresholds completeness was 0.022 off."""
    y, z = mixed(2000, 0.3, 1)
    noise = np.random.default_rng(4).standard_normal((2000, 3))
    z = np.concatenate([z, noise], axis=1).astype(np.float32)
    given = z[:1500], y[:1500], z[1500:], y[1500:]
    ours = dci(*given)
    _, D, C, _ = dci_by_scikit_learn(*given)
    assert abs(ours["disentanglement"] - D) < 0.01 and abs(ours["completeness"] - C) < 0.01


def test_dci_of_known_codes():
    y, z = points(600)
    y_test, z_test = points(300, seed=1)
    scores = dci(z, y, z_test, y_test)
    assert scores["disentanglement"] > 0.97 and scores["completeness"] > 0.97
    assert scores["informativeness_test"] > 0.99
    assert np.array_equal(scores["importance"].argmax(0), [0, 1, 2])
    assert np.allclose(scores["importance"].sum(0), 1)
    order = [2, 0, 1]
    permuted = dci(z[:, order], y, z_test[:, order], y_test)
    assert abs(permuted["disentanglement"] - scores["disentanglement"]) < 0.005    # not 0: ties
    rng = np.random.default_rng(2)
    noise = dci(rng.standard_normal((600, 5)), y, rng.standard_normal((300, 5)), y_test)
    assert noise["disentanglement"] < 0.1 and noise["completeness"] < 0.1
    constant = dci(np.ones((600, 5)), y, np.ones((300, 5)), y_test)
    assert constant["disentanglement"] < 1e-6 and not constant["importance"].any()


def test_completeness_and_disentanglement_are_not_the_same():
    def two_for_one(y):
        return np.stack([y[:, 0] // 2, y[:, 0] % 2, y[:, 1], y[:, 2]], axis=1)

    def one_for_two(y):
        return np.stack([y[:, 0] + 4 * y[:, 1], y[:, 2]], axis=1)

    y, y_test = points(600)[0], points(300, seed=1)[0]
    scores = dci(two_for_one(y), y, two_for_one(y_test), y_test)
    assert scores["disentanglement"] > 0.99 and scores["completeness"] < 0.9
    scores = dci(one_for_two(y), y, one_for_two(y_test), y_test)
    assert scores["completeness"] > 0.99 and scores["disentanglement"] < 0.8


def test_dead_and_duplicate_codes():
    y, z = points(600)
    y_test, z_test = points(300, seed=1)
    z = np.concatenate([np.zeros((600, 1)), z, z[:, :1]], axis=1)           # dead, three, a copy
    z_test = np.concatenate([np.zeros((300, 1)), z_test, z_test[:, :1]], axis=1)
    scores = dci(z, y, z_test, y_test)
    assert scores["disentanglement"] > 0.97 and not scores["importance"][0].any()
    assert scores["importance"][[1, 4], 0].min() > 0.3      # ties at random, as in scikit-learn
    theirs = GradientBoostingClassifier(random_state=0).fit(z, y[:, 0]).feature_importances_
    assert theirs[[1, 4]].min() > 0.3


# ---- FactorVAE score, beta-VAE score, MIG, TAD against their definitions -------------------------

def factor_vae_by_loops(z, y, rng, votes, batch):
    """Kim and Mnih 2018, section 4, word by word."""
    std = z.std(0)
    count = np.zeros((z.shape[1], y.shape[1]))
    right = 0
    for vote in range(sum(votes)):
        k = rng.integers(y.shape[1])
        rows = rng.choice(np.flatnonzero(y[:, k] == y[rng.integers(len(y)), k]), batch)
        variance = np.where(std >= 0.05, (z[rows] / std).var(0), math.inf)
        code = variance.argmin()
        if vote < votes[0]:
            count[code, k] += 1
        else:
            right += count[code].argmax() == k
    return right / votes[1]


def test_factor_vae_score_is_its_definition():
    y, z = mixed(2000, 0.3, 2)
    z[:, 1] = 0.01 * z[:, 1]                                    # under 0.05: may not vote
    ours, loops = [], []
    for seed in range(5):
        ours.append(factor_vae_score(z, y, seed, votes=(400, 400)))
        loops.append(factor_vae_by_loops(z, y, np.random.default_rng(seed), (400, 400), 64))
    assert abs(np.mean(ours) - np.mean(loops)) < 0.05
    assert ours[0] == factor_vae_score(z, y, 0, votes=(400, 400))


def test_factor_vae_score_of_known_codes(capsys):
    y, z = points(2000)
    assert factor_vae_score(z, y) > 0.999 and factor_vae_score(z[:, ::-1], y) > 0.999
    assert factor_vae_score(np.random.default_rng(0).standard_normal((2000, 4)), y) < 0.45
    assert 0.6 < factor_vae_score(z[:, :2], y) < 0.72           # one factor of three has no code
    assert capsys.readouterr().out == ""
    assert factor_vae_score(0.01 * z, y) == 0.0
    assert "3 of 3 codes have a standard deviation under 0.05" in capsys.readouterr().out


def beta_vae_by_loops(z, y, rng, points, batch):
    """Higgins et al. 2017, with scikit-learn's logistic regression."""
    x, target = [], []
    for _ in range(sum(points)):
        k = rng.integers(y.shape[1])
        a = rng.integers(len(y), size=batch)
        b = [rng.choice(np.flatnonzero(y[:, k] == y[i, k])) for i in a]
        x.append(np.abs(z[a] - z[b]).mean(0))
        target.append(k)
    x = (np.array(x) - np.mean(x, 0)) / np.std(x, 0)
    n = points[0]
    return LogisticRegression(max_iter=1000).fit(x[:n], target[:n]).score(x[n:], target[n:])


@pytest.mark.parametrize("how_much, noise", [(0.0, 0), (2.0, 3)])           # easy, hard
def test_beta_vae_score_is_its_definition(how_much, noise):
    y, z = mixed(500, how_much, 0)
    z = z + noise * np.random.default_rng(3).standard_normal(z.shape)
    ours, loops = [], []
    for seed in range(4):
        ours.append(beta_vae_score(z, y, seed, points=(300, 200), batch=8))
        loops.append(beta_vae_by_loops(z, y, np.random.default_rng(seed), (300, 200), 8))
    assert abs(np.mean(ours) - np.mean(loops)) < 0.06
    assert (np.mean(loops) > 0.99) == (noise == 0)


def test_beta_vae_score_of_many_codes_takes_little_memory():
    """At once, the differences of 4,000 inputs of 64 pairs of 512 codes take 0.5 GB, thrice."""
    y, z = points(500)
    z = np.concatenate([z, np.zeros((500, 509))], axis=1)
    tracemalloc.start()
    assert beta_vae_score(z, y, points=(3000, 1000)) > 0.99
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e8


def mig_by_definition(z, y, n_bins=20):
    """Chen et al. 2018, equation 6, with scikit-learn's mutual information."""
    gaps = []
    for k in range(y.shape[1]):
        information = []
        for code in z.T:
            edges = np.histogram(code, n_bins)[1]
            information.append(mutual_info_score(np.digitize(code, edges[1:-1]), y[:, k]))
        first, second = sorted(information)[::-1][:2]
        gaps.append((first - second) / mutual_info_score(y[:, k], y[:, k]))
    return np.mean(gaps)


def test_mig_is_its_definition():
    for how_much, extra in ((0.2, 2), (1.0, 1)):
        y, z = mixed(1500, how_much, extra)
        assert abs(mig(z, y) - mig_by_definition(z, y)) < 1e-9
    y, z = points(5000)
    assert mig(z, y) > 0.95
    assert mig(z[:, [0, 0, 1, 1, 2, 2]], y) < 1e-9              # everything twice: no gap
    assert mig(z[:, :1], y) == pytest.approx(1 / 3, abs=0.02)   # one code, all of one factor
    assert mig(np.random.default_rng(0).standard_normal((5000, 4)), y) < 0.02


def test_tad_is_its_definition():
    """Yeats et al. 2022, with scikit-learn's areas and informations."""
    rng = np.random.default_rng(0)
    a = (rng.random((4000, 5)) < [0.5, 0.3, 0.2, 0.5, 0.5]).astype(int)
    a[:, 3] = np.where(rng.random(4000) < 0.02, 1 - a[:, 0], a[:, 0])       # a copy, with errors
    z = a[:, [0, 1, 2, 2]] + np.array([1.0, 0.5, 0.7, 1.5]) * rng.standard_normal((4000, 4))
    z[:, 3] = np.round(z[:, 3])                                 # ties
    z[:, 0] *= -1                                               # low where the attribute is 1
    total, counted = 0.0, []
    for k in range(5):
        areas, shares = [], []
        for code in z.T:
            area = roc_auc_score(a[:, k], code)
            areas.append(max(area, 1 - area))
        for j in set(range(5)) - {k}:
            shares.append(mutual_info_score(a[:, k], a[:, j]) / mutual_info_score(a[:, k], a[:, k]))
        second, best = sorted(areas)[-2:]
        if best >= 0.75 and max(shares) <= 0.2:
            total += best - second
            counted.append(k)
    scores = evaluate.tad(z, a)
    assert counted == [1, 2]                    # 0 and 3 tell each other, 4 is told by no code
    assert scores["tad"] == pytest.approx(total) and scores["attributes"] == 2
    assert evaluate.tad(z, a, max_share=1.0)["attributes"] == 4
    constant = np.ones((4000, 1), int)                          # counts as told by no code
    assert evaluate.tad(z, np.concatenate([a, constant], axis=1)) == scores
    with pytest.raises(InputError, match="two values"):
        evaluate.tad(z, a + a[:, ::-1])


def test_principal_directions_against_numpy():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((200, 3, 5)) * [1, 2, 3, 9, 4] + 7)
    mean, direction = evaluate.principal_directions(tokens)
    assert torch.allclose(mean, tokens.mean(0))
    for n in range(3):
        first = np.linalg.svd((tokens[:, n] - mean[n]).numpy())[2][0]
        assert abs(abs(direction[n] @ torch.from_numpy(first)) - 1) < 1e-9
        assert direction[n].abs().max() == direction[n].max()


# ---- what has no score ---------------------------------------------------------------------------

Y, Z = points(50)
CONTINUOUS = np.where([True, False, True], Y, np.random.default_rng(0).random((50, 3)))


@pytest.mark.parametrize("z, y, words", [
    (np.where(np.arange(50)[:, None] == 3, np.nan, Z), Y, "1 of 50 points have codes"),
    (Z[:40], Y, "codes must be"), (Z[:, 0], Y, "codes must be"),
    (Z, np.where([True, True, False], Y, 1), "factor 2 has one value"),
    (Z, np.where(np.arange(50)[:, None] == 3, np.nan, Y), "factor 0 is NaN"),
    (Z, CONTINUOUS, "factor 1 has 50 different values in 50 points: .* bin them"),
])
def test_wrong_input_is_one_sentence(z, y, words):
    for score in (factor_vae_score, beta_vae_score, mig, evaluate.dci_scores):
        with pytest.raises(InputError, match=words):
            score(z, y)


def test_dci_is_not_defined_for_one_code_or_one_factor():
    for z, y in ((Z[:, :1], Y), (Z, Y[:, :1])):
        with pytest.raises(InputError, match="DCI needs 2 codes and 2 factors"):
            dci(z, y, z, y)
    with pytest.raises(InputError, match="DCI needs 15000 points, 50 are there"):
        evaluate.dci_scores(Z, Y)
