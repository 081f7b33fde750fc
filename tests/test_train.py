"""train.py from flags to run folder: the loss reads the tokens, runs resume, mistakes end well."""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import InputError
from diffusion import Diffusion
from train import Config, learning_rate, load_checkpoint, parse, read_run

ROOT = Path(__file__).resolve().parent.parent
SMALL_UNET = (
    "--steps 30 --batch-size 8 --channels 8 --multipliers 1,2 --heads 2 --groups 4 "
    "--encoder-width 8 --tokens 5 --token-dim 6 --device cpu"
).split()
SMALL_VAE = "--vae-steps 12 --vae-batch-size 8 --vae-channels 8 --vae-groups 4 --latent-channels 3"
SMALL = [*SMALL_UNET, *SMALL_VAE.split()]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A data file of 40 random images with two factors, and a log line every 4 steps."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    labels = np.stack(np.unravel_index(np.arange(40), (5, 8)), axis=1)
    np.savez(path, images=images, labels=labels)
    return str(path)


@pytest.fixture
def run(npz, tmp_path, monkeypatch):
    """Trains with these flags; returns the run folder."""
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)

    def start(name, flags=""):
        small = SMALL_UNET if "--vae " in flags else SMALL
        return train.main([*small, "--data", npz, "--out", str(tmp_path / name), *flags.split()])
    return start


SLOW = "--decay none "  # of such a run --steps may change


