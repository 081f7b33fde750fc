"""The metrics of evaluate.py: against scikit-learn, against loops that follow the definitions, and
on codes whose scores are known."""
import math

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score, roc_auc_score

import evaluate
from data import InputError
from evaluate import dci, factor_vae_score, mig

SIZES = (4, 3, 2)  # two classes grow one tree


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


@pytest.mark.parametrize("n, how_much, extra, noise", [
    (300, 0.1, 2, 0), (300, 1.0, 0, 0),
    (1500, 0.3, 1, 3),  # 3 of 7 codes noise: with 255 thresholds completeness was 0.022 off
])
def test_dci_is_scikit_learns(n, how_much, extra, noise):
    """The trees are the same trees, up to ties and rounding."""
    y, z = mixed(n + 300, how_much, extra)
    noise = np.random.default_rng(4).standard_normal((n + 300, noise))
    z = np.concatenate([z, noise], axis=1).astype(np.float32)
    ours = dci(z[:n], y[:n], z[n:], y[n:])
    R, D, C, accuracy = dci_by_scikit_learn(z[:n], y[:n], z[n:], y[n:])
    assert np.abs(np.array(ours["importance"]) - R).max() < 0.02
    assert abs(ours["disentanglement"] - D) < 0.01 and abs(ours["completeness"] - C) < 0.01
    assert abs(ours["informativeness_test"] - accuracy) < 0.02


def test_dci_of_as_many_classes_as_cars3d():
    """Without a bound on the Newton steps the trees diverge here: an accuracy of 0.07."""
    rng = np.random.default_rng(0)
    y = np.stack([rng.integers(0, 183, 3150), rng.integers(0, 3, 3150)], axis=1)
    z = rng.standard_normal((183, 3))[y[:, 0]] + 0.1 * rng.standard_normal((3150, 3))
    assert dci(z[:2100], y[:2100], z[2100:], y[2100:])["accuracy"][0] > 0.65


def test_dci_of_known_codes():
    y, z = points(600)
    y_test, z_test = points(300, seed=1)
    scores = dci(z, y, z_test, y_test)
    assert scores["disentanglement"] > 0.97 and scores["completeness"] > 0.97
    assert scores["informativeness_test"] > 0.99
    assert np.array_equal(np.argmax(scores["importance"], axis=0), [0, 1, 2])
    copied = dci(z[:, [0, 0, 1, 2]], y, z_test[:, [0, 0, 1, 2]], y_test)
    assert np.array(copied["importance"])[:2, 0].min() > 0.3  # ties at random, as in scikit-learn
    rng = np.random.default_rng(2)
    noise = dci(rng.standard_normal((600, 5)), y, rng.standard_normal((300, 5)), y_test)
    assert noise["disentanglement"] < 0.1 and noise["completeness"] < 0.1
    constant = dci(np.ones((600, 5)), y, np.ones((300, 5)), y_test)
    assert constant["disentanglement"] < 1e-6 and not np.any(constant["importance"])


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
    z[:, 1] = 0.01 * z[:, 1]  # under 0.05: may not vote
    ours, loops = [], []
    for seed in range(5):
        ours.append(factor_vae_score(z, y, seed, votes=(400, 400)))
        loops.append(factor_vae_by_loops(z, y, np.random.default_rng(seed), (400, 400), 64))
    assert abs(np.mean(ours) - np.mean(loops)) < 0.05
    assert ours[0] == factor_vae_score(z, y, 0, votes=(400, 400))


def test_factor_vae_score_of_known_codes():
    y, z = points(2000)
    assert factor_vae_score(z, y) > 0.999
    assert 0.6 < factor_vae_score(z[:, :2], y) < 0.72  # one factor of three has no code
    assert factor_vae_score(0.01 * z, y) == 0.0  # all are pruned


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
    assert mig(z[:, [0, 0, 1, 1, 2, 2]], y) < 1e-9  # everything twice: no gap
    assert mig(z[:, :1], y) == pytest.approx(1 / 3, abs=0.02)  # one code, all of one factor
    assert mig(np.random.default_rng(0).standard_normal((5000, 4)), y) < 0.02


