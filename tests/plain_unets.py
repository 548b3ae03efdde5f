"""U-Nets of other repositories as plain expressions: what is tested is held against them, in float64.

They take no module and no checkpoint: a weight that is asked for the first time is drawn, so that one call
gives the names and shapes too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Weights(dict):
    """Weights by name, and the layers that read them."""

    def __init__(self, *args, dims: int = 2):
        super().__init__(*args)
        self.dims = dims
        self.generator = torch.Generator().manual_seed(0)

    def double(self) -> Weights:
        return Weights({name: value.double() for name, value in self.items()}, dims=self.dims)

    def draw(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        if name not in self:
            self[name] = mean + std * torch.randn(shape, generator=self.generator)
        assert self[name].shape == shape, name
        return self[name]

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        weight = self.draw(f"{name}.weight", out, x.shape[-1], std=x.shape[-1] ** -0.5)
        return F.linear(x, weight, self.draw(f"{name}.bias", out))

    def conv(
        self, name: str, x: Tensor, out: int, size: int = 3, dims: int | None = None, **window
    ) -> Tensor:
        dims = dims or self.dims
        fan_in = x.shape[1] * size**dims
        weight = self.draw(f"{name}.weight", out, x.shape[1], *[size] * dims, std=fan_in**-0.5)
        window = {"padding": size // 2} | window
        return CONV[dims](x.to(weight.dtype), weight, self.draw(f"{name}.bias", out), **window)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight = self.draw(f"{name}.weight", x.shape[1], mean=1.0)
        bias = self.draw(f"{name}.bias", x.shape[1])
        return F.group_norm(x.to(weight.dtype), 32, weight, bias, eps).to(x.dtype)


def sinusoids(t: Tensor, dim: int, like: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    half = dim // 2
    exponent = torch.arange(half, dtype=like.dtype) / (half - shift)
    angle = t[:, None].to(like.dtype) * torch.exp(-math.log(10000) * exponent)
    return angle.sin(), angle.cos()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, channels, pixels) each."""
    weight = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(q.shape[2])
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.einsum("bhts,bhcs->bhct", weight.to(wide).softmax(-1).to(weight.dtype), v)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))


