"""Trains EncDiff: first the autoencoder, then token encoder and U-Net together; then scores them.

    python train.py [--preset tiny] [--data 3dshapes.h5]
    python train.py --resume runs/world-small-0     # go on after an interruption
    torchrun --nproc_per_node 2 train.py            # each process its share of every batch

Every field of Config is a flag. A run folder holds run.json (configuration, command, machine),
log.jsonl, vae.pt (first stage), model.pt (token encoder, U-Net and its average).

Letters: B batch, N tokens, D token dimension, Z, h, w channels, height and width of the latent.
"""
import argparse
import copy
import dataclasses
import inspect
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Dataset, InputError, atomic, open_dataset
from diffusion import SCHEDULES, Diffusion
from encoder import ENCODERS, ConceptEncoder
from model import CONDITIONINGS, Decoder, UNet
from vae import FIRST_STAGES, Autoencoder


# ---- configuration ----

@dataclasses.dataclass
class Config:
    """Defaults: preset small. The authors' values: PRESETS["paper"], below."""
    preset: str = "small"           # tiny, small or paper
    # the run
    data: str = ""                  # data file or folder of images; empty: the built-in world
    cache: str = ""                 # folder for unpacked data; empty: beside it
    out: str = ""                   # empty: runs/<data>-<preset>-<seed>
    vae: str = ""                   # another run, whose first stage is used
    seed: int = 0                   # of weights, batches and noise
    device: str = "auto"            # cpu, cuda, mps, or the best there is
    precision: str = "float32"      # float32 or bfloat16, of token encoder and U-Net
    compile: bool = False           # torch.compile the networks
    cuda_graphs: bool = False       # record token encoder and U-Net, on one GPU
    score_images: int = 50000       # images to encode for the scores; 0: all
    # first stage
    first_stage: str = "kl"         # kl or vq
    vae_channels: int = 16          # width of its finest level
    vae_multipliers: tuple = (1, 2, 4)  # width of each level / vae_channels
    vae_res_blocks: int = 1
    vae_groups: int = 8
    vae_patch: int = 2              # side of the squares images are cut into
    latent_channels: int = 4        # Z
    vae_steps: int = 3500
    vae_batch_size: int = 16
    vae_lr: float = 5e-3            # highest, of its Adam
    vae_betas: tuple = (0.9, 0.99)
    # token encoder
    encoder: str = "scalar"         # scalar, vector or slot
    tokens: int = 20                # N
    token_dim: int = 16             # D
    encoder_width: int = 64         # channels of its trunk
    encoder_strides: tuple = (4, 2, 2)  # 2 or 4 each
    # U-Net
    channels: int = 32              # width of its finest level
    multipliers: tuple = (1, 2)     # width of each level / channels
    res_blocks: int = 1             # residual blocks a level, one more on the way up
    groups: int = 8
    attention_levels: int = 2       # with transformer blocks, from the finest
    heads: int = 2
    conditioning: str = "cross-attention"   # or adagn, an ablation
    # diffusion
    schedule: str = "linear"        # linear (in sqrt(beta)), sqrt_linear, sqrt or cosine
    loss: str = "l1"                # l1 or l2, of the predicted noise
    stratified: bool = True         # one t in each of B parts of 0..T-1
    t_power: float = 1.0            # t = T u^p, u uniform; above 1: mostly low noise
    objective: str = "diffusion"    # or reconstruct, reconstruct-unet: x_0 from tokens alone
    # optimisation of encoder and U-Net
    steps: int = 10500
    batch_size: int = 32            # B
    lr: float = 3e-3                # highest, of AdamW
    betas: tuple = (0.9, 0.99)
    warmup: int = 300               # steps in which lr rises
    decay: str = "cosine"           # of lr and vae_lr to 0; or none
    clip: float = 1.0               # largest norm of the gradient; 0: any
    ema: float = 0.999              # limit of the decay of the U-Net's average


# DEVIATION: the sizes and constants of tiny and small were chosen by trials on two CPU cores. In
# paper vae_steps and the first stage's warm-up are ours; steps is a rerun's.
PRESETS = {
    "tiny": dict(vae_steps=2000, steps=3000),
    "small": dict(),
    "paper": dict(
        first_stage="vq", vae_channels=32, vae_res_blocks=2, vae_groups=32, vae_patch=1,
        latent_channels=3, vae_steps=10000, vae_batch_size=256, vae_lr=1.15e-3,
        vae_betas=(0.5, 0.9), encoder_width=128, encoder_strides=(2, 2, 2, 2),
        channels=64, multipliers=(1, 2, 4, 4), attention_levels=3, heads=8,
        res_blocks=2, groups=32, stratified=False,
        steps=37500, batch_size=128, lr=2.56e-4, betas=(0.9, 0.999), warmup=10000,
        decay="none", clip=0.0, ema=0.9999, score_images=0,
    ),
}
CHOICES = {
    "preset": PRESETS, "precision": ("float32", "bfloat16"), "first_stage": FIRST_STAGES,
    "encoder": ENCODERS, "conditioning": CONDITIONINGS, "schedule": SCHEDULES,
    "loss": ("l1", "l2"), "objective": ("diffusion", "reconstruct", "reconstruct-unet"),
    "decay": ("cosine", "none"),
}


