"""A step runs on as many threads as it keeps busy, and a run leaves the count as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpm_fast import Sampler, Schedule, UNet, UNetConfig, checkpoint, threads


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def within(model, x) -> int:
    with threads.worthwhile(model, x):
        return torch.get_num_threads()


def test_by_the_work_of_a_step():
    model, *_ = checkpoint.load(checkpoint.DIGITS)
    assert within(model, torch.zeros(1, 1, 8, 8)) == 1  # 44 MFLOP
    assert within(model, torch.zeros(16, 1, 8, 8)) == 3  # 697
    assert within(model, torch.zeros(64, 1, 8, 8)) == 4
    points = nn.Sequential(nn.Linear(2, 128), nn.Linear(128, 2))
    assert within(points, torch.zeros(1000, 2)) == 1
    assert within(points, torch.zeros(10**6, 2)) == 4
    assert within(points, torch.zeros(1, 2, 8, 8)) == 4  # unknown: left alone
    assert within(lambda x, t: x, torch.zeros(1, 2)) == 4
    assert torch.get_num_threads() == 4


def test_flops_are_those_of_the_operations():
    """A 3 x 3 convolution is 18 C_in C_out a pixel: nearly all. (Products added in place are not counted.)"""
    config = UNetConfig(
        block_out_channels=(32,),
        down_attention=(False,),
        up_attention=(False,),
        layers_per_block=1,
        mid_attention=False,
        in_channels=4,
        out_channels=4,
    )
    pixels = 3 * 16 * 16
    three = 4 * 32 + 5 * 2 * 32 * 32 + 2 * 32 * 32 + 32 * 4  # in; five blocks, two of them from 64; out
    expected = 18 * pixels * three
    assert threads._flops(UNet(config), torch.zeros(3, 4, 16, 16)) == pytest.approx(expected, rel=0.01)


def test_class_labels_are_given():
    model = UNet(
        UNetConfig(
            block_out_channels=(32,), down_attention=(False,), up_attention=(False,), num_class_embeds=3
        )
    )
    assert threads._flops(model, torch.zeros(2, 3, 8, 8)) > 0


def test_a_run_restores_the_count_also_where_it_fails():
    seen = []

    class Points(nn.Module):
        def __init__(self, fails: bool):
            super().__init__()
            self.layer, self.fails = nn.Linear(2, 2), fails

        def forward(self, x, t):
            seen.append(torch.get_num_threads())
            if self.fails:
                raise ArithmeticError
            return self.layer(x)

    Sampler(Points(False), Schedule.linear(), num_steps=2)(8, shape=(2,))
    assert seen == [1, 1] and torch.get_num_threads() == 4
    with pytest.raises(ArithmeticError):
        Sampler(Points(True), Schedule.linear(), num_steps=2)(8, shape=(2,))
    assert seen == [1, 1, 1] and torch.get_num_threads() == 4
    for *_, _x0 in Sampler(Points(False), Schedule.linear(), num_steps=2).trajectory(8, shape=(2,)):
        assert torch.get_num_threads() == 4
