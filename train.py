"""Trains EncDiff: first the autoencoder, then token encoder and diffusion U-Net together; then scores it.

    python train.py                                  # built-in world, preset small
    python train.py --preset tiny                    # under three minutes: start here
    python train.py --data 3dshapes.h5               # the real file, nothing else changed
    python train.py --preset paper --device cuda     # the sizes and constants of the paper
    python train.py --resume --out runs/world-small-0
    torchrun --nproc_per_node 2 train.py             # each process computes its share of every batch

Every field of Settings is a flag. A run folder holds settings.json, log.jsonl (one JSON object a line),
vae.pt (first stage), model.pt (encoder, U-Net and its average), codes-STEP.npy, pictures (PNG) and scores.json.

Exports: Settings, PRESETS, build_autoencoder, build_networks, build_diffusion, load_run, main.
Letters:  B batch, Z latent channels, h, w height and width of the latent, N tokens, D token dimension.
"""
import argparse
import copy
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DATASETS, hold_out, open_dataset, whole
from diffusion import LOSSES, PROCESSES, RANK, SCHEDULES, Diffusion, Reconstruction, arithmetic, choose_compile
from diffusion import choose_device, choose_precision, ema_decay, end_with, for_training, learning_rate, meet
from diffusion import update_ema
from encoder import KINDS, ConceptEncoder
from model import CONDITIONINGS, UNet
from vae import Autoencoder, encode_all


# ---- settings -------------------------------------------------------------------------------------

def setting(default, help, choices=None, low=None, high=math.inf):
    """One field of Settings: default, text of its flag, choices; a number, or each of a tuple, must be low..high.

    Without `low`, whole numbers are at least 1, others above 0.
    """
    kind = type(default[0] if isinstance(default, tuple) else default)
    low = {int: 1, float: 1e-9}.get(kind) if low is None else low
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, kind=kind, low=low, high=high))


