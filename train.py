# SPDX-License-Identifier: MIT
"""Trains EncDiff: first the autoencoder, then token encoder and U-Net together; then scores them.

    python train.py [--preset tiny] [--data 3dshapes.h5]
    python train.py --resume runs/world-small-0     # go on after an interruption
    torchrun --nproc_per_node 2 train.py            # each process its share of every batch

Every field of Config is a flag. A run folder holds run.json (configuration, command, machine),
log.jsonl, vae.pt (first stage), model.pt (token encoder, U-Net and its average).

Letters: B batch, N tokens, D token dimension, Z, h, w channels, height and width of the latent.
"""
import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl  # to lock a run folder
except ImportError:  # Windows has none
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import UNREADABLE, Dataset, InputError, atomic, open_dataset
from diffusion import SCHEDULES, Diffusion
from encoder import ENCODERS, ConceptEncoder
from model import CONDITIONINGS, Decoder, UNet
from vae import FIRST_STAGES, Autoencoder


# ---- configuration ----

@dataclasses.dataclass
class Config:
    """Defaults: preset small. The authors' values: PRESETS["paper"], below. Each is a flag."""
    preset: str = "small"           # sets all others: tiny, small (shown here) or paper
    # the run
    data: str = ""                  # data file or folder of images; empty: the built-in world
    cache: str = ""                 # folder for unpacked data; empty: beside it
    out: str = ""                   # run folder; empty: runs/<data>-<preset>-<seed>
    vae: str = ""                   # another run, whose first stage is used
    seed: int = 0                   # of weights, batches and noise
    device: str = "auto"            # cpu, cuda, cuda:1, mps, or the best there is
    precision: str = "float32"      # float32 or bfloat16, of token encoder and U-Net
    cuda_graphs: bool = False       # record token encoder and U-Net, on one GPU
    # first stage
    first_stage: str = "kl"         # kl or vq
    vae_channels: int = 32          # first stage: width of its finest level
    vae_multipliers: tuple = (1, 2)  # first stage: width of each level / vae_channels
    vae_res_blocks: int = 1         # first stage: residual blocks per level, one more upwards
    vae_groups: int = 8             # first stage: groups of its group norms
    vae_patch: int = 4              # first stage: side of the squares that images are cut into
    latent_channels: int = 4        # first stage: channels of the latent, Z
    vae_steps: int = 4000           # training steps of the first stage
    vae_batch_size: int = 16        # images per step of the first stage
    vae_lr: float = 5e-3            # first stage: highest learning rate, of Adam
    vae_betas: tuple = (0.9, 0.99)  # first stage: Adam's two decay rates
    # token encoder
    encoder: str = "scalar"         # scalar, vector or slot
    tokens: int = 20                # how many, N
    token_dim: int = 16             # numbers per token, D
    encoder_width: int = 64         # token encoder: channels of its trunk
    encoder_strides: tuple = (4, 2, 2)  # token encoder: of its convolutions, 2 or 4 each
    # U-Net
    channels: int = 32              # U-Net: width of its finest level
    multipliers: tuple = (1, 2)     # U-Net: width of each level / channels
    res_blocks: int = 1             # U-Net: residual blocks per level, one more upwards
    groups: int = 8                 # U-Net: groups of its group norms
    attention_levels: int = 2       # U-Net: levels with transformer blocks; the middle has one
    heads: int = 2                  # U-Net: heads of every attention
    conditioning: str = "cross-attention"  # cross-attention, or adagn (an ablation)
    # diffusion
    schedule: str = "cosine"        # cosine, linear (in sqrt(beta)), sqrt_linear or sqrt
    loss: str = "l1"                # l1 or l2, of the predicted noise (reconstruct: of x_0)
    objective: str = "diffusion"    # diffusion, or reconstruct (an ablation): x_0 from tokens
    # optimisation of token encoder and U-Net
    steps: int = 18000              # training steps
    batch_size: int = 32            # images per step, B
    lr: float = 3e-3                # highest learning rate, of AdamW
    betas: tuple = (0.9, 0.99)      # AdamW's two decay rates
    warmup: int = 300               # steps in which lr rises
    decay: str = "cosine"           # cosine (lr and vae_lr fall to 0) or none
    clip: float = 1.0               # largest norm of the gradient; 0: any
    ema: float = 0.999              # limit of the decay of the U-Net's average


