"""U-Net, token encoder and autoencoder: sizes, shapes, and where information and gradients can flow."""
import pytest
import torch

from encoder import KINDS, ConceptEncoder
from model import TransformerBlock, UNet, attention_pictures, timestep_embedding
from vae import Autoencoder


def small_unet(**changes):
    """A small U-Net whose zero-initialised layers have random weights, so that tests can fail."""
    torch.manual_seed(0)
    unet = UNet(**{**dict(in_channels=3, channels=8, multipliers=(1, 3), n_res_blocks=1, attention_levels=1, heads=2,
                          token_dim=5, groups=4), **changes})
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def inputs(N=7, D=5):
    torch.manual_seed(1)
    return torch.randn(2, 3, 6, 10), torch.tensor([3, 977]), torch.randn(2, N, D)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_at_the_papers_setting():
    assert abs(count(UNet()) / 37.47e6 - 1) < 0.001
    assert abs(count(ConceptEncoder()) / 1.37e6 - 1) < 0.01


def test_unet_starts_at_zero_and_keeps_odd_shapes():
    x, t, tokens = inputs()
    fresh = UNet(3, 8, (1, 3), 1, 1, 2, 5, 4)
    assert not fresh(x, t, tokens).any()
    assert small_unet()(x, t, tokens).shape == x.shape


def test_changing_a_token_changes_the_output_permuting_does_not():
    unet, (x, t, tokens) = small_unet(), inputs()
    out = unet(x, t, tokens)
    changed = tokens.clone()
    changed[:, 4] += 1
    assert (unet(x, t, changed) - out).abs().max() > 1e-3
    assert (unet(x, t, tokens[:, torch.randperm(7)]) - out).abs().max() < 1e-4


def test_adagn_has_no_path_through_attention():
    unet, (x, t, tokens) = small_unet(conditioning="adagn", n_tokens=7), inputs()
    assert not [name for name, _ in unet.named_parameters() if "cross" in name]
    maps, out = [], unet(x, t, tokens)
    assert torch.equal(unet(x, t, tokens, maps), out) and not maps
    tokens.requires_grad_()
    unet(x, t, tokens).square().sum().backward()
    assert (tokens.grad.abs() > 0).all()
    with torch.no_grad():                                           # the one way in, closed
        unet.token_mlp[0].weight.zero_()
        assert torch.equal(unet(x, t, tokens + 1), unet(x, t, tokens))
    assert (out - unet(x, t, tokens)).abs().max() > 1e-3            # and open it had mattered
    with pytest.raises(ValueError, match="unknown conditioning 'film'"):
        UNet(conditioning="film")


def test_adagn_and_cross_attention_have_about_as_many_parameters():
    small = dict(in_channels=4, channels=32, multipliers=(1, 2), n_res_blocks=1, attention_levels=2, heads=2, groups=8)
    for sizes in ({}, small):
        assert abs(count(UNet(**sizes, conditioning="adagn")) / count(UNet(**sizes)) - 1) < 0.03


def test_output_depends_on_t_and_on_each_image_alone():
    unet, (x, t, tokens) = small_unet(), inputs()
    out = unet(x, t, tokens)
    assert (unet(x, t + 20, tokens) - out).abs().max() > 1e-3
    alone = unet(x[1:], t[1:], tokens[1:])
    assert (alone - out[1:]).abs().max() < 1e-4


def test_attention_maps_are_probabilities_and_the_kernel_computes_the_same():
    unet, (x, t, tokens) = small_unet(), inputs()
    maps, out = [], unet(x, t, tokens)                              # without maps: PyTorch's kernel
    assert (unet(x, t, tokens, maps) - out).abs().max() < 1e-5 < 1e-2 < out.abs().max()
    blocks = sum(isinstance(m, TransformerBlock) for m in unet.modules())
    assert len(maps) == blocks == 4                                 # one down, the middle, two up
    assert maps[0].shape == (2, 2, 60, 7) and maps[1].shape == (2, 2, 15, 7)      # (B, heads, L, N)
    for probabilities in maps:
        assert probabilities.min() >= 0 and (probabilities.sum(-1) - 1).abs().max() < 1e-5


