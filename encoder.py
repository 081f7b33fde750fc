# SPDX-License-Identifier: MIT
"""The concept-token encoder of EncDiff: an image becomes N tokens S = {s_1 .. s_N}.

The encoder of the paper's method section: a trunk of convolutions, then scalar or vector tokens;
and slot attention (Locatello et al. 2020), which the paper does not use. With the defaults, the
authors' for Shapes3D, it has 1.37 M parameters. Noise prediction, through the U-Net, trains it.

Letters: B batch, C, H, W channels, height and width of the trunk's feature map h (128, 4, 4 with
the defaults), L = H * W positions, N concept tokens, D token dimension.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ENCODERS = ("scalar", "vector", "slot")


# ---- trunk ----

class ResBlock(nn.Module):
    """ReLU, 3x3 convolution, batch norm, ReLU, 1x1 convolution, and a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def build_trunk(width, strides):
    """(B, 3, 64, 64) -> (B, C, H, W), C = width: 4x4 convolutions, then two residual blocks.

    DEVIATION: no ReLU after the second-to-last convolution, as in the official code (`Encoder4`,
    openaimodel_enc.py, lines 1003-1005); the paper has one after each.
    """
    layers = []
    c = 3
    for i, stride in enumerate(strides):
        padding = 1 if stride == 2 else 0  # each convolution divides H and W by stride
        layers.append(nn.Conv2d(c, width, 4, stride, padding))
        layers.append(nn.BatchNorm2d(width))
        if i != len(strides) - 2:
            layers.append(nn.ReLU())
        c = width
    layers += [ResBlock(width), nn.BatchNorm2d(width), nn.ReLU(), ResBlock(width)]
    return nn.Sequential(*layers)


# ---- heads: feature map (B, C, H, W) -> tokens (B, N, D) ----

class ScalarTokens(nn.Module):
    """N scalars, then for each its own MLP 1 -> 64 -> 128 -> D with ELU: the paper's default."""

    def __init__(self, features: int, n_tokens: int, token_dim: int):
        super().__init__()
        self.to_scalars = nn.Linear(features, n_tokens)
        self.weight_1, self.bias_1 = self.layer(n_tokens, 1, 64)
        self.weight_2, self.bias_2 = self.layer(n_tokens, 64, 128)
        self.weight_3, self.bias_3 = self.layer(n_tokens, 128, token_dim)

    @staticmethod
    def layer(n_tokens: int, inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
        """N linear layers side by side: weight (N, inputs, outputs) and bias (N, 1, outputs)."""
        bound = 1 / math.sqrt(inputs)  # as in nn.Linear
        weight = torch.empty(n_tokens, inputs, outputs).uniform_(-bound, bound)
        bias = torch.empty(n_tokens, 1, outputs).uniform_(-bound, bound)
        return nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.tokens_of(self.scalars(h))

    def scalars(self, h: Tensor) -> Tensor:
        """The N numbers, (B, N)."""
        return self.to_scalars(h.flatten(1))

    def tokens_of(self, scalars: Tensor) -> Tensor:
        """scalars: (B, N), any real numbers. Returns tokens (B, N, D).

        The same, slowly: torch.stack([mlp[n](scalars[:, n:n + 1]) for n in range(N)], dim=1)
        """
        x = scalars.t()[:, :, None]                              # (N, B, 1)
        x = F.elu(torch.baddbmm(self.bias_1, x, self.weight_1))  # (N, B, 64)
        x = F.elu(torch.baddbmm(self.bias_2, x, self.weight_2))  # (N, B, 128)
        x = torch.baddbmm(self.bias_3, x, self.weight_3)         # (N, B, D)
        return x.transpose(0, 1)


class VectorTokens(nn.Module):
    """N * D numbers by one linear layer: the paper's alternative to scalar tokens."""

    def __init__(self, features: int, n_tokens: int, token_dim: int):
        super().__init__()
        self.n_tokens = n_tokens
        self.to_vectors = nn.Linear(features, n_tokens * token_dim)

    def forward(self, h: Tensor) -> Tensor:
        vectors = self.to_vectors(h.flatten(1))  # (B, N*D)
        return vectors.unflatten(1, (self.n_tokens, -1))


class SlotTokens(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1): N slots compete for the positions.

    DEVIATION: every slot starts from a learned vector of its own, not from a random draw, so that
    slot n means the same in every image; the position embedding is a learned table.
    """

    def __init__(self, width: int, positions: int, n_tokens: int, token_dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)  # (L, C)
        self.slots_init = nn.Parameter(torch.randn(n_tokens, width))        # (N, C)
        self.norm_inputs = nn.LayerNorm(width)
        self.norm_slots = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.to_tokens = nn.Linear(width, token_dim)

    def forward(self, h: Tensor) -> Tensor:
        inputs = h.flatten(2).transpose(1, 2)           # (B, L, C)
        inputs = self.norm_inputs(inputs + self.position)
        k = self.to_k(inputs) / math.sqrt(inputs.shape[-1])
        v = self.to_v(inputs)
        slots = self.slots_init.expand(len(h), -1, -1)  # (B, N, C)
        for _ in range(3):
            q = self.to_q(self.norm_slots(slots))
            attn = (k @ q.transpose(1, 2)).softmax(dim=-1) + 1e-8  # (B, L, N), over the slots
            weights = attn / attn.sum(dim=1, keepdim=True)         # sum to 1 over positions
            updates = weights.transpose(1, 2) @ v                  # (B, N, C)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(updates)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return self.to_tokens(slots)


# ---- encoder ----

class ConceptEncoder(nn.Module):
    """images (B, 3, 64, 64) in [-1, 1] -> concept tokens (B, N, D)."""

    def __init__(
        self,
        kind: str = "scalar",                     # one of ENCODERS
        n_tokens: int = 20,                       # N
        token_dim: int = 16,                      # D
        width: int = 128,                         # channels of the trunk
        strides: tuple[int, ...] = (2, 2, 2, 2),  # of its convolutions, 2 or 4 each
    ):
        super().__init__()
        self.trunk = build_trunk(width, strides)
        side = 64 // math.prod(strides)
        if kind == "scalar":
            self.head = ScalarTokens(width * side**2, n_tokens, token_dim)
        elif kind == "vector":
            self.head = VectorTokens(width * side**2, n_tokens, token_dim)
        elif kind == "slot":
            self.head = SlotTokens(width, side**2, n_tokens, token_dim)
        else:
            raise ValueError(f"{kind!r} is none of {ENCODERS}")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def scalars(self, images: Tensor) -> Tensor:
        """The numbers behind scalar tokens, (B, N); other kinds have none."""
        return self.head.scalars(self.trunk(images))