# DEVIATION: the sizes and constants of tiny and small were chosen by trials on two CPU cores. Of
# paper, vae_steps and train_vae's warm-up are ours, steps is a rerun's, the rest is the authors'.
PRESETS = {
    "tiny": dict(vae_steps=1200, steps=1800, schedule="linear"),
    "small": dict(),
    "paper": dict(
        first_stage="vq", vae_channels=32, vae_multipliers=(1, 2, 4), vae_res_blocks=2,
        vae_groups=32, vae_patch=1, latent_channels=3,
        vae_steps=10000, vae_batch_size=256, vae_lr=1.15e-3, vae_betas=(0.5, 0.9),
        encoder_width=128, encoder_strides=(2, 2, 2, 2),
        channels=64, multipliers=(1, 2, 4, 4), attention_levels=3, heads=8,
        res_blocks=2, groups=32, schedule="linear",
        steps=37500, batch_size=128, lr=2.56e-4, betas=(0.9, 0.999), warmup=10000,
        decay="none", clip=0.0, ema=0.9999,
    ),
}
CHOICES = {
    "preset": PRESETS, "precision": ("float32", "bfloat16"), "first_stage": FIRST_STAGES,
    "encoder": ENCODERS, "conditioning": CONDITIONINGS, "schedule": SCHEDULES,
    "loss": ("l1", "l2"), "objective": ("diffusion", "reconstruct"), "decay": ("cosine", "none"),
}


def parse(argv):
    """The configuration asked for, and whether a run is resumed."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--flag value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder")
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        default = str(field.default).strip("()").replace(" ", "")  # (1, 2) as 1,2
        text = f"{comments[field.name]} [{default}]"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = numbers(type(field.default[0])) if field.type is tuple else field.type
        choices = CHOICES.get(field.name)
        parser.add_argument(flag, type=kind, choices=choices, metavar="", help=text)
    given = vars(parser.parse_args(argv))
    for name in given.keys() & {"data", "cache", "out", "vae", "resume"}:
        if not given[name]:  # a shell's empty variable
            raise InputError(f"--{name} is empty: give a path or leave the flag out")
        given[name] = os.path.abspath(os.path.expanduser(given[name]))

    if "resume" in given:
        folder = given.pop("resume")
        return resumed(folder, given), True
    if "vae" in given:
        given |= first_stage_of(given["vae"], given)
    cfg = Config(**PRESETS[given.get("preset", "small")] | given)
    if not cfg.out:
        name = Path(cfg.data).stem or "world"
        cfg.out = os.path.abspath(f"runs/{name}-{cfg.preset}-{cfg.seed}")
    return cfg, False


def resumed(folder, given):
    """The configuration of a run to go on with, some of whose flags may change."""
    cfg = config_of(read_run(folder))
    free = {"steps", "device", "data", "cache", "cuda_graphs"}
    if cfg.decay == "cosine":  # the learning rate, a function of steps, would jump
        free.remove("steps")
    refuse("--resume", given.keys() - free)
    return dataclasses.replace(cfg, out=folder, **given)


def refuse(flag, names):
    """InputError if flags are given beside one that takes them from a run."""
    if names:
        names = ", ".join(sorted(names)).replace("_", "-")
        raise InputError(f"{flag} takes {names} from the run: leave it out")


def first_stage_of(folder, given):
    """The settings of another run's first stage."""
    settings = {}
    for name, value in vars(config_of(read_run(folder))).items():
        if name in ("first_stage", "latent_channels") or name.startswith("vae_"):
            settings[name] = value
    refuse("--vae", settings.keys() & given.keys())
    return settings


