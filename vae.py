# SPDX-License-Identifier: MIT
"""The first stage of EncDiff: an autoencoder whose latent, not the image, is diffused.

The convolutional autoencoder of latent diffusion (Rombach et al. 2022, section 3.1), trained first,
then frozen. "kl": a Gaussian latent, pulled towards N(0, I). "vq": a latent replaced by the
nearest vectors of a codebook (van den Oord et al. 2017); as in EncDiff, x_0 is the latent before
quantisation, and decoding begins with the quantisation.

DEVIATION: the loss is L1 + codebook (or KL) alone, without the authors' LPIPS (it needs downloaded
weights) and patch discriminator.

Letters: B batch, C, H, W channels, height and width of a feature map, Z, h, w those of the latent
((3, 16, 16) with the defaults, the authors'), V vectors in the codebook. Images may have any size
that can be cut into patches and halved; 64x64 stands for it.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FIRST_STAGES = ("kl", "vq")
KL_WEIGHT = 1e-6   # latent diffusion's
COMMITMENT = 0.25  # beta of VQ-VAE, the authors'


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual.

    DEVIATION: the norms' eps is PyTorch's 1e-5 (latent diffusion's 1e-6).
    """

    def __init__(self, in_channels: int, channels: int, groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(groups, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity()
        if in_channels != channels:
            self.skip = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, H, W). Returns (B, C, H, W)."""
        y = self.conv_1(F.silu(self.norm_1(x)))
        y = self.conv_2(F.silu(self.norm_2(y)))
        return self.skip(x) + y


def build_down(widths, res_blocks, out_channels, patch, groups):
    """(B, 3, 64, 64) in [-1, 1] -> (B, Z or 2Z, h, w), h = 64 / (patch * 2^(levels - 1)).

    DEVIATION: convolutions of stride 2 pad all four sides, latent diffusion's right and bottom.
    """
    c = widths[0]
    if patch == 1:
        layers = [nn.Conv2d(3, c, 3, padding=1)]
    else:
        layers = [nn.Conv2d(3, c, patch, stride=patch)]  # one position per patch
    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(c, c, 3, stride=2, padding=1))  # halves H and W
        for _ in range(res_blocks):
            layers.append(ResBlock(c, width, groups))
            c = width
    layers += [ResBlock(c, c, groups), ResBlock(c, c, groups)]
    layers += [nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1)]
    return nn.Sequential(*layers)


def build_up(widths, res_blocks, latent_channels, patch, groups):
    """(B, Z, h, w) -> (B, 3, 64, 64): the mirror image, one block more per level."""
    c = widths[-1]
    layers = [nn.Conv2d(latent_channels, c, 3, padding=1)]
    layers += [ResBlock(c, c, groups), ResBlock(c, c, groups)]
    for level in reversed(range(len(widths))):
        for _ in range(res_blocks + 1):
            layers.append(ResBlock(c, widths[level], groups))
            c = widths[level]
        if level > 0:
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(c, c, 3, padding=1))
    layers += [nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, 3 * patch**2, 3, padding=1)]
    layers.append(nn.PixelShuffle(patch))  # with patch 1 the identity
    return nn.Sequential(*layers)


class Codebook(nn.Module):
    """V vectors of Z numbers; at each position a latent is replaced by the nearest of them."""

    def __init__(self, size: int, latent_channels: int):
        super().__init__()
        self.vectors = nn.Embedding(size, latent_channels)  # (V, Z)
        nn.init.uniform_(self.vectors.weight, -1 / size, 1 / size)

    def forward(self, latent: Tensor) -> Tensor:
        """latent: (B, Z, h, w). Returns its nearest vectors in the same shape."""
        x = latent.permute(0, 2, 3, 1)  # (B, h, w, Z)
        e = self.vectors.weight         # (V, Z)
        # |x - e|^2 = |x|^2 - 2 x.e + |e|^2, and |x|^2 does not change which e is nearest
        with torch.no_grad():  # a choice has no gradient
            distance = e.square().sum(dim=1) - 2 * x @ e.t()  # (B, h, w, V)
            index = distance.argmin(dim=-1)                   # (B, h, w)
        return self.vectors(index).permute(0, 3, 1, 2)

    @torch.no_grad()
    def init_from(self, latent: Tensor):
        """Sets every vector to a random position of latent (B, Z, h, w), with a little noise.

        DEVIATION: latent diffusion starts from uniform numbers, of which many are never used.
        """
        x = latent.permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, Z)
        rows = torch.randint(len(x), (len(self.vectors.weight),), device=x.device)
        noise = 0.01 * x.std() * torch.randn_like(self.vectors.weight)
        self.vectors.weight.copy_(x[rows] + noise)    # (V, Z)


class Autoencoder(nn.Module):
    """First stage: images (B, 3, 64, 64) in [-1, 1] <-> x_0 (B, Z, h, w) of unit deviation.

    DEVIATION: without latent diffusion's middle attention and 1x1 convolutions around the latent.
    """

    def __init__(
        self,
        kind: str = "vq",                          # one of FIRST_STAGES
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 4),  # width of each level / channels
        res_blocks: int = 2,                       # per level; one more per level of the decoder
        latent_channels: int = 3,                  # Z
        patch: int = 1,                            # side of the squares images are cut into
        groups: int = 32,
        codebook_size: int = 2048,                 # V, of "vq"
    ):
        super().__init__()
        if kind not in FIRST_STAGES:
            raise ValueError(f"{kind!r} is none of {FIRST_STAGES}")
        self.kind = kind
        widths = [channels * m for m in multipliers]
        out_channels = latent_channels
        if kind == "kl":
            out_channels = 2 * latent_channels  # mean and log variance
        self.encoder = build_down(widths, res_blocks, out_channels, patch, groups)
        self.decoder = build_up(widths, res_blocks, latent_channels, patch, groups)
        self.codebook = Codebook(codebook_size, latent_channels) if kind == "vq" else None
        self.register_buffer("scale", torch.ones(()))  # 1 / std of the latent

    # ---- what the diffusion uses ----

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, 64, 64) in [-1, 1]. Returns x_0: (B, Z, h, w), before quantisation.

        DEVIATION: for KL the mean, where latent diffusion draws: an image has one latent.
        """
        latent = self.encoder(images)           # (B, Z or 2Z, h, w)
        if self.kind == "kl":
            latent, _ = latent.chunk(2, dim=1)  # (B, Z, h, w)
        return self.scale * latent

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0: (B, Z, h, w) as from encode. Returns images (B, 3, 64, 64), unclipped."""
        latent = x_0 / self.scale
        if self.kind == "vq":
            latent = self.codebook(latent)
        return self.decoder(latent)

    # ---- training ----

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of images (B, 3, 64, 64), and of it the L1 error alone: two batch means."""
        if self.kind == "kl":
            latent, latent_loss = self.sample_gaussian(images)
        else:
            latent, latent_loss = self.quantise(images)
        l1 = F.l1_loss(self.decoder(latent), images)
        return l1 + latent_loss, l1

    def sample_gaussian(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A draw of N(mean, variance), and its weighted KL to N(0, I) (Kingma and Welling 2014).

        Our L1 is a mean over an image's numbers, latent diffusion's a sum; hence the division.
        """
        mean, log_var = self.encoder(images).chunk(2, dim=1)  # (B, Z, h, w) each
        log_var = log_var.clamp(-30, 20)
        latent = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(dim=(1, 2, 3)).mean()
        return latent, KL_WEIGHT * kl / images[0].numel()

    def quantise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codebook vectors, and codebook and commitment terms (VQ-VAE, equation 3).

        DEVIATION: weighted as VQ-VAE writes them; latent diffusion's code swaps the two weights.
        """
        latent = self.encoder(images)  # (B, Z, h, w)
        nearest = self.codebook(latent)
        codebook_loss = F.mse_loss(nearest, latent.detach())
        commitment_loss = F.mse_loss(latent, nearest.detach())
        loss = codebook_loss + COMMITMENT * commitment_loss
        return latent + (nearest - latent).detach(), loss  # straight-through gradient

    @torch.no_grad()
    def set_scale(self, images: Tensor):
        """Brings x_0 of these images (B, 3, 64, 64) to unit standard deviation."""
        self.scale /= self.encode(images).std()