@dataclasses.dataclass
class Settings:
    """What a run can be told. The defaults are preset small; "paper:" gives its value or, where it gives none, its
    official code's."""
    preset: str = setting("small", "sizes and constants to start from", ("tiny", "small", "paper"))
    # run
    data: str = setting("", "a data file or a folder of images; empty: the built-in world")
    dataset: str = setting("", "which data set that is; empty: as its contents say", ("", *DATASETS))
    cache: str = setting("", "folder for the unpacked copy of the data; empty: beside it")
    holdout: float = setting(0.0, "share of the images that training never sees", low=0, high=0.99)
    holdout_factors: str = setting("", 'combinations that training never sees, such as "floor_hue=3,shape=1;scale=0"')
    out: str = setting("", "run folder; empty: runs/<data>-<preset>-<seed>")
    seed: int = setting(0, "of weights, batches and noise", low=0, high=2 ** 32)
    device: str = setting("auto", "cpu, cuda, mps; auto: the first of cuda, mps, cpu that is there")
    checkpoint_minutes: float = setting(2.0, "minutes between checkpoints", low=0)
    precision: str = setting("auto", "auto: bfloat16 on CUDA, or float32 (paper: float32)",
                             ("auto", "float32", "bfloat16"))
    compile: str = setting("no", "torch.compile the networks: takes a minute or two, then saves time", ("no", "yes"))
    # first stage
    first_stage: str = setting("kl", "autoencoder with a Gaussian or a quantised latent (paper: vq)", ("kl", "vq"))
    vae: str = setting("", "a run folder whose first stage is used instead of training one")
    vae_channels: int = setting(32, "width of its finest level (paper: 32)")
    vae_multipliers: tuple = setting((1, 2), "its levels' widths / vae-channels (paper: 1,2,4)")
    vae_res_blocks: int = setting(1, "its residual blocks a level (paper: 2)")
    vae_groups: int = setting(8, "groups of its group norms (paper: 32)")
    patch: int = setting(4, "its pictures are first cut into patch x patch squares (paper: 1)")
    latent_channels: int = setting(4, "numbers at each place of the latent, Z (paper: 3)")
    codebook_size: int = setting(2048, "vectors in the codebook of vq (paper: 2048)")
    vae_steps: int = setting(4000, "its training steps")
    vae_batch_size: int = setting(16, "its images a step (paper: 128 x 2)")
    vae_lr: float = setting(5e-3, "its highest learning rate (paper: 1.15e-3)")
    vae_betas: tuple = setting((0.9, 0.99), "of its Adam (paper: 0.5,0.9)", low=0, high=0.9999)
    vae_warmup: int = setting(100, "its steps of linear warm-up (paper: 0)", low=0)
    # tokens
    encoder: str = setting("scalar", "kind of concept tokens (paper: scalar)", KINDS)
    tokens: int = setting(20, "concept tokens, N (paper: 20)")
    token_dim: int = setting(16, "numbers in a token, D (paper: 16)")
    encoder_width: int = setting(64, "channels of the encoder's trunk (paper: 128)")
    encoder_strides: tuple = setting((4, 2, 2), "of its convolutions (paper: 2,2,2,2)")
    # U-Net and diffusion
    channels: int = setting(32, "width of the U-Net's finest level (paper: 64)")
    multipliers: tuple = setting((1, 2), "its levels' widths / channels (paper: 1,2,4,4)")
    res_blocks: int = setting(1, "its residual blocks a level (paper: 2)")
    attention_levels: int = setting(2, "its levels with transformer blocks, from the finest (paper: 3)", low=0)
    heads: int = setting(2, "attention heads (paper: 8)")
    groups: int = setting(8, "groups of its group norms (paper: 32)")
    conditioning: str = setting("cross-attention", "how the tokens reach the U-Net (paper: cross-attention)",
                                CONDITIONINGS)
    objective: str = setting("diffusion", "predict the noise, or rebuild the latent from a fixed input in one step "
                             "(paper: diffusion)", ("diffusion", "reconstruct"))
    schedule: str = setting("linear", "noise schedule, beta_t (paper: linear)", SCHEDULES)
    loss: str = setting("l1", "of the predicted noise (paper's code: l1)", LOSSES)
    # optimisation
    steps: int = setting(36000, "training steps of tokens and U-Net (paper: not given)")
    batch_size: int = setting(16, "images a step, B (paper: 128)")
    accumulate: int = setting(1, "parts that a batch is computed in, for little memory (paper: 1)")
    lr: float = setting(3e-3, "highest learning rate (paper: 2.56e-4)")
    betas: tuple = setting((0.9, 0.99), "of its AdamW (paper: 0.9,0.999)", low=0, high=0.9999)
    warmup: int = setting(300, "steps of linear warm-up (paper: 10000)", low=0)
    decay: str = setting("cosine", "of both learning rates, over all steps (paper: none)", ("cosine", "none"))
    clip: float = setting(1.0, "largest norm of the gradient; 0: any (paper: 0)", low=0)
    ema: float = setting(0.999, "limit of the U-Net average's decay (paper: 0.9999)", low=0, high=0.99999)
    score_images: int = setting(0, "images encoded for the scores, drawn at random; 0: all (paper: all)", low=0)


# DEVIATION: "small" and "tiny" are not the paper's: patches, few channels and heads, coarser strides, a learning
# rate that is higher and falls to 0, smaller batches, other Adam betas, clipped gradients, a shorter weight average;
# chosen by experiment for two CPU cores. In "paper" the two numbers of steps are ours: the paper does not give them.
PRESETS = {
    "small": {},
    "tiny": dict(vae_steps=400, steps=700, batch_size=32, warmup=100, score_images=30000),
    "paper": dict(first_stage="vq", vae_multipliers=(1, 2, 4), vae_res_blocks=2, vae_groups=32, patch=1,
                  latent_channels=3, vae_steps=10000, vae_batch_size=256, vae_lr=1.15e-3, vae_betas=(0.5, 0.9),
                  vae_warmup=0, encoder_width=128, encoder_strides=(2, 2, 2, 2), channels=64,
                  multipliers=(1, 2, 4, 4), res_blocks=2, attention_levels=3, heads=8, groups=32, steps=37500,
                  batch_size=128, lr=2.56e-4, betas=(0.9, 0.999), warmup=10000, decay="none", clip=0.0, ema=0.9999),
}
FIRST_STAGE = ("first_stage", "vae_channels", "vae_multipliers", "vae_res_blocks", "vae_groups", "patch",
               "latent_channels", "codebook_size", "vae_steps", "vae_batch_size", "vae_lr", "vae_betas", "vae_warmup")
MAY_CHANGE = ("out", "cache", "device", "compile", "accumulate", "steps", "checkpoint_minutes",          # by --resume
              "score_images")
NOT_COMPARED = ("seed", "vae", "out", "cache", "device", "compile", "checkpoint_minutes", "score_images")   # in tables