def numbers(kind):
    """A function: '1,2,4' -> (1, 2, 4), each of this kind."""
    def numbers(text):
        return tuple(map(kind, text.split(",")))
    return numbers


MAY_BE_ZERO = ("betas", "vae_betas", "seed", "attention_levels", "warmup", "clip")


def check(cfg, device):
    """InputError: a number out of range, sizes that do not fit, what the device cannot do."""
    for name, value in vars(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            allowed = isinstance(number, (str, bool)) or (number == 0 and name in MAY_BE_ZERO)
            if not allowed and not 0 < number < 2**32:
                raise InputError(f"--{name} {value} is out of range".replace("_", "-"))
    processes = ranks()[1]
    halvings = len(cfg.vae_multipliers) + len(cfg.multipliers) - 2
    stride = math.prod(cfg.encoder_strides)
    mistakes = {
        "--betas and --vae-betas are two numbers below 1 each, as in 0.9,0.99":
            (len(cfg.betas), len(cfg.vae_betas)) != (2, 2) or max(cfg.betas + cfg.vae_betas) >= 1,
        "--encoder-strides are 2 or 4 each, their product 64 at most":
            set(cfg.encoder_strides) - {2, 4} or stride > 64,
        "--vae-channels must be a multiple of --vae-groups": cfg.vae_channels % cfg.vae_groups,
        "--channels must be a multiple of --groups": cfg.channels % cfg.groups,
        "--channels must be a multiple of --heads": cfg.channels % cfg.heads,
        "--channels must be even": cfg.channels % 2,
        f"64 pixels cannot be cut into --vae-patch {cfg.vae_patch} and halved {halvings} times, "
        "between the levels of --vae-multipliers and of --multipliers":
            64 % (cfg.vae_patch * 2**halvings),
        "--objective reconstruct has no --conditioning adagn":
            cfg.objective == "reconstruct" and cfg.conditioning == "adagn",
        f"{processes} processes cannot share batches of {cfg.batch_size} and {cfg.vae_batch_size} "
        "evenly": cfg.batch_size % processes or cfg.vae_batch_size % processes,
        "batch norm needs two images per process, or smaller --encoder-strides":
            cfg.batch_size == processes and stride == 64,
        "CUDA graphs need one GPU: give --no-cuda-graphs":
            cfg.cuda_graphs and (device.type != "cuda" or processes > 1),
        f"this torch has no bfloat16 on {device.type}: use --precision float32":
            cfg.precision == "bfloat16" and not torch.amp.is_autocast_available(device.type),
    }
    for sentence, made in mistakes.items():
        if made:
            raise InputError(sentence)


# ---- networks ----

def build_vae(cfg: Config) -> Autoencoder:
    """The first stage."""
    return Autoencoder(
        kind=cfg.first_stage,
        channels=cfg.vae_channels,
        multipliers=cfg.vae_multipliers,
        res_blocks=cfg.vae_res_blocks,
        latent_channels=cfg.latent_channels,
        patch=cfg.vae_patch,
        groups=cfg.vae_groups,
    )


def build_encoder(cfg: Config) -> ConceptEncoder:
    """The token encoder."""
    return ConceptEncoder(
        kind=cfg.encoder,
        n_tokens=cfg.tokens,
        token_dim=cfg.token_dim,
        width=cfg.encoder_width,
        strides=cfg.encoder_strides,
    )


def build_unet(cfg: Config) -> UNet | Decoder:
    """The U-Net; for the ablation "reconstruct" its decoder half."""
    sizes = dict(
        latent_channels=cfg.latent_channels,
        channels=cfg.channels,
        multipliers=cfg.multipliers,
        res_blocks=cfg.res_blocks,
        attention_levels=cfg.attention_levels,
        heads=cfg.heads,
        token_dim=cfg.token_dim,
        groups=cfg.groups,
    )
    if cfg.objective == "reconstruct":
        return Decoder(latent_size=latent_shape(cfg)[1], **sizes)
    return UNet(n_tokens=cfg.tokens, conditioning=cfg.conditioning, **sizes)


def latent_shape(cfg):
    """(Z, h, w) of the latents of 64x64 images."""
    side = 64 // (cfg.vae_patch * 2 ** (len(cfg.vae_multipliers) - 1))
    return cfg.latent_channels, side, side


# ---- first stage ----

def train_vae(cfg: Config, ds: Dataset, device: torch.device) -> Autoencoder:
    """Trains the autoencoder (Rombach et al. 2022, section 3.1); returns it, frozen."""
    torch.manual_seed(cfg.seed)  # of the weights
    fused = device.type != "mps"
    vae = build_vae(cfg).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vae.parameters(), cfg.vae_lr, cfg.vae_betas, fused=fused)
    checkpoint = Path(cfg.out) / "vae.pt"
    parts = dict(vae=vae, optimizer=optimizer)
    start, seconds = restore(checkpoint, parts)
    log = Log(cfg, "vae", start, cfg.vae_steps, seconds)
    processes = ranks()[1]
    B = cfg.vae_batch_size // processes

    def draw_images(n):
        return move(ds.images(torch.randint(len(ds), (n,))), device)  # (n, 3, 64, 64)

    if start == 0 and cfg.first_stage == "vq":
        with torch.no_grad():
            vae.codebook.init_from(vae.encoder(draw_images(256)))
    model = wrap(vae)
    for step in range(start, cfg.vae_steps):
        seed_step(cfg.seed, step)
        images = draw_images(B)             # (B, 3, 64, 64)
        loss, l1 = model(images)
        optimizer.zero_grad()
        loss.backward()
        lr = learning_rate(step, cfg.vae_steps, cfg.vae_lr, warmup=100, decay=cfg.decay)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if step + 1 == cfg.vae_steps:  # before the last checkpoint, which must hold it
            # DEVIATION: from 1,024 images; the authors' from the diffusion's first batch
            vae.set_scale(draw_images(1024))
            if processes > 1:
                dist.broadcast(vae.scale, src=0)
        if log.add(l1):  # L1 without the latent's term
            save_checkpoint(checkpoint, cfg, step + 1, log.seconds(), parts)
    return vae.eval().requires_grad_(False)


