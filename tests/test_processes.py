"""Training in several processes: torchrun on this machine's CPU, against one process that does the same batches."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import train
from test_train import ROOT, SMALL, Few, same, weights

# Few pictures, no scores, group norm for batch norm if wished; each process leaves its weights behind.
WORKER = f'''
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, encoder, evaluate, train
from test_train import Few
torch.set_num_threads(1)
train.LOG_EVERY, train.open_dataset, evaluate.main = 4, lambda *args: Few(), lambda argv: None
if os.environ["NORM"] == "group":
    encoder.nn.BatchNorm2d = lambda channels: torch.nn.GroupNorm(1, channels)
Progress = train.Progress
class Kept(Progress):
    def after_step(self, *losses):
        super().after_step(*losses)
        if self.step == self.steps:
            torch.save([self.parts[part].state_dict() for part in self.parts if part != "optimizer"],
                       os.path.join(os.environ["LEFT"], f"{{self.stage}}-{{train.RANK}}.pt"))
train.Progress = Kept
train.end_with(train.main)
'''


def torchrun(folder, *flags, norm="batch"):
    """Starts two processes of train.py with these flags. Returns torchrun's process."""
    (folder / "worker.py").write_text(WORKER)
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                             str(folder / "worker.py"), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "NORM": norm, "LEFT": str(folder), "OMP_NUM_THREADS": "1"})


def losses(out, stage="tokens"):
    return [line["loss"] for line in train.read_log(out) if line["stage"] == stage]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Trains in this process; returns the run folder."""
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train, "open_dataset", lambda *args: Few())
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    return lambda name, *flags: train.main([*SMALL, *flags, "--out", str(tmp_path / name)])


def test_two_processes_do_what_one_does_with_the_whole_batch(alone, tmp_path, monkeypatch):
    """Without batch norm, the same losses and weights; both processes end with the same parameters."""
    first = alone("first", "--steps", "1")
    flags = ["--vae", str(first), "--steps", "16", "--clip", "0"]
    process = torchrun(tmp_path, *SMALL, *flags, "--out", str(tmp_path / "two"), norm="group")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    monkeypatch.setattr("encoder.nn.BatchNorm2d", lambda channels: torch.nn.GroupNorm(1, channels))
    one = alone("one", *flags)
    a, b = losses(one), losses(tmp_path / "two")
    assert len(a) == len(b) == 4 and max(abs(x - y) for x, y in zip(a, b)) < 1e-4
    ours, theirs = weights(one), weights(tmp_path / "two")
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in ours)
    left = [torch.load(tmp_path / f"tokens-{rank}.pt") for rank in (0, 1)]
    assert all(same(a, b) for a, b in zip(*left))


def test_two_processes_do_what_one_does_in_two_parts(alone, tmp_path):
    """With batch norm over each part. The first stage, whose noise differs: nearly, and one scale for both."""
    process = torchrun(tmp_path, *SMALL, "--steps", "16", "--out", str(tmp_path / "two"))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    left = [torch.load(tmp_path / f"vae-{rank}.pt") for rank in (0, 1)]
    assert same(left[0][0], left[1][0]) and left[0][0]["scale"] != 1
    parts = alone("parts", "--steps", "16", "--vae", str(tmp_path / "two"), "--accumulate", "2")
    assert max(abs(x - y) for x, y in zip(losses(parts), losses(tmp_path / "two"))) < 1e-3
    whole = alone("whole", "--steps", "16")
    assert max(abs(x - y) for x, y in zip(losses(whole, "vae"), losses(tmp_path / "two", "vae"))) < 0.01
    assert max(abs(x - y) for x, y in zip(losses(whole), losses(tmp_path / "two"))) < 0.05


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in Linux's /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_it_resumes(tmp_path, victim):
    out = tmp_path / "run"
    process = torchrun(tmp_path, *SMALL, "--steps", "2000", "--out", str(out))
    while process.poll() is None and not (out / "model.pt").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank = {int(dict(entry.split("=", 1) for entry in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in
                     entry)["RANK"]): int(child) for child in children}
    os.kill(rank[victim], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and output.count("error: a process of this run has ended") == 1, output
    step = train.load(out / "model.pt")["step"]
    assert 0 < step < 2000
    process = torchrun(tmp_path, "--resume", "--out", str(out), "--steps", str(step + 8))
    assert process.communicate()[1] is None and process.returncode == 0
    assert train.load(out / "model.pt")["step"] == step + 8


def test_impossible_batches_are_refused(alone, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--batch-size 8 must be a multiple of .*, here 3"):
        alone("run", "--accumulate", "3")
    monkeypatch.setattr(train, "PROCESSES", 16)
    with pytest.raises(ValueError, match="--batch-size 8 must be .*, here 16"):
        alone("run")
    monkeypatch.setattr(train, "PROCESSES", 3)
    s = train.Settings(batch_size=9, vae_batch_size=8, out=str(tmp_path))
    with pytest.raises(ValueError, match="--vae-batch-size 8 must be a multiple of the 3 processes"):
        train.check(s)
    (tmp_path / "model.pt").touch()                                 # then the first stage is finished
    train.check(s)