def test_gradients_reach_the_encoder_through_cross_attention_alone():
    unet, (x, t, _) = small_unet(), inputs()
    encoder = ConceptEncoder(n_tokens=7, token_dim=5, width=8)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    unet(x, t, encoder(images)).square().mean().backward()
    weights = [p for name, p in encoder.named_parameters() if name.endswith("weight") or "head.weights" in name]
    assert len(weights) > 10 and all(p.grad.abs().max() > 1e-9 for p in weights)
    for block in unet.modules():                                    # now close that one path
        if isinstance(block, TransformerBlock):
            torch.nn.init.zeros_(block.cross_attention.to_v.weight)
    encoder.zero_grad()
    unet(x, t, encoder(images)).square().mean().backward()
    assert not any(p.grad.any() for p in encoder.parameters() if p.grad is not None)


def test_attention_pictures_light_up_where_the_map_does():
    """Two blocks of two heads: a token that is read at row 1, column 3 of the 4x4 map, and everywhere in the other."""
    hot = torch.zeros(1, 2, 16, 3)                                  # (B, h, L, N)
    hot[..., 0] = 1.0
    hot[0, :, 1 * 4 + 3] = torch.tensor([0.0, 1.0, 0.0])
    pictures = attention_pictures([hot, torch.full((1, 2, 4, 3), 1 / 3)], 64)
    assert pictures.shape == (1, 3, 64, 64) and (pictures.sum(1) - 1).abs().max() < 1e-5
    assert pictures[0, 1, 24, 56] == pictures[0, 1].max() > 0.6 and pictures[0, 1, 56, 24] < 0.2
    assert pictures[0, 2].max() < 0.2


def test_unet_refuses_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="24.*5 heads"):
        UNet(3, 8, (3,), heads=5, groups=4)
    with pytest.raises(ValueError, match="4 groups, not 10"):
        UNet(3, 10, (2,), heads=2, groups=4)
    with pytest.raises(ValueError, match="even .*not 9"):
        UNet(3, 9, (2,), heads=1, groups=3)
    with pytest.raises(ValueError, match="12.*8 groups"):
        Autoencoder("kl", 12, (1,), 1, 3, 1, groups=8)


def test_timestep_embedding_tells_steps_apart():
    table = timestep_embedding(torch.arange(1000), 32)
    assert table.shape == (1000, 32) and table.abs().max() <= 1
    assert torch.cdist(table, table).add(torch.eye(1000) * 9).min() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_shapes_and_gradients(kind):
    encoder = ConceptEncoder(kind, n_tokens=7, token_dim=5, width=12, strides=(4, 2, 2))
    tokens = encoder(torch.randn(3, 3, 64, 64))
    assert tokens.shape == (3, 7, 5)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_scalars_are_what_the_tokens_are_made_of():
    encoder = ConceptEncoder(n_tokens=7, token_dim=5, width=8).eval()
    images = torch.randn(3, 3, 64, 64)
    scalars = encoder.scalars(images)
    assert scalars.shape == (3, 7)
    assert torch.equal(encoder.tokens_of(scalars), encoder(images))
    moved = scalars.clone()
    moved[:, 2] += 1
    difference = (encoder.tokens_of(moved) - encoder(images)).abs().amax((0, 2))        # (N,)
    assert difference[2] > 1e-3 and difference[[0, 1, 3, 4, 5, 6]].max() == 0           # token n reads scalar n alone


def test_batched_mlps_equal_a_loop_over_tokens():
    head = ConceptEncoder(n_tokens=3, token_dim=5, width=8).head
    scalars, elu = torch.randn(11, 3), torch.nn.ELU()
    for n in range(3):
        x = scalars[:, n:n + 1]
        for i in range(3):
            x = (elu(x) if i else x) @ head.weights[i][n] + head.biases[i][n]
        assert (head.tokens_of(scalars)[:, n] - x).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["vector", "slot"])
