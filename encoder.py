"""The concept-token encoder of EncDiff: a picture becomes N tokens S = {s_1 .. s_N}.

Implements the encoder of the paper's method section in its two forms, scalar tokens (the default: N
numbers, each turned into a token by its own small MLP) and vector tokens (the trunk gives N * D numbers
at once), and as a third kind slot attention (Locatello et al. 2020, algorithm 1), which the paper does
not use. The trunk of convolutions is shared by all three. With the defaults, the paper's Shapes3D
setting (N = 20, D = 16), it has about 1.37 M parameters. No loss ever acts on the tokens.

Exports: KINDS, ConceptEncoder, principal_directions, number_coder.

Letters:  B batch, C channels, H, W height and width (of the trunk's map: 4x4 for 64x64 pictures),
L = H * W places, N concept tokens, D token dimension.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = ("scalar", "vector", "slot")


# ---- trunk ----------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """ReLU, 3x3 convolution, batch norm, ReLU, 1x1 convolution, and a residual."""

    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                    nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        """x: (B, C, H, W). Returns (B, C, H, W)."""
        return x + self.branch(x)


def build_trunk(width, strides):
    """(B, 3, 64, 64) -> (B, width, H, W): 4x4 convolutions with batch norm and ReLU, then two residual blocks.

    DEVIATION: the paper has a ReLU after every convolution; the official code has none after the last but
    one (openaimodel_enc.py, lines 1003-1005, `Encoder4`), and so has this.
    """
    layers, c = [], 3
    for i, stride in enumerate(strides):
        layers += [nn.Conv2d(c, width, 4, stride, padding=1 if stride == 2 else 0), nn.BatchNorm2d(width)]
        if i != len(strides) - 2:
            layers.append(nn.ReLU())
        c = width
    layers += [ResBlock(width), nn.BatchNorm2d(width), nn.ReLU(), ResBlock(width)]
    return nn.Sequential(*layers)


# ---- heads: feature map -> tokens -----------------------------------------------------------------

class ScalarTokens(nn.Module):
    """N scalars, then for each scalar its own MLP 1 -> 64 -> 128 -> D with ELU: the paper's default.

    The N MLPs run side by side as batched matrix products.
    """

    def __init__(self, features, n_tokens, token_dim, hidden=(64, 128)):
        super().__init__()
        self.to_scalars = nn.Linear(features, n_tokens)
        sizes = [1, *hidden, token_dim]
        self.weights = nn.ParameterList(torch.empty(n_tokens, i, o) for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.empty(n_tokens, 1, o) for o in sizes[1:])
        for weight, bias in zip(self.weights, self.biases):         # as nn.Linear starts: +- 1 / sqrt(inputs)
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, features):
        """features: (B, C, H, W). Returns tokens (B, N, D)."""
        return self.tokens_of(self.scalars(features))                                   # (B, N, D)

    def scalars(self, features):
        """features: (B, C, H, W). Returns the N numbers (B, N)."""
        return self.to_scalars(features.flatten(1))                                     # (B, N)

    def tokens_of(self, scalars):
        """scalars: (B, N), any real numbers. Returns tokens (B, N, D)."""
        x = scalars.t()[:, :, None]                                                     # (N, B, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.elu(x) if i else x, weight)       # (N, B, 64), then 128, then D numbers
        return x.transpose(0, 1)                                                        # (B, N, D)


class VectorTokens(nn.Module):
    """N * D numbers by one linear layer: the paper's alternative to scalar tokens."""

    def __init__(self, features, n_tokens, token_dim):
        super().__init__()
        self.to_vectors = nn.Linear(features, n_tokens * token_dim)
        self.n_tokens = n_tokens

    def forward(self, features):
        """features: (B, C, H, W). Returns tokens (B, N, D)."""
        return self.to_vectors(features.flatten(1)).unflatten(1, (self.n_tokens, -1))   # (B, N, D)


