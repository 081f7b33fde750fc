"""The diffusion half of EncDiff: noise schedules, forward process, loss, samplers; and what training it leans on.

Implements DDPM (Ho et al. 2020), DDIM (Song et al. 2021) and the cosine schedule (Nichol and Dhariwal
2021), as latent diffusion (Rombach et al. 2022) and EncDiff (method section) use them. They know nothing
about tokens or networks: wherever a network is needed, the caller passes a function
`denoise(x_t, t) -> eps`, for example `lambda x, t: unet(x, t, tokens)`. Left out: learned variances
and other prediction targets than eps, which EncDiff does not use.

Exports: SCHEDULES, LOSSES, beta_schedule, Diffusion, Reconstruction (the paper's ablation without diffusion),
learning_rate, ema_decay, update_ema, choose_device, choose_precision, choose_compile, arithmetic, for_training; for
several processes RANK, PROCESSES (read from the environment when the file is imported), meet; and end_with.

Letters (the papers'):  T steps, t in 0..T-1 (the papers count 1..T: our t is their t - 1), beta_t,
alpha_t = 1 - beta_t, abar_t = product of alpha up to t, x_0 clean latent, x_t noisy latent, eps the
noise in it.  Shapes: B batch, C channels, H, W height and width.
"""
import datetime
import math
import os
import signal
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine")
LOSSES = ("l1", "l2")


def beta_schedule(name, steps=1000, first=0.0015, last=0.0155):
    """The noise variances beta_t of one forward step.

    name: "linear" (linear in sqrt(beta), the name latent diffusion gives it and EncDiff trains with),
    "sqrt_linear" (linear in beta), "sqrt" (square root of the latter) or "cosine" (Nichol and Dhariwal
    2021, equation 17; first and last are not used). Returns (T,) float64 in (0, 1). Raises ValueError.
    """
    if steps < 1:
        raise ValueError(f"a noise schedule needs at least 1 step, not {steps}")
    if name == "linear":
        return torch.linspace(first ** 0.5, last ** 0.5, steps, dtype=torch.float64) ** 2
    if name == "sqrt_linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if name == "sqrt":
        return torch.linspace(first, last, steps, dtype=torch.float64) ** 0.5
    if name == "cosine":
        s = 0.008                                                   # keeps beta_0 away from zero
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2      # up to a factor that cancels below
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown noise schedule {name!r}: choose one of {', '.join(SCHEDULES)}")


