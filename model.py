"""The denoising U-Net of EncDiff: eps_theta(x_t, t, S), with the concept tokens S read by cross attention.

Implements the U-Net of latent diffusion (Rombach et al. 2022, section 3.3) in the form EncDiff uses:
residual blocks with scale-and-shift time conditioning, and transformer blocks (self attention, cross
attention to the tokens, gated feed-forward) at the finer levels. The tokens enter through cross
attention alone; for the paper's ablation without it, through the time embedding alone ("adagn").
With the defaults, the paper's Shapes3D setting, it has 37.47 M parameters.

Read from top to bottom: time embedding, attention, transformer block, residual block, U-Net, two ways to look
into a trained one.
Exports: UNet, CONDITIONINGS, attention_pictures, rise_of_loss. Left out of the original: class labels, dropout,
gradient checkpointing.

Letters:  B batch, C channels, H, W height and width, L = H * W places, N concept tokens, D token
dimension, M places or tokens that are read, h heads, d channels of a head, E width of the time embedding.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CONDITIONINGS = ("cross-attention", "adagn")


# ---- time -----------------------------------------------------------------------------------------

def timestep_embedding(t, width):
    """Sines and cosines of t at geometrically spaced frequencies (DDPM, appendix B).

    t: (B,) int64 in 0..T-1. Returns (B, width) float32 in [-1, 1].
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)     # (width/2,)
    angles = t[:, None].float() * frequencies                                           # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                               # (B, width)


