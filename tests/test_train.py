"""train.py from flags to run folder: a few steps, resuming bit for bit, and failing well."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import diffusion
import evaluate
import train
from diffusion import Ended
from train import Settings, learning_rate, load, parse, read_log, save

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--vae-steps 12 --steps 30 --batch-size 8 --vae-batch-size 8 --channels 8 --multipliers 1,2 --heads 2 "
         "--groups 4 --vae-channels 8 --vae-groups 4 --encoder-width 8 --tokens 5 --token-dim 6 --latent-channels 3 "
         "--attention-levels 2 --checkpoint-minutes 0 --device cpu").split()


@pytest.fixture
def quick(monkeypatch):
    """Latents of few images, a log line every 4 steps, no scores: what is tested here is training."""
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "open_dataset", lambda *args: Few())
    monkeypatch.setattr(evaluate, "main", lambda argv: None)


class Few:
    """A data set of 40 random pictures."""
    name, factor_names, factor_sizes = "few", (), ()

    def __len__(self):
        return 40

    def images(self, index):
        x = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return x[torch.as_tensor(index)]


def weights(out):
    saved = load(Path(out) / "model.pt")
    return {f"{part}.{name}": value for part in ("encoder", "unet", "ema") for name, value in saved[part].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_what_it_says(quick, tmp_path):
    out = train.main([*SMALL, "--out", str(tmp_path / "run")])
    assert {p.name for p in out.iterdir()} == {"settings.json", "log.jsonl", "vae.pt", "model.pt"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "tokens"] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert all(math.isfinite(line["loss"]) and line["seconds"] >= 0 for line in lines)
    for name in ("vae.pt", "model.pt"):
        saved = torch.load(out / name, weights_only=True)
        assert saved["settings"]["tokens"] == 5 and saved["step"] in (12, 30)
    assert train.read_settings(out).token_dim == 6
    vae = train.build_autoencoder(train.read_settings(out))
    vae.load_state_dict(load(out / "vae.pt")["vae"])
    assert abs(vae.encode(Few().images(range(40))).std() - 1) < 0.2


@pytest.mark.parametrize("flags", ["--encoder vector", "--encoder slot", "--first-stage vq", "--loss l2 --decay none",
                                   "--schedule cosine --clip 0", "--conditioning adagn", "--objective reconstruct",
                                   "--conditioning adagn --objective reconstruct --encoder slot"])
def test_every_alternative_trains_and_reloads(quick, tmp_path, flags):
    out = train.main([*SMALL, *flags.split(), "--steps", "4", "--out", str(tmp_path / "run")])
    s, vae, encoder, unet, step = train.load_run(out, torch.device("cpu"))
    assert step == 4
    tokens, shape = encoder(Few().images([1, 2, 3])), train.latent_shape(s)
    assert tokens.shape == (3, 5, 6)
    x_0 = train.build_diffusion(s).ddim_sample(lambda x, t: unet(x, t, tokens), torch.randn(3, *shape), 1)
    assert vae.decode(x_0).shape == (3, 3, 64, 64)


def test_latents_encoded_once_are_those_of_the_loop(quick):
    cpu, few, index = torch.device("cpu"), Few(), torch.tensor([3, 39, 0])
    vae = train.build_autoencoder(Settings()).eval().requires_grad_(False)
    want = vae.encode(few.images(index))
    for s, most, error in ((Settings(steps=30, batch_size=8), 2 ** 31, 2e-3), (Settings(steps=30, batch_size=8), 10000, 0),
                           (Settings(steps=5, batch_size=8), 2 ** 31, 0)):
        images, x_0 = train.prepare(s, few, vae, cpu, most)(index)
        assert torch.equal(images, few.images(index))
        assert (x_0 - want).abs().max() <= error * want.abs().max() and (error == 0) == torch.equal(x_0, want)


def test_pictures_kept_on_the_device_are_the_data_sets(world):
    vae = train.build_autoencoder(Settings()).eval().requires_grad_(False)
    latents, pixels = train.encode_all(vae, world.images, torch.arange(40).split(7), torch.device("cpu"), True)
    assert torch.equal(pixels / 127.5 - 1, world.images(range(40)))
    assert latents.is_contiguous() and latents.shape == (40, 4, 8, 8) and pixels.dtype == torch.uint8


def test_bfloat16_learns_as_float32_does(quick, tmp_path):
    logs = []
    for precision in ("float32", "bfloat16"):
        out = train.main([*SMALL, "--precision", precision, "--out", str(tmp_path / precision)])
        logs.append([line["loss"] for line in read_log(out) if line["stage"] == "tokens"])
        assert all(w.dtype in (torch.float32, torch.int64) for w in weights(out).values())
    assert logs[0] != logs[1] and all(abs(a - b) < 0.02 for a, b in zip(*logs))


def test_compiling_where_it_cannot_be_done_is_refused(quick, tmp_path, monkeypatch):
    def broken(function):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="--compile yes.*no working C.*--compile no"):
        train.main([*SMALL, "--compile", "yes", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_give_the_same_losses(quick, tmp_path):
    flags, logs = [*SMALL, "--multipliers", "1", "--attention-levels", "1", "--steps", "8"], []
    first = train.main([*flags, "--out", str(tmp_path / "no")])
    second = train.main([*flags, "--out", str(tmp_path / "yes"), "--compile", "yes", "--vae", str(first)])
    logs = [[line["loss"] for line in read_log(out) if line["stage"] == "tokens"] for out in (first, second)]
    assert all(abs(a - b) < 1e-4 for a, b in zip(*logs)) and weights(first).keys() == weights(second).keys()


def test_training_lowers_the_loss(quick, tmp_path):
    out = train.main([*SMALL, "--steps", "400", "--lr", "3e-3", "--warmup", "20", "--out", str(tmp_path / "run")])
    loss = [x["loss"] for x in map(json.loads, open(out / "log.jsonl")) if x["stage"] == "tokens"]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])


@pytest.mark.parametrize("stage, at", [("vae", 7), ("tokens", 17)])
def test_a_stopped_run_resumes_bit_for_bit(quick, tmp_path, monkeypatch, stage, at):
    whole = train.main([*SMALL, "--out", str(tmp_path / "whole")])
    calls, rate = [], train.learning_rate

    def stop(step, steps, *rest):
        calls.append(step)
        if steps == (12 if stage == "vae" else 30) and step == at:
            raise KeyboardInterrupt
        return rate(step, steps, *rest)

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*SMALL, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(train, "learning_rate", rate)
    torch.manual_seed(99)                                           # whatever happened since
    resumed = train.main(["--resume", "--out", str(tmp_path / "stopped")])
    assert same(weights(whole), weights(resumed))
    strip = [[{k: line[k] for k in ("stage", "step", "loss")} for line in map(json.loads, open(out / "log.jsonl"))]
             for out in (whole, resumed)]
    assert strip[0] == strip[1]


def test_kill_9_and_resume(tmp_path):
    """The same with a real process that is killed at some moment after its first checkpoint."""
    code = ("import sys; sys.path[:0] = [{root!r}, {tests!r}]; import evaluate, train, test_train; train.LOG_EVERY = 3; "
            "train.open_dataset = lambda *args: test_train.Few(); evaluate.main = lambda argv: None; "
            "train.main(sys.argv[1:])").format(root=str(ROOT), tests=str(ROOT / "tests"))

    def start(*flags):
        return subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL)

    flags = [*SMALL, "--steps", "90"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(*flags, "--out", str(whole)).wait() == 0
    process = start(*flags, "--out", str(killed))
    while process.poll() is None and not (killed / "model.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert load(killed / "model.pt")["step"] < 90
    assert start("--resume", "--out", str(killed)).wait() == 0
    assert same(weights(whole), weights(killed))


def test_resume_may_go_on_longer_but_not_differ(quick, tmp_path):
    out = str(tmp_path / "run")
    train.main([*SMALL, "--out", out])
    train.main(["--resume", "--out", out, "--steps", "35"])
    assert load(tmp_path / "run" / "model.pt")["step"] == 35
    with pytest.raises(ValueError, match="--lr was 0.003, not 0.5"):
        train.main(["--resume", "--out", out, "--lr", "0.5"])
    with pytest.raises(ValueError, match="--steps 34: .* has taken 35 already"):
        train.main(["--resume", "--out", out, "--steps", "34"])
    with pytest.raises(ValueError, match="--precision was float32, not bfloat16"):
        train.main(["--resume", "--out", out, "--precision", "bfloat16"])
    train.main(["--resume", "--out", out, "--precision", "auto", "--accumulate", "2", "--steps", "36"])
    s = train.read_settings(out)
    assert s.steps == 36 == load(tmp_path / "run" / "model.pt")["step"] and s.accumulate == 2


def test_nothing_is_overwritten(quick, tmp_path):
    out = str(tmp_path / "run")
    train.main([*SMALL, "--out", out])
    before = weights(out)
    with pytest.raises(ValueError, match="--out.*--resume.*evaluate.py"):
        train.main([*SMALL, "--out", out])
    assert same(before, weights(out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="is there already"):
        train.main([*SMALL, "--out", str(tmp_path / "mine")])
    with pytest.raises(FileNotFoundError, match="no run"):
        train.main(["--resume", "--out", str(tmp_path / "nowhere")])


def test_first_stage_of_another_run(quick, tmp_path):
    first = train.main([*SMALL, "--out", str(tmp_path / "first")])
    second = train.main([*SMALL, "--seed", "1", "--vae", str(first), "--out", str(tmp_path / "second")])
    assert same(load(first / "vae.pt")["vae"], load(second / "vae.pt")["vae"])
    assert not same(weights(first), weights(second))
    with pytest.raises(ValueError, match="--first-stage kl, not vq"):
        train.main([*SMALL, "--first-stage", "vq", "--vae", str(first), "--out", str(tmp_path / "third")])
    with pytest.raises(ValueError, match="--data .none., not other.h5"):
        train.main([*SMALL, "--data", "other.h5", "--vae", str(first), "--out", str(tmp_path / "third")])
    with pytest.raises(ValueError, match="--holdout 0.0, not 0.1|--holdout .none., not 0.1"):
        train.main([*SMALL, "--holdout", "0.1", "--vae", str(first), "--out", str(tmp_path / "third")])
    assert not (tmp_path / "third").exists()


def test_held_out_images_are_never_seen(tmp_path, monkeypatch, world):
    """With combinations and with a share: every image that training asks for is one that it may see."""
    asked = []

    class Watched:
        name, factor_names, factor_sizes = "watched", world.factor_names, world.factor_sizes
        __len__ = lambda self: len(world)

        def images(self, index):
            asked.extend(torch.as_tensor(index).tolist())
            return world.images(index)

    monkeypatch.setattr(train, "open_dataset", lambda *args: Watched())
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    train.main([*SMALL, "--holdout", "0.4", "--holdout-factors", "floor_hue=3,shape=1;scale=0", "--first-stage", "vq",
                "--out", str(tmp_path / "run")])
    factors = world.factors(asked)
    assert len(asked) > 300 and not ((factors[:, 0] == 3) & (factors[:, 4] == 1)).any() and factors[:, 3].min() == 1
    seen, unseen = train.hold_out(world, 0.4, "floor_hue=3,shape=1;scale=0")
    assert not set(asked) & set(unseen.tolist()) and len(seen) + len(unseen) == len(world)
    with pytest.raises(ValueError, match="colour=3"):
        train.main([*SMALL, "--holdout-factors", "colour=3", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_nan_stops_and_keeps_the_last_good_checkpoint(quick, tmp_path, monkeypatch):
    real, calls = train.Diffusion.loss, []

    def loss(self, *args):
        calls.append(1)
        return real(self, *args) * (math.nan if len(calls) > 14 else 1)

    monkeypatch.setattr(train.Diffusion, "loss", loss)
    with pytest.raises(ValueError, match="not a finite number at step 16"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])
    saved = load(tmp_path / "run" / "model.pt")
    assert saved["step"] == 12 and all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path, cpu = tmp_path / "model.pt", torch.device("cpu")
    save(path, Settings(), 1, cpu)

    def full(parts, file):
        Path(file).write_bytes(b"half a checkpo")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not write.*--resume"):
        save(path, Settings(), 2, cpu)
    assert load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_damaged_and_missing_checkpoints(tmp_path):
    with pytest.raises(OSError, match="missing"):
        load(tmp_path / "model.pt")
    save(tmp_path / "model.pt", Settings(), 1, torch.device("cpu"))
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(tmp_path / "model.pt")


def test_checkpoints_of_another_configuration_are_not_resumed(quick, tmp_path):
    out = train.main([*SMALL, "--out", str(tmp_path / "run")])
    other = train.main([*SMALL, "--tokens", "7", "--out", str(tmp_path / "other")])
    shutil.copyfile(other / "model.pt", out / "model.pt")
    with pytest.raises(ValueError, match="model.pt does not fit the settings.json beside it"):
        train.main(["--resume", "--out", str(out), "--steps", "40"])


def test_what_stops_a_process_is_not_taken_for_something_else(tmp_path):
    """The signal that another process has ended may come while a file is written or read."""
    for work in (data.whole(tmp_path / "file"), data.reading(tmp_path / "file")):
        with pytest.raises(Ended), work:
            diffusion.stop()


@pytest.mark.parametrize("error, code, word", [(ValueError("a flag"), 2, "a flag"), (Ended(), 2, "--resume"),
                                               (MemoryError(), 2, "--batch-size"), (KeyboardInterrupt(), 130, "--resume"),
                                               (RuntimeError("DefaultCPUAllocator: can't allocate"), 2, "--batch-size"),
                                               (RuntimeError("Connection closed by peer"), 2, "--resume")])
def test_errors_end_the_command_line_with_one_sentence(capsys, error, code, word):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        diffusion.end_with(main)
    assert end.value.code == code and word in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):                # is not hidden
        diffusion.end_with(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize("flags, word", [("--tokens 0", "--tokens"), ("--steps -3", "--steps"), ("--heads 3", "3 heads"),
                                         ("--lr 0", "--lr"), ("--patch 3", "patch 3"), ("--ema 1", "--ema"),
                                         ("--device quantum", "quantum"), ("--device meta", "meta"),
                                         ("--seed 4294967297", "--seed"), ("--multipliers 1,2,2,2,2", "5 levels cannot halve 8x8"),
                                         ("--lr nan", "--lr"), ("--attention-levels 3", "2 levels cannot attend at 3"), ("--vae-betas 0.9", "--vae-betas"),
                                         ("--channels 33", "channels must be even"), ("--multipliers 1.5,2", "--multipliers"), ("--encoder-strides 3,2", "strides")])
def test_impossible_values_write_nothing(quick, tmp_path, flags, word):
    with pytest.raises(ValueError, match=word):
        train.main([*SMALL, *flags.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--tokns 4", "--steps many", "--encoder scalars", "--data missing.h5",
                                   "--multipliers 1,x"])
def test_command_line_ends_with_2_and_no_traceback(tmp_path, flags):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags.split(), "--out", str(tmp_path / "run")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_flags_are_the_fields_and_presets_can_be_changed():
    s, resume, given = parse("--preset paper --tokens 10 --multipliers 1,2".split())
    assert s.tokens == 10 and s.multipliers == (1, 2) and s.channels == 64 and s.lr == 2.56e-4
    assert not resume and set(given) == {"preset", "tokens", "multipliers"}
    assert parse([])[0] == Settings()


def test_learning_rate():
    assert learning_rate(0, 100, 2.0, 10, "none") == 0.2
    assert learning_rate(50, 100, 2.0, 10, "none") == 2.0
    assert abs(learning_rate(50, 100, 2.0, 10, "cosine") - 1.0) < 1e-12
    assert learning_rate(100, 100, 2.0, 10, "cosine") < 1e-12


def test_log_drops_what_lies_beyond_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 5)
    one, s = torch.tensor(1.0), Settings(checkpoint_minutes=1e6)
    def start():
        progress = train.Progress(s, tmp_path, "tokens", "model.pt", 20, 4, torch.device("cpu"))
        progress.begin()
        return progress

    progress = start()
    for step in range(12):
        progress.after_step(one / (step + 1), one)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(5, 0.2), (10, 0.1)]
    save(tmp_path / "model.pt", s, 5, torch.device("cpu"))          # as if the run had been killed after this one
    progress = start()
    assert progress.step == 5 and [line["step"] for line in read_log(tmp_path)] == [5]
    with pytest.raises(ValueError, match="step 10"):
        for _ in range(5):
            progress.after_step(one * math.inf, one)
