"""U-Net, token encoder and autoencoder: sizes, shapes, where information and gradients can flow."""
import pytest
import torch
import torch.nn.functional as F

import train
from encoder import ENCODERS, ConceptEncoder
from model import Attention, Decoder, ResBlock, TransformerBlock, UNet, timestep_embedding
from vae import Autoencoder

TINY = dict(channels=8, multipliers=(1, 3), res_blocks=1, attention_levels=1, heads=2,
            token_dim=5, groups=4)


def awake(module):
    """The module with random weights where it starts at zero, so that tests can fail."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def tiny_unet(**changes):
    torch.manual_seed(0)
    return awake(UNet(**{**TINY, **changes}))


def inputs(N=7, D=5):
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 10), torch.tensor([3, 977]), torch.randn(2, N, D)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- U-Net ---------------------------------------------------------------------------------------

def test_sizes_at_the_papers_setting():
    assert abs(count(UNet()) / 37.47e6 - 1) < 0.001
    assert abs(count(ConceptEncoder()) / 1.37e6 - 1) < 0.01
    assert abs(count(UNet(conditioning="adagn")) / count(UNet()) - 1) < 0.03
    cfg = train.Config(**train.PRESETS["paper"])
    assert train.build_vae(cfg).encode(torch.zeros(1, 3, 64, 64)).shape[1:] == (3, 16, 16)
    assert count(train.build_unet(cfg)) == count(UNet())


def test_unet_starts_at_zero_and_keeps_odd_shapes():
    x_t, t, tokens = inputs()
    assert not UNet(**TINY)(x_t, t, tokens).any()
    assert tiny_unet()(x_t, t, tokens).shape == x_t.shape


def test_a_wider_first_level_starts_from_the_base_width():
    """As in latent diffusion: conv_in makes C_0 channels, the first block widens them."""
    unet = tiny_unet(channels=32, multipliers=(2, 2), groups=8)
    x_t, t, tokens = inputs()
    assert unet.conv_in.out_channels == 32
    assert unet.down[0].res_block.conv_1.weight.shape[:2] == (64, 32)
    assert unet.up[-1].res_block.conv_1.weight.shape[:2] == (64, 64 + 32)
    assert unet(x_t, t, tokens).shape == x_t.shape


def test_tokens_matter_their_order_does_not():
    unet = tiny_unet()
    x_t, t, tokens = inputs()
    out = unet(x_t, t, tokens)
    changed = tokens.clone()
    changed[:, 4] += 1
    assert (unet(x_t, t, changed) - out).abs().max() > 1e-3
    assert (unet(x_t, t, tokens.flip(1)) - out).abs().max() < 1e-4


def test_output_depends_on_t_and_on_each_image_alone():
    unet = tiny_unet()
    x_t, t, tokens = inputs()
    out = unet(x_t, t, tokens)
    assert (unet(x_t, t + 20, tokens) - out).abs().max() > 1e-3
    assert (unet(x_t[1:], t[1:], tokens[1:]) - out[1:]).abs().max() < 1e-4


def test_adagn_has_no_path_through_attention():
    unet = tiny_unet(conditioning="adagn", n_tokens=7)
    x_t, t, tokens = inputs()
    assert not any(m.cross_attention for m in unet.modules() if isinstance(m, TransformerBlock))
    attn_maps = []
    out = unet(x_t, t, tokens, attn_maps)
    assert not attn_maps
    with torch.no_grad():
        assert (unet(x_t, t, tokens + 1) - out).abs().max() > 1e-3
        unet.token_mlp[0].weight.zero_()                        # the one way in, closed
        assert torch.equal(unet(x_t, t, tokens), unet(x_t, t, tokens + 1))


def test_attention_maps_are_probabilities_and_change_nothing():
    unet = tiny_unet()
    x_t, t, tokens = inputs()
    attn_maps = []
    out = unet(x_t, t, tokens)                                  # without maps: PyTorch's kernel
    assert (unet(x_t, t, tokens, attn_maps) - out).abs().max() < 1e-5 < 1e-2 < out.abs().max()
    shapes = [tuple(m.shape) for m in attn_maps]
    assert shapes == [(2, 2, 60, 7), (2, 2, 15, 7), (2, 2, 60, 7), (2, 2, 60, 7)]
    for probabilities in attn_maps:
        assert probabilities.min() >= 0
        assert (probabilities.sum(-1) - 1).abs().max() < 1e-5


def test_gradients_reach_the_encoder_through_cross_attention_alone():
    unet = tiny_unet()
    x_t, t, _ = inputs()
    encoder = ConceptEncoder(n_tokens=7, token_dim=5, width=8)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    unet(x_t, t, encoder(images)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        if "weight" in name:
            assert parameter.grad.abs().max() > 1e-9, name
    for module in unet.modules():                               # now close that one path
        if isinstance(module, TransformerBlock):
            torch.nn.init.zeros_(module.cross_attention.to_v.weight)
    encoder.zero_grad(set_to_none=False)
    unet(x_t, t, encoder(images)).square().mean().backward()
    assert not any(p.grad.any() for p in encoder.parameters())


def test_decoder_reads_the_tokens_alone():
    torch.manual_seed(0)
    decoder = awake(Decoder(latent_size=6, latent_channels=3, **TINY))
    tokens = torch.randn(2, 7, 5)
    x_0 = decoder(None, None, tokens)
    assert x_0.shape == (2, 3, 6, 6)
    assert (x_0[0] - x_0[1]).abs().max() > 1e-3
    per_level = count(UNet(**TINY).up)
    assert count(decoder.up) < per_level                        # no skips to read


def test_timestep_embedding_tells_steps_apart():
    table = timestep_embedding(torch.arange(1000), 32)
    assert table.shape == (1000, 32)
    assert torch.cdist(table, table).add(torch.eye(1000) * 9).min() > 1e-2


# ---- against diffusers, an independent implementation --------------------------------------------

def copy_into(ours, theirs, names):
    for our_name, their_name in names.items():
        source, target = ours.get_submodule(our_name), theirs.get_submodule(their_name)
        target.load_state_dict(source.state_dict())


def test_attention_and_res_block_are_those_of_diffusers():
    try:
        from diffusers.models import attention_processor, resnet
    except (ImportError, AttributeError):  # the newest does not know the oldest torch
        pytest.skip("no diffusers for this torch")
    torch.manual_seed(0)
    ours = Attention(12, 5, heads=3)
    theirs = attention_processor.Attention(12, cross_attention_dim=5, heads=3, dim_head=4)
    copy_into(ours, theirs, {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"})
    x, context = torch.randn(2, 11, 12), torch.randn(2, 7, 5)
    assert (ours(x, context) - theirs(x, context)).abs().max() < 1e-5

    ours = awake(ResBlock(8, 12, emb_dim=10, groups=4))
    theirs = resnet.ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=10, groups=4,
                                  eps=1e-5, time_embedding_norm="scale_shift").eval()
    copy_into(ours, theirs, {"norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2",
                             "conv_2": "conv2", "to_scale_shift": "time_emb_proj",
                             "skip": "conv_shortcut"})
    x, emb = torch.randn(2, 8, 6, 10), torch.randn(2, 10)
    # ours gets the embedding after its SiLU
    assert (ours(x, F.silu(emb)) - theirs(x, emb)).abs().max() < 1e-5


# ---- encoder -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_shapes_and_gradients(kind):
    encoder = ConceptEncoder(kind, n_tokens=7, token_dim=5, width=12, strides=(4, 2, 2))
    tokens = encoder(torch.randn(3, 3, 64, 64))
    assert tokens.shape == (3, 7, 5)
    (tokens * torch.randn_like(tokens)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if "weight" in name:
            assert parameter.grad.abs().max() > 1e-9, name


def test_token_n_reads_scalar_n_by_an_mlp_of_its_own():
    torch.manual_seed(0)
    encoder = ConceptEncoder(n_tokens=3, token_dim=5, width=8).eval()
    images = torch.randn(11, 3, 64, 64)
    scalars = encoder.scalars(images)
    assert scalars.shape == (11, 3)
    head = encoder.head
    for n in range(3):
        x = scalars[:, n : n + 1]
        x = F.elu(x @ head.weight_1[n] + head.bias_1[n])
        x = F.elu(x @ head.weight_2[n] + head.bias_2[n])
        x = x @ head.weight_3[n] + head.bias_3[n]
        assert (encoder(images)[:, n] - x).abs().max() < 1e-5
    assert torch.equal(encoder.head.tokens_of(scalars), encoder(images))


def test_slot_n_is_what_its_own_start_makes_of_the_image():
    """No two slots agree, and when two starting vectors change places, so do their tokens."""
    torch.manual_seed(0)
    encoder = ConceptEncoder("slot", n_tokens=4, token_dim=5, width=8).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = encoder(images)
    assert torch.cdist(tokens, tokens).add(torch.eye(4) * 9).min() > 1e-3
    exchanged = [2, 1, 0, 3]
    with torch.no_grad():
        encoder.head.slots_init.copy_(encoder.head.slots_init[exchanged])
    assert (encoder(images) - tokens[:, exchanged]).abs().max() < 1e-4


# ---- autoencoder ---------------------------------------------------------------------------------

def tiny_vae(kind, multipliers=(1, 2), patch=4):
    torch.manual_seed(0)
    return Autoencoder(kind, 8, multipliers, 1, 3, patch, groups=4, codebook_size=23)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("patch, multipliers, side", [(1, (1, 2, 4), 16), (4, (1, 2), 8)])
def test_autoencoder_shapes_and_scale(kind, patch, multipliers, side):
    vae = tiny_vae(kind, multipliers, patch)
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    x_0 = vae.encode(images)
    before = vae.decode(x_0)
    assert x_0.shape == (5, 3, side, side)
    assert before.shape == images.shape
    vae.set_scale(images)
    assert abs(vae.encode(images).std() - 1) < 1e-4
    assert (vae.decode(vae.encode(images)) - before).abs().max() < 1e-4
    loss, l1 = vae(images)
    assert loss >= l1 > 0


def test_codebook_takes_the_nearest_vector():
    codebook = tiny_vae("vq").codebook
    latent = torch.randn(2, 3, 5, 7)
    codebook.init_from(latent)
    vectors = codebook.vectors.weight
    distance = (latent.permute(0, 2, 3, 1)[..., None, :] - vectors).norm(dim=-1)    # (2, 5, 7, 23)
    index = distance.argmin(-1)
    assert len(index.unique()) > 5
    assert torch.equal(codebook(latent).permute(0, 2, 3, 1), vectors[index])


def test_quantised_gradient_passes_straight_through():
    vae = tiny_vae("vq")
    vae.encoder = torch.nn.Identity()                           # the images are the latent
    latent = torch.randn(2, 3, 5, 7, requires_grad=True)
    quantised, loss = vae.quantise(latent)
    gradient = torch.autograd.grad(quantised.sum(), latent, retain_graph=True)[0]
    assert torch.allclose(gradient, torch.ones_like(latent))
    commitment = 0.25 * 2 * (latent - vae.codebook(latent)).detach() / latent.numel()
    assert torch.allclose(torch.autograd.grad(loss, latent)[0], commitment, atol=1e-6)


def test_kl_term_is_the_divergence():
    vae = tiny_vae("kl")
    vae.encoder = torch.nn.Identity()
    moments = torch.randn(2, 6, 5, 7)
    mean, log_var = moments.chunk(2, dim=1)
    latent_distribution = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    noise = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(latent_distribution, noise).sum() / 2
    _, term = vae.sample_gaussian(moments)
    assert abs(term.item() - 1e-6 * kl.item() / moments[0].numel()) < 1e-9


@pytest.mark.parametrize("wrong", [lambda: Autoencoder("vae"), lambda: ConceptEncoder("scalars"),
                                   lambda: UNet(conditioning="film")])
def test_unknown_kinds_are_refused(wrong):
    with pytest.raises(ValueError, match="vae|scalars|film"):
        wrong()


# ---- other types than float32 --------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_follow_their_inputs_type(dtype):
    x_t, t, tokens = inputs()
    unet = tiny_unet().to(dtype)
    assert unet(x_t.to(dtype), t, tokens.to(dtype)).dtype == dtype
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    encoder = ConceptEncoder(n_tokens=7, token_dim=5, width=8).to(dtype)
    assert encoder(images).dtype == dtype
    vae = tiny_vae("vq").to(dtype)
    assert vae.decode(vae.encode(images)).dtype == dtype


def test_the_search_of_the_codebook_builds_no_graph():
    codebook = tiny_vae("vq").codebook
    latent = torch.randn(2, 3, 5, 7, requires_grad=True)
    codebook(latent).sum().backward()
    assert latent.grad is None
    count = (codebook.vectors.weight.grad / torch.ones(3)).sum(0)
    assert count.tolist() == [70, 70, 70]