def weights(folder):
    checkpoint = load_checkpoint(Path(folder) / "model.pt")
    weights = {}
    for part in ("encoder", "unet", "ema"):
        for name, value in checkpoint[part].items():
            weights[f"{part}.{name}"] = value
    return weights


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what is learned -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def learned(tmp_path_factory, world):
    """A short training on the built-in world: configuration, networks, 256 images, their x_0."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    flags = "--preset tiny --vae-steps 100 --steps 300 --batch-size 16 --lr 5e-3 --warmup 20"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_dataset", lambda *paths: world)      # render it once
        train.main([*flags.split(), "--out", str(folder)])
    cfg = train.config_of(read_run(folder))
    vae, encoder, unet = train.build_vae(cfg), train.build_encoder(cfg), train.build_unet(cfg)
    load_checkpoint(folder / "vae.pt", vae=vae)
    load_checkpoint(folder / "model.pt", encoder=encoder, unet=unet)
    for part in (vae, encoder, unet):
        part.eval().requires_grad_(False)
    images = world.images(np.random.default_rng(1).choice(len(world), 256, replace=False))
    return cfg, vae, encoder, unet, images


def test_the_noise_prediction_reads_the_tokens(learned):
    """In noisy latents the tokens of other images make the loss a tenth larger at least."""
    cfg, vae, encoder, unet, images = learned
    diffusion = Diffusion(cfg.schedule)
    x_0, tokens = vae.encode(images), encoder(images)
    generator = torch.Generator().manual_seed(2)
    t = torch.randint(300, 1000, (256,), generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = diffusion.q_sample(x_0, t, eps)
    right = F.l1_loss(unet(x_t, t, tokens), eps)
    shuffled = F.l1_loss(unet(x_t, t, tokens.roll(1, 0)), eps)
    assert shuffled > 1.1 * right


def test_images_are_reconstructed_from_their_own_tokens(learned):
    """DDIM with an image's own tokens ends nearer to it than with another image's."""
    cfg, vae, encoder, unet, images = learned
    images = images[:32]
    tokens = encoder(images)
    x_T = torch.randn(1, *train.latent_shape(cfg), generator=torch.Generator().manual_seed(3))
    errors = []
    for given in (tokens, tokens.roll(1, 0)):
        def denoise(x_t, t, given=given):
            return unet(x_t, t, given)
        x_0 = Diffusion(cfg.schedule).ddim_sample(denoise, x_T.repeat(32, 1, 1, 1), steps=20)
        errors.append(F.mse_loss(vae.decode(x_0), images))
    assert errors[0] < 0.8 * errors[1]


# ---- run folder, resuming ------------------------------------------------------------------------

def test_a_run_writes_what_it_says(run):
    folder = Path(run("run"))
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "log.jsonl", "vae.pt", "model.pt"}
    lines = [line for line in read_log(folder) if line["stage"] == "tokens"]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    for name, step in (("vae.pt", 12), ("model.pt", 30)):
        checkpoint = torch.load(folder / name, weights_only=True)
        assert checkpoint["config"]["tokens"] == 5
        assert checkpoint["step"] == step
        assert checkpoint["seconds"] > 0
    run = read_run(folder)
    assert run["data"]["images"] == 40
    assert {"command", "commit", "torch", "device", "threads"} <= set(run["machine"])


def test_the_log_has_the_mean_loss_since_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    log = train.Log(Config(out=str(tmp_path)), "tokens", 0, 10, 0.0)
    for loss in range(1, 11):
        log.add(torch.tensor(float(loss)))
    assert [line["loss"] for line in read_log(tmp_path)] == [2.5, 6.5, 9.5]


@pytest.mark.parametrize("flags", [
    "--encoder vector --loss l2 --decay none --clip 0",
    "--encoder slot --schedule cosine",
    "--first-stage vq --precision bfloat16",
    "--conditioning adagn",
    "--objective reconstruct --loss l2",
])
def test_every_alternative_trains_and_reloads(run, flags):
    folder = run("run", flags)
    cfg = train.config_of(read_run(folder))
    encoder, unet = train.build_encoder(cfg), train.build_unet(cfg)
    load_checkpoint(Path(folder) / "model.pt", encoder=encoder, ema=unet)
    start = torch.randn(3, *train.latent_shape(cfg))
    out = unet(start, torch.zeros(3).long(), encoder(torch.randn(3, 3, 64, 64)))
    assert out.shape == start.shape
    losses = [line["loss"] for line in read_log(folder)]
    assert all(0 < loss < 3 for loss in losses)


@pytest.mark.parametrize("stage, at", [("vae", 7), ("tokens", 17)])
def test_a_stopped_run_resumes_bit_for_bit(run, tmp_path, monkeypatch, stage, at):
    whole = run("whole")
    add = train.Log.add

    def stop(log, *values):
        if (log.stage, log.step) == (stage, at):
            raise KeyboardInterrupt
        return add(log, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Log, "add", stop)
        run("stopped")
    torch.manual_seed(99)                                       # whatever happened since
    resumed = train.main(["--resume", str(tmp_path / "stopped")])
    assert same(weights(whole), weights(resumed))
    losses = []
    for folder in (whole, resumed):
        lines = {(line["stage"], line["step"]): line["loss"] for line in read_log(folder)}
        losses.append(lines)                                    # steps taken again are logged again
    assert losses[0] == losses[1]


def test_a_killed_process_leaves_a_run_to_resume(npz, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train;"
               "train.LOG_EVERY, train.SAVE_EVERY = 2, 0; train.main(sys.argv[1:])"]
    flags = [*SMALL, "--steps", "4000", "--data", npz, "--out", str(tmp_path / "run")]
    flags += SLOW.split()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*command, *flags], **quiet)
    while process.poll() is None and not (tmp_path / "run" / "model.pt").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    step = load_checkpoint(tmp_path / "run" / "model.pt")["step"]
    assert step < 4000
    train.main(["--resume", str(tmp_path / "run"), "--steps", str(step + 4)])
    assert load_checkpoint(tmp_path / "run" / "model.pt")["step"] == step + 4


def test_a_run_knows_its_data_wherever_it_is(run, npz, tmp_path, monkeypatch):
    """Resumed from another folder, and after the data file has moved."""
    monkeypatch.chdir(Path(npz).parent)
    flags = [*SMALL, *SLOW.split(), "--data", "./few.npz", "--out", str(tmp_path / "run")]
    folder = train.main(flags)
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", folder, "--steps", "31"])
    moved = tmp_path / "moved.npz"
    moved.write_bytes(Path(npz).read_bytes())
    train.main(["--resume", folder, "--steps", "32", "--data", "moved.npz"])
    assert read_run(folder)["config"]["data"] == str(moved)
    other = tmp_path / "other.npz"  # as many images, other pixels
    arrays = dict(np.load(npz))
    np.savez(other, **{**arrays, "images": 255 - arrays["images"]})
    with pytest.raises(InputError, match="trained on other images than those of other.npz"):
        train.main(["--resume", folder, "--steps", "33", "--data", str(other)])


def test_the_first_stage_of_another_run(run, npz, tmp_path):
    first = run("first")
    second = run("second", f"--seed 1 --vae {first}")
    vae = [load_checkpoint(Path(folder) / "vae.pt")["vae"] for folder in (first, second)]
    assert same(*vae)
    assert not same(weights(first), weights(second))
    assert read_run(second)["config"]["latent_channels"] == 3
    assert read_run(second)["config"]["vae_channels"] == 8


def test_the_first_stage_of_the_run_that_comes_with_the_repository(run):
    world = ROOT / ".github" / "pretrained" / "world"
    folder = run("run", f"--vae {world}")
    trained, exported = (load_checkpoint(Path(path) / "vae.pt")["vae"] for path in (folder, world))
    assert same(trained, exported)
    (Path(folder) / "model.pt").unlink()
    train.main(["--resume", folder])  # from the first stage on
    assert read_run(folder)["config"]["vae_steps"] == 4000


# ---- mistakes ------------------------------------------------------------------------------------

def test_nothing_is_overwritten(run, tmp_path):
    folder = run("run")
    before = weights(folder)
    with pytest.raises(InputError, match="--resume .*--out"):
        run("run")
    assert same(before, weights(folder))
    with pytest.raises(InputError, match="is this a run folder"):
        train.main(["--resume", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="takes vae-lr from the run"):
        train.main(["--resume", folder, "--vae-lr", "0.5"])
    with pytest.raises(InputError, match="takes steps from the run"):  # the rate would jump
        train.main(["--resume", folder, "--steps", "60"])
    constant = run("constant", SLOW)
    kept = read_run(constant)
    with pytest.raises(InputError, match="has had 30 steps"):
        train.main(["--resume", constant, "--steps", "29"])
    assert read_run(constant) == kept
    (Path(folder) / "run.json").write_text('{"config": ')
    with pytest.raises(InputError, match="run.json is missing or damaged"):
        train.main(["--resume", folder])


def test_cuda_graphs_need_a_gpu(run):
    with pytest.raises(InputError, match="one GPU.*--no-cuda-graphs"):
        run("run", "--cuda-graphs --device cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_change_no_loss(run):
    losses = []
    for name, flags in (("plain", ""), ("recorded", "--cuda-graphs")):
        log = read_log(run(name, "--device cuda " + flags))
        losses.append([line["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_first_stage_that_cannot_be_used(run, npz, tmp_path):
    first = run("first")
    with pytest.raises(InputError, match="--vae takes vae-channels from the run"):
        run("wider", f"--vae {first} --vae-channels 16")
    unfinished = load_checkpoint(Path(first) / "vae.pt")
    torch.save({**unfinished, "step": 11}, Path(first) / "vae.pt")
    with pytest.raises(InputError, match="has not finished its first stage"):
        run("second", f"--vae {first}")
    (Path(first) / "vae.pt").unlink()
    with pytest.raises(InputError, match="cannot read .*vae.pt"):
        run("second", f"--vae {first}")
    assert not (tmp_path / "second").exists()


def test_a_lost_first_stage_is_not_trained_again(run, tmp_path):
    folder = Path(run("second", f"--vae {run('first')}"))
    (folder / "vae.pt").unlink()
    with pytest.raises(InputError, match="cannot read .*vae.pt"):
        train.main(["--resume", str(folder)])
    (folder / "model.pt").unlink()  # then the first stage that run.json names is taken again
    train.main(["--resume", str(folder)])
    vae = [load_checkpoint(tmp_path / name / "vae.pt")["vae"] for name in ("first", "second")]
    assert same(*vae)


def test_a_run_folder_has_one_writer(run, tmp_path, monkeypatch):
    """While a run trains, a second start in its folder and a --resume of it are refused."""
    pytest.importorskip("fcntl")
    messages = []

    def start_another(cfg, ds, device):
        for argv in (["--resume", cfg.out], [*SMALL, "--out", cfg.out]):
            with pytest.raises(InputError) as error:
                train.main(argv)
            messages.append(str(error.value))
        raise InputError("stop here")

    monkeypatch.setattr(train, "train_vae", start_another)
    with pytest.raises(InputError, match="stop here"):
        run("run")
    assert "another process is training there" in messages[0] and "has files already" in messages[1]


def test_a_run_killed_at_once_starts_again(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    run("run")
    assert (tmp_path / "run" / "model.pt").exists()


def test_scores_of_an_earlier_checkpoint_are_removed_on_resume(run, tmp_path):
    run("run")
    scores = tmp_path / "run" / "scores.json"
    scores.write_text("{}")
    train.main(["--resume", str(tmp_path / "run")])
    assert not scores.exists()


def test_an_infinite_gradient_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    """Its loss is finite, so that the step which breaks the weights is a logging step."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def broken(params, norm):
        calls.append(1)
        if len(calls) == 16:
            params[0].grad.fill_(math.inf)
        return clip(params, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(InputError, match="diverged before step 16.*lower learning rate"):
        run("run")
    assert load_checkpoint(tmp_path / "run" / "model.pt")["step"] == 12


def test_a_diverged_loss_stops_and_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    q_sample = Diffusion.q_sample
    calls = []

    def broken(self, x_0, t, eps):
        calls.append(1)
        return q_sample(self, x_0, t, eps) * (math.nan if len(calls) > 14 else 1)

    monkeypatch.setattr(Diffusion, "q_sample", broken)
    with pytest.raises(InputError, match="diverged before step 16.*lower learning rate"):
        run("run")
    assert load_checkpoint(tmp_path / "run" / "model.pt")["step"] == 12
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "run").values())


