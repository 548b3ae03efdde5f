"""Train the digits that ship with the package: scikit-learn's real 8 x 8 handwritten digits, on the CPU.

    pip install "ddpm_fast[examples]"
    python examples/train_digits.py [--out digits] [--updates 6000]

Fixed seed, minutes on two cores. `digits_data.py` says what is trained on; `evaluate_digits.py` says how good
the result is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_data import train_and_held_out
from tqdm import trange

from ddpm_fast import Schedule, UNet, UNetConfig, checkpoint, ops

CONFIG = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(48, 64),
    layers_per_block=1,
    down_attention=(False, True),
    up_attention=(True, False),
    norm_num_groups=8,
    dropout=0.1,
)
SETTINGS = {"method": "ddim", "prediction": "v", "clip": 1.0}
EMA_DECAY = 0.999


def train(updates: int, batch: int, lr: float, seed: int) -> tuple[UNet, Schedule]:
    """Velocity prediction (Salimans & Ho 2022) on the cosine schedule (Nichol & Dhariwal 2021)."""
    torch.manual_seed(seed)
    images, _ = train_and_held_out()[0]
    schedule = Schedule.cosine(1000)
    table = schedule.tensor()
    model = UNet(CONFIG).to(memory_format=torch.channels_last).train()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    bar = trange(updates, unit="update")
    for update in bar:
        x0 = images[torch.randint(len(images), (batch,))]
        t = torch.randint(len(schedule), (batch,))
        x_t, noise = ops.q_sample_counter(x0, t, table, seed, update * batch)
        v = ops.q_sample(noise, -x0, t, table)  # sqrt(alphas_cumprod) noise - sqrt(1 - alphas_cumprod) x0
        loss = F.mse_loss(model(x_t, t), v)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        ema = min(EMA_DECAY, (1 + update) / (10 + update))
        values = list(model.state_dict().values())
        torch._foreach_lerp_(list(average.values()), values, 1 - ema)
        if update % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.load_state_dict(average)
    return model.eval(), schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, schedule = train(args.updates, args.batch, args.lr, args.seed)
    checkpoint.save(args.out, model, schedule, SETTINGS)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
