"""evaluate.py on runs with untrained networks: swap accuracy, kept scores, figures, the command."""
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
PERFECT = {"exact": 1.0, "moved": 1.0, "kept": 1.0}


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
    def encode(images):  # (B, 3, 4, 4) -> (B, 4, 1)
        return torch.nn.functional.pad(images[:, :, :1, 0], (0, 0, 1, 0))

    def decode(ds, tokens):
        return ds.show(tokens[:, 1:, 0])

    importance = np.array([[0, 0, 0], [0.9, 0, 0.1], [0, 1, 0], [0.1, 0, 0.9]])
    for visible in ((1, 1, 1), (0, 1, 1)):  # a is not seen: ties for the wanted
        ds = Grid(visible)
        scores = swap_accuracy(ds, encode, partial(decode, ds), importance)
        one = {"mean": 1.0, "worst": 1.0, "reconstruction": 1.0}
        assert scores == {"a": PERFECT, "b": PERFECT, "c": PERFECT, **one}


def test_swap_accuracy_of_a_token_with_two_factors():
    """b's token carries c, too; c's token says nothing."""
    def encode(images):
        a, b, c = images[:, :, 0, 0].T
        return torch.stack([a, 3 * b + c, 0 * c], dim=1)[..., None]

    def decode(tokens):
        a, bc, _ = tokens[..., 0].T
        return Grid().show(torch.stack([a, bc // 3, bc % 3], dim=1))

    scores = swap_accuracy(Grid(), encode, decode, np.eye(3), pairs=200)
    assert scores["a"] == PERFECT
    assert scores["b"]["moved"] == 1 and scores["b"]["exact"] == scores["b"]["kept"]
    assert scores["b"]["kept"] == pytest.approx(1 / 3, abs=0.1)  # where c is the same by chance
    assert scores["c"] == {"exact": 0.0, "moved": 0.0, "kept": 1.0}
    assert scores["worst"] == 0 and scores["reconstruction"] == 1
    assert scores["mean"] == pytest.approx((1 + scores["b"]["exact"]) / 3)


# ---- runs ----------------------------------------------------------------------------------------

def save_images(path, seed):
    """Random images of a grid of factors."""
    n = int(np.prod(SIZES))
    images = np.random.default_rng(seed).integers(0, 256, (n, 64, 64, 3), np.uint8)
    np.savez(path, images=images, labels=np.stack(np.unravel_index(np.arange(n), SIZES), axis=1))


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes data and a run folder with untrained networks; nothing in them is zero."""
    monkeypatch.setattr(evaluate, "DDIM_STEPS", 10)
    monkeypatch.setattr(evaluate, "swap_accuracy", partial(swap_accuracy, pairs=3))
    monkeypatch.setitem(evaluate.OF_FACTORS, "dci", partial(evaluate.dci_scores, points=(40, 20)))
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
        train.save_checkpoint(folder / "vae.pt", cfg, 1, 1.0, {"vae": vae})
        parts = {"encoder": encoder, "unet": unet, "ema": unet}
        train.save_checkpoint(folder / "model.pt", cfg, cfg.steps, 2.0, parts)
        data = dict(name=ds.name, images=len(ds), checksum=ds.checksum())
        train.write_json(folder / "run.json", {"config": dataclasses.asdict(cfg), "data": data})
        return str(folder)
    return make


def pixels(images):
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy().astype(int)


def cells(sheet, columns, rows):
    """The images of a sheet, (rows, columns, 64, 64, 3)."""
    assert sheet.height == 64 * rows
    sheet = np.asarray(sheet).astype(int)[:, sheet.width - columns * 64:]
    return sheet.reshape(rows, 64, columns, 64, 3).swapaxes(1, 2)


def test_scores_of_a_run(make_run, tmp_path):
    folder = make_run()
    result, = evaluate.main([folder])
    text = (Path(folder) / "scores.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result)) and str(tmp_path) not in text
    scores = result["scores"]
    assert {"disentanglement", "factor_vae", "mig", "swap", "psnr"} <= set(scores)
    assert result["run"]["seconds"] == {"vae": 1.0, "tokens": 2.0}
    run = Run(folder)
    assert np.array_equal(run.importance, scores["importance"])
    images = run.images(60, seed=1)
    mse = (run.decode(run.encode(images)) - images).div(2).square().mean().item()
    assert scores["psnr"] == pytest.approx(-10 * np.log10(mse), rel=1e-4)
    kept = np.load(Path(folder) / "codes.npz")
    z = evaluate.compute_codes(run.encoder, run.ds, np.arange(60))
    assert np.array_equal(kept["z"], z) and kept["y"].shape == (60, 3)
    assert (result["images"], result["ddim_steps"]) == (60, 10)
    fewer, = evaluate.main([folder, "--images", "30", "--ddim-steps", "12"])
    assert (fewer["images"], fewer["ddim_steps"]) == (30, 12)
    assert fewer["scores"]["psnr"] != scores["psnr"]
    assert evaluate.name_setting(fewer).endswith(", ddim_steps 12")


def test_the_table_of_scored_runs_builds_no_network(make_run, monkeypatch, capsys):
    runs = [make_run("a"), make_run("b", seed=1)]
    first = evaluate.main(runs)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("images") and " 2 " in line and "+-" in line and "nan" not in line
    monkeypatch.setattr(evaluate, "Run", None)
    assert json.dumps(evaluate.main(runs)) == json.dumps(first)


def test_runs_of_two_data_sets_of_one_name_are_two_lines(make_run, tmp_path, capsys):
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        save_images(tmp_path / folder / "images.npz", seed)
    evaluate.main([make_run("1", "a/images.npz"), make_run("2", "b/images.npz")])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split()[:1] == lines[1].split()[:1] == ["images.npz"]
    assert lines[0].split()[1] != lines[1].split()[1] and "+-" not in "".join(lines)


def test_another_data_set_needs_out(make_run, tmp_path):
    """Also one of as many images; what was scored stays."""
    folder = make_run()
    before = sorted(Path(folder).iterdir())
    save_images(tmp_path / "others.npz", 2)
    others = ["--data", str(tmp_path / "others.npz")]
    with pytest.raises(InputError, match="add --out FOLDER"):
        evaluate.main([folder, *others])
    with pytest.raises(InputError, match="for one run alone"):
        evaluate.main([folder, folder, *others])
    moved = (tmp_path / "images.npz").rename(tmp_path / "moved.npz")
    assert len(Run(folder, str(moved)).ds) == 60
    out = tmp_path / "results"
    evaluate.main([folder, *others, f"--out={out}", "--figures"])
    assert sorted(Path(folder).iterdir()) == before
    assert {path.stem for path in out.iterdir()} == set(evaluate.FIGURES)


def test_the_unpacked_data_may_lie_elsewhere(make_run, tmp_path, monkeypatch):
    folder = make_run()
    cache = tmp_path / "elsewhere"
    evaluate.main([folder, "--cache", str(cache), "--figures"])
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    evaluate.main([folder, "--out=~/home", "--cache=~/cache", "--figures"])
    assert (tmp_path / "home" / "attention.png").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_scores_of_an_exported_run_stay(make_run, tmp_path):
    folder = Path(make_run())
    contents = train.load_checkpoint(folder / "model.pt")
    del contents["unet"]
    torch.save(contents, folder / "model.pt")
    evaluate.main([str(folder)])
    before = (folder / "scores.json").read_bytes()
    with pytest.raises(InputError, match="was exported with its scores: add --out FOLDER"):
        evaluate.main([str(folder), "--images", "50"])
    evaluate.main([str(folder), "--images", "50", f"--out={tmp_path / 'other'}"])
    assert (folder / "scores.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scores": '])
def test_a_damaged_scores_file_does_not_stop_a_table(make_run, capsys, content):
    runs = [make_run("a"), make_run("b", seed=1)]
    (Path(runs[1]) / "scores.json").write_text(content)
    assert len(evaluate.main(runs)) == 1
    out = capsys.readouterr().out
    assert f"{runs[1]} is left out: " in out and "scores.json is missing or damaged" in out


def test_codes_are_computed_in_full_precision(make_run):
    train.allow_tf32(True)
    Run(make_run())
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_figures_elsewhere_know_the_scores(make_run, tmp_path):
    folder = make_run()
    evaluate.main([folder])
    elsewhere = Run(folder, out=str(tmp_path / "figures"))
    assert elsewhere.importance == Run(folder).importance is not None
    save_images(tmp_path / "others.npz", 2)
    assert Run(folder, str(tmp_path / "others.npz"), str(tmp_path / "other")).importance is None


def test_an_unfinished_run_is_left_out_of_the_table(make_run, capsys):
    runs = [make_run("a"), make_run("b", seed=1)]
    (Path(runs[1]) / "model.pt").unlink()
    assert len(evaluate.main(runs)) == 1
    assert f"{runs[1]} is left out" in capsys.readouterr().out


def test_codes_have_no_figures():
    with pytest.raises(InputError, match="without --figures"):
        evaluate.main(["--codes", "z.npz", "--figures"])


def test_a_run_of_another_version_is_left_out_of_the_table(make_run, capsys):
    runs = [make_run("a"), make_run("b", seed=1)]
    evaluate.main(runs)
    path = Path(runs[1]) / "scores.json"
    scores = json.loads(path.read_text())
    scores["run"]["config"]["dropout"] = 0.1
    train.write_json(path, scores)
    assert len(evaluate.main(runs)) == 1
    assert f"{runs[1]} is left out: this run is of another version" in capsys.readouterr().out


def test_what_cannot_be_scored_is_left_out_and_said(make_run, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.OF_FACTORS, "dci", evaluate.dci_scores)  # needs 15,000 points
    result, = evaluate.main([make_run()])
    out = capsys.readouterr().out
    assert "dci is left out: DCI and swaps need 15000 points" in out
    assert result["scores"]["mig"] >= 0
    assert not {"disentanglement", "swap"} & result["scores"].keys()
    values = ({"mig": 0.5}, {}, {"mig": 0.7})  # the mean is over those that have it
    evaluate.table([{"data": {"name": "codes"}, "scores": scores} for scores in values])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["codes", "3", "0.600", "+-", "0.141"]


@pytest.mark.parametrize("count", [1, 2])
def test_folders_of_one_or_two_images(make_run, tmp_path, count):
    (tmp_path / "photos").mkdir()
    for i in range(count):
        Image.new("RGB", (64, 64), (50 * i, 90, 200)).save(tmp_path / f"photos/{i}.png")
    folder = make_run(data="photos", encoder="slot")
    assert set(evaluate.main([folder])[0]["scores"]) == {"psnr", "psnr_autoencoder"}
    evaluate.main([folder, "--figures"])
    drawn = {path.stem for path in Path(folder).glob("*.png")}
    assert drawn == set(evaluate.FIGURES) - {"traversal"}  # which needs scalar tokens


# ---- figures -------------------------------------------------------------------------------------

@pytest.fixture
def run(make_run):
    run = Run(make_run())
    run.importance = np.array([[0, 0.9, 0], [0.8, 0, 0.1], [0, 0, 0], [0.2, 0.1, 0], [0, 0, 0.5]])
    return run


def test_swap_shows_the_groups_of_tokens(run):
    images = evaluate.target_and_sources(run)
    tokens = run.encode(images)
    shown = cells(evaluate.swap(run), 8, 4)
    assert np.array_equal(shown[0], pixels(images))
    assert (shown[1:, 0] == 255).all()  # the target is not swapped with itself
    for row, group in ((1, [1, 3]), (2, [0]), (3, [4])):
        swapped = tokens[1:].clone()
        swapped[:, group] = tokens[0, group]
        assert np.abs(shown[row, 1:] - pixels(run.decode(swapped))).max() <= 1
    used = {"token 1: factor_0 0.80": 1, "token 3: factor_0 0.20": 3, "token 0: factor_1 0.90": 0,
            "token 4: factor_2 0.50": 4}  # token 2 is idle
    assert list(evaluate.used_tokens(run).items()) == list(used.items())
    run.importance = None
    swapped = tokens[1:].clone()
    swapped[:, 1] = tokens[0, 1]
    shown = cells(evaluate.swap(run), 8, 6)
    assert np.abs(shown[2, 1:] - pixels(run.decode(swapped))).max() <= 1


def test_the_target_of_a_swap_differs_from_its_sources_in_every_factor(run, world):
    run.ds = world
    images = evaluate.target_and_sources(run)
    rows = run.rows(2000, seed=evaluate.TARGET)
    y = world.factors(rows).numpy()
    found = []
    for image in images:
        error = (world.images(rows) - image).abs().mean((1, 2, 3))
        found.append(y[error.argmin()])
    target, sources = found[0], np.array(found[1:])
    assert len(sources) == 7 and (sources != target).all()
    assert len(set(target[:3])) == 3 and not np.isin(sources[:, :3], target[:3]).any()


def test_traversal(run):
    scalars = run.encoder.scalars(run.images(60, seed=3))
    edited = scalars[:1].clone()
    edited[:, 3] = float(np.quantile(scalars[:, 3].numpy(), 0.99))
    shown = cells(evaluate.traversal(run), 9, 4)[1, 8]  # of token 3, at its highest
    assert np.abs(pixels(run.decode(run.encoder.head.tokens_of(edited)))[0] - shown).max() <= 1


def test_attention_is_flat_where_queries_are_zero(run):
    images = pixels(run.images(10, seed=4))
    peaked = cells(evaluate.attention(run), 10, 5)
    for module in run.unet.modules():
        if hasattr(module, "cross_attention"):
            module.cross_attention.to_q.weight.zero_()
    flat = cells(evaluate.attention(run), 10, 5)
    assert np.array_equal(flat[0], images)
    assert np.abs(flat[1:] - images).max() <= 1 < np.abs(peaked[1:] - images).max()


# ---- the command ---------------------------------------------------------------------------------

def test_codes_of_anybody(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, (2000, 2))
    np.savez(tmp_path / "codes.npz", z=y + 0.05 * rng.standard_normal(y.shape), y=y)
    command = ["--codes", str(tmp_path / "codes.npz"), "--out", str(tmp_path / "out")]
    result, = evaluate.main(command)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result
    assert set(result["scores"]) == {"factor_vae", "mig"}
    assert result["scores"]["factor_vae"] > 0.99
    out = capsys.readouterr().out
    assert "FactorVAE" in out and "left out: DCI and swaps need 15000 points, 2000 are there" in out


def test_a_mistake_ends_with_2_and_one_sentence():
    script = Path(evaluate.__file__)
    command = [sys.executable, script, "--codes", script.with_name("README.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "README.md is missing or no .npz of z (n, N) and y (n, K)" in done.stderr