def parse(argv):
    """argv -> (Settings, resume, names of the flags given). Wrong flags end the program, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out (or the default folder)")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        parser.add_argument("--" + flag(field.name), choices=field.metadata["choices"],
                            type=numbers if kind is tuple else kind,
                            metavar=None if field.metadata["choices"] else kind.__name__.upper(),
                            help=f"{field.metadata['help']} [{field.default}]".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", False)
    return Settings(**{**PRESETS[given.get("preset", "small")], **given}), resume, given


def flag(name):
    """A field's name as the command line has it: vae_lr -> vae-lr"""
    return name.replace("_", "-")


def shown(value):
    """A setting's value in a sentence."""
    return "(none)" if value == "" else value


def numbers(text):
    """'1,2,4' -> (1, 2, 4); '0.9,0.99' -> (0.9, 0.99)"""
    return tuple(float(part) if "." in part else int(part) for part in text.split(","))


def check(s):
    """ValueError with one sentence when a setting is impossible by itself."""
    for field in dataclasses.fields(s):
        value, (kind, low, high) = getattr(s, field.name), (field.metadata[k] for k in ("kind", "low", "high"))
        if kind in (int, float) and not all(isinstance(x, (int, kind)) and low <= x <= high
                                            for x in (value if isinstance(value, tuple) else [value])):
            most = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"--{flag(field.name)} {value}: must be {'whole, ' * (kind is int)}at least {low}{most}")
    if len(s.betas) != 2 or len(s.vae_betas) != 2:
        raise ValueError(f"--betas {s.betas}, --vae-betas {s.vae_betas}: give two numbers each, such as 0.9,0.99")
    if s.batch_size % (K := PROCESSES * s.accumulate):
        raise ValueError(f"--batch-size {s.batch_size} must be a multiple of processes x --accumulate, here {K}")
    if s.vae_batch_size % PROCESSES and not (s.vae or (Path(s.out) / "model.pt").exists()):
        raise ValueError(f"--vae-batch-size {s.vae_batch_size} must be a multiple of the {PROCESSES} processes")
    if 0 < s.score_images < 15000:
        raise ValueError(f"--score-images must be 0 (all) or at least 15000, as DCI needs, not {s.score_images}")
    if (side := latent_shape(s)[1]) % 2 ** (len(s.multipliers) - 1):
        raise ValueError(f"the U-Net's {len(s.multipliers)} levels cannot halve {side}x{side} latents "
                         f"{len(s.multipliers) - 1} times: choose fewer --multipliers or a smaller --patch")


# ---- parts ----------------------------------------------------------------------------------------

def latent_shape(s):
    """(Z, h, w) of the latents that the first stage makes of 64x64 pictures."""
    side = 64 // (s.patch * 2 ** (len(s.vae_multipliers) - 1))
    return s.latent_channels, side, side


def build_autoencoder(s):
    """The first stage that Settings s describe."""
    return Autoencoder(s.first_stage, s.vae_channels, s.vae_multipliers, s.vae_res_blocks, s.latent_channels, s.patch,
                       s.vae_groups, s.codebook_size)


def build_networks(s):
    """Token encoder and U-Net; N and D reach both from the same two settings."""
    encoder = ConceptEncoder(s.encoder, s.tokens, s.token_dim, s.encoder_width, s.encoder_strides)
    unet = UNet(s.latent_channels, s.channels, s.multipliers, s.res_blocks, s.attention_levels, s.heads, s.token_dim,
                s.groups, s.conditioning, s.tokens)
    return encoder, unet


def build_diffusion(s):
    """The noise schedule with its loss and samplers; for the ablation without diffusion, what stands in its place."""
    return Diffusion(s.schedule) if s.objective == "diffusion" else Reconstruction(latent_shape(s))


def draw(s, rows, diffusion, device):
    """One step's image numbers (B,), on the CPU, noise levels (B,) and noise (B, Z, h, w), in s.accumulate parts.

    Under torchrun all processes draw the same and each takes its parts: together they do what one would alone.
    """
    B, K = s.batch_size, PROCESSES * s.accumulate
    index = rows[torch.randint(len(rows), (B,))]                                        # (B,)
    t = diffusion.draw_t(B)                                                             # (B,)
    eps = torch.randn(B, *latent_shape(s), device=device)                               # (B, Z, h, w)
    return [(index[k::K], t[k::K], eps[k::K]) for k in range(RANK, K, PROCESSES)]       # each spans all levels