def parse(argv):
    """The configuration asked for, and whether a run is resumed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=inspect.getsource(Config), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder")
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
            continue
        kind = numbers if field.type is tuple else field.type
        parser.add_argument(flag, type=kind, choices=CHOICES.get(field.name))
    given = vars(parser.parse_args(argv))
    for name in ("data", "cache", "out", "vae", "resume"):
        if given.get(name):
            given[name] = os.path.abspath(os.path.expanduser(given[name]))

    folder = given.pop("resume", None)
    if folder:
        wrong = set(given) - {"steps", "device", "data", "cache", "cuda_graphs"}
        if wrong:
            raise taken("--resume", wrong)
        cfg = config_of(read_run(folder))
        if given.get("data") and not cfg.data:
            raise InputError(f"{folder} is of the built-in world: leave out --data")
        return dataclasses.replace(cfg, out=folder, **given), True
    if given.get("vae"):
        given.update(first_stage_of(given["vae"], given))
    cfg = Config(**{**PRESETS[given.get("preset", "small")], **given})
    if not cfg.out:
        name = Path(cfg.data).stem or "world"
        cfg.out = os.path.abspath(f"runs/{name}-{cfg.preset}-{cfg.seed}")
    return cfg, False


def taken(flag, names):
    """For flags beside one that takes them from a run."""
    names = ", ".join(sorted(names)).replace("_", "-")
    return InputError(f"{flag} takes {names} from the run: leave it out")


def first_stage_of(folder, given):
    """The settings of another run's first stage. InputError if they are given, too."""
    settings = {}
    for name, value in vars(config_of(read_run(folder))).items():
        if name in ("first_stage", "latent_channels") or name.startswith("vae_"):
            settings[name] = value
    wrong = settings.keys() & given.keys()
    if wrong:
        raise taken("--vae", wrong)
    return settings


def numbers(text):
    """'1,2,4' -> (1, 2, 4)"""
    return tuple(json.loads(f"[{text}]"))


def in_range(name, value):
    """Whether a field of Config can have this value."""
    if "betas" in name:
        return len(value) == 2 and min(value) >= 0 and max(value) < 1
    if isinstance(value, tuple):
        return value and all(type(number) is int and number > 0 for number in value)
    may_be_zero = ("seed", "score_images", "attention_levels", "warmup", "clip")
    if value == 0 and name in may_be_zero:
        return True
    return type(value) not in (int, float) or 0 < value < 2**32


def check(cfg):
    """InputError when a number is out of its range or sizes do not fit together."""
    for name, value in vars(cfg).items():
        if not in_range(name, value):
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range")
    if set(cfg.encoder_strides) - {2, 4} or math.prod(cfg.encoder_strides) > 64:
        raise InputError("--encoder-strides are 2 or 4 each, their product 64 at most")
    for width, parts in (
        (cfg.vae_channels, cfg.vae_groups),
        (cfg.channels, cfg.groups),
        (cfg.channels, cfg.heads),
    ):
        if width % parts:
            raise InputError(f"{width} channels cannot be divided into {parts} groups or heads")
    halvings = len(cfg.vae_multipliers) + len(cfg.multipliers) - 2
    if 64 % (cfg.vae_patch * 2**halvings):
        raise InputError(f"64 pixels cannot be cut into patches of {cfg.vae_patch} and then halved "
                         f"{halvings} times")
    if cfg.conditioning == "adagn" and cfg.objective == "reconstruct":
        raise InputError("--objective reconstruct has no --conditioning adagn")


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


def fixed_input(cfg):
    """One x_T, (1, Z, h, w), the same in all runs, for sampling and the ablation without noise."""
    return torch.randn(1, *latent_shape(cfg), generator=torch.Generator().manual_seed(0))


# ---- first stage ----

def train_vae(cfg: Config, ds: Dataset, device: torch.device) -> Autoencoder:
    """Trains the autoencoder (Rombach et al. 2022, section 3.1); returns it, frozen."""
    torch.manual_seed(cfg.seed)
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
    model = wrap(vae, cfg)
    for step in range(start, cfg.vae_steps):
        seed_step(cfg.seed, step)
        images = draw_images(B)             # (B, 3, 64, 64)
        loss, l1 = model(images)
        optimizer.zero_grad()
        loss.backward()
        lr = learning_rate(step, cfg.vae_steps, cfg.vae_lr, warmup=100, decay=cfg.decay)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if step + 1 == cfg.vae_steps:
            # DEVIATION: from 1,024 images; the authors' from the diffusion's first batch
            vae.set_scale(draw_images(1024))
            if processes > 1:
                dist.broadcast(vae.scale, src=0)
        if log.add(l1):
            save_checkpoint(checkpoint, cfg, step + 1, log.seconds(), parts)
    return vae.eval().requires_grad_(False)


