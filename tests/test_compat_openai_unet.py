"""guided- and improved-diffusion's U-Nets against plain expressions: names, shapes, values; and as `UNet`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from op_cases import check_error_rule
from plain_unets import Weights, attend, openai
from torch import nn

from ddpm_fast.compat.guided_diffusion import unet as guided
from ddpm_fast.compat.improved_diffusion import unet as improved
from ddpm_fast.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.tensor([3, 961])
Y = torch.tensor([4, 0])
PLAIN = {"channels": 32, "mult": (1, 2), "layers": 1, "rates": (2,), "out": 6}
# The names of the options: UNetModel's and the plain expression's.
WORDS = {
    "model_channels": "channels",
    "channel_mult": "mult",
    "num_res_blocks": "layers",
    "attention_resolutions": "rates",
    "out_channels": "out",
    "num_heads": "heads",
    "num_heads_upsample": "heads_up",
    "num_head_channels": "head_channels",
    "num_classes": "classes",
    "use_scale_shift_norm": "film",
    "resblock_updown": "updown",
    "use_new_attention_order": "new_order",
    "conv_resample": "conv_resample",
}
CASES = {
    "plain": {},
    "film-heads": {"film": True, "heads": 4, "layers": 2, "rates": (1, 2)},
    "new-order": {"new_order": True, "heads": 2},
    "64": {"film": True, "updown": True, "head_channels": 16, "new_order": True, "classes": 7},
    "512": {"channels": 64, "mult": (0.5, 1, 2), "film": True, "updown": True, "head_channels": 32},
    "widths-with-one-count-of-heads": {"mult": (1, 2, 3), "rates": (2, 4), "heads": 4},
    "classes": {"classes": 7},
    # None of these is a UNet.
    "heads-upsample": {"heads": 2, "heads_up": 4},
    "no-convolution": {"conv_resample": False},
    "1d": {"dims": 1, "updown": True},
    "3d": {"dims": 3, "film": True},
    "3d-no-convolution": {"dims": 3, "conv_resample": False},
}
FAST = list(CASES)[:7]


class Case:
    """A UNetModel and a plain expression of the same weights."""

    def __init__(self, name: str, kind=guided.UNetModel, **changes):
        options = CASES[name] | changes
        self.dims = options.pop("dims", 2)
        self.options = PLAIN | options
        size = {1: (16,), 2: (16, 16), 3: (3, 8, 8)}[self.dims]
        self.x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        self.y = (Y,) if "classes" in options else ()
        self.weights = Weights(dims=self.dims)
        self.eager = self.plain(self.weights, self.x)
        self.exact = self.plain(self.weights.double(), self.x.double())
        arguments = {ours: self.options[plain] for ours, plain in WORDS.items() if plain in self.options}
        arguments |= {"in_channels": 3, "dims": self.dims}
        if issubclass(kind, guided.UNetModel) and not issubclass(kind, improved.UNetModel):
            arguments["image_size"] = 16
        self.model = kind(**arguments).eval()

    def plain(self, weights, x):
        return openai(weights, x, T, *self.y, **self.options)

    def loaded(self):
        """In the original's names and shapes: nothing is missing, and nothing left over."""
        self.model.load_state_dict(self.weights)
        return self.model

    @torch.no_grad()
    def run(self, model):
        return model(self.x, T, *self.y)


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_plain_expression(name):
    case = Case(name)
    shapes = {name: value.shape for name, value in case.model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in case.weights.items()}
    check_error_rule(case.run(case.loaded()), case.eager, case.exact)


@pytest.mark.parametrize("name", FAST)
def test_as_ddpm_fast_is_the_same_network_on_the_same_memory(name):
    case = Case(name)
    model = case.loaded()
    fast = model.as_ddpm_fast()
    assert type(fast) is UNet
    assert fast.sample_shape == (3, 16, 16)
    assert not fast.training
    out = case.run(fast)
    check_error_rule(out, case.eager, case.exact)
    expected = case.run(model)
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()

    assert model.as_ddpm_fast() is fast
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.9)
    again = model.as_ddpm_fast()
    assert again is fast
    expected = case.run(model)
    assert (case.run(again) - expected).abs().max() <= 2e-6 * expected.abs().max()
    theirs = {value.data_ptr() for value in model.parameters()}
    copied = [name for name, value in fast.named_parameters() if value.data_ptr() not in theirs]
    several = case.options.get("heads", 1) > 1 or "head_channels" in case.options
    assert all(".to_qkv." in name for name in copied)
    assert bool(copied) == (several and "new_order" not in case.options)
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    assert torch.equal(case.run(model.as_ddpm_fast()), case.run(fast))