# ---- checkpoints ----------------------------------------------------------------------------------

def load(path, *parts):
    """A checkpoint with these parts, as save wrote it, on the CPU. OSError or ValueError with one sentence."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part in parts:
            saved[part]
        return saved
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the folder holds no such checkpoint") from None
    except Exception as error:                                      # torch raises many kinds for a damaged file
        why = (str(error) or "it is cut short").split("\n")[0]
        raise ValueError(f"{path} is not a readable checkpoint ({why})") from None


def fill(path, saved, **parts):
    """Puts the states in a checkpoint into these parts. ValueError with one sentence where one does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} does not fit the settings.json beside it: were two runs mixed?") from None


def save(path, s, step, device, **parts):
    """Writes a checkpoint of plain types: settings, step, the parts' and the random generators' states (not MPS's)."""
    random = {"cpu": torch.get_rng_state(),
              "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}
    saved = dict(settings=dataclasses.asdict(s), step=step, random=random,
                 **{name: part.state_dict() for name, part in parts.items()})
    with whole(path) as temporary:
        torch.save(saved, temporary)


def restore(path, device, **parts):
    """Puts a checkpoint's states into these parts and the random generators. Returns its step, 0 without a file."""
    if not path.exists():
        return 0
    saved = load(path, *parts, "step", "random")
    fill(path, saved, **parts)
    torch.set_rng_state(saved["random"]["cpu"])
    if device.type == "cuda" and saved["random"]["cuda"] is not None:
        torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    return saved["step"]


def read_log(out):
    """What a run has logged: dicts with stage, step, loss and seconds, oldest first."""
    file = Path(out) / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


LOG_EVERY = 50                                                      # steps between two lines of the log


class Progress:
    """How far one stage of a run is: its checkpoint, its lines in log.jsonl, its bar. `parts` have a state_dict."""

    def __init__(self, s, out, stage, checkpoint, steps, batch_size, device, **parts):
        self.s, self.stage, self.checkpoint, self.steps, self.batch_size = s, stage, out / checkpoint, steps, batch_size
        self.log, self.device, self.parts = out / "log.jsonl", device, parts
        self.step = restore(self.checkpoint, device, **parts)
        lines = [line for line in read_log(out) if line["stage"] != stage or line["step"] <= self.step]
        if RANK == 0:                                               # the first process writes, here and below
            with whole(self.log) as file:                           # what came after the checkpoint is done again
                file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.seconds = max([line["seconds"] for line in lines if line["stage"] == stage], default=0.0)

    def begin(self):
        """Starts the clock and the bar."""
        self.saved, self.started = time.monotonic(), time.monotonic() - self.seconds
        self.bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, unit="step", mininterval=1.0,
                        disable=self.step >= self.steps or RANK > 0)

    def after_step(self, loss, must_be_finite):
        """Counts a step; every so often logs its loss and saves. ValueError if either scalar is not finite."""
        self.step += 1
        if self.step % LOG_EVERY and self.step < self.steps:
            return
        means = torch.stack([loss.detach(), must_be_finite.detach()]) / PROCESSES       # (2,)
        if PROCESSES > 1:
            dist.all_reduce(means)
        loss = means[0].item()
        if not means.isfinite().all():
            raise ValueError(f"the {self.stage} loss is not a finite number at step {self.step}: training stopped, the "
                             "last checkpoint is kept; start again with a lower learning rate")
        if RANK > 0:
            return
        seconds = time.monotonic() - self.started
        line = dict(stage=self.stage, step=self.step, loss=round(loss, 6), seconds=round(seconds, 2))
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
        rate = self.step * self.batch_size / seconds
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
        self.bar.update(self.step - self.bar.n)
        if self.step == self.steps or time.monotonic() - self.saved >= 60 * self.s.checkpoint_minutes:
            save(self.checkpoint, self.s, self.step, self.device, **self.parts)
            self.saved = time.monotonic()
        if self.step == self.steps:
            self.bar.close()


# ---- the two stages -------------------------------------------------------------------------------