# ---- attention ------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention of places x to a sequence `source`: x itself, or the concept tokens.

    softmax(Q K^T / sqrt(d)) V, Rombach et al. 2022, section 3.3.
    """

    def __init__(self, channels, source_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, channels, bias=False)
        self.to_v = nn.Linear(source_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, source, maps=None):
        """x: (B, L, C); source: (B, M, source_dim), M = L (self) or N (cross). Returns (B, L, C).

        maps: a list that receives the probabilities (B, h, L, M), or None.
        """
        q = self.split(self.to_q(x))                                                    # (B, h, L, d)
        k, v = self.split(self.to_k(source)), self.split(self.to_v(source))             # (B, h, M, d) each
        if maps is None:                                            # the same, by a kernel that keeps no probabilities
            out = F.scaled_dot_product_attention(q, k, v)                               # (B, h, L, d)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                    # (B, h, L, M)
            probabilities = scores.softmax(dim=-1)                                      # (B, h, L, M)
            out = probabilities @ v                                                     # (B, h, L, d)
            maps.append(probabilities)
        return self.to_out(out.transpose(1, 2).flatten(2))                              # (B, L, C)

    def split(self, x):
        """(B, M, h*d) -> (B, h, M, d)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): a projection to 4 times the width, times GELU of another one, projected back."""

    def __init__(self, channels, factor=4):
        super().__init__()
        self.value = nn.Linear(channels, factor * channels)
        self.gate = nn.Linear(channels, factor * channels)
        self.project_out = nn.Linear(factor * channels, channels)

    def forward(self, x):
        """x: (B, L, C). Returns (B, L, C)."""
        return self.project_out(self.value(x) * F.gelu(self.gate(x)))                   # (B, L, 4C) -> (B, L, C)


class TransformerBlock(nn.Module):
    """Self attention, cross attention to the tokens (none if token_dim is 0), feed-forward, on a feature map."""

    def __init__(self, channels, token_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, heads)
        self.norm_cross = nn.LayerNorm(channels) if token_dim else None
        self.cross_attention = Attention(channels, token_dim, heads) if token_dim else None
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.feed_forward = GatedFeedForward(channels)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, tokens, maps=None):
        """x: (B, C, H, W); tokens: (B, N, D); maps: as in Attention. Returns (B, C, H, W)."""
        H, W = x.shape[2:]
        y = self.project_in(self.norm(x)).flatten(2).transpose(1, 2)                    # (B, L, C)
        normed = self.norm_self(y)                                                      # (B, L, C)
        y = y + self.self_attention(normed, normed)                                     # (B, L, C)
        if self.cross_attention is not None:
            y = y + self.cross_attention(self.norm_cross(y), tokens, maps)              # (B, L, C)
        y = y + self.feed_forward(self.norm_feed_forward(y))                            # (B, L, C)
        y = y.transpose(1, 2).unflatten(2, (H, W))                                      # (B, C, H, W)
        return x + self.project_out(y)                                                  # (B, C, H, W)


# ---- residual block -------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual; the time embedding scales and shifts between them.

    resample: "down" halves, "up" doubles height and width inside the block, None keeps them.
    With `attention` (the keyword arguments of a TransformerBlock) a transformer block follows.
    """

    def __init__(self, channels_in, channels, embedding_dim, groups, resample=None, attention=None):
        super().__init__()
        self.resample = resample
        self.norm_1 = nn.GroupNorm(groups, channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.scale_and_shift = nn.Linear(embedding_dim, 2 * channels)
        self.norm_2 = nn.GroupNorm(groups, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels != channels_in else nn.Identity()
        self.transformer = TransformerBlock(channels, groups=groups, **attention) if attention else None

    def forward(self, x, embedding, tokens, maps=None):
        """x: (B, C_in, H, W); embedding: (B, E) after its SiLU; tokens: (B, N, D); maps: as in Attention.

        Returns (B, C, H, W), with H and W halved or doubled where the block resamples.
        """
        y = self.resize(F.silu(self.norm_1(x)))                                         # (B, C_in, H', W')
        y = self.conv_1(y)                                                              # (B, C, H', W')
        scale, shift = self.scale_and_shift(embedding)[:, :, None, None].chunk(2, 1)    # (B, C, 1, 1) each
        y = torch.addcmul(shift, self.norm_2(y), 1 + scale)             # norm (1 + scale) + shift, (B, C, H', W')
        y = self.conv_2(F.silu(y))                                                      # (B, C, H', W')
        y = self.skip(self.resize(x)) + y                                               # (B, C, H', W')
        return y if self.transformer is None else self.transformer(y, tokens, maps)

    def resize(self, x):
        """Average of 2x2 places, or each place repeated 2x2."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


# ---- U-Net ----------------------------------------------------------------------------------------

class UNet(nn.Module):
    """eps_theta(x_t, t, S): predicts the noise in the latent x_t from the concept tokens S.

    channels * multipliers: width of each level, finest first; n_res_blocks a level on the way down, one
    more on the way up; attention_levels: how many levels, counted from the finest, have transformer
    blocks (the middle always has one). The defaults are the paper's.

    conditioning: how the tokens enter. "cross-attention": as keys and values, any number of them. "adagn", the
    paper's ablation: flattened, by a small MLP, they join the time embedding and so scale and shift every
    residual block (adaptive group norm); there is no cross attention then, and n_tokens must be theirs.
    Raises ValueError when widths, heads and groups do not fit together, or for an unknown conditioning.
    """

    def __init__(self, in_channels=3, channels=64, multipliers=(1, 2, 4, 4), n_res_blocks=2,
                 attention_levels=3, heads=8, token_dim=16, groups=32, conditioning="cross-attention", n_tokens=20):
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"unknown conditioning {conditioning!r}: choose one of {', '.join(CONDITIONINGS)}")
        widths = [channels * m for m in multipliers]
        if channels % 2 or channels % groups:
            raise ValueError("channels must be even (half sines, half cosines of t) and a multiple of "
                             f"{groups} groups, not {channels}")
        for width in widths:
            if width % heads or width % groups:
                raise ValueError(f"a U-Net level of width {width} cannot be divided into {heads} heads and "
                                 f"{groups} groups: choose a width that both divide")
        if attention_levels > len(widths):
            raise ValueError(f"a U-Net of {len(widths)} levels cannot attend at {attention_levels} levels")
        E = 4 * channels
        self.time_mlp = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))
        self.token_mlp = None
        if conditioning == "adagn":
            self.token_mlp = nn.Sequential(nn.Linear(n_tokens * token_dim, E), nn.SiLU(), nn.Linear(E, E))
            token_dim = 0                                           # no block gets a cross attention
        attention = dict(token_dim=token_dim, heads=heads)

        def block(c_in, c_out, resample=None, attend=False):
            return ResBlock(c_in, c_out, E, groups, resample, attention if attend else None)

        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = channels, [channels]                             # width now; widths that wait for the way up
        for level, width in enumerate(widths):
            for _ in range(n_res_blocks):
                self.down.append(block(c, width, attend=level < attention_levels))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.down.append(block(c, c, resample="down"))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, attend=True), block(c, c)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(n_res_blocks + 1):
                self.up.append(block(c + skips.pop(), width, attend=level < attention_levels))
                c = width
            if level > 0:
                self.up.append(block(c, c, resample="up"))
        self.norm_out = nn.GroupNorm(groups, c)
        self.conv_out = nn.Conv2d(c, in_channels, 3, padding=1)
        self.initialize_weights()

    def initialize_weights(self):
        """PyTorch's defaults, but every branch and the output start at zero, as in latent diffusion.

        Then each block is the identity (up to its skip convolution) at first and the loss starts at E|eps|.
        """
        nn.init.zeros_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv_2.weight), nn.init.zeros_(module.conv_2.bias)
            if isinstance(module, TransformerBlock):
                nn.init.zeros_(module.project_out.weight), nn.init.zeros_(module.project_out.bias)

    def forward(self, x, t, tokens, maps=None):
        """Predicts eps, (B, C, H, W) like x.

        x: x_t, (B, C, H, W) float, H and W divisible by 2^(levels - 1); t: (B,) int64 in 0..T-1;
        tokens: (B, N, D) float. maps: pass an empty list to get every cross-attention map, one
        (B, h, L, N) tensor of probabilities per transformer block, in the order the blocks run
        (the finest level first on the way down); L = H * W of that block's level. None come with "adagn".
        """
        embedding = timestep_embedding(t, self.conv_in.out_channels)                    # (B, C_0)
        embedding = self.time_mlp(embedding)                                            # (B, E)
        if self.token_mlp is not None:
            embedding = embedding + self.token_mlp(tokens.flatten(1))                   # (B, N * D) -> (B, E)
        embedding = F.silu(embedding)                                                   # (B, E)
        y = self.conv_in(x)                                                             # (B, C_0, H, W)
        skips = [y]
        for block in self.down:
            y = block(y, embedding, tokens, maps)                                       # (B, C_level, H', W')
            skips.append(y)
        for block in self.middle:
            y = block(y, embedding, tokens, maps)                                       # coarsest level
        for block in self.up:
            if block.resample is None:
                y = torch.cat([y, skips.pop()], dim=1)                                  # (B, C + C_skip, H', W')
            y = block(y, embedding, tokens, maps)                                       # (B, C_level, H', W')
        return self.conv_out(F.silu(self.norm_out(y)))                                  # (B, C, H, W)


# ---- looking into a trained U-Net -------------------------------------------------------------------

def attention_pictures(maps, side):
    """One map for each token: the mean over heads and blocks of UNet.forward's maps, all enlarged to one size.

    maps: a list of (B, h, L, N), each of a square feature map. Returns (B, N, side, side), summing to 1 over N.
    """
    pictures = []
    for m in maps:
        m = m.mean(1).transpose(1, 2).unflatten(2, (math.isqrt(m.shape[2]), -1))        # (B, N, H, W)
        pictures.append(F.interpolate(m, (side, side), mode="bilinear"))                # (B, N, side, side)
    return torch.stack(pictures).mean(0)                                                # (B, N, side, side)


@torch.no_grad()
def rise_of_loss(unet, diffusion, x_0, tokens, eps, t):
    """How much worse the noise prediction gets when one token is another picture's: what is read of it at level t.

    x_0, eps: (B, C, H, W); tokens: (B, N, D), of the same pictures; t: a level, 0..T-1; diffusion: a
    diffusion.Diffusion. Returns for each token the rise of the L1 loss, (N,), when it comes from the previous picture.
    """
    levels, losses = torch.full((len(x_0),), t, device=x_0.device), []                  # (B,)
    for n in range(tokens.shape[1] + 1):                            # the last time, nothing is exchanged
        edited = tokens.clone()
        edited[:, n:n + 1] = tokens.roll(1, 0)[:, n:n + 1]
        losses.append(diffusion.loss(lambda x_t, t: unet(x_t, t, edited), x_0, levels, eps))
    return torch.stack(losses[:-1]) - losses[-1]                                        # (N,)
