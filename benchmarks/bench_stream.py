"""Continuous batching beside batches that wait for their slowest: the digits, 10- and 50-step requests.

    python benchmarks/bench_stream.py [--requests 96] [--batch 8] [--rounds 5]

The same requests, in the same order, three ways: in batches that compute all their places until the longest
request is done; in batches that drop a place when its request is done, but take no new one; and in a stream.
The arms run one after the other in every round; printed is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from ddpm_fast import Request, Sampler, checkpoint

LENGTHS = (10, 50)


def arms(count: int, batch: int) -> dict[str, Callable[[], None]]:
    model, schedule, settings = checkpoint.load(checkpoint.DIGITS)
    settings = {"prediction": settings["prediction"], "method": "ddim"}
    samplers = {n: Sampler(model, schedule, num_steps=n, **settings) for n in LENGTHS}
    choose = random.Random(0)
    requests = [Request(image_index=k, num_steps=choose.choice(LENGTHS)) for k in range(count)]
    groups = [requests[k : k + batch] for k in range(0, count, batch)]

    def full() -> None:
        for group in groups:
            slowest = max(request.num_steps for request in group)
            samplers[slowest](len(group), first_image=group[0].image_index)

    def shrinking() -> None:
        for group in groups:
            list(samplers[LENGTHS[-1]].stream(group, batch_size=batch))

    def stream() -> None:
        list(samplers[LENGTHS[-1]].stream(requests, batch_size=batch))

    return {"full batches": full, "shrinking batches": shrinking, "stream": stream}


def measure(count: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, by round."""
    runs = arms(count, batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds = measure(args.requests, args.batch, args.rounds)
    for name, taken in seconds.items():
        ratios = [slow / fast for slow, fast in zip(taken, seconds["stream"], strict=True)]
        rate = args.requests / statistics.median(taken)
        print(f"{name}: {rate:.0f} images/s; the stream is {statistics.median(ratios):.2f}x as fast")


if __name__ == "__main__":
    main()