# ---- tokens and U-Net ----

def train_tokens(
    cfg: Config, ds: Dataset, vae: Autoencoder, device: torch.device, score: Callable | None = None
):
    """DDPM's algorithm 1 with the tokens as the condition (EncDiff, method section).

    score: called with the token encoder and the data at every tenth of the run, for the log.
    """
    torch.manual_seed(cfg.seed + 1)  # other draws than those of the autoencoder's weights
    diffusion = Diffusion(cfg.schedule).to(device)
    encoder = build_encoder(cfg).to(device, memory_format=torch.channels_last)
    unet = build_unet(cfg).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(unet).requires_grad_(False)  # of the U-Net alone, as the authors have it
    if cfg.cuda_graphs:  # before restore: recording runs zeros through batch norm
        record_graphs(encoder, unet, cfg)
    params = [*encoder.parameters(), *unet.parameters()]
    fused = device.type != "mps"
    optimizer = torch.optim.AdamW(params, cfg.lr, cfg.betas, weight_decay=0.01, fused=fused)
    checkpoint = Path(cfg.out) / "model.pt"
    parts = dict(encoder=encoder, unet=unet, ema=ema, optimizer=optimizer)
    start, seconds = restore(checkpoint, parts)
    log = Log(cfg, "tokens", start, cfg.steps, seconds)
    B, T = cfg.batch_size // ranks()[1], diffusion.steps
    loss_function = F.l1_loss if cfg.loss == "l1" else F.mse_loss
    shared_encoder, shared_unet = wrap(encoder), wrap(unet)

    for step in range(start, cfg.steps):
        seed_step(cfg.seed, step)
        images = move(ds.images(torch.randint(len(ds), (B,))), device)  # (B, 3, 64, 64)
        x_0 = vae.encode(images)                    # (B, Z, h, w)
        t = torch.randint(T, (B,), device=device)   # (B,)
        eps = torch.randn_like(x_0)                 # (B, Z, h, w)
        x_t = diffusion.q_sample(x_0, t, eps)       # (B, Z, h, w)
        with autocast(cfg, device):
            tokens = shared_encoder(images)         # (B, N, D)
            eps_pred = shared_unet(x_t, t, tokens)  # (B, Z, h, w)
            loss = loss_function(eps_pred, eps)
            if cfg.objective == "reconstruct":      # ablation: the Decoder predicts x_0
                loss = loss_function(eps_pred, x_0)
        optimizer.zero_grad()
        loss.backward()
        if cfg.clip:
            torch.nn.utils.clip_grad_norm_(params, cfg.clip)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        update_ema(ema, unet, ema_decay(step + 1, cfg.ema))
        if log.add(loss):
            save_checkpoint(checkpoint, cfg, step + 1, log.seconds(), parts)
        if score and (step + 1) % math.ceil(cfg.steps / 10) == 0:
            log.write(**score(encoder, ds))


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: str) -> float:
    """Linear warm-up; decay "cosine" multiplies it by a half cosine from 1 down to 0."""
    lr = peak * min(1.0, (step + 1) / max(1, warmup))
    if decay == "cosine":
        lr *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return lr


