"""The trained run that comes with the repository has the scores that the README gives it."""
import json
import re
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github" / "pretrained" / "world"


@pytest.fixture(scope="module")
def run(tmp_path_factory, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "open_dataset", lambda *paths: world)
        return evaluate.Run(str(FOLDER), out=str(tmp_path_factory.mktemp("out")))


def test_its_scores_come_out_again(run):
    wanted = json.loads((FOLDER / "scores.json").read_text())["scores"]
    index = run.rows(15000)
    z, y = evaluate.compute_codes(run.encoder, run.ds, index), run.ds.factors(index).numpy()
    dci = evaluate.dci_scores(z, y)
    assert evaluate.factor_vae_score(z, y) == pytest.approx(wanted["factor_vae"], abs=0.01)
    assert dci["disentanglement"] == pytest.approx(wanted["disentanglement"], abs=0.01)
    swap = evaluate.swap_accuracy(run.ds, run.encode, run.decode, wanted["importance"])
    assert swap["mean"] == pytest.approx(wanted["swap"]["mean"], abs=0.05)


def test_its_scores_are_the_readmes():
    wanted = json.loads((FOLDER / "scores.json").read_text())["scores"]
    sentence = (f"FactorVAE score {wanted['factor_vae']:.3f}, "
                f"DCI disentanglement {wanted['disentanglement']:.3f}, "
                f"swap accuracy {wanted['swap']['mean']:.3f}")
    assert sentence in " ".join((ROOT / "README.md").read_text().split())


def test_it_names_no_folder():
    for file in FOLDER.glob("*.json"):
        assert not re.search("/(tmp|work|home|root|Users)/", file.read_text())
