"""The fused ops against eager PyTorch on the CPU: ratios of interleaved rounds, every DDPM shape.

    python benchmarks/bench_ops.py [--rounds 30] [--threads 2] [--json out.json]

Each round times every arm once, one after the other, so that a drift of the clock falls on all alike; what is
reported is the median of the per-round ratios, with its quartiles. `copy_` of the same tensor is an arm too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ddpm_fast import ops, steps
from ddpm_fast.schedule import Schedule

# (B, C, H): the activations that the CIFAR-10 and the 256 x 256 U-Nets of Ho et al. normalise.
WIDTHS = {32: (128, 256, 384), 16: (128, 256, 384, 512), 8: (256, 512), 4: (256, 512)}
NORM_SHAPES = [(b, c, h) for b in (1, 8) for h, widths in WIDTHS.items() for c in widths]
NORM_SHAPES += [(1, 128, 128), (1, 256, 64), (1, 512, 32)]
IMAGE_SHAPES = [(1, 3, 32), (8, 3, 32), (64, 3, 32), (1, 3, 256)]

Arms = dict[str, Callable[[], object]]


def norm_arms(shape, dtype, layout) -> Arms:
    b, c, h = shape
    x = torch.randn(b, c, h, h).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(c).to(dtype), torch.randn(c).to(dtype)
    target = torch.empty_like(x)
    return {
        "ours": lambda: ops.group_norm_silu(x, 32, weight, bias),
        "eager": lambda: F.silu(F.group_norm(x, 32, weight, bias)),
        "copy_": lambda: target.copy_(x),
    }


def q_sample_arms(shape, dtype, layout) -> Arms:
    b, c, h = shape
    x0 = torch.randn(b, c, h, h).to(dtype).contiguous(memory_format=layout)
    noise, target = torch.randn_like(x0), torch.empty_like(x0)
    table = Schedule.linear().tensor()
    t = torch.randint(0, 1000, (b,))

    def eager():
        weights = table[t].to(dtype)
        return weights[:, 0, None, None, None] * x0 + weights[:, 1, None, None, None] * noise

    return {
        "ours": lambda: ops.q_sample(x0, noise, t, table),
        "eager": eager,
        "copy_": lambda: target.copy_(x0),
    }


def step_arms(shape, drawn: bool) -> Arms:
    b, c, h = shape
    x, out, noise = (torch.randn(b, c, h, h) for _ in range(3))
    schedule, i = Schedule.linear(), torch.tensor(3)
    tables = [
        torch.tensor(getattr(schedule, name), dtype=torch.float32)
        for name in (
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_log_variance_clipped",
        )
    ]
    ours = {"seed": torch.tensor(0), "image_index": torch.arange(b)} if drawn else {"noise": noise}
    table = steps.ddpm(schedule).tensor()

    def eager():  # OpenAI's p_sample, its tables on the device
        p, q, a, b_, log_variance = (v[i] for v in tables)
        z = torch.randn_like(x) if drawn else noise
        x0 = (p * x - q * out).clamp(-1, 1)
        return a * x0 + b_ * x + torch.exp(0.5 * log_variance) * z, x0

    return {"ours": lambda: ops.posterior_step(x, out, table, i, **ours), "eager": eager}


def measure(arms: Arms, rounds: int) -> dict:
    """Median times in us and the quartiles of the per-round ratios to `ours`."""
    repeats = {}
    for name, run in arms.items():  # enough calls a round for the clock
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(5e-4 / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    report = {f"{name}_us": statistics.median(values) for name, values in times.items()}
    for name in arms:
        if name != "ours":
            ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
            report[f"{name}/ours"] = statistics.quantiles(ratios, n=4)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    jobs = [
        ("group_norm_silu", shape, str(dtype).removeprefix("torch."), name, norm_arms, (shape, dtype, layout))
        for shape in NORM_SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for name, layout in layouts.items()
    ]
    jobs += [
        ("q_sample", s, "float32", "nchw", q_sample_arms, (s, torch.float32, layouts["nchw"]))
        for s in IMAGE_SHAPES
    ]
    jobs += [("posterior_step given", s, "float32", "nchw", step_arms, (s, False)) for s in IMAGE_SHAPES]
    jobs += [("posterior_step drawn", s, "float32", "nchw", step_arms, (s, True)) for s in IMAGE_SHAPES]

    rows = []
    with torch.inference_mode():
        for op, shape, dtype, layout, make, make_args in tqdm(jobs):
            rows.append(
                {"op": op, "shape": shape, "dtype": dtype, "layout": layout}
                | measure(make(*make_args), args.rounds)
            )
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, eager / ours")
    for row in rows:
        low, median, high = row["eager/ours"]
        b, c, h = row["shape"]
        copy = f"{row['ours_us'] / row['copy__us']:6.2f} copies" if "copy__us" in row else ""
        print(
            f"{row['op']:21}{b:3}x{c}x{h:<4}{row['dtype']:9}{row['layout']:5}"
            f"{row['ours_us']:9.1f} us  {median:6.2f}x [{low:.2f}, {high:.2f}] {copy}"
        )
    for op in dict.fromkeys(row["op"] for row in rows):
        ratios = [row["eager/ours"][1] for row in rows if row["op"] == op]
        print(f"{op}: geometric mean {statistics.geometric_mean(ratios):.2f}x, worst {min(ratios):.2f}x")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
