"""Training steps and sampling, timed beside diffusers' U-Net of the same widths. Run by hand:

    pip install diffusers
    python tests/bench_train.py [--preset small paper] [--device cpu] [--precision float32]
        [--cuda-graphs] [--seconds 60] [--out FILE.json]

Token encoder, loss, optimizer and weight average are this project's in both; only the U-Net
changes. Ours and theirs take steps in turn; medians.
Writes a JSON file, without --out bench_train-DEVICE.json.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from diffusion import Diffusion  # noqa: E402


def diffusers_unet(cfg):
    """diffusers' U-Net of the same widths, blocks, heads and groups, called as ours is."""
    from diffusers import UNet2DConditionModel
    down, up = [], []
    for level in range(len(cfg.multipliers)):
        attends = level < cfg.attention_levels
        down.append("CrossAttnDownBlock2D" if attends else "DownBlock2D")
        up.insert(0, "CrossAttnUpBlock2D" if attends else "UpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=train.latent_shape(cfg)[1],
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        block_out_channels=[cfg.channels * m for m in cfg.multipliers],
        layers_per_block=cfg.res_blocks,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=cfg.heads,                           # the number of heads, in fact
        cross_attention_dim=cfg.token_dim,
        norm_num_groups=cfg.groups,
        resnet_time_scale_shift="scale_shift",
    )
    forward = unet.forward

    def call(x_t, t, tokens):
        return forward(x_t, t, tokens, return_dict=False)[0]
    unet.forward = call
    return unet


class Step:
    """A training step of a preset, as in train.train_tokens, on random images and latents."""

    def __init__(self, cfg, unet, device):
        torch.manual_seed(0)
        self.cfg, self.device = cfg, device
        self.encoder = train.build_encoder(cfg).to(device, memory_format=torch.channels_last)
        self.unet = unet.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(unet).requires_grad_(False)
        if cfg.cuda_graphs:
            train.record_graphs(self.encoder, self.unet, cfg)
        self.params = [*self.encoder.parameters(), *self.unet.parameters()]
        self.optimizer = torch.optim.AdamW(self.params, 1e-5, cfg.betas, fused=device.type != "mps")
        self.diffusion = Diffusion(cfg.schedule).to(device)
        self.images = torch.rand(cfg.batch_size, 3, 64, 64, device=device) * 2 - 1
        self.x_0 = torch.randn(cfg.batch_size, *train.latent_shape(cfg), device=device)

    def __call__(self):
        t = torch.randint(1000, (len(self.x_0),), device=self.device)
        eps = torch.randn_like(self.x_0)
        x_t = self.diffusion.q_sample(self.x_0, t, eps)
        with train.autocast(self.cfg, self.device):
            loss = F.l1_loss(self.unet(x_t, t, self.encoder(self.images)), eps)
        self.optimizer.zero_grad()
        loss.backward()
        if self.cfg.clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.cfg.clip)
        self.optimizer.step()
        train.update_ema(self.ema, self.unet, 0.999)

    def sample(self):
        """64 latents by 50 steps of DDIM."""
        x_T = torch.randn(64, *train.latent_shape(self.cfg), device=self.device)
        tokens = torch.randn(64, self.cfg.tokens, self.cfg.token_dim, device=self.device)
        self.unet.eval()
        with train.autocast(self.cfg, self.device):
            self.diffusion.ddim_sample(lambda x_t, t: self.unet(x_t, t, tokens), x_T)


def seconds(work, device):
    """The time of one call."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(preset, precision, way, device, budget):
    """Two rows, ours and diffusers': milliseconds per step, images per second, seconds of DDIM."""
    cfg = train.Config(preset=preset, precision=precision, **way, **train.PRESETS[preset])
    steps = {"ours": Step(cfg, train.build_unet(cfg), device),
             "diffusers": Step(cfg, diffusers_unet(cfg), device)}
    times = {name: [] for name in steps}
    started = time.perf_counter()
    while len(times["ours"]) < 5 or time.perf_counter() - started < budget:
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    rows = []
    for name, step in steps.items():
        median = statistics.median(times[name][2:])             # the first two warm up
        rows.append({
            "preset": preset, "unet": name, "precision": precision,
            "cuda_graphs": cfg.cuda_graphs, "batch": cfg.batch_size,
            "parameters": sum(p.numel() for p in step.unet.parameters()),
            "ms_per_step": round(1000 * median, 2), "steps": len(times[name]),
            "images_per_second": round(cfg.batch_size / median, 1),
            "ddim_seconds": round(seconds(step.sample, device), 2),
        })
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["small", "paper"])
    parser.add_argument("--precision", nargs="+", default=["float32"])
    parser.add_argument("--cuda-graphs", action="store_true", help="measure recorded ones, too")
    parser.add_argument("--seconds", type=float, default=60.0, help="of steps, for a pair of rows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="", help="the JSON file")
    args = parser.parse_args()
    device = train.choose_device(args.device)
    train.allow_tf32(True)  # as in train.main
    ways = [{}]
    if args.cuda_graphs:
        ways.append({"cuda_graphs": True})
    rows = []
    for preset in args.preset:
        for precision in args.precision:
            for way in ways:
                rows += measure(preset, precision, way, device, args.seconds)
                print(*rows[-2:], sep="\n", flush=True)
    machine = train.machine(device, "tests/bench_train.py", sys.argv[1:])
    out = Path(args.out or f"bench_train-{device.type}.json")
    train.write_json(out, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