def ema_decay(n: int, limit: float = 0.9999) -> float:
    """Decay of the moving average at its n-th update, n = 1, 2, .. (latent diffusion's code)."""
    return min(limit, (1 + n) / (10 + n))


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float):
    """ema <- decay * ema + (1 - decay) * model, in place."""
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - decay)


def seed_step(seed, step):
    """Each step and process has a seed of its own: a resumed run draws what it would have."""
    rank, processes = ranks()
    torch.manual_seed(seed * 10**9 + step * processes + rank)


# ---- devices and processes ----

def choose_device(name: str) -> torch.device:
    """The device of this name, or the best for "auto"; under torchrun a GPU per process.

    Processes do not share an Apple GPU. InputError.
    """
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available() and "LOCAL_RANK" not in os.environ:
        devices.append("mps")
    devices.append("cpu")
    if name == "auto":
        name = devices[0].removesuffix(":0")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in devices:
        raise InputError(f"--device {name} is not available here: try cpu")
    return torch.device(name)


def allow_tf32(on: bool):
    """Whether an NVIDIA GPU may round factors to 10 bits: not in first stage and final scores."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def autocast(cfg, device):
    """A context in which networks compute in bfloat16, if asked for."""
    if cfg.precision == "float32":
        return contextlib.nullcontext()  # old versions have no autocast for Apple GPUs
    return torch.autocast(device.type, torch.bfloat16)


def move(x, device):
    """x on the device, without waiting for a GPU that is busy with the step before."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def ranks():
    """The number of this process and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wrap(module):
    """Averages gradients over the processes. Batch norm sees each one's share of the batch."""
    if ranks()[1] > 1:
        return torch.nn.parallel.DistributedDataParallel(module)
    return module


def record_graphs(encoder, unet, cfg):
    """Replaces `forward` and its backward, in place, by CUDA graphs: one launch each."""
    B = cfg.batch_size
    images = torch.zeros(B, 3, 64, 64, device="cuda")
    x_t = torch.zeros(B, *latent_shape(cfg), device="cuda")
    t = torch.zeros(B, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, cfg.precision == "bfloat16", cache_enabled=False):
        tokens = encoder(images).detach().requires_grad_()  # as in training
        torch.cuda.make_graphed_callables((encoder, unet), ((images,), (x_t, t, tokens)))