class Diffusion(nn.Module):
    """Forward process, loss and samplers for one noise schedule.

    A module only so that its tables move with .to(device); it has no parameters, and its buffers are
    left out of checkpoints because `name` and `steps` rebuild them. Every table is computed in float64
    and kept in float32.
    """

    def __init__(self, name="linear", steps=1000):
        super().__init__()
        beta = beta_schedule(name, steps)
        alpha = 1 - beta
        abar = alpha.cumprod(0)
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        self.steps = steps
        tables = {
            # q(x_t | x_0)
            "abar": abar,                                            # \bar\alpha_t
            "sqrt_abar": abar.sqrt(),                                # \sqrt{\bar\alpha_t}
            "sqrt_1m_abar": (1 - abar).sqrt(),                       # \sqrt{1 - \bar\alpha_t}
            # q(x_{t-1} | x_t, x_0), DDPM equation 7
            "posterior_x0": abar_prev.sqrt() * beta / (1 - abar),           # factor of x_0 in \tilde\mu_t
            "posterior_xt": alpha.sqrt() * (1 - abar_prev) / (1 - abar),    # factor of x_t in \tilde\mu_t
            "posterior_variance": beta * (1 - abar_prev) / (1 - abar),      # \tilde\beta_t
        }
        for symbol, table in tables.items():
            self.register_buffer(symbol, table.float(), persistent=False)

    # ---- forward process -------------------------------------------------------------------------

    def q_sample(self, x_0, t, eps):
        """A draw of q(x_t | x_0) (DDPM equation 4) with the given noise.

        x_0: (B, C, H, W); t: (B,) int64 in 0..T-1; eps: like x_0, standard normal. Returns like x_0.
        """
        return at(self.sqrt_abar, t, x_0) * x_0 + at(self.sqrt_1m_abar, t, x_0) * eps

    def predict_x0(self, x_t, t, eps):
        """q_sample solved for x_0: the clean latent that the noise prediction eps implies.

        x_t, eps: (B, C, H, W); t: (B,) int64 in 0..T-1. Returns like x_t.
        """
        return (x_t - at(self.sqrt_1m_abar, t, x_t) * eps) / at(self.sqrt_abar, t, x_t)

    def posterior(self, x_0, x_t, t):
        """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (DDPM equations 6, 7).

        x_0, x_t: (B, C, H, W); t: (B,) int64 in 0..T-1.
        """
        mean = at(self.posterior_x0, t, x_t) * x_0 + at(self.posterior_xt, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)

    def kl_to_noise(self, mean_square=1.0):
        """KL(q(x_t | x_0) || N(0, I)) per dimension, (T,): what x_t still knows (EncDiff's bottleneck analysis).

        Closed form for two Gaussians; mean_square: E[x_0^2] of the latents, 1 for ours. The paper's figure
        shows twice this for 67.6, as its shares and heights tell; its caption, which names the posterior
        q(x_{t-1} | x_t, x_0), does not fit them.
        """
        return 0.5 * (self.abar * (mean_square - 1) - torch.log(1 - self.abar))

    def draw_t(self, n):
        """Noise levels for n images, (n,) int64, each of 0..T-1 as likely as the others.

        DEVIATION: one t from each of n equal parts of 0..T-1, not n independent ones: less noise in the gradient.
        """
        T, device = self.steps, self.abar.device
        return (torch.arange(n, device=device) * T + torch.randint(T, (n,), device=device)) // n        # (n,)

    def loss(self, denoise, x_0, t, eps, kind="l1"):
        """The simple loss (DDPM equation 14; EncDiff's only loss): how far the predicted noise is off.

        denoise: (x_t, t) -> eps; t: (B,) in 0..T-1; kind: "l1" (as EncDiff's authors train) or "l2"
        (the papers' formula). Returns a scalar.
        """
        return distance(denoise(self.q_sample(x_0, t, eps), t), eps, kind)

    # ---- samplers: x_T -> x_0, both are loops over one step ---------------------------------------

    def ddpm_step(self, x_t, t, eps, noise):
        """x_{t-1} by ancestral sampling (DDPM algorithm 2, line 4): posterior of the predicted x_0.

        x_t, eps (predicted), noise (standard normal): (B, C, H, W); t: (B,) int64 in 0..T-1. Returns like x_t.
        """
        mean, variance = self.posterior(self.predict_x0(x_t, t, eps), x_t, t)
        return mean + variance.sqrt() * noise                       # the variance is 0 at t = 0

    def ddim_step(self, x_t, t, t_next, eps, noise, eta):
        """x at the lower level t_next (-1: clean) from x_t (DDIM equation 12; its sigma, equation 16).

        t, t_next: (B,) int64, t_next < t. eta 0: no noise is added; 1: DDPM's variance. The DDIM paper writes
        alpha_t for what is abar_t here (and in DDPM); its t - 1 is t_next.
        """
        abar = at(self.abar, t, x_t)                                            # (B, 1, 1, 1)
        abar_next = torch.where(view(t_next, x_t) < 0, 1.0, at(self.abar, t_next.clamp(min=0), x_t))
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
        towards_xt = (1 - abar_next - sigma ** 2).clamp(min=0).sqrt() * eps     # "direction pointing to x_t"
        return abar_next.sqrt() * self.predict_x0(x_t, t, eps) + towards_xt + sigma * noise

    @torch.no_grad()
    def ddpm_sample(self, denoise, x_T, generator=None):
        """All T steps of DDPM's algorithm 2. x_T: (B, C, H, W) standard normal. Returns x_0, like x_T."""
        x = x_T
        for step in reversed(range(self.steps)):
            t = x.new_full((len(x),), step, dtype=torch.long)                   # (B,)
            x = self.ddpm_step(x, t, denoise(x, t), normal_like(x, generator))
        return x

    @torch.no_grad()
    def ddim_sample(self, denoise, x_T, steps=50, eta=0.0, generator=None):
        """DDIM over `steps` of the T noise levels. x_T: (B, C, H, W) standard normal. Returns x_0, like x_T.

        eta: 0 (deterministic) to 1 (over all T levels: the same as ddpm_sample).
        DEVIATION: the levels are evenly spaced from 0 up (latent diffusion's from 1), so that the highest, about
        T - T / steps, stays clear of the last: with the cosine schedule abar is so small there that x_0 could not
        be told from the noise prediction. Few steps therefore start low; one step is at level 0.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"DDIM can take 1 to {self.steps} steps of this schedule, not {steps}")
        levels = [i * self.steps // steps for i in reversed(range(steps))]
        x = x_T
        for level, level_next in zip(levels, levels[1:] + [-1]):
            t = x.new_full((len(x),), level, dtype=torch.long)                  # (B,)
            t_next = torch.full_like(t, level_next)                             # (B,)
            noise = normal_like(x, generator) if eta > 0 else torch.zeros_like(x)
            x = self.ddim_step(x, t, t_next, denoise(x, t), noise, eta)
        return x


class Reconstruction(nn.Module):
    """The paper's ablation without diffusion, in Diffusion's place: one step from a fixed input to x_0.

    DEVIATION: the network is the U-Net of all other runs, so that one thing changes; the paper has a plain decoder.

    The network sees the same draw of N(0, I) whatever the picture is, at t = 0, so that all it knows comes from
    the tokens; there is no noise level and nothing to remove. shape: (C, H, W) of the latent.
    """

    def __init__(self, shape):
        super().__init__()
        start = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))      # the same in every run
        self.register_buffer("start", start, persistent=False)                          # (1, C, H, W)

    def draw_t(self, n):
        """There are no noise levels: zeros, (n,) int64."""
        return self.start.new_zeros(n, dtype=torch.long)

    def reconstruct(self, denoise, n):
        """x_0 of n pictures, (n, C, H, W), as the network gives it from the fixed input."""
        return denoise(self.start.repeat(n, 1, 1, 1), self.draw_t(n))

    def loss(self, denoise, x_0, t=None, eps=None, kind="l1"):
        """How far the rebuilt latent is from x_0 (B, C, H, W). t and eps are not looked at. Returns a scalar."""
        return distance(self.reconstruct(denoise, len(x_0)), x_0, kind)

    @torch.no_grad()
    def ddim_sample(self, denoise, x_T, steps=1, eta=0.0, generator=None):
        """x_0 (B, C, H, W), by one step. x_T gives only B; the rest is not looked at."""
        return self.reconstruct(denoise, len(x_T))


def distance(predicted, target, kind):
    """Mean absolute ("l1") or squared ("l2") difference, a scalar."""
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}: choose one of {', '.join(LOSSES)}")
    return F.l1_loss(predicted, target) if kind == "l1" else F.mse_loss(predicted, target)


def view(values, like):
    """(B,) -> (B, 1, 1, 1): as many trailing ones as `like` (B, ...) has further dimensions."""
    return values.view(-1, *[1] * (like.dim() - 1))


def at(table, t, like):
    """The table's (T,) entries at t (B,), shaped to be multiplied with `like` (B, ...)."""
    return view(table[t], like)