def test_a_failed_save_keeps_the_old_checkpoint_and_its_own_error(run, tmp_path, monkeypatch):
    folder = Path(run("run", SLOW))

    def full(contents, path):
        Path(path).write_bytes(b"half a checkpo")
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="file write failed"):
        train.main(["--resume", str(folder), "--steps", "31"])
    assert load_checkpoint(folder / "model.pt")["step"] == 30
    assert not list(folder.glob("*tmp*"))


def test_checkpoints_that_cannot_be_used(run, tmp_path):
    folder = Path(run("run"))
    whole = (folder / "model.pt").read_bytes()
    cuts = [len(whole) * i // 12 for i in range(12)]
    for content in (*(whole[:cut] for cut in cuts), b"no checkpoint"):
        (folder / "model.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot read .*model.pt"):
            train.main(["--resume", str(folder)])
    other = Path(run("other", "--tokens 7"))
    (folder / "model.pt").write_bytes((other / "model.pt").read_bytes())
    with pytest.raises(InputError, match="model.pt is of another configuration"):
        train.main(["--resume", str(folder)])
    exported = load_checkpoint(other / "model.pt")
    del exported["optimizer"]
    torch.save(exported, other / "model.pt")
    before = read_run(other)
    with pytest.raises(InputError, match="can be evaluated, not resumed"):
        train.main(["--resume", str(other), "--device", "cpu"])
    assert read_run(other) == before


@pytest.mark.parametrize("flags, word", [
    ("--tokens 0", "--tokens"), ("--lr nan", "--lr"),
    ("--heads 3", "--channels must be a multiple of --heads"), ("--channels 33", "--groups"),
    ("--vae-patch 3", "--vae-patch 3"), ("--multipliers 1,2,2,2,2", "halved 5 times"),
    ("--vae-betas 0.9", "--vae-betas"), ("--betas 0.9,1", "--betas"), ("--clip=-1", "--clip"),
    ("--encoder-strides 4,4,4,4", "--encoder-strides"),
    ("--device quantum", "quantum"), ("--seed 4294967296", "--seed"),
    ("--conditioning adagn --objective reconstruct", "adagn"), ("--device cuda:99", "cuda:99"),
    ("--batch-size 1 --encoder-strides 4,4,4", "two images per process"),
])
def test_impossible_values_write_nothing(tmp_path, flags, word):
    with pytest.raises(InputError, match=word):
        train.main([*SMALL, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["data", "cache", "out", "vae", "resume"])
def test_an_empty_variable_of_the_shell_starts_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--{name} is empty"):
        train.main([*SMALL, f"--{name}="])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    "--tokns 4", "--encoder scalars", "--data missing.h5", "--multipliers 1.5,2", "--betas a,1"
])
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(tmp_path, flags):
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--out", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "file" / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "file" in done.stderr


