# SPDX-License-Identifier: MIT
"""The diffusion half of EncDiff: noise schedules, the forward process and two samplers.

DDPM (Ho et al. 2020), DDIM (Song et al. 2021) and the cosine schedule (Nichol and Dhariwal 2021) as
latent diffusion (Rombach et al. 2022) and EncDiff (method section) use them. The network comes as a
function `denoise(x_t, t) -> eps`, for example `lambda x_t, t: unet(x_t, t, tokens)`.

Letters (the papers'): T steps; t in 0..T-1 (the papers count 1..T: our t is their t - 1); beta_t;
alpha_t = 1 - beta_t; abar_t = product of alpha up to t; x_0 clean latent, in our count at t = -1;
x_t noisy latent, eps the noise in it; x_T pure noise, where sampling starts. Shapes: B batch, Z, h,
w channels, height and width of the latent.
"""
import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

SCHEDULES = ("linear", "sqrt_linear", "sqrt", "cosine")


def beta_schedule(name: str, steps: int = 1000) -> Tensor:
    """The noise variances beta_t of the forward process, (T,) float64 in (0, 1).

    name, as in latent diffusion's code: "linear" (in sqrt(beta)!), "sqrt_linear" (linear in beta),
    "sqrt" (square root of that) or "cosine" (Nichol and Dhariwal 2021, equation 17). The first
    three, with the authors' range, are made for T = 1000: with few steps x_T still shows x_0.
    """
    first, last = 0.0015, 0.0155
    beta = torch.linspace(first, last, steps, dtype=torch.float64)
    if name == "linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if name == "sqrt_linear":
        return beta
    if name == "sqrt":
        return beta.sqrt()
    if name == "cosine":
        s = 0.008  # keeps beta_0 away from zero
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2  # abar_t = f[t + 1] / f[0]
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"{name!r} is none of {SCHEDULES}")


