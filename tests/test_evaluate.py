"""evaluate.py on runs with untrained networks: swap accuracy, kept scores, figures, the command."""
import csv
import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from data import InputError
from evaluate import Run, swap_accuracy

N = 5
SIZES = (5, 4, 3)


# ---- swap accuracy of a data set, an encoder and a decoder that are formulas ---------------------

class Grid:
    """Images (3, 4, 4) whose channel k has the value of factor k, or not."""
    name, factor_names, factor_sizes = "grid", ("a", "b", "c"), SIZES

    def __init__(self, visible=(1, 1, 1)):
        self.visible = torch.tensor(visible)

    def __len__(self):
        return 60

    def index(self, factors):
        return torch.from_numpy(np.ravel_multi_index(tuple(factors.T), SIZES))

    def images(self, index):
        factors = torch.from_numpy(np.stack(np.unravel_index(index.numpy(), SIZES), axis=1))
        return self.show(factors)

    def show(self, factors):
        return (factors * self.visible).float()[:, :, None, None].expand(-1, -1, 4, 4)


def test_swap_accuracy_is_1_for_a_decoder_right_by_construction():
    def encode(images):                                         # (B, 3, 4, 4) -> (B, 4, 1)
        return torch.nn.functional.pad(images[:, :, :1, 0], (0, 0, 1, 0))

    def decode(ds, tokens):
        return ds.show(tokens[:, 1:, 0])

    importance = np.array([[0, 0, 0], [0.9, 0, 0.1], [0, 1, 0], [0.1, 0, 0.9]])
    for visible in ((1, 1, 1), (0, 1, 1)):                      # a is not seen: ties for the wanted
        ds = Grid(visible)
        scores = swap_accuracy(ds, encode, partial(decode, ds), importance)
        perfect = {"exact": 1.0, "moved": 1.0, "kept": 1.0}
        one = {"mean": 1.0, "worst": 1.0, "reconstruction": 1.0}
        assert scores == {"a": perfect, "b": perfect, "c": perfect, **one}
    ds.factor_sizes = (5, 4, 2)
    with pytest.raises(InputError, match="all combinations"):
        swap_accuracy(ds, encode, None, importance)