def test_tad_is_its_definition():
    """Yeats et al. 2022, with scikit-learn's areas and informations."""
    rng = np.random.default_rng(0)
    a = (rng.random((4000, 5)) < [0.5, 0.3, 0.2, 0.5, 0.5]).astype(int)
    a[:, 3] = np.where(rng.random(4000) < 0.02, 1 - a[:, 0], a[:, 0])  # a copy, with errors
    z = a[:, [0, 1, 2, 2]] + np.array([1.0, 0.5, 0.7, 1.5]) * rng.standard_normal((4000, 4))
    z[:, 3] = np.round(z[:, 3])  # ties
    z[:, 0] *= -1  # low where the attribute is 1
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
    assert counted == [1, 2]  # 0 and 3 tell each other, 4 is told by no code
    assert scores["tad"] == pytest.approx(total) and scores["attributes"] == 2
    assert evaluate.tad(z, a, max_share=1.0)["attributes"] == 4
    constant = np.ones((4000, 1), int)  # counts as told by no code
    assert evaluate.tad(z, np.concatenate([a, constant], axis=1)) == scores
    with pytest.raises(InputError, match="two values"):
        evaluate.tad(z, a + a[:, ::-1])


def test_principal_components_against_numpy():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((200, 3, 5)) * [1, 2, 3, 9, 4] + 7)
    components = evaluate.principal_components(tokens)
    for n in range(3):
        x = (tokens[:, n] - tokens[:, n].mean(0)).numpy()
        first = x @ np.linalg.svd(x)[2][0]
        error = np.abs(components[:, n].numpy() - [[1], [-1]] * first).max(1)
        assert error.min() < 1e-9


# ---- what has no score ---------------------------------------------------------------------------

Y, Z = points(50)
ROW = np.arange(50)[:, None]
CONTINUOUS = np.where([True, False, True], Y, np.random.default_rng(0).random((50, 3)))


@pytest.mark.parametrize("z, y, words", [
    (np.where(ROW == 3, np.nan, Z), Y, "NaN or infinite"),
    (Z, np.where(ROW == 4, np.nan, Y), "NaN or infinite"),
    (Z[:40], Y, "codes must be"),
    (Z[:, 0], Y, "codes must be"),
    (Z, np.where([True, True, False], Y, 1), "factor 2 has 1 values in 50 points"),
    (Z, CONTINUOUS, "factor 1 has 50 values in 50 points"),
    (Z, np.where([True, False, True], Y, ROW == 5), "2 values in 50 points, one of them 49"),
])
def test_wrong_input_is_one_sentence(z, y, words):
    for score in (factor_vae_score, mig):
        with pytest.raises(InputError, match=words):
            score(z, y)
    with pytest.raises(InputError, match=words):
        dci(z, y, z, y)


def test_parts_without_a_score_are_refused():
    """A value that is rare, or not there at all, among the points drawn or trained on."""
    rare = np.stack([np.arange(30000) % 2, np.arange(30000) < 9], axis=1)
    with pytest.raises(InputError, match="factor 1 has"):
        mig(rare + 0.0, rare)
    with pytest.raises(InputError, match="factor 0 has 1 values in 20 points"):
        dci(Z[:20], np.where([False, True, True], Y[:20], 1), Z, Y)
    with pytest.raises(InputError, match="DCI needs test points"):
        dci(Z, Y, Z[:0], Y[:0])


def test_a_complete_grid_with_few_points_per_value_is_scored():
    """72 views of three objects, three points per view: no continuous factor."""
    y = np.indices((3, 72)).reshape(2, -1).T
    z = y / [1, 24] + 0.01 * np.random.default_rng(0).standard_normal(y.shape)
    assert factor_vae_score(z, y) == 1.0
    assert mig(z, y) > 0.8


def test_dci_is_not_defined_for_one_code_or_one_factor():
    for z, y in ((Z[:, :1], Y), (Z, Y[:, :1])):
        with pytest.raises(InputError, match="DCI needs 2 codes and 2 factors"):
            dci(z, y, z, y)
    with pytest.raises(InputError, match="need 15000 points, 50 are there"):
        evaluate.dci_scores(Z, Y)