def test_a_fault_of_the_code_keeps_its_traceback(run, monkeypatch):
    def broken(self, images):
        raise ValueError("a student's own bug")

    monkeypatch.setattr(train.ConceptEncoder, "forward", broken)
    with pytest.raises(ValueError, match="a student's own bug") as caught:
        run("run")
    assert not isinstance(caught.value, InputError)


# ---- small parts ---------------------------------------------------------------------------------

def test_flags_are_the_fields_and_presets_can_be_changed(monkeypatch):
    cfg, resume = parse("--preset paper --tokens 10 --multipliers 1,2 --out ~/run".split())
    assert (cfg.tokens, cfg.multipliers, cfg.channels, cfg.lr) == (10, (1, 2), 64, 2.56e-4)
    assert cfg.out == str(Path.home() / "run")
    assert not resume
    cfg, _ = parse([])
    assert cfg == Config(out=str(Path("runs/world-small-0").absolute()))


def test_learning_rate():
    assert learning_rate(0, 100, 2.0, 10, "none") == 0.2
    assert learning_rate(50, 100, 2.0, 10, "none") == 2.0
    assert abs(learning_rate(50, 100, 2.0, 10, "cosine") - 1.0) < 1e-12
    assert learning_rate(100, 100, 2.0, 10, "cosine") < 1e-12


