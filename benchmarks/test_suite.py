"""Every arm of the suite by itself, with pytest-benchmark's statistics.

    pytest benchmarks [--quick] [-k "group_norm_silu and native"]

Arms that are compared belong in one process, in turns: that is ``ddpm-fast bench``, which times these cases.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from ddpm_fast.bench import ops, sampling, steps, training
from ddpm_fast.bench.settings import Settings
from ddpm_fast.compat.peers import Missing

CASES = {
    "ops": ops.cases,
    "step": steps.step_cases,
    "overhead": steps.loop_cases,
    "forward": sampling.forward_cases,
    "run": sampling.run_cases,
    "stream": sampling.stream_cases,
    "training": training.cases,
}


def settings_of(config: pytest.Config) -> Settings:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(device, quick=config.getoption("quick"))


def pytest_generate_tests(metafunc):
    settings = settings_of(metafunc.config)
    parameters = [
        pytest.param(kind, k, arm, id=f"{kind}, {', '.join(map(str, case.labels.values()))}, {arm}")
        for kind, cases in CASES.items()
        for k, case in enumerate(cases(settings))
        for arm in case.arms
    ]
    metafunc.parametrize(("kind", "k", "arm"), parameters)


def test_benchmark(benchmark, request, kind, k, arm):
    settings = settings_of(request.config)
    case = next(islice(CASES[kind](settings), k, None))  # anew: it keeps its inputs
    with torch.no_grad():
        try:
            run = case.arms[arm]()
        except Missing as reason:
            pytest.skip(str(reason))

        def waited():
            run()
            if settings.device.type == "cuda":
                torch.cuda.synchronize()

        waited()
        benchmark.group = f"{kind}, {', '.join(map(str, case.labels.values()))}"
        benchmark.extra_info |= case.labels | {"arm": arm, "calls": case.calls}
        benchmark(waited)
    if case.bytes is not None:
        benchmark.extra_info["GB/s"] = case.bytes / benchmark.stats.stats.median / 1e9
