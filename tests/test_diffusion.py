"""Schedules, forward process, samplers and EMA against closed forms."""
import math

import pytest
import torch

from diffusion import SCHEDULES, Diffusion, Reconstruction, beta_schedule, ema_decay, update_ema


def test_schedules_closed_forms():
    T = 37
    u = torch.arange(T, dtype=torch.float64) / (T - 1)
    b0, b1 = 0.0015, 0.0155
    expected = {"linear": (b0 ** 0.5 + u * (b1 ** 0.5 - b0 ** 0.5)) ** 2, "sqrt_linear": b0 + u * (b1 - b0),
                "sqrt": (b0 + u * (b1 - b0)).sqrt()}
    for name, beta in expected.items():
        assert (beta_schedule(name, T) - beta).abs().max() < 1e-12
        assert beta_schedule(name, T).dtype == torch.float64


def test_cosine_schedule_gives_the_cosine_abar():
    T = 1000
    abar = (1 - beta_schedule("cosine", T)).cumprod(0)
    f = [math.cos(((i + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T)]
    expected = torch.tensor(f, dtype=torch.float64) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert (abar - expected)[:-1].abs().max() < 1e-9                # the last beta is clipped at 0.999
    assert beta_schedule("cosine", T).max() == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_a_variance(name):
    beta = beta_schedule(name)
    assert beta.shape == (1000,) and beta.min() > 0 and beta.max() < 1
    assert beta_schedule(name)[-1] > beta_schedule(name)[0]


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="quadratic"):
        beta_schedule("quadratic")
    with pytest.raises(ValueError, match="0"):
        beta_schedule("linear", 0)


def test_q_sample_mean_and_variance_by_stepping_the_chain():
    """10,000 chains of q(x_t | x_{t-1}) (DDPM equation 2) have the moments that q_sample has in one step."""
    torch.manual_seed(0)
    diffusion, beta, n = Diffusion("sqrt_linear", 60), beta_schedule("sqrt_linear", 60).float(), 20000
    x_0 = torch.tensor([1.5, -0.5, 0.25]).expand(n, 3)
    x = x_0
    for b in beta[:41]:
        x = (1 - b).sqrt() * x + b.sqrt() * torch.randn(n, 3)
    t = torch.full((n,), 40)
    once = diffusion.q_sample(x_0, t, torch.randn(n, 3))
    assert (x.mean(0) - once.mean(0)).abs().max() < 0.03
    assert (x.std(0) - once.std(0)).abs().max() < 0.02
    assert once.std(0).min() > 0.3                                  # there is noise to speak of


def test_predict_x0_inverts_q_sample():
    diffusion, t = Diffusion(), torch.tensor([0, 137, 500, 801, 600])
    x_0, eps = torch.randn(5, 3, 4, 7), torch.randn(5, 3, 4, 7)
    assert (diffusion.predict_x0(diffusion.q_sample(x_0, t, eps), t, eps) - x_0).abs().max() < 1e-3


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: two Gaussians in x_{t-1}."""
    diffusion, beta, t = Diffusion("sqrt", 20), beta_schedule("sqrt", 20), 7
    abar_prev = (1 - beta).cumprod(0)[t - 1]
    x_0, x_t = 0.7, -0.3
    precision = (1 - beta[t]) / beta[t] + 1 / (1 - abar_prev)
    mean = ((1 - beta[t]).sqrt() * x_t / beta[t] + abar_prev.sqrt() * x_0 / (1 - abar_prev)) / precision
    got_mean, got_variance = diffusion.posterior(torch.tensor([[x_0]]), torch.tensor([[x_t]]), torch.tensor([t]))
    assert abs(got_mean.item() - mean.item()) < 1e-5
    assert abs(got_variance.item() - 1 / precision.item()) < 1e-6


def test_ddim_with_eta_1_over_all_steps_is_the_ddpm_posterior():
    diffusion = Diffusion("linear", 50)
    x, eps, noise = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    for level in (0, 1, 23, 49):
        t = torch.full((3,), level)
        ddpm = diffusion.ddpm_step(x, t, eps, noise)
        ddim = diffusion.ddim_step(x, t, t - 1, eps, noise, eta=1.0)
        assert (ddpm - ddim).abs().max() < 1e-4
        if level:
            assert (ddpm - diffusion.ddim_step(x, t, t - 1, eps, noise, eta=0.0)).abs().max() > 1e-3


def exact_denoiser(diffusion, data):
    """E[eps | x_t] in closed form for a finite data set (n, ...): a softmax over the data points."""
    def denoise(x, t):
        a, s = diffusion.sqrt_abar[t][:, None].double(), diffusion.sqrt_1m_abar[t][:, None].double()
        flat, points = x.flatten(1).double(), data.flatten(1).double()
        log_p = -((flat[:, None] - a[..., None] * points) ** 2).sum(-1) / (2 * s ** 2)          # (B, n)
        x_0 = log_p.softmax(1) @ points
        return ((flat - a * x_0) / s).view_as(x).float()
    return denoise


@pytest.mark.parametrize("how", ["ddpm", "ddim", "ddim eta 1", "ddim 1 step"])
def test_the_exact_denoiser_recovers_its_data(how):
    torch.manual_seed(0)
    diffusion, data = Diffusion("linear", 200), torch.randn(4, 2, 3, 5)
    denoise, x_T = exact_denoiser(diffusion, data), torch.randn(33, 2, 3, 5)
    if how == "ddpm":
        x = diffusion.ddpm_sample(denoise, x_T)
    elif how == "ddim 1 step":                                      # at level 0, where noise hardly counts as such
        x = diffusion.ddim_sample(denoise, x_T, steps=1)
    else:
        x = diffusion.ddim_sample(denoise, x_T, steps=40, eta=1.0 if "eta" in how else 0.0)
    distance = (x[:, None] - data).flatten(2).norm(dim=2).min(1).values                        # to the nearest point
    assert distance.max() < 0.2 < (data[0] - data[1]).norm()
    nearest = (x[:, None] - data).flatten(2).norm(dim=2).argmin(1)
    assert len(nearest.unique()) == 4                               # every data point is reached


def test_samplers_are_repeatable_and_ddim_refuses_impossible_steps():
    diffusion, x_T = Diffusion("linear", 20), torch.randn(2, 1, 3, 5)
    denoise = exact_denoiser(diffusion, torch.randn(4, 1, 3, 5))
    draws = [diffusion.ddpm_sample(denoise, x_T, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    draws = [diffusion.ddim_sample(denoise, x_T, 7, 1.0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    for steps in (0, 21):
        with pytest.raises(ValueError, match=str(steps)):
            diffusion.ddim_sample(denoise, x_T, steps)


def test_loss_is_the_distance_to_the_noise():
    diffusion, t = Diffusion(), torch.tensor([3, 500, 999])
    x_0, eps = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    assert diffusion.loss(lambda x, t: eps, x_0, t, eps).item() == 0
    assert abs(diffusion.loss(lambda x, t: eps - 2, x_0, t, eps, "l1").item() - 2) < 1e-5
    assert abs(diffusion.loss(lambda x, t: eps - 2, x_0, t, eps, "l2").item() - 4) < 1e-5


def test_tables_are_not_in_checkpoints():
    assert not Diffusion().state_dict()


def test_ema():
    torch.manual_seed(0)
    model, ema = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.fill_(2.0)
    model.running_mean.fill_(7.0)
    update_ema(ema, model, 0.75)
    assert torch.allclose(ema.weight, torch.full((3,), 1.25)) and torch.equal(ema.running_mean, model.running_mean)
    assert ema_decay(1) == 2 / 11 and ema_decay(10 ** 9) == 0.9999 and ema_decay(10 ** 9, 0.9) == 0.9


def test_reconstruction_ignores_noise_and_level():
    """The ablation without diffusion: the network is asked once, always with the same x and t = 0."""
    seen = []

    def denoise(x, t):
        seen.append((x, t))
        return x + 0.5

    x_0 = torch.randn(5, 3, 2, 7)
    losses = [Reconstruction((3, 2, 7)).loss(denoise, x_0, torch.full((5,), t), torch.randn_like(x_0)) for t in (3, 900)]
    out = Reconstruction((3, 2, 7)).ddim_sample(denoise, torch.randn_like(x_0), 50)
    assert torch.equal(*losses) and len(seen) == 3
    for x, t in seen:
        assert torch.equal(x, seen[0][0]) and torch.equal(x[:1].expand_as(x), x) and not t.any() and x.std() > 0.5
    assert torch.equal(out, seen[0][0] + 0.5) and (losses[0] - (out - x_0).abs().mean()).abs() < 1e-6
    assert (Reconstruction((3, 2, 7)).loss(denoise, x_0, kind="l2") - (out - x_0).square().mean()).abs() < 1e-6
