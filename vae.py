"""The first stage of EncDiff: an autoencoder whose latent, not the picture, is diffused.

Implements the convolutional autoencoder of latent diffusion (Rombach et al. 2022, section 3.1) in both
of its forms: KL (a Gaussian latent pulled gently towards N(0, I)) and VQ (a latent that is replaced by
the nearest vector of a codebook; van den Oord et al. 2017). It is trained first, then frozen. As in
EncDiff, the latent is taken before quantisation, and quantising is the first step of decoding; the
latent is multiplied by one over its standard deviation, kept here as the buffer `scale`.

DEVIATION: neither a perceptual (LPIPS) nor a patch-discriminator term (the authors' first-stage
configuration uses both): LPIPS needs downloaded weights. The loss is L1 + codebook (or KL) alone.

Exports: Autoencoder, encode_all.

Letters:  B batch, C channels of a feature map, Z latent channels, H, W height and width, h, w those of
the latent, V vectors in the codebook, z the latent before it is scaled.
With the defaults, the paper's setting: 64x64x3 -> 16x16x3.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual.

    DEVIATION: the norms' eps is PyTorch's 1e-5 (latent diffusion's 1e-6), and the convolutions that halve, below,
    pad all four sides (latent diffusion's the right and the bottom).
    """

    def __init__(self, channels_in, channels, groups):
        super().__init__()
        self.norm_1 = nn.GroupNorm(min(groups, channels_in), channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(min(groups, channels), channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels != channels_in else nn.Identity()

    def forward(self, x):
        """x: (B, C_in, H, W). Returns (B, C, H, W)."""
        y = self.conv_1(F.silu(self.norm_1(x)))                                         # (B, C, H, W)
        y = self.conv_2(F.silu(self.norm_2(y)))                                         # (B, C, H, W)
        return self.skip(x) + y                                                         # (B, C, H, W)


def build_encoder(widths, n_res_blocks, latent_channels, patch, groups):
    """(B, 3, H, W) in [-1, 1] -> (B, latent_channels, h, w), h = H / (patch * 2^(levels - 1))."""
    layers = [nn.Conv2d(3, widths[0], 3, padding=1) if patch == 1 else nn.Conv2d(3, widths[0], patch, patch)]
    c = widths[0]
    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(c, c, 3, stride=2, padding=1))                      # halves H and W
        for _ in range(n_res_blocks):
            layers.append(ResBlock(c, width, groups))
            c = width
    layers += [ResBlock(c, c, groups), ResBlock(c, c, groups)]
    layers += [nn.GroupNorm(min(groups, c), c), nn.SiLU(), nn.Conv2d(c, latent_channels, 3, padding=1)]
    return nn.Sequential(*layers)


def build_decoder(widths, n_res_blocks, latent_channels, patch, groups):
    """(B, latent_channels, h, w) -> (B, 3, H, W): the encoder's mirror image, one block more a level."""
    c = widths[-1]
    layers = [nn.Conv2d(latent_channels, c, 3, padding=1), ResBlock(c, c, groups), ResBlock(c, c, groups)]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(n_res_blocks + 1):
            layers.append(ResBlock(c, width, groups))
            c = width
        if level > 0:
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c, c, 3, padding=1)]
    layers += [nn.GroupNorm(min(groups, c), c), nn.SiLU(), nn.Conv2d(c, 3 * patch ** 2, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(patch))           # patch 1: shuffles nothing


class Codebook(nn.Module):
    """V vectors of Z numbers; a latent is replaced, place by place, by the nearest of them."""

    def __init__(self, size, latent_channels):
        super().__init__()
        self.vectors = nn.Embedding(size, latent_channels)                              # (V, Z)
        nn.init.uniform_(self.vectors.weight, -1 / size, 1 / size)

    def nearest(self, z):
        """z: (B, Z, h, w). Returns the index (B, h, w) of the nearest vector at each place."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)                                      # (B*h*w, Z)
        v = self.vectors.weight                                                         # (V, Z)
        # |z - v|^2 = |z|^2 - 2 z.v + |v|^2, and |z|^2 does not change which v is nearest
        distance = torch.addmm((v * v).sum(1), flat, v.t(), alpha=-2)                   # (B*h*w, V)
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])                        # (B, h, w)

    def forward(self, z):
        """z: (B, Z, h, w). Returns its nearest vectors in the same shape, and their indices (B, h, w)."""
        index = self.nearest(z)                                                         # (B, h, w)
        return self.vectors(index).permute(0, 3, 1, 2), index                           # (B, Z, h, w)

    @torch.no_grad()
    def start_from(self, z):
        """Sets every vector to a latent drawn from z (B, Z, h, w), with a little noise.

        DEVIATION: latent diffusion starts from uniform numbers, of which many vectors are never used.
        """
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)                                      # (B*h*w, Z)
        draw = flat[torch.randint(len(flat), (len(self.vectors.weight),), device=z.device)]    # (V, Z)
        self.vectors.weight.copy_(draw + 0.01 * flat.std() * torch.randn_like(draw))


class Autoencoder(nn.Module):
    """First stage: images (B, 3, H, W) in [-1, 1] <-> latents (B, Z, h, w) of unit standard deviation.

    kind: "kl" or "vq". channels * multipliers: width of each level, finest first. patch: the images are
    first cut into patch x patch squares, each one place (1, the paper's: none). n_res_blocks: a level.
    groups: of the group norms. codebook_size: V, for vq. kl_weight (latent diffusion's) and commitment
    (the paper's) weigh the latent's own terms. Raises ValueError for an unknown kind or impossible sizes.

    DEVIATION: no attention in the middle and no 1x1 convolutions around the latent, which latent diffusion's
    code has whatever its configuration says.
    """

    def __init__(self, kind="vq", channels=32, multipliers=(1, 2, 4), n_res_blocks=2, latent_channels=3,
                 patch=1, groups=32, codebook_size=2048, kl_weight=1e-6, commitment=0.25, image_size=64):
        super().__init__()
        if kind not in ("kl", "vq"):
            raise ValueError(f"unknown first stage {kind!r}: choose kl or vq")
        self.kind, self.kl_weight, self.commitment = kind, kl_weight, commitment
        widths = [channels * m for m in multipliers]
        for width in widths:
            if width % min(groups, width):
                raise ValueError(f"an autoencoder level of width {width} cannot be cut into {groups} groups: choose a "
                                 "multiple")
        moments = 2 * latent_channels if kind == "kl" else latent_channels              # mean and log variance
        self.encoder = build_encoder(widths, n_res_blocks, moments, patch, groups)
        self.decoder = build_decoder(widths, n_res_blocks, latent_channels, patch, groups)
        self.codebook = Codebook(codebook_size, latent_channels) if kind == "vq" else None
        self.factor = patch * 2 ** (len(widths) - 1)                # H / h
        if image_size % self.factor:
            raise ValueError(f"{image_size}-pixel images cannot be shrunk {self.factor} times: change patch {patch} or "
                             f"the number of vae multipliers, {len(widths)}")
        self.register_buffer("scale", torch.ones(()))               # 1 / std of the raw latent, set after training

    # ---- what the diffusion uses -------------------------------------------------------------------

    def encode(self, images):
        """images: (B, 3, H, W) in [-1, 1]. Returns x_0: (B, Z, h, w), before quantisation, times scale.

        DEVIATION: for KL the mean is taken, not a draw (latent diffusion draws), so that a picture has one
        latent; at its KL weight the two hardly differ.
        """
        return self.scale * self.encoder(images).chunk(2 if self.kind == "kl" else 1, dim=1)[0]

    def decode(self, x_0):
        """x_0: (B, Z, h, w) as encode returns it. Returns images (B, 3, H, W), about [-1, 1], not clipped."""
        z = x_0 / self.scale                                                            # (B, Z, h, w)
        if self.kind == "vq":
            z, _ = self.codebook(z)                                                     # (B, Z, h, w)
        return self.decoder(z)                                                          # (B, 3, H, W)

    # ---- training ----------------------------------------------------------------------------------

    def forward(self, images):
        """The loss: L1 reconstruction plus the latent's own term. images: (B, 3, H, W) in [-1, 1].

        Returns the loss (scalar, to minimise) and the L1 reconstruction error alone (scalar).
        """
        raw = self.encoder(images)                                                      # (B, Z or 2Z, h, w)
        z, latent_term = self.gaussian(raw, images) if self.kind == "kl" else self.quantised(raw)
        l1 = F.l1_loss(self.decoder(z), images)
        return l1 + latent_term, l1                                 # both per number, so that sizes do not matter

    def gaussian(self, moments, images):
        """A draw z ~ N(mean, variance), and KL(N(mean, variance) || N(0, I)) (Kingma and Welling 2014).

        Latent diffusion adds the KL to an error summed over an image's numbers; the error here is their
        mean, so the KL is divided by their count.
        """
        mean, log_variance = moments.chunk(2, dim=1)                                    # (B, Z, h, w) each
        log_variance = log_variance.clamp(-30, 20)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)                  # (B, Z, h, w)
        kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return z, self.kl_weight * kl / images[0].numel()

    def quantised(self, z):
        """The codebook's vectors nearest to z, and the codebook and commitment terms (VQ-VAE, equation 3).

        DEVIATION: latent diffusion weighs the two terms (beta, 1) by a legacy switch of its quantiser; here
        they are weighed as VQ-VAE writes them.
        """
        q, _ = self.codebook(z)                                                         # (B, Z, h, w)
        term = F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())
        return z + (q - z).detach(), term                           # the gradient passes straight through to z

    @torch.no_grad()
    def set_scale(self, images):
        """Brings the latents of these images (B, 3, H, W) to unit standard deviation."""
        self.scale.fill_(1.0)
        self.scale.copy_(1 / self.encode(images).std())


@torch.no_grad()
def encode_all(vae, images_of, parts, device, keep_pixels=False):
    """The latents of all pictures, computed once because the autoencoder is frozen: (n, Z, h, w).

    DEVIATION: they are kept in float16; the authors encode each batch anew.

    images_of: index (b,) -> (b, 3, H, W) in [-1, 1]; parts: the numbers 0..n-1 in batches. Returns the latents and,
    with keep_pixels, the pictures (n, 3, H, W) uint8, else None; both on the device, twice their size while joined.
    """
    latents, pixels = [], []
    for part in parts:
        images = images_of(part).to(device)                                             # (b, 3, H, W)
        latents.append(vae.encode(images).half().contiguous())                          # (b, Z, h, w)
        if keep_pixels:
            pixels.append((images * 127.5 + 127.5).round().byte())                      # (b, 3, H, W)
    return torch.cat(latents), torch.cat(pixels) if keep_pixels else None