def test_ema():
    ema, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.75 * ema.weight + 0.25 * model.weight
    train.update_ema(ema, model, 0.75)
    assert torch.allclose(ema.weight, expected)
    assert train.ema_decay(1) == 2 / 11
    assert train.ema_decay(10**9, 0.9) == 0.9


def test_help_has_a_line_per_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--tokens how many, N [20]" in text and "--ema limit of the decay" in text


def test_a_run_says_what_was_asked_for_without_folders(npz, tmp_path):
    folder = train.main([*SMALL, f"--data={npz}", "--out", str(tmp_path / "r\u00fcn")])
    command = read_run(folder)["machine"]["command"]
    assert command.startswith("python train.py --steps 30 ")
    assert command.endswith(" --device cpu --vae-steps 12 --vae-batch-size 8 --vae-channels 8 "
                            "--vae-groups 4 --latent-channels 3 --data=few.npz --out r\u00fcn")


def test_no_shell_reads_the_folder_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "x$(touch pwned)" / "train.py"))
    assert train.machine(torch.device("cpu"), "train.py", [])["commit"] == "unknown"
    assert not list(tmp_path.iterdir())


def test_the_command_trains_and_scores(npz, tmp_path):
    """python train.py, cut to seconds, ends with scores, also in a terminal of ASCII."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--data", npz]
    folder = tmp_path / "r\u00fcn"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    assert "r\\xfcn" in done.stdout
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert 0 <= scores["factor_vae"] <= 1 and scores["psnr"] > 0
    assert (folder / "reconstruction.png").exists()


def test_scores_on_the_way_are_logged_and_change_nothing(run):
    def score(encoder, ds):
        assert encoder.training and len(ds) == 40
        torch.rand(3)
        return {"disentanglement": 0.5}

    scored = train.main([*SMALL, "--data", read_run(run("plain"))["config"]["data"], "--out",
                         run("x") + "-scored"], score)
    lines = [line for line in read_log(scored) if "disentanglement" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert same(weights(scored), weights(scored.replace("x-scored", "plain")))