# ---- tokens and U-Net ----

def train_tokens(cfg: Config, ds: Dataset, vae: Autoencoder, device: torch.device):
    """DDPM's algorithm 1 with the tokens as the condition (EncDiff, method section)."""
    torch.manual_seed(cfg.seed + 1)
    diffusion = Diffusion(cfg.schedule).to(device)
    encoder = build_encoder(cfg).to(device, memory_format=torch.channels_last)
    unet = build_unet(cfg).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(unet).requires_grad_(False)  # of the U-Net alone, as the authors have it
    if cfg.cuda_graphs:  # after ema's copy; before restore: it updates batch norm
        record_graphs(encoder, unet, cfg)
    fused = device.type != "mps"
    params = [*encoder.parameters(), *unet.parameters()]
    optimizer = torch.optim.AdamW(params, cfg.lr, cfg.betas, weight_decay=0.01, fused=fused)
    checkpoint = Path(cfg.out) / "model.pt"
    parts = dict(encoder=encoder, unet=unet, ema=ema, optimizer=optimizer)
    start, seconds = restore(checkpoint, parts)
    log = Log(cfg, "tokens", start, cfg.steps, seconds)
    B, T = cfg.batch_size // ranks()[1], diffusion.steps
    constant = fixed_input(cfg).to(device)
    loss_function = F.l1_loss if cfg.loss == "l1" else F.mse_loss
    encoder, unet = wrap(encoder, cfg), wrap(unet, cfg)

    for step in range(start, cfg.steps):
        seed_step(cfg.seed, step)
        images = move(ds.images(torch.randint(len(ds), (B,))), device)  # (B, 3, 64, 64)
        x_0 = vae.encode(images)            # (B, Z, h, w)
        u = torch.rand(B)
        if cfg.stratified:                  # DEVIATION: one t in each of B parts
            u = (torch.arange(B) + u) / B
        t = move((T * u**cfg.t_power).long().clamp(max=T - 1), device)  # (B,)
        eps = torch.randn_like(x_0)
        x_t = diffusion.q_sample(x_0, t, eps)  # (B, Z, h, w)
        target = eps
        if cfg.objective != "diffusion":    # ablations: x_0 from tokens alone
            x_t, t, target = constant.expand_as(x_0), torch.zeros_like(t), x_0

        with torch.autocast(device.type, torch.bfloat16, cfg.precision == "bfloat16"):
            tokens = encoder(images)        # (B, N, D)
            eps_pred = unet(x_t, t, tokens)  # (B, Z, h, w)
            loss = loss_function(eps_pred, target)
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
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def seed_step(seed, step):
    """Each step and process has a seed of its own: a resumed run draws what it would have."""
    rank, processes = ranks()
    torch.manual_seed(seed * 10**9 + step * processes + rank)


# ---- devices and processes ----

