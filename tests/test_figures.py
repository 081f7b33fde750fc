"""The figures of evaluate.py on a tiny run with random weights: files, layout, and that they show what they say."""
import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from diffusion import SCHEDULES
from evaluate import dci
from model import rise_of_loss

N = 5


@pytest.fixture
def run(tmp_path, monkeypatch, world):
    """A run folder with an untrained model in it, opened. Nothing in it is zero, so every token has an effect."""
    torch.manual_seed(0)
    s = train.Settings(tokens=N, token_dim=6, channels=8, heads=2, groups=4, vae_channels=8, vae_groups=4,
                       encoder_width=8, latent_channels=3, device="cpu")
    vae, (encoder, unet) = train.build_autoencoder(s), train.build_networks(s)
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        encoder.head.to_scalars.weight.mul_(20)
    train.write_json(tmp_path / "settings.json", dataclasses.asdict(s) | {"out": str(tmp_path)})
    train.save(tmp_path / "vae.pt", s, 1, torch.device("cpu"), vae=vae)
    train.save(tmp_path / "model.pt", s, 7, torch.device("cpu"), encoder=encoder, unet=unet, ema=unet)
    monkeypatch.setattr(train, "open_dataset", lambda *args: world)
    monkeypatch.setattr(evaluate, "DDIM_STEPS", 3)
    monkeypatch.setattr(evaluate, "PSNR_IMAGES", 12)
    run = evaluate.Run(tmp_path, device="cpu")
    run.codes = lambda: (np.random.default_rng(0).standard_normal((100, N)).astype(np.float32), None)
    run.importance = np.array([[0, .9, 0, 0, 0, 0], [.8, 0, 0, 0, 0, .1], [0, 0, 0, 0, 0, 0],
                               [.2, .1, 0, 0, 0, 0], [0, 0, 0, .5, 0, 0]])
    return run


