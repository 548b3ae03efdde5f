"""The fused ops. Each works on every device: a kernel where one is built, plain PyTorch elsewhere."""

from ._checks import as_image_index, as_seed
from .attention import attention
from .conv3x3 import PackedConv3x3, conv3x3, conv3x3_packed, pack_conv3x3
from .counter_normal import counter_normal, philox4x32_10
from .dropout import dropout
from .fingerprint import fingerprint
from .group_norm_fold import group_norm_fold
from .group_norm_silu import group_norm_silu
from .group_norm_silu_concat import group_norm_silu_concat
from .linear import PackedLinear, linear_packed, pack_linear
from .posterior_step import bind_step, posterior_step, posterior_step_
from .q_sample import q_sample, q_sample_counter

__all__ = [
    "PackedConv3x3",
    "PackedLinear",
    "as_image_index",
    "as_seed",
    "attention",
    "bind_step",
    "conv3x3",
    "conv3x3_packed",
    "counter_normal",
    "dropout",
    "fingerprint",
    "group_norm_fold",
    "group_norm_silu",
    "group_norm_silu_concat",
    "linear_packed",
    "pack_conv3x3",
    "pack_linear",
    "philox4x32_10",
    "posterior_step",
    "posterior_step_",
    "q_sample",
    "q_sample_counter",
]