def test_swap_accuracy_of_a_token_with_two_factors():
    """b's token carries c, too; c's token says nothing."""
    def encode(images):
        a, b, c = images[:, :, 0, 0].T
        return torch.stack([a, 3 * b + c, 0 * c], dim=1)[..., None]

    def decode(tokens):
        a, bc, _ = tokens[..., 0].T
        return Grid().show(torch.stack([a, bc // 3, bc % 3], dim=1))

    scores = swap_accuracy(Grid(), encode, decode, np.eye(3), pairs=200)
    assert scores["a"] == {"exact": 1.0, "moved": 1.0, "kept": 1.0}
    assert scores["b"]["moved"] == 1 and scores["b"]["exact"] == scores["b"]["kept"]
    assert scores["b"]["kept"] == pytest.approx(1 / 3, abs=0.1)     # where c is the same by chance
    assert scores["c"] == {"exact": 0.0, "moved": 0.0, "kept": 1.0}
    assert scores["worst"] == 0 and scores["reconstruction"] == 1
    assert scores["mean"] == pytest.approx((1 + scores["b"]["exact"]) / 3)


# ---- runs ----------------------------------------------------------------------------------------

def few_points(z, y, seed=0, points=(40, 20)):
    return evaluate.dci(z[:40], y[:40], z[40:], y[40:])


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes data and a run folder with untrained networks; nothing in them is zero."""
    monkeypatch.setattr(evaluate, "DDIM_STEPS", 10)
    monkeypatch.setitem(evaluate.METRICS, "dci", few_points)
    save_images(tmp_path / "images.npz", 0)

    def make(name="run", data="images.npz", seed=0, **settings):
        torch.manual_seed(seed)
        cfg = train.Config(
            data=str(tmp_path / data), seed=seed, device="cpu", tokens=N, token_dim=6, channels=8,
            heads=2, groups=4, vae_channels=8, vae_groups=4, encoder_width=8, latent_channels=3,
            **settings)
        ds = evaluate.open_dataset(cfg.data)
        folder = tmp_path / name
        folder.mkdir()
        vae, encoder, unet = train.build_vae(cfg), train.build_encoder(cfg), train.build_unet(cfg)
        for p in unet.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
        if cfg.encoder == "scalar":
            encoder.head.to_scalars.weight.data.mul_(20)
        train.save_checkpoint(folder / "vae.pt", cfg, 1, {"vae": vae})
        parts = {"encoder": encoder, "unet": unet, "ema": unet}
        train.save_checkpoint(folder / "model.pt", cfg, cfg.steps, parts)
        train.write_json(folder / "run.json", {
            "config": dataclasses.asdict(cfg), "data": evaluate.describe(ds),
            "parameters": {"Autoencoder": 1, "ConceptEncoder": 2, "UNet": 3},
            "seconds": {"vae": 60, "tokens": 120}, "machine": {}, "peak_memory_mib": {}})
        return str(folder)
    return make


def save_images(path, seed):
    """60 random images of a grid of three factors."""
    images = np.random.default_rng(seed).integers(0, 256, (60, 64, 64, 3), np.uint8)
    labels = np.stack(np.unravel_index(np.arange(60), SIZES), axis=1)
    np.savez(path, images=images, labels=labels)


def pixels(images):
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy().astype(int)


def cells(path, columns, rows):
    """The images in a sheet's last columns, (rows, columns, 64, 64, 3)."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    sheet = sheet[:rows * 66, sheet.shape[1] - columns * 66:]
    return sheet.reshape(rows, 66, columns, 66, 3).swapaxes(1, 2)[:, :, :64, :64]


def test_scores_of_a_run(make_run):
    folder = make_run()
    result, = evaluate.main([folder, "--pairs", "3"])
    assert json.loads((Path(folder) / "scores.json").read_text()) == result
    scores = result["scores"]
    assert {"disentanglement", "factor_vae", "mig", "beta_vae", "swap", "psnr"} <= set(scores)
    assert set(scores["swap"]) == {"factor_0", "factor_1", "factor_2", "mean", "worst",
                                   "reconstruction"}
    assert result["protocol"]["swap"] == {"pairs": 3, "seed": 0}
    run = Run(folder)
    pruned = int((run.codes(np.arange(60)).std(0) < 0.05).sum())
    assert result["protocol"]["factor_vae"]["pruned_codes"] == pruned
    images = run.images(run.rows(60, seed=1))
    mse = (run.decode(run.encode(images)) - images).div(2).square().mean().item()
    assert scores["mse"] == pytest.approx(mse, rel=1e-4)
    assert scores["psnr"] == pytest.approx(-10 * np.log10(mse), rel=1e-4)
    kept = np.load(Path(folder) / "codes.npz")
    assert np.array_equal(kept["z"], run.codes(np.arange(60))) and kept["y"].shape == (60, 3)
    one, = evaluate.main([folder, "--metrics", "mig"])          # the other scores stay
    assert one["scores"] == scores and set(one["seconds"]) >= {"dci", "swap"}


def test_scores_are_kept_with_their_data_and_the_table_builds_no_network(
    make_run, tmp_path, monkeypatch, capsys
):
    runs = [make_run("a"), make_run("b", seed=1)]
    first = evaluate.main(runs + ["--pairs", "1"])
    assert [result["scores"]["psnr"] for result in first] != [None, None]
    table = capsys.readouterr().out.splitlines()[-2:]
    assert table[1].startswith("images") and "   2 " in table[1] and "nan" not in table[1]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Run", None)
        assert evaluate.main(runs) == first
        for folder in runs:                                     # as if of the built-in world
            info = train.read_run(folder)
            info["data"]["factor_sizes"], info["config"]["data"] = SIZES, ""
            train.write_json(Path(folder) / "run.json", info)
            assert evaluate.scored_before(folder, "", "")["step"] == train.Config().steps
            info["config"]["data"] = str(tmp_path / "images.npz")
            train.write_json(Path(folder) / "run.json", info)
    save_images(tmp_path / "images.npz", 1)                     # other images under the same name
    second = evaluate.main(runs + ["--pairs", "1"])
    assert all(a["scores"]["psnr"] != b["scores"]["psnr"] for a, b in zip(first, second))


def test_another_data_set_or_a_folder_for_reading_needs_out(make_run, tmp_path):
    folder = make_run()
    before = sorted(Path(folder).iterdir())
    save_images(tmp_path / "others.npz", 2)
    with pytest.raises(InputError, match="add --out FOLDER"):
        Run(folder, str(tmp_path / "others.npz"))
    moved = (tmp_path / "images.npz").rename(tmp_path / "sub.npz").rename(tmp_path / "images.npz")
    out = tmp_path / "results"
    for data in (tmp_path / "others.npz", moved):
        evaluate.main([folder, "--data", str(data), "--out", str(out), "--metrics", "mig"])
    evaluate.main([folder, "--out", str(out), "--figures", "reconstruction"])
    assert sorted(Path(folder).iterdir()) == before
    assert {path.name for path in out.iterdir()} == {"scores.json", "codes.npz",
                                                     "reconstruction.png"}


def test_what_cannot_be_scored_is_left_out_and_said(make_run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.arange(40)[:, None] // 8)
    folder = make_run(data="one.npz")
    result, = evaluate.main([folder])
    out = capsys.readouterr().out
    assert "dci is left out: DCI needs 2 codes and 2 factors" in out and "swap is left out" in out
    assert "disentanglement" not in result["scores"] and result["scores"]["mig"] >= 0
    with pytest.raises(InputError, match="DCI needs 2 codes"):
        evaluate.main([folder, "--metrics", "dci"])
    assert evaluate.rounded({"x": [np.nan, 0.123456789]}) == {"x": [None, 0.12346]}
    rows = [{"data": {"name": "codes"}, "scores": {"mig": x}} for x in (0.5, None, 0.7)]
    evaluate.table(rows)                                        # the mean of those that have it
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["codes", "3", "0.600", "+-", "0.141"]


@pytest.mark.parametrize("count", [1, 2])
def test_folders_of_one_or_two_images(make_run, tmp_path, count):
    (tmp_path / "photos").mkdir()
    for i in range(count):
        Image.new("RGB", (64, 64), (50 * i, 90, 200)).save(tmp_path / f"photos/{i}.png")
    folder = make_run(data="photos", encoder="slot")
    assert set(evaluate.main([folder])[0]["scores"]) == {"mse", "psnr", "psnr_autoencoder"}
    evaluate.main([folder, "--figures"])
    drawn = {path.stem for path in Path(folder).glob("*.png")}
    assert drawn == set(evaluate.FIGURES) - {"swap", "traversal"}
    with pytest.raises(InputError, match="figure traversal needs a run with --encoder scalar"):
        evaluate.main([folder, "--figures", "traversal"])


# ---- figures -------------------------------------------------------------------------------------

@pytest.fixture
def run(make_run):
    run = Run(make_run())
    run.importance = np.array([[0, 0.9, 0], [0.8, 0, 0.1], [0, 0, 0], [0.2, 0.1, 0], [0, 0, 0.5]])
    return run


def test_swap_shows_the_groups_of_tokens(run):
    evaluate.swap(run)
    index = run.rows(2000, seed=2)
    y = run.ds.factors(index).numpy()
    sources = index[(y != y[0]).all(1)][:10]
    tokens, target = run.encode(run.images(sources)), run.encode(run.images(index[:1]))
    shown = cells(run.out / "swap.png", 10, 5)
    assert np.array_equal(shown[0], pixels(run.images(sources)))
    sheet = np.asarray(Image.open(run.out / "swap.png"))
    assert np.array_equal(sheet[:64, 16:80], pixels(run.images(index[:1]))[0])
    for row, group in ((1, []), (2, [1, 3]), (3, [0]), (4, [4])):
        swapped = tokens.clone()
        swapped[:, group] = target[:, group]
        assert np.abs(shown[row] - pixels(run.decode(swapped))).max() <= 1
    names, used = evaluate.name_tokens(run)
    assert used == [1, 3, 0, 4] and names[1:3] == ["token 1: factor 0 0.80", "token 2: idle"]
    evaluate.swap_tokens(run)
    shown = cells(run.out / "swap_tokens.png", 8, 2 + N)
    swapped = tokens[:8].clone()
    swapped[:, 2] = target[:, 2]                                # the idle one comes last
    assert np.abs(shown[-1] - pixels(run.decode(swapped))).max() <= 1


def test_traversal(run):
    evaluate.traversal(run)
    scalars = run.encoder.scalars(run.images(run.rows(1, seed=3)))
    scalars[:, 3] = float(np.quantile(run.codes(np.arange(60))[:, 3], 0.99))
    shown = cells(run.out / "traversal.png", 9, 4)[1, 8]        # of token 3, at its highest
    assert np.abs(pixels(run.decode(run.encoder.tokens_of(scalars)))[0] - shown).max() <= 1
    assert Image.open(run.out / "traversal.gif").n_frames == 16


def test_attention_is_flat_where_queries_are_zero(run):
    for module in run.unet.modules():
        if hasattr(module, "cross_attention"):
            module.cross_attention.to_q.weight.zero_()
    evaluate.attention(run)
    shown = cells(run.out / "attention.png", 9, 5)
    images = run.images(run.rows(3, seed=4))
    assert np.array_equal(shown[0], np.concatenate([pixels(images)] * 3))
    grey = 0.5 * images.mean(1, keepdim=True).expand(-1, 3, -1, -1) + 0.3
    flat = 0.2 * grey + 0.8 * torch.tensor([1.0, -0.6, -1.0])[:, None, None]
    expected = np.concatenate([pixels(flat.clamp(-1, 1))] * 3)
    assert np.abs(shown[1] - expected).max() <= 1


def test_bottleneck_is_the_papers_figure(run):
    evaluate.bottleneck(run)
    with open(run.out / "bottleneck.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for column, height, shares in (
        ("linear_1", None, (0.155, 0.049, 0.011)), ("linear_67.6", 73, (0.59, 0.25, 0.07)),
        ("sqrt_linear_67.6", None, (0.52, 0.16)), ("cosine_67.6", 77, (0.81, 0.57, 0.30)),
        ("sqrt_67.6", 67, ()),
    ):
        for t, share in zip((200, 400, 600), shares):           # as read off the paper's figure
            assert abs(rows[t][column] / rows[0][column] - share) < 0.02
        assert height is None or abs(rows[0][column] - height) < 1


def test_when_a_token_is_not_read_its_row_is_zero(run):
    unet = run.unet

    def deaf(x_t, t, tokens):
        tokens = tokens.clone()
        tokens[:, 3] = 0
        return unet(x_t, t, tokens)

    evaluate.when(run)
    images = run.images(run.rows(6))
    x_0, tokens = run.vae.encode(images), run.encode(images)
    run.unet = deaf
    rise = evaluate.rise_of_loss(run, x_0, tokens, 325)
    assert rise.shape == (N,) and not rise[3] and rise[[0, 1, 2, 4]].all()


# ---- the command ---------------------------------------------------------------------------------

def test_codes_of_anybody(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, (2000, 2))
    np.savez(tmp_path / "codes.npz", z=y + 0.05 * rng.standard_normal(y.shape), y=y)
    result, = evaluate.main(["--codes", str(tmp_path / "codes.npz")])
    assert set(result["scores"]) == {"factor_vae", "mig", "beta_vae"}
    assert result["scores"]["factor_vae"] > 0.99
    out = capsys.readouterr().out
    assert "FactorVAE" in out and "dci is left out: DCI needs 15000 points, 2000 are there" in out


def test_a_mistake_ends_with_2_and_one_sentence():
    script = Path(evaluate.__file__)
    command = [sys.executable, script, "--codes", script.with_name("README.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "README.md is no .npz of z (n, N) and y (n, K)" in done.stderr