# ---- run folder and checkpoints ----

LOG_EVERY = 50  # steps between two lines of the log
SAVE_EVERY = 60  # seconds, at least, between two checkpoints


class Log:
    """One stage's lines in log.jsonl (after a resume some come twice), and when to save."""

    def __init__(self, cfg, stage, start, steps, seconds):
        self.path = Path(cfg.out) / "log.jsonl"
        self.stage, self.step, self.steps = stage, start, steps
        self.losses = []  # since the last line
        self.shown = {}   # beside the bar
        self.saved = time.monotonic()
        self.started = self.saved - seconds  # as if it had never stopped
        self.is_first = ranks()[0] == 0  # the process that writes
        self.bar = tqdm(total=steps, initial=start, desc=stage, disable=not self.is_first)

    def add(self, loss):
        """Counts a step with its loss; returns whether to save now.

        A line has the mean loss since the last. InputError when it has diverged.
        """
        self.step += 1
        self.bar.update()
        self.losses.append(loss.detach())
        if self.step % LOG_EVERY and self.step < self.steps:
            return False
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise diverged(f"the {self.stage} loss", self.step)
        self.losses = []
        self.write(loss=round(loss, 6))
        if time.monotonic() - self.saved < SAVE_EVERY and self.step < self.steps:
            return False
        self.saved = time.monotonic()
        return self.is_first

    def write(self, **values):
        """Adds a line with these values, and shows them, with the last others, beside the bar."""
        self.shown |= values
        self.bar.set_postfix(self.shown, refresh=False)
        if self.is_first and values:
            line = dict(stage=self.stage, step=self.step, seconds=self.seconds(), **values)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def seconds(self):
        """How long the stage has been running, earlier sessions included."""
        return round(time.monotonic() - self.started, 2)


def diverged(what, step):
    """The InputError for it."""
    return InputError(f"{what} diverged before step {step}: start again with a lower learning rate")


def save_checkpoint(path, cfg, step, seconds, parts):
    """Writes plain types alone, so that torch.load(.., weights_only=True) reads them.

    InputError, and the last checkpoint is kept, when a weight is no longer finite.
    """
    contents = dict(config=vars(cfg), step=step, seconds=seconds)
    for name, part in parts.items():
        contents[name] = part.state_dict()
        for weight in contents[name].values():
            if isinstance(weight, torch.Tensor) and not weight.isfinite().all():
                raise diverged(f"{name}: a weight", step)
    with atomic(path) as temporary:
        torch.save(contents, temporary)


def restore(path, parts):
    """Puts a checkpoint, if there is one, into the parts. Returns its steps and seconds."""
    if not path.exists():
        return 0, 0.0
    contents = load_checkpoint(path, **parts)
    return contents["step"], contents["seconds"]


def load_checkpoint(path: str | Path, **parts) -> dict:
    """A checkpoint's contents; the states named in `parts` are put into these. InputError."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}, it is missing or damaged: put it back, --resume an "
                         "unfinished run, or train anew") from error
    try:
        for name, part in parts.items():
            part.load_state_dict(contents[name])
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is of another configuration than run.json beside it") from error
    return contents


def write_json(path, contents):
    """Whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, keys: set, advice: str) -> dict:
    """What a JSON file of a run holds. InputError without these keys."""
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError):
        contents = {}
    if not isinstance(contents, dict) or not keys <= contents.keys():
        raise InputError(f"{path} is missing or damaged: {advice}")
    return contents


def read_run(folder: str | Path) -> dict:
    """What run.json of a run folder says. InputError."""
    return read_json(Path(folder) / "run.json", {"config", "data"}, "is this a run folder?")


def config_of(run: dict) -> Config:
    """The configuration in what read_run returned. InputError when another version wrote it."""
    config = {}
    for name, value in run["config"].items():
        config[name] = tuple(value) if isinstance(value, list) else value
    try:
        return Config(**config)
    except TypeError as error:
        raise InputError(f"this run is of another version of the code ({error})") from error