def test_other_kinds_have_no_scalars(kind):
    encoder = ConceptEncoder(kind, n_tokens=3, token_dim=5, width=8)
    with pytest.raises(ValueError, match=f"{kind} tokens have no scalars"):
        encoder.scalars(torch.randn(2, 3, 64, 64))


def test_slot_n_is_what_its_own_start_makes_of_the_picture():
    """No two slots agree, and when two starting vectors change places, so do their tokens."""
    encoder, images = ConceptEncoder("slot", n_tokens=4, token_dim=5, width=8).eval(), torch.randn(2, 3, 64, 64)
    tokens = encoder(images)
    assert torch.cdist(tokens, tokens).add(torch.eye(4) * 9).min() > 1e-3
    with torch.no_grad():
        encoder.head.start.copy_(encoder.head.start[[2, 1, 0, 3]])
    assert (encoder(images) - tokens[:, [2, 1, 0, 3]]).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", [dict(kind="scalars"), dict(n_tokens=0), dict(token_dim=0), dict(strides=(2, 3, 2)),
                                   dict(strides=(4, 4, 4, 4))])
def test_encoder_refuses(wrong):
    with pytest.raises(ValueError):
        ConceptEncoder(**wrong)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("patch, multipliers, side", [(1, (1, 2, 4), 16), (4, (1, 2), 8)])
def test_autoencoder_shapes(kind, patch, multipliers, side):
    vae = Autoencoder(kind, 8, multipliers, 1, 3, patch, groups=4, codebook_size=11)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert vae.factor == 64 // side
    assert vae.encode(images).shape == (2, 3, side, side)
    assert vae.decode(vae.encode(images)).shape == images.shape
    loss, l1 = vae(images)
    loss.backward()
    assert loss >= l1 > 0
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_scale_gives_unit_latents_and_does_not_change_pictures(kind):
    torch.manual_seed(0)
    vae = Autoencoder(kind, 8, (1, 2), 1, 3, 4, groups=4, codebook_size=11)
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    before = vae.decode(vae.encode(images))
    vae.set_scale(images)
    assert abs(vae.encode(images).std() - 1) < 1e-4 and vae.scale != 1
    assert (vae.decode(vae.encode(images)) - before).abs().max() < 1e-4


def test_codebook_takes_the_nearest_vector():
    torch.manual_seed(0)
    codebook = Autoencoder("vq", 8, (1,), 1, 3, 4, groups=4, codebook_size=23).codebook
    z = torch.randn(2, 3, 5, 7)
    codebook.start_from(z)
    q, index = codebook(z)
    distance = (z.permute(0, 2, 3, 1)[..., None, :] - codebook.vectors.weight).norm(dim=-1)     # (2, 5, 7, 23)
    assert torch.equal(index, distance.argmin(-1)) and len(index.unique()) > 5
    assert torch.equal(q.permute(0, 2, 3, 1), codebook.vectors.weight[index])


def test_quantised_gradient_passes_straight_through():
    vae = Autoencoder("vq", 8, (1,), 1, 3, 4, groups=4, codebook_size=23)
    z = torch.randn(2, 3, 5, 7, requires_grad=True)
    quantised, term = vae.quantised(z)
    assert torch.allclose(torch.autograd.grad(quantised.sum(), z, retain_graph=True)[0], torch.ones_like(z))
    q = vae.codebook(z)[0]
    assert torch.allclose(torch.autograd.grad(term, z)[0], 0.25 * 2 * (z - q).detach() / z.numel(), atol=1e-6)


def test_kl_term_is_the_divergence():
    vae = Autoencoder("kl", 8, (1,), 1, 3, 4, groups=4)
    moments = torch.randn(2, 6, 5, 7)
    mean, log_variance = moments.chunk(2, 1)
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(p, torch.distributions.Normal(0., 1.)).sum() / 2
    _, term = vae.gaussian(moments, torch.zeros(2, 3, 20, 28))
    assert abs(term.item() - 1e-6 * expected.item() / (3 * 20 * 28)) < 1e-9


def test_unknown_first_stage_is_refused():
    with pytest.raises(ValueError, match="kl or vq"):
        Autoencoder("vae")
