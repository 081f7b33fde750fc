"""Schedules, forward process and samplers against closed forms."""
import math

import pytest
import torch

from diffusion import SCHEDULES, Diffusion, beta_schedule


def test_schedules_closed_forms():
    T = 37
    u = torch.arange(T, dtype=torch.float64) / (T - 1)
    first, last = 0.0015, 0.0155
    expected = {
        "linear": (first**0.5 + u * (last**0.5 - first**0.5)) ** 2,
        "sqrt_linear": first + u * (last - first),
        "sqrt": (first + u * (last - first)).sqrt(),
    }
    for name, beta in expected.items():
        assert (beta_schedule(name, T) - beta).abs().max() < 1e-12
    with pytest.raises(ValueError, match="quadratic"):
        beta_schedule("quadratic")


def test_cosine_schedule_gives_the_cosine_abar():
    T = 1000
    abar = (1 - beta_schedule("cosine", T)).cumprod(0)
    u = (torch.arange(1, T + 1, dtype=torch.float64) / T + 0.008) / 1.008
    expected = torch.cos(u * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert (abar - expected)[:-1].abs().max() < 1e-9            # the last beta is clipped
    assert beta_schedule("cosine", T).max() == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_rising_variance(name):
    beta = beta_schedule(name)
    assert beta.shape == (1000,)
    assert 0 < beta.min() < beta.max() < 1
    assert beta[-1] > beta[0]


def test_q_sample_has_the_moments_of_the_chain():
    """20,000 chains of q(x_t | x_{t-1}) (DDPM equation 2) against q_sample's one step."""
    torch.manual_seed(0)
    n, steps = 20000, 60
    diffusion = Diffusion("sqrt_linear", steps)
    x_0 = torch.tensor([1.5, -0.5, 0.25]).expand(n, 3)
    x = x_0
    for beta in beta_schedule("sqrt_linear", steps).float()[:41]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, 3)
    x_t = diffusion.q_sample(x_0, torch.full((n,), 40), torch.randn(n, 3))
    assert (x.mean(0) - x_t.mean(0)).abs().max() < 0.03
    assert (x.std(0) - x_t.std(0)).abs().max() < 0.02
    assert x_t.std(0).min() > 0.3