class SlotTokens(nn.Module):
    """Slot attention (Locatello et al. 2020, algorithm 1): N slots compete for the places of the map.

    DEVIATION: every slot starts from a vector of its own, learned, not from a common random draw, so that
    slot n means the same in every picture; the position embedding is a learned table.
    """

    def __init__(self, width, places, n_tokens, token_dim, iterations=3, tiny=1e-8):
        super().__init__()
        self.iterations, self.tiny = iterations, tiny
        self.position = nn.Parameter(torch.randn(places, width) * 0.02)                 # (L, C)
        self.start = nn.Parameter(torch.randn(n_tokens, width))                         # (N, C)
        self.norm_inputs, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.to_tokens = nn.Linear(width, token_dim)

    def forward(self, features):
        """features: (B, C, H, W). Returns tokens (B, N, D)."""
        x = features.flatten(2).transpose(1, 2) + self.position                         # (B, L, C)
        x = self.norm_inputs(x)                                                         # (B, L, C)
        k, v = self.to_k(x) * x.shape[-1] ** -0.5, self.to_v(x)                         # (B, L, C) each
        slots = self.start.expand(len(x), -1, -1)                                       # (B, N, C)
        for _ in range(self.iterations):
            q = self.to_q(self.norm_slots(slots))                                       # (B, N, C)
            share = (k @ q.transpose(1, 2)).softmax(dim=-1) + self.tiny                 # (B, L, N), over slots
            share = share / share.sum(1, keepdim=True)                                  # weights of a mean over L
            updates = share.transpose(1, 2) @ v                                         # (B, N, C)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(updates)       # (B, N, C)
            slots = slots + self.mlp(self.norm_mlp(slots))                              # (B, N, C)
        return self.to_tokens(slots)                                                    # (B, N, D)


# ---- codes: one number for each token --------------------------------------------------------------

def principal_directions(tokens):
    """Each token's first principal direction, by which one number can stand for a vector (EncDiff's authors).

    tokens: (n, N, D). Returns mean (N, D) and direction (N, D) of unit length, its largest entry positive.
    """
    mean = tokens.mean(0)                                                               # (N, D)
    centred = (tokens - mean).transpose(0, 1)                                           # (N, n, D)
    covariance = (centred.transpose(1, 2) @ centred).cpu()                              # (N, D, D); no eigh on MPS
    direction = torch.linalg.eigh(covariance).eigenvectors[..., -1].to(tokens.device)   # (N, D)
    largest = direction.gather(1, direction.abs().argmax(1, keepdim=True))              # (N, 1)
    return mean, direction * largest.sign()


def number_coder(encoder, sample):
    """A function images (B, 3, H, W) -> codes (B, N): the scalars of scalar tokens, else principal components.

    sample: an iterable of image batches, over which the components are found; not looked at for scalars.
    The encoder should be in eval mode and ask for no gradients.
    """
    if encoder.kind == "scalar":
        return encoder.scalars
    mean, direction = principal_directions(torch.cat([encoder(images) for images in sample]))
    return lambda images: ((encoder(images) - mean) * direction).sum(-1)                # (B, N, D) -> (B, N)


# ---- encoder --------------------------------------------------------------------------------------

class ConceptEncoder(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> concept tokens (B, N, D).

    kind: "scalar", "vector" or "slot". width: channels of the trunk. strides: of its 4x4 convolutions,
    2 or 4 each; the defaults are the paper's. Raises ValueError for an unknown kind or impossible sizes.
    """

    def __init__(self, kind="scalar", n_tokens=20, token_dim=16, width=128, strides=(2, 2, 2, 2), image_size=64):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown encoder {kind!r}: choose one of {', '.join(KINDS)}")
        if n_tokens < 1 or token_dim < 1:
            raise ValueError(f"an encoder needs at least 1 token of 1 number, not {n_tokens} of {token_dim}")
        side = image_size // math.prod(strides)
        if side < 1 or any(s not in (2, 4) for s in strides):
            raise ValueError(f"strides {strides} do not fit {image_size}-pixel images: use 2s and 4s whose product "
                             f"is at most {image_size}")
        self.kind = kind
        self.trunk = build_trunk(width, strides)
        if kind == "scalar":
            self.head = ScalarTokens(width * side ** 2, n_tokens, token_dim)
        elif kind == "vector":
            self.head = VectorTokens(width * side ** 2, n_tokens, token_dim)
        else:
            self.head = SlotTokens(width, side ** 2, n_tokens, token_dim)

    def forward(self, images):
        """images: (B, 3, H, W) in [-1, 1]. Returns tokens (B, N, D)."""
        return self.head(self.trunk(images))                                            # (B, N, D)

    def scalars(self, images):
        """The N numbers behind scalar tokens, (B, N). images as in forward. ValueError for other kinds."""
        self.require_scalars()
        return self.head.scalars(self.trunk(images))                                    # (B, N)

    def tokens_of(self, scalars):
        """Tokens (B, N, D) of given (also edited) scalars (B, N). ValueError for other kinds."""
        self.require_scalars()
        return self.head.tokens_of(scalars)                                             # (B, N, D)

    def require_scalars(self):
        """ValueError unless the tokens have scalars behind them."""
        if self.kind != "scalar":
            raise ValueError(f"{self.kind} tokens have no scalars behind them: use the tokens themselves, or their "
                             "first principal components")