def cells(path, columns, rows):
    """The 64x64 pictures of a sheet's last `columns` columns, uint8 (rows, columns, 64, 64, 3)."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    x = sheet.shape[1] - columns * 66
    return np.stack([[sheet[i * 66:i * 66 + 64, x + j * 66:x + j * 66 + 64] for j in range(columns)]
                     for i in range(rows)])


def pixels(images):
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def test_a_run_opens_from_its_folder_alone(run):
    assert run.step == 7 and run.settings.tokens == N
    x = run.images(run.rows(3))
    assert run.encoder(x).shape == (3, N, 6) and run.decode(run.encoder(x)).shape == (3, 3, 64, 64)
    assert torch.equal(run.decode(run.encoder(x)), run.decode(run.encoder(x)))


def test_reconstruction(run):
    scores = evaluate.reconstruction(run)
    shown = cells(run.folder / "reconstruction.png", 10, 4)
    images = run.images(run.rows(12, seed=1))
    assert np.array_equal(shown[0], pixels(images[:10]))
    rebuilt = run.decode(run.encoder(images))
    assert np.array_equal(shown[2], pixels(rebuilt[:10]))
    mse = ((rebuilt - images) / 2).square().mean().item()
    assert scores["mse"] == pytest.approx(mse) and scores["psnr"] == pytest.approx(10 * math.log10(1 / mse))
    assert Image.open(run.folder / "reconstruction.png").height == 4 * 66 + 2 * 18


def test_swap_shows_what_each_token_does(run):
    evaluate.swap(run)
    top = cells(run.folder / "swap.png", 9, 1)[0]
    shown = cells(run.folder / "swap.png", 8, 2 + N)
    assert Image.open(run.folder / "swap.png").height == (2 + N) * 66
    index = run.rows(2000, seed=2)
    assert np.array_equal(top[0], pixels(run.images(index[:1]))[0])                     # the target
    for row in shown[2:]:
        assert (row != shown[1]).any()
    # row 2 is the first of the order: token 1, floor hue
    sources = next(i for i in range(2000) if np.array_equal(pixels(run.images(index[[i]]))[0], top[1]))
    tokens = run.encoder(run.images(index[[sources]]))
    tokens[:, 1] = run.encoder(run.images(index[:1]))[:, 1]
    assert np.abs(pixels(run.decode(tokens))[0].astype(int) - shown[2, 0]).max() <= 1


def test_swapping_a_picture_with_itself_changes_nothing(run):
    run.importance, run.rows = None, lambda n, seed=0: np.full(n, 1234)
    evaluate.swap(run)
    shown = cells(run.folder / "swap.png", 8, 2 + N)
    assert (np.abs(shown[2:].astype(int) - shown[1].astype(int)) <= 1).all()


def test_rows_are_ordered_and_named_by_factor(run):
    order, used, names = evaluate.token_names(run)
    assert (order, used) == ([1, 3, 0, 4, 2], [1, 3, 0, 4])
    assert names == ["token 0: wall hue 0.90", "token 1: floor hue 0.80", "token 2: idle", "token 3: floor hue 0.20",
                     "token 4: scale 0.50"]
    run.importance = None
    assert evaluate.token_names(run) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [f"token {n}" for n in range(N)])


def test_traversal(run):
    evaluate.traversal(run)
    shown = cells(run.folder / "traversal.png", 9, 4)
    assert all((row[0] != row[-1]).any() for row in shown)
    scalars = run.encoder.scalars(run.images(run.rows(1, seed=3)))
    scalars[:, 3] = float(np.quantile(run.codes()[0][:, 3], 0.99))                      # second row, last column
    assert np.abs(pixels(run.decode(run.encoder.tokens_of(scalars)))[0].astype(int) - shown[1, 8]).max() <= 1
    moving = Image.open(run.folder / "traversal.gif")
    assert moving.n_frames == 16 and moving.height == 4 * 66


def test_attention_maps_are_probabilities(run):
    evaluate.attention(run)
    assert cells(run.folder / "attention.png", 9, 5)[1:].std() > 10
    for module in run.unet.modules():                               # now every place asks for nothing in particular
        if hasattr(module, "cross_attention"):
            module.cross_attention.to_q.weight.zero_()
    evaluate.attention(run)
    shown = cells(run.folder / "attention.png", 9, 5)
    images = run.images(run.rows(3, seed=4))
    assert np.array_equal(shown[0], np.concatenate([pixels(images)] * 3))
    grey = 0.5 * images.mean(1, keepdim=True).expand(-1, 3, -1, -1) + 0.3
    red = torch.tensor([1.0, -0.6, -1.0])[:, None, None]
    flat = pixels((0.2 * grey + 0.8 * red).clamp(-1, 1))            # all maps are equal everywhere: full colour
    assert np.abs(shown[1].astype(int) - np.concatenate([flat] * 3)).max() <= 1


def test_bottleneck_is_the_closed_form_and_the_papers_figure(run):
    evaluate.bottleneck(run)
    with open(run.folder / "bottleneck.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["t"] for row in rows] == list(range(1000))
    share = lambda column, t: rows[t][column] / rows[0][column]
    for t, expected in ((200, 0.155), (400, 0.049), (600, 0.011)):  # unit-variance latents
        assert abs(share("linear_1", t) - expected) < 0.002
    for column, shares in {"linear_67.6": (0.59, 0.25, 0.07), "sqrt_linear_67.6": (0.52, 0.16),
                           "cosine_67.6": (0.81, 0.57, 0.30)}.items():                  # as read off the paper's figure
        for t, expected in zip((200, 400, 600), shares):
            assert abs(share(column, t) - expected) < 0.02
    assert share("sqrt_67.6", 100) < 0.02
    for column, height in (("linear_67.6", 73), ("cosine_67.6", 77), ("sqrt_67.6", 67)):
        assert abs(rows[0][column] - height) < 1
    x = torch.randn(200000, dtype=torch.float64)                    # by sampling: x_t of unit-variance data at t = 300
    abar = run.diffusion.abar[300].item()
    mean, variance = math.sqrt(abar) * x, 1 - abar
    kl = 0.5 * (mean ** 2 + variance - 1 - math.log(variance)).mean().item()
    assert abs(kl - rows[300]["linear_1"]) < 0.01
    colours = {tuple(c) for c in np.asarray(Image.open(run.folder / "bottleneck.png")).reshape(-1, 3)}
    for name in SCHEDULES:
        assert tuple(bytes.fromhex(evaluate.COLOURS[name][1:])) in colours


def test_when_a_token_that_is_not_read_has_a_row_of_zeros(run):
    def deaf(x, t, tokens):
        tokens = tokens.clone()
        tokens[:, 3] = 0
        return run.unet(x, t, tokens)

    images = run.images(run.rows(6))
    x_0, tokens = run.vae.encode(images), run.encoder(images)
    for t in (25, 325, 925):
        rise = rise_of_loss(deaf, run.diffusion, x_0, tokens, run.noise(x_0.shape), t)
        assert rise.shape == (N,) and not rise[3] and all(rise[n] for n in range(N) if n != 3)
    level = torch.full((6,), 925)
    losses = []
    for changed in (tokens, torch.cat([tokens[:, :2], tokens[[5, 0, 1, 2, 3, 4], 2:3], tokens[:, 3:]], 1)):
        losses.append(run.diffusion.loss(lambda x, t: deaf(x, t, changed), x_0, level, run.noise(x_0.shape)))
    assert abs(losses[1] - losses[0] - rise[2]) < 1e-6


def test_when_draws_what_it_measured(run, monkeypatch):
    rise = np.zeros((N, 20))
    rise[1, 5] = 0.25                                               # token 1 is the first of the order
    monkeypatch.setattr(evaluate, "rise_of_loss", lambda unet, diffusion, x_0, tokens, eps, t:
                        torch.from_numpy(rise[:, (t - 25) // 50]))
    evaluate.when(run)
    picture = np.asarray(Image.open(run.folder / "when.png"))
    dark = (picture == [20, 70, 140]).all(-1)
    y, x = np.nonzero(dark)
    assert (190 + 480 * 5 // 20, 190) <= (x.min(), y.min()) and x.max() <= 190 + 480 * 6 // 20 and y.max() < 190 + 18
    assert dark.sum() > 300                                         # the one dark field, less its frame


def test_the_command_draws_into_the_folder(run, monkeypatch):
    monkeypatch.setattr(evaluate, "Run", lambda *args: run)
    run.importance = None
    assert evaluate.main([str(run.folder), "--figures", "bottleneck", "swap"]) == []
    assert run.importance is None                                   # 100 codes are too few: no names for the rows
    many, found = run.codes()[0].repeat(150, 0), np.zeros((N, 6))
    run.codes = lambda: (many, None)
    monkeypatch.setattr(evaluate, "dci_scores", lambda z, y, seed: {"importance": found})
    evaluate.main([str(run.folder), "--figures", "bottleneck"])
    assert run.importance is found
    assert {p.name for p in run.folder.glob("*.png")} == {"bottleneck.png", "swap.png"}
    with pytest.raises(SystemExit):
        evaluate.main([str(run.folder), "--figures", "portrait"])


def test_runs_of_one_setting_share_a_line(capsys):
    def result(seed, step, score, **settings):
        return dict(data="built-in world", settings={"seed": seed, "steps": 20, "lr": 1, "loss": "l1", **settings},
                    step=step, scores={"factor_vae": score, "disentanglement": score / 2})

    evaluate.table([result(0, 10, 0.8), result(1, 10, 0.9), result(0, 20, 1.0)])        # the last was not interrupted
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["runs", "FactorVAE", "DCI", "D", "steps"]
    assert first.split() == "built-in world, steps 10 2 0.850 +- 0.071 0.425 +- 0.035 10".split()
    assert second.split() == "built-in world, steps 20 1 1.000 0.500 20".split()
    evaluate.table([result(0, 20, 0.8), result(0, 20, 0.6, loss="l2")])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["built-in", "world", "1"] and second.split()[:4] == ["built-in", "world,", "loss", "l2"]
    evaluate.table([result(0, 10, 0.8), result(0, 20, 1.0) | {"scores": {"tad": 0.3, "factor_vae": 0.9}}])
    assert "nan" in capsys.readouterr().out                         # what one run has and the other has not


def test_figures_that_a_run_cannot_have_are_refused_or_left_out(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "FIGURES", {name: lambda run, name=name: drawn.append(name) for name in evaluate.FIGURES})
    for changes, missing in (({"conditioning": "adagn"}, {"attention"}), ({"encoder": "slot"}, {"traversal"}),
                             ({"objective": "reconstruct"}, {"attention", "bottleneck", "when"})):
        folder = run.folder
        settings = dataclasses.asdict(train.read_settings(folder))
        s = train.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in {**settings, **changes}.items()})
        encoder, unet = train.build_networks(s)
        train.write_json(folder / "settings.json", dataclasses.asdict(s))
        train.save(folder / "model.pt", s, 7, torch.device("cpu"), encoder=encoder, unet=unet, ema=unet)
        monkeypatch.setattr(evaluate, "dci_scores", lambda z, y, seed: {"importance": run.importance})
        monkeypatch.setattr(evaluate.Run, "codes", lambda self: (np.zeros((15000, N)), None))
        drawn.clear()
        evaluate.main([str(folder), "--figures"])
        assert set(evaluate.FIGURES) - set(drawn) == missing
        with pytest.raises(ValueError, match=f"figure {min(missing)} needs a run with --{next(iter(changes))}"):
            evaluate.main([str(folder), "--figures", min(missing)])
        train.write_json(folder / "settings.json", settings)


def test_held_out_images_are_scored_apart(run, monkeypatch, world, capsys):
    """Codes that tell the floor's hue of seen images and nothing of unseen ones."""
    monkeypatch.setattr(evaluate, "PSNR_IMAGES", 4)
    run.settings = dataclasses.replace(run.settings, holdout_factors="wall_hue=2,shape=1")
    rng = np.random.default_rng(0)
    run.index = np.sort(rng.choice(len(world), 24000, replace=False))
    y = world.factors(run.index).numpy()
    unseen = (y[:, 1] == 2) & (y[:, 4] == 1)
    z = rng.standard_normal((24000, N)).astype(np.float32)
    z[:, 3] = np.where(unseen, z[:, 3], y[:, 0] + 0.01 * z[:, 3])
    small = lambda z, y, z_test, y_test: dci(z[:600], y[:600], z_test[:500], y_test[:500])
    monkeypatch.setattr(evaluate, "dci", small)
    result = evaluate.held_out(run, z, y)
    assert result["unseen"]["images"] == unseen.sum() and result["seen"]["images"] == 5000
    assert result["seen"]["floor_hue"] > 0.95 and result["unseen"]["floor_hue"] < 0.3
    assert result["unseen"]["mse"] > 0 and result["seen"]["mse"] > 0
    assert "unseen images: images" in capsys.readouterr().out