class Diffusion(nn.Module):
    """The forward process and the samplers of one noise schedule.

    A module so that its tables move with .to(device); they are computed in float64, kept in float32
    and left out of checkpoints.

    In all methods: x_0, x_t, x_T, eps (drawn for q_sample, else predicted) and noise (fresh, of
    N(0, I)) are (B, Z, h, w) and what is returned has their type; t is (B,) int64 in 0..T-1.
    """

    def __init__(self, name: str = "linear", steps: int = 1000):
        super().__init__()
        self.steps = steps  # T
        beta = beta_schedule(name, steps)
        alpha = 1 - beta
        abar = alpha.cumprod(0)
        abar_prev = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        tables = {
            # q(x_t | x_0), DDPM equation 4
            "abar": abar,                       # \bar\alpha_t
            "sqrt_abar": abar.sqrt(),           # \sqrt{\bar\alpha_t}
            "sqrt_1m_abar": (1 - abar).sqrt(),  # \sqrt{1 - \bar\alpha_t}
            # q(x_{t-1} | x_t, x_0), DDPM equation 7
            "mean_x0": abar_prev.sqrt() * beta / (1 - abar),         # x_0's share of \tilde\mu_t
            "mean_xt": alpha.sqrt() * (1 - abar_prev) / (1 - abar),  # x_t's share of \tilde\mu_t
            "variance": beta * (1 - abar_prev) / (1 - abar),         # \tilde\beta_t
        }
        for symbol, table in tables.items():
            self.register_buffer(symbol, table.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves the tables, but keeps them float32: in bfloat16 the first abar_t would be 1."""
        tables = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for symbol, table in tables.items():
            setattr(self, symbol, table.to(getattr(self, symbol).device))
        return self

    # ---- forward process ----

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t, a draw of q(x_t | x_0) with the given noise eps (DDPM equation 4)."""
        signal = extract(self.sqrt_abar, t, x_0) * x_0
        return (signal + extract(self.sqrt_1m_abar, t, x_0) * eps).type_as(x_0)

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """q_sample solved for x_0: the clean latent that a noise prediction implies."""
        signal = x_t - extract(self.sqrt_1m_abar, t, x_t) * eps
        return (signal / extract(self.sqrt_abar, t, x_t)).type_as(x_t)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, Z, h, w) and variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
        mean = extract(self.mean_x0, t, x_t) * x_0 + extract(self.mean_xt, t, x_t) * x_t
        return mean.type_as(x_t), extract(self.variance, t, x_t).type_as(x_t)

    def kl_to_noise(self, mean_square: float = 1.0) -> Tensor:
        """KL(q(x_t | x_0) || N(0, I)) per dimension, (T,): the width of EncDiff's bottleneck.

        mean_square: E[x_0^2] of the latents, 1 for those of zero mean and unit deviation. The
        paper's curves (figure 2 b) agree with 2 x this for E[x_0^2] = 67.6, as far as they can be
        read; its caption names the posterior, which does not match.
        """
        return 0.5 * (self.abar * (mean_square - 1) - 2 * torch.log(self.sqrt_1m_abar))

    # ---- samplers: x_T -> x_0, both are loops over one step ----

    def ddpm_step(self, x_t: Tensor, t: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        r"""x_{t-1}: DDPM algorithm 2 (equation 11 by way of x_0) with sigma_t^2 = \tilde\beta_t."""
        x_0 = self.predict_x0(x_t, t, eps)
        mean, variance = self.posterior(x_0, x_t, t)
        return mean + variance.sqrt() * noise  # the variance is 0 at t = 0

    def ddim_step(
        self, x_t: Tensor, t: Tensor, t_prev: Tensor, eps: Tensor, noise: Tensor, eta: float
    ) -> Tensor:
        """x at the lower noise level t_prev from x_t (DDIM equation 12; sigma, equation 16).

        t_prev: (B,) int64, t_prev < t, -1 is clean. eta: 0 adds no noise, 1 has DDPM's variance.
        DDIM's paper writes alpha_t for our abar_t.
        """
        abar = extract(self.abar, t, x_t)  # (B, 1, 1, 1)
        abar_prev = extract(self.abar, t_prev.clamp(min=0), x_t)
        abar_prev = torch.where(t_prev.view_as(abar) < 0, 1.0, abar_prev)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        x_0 = self.predict_x0(x_t, t, eps)
        towards_x_t = (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps
        return (abar_prev.sqrt() * x_0 + towards_x_t + sigma * noise).type_as(x_t)

    @torch.no_grad()
    def ddpm_sample(self, denoise: Callable, x_T: Tensor) -> Tensor:
        """All T steps of DDPM's algorithm 2, from x_T ~ N(0, I) to x_0."""
        x_t = x_T
        for step in reversed(range(self.steps)):
            t = torch.full((len(x_t),), step, device=x_t.device)
            noise = torch.randn_like(x_t)
            x_t = self.ddpm_step(x_t, t, denoise(x_t, t), noise)
        return x_t

    @torch.no_grad()
    def ddim_sample(
        self,
        denoise: Callable,
        x_T: Tensor,       # N(0, I)
        steps: int = 50,   # 10..T; fewer would start far below T
        eta: float = 0.0,  # 0 (deterministic) .. 1 (over all T: the same as DDPM)
    ) -> Tensor:
        """DDIM over `steps` evenly spaced noise levels t = 0, T / steps, .. Returns x_0.

        DEVIATION: latent diffusion's levels are higher by one. With steps < T neither theirs nor
        ours include T - 1, where cosine's abar is too small to tell x_0 from eps.
        """
        if not 10 <= steps <= self.steps:
            raise ValueError(f"DDIM takes 10 to {self.steps} steps, not {steps}")
        levels = [i * self.steps // steps for i in range(steps)]
        x_t = x_T
        for i in reversed(range(steps)):
            t = torch.full((len(x_t),), levels[i], device=x_t.device)
            t_prev = torch.full_like(t, levels[i - 1] if i > 0 else -1)
            noise = torch.randn_like(x_t)
            x_t = self.ddim_step(x_t, t, t_prev, denoise(x_t, t), noise, eta)
        return x_t


def extract(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The table's entries at t: (T,) and (B,) -> (B, 1, 1, 1), to multiply `like` (B, Z, h, w)."""
    return table[t].view(-1, *[1] * (like.dim() - 1))
