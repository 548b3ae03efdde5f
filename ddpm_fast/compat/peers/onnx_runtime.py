"""ONNX Runtime: diffusers' U-Net with a static shape, every graph optimisation on, on the CPU."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from ...unet import UNet
from . import Missing, Network, Peer, require
from .diffusers import Plain, unet


def _build(model: UNet, x: Tensor) -> Network:
    require("onnxruntime", "onnx", "onnxscript", "diffusers")
    if x.device.type != "cpu":
        raise Missing("measured on the CPU only")
    import onnxruntime

    file = BytesIO()
    program = torch.onnx.export(Plain(unet(model)), (x, torch.tensor(1)), dynamo=True, verbose=False)
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls: others are timed
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    x_name, t_name = (given.name for given in session.get_inputs())

    def network(x: Tensor, t: int) -> Tensor:
        given = {x_name: x.numpy(), t_name: np.asarray(t, dtype=np.int64)}
        return torch.from_numpy(session.run(None, given)[0])

    return network


PEERS = [Peer("ONNX Runtime", torch.float32, _build)]