def choose_device(name: str) -> torch.device:
    """The device of this name, or the best for "auto"; under torchrun a GPU a process."""
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True
    }
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available.get(name):
        raise InputError(f"--device {name} is not available here: try cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


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


def wrap(module, cfg):
    """Compiled if asked for; with several processes, gradients are averaged over them."""
    if cfg.compile:
        module = torch.compile(module)
    if ranks()[1] > 1:
        module = torch.nn.parallel.DistributedDataParallel(module)
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
SAVE_EVERY = 60  # seconds between two checkpoints


class Log:
    """One stage's lines in log.jsonl (after a resume some come twice), and when to save."""

    def __init__(self, cfg, stage, start, steps, seconds):
        self.path = Path(cfg.out) / "log.jsonl"
        self.stage, self.step, self.steps = stage, start, steps
        self.losses = []  # since the last line
        self.saved = time.monotonic()
        self.started = self.saved - seconds  # as if it had never stopped
        self.is_first = ranks()[0] == 0  # the process that writes
        self.bar = tqdm(total=steps, initial=start, desc=stage, disable=not self.is_first)

    def add(self, loss):
        """Counts a step with its loss; returns whether to save now.

        A line has the mean loss since the last. InputError when it has diverged.
        """
        self.step += 1
        self.losses.append(loss.detach())
        if self.step % LOG_EVERY and self.step < self.steps:
            return False
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise InputError(f"the {self.stage} loss diverged before step {self.step}: start again "
                             "with a lower learning rate")
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update(len(self.losses))
        self.losses = []
        if not self.is_first:
            return False
        line = dict(stage=self.stage, step=self.step, loss=round(loss, 6), seconds=self.seconds())
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if time.monotonic() - self.saved < SAVE_EVERY and self.step < self.steps:
            return False
        self.saved = time.monotonic()
        return True

    def seconds(self):
        """How long the stage has been running, earlier sessions included."""
        return round(time.monotonic() - self.started, 2)


def save_checkpoint(path, cfg, step, seconds, parts):
    """Writes plain types alone, so that torch.load(.., weights_only=True) reads them."""
    contents = dict(config=vars(cfg), step=step, seconds=seconds)
    contents["peak_memory_mib"] = peak_memory()
    for name, part in parts.items():
        contents[name] = part.state_dict()
    with atomic(path) as temporary:
        torch.save(contents, temporary)


def restore(path, parts):
    """Puts a checkpoint, if there is one, into the parts; returns its steps and seconds."""
    if not path.exists():
        return 0, 0.0
    contents = load_checkpoint(path, **parts)
    return contents["step"], contents["seconds"]


def load_checkpoint(path: str | Path, **parts) -> dict:
    """A checkpoint's contents; the states named in `parts` are put into these. InputError."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: has this run been trained?") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged: remove the .pt files and --resume") from error
    try:
        for name, part in parts.items():
            part.load_state_dict(contents[name])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is of another configuration than run.json beside it") from error
    return contents


def write_json(path, contents):
    """Whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n")


def read_run(folder: str | Path) -> dict:
    """What run.json of a run folder says. InputError."""
    path = Path(folder) / "run.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder} holds no run: run.json is missing or damaged") from None


def config_of(run: dict) -> Config:
    """The configuration in what read_run returned. InputError when another version wrote it."""
    config = {}
    for name, value in run["config"].items():
        config[name] = tuple(value) if isinstance(value, list) else value
    try:
        return Config(**config)
    except TypeError as error:
        raise InputError(f"this run is of another version of the code ({error})") from error


def machine(device):
    """What results depend on beside the configuration."""
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty'
    status, commit = subprocess.getstatusoutput(git)
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
    return dict(
        command=" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit="unknown" if status else commit,
        torch=torch.__version__,
        processor=processor,
        threads=torch.get_num_threads(),
        processes=ranks()[1],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def peak_memory():
    """In MiB: of the process (not on Windows) and of its GPU."""
    peak = {}
    if sys.platform != "win32":
        import resource
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    if torch.cuda.is_initialized():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


# ---- the run ----

def prepare(cfg, resume, device):
    """Makes the run folder or checks the one to go on with; opens the data. InputError."""
    folder = Path(cfg.out)
    if not resume and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use: go on with --resume {folder}, or choose another "
                         "--out")
    ds = open_dataset(cfg.data, cfg.cache)
    run = read_run(folder) if resume else {}
    data = dict(name=ds.name, images=len(ds))
    images = run.get("data", data)["images"]
    if images != len(ds):
        raise InputError(f"{folder} was trained on {images} images, {ds.name} has {len(ds)}")
    if resume and (folder / "model.pt").exists():
        step = load_checkpoint(folder / "model.pt")["step"]
        if step > cfg.steps:
            raise InputError(f"{folder} has had {step} steps: give no fewer --steps")
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.vae and not resume:
        load_checkpoint(Path(cfg.vae) / "vae.pt")  # InputError
        shutil.copy(Path(cfg.vae) / "vae.pt", folder)
    run["config"] = vars(cfg)
    run["data"] = data
    run.setdefault("machine", machine(device))  # where it was started
    write_json(folder / "run.json", run)
    print(f"{folder}: {ds.name}, preset {cfg.preset}")
    return ds


def main(argv: list[str] | None = None) -> str:
    """Trains a run and returns its folder. InputError."""
    cfg, resume = parse(argv)
    check(cfg)
    device = choose_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # torchrun started this process
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = ranks()
    if cfg.batch_size % processes or cfg.vae_batch_size % processes:
        raise InputError(f"{processes} processes cannot share batches of {cfg.batch_size} and "
                         f"{cfg.vae_batch_size} evenly")
    if cfg.cuda_graphs and (device.type != "cuda" or processes > 1 or cfg.compile):
        raise InputError("CUDA graphs need one GPU and no --compile: give --no-cuda-graphs")
    if rank == 0:
        ds = prepare(cfg, resume, device)
    if processes > 1:
        dist.barrier()
    if rank > 0:
        ds = open_dataset(cfg.data, cfg.cache)
    vae = train_vae(cfg, ds, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default
    train_tokens(cfg, ds, vae, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    return cfg.out


if __name__ == "__main__":
    try:
        folder = main()
        if os.environ.get("RANK", "0") == "0":
            import evaluate
            evaluate.main([folder])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