def test_predict_x0_inverts_q_sample():
    diffusion = Diffusion()
    t = torch.tensor([0, 137, 500, 801, 600])
    x_0, eps = torch.randn(2, 5, 3, 4, 7)
    x_t = diffusion.q_sample(x_0, t, eps)
    assert (diffusion.predict_x0(x_t, t, eps) - x_0).abs().max() < 1e-3


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): two Gaussians in x_{t-1}."""
    diffusion = Diffusion("sqrt", 20)
    beta = beta_schedule("sqrt", 20)
    t, x_0, x_t = 7, 0.7, -0.3
    alpha = 1 - beta[t]
    abar_prev = (1 - beta).cumprod(0)[t - 1]
    precision = alpha / beta[t] + 1 / (1 - abar_prev)
    mean = alpha.sqrt() * x_t / beta[t] + abar_prev.sqrt() * x_0 / (1 - abar_prev)
    got_mean, got_variance = diffusion.posterior(
        torch.tensor([[x_0]]), torch.tensor([[x_t]]), torch.tensor([t])
    )
    assert abs(got_mean.item() - (mean / precision).item()) < 1e-5
    assert abs(got_variance.item() - 1 / precision.item()) < 1e-6


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    diffusion = Diffusion("linear", 50)
    x, eps, noise = torch.randn(3, 3, 2, 5, 7)
    for level in (0, 1, 23, 49):
        t = torch.full((3,), level)
        ddpm = diffusion.ddpm_step(x, t, eps, noise)
        ddim = diffusion.ddim_step(x, t, t - 1, eps, noise, eta=1.0)
        assert (ddpm - ddim).abs().max() < 1e-4
        if level > 0:
            deterministic = diffusion.ddim_step(x, t, t - 1, eps, noise, eta=0.0)
            assert (ddpm - deterministic).abs().max() > 1e-3


def exact_denoiser(diffusion, data):
    """E[eps | x_t] in closed form for a finite data set (n, ...): a softmax over its points."""
    def denoise(x, t):
        a = diffusion.sqrt_abar[t][:, None].double()
        s = diffusion.sqrt_1m_abar[t][:, None].double()
        flat, points = x.flatten(1).double(), data.flatten(1).double()
        distance = (flat[:, None] - a[..., None] * points).square().sum(-1)     # (B, n)
        x_0 = (-distance / (2 * s**2)).softmax(1) @ points
        return ((flat - a * x_0) / s).view_as(x).float()
    return denoise


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim eta 1"])
def test_the_exact_denoiser_recovers_its_data(sampler):
    torch.manual_seed(0)
    diffusion = Diffusion("cosine", 200)
    data = torch.randn(4, 2, 3, 5)
    denoise = exact_denoiser(diffusion, data)
    x_T = torch.randn(33, 2, 3, 5)
    if sampler == "ddpm":
        x = diffusion.ddpm_sample(denoise, x_T)
    else:
        x = diffusion.ddim_sample(denoise, x_T, steps=40, eta=1.0 if "eta" in sampler else 0.0)
    distance, nearest = (x[:, None] - data).flatten(2).norm(dim=2).min(dim=1)
    assert distance.max() < 0.2 < (data[0] - data[1]).norm()
    assert len(nearest.unique()) == 4                           # every point is reached


def test_samplers_repeat_and_refuse():
    diffusion = Diffusion("cosine", 20)
    x_T = torch.randn(2, 1, 3, 5)
    denoise = exact_denoiser(diffusion, torch.randn(4, 1, 3, 5))
    for sample in (diffusion.ddpm_sample, diffusion.ddim_sample):
        arguments = {} if sample == diffusion.ddpm_sample else dict(steps=12, eta=1.0)
        draws = []
        for _ in range(2):
            torch.manual_seed(1)
            draws.append(sample(denoise, x_T, **arguments))
        assert torch.equal(*draws)
    for steps in (1, 9, 21):
        with pytest.raises(ValueError, match=f"10 to 20 .*not {steps}"):
            diffusion.ddim_sample(denoise, x_T, steps)


def test_ddpm_samples_a_narrow_gaussian():
    x_T = torch.randn(4000, 1)
    diffusion = Diffusion("cosine", 100)

    def denoise(x, t):                                          # exact for x_0 ~ N(3, 0.1^2)
        a, s = diffusion.sqrt_abar[t][:, None], diffusion.sqrt_1m_abar[t][:, None]
        return s * (x - 3 * a) / (0.01 * a**2 + s**2)

    x = diffusion.ddpm_sample(denoise, x_T)
    assert abs(x.mean() - 3) < 0.02
    assert abs(x.std() - 0.1) < 0.02



@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tables_stay_float32_and_results_have_their_inputs_type(dtype):
    plain, cast = Diffusion("sqrt_linear", 50), Diffusion("sqrt_linear", 50)
    cast = torch.nn.ModuleList([cast]).to(dtype)[0]  # as a part of a larger module
    assert torch.equal(cast.abar, plain.abar) and cast.abar.dtype == torch.float32 != dtype
    x_0, eps = torch.randn(2, 3, 2, 5, 7, dtype=dtype)
    t = torch.tensor([0, 20, 49])
    x_t = cast.q_sample(x_0, t, eps)
    results = x_t, cast.predict_x0(x_t, t, eps), *cast.posterior(x_0, x_t, t)
    assert {result.dtype for result in results} == {dtype}
    error = plain.q_sample(x_0.float(), t, eps.float()) - x_t.float()
    assert error.abs().max() < 0.02
    for sample in (cast.ddpm_sample, cast.ddim_sample):
        x = sample(lambda x_t, t: x_t, torch.randn(2, 1, 3, 5, dtype=dtype))
        assert x.dtype == dtype and x.isfinite().all()


def test_tables_are_not_in_checkpoints():
    assert not Diffusion().state_dict()


def test_bottleneck_has_the_shares_of_the_papers_figure():
    shares = {"linear": {200: 0.59, 400: 0.25, 600: 0.07}, "sqrt_linear": {200: 0.52, 400: 0.16},
              "cosine": {200: 0.81, 400: 0.57, 600: 0.30}, "sqrt": {100: 0.0}}
    for name, points in shares.items():
        kl = Diffusion(name).kl_to_noise(mean_square=67.6)
        for t, share in points.items():
            assert abs(kl[t] / kl[0] - share) < 0.02