def test_scores_of_data_without_factors(run, world, capsys):
    """Images alone get the pictures; with attributes, TAD too; and nothing asks for factors."""
    class Plain:
        name, factor_names, factor_sizes, attribute_names, attributes = "plain", (), (), (), None
        __len__ = lambda self: 300
        images = lambda self, index: world.images(np.asarray(index) * 1000)

    run.ds, run.importance = Plain(), None
    del run.codes                                                   # the fixture's
    scores = evaluate.score_run(run, None)["scores"]
    assert set(scores) == {"mse", "psnr"} and (run.folder / "swap.png").exists()
    assert np.load(run.folder / "codes-7.npy").shape == (300, N)
    run.ds.attribute_names, run.ds.attributes = ("a", "b"), np.arange(600).reshape(300, 2) % 3 % 2
    result = evaluate.score_run(run, None)
    assert set(result["scores"]) == {"mse", "psnr", "tad", "attributes"}
    evaluate.table([result])
    assert "TAD" in capsys.readouterr().out
    with pytest.raises(ValueError, match="factors"):
        run.ds.attribute_names = ()
        evaluate.score_run(run, ["dci"])
    run.codes = None                                                # not asked for: the scores are there
    assert evaluate.score_run(run, None, again=False)["scores"] == result["scores"]
    run.step += 1
    with pytest.raises(TypeError):
        evaluate.score_run(run, None, again=False)
