"""How fast training and sampling are, beside diffusers' U-Net of the same widths. Run by hand:

    pip install diffusers
    python tests/bench_train.py [--presets small paper] [--device cpu] [--precision float32] [--compile no yes]
    python tests/bench_train.py --operations                # where the time of a training step goes, preset small

Every network runs in a process of its own: token encoder, loss, gradient clipping, AdamW and weight average are this
project's in all of them, on the same random pictures and latents; only the U-Net changes, and for DDIM the sampler.
Medians over the repeats; DDIM once. Both presets take about seven minutes on two cores.
Writes the rows to .github/results/bench_train-DEVICE.json, where a row replaces an older one of the same kind.
"""
import argparse
import copy
import json
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train                                                        # noqa: E402
from diffusion import Diffusion, arithmetic, choose_device, ema_decay, for_training, update_ema     # noqa: E402

SAMPLES, DDIM_STEPS = 64, 50
COLUMNS = ("preset", "U-Net", "M parameters", "batch", "precision", "compiled", "forward ms", "backward ms",
           "optimizer ms", "images/s", "peak MiB", "% of matmul peak", "DDIM s")


def diffusers_unet(s):
    """diffusers' U-Net with preset s's widths, blocks, heads and groups, called as ours is: (x, t, tokens) -> eps."""
    from diffusers import UNet2DConditionModel
    levels = len(s.multipliers)
    attend = [level < s.attention_levels for level in range(levels)]
    unet = UNet2DConditionModel(
        sample_size=train.latent_shape(s)[1], in_channels=s.latent_channels, out_channels=s.latent_channels,
        block_out_channels=[s.channels * m for m in s.multipliers], layers_per_block=s.res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attend],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)],
        attention_head_dim=s.heads,                                 # despite its name, the number of heads
        cross_attention_dim=s.token_dim, norm_num_groups=s.groups, resnet_time_scale_shift="scale_shift")
    forward = unet.forward
    unet.forward = lambda x, t, tokens: forward(x, t, tokens, return_dict=False)[0]
    return unet


def wait(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device, budget=10.0):
    """Median time of work(), after two unmeasured calls: of at least 3 calls, at most 100, in `budget` seconds."""
    work(), work(), wait(device)
    times = []
    while len(times) < 3 or len(times) < 100 and sum(times) < budget:
        started = time.perf_counter()
        work(), wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matmul_peak(device, dtype):
    """Floating-point operations a second of a large matrix product; on CUDA in float32 by TF32, as convolutions are."""
    n, tf32 = 8192 if device.type == "cuda" else 2048, torch.backends.cuda.matmul.allow_tf32
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    time_each = seconds(lambda: a @ b, device, budget=3.0)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return 2 * n ** 3 / time_each


class Step:
    """One training step of a preset, in the parts that are timed, with our U-Net or diffusers'."""

    def __init__(self, preset, theirs, device, precision, compiled):
        torch.manual_seed(0)
        self.s = s = train.Settings(**{"preset": preset, **train.PRESETS[preset]})
        self.theirs, self.device, self.precision = theirs, device, precision
        encoder, unet = train.build_networks(s)
        unet = diffusers_unet(s) if theirs else unet
        self.modules = [part.to(device, memory_format=torch.channels_last) for part in (encoder, unet)]
        self.ema = copy.deepcopy(unet).requires_grad_(False)
        self.parameters = [p for part in self.modules for p in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-5, s.betas, weight_decay=0.01,
                                           fused=device.type in ("cpu", "cuda"))
        self.encoder, self.unet = (for_training(part, "yes" if compiled else "no") for part in self.modules)
        self.diffusion, B = Diffusion(s.schedule).to(device), s.batch_size
        self.images = torch.rand(B, 3, 64, 64, device=device) * 2 - 1                   # (B, 3, 64, 64)
        self.x_0 = torch.randn(B, *train.latent_shape(s), device=device)                # (B, Z, h, w)
        self.step = 0

    def forward(self):
        t, eps = self.diffusion.draw_t(len(self.x_0)), torch.randn_like(self.x_0)
        with arithmetic(self.precision, self.device):
            tokens = self.encoder(self.images)                                          # (B, N, D)
            return self.diffusion.loss(lambda x, t: self.unet(x, t, tokens), self.x_0, t, eps)

    def update(self):
        self.step += 1
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.modules[1], ema_decay(self.step))

    def whole(self):
        self.optimizer.zero_grad()
        self.forward().backward()
        self.update()

    @torch.no_grad()
    def sample(self, steps=DDIM_STEPS):
        """Latents by DDIM: ours, or the scheduler that belongs to diffusers' U-Net."""
        x_T = torch.randn(SAMPLES, *train.latent_shape(self.s), device=self.device)     # (64, Z, h, w)
        tokens = torch.randn(SAMPLES, self.s.tokens, self.s.token_dim, device=self.device)
        with arithmetic(self.precision, self.device):
            if not self.theirs:
                return self.diffusion.ddim_sample(lambda x, t: self.unet(x, t, tokens), x_T, steps)
            from diffusers import DDIMScheduler
            scheduler, x = DDIMScheduler(1000, 0.0015, 0.0155, "scaled_linear", clip_sample=False), x_T
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(self.unet(x, t.to(self.device).expand(SAMPLES), tokens), t, x).prev_sample
            return x