def normal_like(x, generator=None):
    """Standard normal noise of x's shape; `generator` must live on x's device."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


# ---- what training leans on ------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup, decay):
    """Linear warm-up to `peak` over `warmup` steps; "cosine": times a half cosine from 1 at step 0 to 0 at `steps`."""
    rate = peak * min(1.0, (step + 1) / max(1, warmup))
    return rate * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))) if decay == "cosine" else rate


def ema_decay(n, limit=0.9999):
    """Decay of the moving average at its n-th update, n = 1, 2, ..: a short memory early, `limit` later.

    As in latent diffusion's code, which EncDiff's authors train with.
    """
    return min(limit, (1 + n) / (10 + n))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model for every parameter; buffers are copied. In place."""
    averages, weights = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)


# torchrun starts a script several times and tells each process which of how many it is; started alone, it is 0 of 1.
RANK, PROCESSES = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def choose_device(name):
    """"auto" or a name -> torch.device, under torchrun a GPU for each process; ValueError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and PROCESSES == 1              # gradients cannot be exchanged there
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and PROCESSES > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"                     # one GPU a process
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).split("\n")[0][:80]
        fewer = ", or fewer processes: there may not be as many GPUs" if PROCESSES > 1 else ""
        raise ValueError(f"--device {name} cannot be used here ({why}): try cpu{fewer}") from None
    return torch.device(name)


def choose_precision(name, device):
    """"auto", "bfloat16" or "float32" -> one of the latter two; ValueError when the device cannot do it."""
    if name == "bfloat16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--precision bfloat16 works on CPUs and CUDA GPUs, not on {device.type}")
    if name != "auto":
        return name
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8   # older GPUs only emulate it
    return "bfloat16" if fast else "float32"


def choose_compile(name, device):
    """"no" or "yes", as it was; ValueError when torch.compile does not work here (tried on one number)."""
    if name == "yes":
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=device))
        except Exception as error:                                  # many kinds: no C++ compiler, no Triton, no support
            why = str(error).split("\n")[0][:80]
            raise ValueError(f"--compile yes does not work on this machine ({why}): give --compile no") from None
    return name


def arithmetic(precision, device):
    """The context in which networks compute in "bfloat16" (their matrix products, that is) or in "float32"."""
    half = precision == "bfloat16"
    return torch.autocast(device.type if half else "cpu", torch.bfloat16, enabled=half)


def meet(device):
    """Waits until all processes of torchrun are here; the first call connects them (gloo on CPUs, nccl on GPUs)."""
    if PROCESSES > 1 and not dist.is_initialized():
        signal.signal(signal.SIGTERM, stop)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        wait = datetime.timedelta(days=1)                           # while the first process unpacks a large file
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    if PROCESSES > 1:
        dist.barrier()


class Ended(BaseException):
    """Another process has ended; no Exception, so that nobody takes it for a damaged file or a full disk."""


def stop(*_):
    """What torchrun asks of the other processes when one has ended."""
    raise Ended


def for_training(module, compiled="no"):
    """What a training loop calls for `module`: itself, compiled ("yes") or not; in several processes, its wrapper.

    The wrapper's gradients are means over the processes. Batch norm sees a process's own share of the batch only, and
    the running statistics that are kept are the first process's.
    """
    module = torch.compile(module) if compiled == "yes" else module
    return nn.parallel.DistributedDataParallel(module) if PROCESSES > 1 else module


def end_with(main):
    """Runs main() for the command line: what goes wrong ends it with one sentence and exit code 2."""
    try:
        try:
            return main()
        finally:
            if PROCESSES > 1:                                       # from here on, to be told to stop is no news
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (ValueError, OSError) as error:
        sentence = str(error)
    except (Ended, MemoryError, RuntimeError) as error:
        if isinstance(error, (Ended, dist.DistError)) or "onnection" in str(error):         # as nccl and gloo report it
            sentence = "a process of this run has ended (see its message): go on from the last checkpoint with --resume"
        elif isinstance(error, MemoryError) or "out of memory" in str(error) or "CPUAllocator" in str(error):
            sentence = "too little memory: a smaller --vae-batch-size or --batch-size, or --accumulate 2, needs less"
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted: a training run goes on from its last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