def test_as_ddpm_fast_follows_the_weights_to_another_place():
    case = Case("film-heads")
    model, fast = case.loaded(), case.model.as_ddpm_fast()
    model.input_blocks[1][0].in_layers[2].weight = nn.Parameter(torch.zeros(32, 32, 3, 3))
    assert model.as_ddpm_fast() is not fast
    expected = case.run(model)
    assert (case.run(model.as_ddpm_fast()) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert copy.deepcopy(model).as_ddpm_fast() is not model.as_ddpm_fast()
    assert list(model.state_dict()) == list(guided_small().state_dict())


def guided_small():
    return Case("film-heads").model


def test_as_ddpm_fast_is_none_where_a_unet_would_be_another_network():
    for name in CASES.keys() - FAST:
        assert Case(name).model.as_ddpm_fast() is None, name
    assert Case("plain", guided.SuperResModel).model.as_ddpm_fast() is None
    model = Case("plain").model
    model.convert_to_fp16()
    assert model.as_ddpm_fast() is None
    model.convert_to_fp32()
    assert model.as_ddpm_fast() is not None
    handle = model.middle_block[1].qkv.register_forward_hook(lambda *_: None)
    assert model.as_ddpm_fast() is None
    handle.remove()
    model.middle_block[1].qkv = type("LoRA", (nn.Conv1d,), {})(64, 192, 1)
    assert model.as_ddpm_fast() is None
    double = type("Mine", (guided.UNetModel,), {"forward": lambda self, x, t: 2 * x})
    assert Case("plain", double).model.as_ddpm_fast() is None


@pytest.mark.parametrize("kind", [guided.UNetModel, improved.UNetModel])
@pytest.mark.parametrize("name", ["plain", "film-heads"])
def test_half_precision_is_the_originals(kind, name):
    """Convolutions before `out` are float16, all else float32."""
    case = Case(name, kind)
    model = case.loaded()
    model.convert_to_fp16()
    halves = {name for name, value in model.state_dict().items() if value.dtype == torch.float16}
    blocks = ("input_blocks", "middle_block", "output_blocks")
    kinds = ("in_layers.2", "out_layers.3", "skip_connection", "qkv", "proj_out", ".op.", ".conv.")
    assert halves == {
        name
        for name in model.state_dict()
        if name.startswith("input_blocks.0.")
        or (name.startswith(blocks) and any(kind in name for kind in kinds))
    }
    if kind is guided.UNetModel:
        model.dtype = torch.float16  # use_fp16=True
    out = case.run(model)
    assert out.dtype == torch.float32
    rounded = Weights({k: v.half() if k in halves else v for k, v in case.weights.items()})
    exact = case.plain(rounded.double(), case.x.double())
    check_error_rule(out.half(), case.plain(rounded, case.x), exact)
    model.convert_to_fp32()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients(use_checkpoint):
    case = Case("64")
    model, exact = case.loaded(), case.weights.double()
    for part in model.modules():
        if hasattr(part, "use_checkpoint"):
            part.use_checkpoint = use_checkpoint
    model(case.x, T, *case.y).square().mean().backward()
    for value in exact.values():
        value.requires_grad_()
    case.plain(exact, case.x.double()).square().mean().backward()
    peak = max(value.grad.abs().max() for value in exact.values())
    for name, value in model.named_parameters():
        wanted = exact[name].grad
        assert (value.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-7 * peak, name


def test_zero_at_the_start():
    model = guided_small()
    zeros = {name.removesuffix(".weight") for name, value in model.named_parameters() if not value.any()}
    zeros = {name for name in zeros if not name.endswith(".bias")}
    assert zeros == {
        name for name, _ in model.named_modules() if name.endswith((".out_layers.3", ".proj_out", "out.2"))
    }
    assert not model(torch.randn(1, 3, 16, 16), torch.tensor([1])).any()


@pytest.mark.parametrize("kind", [guided.SuperResModel, improved.SuperResModel])
def test_super_resolution(kind):
    case, low = Case("plain", kind), torch.randn(2, 3, 5, 7)
    enlarged = F.interpolate(low, (16, 16), mode="bilinear")
    case.x, x = torch.cat([case.x, enlarged], dim=1), case.x
    case.weights = Weights()
    eager = case.plain(case.weights, case.x)
    exact = case.plain(case.weights.double(), case.x.double())
    with torch.no_grad():
        check_error_rule(case.loaded()(x, T, low_res=low), eager, exact)
        if kind is improved.SuperResModel:
            assert len(case.model.get_feature_vectors(x, T, low_res=low)["up"]) == 4
    with pytest.raises(ValueError, match="low_res must be given"):
        case.model(x, T)


def test_feature_vectors():
    case = Case("film-heads", improved.UNetModel)
    with torch.no_grad():
        features = case.loaded().get_feature_vectors(case.x, T)
    case.plain(eager := Weights(case.weights), case.x)
    case.plain(exact := case.weights.double(), case.x.double())
    assert features.keys() == exact.features.keys()
    for name in features:
        ours, plain, wanted = (
            [value[name]] if name == "middle" else value[name]
            for value in (features, eager.features, exact.features)
        )
        assert len(ours) == len(wanted)
        for a, b, c in zip(ours, plain, wanted, strict=True):
            check_error_rule(a, b, c, name)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_classifier(pool):
    options = PLAIN | {"updown": True, "film": True, "head_channels": 16, "out": None}
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def plain(w, x):
        h = openai(w, x, T, **options)
        if pool == "adaptive":
            h = F.silu(w.norm("out.0", h, 1e-5)).mean(dim=(2, 3))
            return w.conv("out.3", h[..., None, None], 5, 1).flatten(1)
        if pool == "attention":
            h = F.silu(w.norm("out.0", h, 1e-5)).flatten(2)
            h = torch.cat([h.mean(2, keepdim=True), h], dim=2)
            h = h + w.draw("out.2.positional_embedding", 64, 65)
            q, k, v = (
                part.reshape(2, 4, 16, 65)
                for part in w.conv("out.2.qkv_proj", h, 192, 1, dims=1).chunk(3, dim=1)
            )
            return w.conv("out.2.c_proj", attend(q, k, v).flatten(1, 2), 5, 1, dims=1)[:, :, 0]
        features = [*w.features["down"], w.features["middle"]]
        h = w.linear("out.0", torch.cat([value.mean(dim=(2, 3)) for value in features], dim=1), 2048)
        if pool == "spatial":
            return w.linear("out.2", h.relu(), 5)
        return w.linear("out.3", F.silu(w.norm("out.1", h, 1e-5)), 5)

    weights = Weights()
    eager = plain(weights, x)
    model = guided.EncoderUNetModel(
        16,
        3,
        32,
        5,
        1,
        (2,),
        channel_mult=(1, 2),
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool=pool,
    )
    model.load_state_dict(weights)
    with torch.no_grad():
        check_error_rule(model(x, T), eager, plain(weights.double(), x.double()))


def test_errors():
    model, x = Case("plain").model, torch.zeros(2, 3, 16, 16)
    with pytest.raises(AssertionError, match=r"if and only if .*: y was, and num_classes is None"):
        model(x, T, Y)
    model = Case("classes").model
    with pytest.raises(AssertionError, match=r"no y was, and num_classes is 7"):
        model(x, T)
    with pytest.raises(AssertionError, match=r"\(2,\), got \(1,\)"):
        model(x, T, Y[:1])
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, got 4"):
        Case("plain").model.__class__(16, 3, 32, 3, 1, (), dims=4)
    with pytest.raises(ValueError, match="must divide 64 channels, got num_heads=3"):
        Case("plain", heads=3)
    arguments = (16, 3, 32, 5, 1, (2,))
    with pytest.raises(AssertionError, match="num_head_channels must be given"):
        guided.EncoderUNetModel(*arguments, channel_mult=(1, 2), pool="attention")
    with pytest.raises(NotImplementedError, match=r"pool must be .*got 'max'"):
        guided.EncoderUNetModel(*arguments, channel_mult=(1, 2), pool="max")
