"""OpenVINO: diffusers' U-Net with a static shape, compiled for latency, on the CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...unet import UNet
from . import Missing, Network, Peer, require
from .diffusers import Plain, unet


def _build(model: UNet, x: Tensor, *, precision: str) -> Network:
    require("openvino", "diffusers")
    if x.device.type != "cpu":
        raise Missing("measured on the CPU only")
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Missing("OpenVINO does not compute in bfloat16 on this processor")
    t = torch.tensor(1)
    graph = openvino.convert_model(Plain(unet(model)), example_input=(x, t), input=[list(x.shape), []])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def network(x: Tensor, t: int) -> Tensor:
        given = [x.numpy(), np.asarray(t, dtype=np.int64)]
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return network


PEERS = [
    Peer("OpenVINO", torch.float32, partial(_build, precision="f32")),
    Peer("OpenVINO, bfloat16", torch.bfloat16, partial(_build, precision="bf16")),
]