def openai(w, x, t, y=None, *, channels, mult, layers, rates, out, **options):
    """guided-diffusion's UNetModel, or where `out` is None its first half; `rates` are those with attention.

    What the blocks return stays in ``w.features``. Casts are where the original has them.
    """
    film, updown = options.get("film", False), options.get("updown", False)
    convolves = options.get("conv_resample", True)
    emb = torch.cat(sinusoids(t, channels, x, 0)[::-1], dim=1)
    emb = w.linear("time_embed.2", F.silu(w.linear("time_embed.0", emb, 4 * channels)), 4 * channels)
    if y is not None:
        emb = emb + w.draw("label_emb.weight", options["classes"], 4 * channels)[y]

    def half(x):
        return POOL[w.dims](x, (1, 2, 2) if w.dims == 3 else 2)

    def twice(x):
        for dim in range(max(2, x.dim() - 2), x.dim()):  # in 3-d not the slices
            x = x.repeat_interleave(2, dim)
        return x

    def res(name, x, out, resize=lambda x: x):
        h = resize(F.silu(w.norm(f"{name}.in_layers.0", x, 1e-5)))
        x = resize(x)
        h = w.conv(f"{name}.in_layers.2", h, out)
        time = w.linear(f"{name}.emb_layers.1", F.silu(emb), (1 + film) * out)
        time = per_channel(time.to(h.dtype), h)
        if film:
            scale, shift = time.chunk(2, dim=1)
            h = w.norm(f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
        else:
            h = w.norm(f"{name}.out_layers.0", h + time, 1e-5)
        h = w.conv(f"{name}.out_layers.3", F.silu(h), out)
        return h + (x if x.shape[1] == out else w.conv(f"{name}.skip_connection", x, out, 1))

    def attention(name, x, heads):
        batch, width = x.shape[:2]
        heads = width // options["head_channels"] if "head_channels" in options else heads
        qkv = w.conv(f"{name}.qkv", w.norm(f"{name}.norm", x, 1e-5).flatten(2), 3 * width, 1, dims=1)
        if options.get("new_order", False):
            q, k, v = (part.reshape(batch, heads, width // heads, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch, heads, 3 * width // heads, -1).chunk(3, dim=2)
        h = w.conv(f"{name}.proj_out", attend(q, k, v).flatten(1, 2), width, 1, dims=1)
        return x + h.reshape(x.shape)

    widths = [int(factor * channels) for factor in mult]
    heads = options.get("heads", 1)
    stride = (1, 2, 2) if w.dims == 3 else 2
    h = w.conv("input_blocks.0.0", x, widths[0])
    skips, number = [h], 1
    for level, width in enumerate(widths):
        for _ in range(layers):
            h = res(f"input_blocks.{number}.0", h, width)
            if 2**level in rates:
                h = attention(f"input_blocks.{number}.1", h, heads)
            skips.append(h)
            number += 1
        if level < len(widths) - 1:
            if updown:
                h = res(f"input_blocks.{number}.0", h, width, half)
            elif convolves:
                h = w.conv(f"input_blocks.{number}.0.op", h, width, stride=stride)
            else:
                h = half(h)
            skips.append(h)
            number += 1
    h = res("middle_block.0", h, h.shape[1])
    h = attention("middle_block.1", h, heads)
    h = res("middle_block.2", h, h.shape[1])
    w.features = {"down": list(skips), "middle": h, "up": []}
    if out is None:
        return h
    number = 0
    for level, width in [*enumerate(widths)][::-1]:
        for layer in range(layers + 1):
            name = f"output_blocks.{number}"
            h = res(f"{name}.0", torch.cat([h, skips.pop()], dim=1), width)
            if attends := 2**level in rates:
                h = attention(f"{name}.1", h, options.get("heads_up", heads))
            if level and layer == layers:
                last = f"{name}.{1 + attends}"
                if updown:
                    h = res(last, h, width, twice)
                else:
                    h = w.conv(f"{last}.conv", twice(h), width) if convolves else twice(h)
            w.features["up"].append(h)
            number += 1
    return w.conv("out.2", F.silu(w.norm("out.0", h.to(x.dtype), 1e-5)), out)


def ho(w, x, t, *, channels, mult, layers, attended, out=3):
    """The U-Net of Ho et al. 2020 in pesser/pytorch_diffusion's names; `attended`: levels."""
    emb = torch.cat(sinusoids(t, channels, x, 1), dim=1)
    emb = w.linear("temb.dense.1", F.silu(w.linear("temb.dense.0", emb, 4 * channels)), 4 * channels)

    def res(name, x, out):
        h = w.conv(f"{name}.conv1", F.silu(w.norm(f"{name}.norm1", x, 1e-6)), out)
        h = h + per_channel(w.linear(f"{name}.temb_proj", F.silu(emb), out), h)
        h = w.conv(f"{name}.conv2", F.silu(w.norm(f"{name}.norm2", h, 1e-6)), out)
        return h + (x if x.shape[1] == out else w.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(name, x):
        h, width = w.norm(f"{name}.norm", x, 1e-6), x.shape[1]
        q, k, v = (w.conv(f"{name}.{letter}", h, width, 1).flatten(2)[:, None] for letter in "qkv")
        return x + w.conv(f"{name}.proj_out", attend(q, k, v)[:, 0].reshape(x.shape), width, 1)

    return _levels(
        w,
        x,
        channels,
        mult,
        layers,
        attended,
        out,
        res,
        attention,
        1e-6,
        _ho_names(layers),
        pads=(0, 1, 0, 1),
    )


def w86(w, x, t, *, channels, mult, layers, attended):
    """w86763777/pytorch-ddpm's."""
    table = w["time_embedding.timembedding.0.weight"]
    emb = w.linear("time_embedding.timembedding.1", table[t], 4 * channels)
    emb = w.linear("time_embedding.timembedding.3", F.silu(emb), 4 * channels)

    def res(name, x, out):
        h = w.conv(f"{name}.block1.2", F.silu(w.norm(f"{name}.block1.0", x, 1e-5)), out)
        h = h + per_channel(w.linear(f"{name}.temb_proj.1", F.silu(emb), out), h)
        h = w.conv(f"{name}.block2.3", F.silu(w.norm(f"{name}.block2.0", h, 1e-5)), out)
        return h + (x if x.shape[1] == out else w.conv(f"{name}.shortcut", x, out, 1))

    def attention(name, x):
        h, width = w.norm(f"{name}.group_norm", x, 1e-5), x.shape[1]
        q, k, v = (w.conv(f"{name}.proj_{letter}", h, width, 1).flatten(2)[:, None] for letter in "qkv")
        return x + w.conv(f"{name}.proj", attend(q, k, v)[:, 0].reshape(x.shape), width, 1)

    return _levels(
        w,
        x,
        channels,
        mult,
        layers,
        attended,
        3,
        res,
        attention,
        1e-5,
        _w86_names(len(mult), layers),
        pads=None,
    )


def _levels(w, x, channels, mult, layers, attended, out, res, attention, eps, names, pads):
    """The topology that both have; `names` gives those of (way, level, what, layer)."""
    last = len(mult) - 1
    h = w.conv(names("conv_in"), x, channels)
    skips = [h]
    for level, factor in enumerate(mult):
        for layer in range(layers):
            h = res(names("down", level, "block", layer), h, factor * channels)
            if level in attended:
                h = attention(names("down", level, "attn", layer), h)
            skips.append(h)
        if level < last:
            name = names("down", level, "sample", 0)
            padded = (h, {"padding": 1}) if pads is None else (F.pad(h, pads), {"padding": 0})
            h = w.conv(name, padded[0], h.shape[1], stride=2, **padded[1])
            skips.append(h)
    h = res(names("mid", 0, "block", 0), h, h.shape[1])
    h = attention(names("mid", 0, "attn", 0), h)
    h = res(names("mid", 0, "block", 1), h, h.shape[1])
    for level in range(last, -1, -1):
        for layer in range(layers + 1):
            h = res(
                names("up", level, "block", layer), torch.cat([h, skips.pop()], 1), mult[level] * channels
            )
            if level in attended:
                h = attention(names("up", level, "attn", layer), h)
        if level:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = w.conv(names("up", level, "sample", 0), h, h.shape[1])
    return w.conv(names("conv_out"), F.silu(w.norm(names("norm_out"), h, eps)), out)


def _ho_names(layers):
    def names(way, level=None, what=None, layer=None):
        if level is None:
            return way
        if way == "mid":
            return f"mid.{what}_{1 + layer}"
        return f"{way}.{level}.{way}sample.conv" if what == "sample" else f"{way}.{level}.{what}.{layer}"

    return names


def _w86_names(levels, layers):
    ends = {"conv_in": "head", "norm_out": "tail.0", "conv_out": "tail.2"}

    def names(way, level=None, what=None, layer=None):
        if level is None:
            return ends[way]
        if way == "mid":
            name = f"middleblocks.{layer}"
        else:
            before = level * (layers + 1) if way == "down" else (levels - 1 - level) * (layers + 2)
            after = layers if way == "down" else layers + 1
            name = f"{way}blocks.{before + (after if what == 'sample' else layer)}"
        return name + {"block": "", "attn": ".attn", "sample": ".main"}[what]

    return names