def train_first_stage(s, ds, rows, out, device):
    """Trains the autoencoder on L1 + KL or codebook (Rombach et al. 2022, section 3.1). Returns it, frozen."""
    torch.manual_seed(s.seed)
    vae = build_autoencoder(s).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vae.parameters(), s.vae_lr, s.vae_betas, fused=device.type in ("cpu", "cuda"))
    progress = Progress(s, out, "vae", "vae.pt", s.vae_steps, s.vae_batch_size, device, vae=vae, optimizer=optimizer)
    images_of = lambda index: ds.images(index).to(device)                               # (n,) -> (n, 3, 64, 64)
    sample = lambda n: rows[torch.randint(len(rows), (n,))]                             # (n,)
    if progress.step == 0 and s.first_stage == "vq":
        vae.codebook.start_from(vae.encode(images_of(sample(s.vae_batch_size))))
    loss_of = for_training(vae, s.compile)
    progress.begin()
    while progress.step < s.vae_steps:
        images = images_of(sample(s.vae_batch_size)[RANK::PROCESSES])                   # (B / processes, 3, 64, 64)
        optimizer.param_groups[0]["lr"] = learning_rate(progress.step, s.vae_steps, s.vae_lr, s.vae_warmup, s.decay)
        loss, l1 = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # DEVIATION: scaled once trained, by 1,024 images; the authors' scale comes from the first training batch
        if progress.step == s.vae_steps - 1:
            vae.eval().set_scale(images_of(sample(1024)))
        progress.after_step(l1, loss)                               # the log shows L1 alone
    return vae.eval().requires_grad_(False)


def prepare(s, ds, vae, device, most=2 ** 31):
    """A function index (B,) -> images (B, 3, 64, 64) and their latents x_0 (B, Z, h, w), on the device.

    When training looks at more pictures than there are, all latents are computed once, if they take at most `most`
    bytes; a GPU that has four times the memory that pictures and latents need then keeps the pictures, too.
    """
    n = len(ds)
    if s.steps * s.batch_size <= n or 2 * n * math.prod(latent_shape(s)) > most:
        return lambda index: (images := ds.images(index).to(device), vae.encode(images))
    needed = n * (3 * 64 ** 2 + 2 * math.prod(latent_shape(s)))                         # bytes
    room = device.type == "cuda" and torch.cuda.mem_get_info(device.index)[0] > 4 * needed
    parts = tqdm(torch.arange(n).split(512), desc="latents", unit="batch", mininterval=1.0, disable=RANK > 0)
    latents, pixels = encode_all(vae, ds.images, parts, device, room)                   # (n, Z, h, w), (n, 3, 64, 64)
    def batch(index):
        there = index.to(device, non_blocking=True)                                     # (B,)
        return pixels[there] / 127.5 - 1 if room else ds.images(index).to(device), latents[there].float()
    return batch


def train_tokens(s, ds, rows, vae, out, device):
    """Trains token encoder and U-Net on the noise-prediction loss alone (EncDiff, method section)."""
    torch.manual_seed(s.seed + 1)
    diffusion = build_diffusion(s).to(device)
    encoder, unet = (part.to(device, memory_format=torch.channels_last) for part in build_networks(s))
    ema = copy.deepcopy(unet).requires_grad_(False)                 # of the U-Net alone, as in the official code
    parameters = [*encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, s.lr, s.betas, weight_decay=0.01, fused=device.type in ("cpu", "cuda"))
    progress = Progress(s, out, "tokens", "model.pt", s.steps, s.batch_size, device,
                        encoder=encoder, unet=unet, ema=ema, optimizer=optimizer)
    batch = prepare(s, ds, vae, device) if progress.step < s.steps else None
    encoder, unet = (for_training(part, s.compile) for part in (encoder, unet))
    progress.begin()
    while progress.step < s.steps:
        optimizer.param_groups[0]["lr"] = learning_rate(progress.step, s.steps, s.lr, s.warmup, s.decay)
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for index, t, eps in draw(s, rows, diffusion, device):      # noise: (B,), (B,), (B, Z, h, w); B of a part
            images, x_0 = batch(index)                              # data: (B, 3, 64, 64), (B, Z, h, w)
            with arithmetic(s.precision, device):
                tokens = encoder(images)                            # tokens: (B, N, D)
                part_loss = diffusion.loss(lambda x_t, t: unet(x_t, t, tokens), x_0, t, eps, s.loss)    # loss
            (part_loss / s.accumulate).backward()
            loss += part_loss.detach() / s.accumulate
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.clip or math.inf)
        optimizer.step()                                            # step
        update_ema(ema, unet, ema_decay(progress.step + 1, s.ema))  # average
        progress.after_step(loss, norm)                             # log, checkpoint


# ---- the run --------------------------------------------------------------------------------------