def machine(device, script, argv):
    """What results depend on beside the configuration. The command names no folders."""
    words = [re.sub(r"(^|=)(/|[A-Z]:).*[/\\]", r"\1", word) for word in argv]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        commit = ""
    gpu = device.type == "cuda"
    return dict(
        command=" ".join(["python", script, *words]),
        commit=commit or "unknown",
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if gpu else device.type,
        threads=torch.get_num_threads(),
        processes=ranks()[1],
    )


# ---- the run ----

def claim(folder, resume):
    """Makes the run folder; returns its log, locked while it is open. InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {file.name for file in folder.iterdir()}
    if not resume and files - {"log.jsonl"}:  # a run killed at once leaves it, empty
        raise InputError(f"{folder} has files already: go on with --resume {folder}, or choose "
                         "another --out")
    lock = open(folder / "log.jsonl", "a")  # noqa: SIM115 (main closes it)
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use: another process is training there") from None
    return lock


def check_resumed(folder, cfg, run, ds):
    """InputError when the data is another, or the checkpoints are of no use."""
    if run["data"]["checksum"] != ds.checksum():
        raise InputError(f"{folder} was trained on other images than those of {ds.name}")
    if (folder / "model.pt").exists():
        load_checkpoint(folder / "vae.pt")  # model.pt is of no use without it
        contents = load_checkpoint(folder / "model.pt")
        step = contents["step"]
        if "optimizer" not in contents:
            raise InputError(f"{folder} was exported: it can be evaluated, not resumed")
        if step > cfg.steps:
            raise InputError(f"{folder} has had {step} steps: give no fewer --steps")


def prepare(cfg, resume, ds, facts):
    """Fills a new run folder or checks the one to go on with; returns its lock. InputError."""
    folder = Path(cfg.out)
    copied = cfg.vae and not (folder / "vae.pt").exists()
    if copied and load_checkpoint(Path(cfg.vae) / "vae.pt")["step"] < cfg.vae_steps:
        raise InputError(f"{cfg.vae} has not finished its first stage: --resume it first")
    run = {"machine": facts}  # where it was started
    if resume:
        run = read_run(folder)
        check_resumed(folder, cfg, run, ds)
    lock = claim(folder, resume)
    (folder / "scores.json").unlink(missing_ok=True)  # of an earlier checkpoint
    if copied:
        shutil.copy(Path(cfg.vae) / "vae.pt", folder)
    run["config"] = vars(cfg)
    run["data"] = dict(name=ds.name, images=len(ds), checksum=ds.checksum())
    write_json(folder / "run.json", run)
    print(f"{folder}: {ds.name}, preset {cfg.preset}")
    return lock


def main(argv: list[str], score: Callable | None = None) -> str:
    """Trains a run and returns its folder. score: see train_tokens. InputError."""
    cfg, resume = parse(argv)
    device = choose_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun started this process
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = ranks()
    check(cfg, device)
    ds = open_dataset(cfg.data, cfg.cache)
    lock = None
    if rank == 0:
        lock = prepare(cfg, resume, ds, machine(device, "train.py", argv))
    if processes > 1:
        dist.barrier()
    allow_tf32(False)  # the codebook's nearest vectors need all bits
    vae = train_vae(cfg, ds, device)
    allow_tf32(True)
    train_tokens(cfg, ds, vae, device, score if rank == 0 else None)
    if dist.is_initialized():
        dist.destroy_process_group()
    if lock:
        lock.close()
    return cfg.out


if __name__ == "__main__":
    import evaluate
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    try:
        folder = main(sys.argv[1:], evaluate.score_on_the_way)
        if os.environ.get("RANK", "0") == "0":
            evaluate.main([folder])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped: --resume with the run folder goes on from its last checkpoint, if any")
