"""Training in several processes: torchrun on this machine's CPU."""
import os
import subprocess
import sys
from pathlib import Path

import torch

import train
from data import open_dataset
from diffusion import Diffusion
from test_train import ROOT, SMALL, npz  # noqa: F401 (a fixture)

# Each process leaves its weights behind; group norm for batch norm, which sees only its own share.
WORKER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, encoder, train
torch.set_num_threads(1)
train.LOG_EVERY = 1
encoder.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
add = train.Log.add
def keep(log, *values):
    if log.step + 1 == log.steps and log.stage == "tokens":
        frame = sys._getframe(1).f_locals
        weights = torch.cat([parameter.flatten() for parameter in frame["params"]])
        torch.save(weights, os.path.join(os.environ["LEFT"], os.environ["RANK"] + ".pt"))
    return add(log, *values)
train.Log.add = keep
train.main(sys.argv[1:])
"""


def test_two_processes_average_their_gradients(npz, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "worker.py").write_text(WORKER)
    flags = [*SMALL, "--steps", "1", "--clip", "0", "--warmup", "0", "--lr", "0.1", "--data", npz]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(tmp_path / "worker.py"), *flags]
    environment = {**os.environ, "LEFT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert torch.equal(ours, theirs)

    # the same step in one process, on the joined batch: Adam's first moment is (1 - beta_1) g
    monkeypatch.setattr("encoder.nn.BatchNorm2d", lambda channels: torch.nn.GroupNorm(1, channels))
    folder = tmp_path / "run"
    cfg = train.config_of(train.read_run(folder))
    vae = train.build_vae(cfg).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    train.load_checkpoint(folder / "vae.pt", vae=vae)
    torch.manual_seed(cfg.seed + 1)
    encoder, unet = train.build_encoder(cfg), train.build_unet(cfg)
    ds = open_dataset(cfg.data)
    draws = []
    for rank in (0, 1):
        torch.manual_seed(cfg.seed * 10**9 + rank)              # as in train.seed_step at step 0
        images = ds.images(torch.randint(len(ds), (4,)))
        x_0 = vae.encode(images)
        t = torch.randint(1000, (4,))
        draws.append((images, x_0, t, torch.randn_like(x_0)))
    images, x_0, t, eps = (torch.cat(parts) for parts in zip(*draws))
    x_t = Diffusion(cfg.schedule).q_sample(x_0, t, eps)
    (unet(x_t, t, encoder(images)) - eps).abs().mean().backward()
    parameters = [*encoder.parameters(), *unet.parameters()]
    state = train.load_checkpoint(folder / "model.pt")["optimizer"]["state"]
    assert len(state) == len(parameters)
    largest = 0
    for i, parameter in enumerate(parameters):
        gradient = state[i]["exp_avg"] / (1 - cfg.betas[0])
        assert torch.allclose(gradient, parameter.grad, atol=1e-4), i
        largest = max(largest, gradient.abs().max().item())
    assert largest > 1e-2                                       # a wrong one would show


def test_batches_that_cannot_be_shared_are_refused(npz, tmp_path):  # noqa: F811
    flags = [*SMALL, "--batch-size", "7", "--data", npz, "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "2 processes cannot share batches of 7 and 8 evenly" in done.stderr
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in done.stderr
    assert not Path(tmp_path / "run").exists()
