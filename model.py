# SPDX-License-Identifier: MIT
"""The denoising U-Net of EncDiff, eps_theta(x_t, t, S): cross attention reads the tokens S.

The U-Net of latent diffusion (Rombach et al. 2022, section 3.3) with the defaults of the authors'
code for Shapes3D, 37.47 M parameters. Two ablations: `conditioning="adagn"`, without cross
attention, and `Decoder`, without diffusion.

Letters: B batch, Z, h, w channels, height and width of the latent, C, H, W those of a feature map,
L = H * W positions, N concept tokens, D token dimension, M length of a context (L or N), d channels
per head, E of the time embedding.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CONDITIONINGS = ("cross-attention", "adagn")


# ---- blocks ----

def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of t at geometrically spaced frequencies (latent diffusion's code).

    t: (B,) int64 in 0..T-1; dim: even. Returns (B, dim) float32 in [-1, 1].
    """
    half = dim // 2
    i = torch.arange(half, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / half)
    angles = t[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Attention(nn.Module):
    """Multi-head attention of positions x to a context: x itself, or the concept tokens.

    softmax(Q K^T / sqrt(d)) V, Rombach et al. 2022, section 3.3.
    """

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, attn_maps: list | None = None) -> Tensor:
        """x: (B, L, C); context: (B, M, context_dim). Returns (B, L, C).

        attn_maps: a list that receives the probabilities (B, heads, L, M), or None.
        """
        q = self.split_heads(self.to_q(x))        # (B, heads, L, d)
        k = self.split_heads(self.to_k(context))  # (B, heads, M, d)
        v = self.split_heads(self.to_v(context))  # (B, heads, M, d)
        if attn_maps is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # the same, written out
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, L, M)
            probabilities = scores.softmax(dim=-1)
            out = probabilities @ v                                    # (B, heads, L, d)
            attn_maps.append(probabilities)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): a projection to 4 times the width, times GELU of another."""

    def __init__(self, channels: int):
        super().__init__()
        self.value = nn.Linear(channels, 4 * channels)
        self.gate = nn.Linear(channels, 4 * channels)
        self.project_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.value(x) * F.gelu(self.gate(x))  # (B, L, C) -> (B, L, 4C)
        return self.project_out(x)


class TransformerBlock(nn.Module):
    """Self attention, cross attention to the tokens, feed-forward; each with norm and residual.

    token_dim: D; None leaves the cross attention out.
    """

    def __init__(self, channels: int, token_dim: int | None, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, heads)
        self.cross_attention = None
        if token_dim is not None:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, token_dim, heads)
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.project_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project_out.weight)  # the identity at first
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x: Tensor, tokens: Tensor, attn_maps: list | None = None) -> Tensor:
        """x: (B, C, H, W); tokens: (B, N, D); attn_maps: see Attention. Returns (B, C, H, W)."""
        H, W = x.shape[2:]
        h = self.project_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)            # (B, L, C)
        normed = self.norm_self(h)
        h = h + self.self_attention(normed, context=normed)
        if self.cross_attention is not None:
            normed = self.norm_cross(h)
            h = h + self.cross_attention(normed, tokens, attn_maps)
        h = h + self.feed_forward(self.norm_feed_forward(h))
        h = h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + self.project_out(h)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual; the time embedding scales and shifts between them.

    resample: "down" halves, "up" doubles height and width, None keeps them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        emb_dim: int,  # E
        groups: int,
        resample: str | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm_1 = nn.GroupNorm(groups, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.to_scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm_2 = nn.GroupNorm(groups, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity()
        if in_channels != channels:
            self.skip = nn.Conv2d(in_channels, channels, 1)
        nn.init.zeros_(self.conv_2.weight)  # only the skip at first
        nn.init.zeros_(self.conv_2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C_in, H, W); emb: (B, E), after its SiLU. Returns (B, C, H', W'), resampled."""
        h = self.resize(F.silu(self.norm_1(x)))     # (B, C_in, H', W')
        h = self.conv_1(h)                          # (B, C, H', W')
        scale_shift = self.to_scale_shift(emb)[:, :, None, None]
        scale, shift = scale_shift.chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.norm_2(h) * (1 + scale) + shift
        h = self.conv_2(F.silu(h))
        return self.skip(self.resize(x)) + h

    def resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class UNetBlock(nn.Module):
    """One step of the way down or up: a residual block, and a transformer block if it attends."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        emb_dim: int,  # E
        groups: int,
        token_dim: int | None,
        heads: int,
        resample: str | None = None,
        attends: bool = False,
    ):
        super().__init__()
        self.res_block = ResBlock(in_channels, channels, emb_dim, groups, resample)
        self.transformer = None
        if attends:
            self.transformer = TransformerBlock(channels, token_dim, heads, groups)

    def forward(
        self, x: Tensor, emb: Tensor, tokens: Tensor, attn_maps: list | None = None
    ) -> Tensor:
        """x: (B, C_in, H, W); emb: (B, E); tokens: (B, N, D). Returns (B, C, H', W'), resampled."""
        x = self.res_block(x, emb)
        if self.transformer is not None:
            x = self.transformer(x, tokens, attn_maps)
        return x


# ---- networks ----

class UNet(nn.Module):
    """eps_theta(x_t, t, S): predicts the noise in x_t from x_t, t and the concept tokens S.

    The defaults, for latents (B, 3, 16, 16):

        level     feature map     transformer blocks
        0         64 x 16 x 16    yes
        1         128 x 8 x 8     yes
        2         256 x 4 x 4     yes
        3         256 x 2 x 2     only in the middle

    conditioning: "cross-attention", tokens in any number are keys and values; "adagn" (adaptive
    group norm), the paper's ablation: a small MLP of all N tokens is added to the time embedding.
    """

    def __init__(
        self,
        latent_channels: int = 3,
        channels: int = 64,                           # C_0, a multiple of groups
        multipliers: tuple[int, ...] = (1, 2, 4, 4),  # width of each level / C_0, finest first
        res_blocks: int = 2,                          # per level down; one more per level up
        attention_levels: int = 3,                    # with transformers, from the finest
        heads: int = 8,                               # divides every width
        token_dim: int = 16,                          # D
        n_tokens: int = 20,                           # N, read by "adagn" alone
        groups: int = 32,                             # of the group norms
        conditioning: str = "cross-attention",
    ):
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"{conditioning!r} is none of {CONDITIONINGS}")
        E = 4 * channels
        self.time_mlp = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))
        self.token_mlp = None
        if conditioning == "adagn":
            joined = n_tokens * token_dim
            self.token_mlp = nn.Sequential(nn.Linear(joined, E), nn.SiLU(), nn.Linear(E, E))
            token_dim = None  # no cross attention

        widths = [channels * m for m in multipliers]
        sizes = dict(emb_dim=E, groups=groups, token_dim=token_dim, heads=heads)
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.down, skip_widths = build_down(channels, widths, res_blocks, attention_levels, sizes)
        self.middle = build_middle(widths[-1], sizes)
        self.up = build_up(widths, res_blocks, attention_levels, sizes, skip_widths)
        self.norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # the first prediction is 0
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, x_t: Tensor, t: Tensor, tokens: Tensor, attn_maps: list | None = None
    ) -> Tensor:
        """The predicted noise eps, like x_t.

        x_t: (B, Z, h, w), h and w divisible by 2^(levels - 1); t: (B,) int64 in 0..T-1; tokens:
        (B, N, D). attn_maps: a list that receives the map (B, heads, L, N) of each cross attention.
        """
        emb = timestep_embedding(t, self.conv_in.out_channels)  # (B, C_0)
        emb = self.time_mlp(emb.type_as(x_t))           # (B, E)
        if self.token_mlp is not None:
            emb = emb + self.token_mlp(tokens.flatten(1))  # (B, N*D) -> (B, E)
        emb = F.silu(emb)
        h = self.conv_in(x_t)                           # (B, C_0, h, w)
        skips = [h]
        for block in self.down:
            h = block(h, emb, tokens, attn_maps)        # (B, C, H, W)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb, tokens, attn_maps)
        for block in self.up:
            if block.res_block.resample is None:        # resampling takes no skip
                h = torch.cat([h, skips.pop()], dim=1)  # (B, C + C_skip, H, W)
            h = block(h, emb, tokens, attn_maps)
        return self.conv_out(F.silu(self.norm_out(h)))


def build_down(c, widths, res_blocks, attention_levels, sizes):
    """Blocks, finest level first, and the width of each skip. sizes: see UNetBlock."""
    blocks = nn.ModuleList()
    skip_widths = [c]
    for level, width in enumerate(widths):
        attends = level < attention_levels
        for _ in range(res_blocks):
            blocks.append(UNetBlock(c, width, **sizes, attends=attends))
            c = width
            skip_widths.append(c)
        if level < len(widths) - 1:
            blocks.append(UNetBlock(c, c, **sizes, resample="down"))
            skip_widths.append(c)
    return blocks, skip_widths


def build_middle(c, sizes):
    """Two blocks, the first of which always attends."""
    first = UNetBlock(c, c, **sizes, attends=True)
    return nn.ModuleList([first, UNetBlock(c, c, **sizes)])


def build_up(widths, res_blocks, attention_levels, sizes, skip_widths):
    """Blocks, coarsest level first; they take no skips if skip_widths is empty."""
    blocks = nn.ModuleList()
    c = widths[-1]
    for level in reversed(range(len(widths))):
        attends = level < attention_levels
        for _ in range(res_blocks + 1):
            skip = skip_widths.pop() if skip_widths else 0
            blocks.append(UNetBlock(c + skip, widths[level], **sizes, attends=attends))
            c = widths[level]
        if level > 0:
            blocks.append(UNetBlock(c, c, **sizes, resample="up"))
    return blocks


class Decoder(nn.Module):
    """The decoder half of the U-Net: x_0 from the tokens alone, in one step (EncDiff, table 3).

    Middle and up path without skips, from a learned constant at the coarsest level. Trained like
    the U-Net, but what it predicts is x_0, not eps.
    latent_size: height and width of x_0; other arguments as in UNet.
    """

    def __init__(
        self,
        latent_size: int,
        latent_channels: int,
        channels: int,
        multipliers: tuple[int, ...],
        res_blocks: int,
        attention_levels: int,
        heads: int,
        token_dim: int,
        groups: int,
    ):
        super().__init__()
        self.emb_dim = E = 4 * channels
        widths = [channels * m for m in multipliers]
        sizes = dict(emb_dim=E, groups=groups, token_dim=token_dim, heads=heads)
        side = latent_size // 2 ** (len(widths) - 1)
        self.start = nn.Parameter(torch.randn(1, widths[-1], side, side))
        self.middle = build_middle(widths[-1], sizes)
        self.up = build_up(widths, res_blocks, attention_levels, sizes, skip_widths=[])
        self.norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], latent_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """x_0 (B, Z, h, w) of tokens (B, N, D); x_t and t are not read."""
        emb = tokens.new_zeros(len(tokens), self.emb_dim)  # no t: scale, shift are biases alone
        h = self.start.expand(len(tokens), -1, -1, -1)     # (B, C, H, W)
        for block in [*self.middle, *self.up]:
            h = block(h, emb, tokens)
        return self.conv_out(F.silu(self.norm_out(h)))