def measure(preset, theirs, device, precision, compiled):
    """One row of the table, measured in a fresh process."""
    device = choose_device(device)
    peak = matmul_peak(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    step = Step(preset, theirs, device, precision, compiled)
    whole, forward = seconds(step.whole, device), seconds(step.forward, device)
    optimizer = seconds(step.update, device)
    memory = (torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))
    step.sample(2), wait(device)
    started = time.perf_counter()
    step.sample(), wait(device)
    ddim = time.perf_counter() - started
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:     # last: for its memory
        Step(preset, theirs, device, "float32", False).whole()
    million = sum(p.numel() for p in step.modules[1].parameters()) / 1e6
    return dict(zip(COLUMNS, (
        preset, "diffusers" if theirs else "ours", round(million, 2), step.s.batch_size, precision,
        "yes" if compiled else "no", round(1e3 * forward, 1), round(1e3 * (whole - forward - optimizer), 1),
        round(1e3 * optimizer, 1), round(step.s.batch_size / whole, 1), round(memory),
        round(100 * counter.get_total_flops() / whole / peak), round(ddim, 2))), torch=torch.__version__)


def operations(steps=20):
    """Where a training step of preset small spends its time on a CPU: a table of kinds of operations."""
    from torch.profiler import ProfilerActivity, profile
    kinds = {"convolutions, backward": "convolution_backward", "convolutions, forward": "mkldnn_convolution",
             "linear layers (mm, addmm)": "mm addmm", "token MLPs (bmm, baddbmm)": "bmm baddbmm", "copies": "copy_",
             "attention": "_scaled_dot_product_flash_attention_for_cpu "
                          "_scaled_dot_product_flash_attention_for_cpu_backward",
             "norms": "native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward "
                      "native_batch_norm native_batch_norm_backward",
             "activations": "silu silu_backward gelu gelu_backward elu elu_backward clamp_min threshold_backward",
             "sums and products": "mul mul_ add add_ sum cat addcmul div",
             "AdamW, clipping, average": "_fused_adamw_ _foreach_lerp_ _foreach_norm _foreach_mul_ linalg_vector_norm"}
    step = Step("small", False, torch.device("cpu"), "float32", False)
    whole = seconds(step.whole, step.device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step.whole()
    spent = {event.key.removeprefix("aten::"): (event.self_cpu_time_total, event.count)
             for event in profiler.key_averages()}
    total, rows = sum(us for us, _ in spent.values()), []
    for kind, names in kinds.items():
        us, calls = (sum(values) for values in zip(*(spent.pop(name, (0, 0)) for name in names.split())))
        rows.append((kind, 100 * us / total, calls / steps))
    us, calls = (sum(values) for values in zip(*spent.values()))
    print(f"{1e3 * whole:.1f} ms a step\n| operations | share of its time, % | calls a step |\n| --- | --- | --- |")
    for kind, share, calls_a_step in [*sorted(rows, key=lambda row: -row[1]),
                                      ("the rest, PyTorch's own work included", 100 * us / total, calls / steps)]:
        print(f"| {kind} | {share:.1f} | {calls_a_step:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "paper"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--compile", nargs="+", default=["no"], choices=["no", "yes"])
    parser.add_argument("--operations", action="store_true")
    args = parser.parse_args()
    if args.operations:
        return operations()
    device = choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results = ROOT / f".github/results/bench_train-{device.type}.json"
    table = json.loads(results.read_text()) if results.exists() else []
    print(f"torch {torch.__version__}, {name}; DDIM: {DDIM_STEPS} steps, {SAMPLES} images\n| " + " | ".join(COLUMNS) +
          " |\n|" + " --- |" * len(COLUMNS))
    for case in [(preset, theirs, str(device), precision, compiled == "yes") for preset in args.presets
                 for precision in args.precision for compiled in args.compile for theirs in (False, True)]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = pool.submit(measure, *case).result()
        row["device"] = name
        print("| " + " | ".join(str(row[column]) for column in COLUMNS) + " |", flush=True)
        key = lambda row: [row[c] for c in ("preset", "U-Net", "batch", "precision", "compiled", "device", "torch")]
        table = [old for old in table if key(old) != key(row)] + [row]
        results.write_text("[\n" + ",\n".join(map(json.dumps, table)) + "\n]\n")


if __name__ == "__main__":
    main()