def read_settings(out):
    """The Settings of a run folder; OSError or ValueError with one sentence."""
    file = Path(out) / "settings.json"
    try:
        saved = json.loads(file.read_text())
        return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{out} holds no run: there is no settings.json in it") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as this version's settings ({error})") from None


def write_json(path, contents):
    """Writes a JSON file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1) + "\n")


def load_run(out, device):
    """A finished (or interrupted) run: its Settings, autoencoder, token encoder, averaged U-Net, and step."""
    s, out = read_settings(out), Path(out)
    first_stage, model = load(out / "vae.pt", "vae"), load(out / "model.pt", "encoder", "ema", "step")
    vae, (encoder, unet) = build_autoencoder(s), build_networks(s)
    fill(out / "vae.pt", first_stage, vae=vae)
    fill(out / "model.pt", model, encoder=encoder, ema=unet)
    parts = [part.to(device).eval().requires_grad_(False) for part in (vae, encoder, unet)]
    return s, *parts, model["step"]


def settle(s, resume, given):
    """Checks the run folder against the flags; returns the Settings to train with. Reads only."""
    out = Path(s.out or f"runs/{Path(s.data).stem or 'world'}-{s.preset}-{s.seed}")
    s = dataclasses.replace(s, out=str(out))
    if resume:
        old = read_settings(out)
        changed = [name for name in given if name not in MAY_CHANGE and given[name] not in ("auto", getattr(old, name))]
        if changed:
            raise ValueError("--resume with other settings than the run was started with: " + ", ".join(
                f"--{flag(name)} was {shown(getattr(old, name))}, not {shown(getattr(s, name))}" for name in changed))
        taken = load(out / "model.pt", "step")["step"] if (out / "model.pt").exists() else 0
        if taken > given.get("steps", math.inf):
            raise ValueError(f"--steps {s.steps}: {out} has taken {taken} already")
        return dataclasses.replace(old, out=str(out), **{k: given[k] for k in MAY_CHANGE if k in given and k != "out"})
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: choose another folder with --out; or, if it holds a run, continue "
                         f"it with --resume or score it with python evaluate.py {out}")
    if s.vae:
        other = read_settings(s.vae)
        must = ("data", "holdout", "holdout_factors", "first_stage")
        for name in (*must, *FIRST_STAGE):
            theirs, ours = getattr(other, name), getattr(s, name)
            if theirs != ours and (name in given or name in must):
                raise ValueError(f"--vae {s.vae} was trained with --{flag(name)} {shown(theirs)}, not {shown(ours)}: "
                                 "give the same here, or train a first stage for this run")
        if load(Path(s.vae) / "vae.pt", "step")["step"] < other.vae_steps:
            raise ValueError(f"--vae {s.vae}: its first stage is not finished; continue that run with --resume")
        s = dataclasses.replace(s, **{name: getattr(other, name) for name in FIRST_STAGE})
    return s


def main(argv=None):
    """Trains and scores one run; returns its folder. Raises ValueError or OSError with one clear sentence."""
    s = settle(*parse(argv))
    check(s)
    device = choose_device(s.device)
    s = dataclasses.replace(s, precision=choose_precision(s.precision, device),
                            compile=choose_compile(s.compile, device))
    parts, out = [build_autoencoder(s), *build_networks(s)], Path(s.out)        # fails before anything is written
    meet(device)                                                    # all have looked at the folder, in settle
    if RANK > 0:
        meet(device)                                                # the first process has unpacked and written, below
    ds = open_dataset(s.data, s.cache, s.dataset)
    rows = torch.from_numpy(hold_out(ds, s.holdout, s.holdout_factors)[0])              # (n,), what training may see
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        if s.vae and not (out / "vae.pt").exists():
            with whole(out / "vae.pt") as temporary:
                shutil.copyfile(Path(s.vae) / "vae.pt", temporary)
        write_json(out / "settings.json", dataclasses.asdict(s))
        print(*(f"{name}: {value}" for name, value in dataclasses.asdict(s).items()), sep="\n")
        print(*(f"{type(p).__name__}: {sum(w.numel() for w in p.parameters()):,} parameters" for p in parts), sep="\n")
        meet(device)
    vae = train_first_stage(s, ds, rows, out, device)
    train_tokens(s, ds, rows, vae, out, device)
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK == 0:
        import evaluate                                             # here, because evaluate.py imports this file
        evaluate.main([str(out), "--device", str(device)])
    return out


if __name__ == "__main__":
    end_with(main)
