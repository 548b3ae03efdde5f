"""UNet: equal to diffusers' UNet2DModel over configs, layouts and dtypes; traceable; its errors."""

import json
from dataclasses import replace

import pytest
import torch
from op_cases import check_error_rule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from ddpm_fast.unet import ResBlock, UNet, UNetConfig, timestep_embedding

GOOGLE = {
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
D, U, AD, AU = "DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
CONFIGS = {
    "google-cifar10-32": GOOGLE
    | {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": (D, AD, D, D),
        "up_block_types": (U, U, AU, U),
    },
    "google-256": GOOGLE
    | {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (D, D, D, D, AD, D),
        "up_block_types": (U, AU, U, U, U, U),
    },
    "hf-defaults": {  # train_unconditional.py, narrower
        "sample_size": 32,
        "block_out_channels": (32, 32, 64, 64, 96, 96),
        "down_block_types": (D, D, D, D, AD, D),
        "up_block_types": (U, AU, U, U, U, U),
    },
    "scale-shift-classes": {
        "sample_size": (16, 24),
        "block_out_channels": (32, 64),
        "down_block_types": (AD, D),
        "up_block_types": (AU, U),
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 7,
        "attention_head_dim": 16,
        "out_channels": 6,
        "time_embedding_dim": 72,
        "mid_block_scale_factor": 1.5,
    },
    "odd": {
        "sample_size": 12,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (24, 40, 48),
        "down_block_types": (AD, D, AD),
        "up_block_types": (U, AU, AU),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 3,
        "norm_eps": 1e-5,
        "attention_head_dim": 8,
        "flip_sin_to_cos": True,
        "freq_shift": 1,
        "downsample_padding": 1,
        "center_input_sample": True,
    },
    "resblock-updown": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", AD, AD),
        "up_block_types": (AU, AU, "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 1,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 16,
        "num_class_embeds": 7,
    },
    "no-mid-attention": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": (D, D),
        "up_block_types": (U, U),
        "add_attention": False,
    },
}
SMALL = UNetConfig((16, 32), (False, True), (True, False), norm_num_groups=8, sample_size=8)

pytestmark = pytest.mark.usefixtures("one_thread")


def diffusers_model(name: str, dtype: torch.dtype = torch.float32):
    """A UNet2DModel with random weights, in the norms too: there, 1 and 0 would hide a mistake."""
    reason = "the reference is diffusers' UNet2DModel"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**CONFIGS[name])
    for key, value in model.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(value, 1.0 if key.endswith("weight") else 0.0, 0.2)
    return model.to(dtype).eval()


def converted(model) -> UNet:
    from ddpm_fast.checkpoint import load_diffusers

    return load_diffusers(model)[0]


def inputs(name: str, batch: int) -> dict[str, torch.Tensor]:
    config, generator = CONFIGS[name], torch.Generator().manual_seed(1)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(batch, config.get("in_channels", 3), height, width, generator=generator)
    given = {"x": x, "t": torch.tensor([3, 961, 500][:batch])}
    if classes := config.get("num_class_embeds"):
        given["class_labels"] = torch.randint(classes, (batch,), generator=generator)
    return given


def run_diffusers(model, x, t, class_labels=None) -> torch.Tensor:
    return model(x, t, class_labels).sample


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    assert ours.isfinite().all()
    return float((ours - reference).abs().max() / reference.abs().max())


def random_unet(config: UNetConfig = SMALL) -> UNet:
    """Also where a fresh U-Net has zeros: those hide the blocks that they end."""
    torch.manual_seed(0)
    model = UNet(config)
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0, 0.1)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_float32_equals_diffusers(name):
    theirs = diffusers_model(name)
    ours = converted(theirs)
    given = inputs(name, batch=1 if name == "google-256" else 2)
    expected = run_diffusers(theirs, **given)
    out = ours(**given)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert relative_error(out, expected) <= 1e-5
    if name == "google-256":  # one forward each: it takes seconds
        return
    given["x"] = given["x"].to(memory_format=torch.channels_last)
    out = ours.to(memory_format=torch.channels_last)(**given)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "google-256"])
@torch.inference_mode()
def test_bfloat16_is_as_exact_as_diffusers(name):
    """The error rule, against diffusers in float64 on the same bfloat16 weights and input."""
    theirs = diffusers_model(name, torch.bfloat16)
    ours = converted(theirs)
    given = inputs(name, batch=2)
    given["x"] = given["x"].bfloat16()
    as_shipped = run_diffusers(theirs, **given).double()
    outs = [ours(**given)]
    given["x"] = given["x"].to(memory_format=torch.channels_last)
    outs.append(ours.to(memory_format=torch.channels_last)(**given))
    exact = run_diffusers(theirs.double(), **given | {"x": given["x"].double()})
    peak = exact.abs().max()
    allowed = 2 * (as_shipped - exact).abs().max() + torch.finfo(torch.bfloat16).eps * peak
    for out in outs:
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() <= allowed


@torch.inference_mode()
def test_float64_runs_in_float64():
    theirs = diffusers_model("odd", torch.float64)
    given = inputs("odd", batch=2)
    given["x"] = given["x"].double()
    # their sinusoid stays float32; at t = 0 and 1 both know it to 1e-7
    given["t"] = torch.tensor([0, 1])
    out = converted(theirs)(**given)
    assert out.dtype == torch.float64
    assert relative_error(out, run_diffusers(theirs, **given)) <= 1e-6


def test_mid_attention_keeps_the_norm_that_diffusers_gives_it():
    def groups(**changes):
        norm = UNet(replace(SMALL, **changes)).mid_block.attentions[0].group_norm
        return None if norm is None else norm.num_groups

    assert groups() == 8
    assert groups(attn_norm_num_groups=4) == 4
    assert groups(resnet_time_scale_shift="scale_shift") is None
    assert groups(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4) == 4


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [6, 7, 128])
def test_timestep_embedding_equals_diffusers(dim, shift, flip):
    reason = "the reference is diffusers' get_timestep_embedding"
    pytest.importorskip("diffusers", reason=reason)
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 500, 999])
    ours = timestep_embedding(t, dim, flip_sin_to_cos=flip, freq_shift=shift)
    assert torch.equal(ours, get_timestep_embedding(t, dim, flip, shift))
    exact = timestep_embedding(t.double(), dim, flip_sin_to_cos=flip, freq_shift=shift)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-4)  # float32 angles up to 999


@torch.inference_mode()
def test_every_form_of_t():
    model, x = random_unet(), torch.randn(2, 3, 8, 8)
    expected = model(x, torch.tensor([7, 7]))
    for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(model(x, t), expected)
    assert not torch.equal(model(x, 7.5), expected)


WIDE = UNetConfig((128, 256), (False, False), (False, False), norm_num_groups=32, layers_per_block=1)
"""As wide as google/ddpm-cifar10-32: where a BLAS has other kernels for a few rows than for many."""


@torch.inference_mode()
def test_timestep_scale():
    model, x = random_unet(replace(SMALL, timestep_scale=0.25)), torch.randn(2, 3, 8, 8)
    plain = random_unet()
    assert torch.equal(model(x, torch.tensor([40, 4])), plain(x, torch.tensor([10, 1])))
    assert torch.equal(model(x, 3), plain(x, 0.75))


@torch.inference_mode()
def test_heads_are_counted_or_have_a_width():
    config = replace(SMALL, block_out_channels=(32, 32))
    counted, wide = (
        random_unet(replace(config, **heads))
        for heads in ({"num_attention_heads": 4}, {"attention_head_dim": 8})
    )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(counted(x, 3), wide(x, 3))
    assert not torch.equal(counted(x, 3), random_unet(config)(x, 3))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        WIDE,
        replace(SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
        replace(SMALL, num_class_embeds=7),
        replace(WIDE, resnet_time_scale_shift="scale_shift", num_class_embeds=3),
        replace(SMALL, resblock_updown=True, timestep_scale=0.3, timestep_input_dim=24),
    ],
    ids=["add", "wide", "scale_shift", "classes", "wide-scale_shift-classes", "updown-time"],
)
@torch.inference_mode()
def test_time_rows_are_bit_equal_to_a_call(config, batch):
    model, x = random_unet(config), torch.randn(batch, 3, 8, 8)
    given = () if config.num_class_embeds is None else (torch.arange(batch) % 2 * 2,)
    timesteps = torch.arange(980, -1, -20)
    rows = model.time_rows(timesteps, *given)
    assert len(rows.values) == 50 * (1 if not given else min(batch, 2))
    for i in (torch.tensor(0), torch.tensor(49), torch.tensor(17), torch.tensor([49, 0, 3, 17, 3][:batch])):
        assert torch.equal(model.forward_rows(x, rows, i), model(x, timesteps[i], *given))
    last = x.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    out = model.forward_rows(last, rows, i)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, model(last, timesteps[i], *given))


@torch.inference_mode()
def test_time_rows_in_bfloat16():
    """Not bit-equal: a bfloat16 product of one row and of many differ. The error rule, against float64."""
    model, x, timesteps = random_unet(WIDE).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16(), torch.arange(50)
    i = torch.tensor([7, 40])
    rows, plain = model.time_rows(timesteps), model(x, timesteps[i])
    assert rows.values.dtype == torch.bfloat16
    exact = model.double()(x.double(), timesteps[i])
    check_error_rule(model.bfloat16().forward_rows(x, rows, i), plain, exact)


@torch.inference_mode()
def test_time_rows_show_the_weights_of_their_making():
    model, x, t = random_unet(), torch.randn(1, 3, 8, 8), torch.tensor([5, 3])
    old = model.time_rows(t)
    for name in ("time_emb_proj.bias", "conv2.bias"):
        model.up_blocks[0].resnets[0].get_parameter(name).add_(1)
    i = torch.tensor(1)
    assert not torch.equal(model.forward_rows(x, old, i), model(x, t[i]))
    assert torch.equal(model.forward_rows(x, model.time_rows(t), i), model(x, t[i]))


def test_is_plain():
    model = random_unet()
    assert model.is_plain()
    handle = model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: None)
    assert not model.is_plain()
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *_: None)
    assert not model.is_plain()
    handle.remove()
    assert model.is_plain()
    model.forward = model.forward
    assert not model.is_plain()
    assert not type("Mine", (UNet,), {})(SMALL).is_plain()


def test_gradients_are_those_of_diffusers(diffusers):
    """In every parameter, against float64; under autocast they are finite and come close."""
    theirs = diffusers_model("odd").train()
    ours = converted(theirs).train()
    given = inputs("odd", batch=2)

    def gradients(model, run):
        model.zero_grad()
        run().float().square().mean().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    got = gradients(ours, lambda: ours(**given))
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(ours, lambda: ours(**given))
    run_diffusers(theirs, **given).square().mean().backward()
    exact = load_gradients(theirs)
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, name
        assert (near[name] - value).norm() <= 0.1 * value.norm() + 1e-4, name


def load_gradients(model) -> dict[str, torch.Tensor]:
    """A diffusers model's gradients under the names of ours: converted as its weights are."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.grad)
    return dict(converted(model).named_parameters())


@pytest.mark.parametrize(("shift", "backend"), [("default", "eager"), ("scale_shift", "aot_eager")])
@torch.inference_mode()
def test_traces_without_a_graph_break(shift, backend):
    torch.compiler.reset()
    model = random_unet(
        replace(SMALL, resnet_time_scale_shift=shift, num_class_embeds=3, attention_head_dim=8)
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    for t in (torch.tensor([7, 900]), torch.tensor(7)):
        torch.testing.assert_close(compiled(x, t, labels), model(x, t, labels), rtol=1e-6, atol=1e-6)
    x = x.to(memory_format=torch.channels_last)
    out = compiled(x, t, labels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, model(x, t, labels), rtol=1e-6, atol=1e-6)


def test_never_asks_the_host():
    """What a CUDA graph captures reads no value back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    refused = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in refused, f"{func} waits for the device"
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Refuse():
        random_unet()(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize("updown", [False, True])
def test_untrained_network_predicts_zero(updown):
    model = UNet(replace(SMALL, resblock_updown=updown))
    assert not model(torch.randn(2, 3, 8, 8), 5).any()
    zeros = {name for name, value in model.named_parameters() if "weight" in name and not value.any()}
    blocks = [name for name, _ in model.named_modules() if name.endswith((".conv2", ".to_out"))]
    assert zeros == {f"{name}.weight" for name in [*blocks, "conv_out"]}


def test_blocks_may_be_wrapped():
    """As for checkpoints of activations."""
    model = random_unet(replace(SMALL, resblock_updown=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x, 5)
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, ResBlock))
    found = model(x, 5)
    found.sum().backward()
    assert torch.equal(found, expected)


def test_every_parameter_gets_a_gradient():
    config = replace(SMALL, num_class_embeds=3, resnet_time_scale_shift="scale_shift", resblock_updown=True)
    model = random_unet(config).train()
    model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).square().sum().backward()
    assert [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()
    ] == []


def test_dropout_acts_in_training_only():
    model, x = random_unet(replace(SMALL, dropout=0.5)), torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x, 1), model(x, 1))
    model.train()
    assert not torch.equal(model(x, 1), model(x, 1))


def test_state_dict_round_trip():
    model, x = random_unet(), torch.randn(1, 3, 8, 8)
    again = UNet(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, 3), model(x, 3))


def test_sample_shape():
    assert UNet(SMALL).sample_shape == (3, 8, 8)
    assert UNet(replace(SMALL, sample_size=(4, 6), in_channels=1)).sample_shape == (1, 4, 6)
    model = UNet(replace(SMALL, sample_size=None))
    with pytest.raises(ValueError, match="sample_size"):
        _ = model.sample_shape


def test_config_round_trip():
    config = replace(SMALL, sample_size=(8, 16), attention_head_dim=8)
    again = UNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    values = config.to_dict()
    for field in ("num_attention_heads", "resblock_updown", "timestep_input_dim", "timestep_scale"):
        del values[field]  # which the first checkpoints did not have
    assert UNetConfig.from_dict(values) == config
    values |= {"colour": "red"}
    del values["norm_eps"]
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\], missing fields \['norm_eps'\]"):
        UNetConfig.from_dict(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_out_channels", ()),
        ("block_out_channels", (16, 30)),
        ("block_out_channels", 16),
        ("down_attention", (True,)),
        ("down_attention", ("no", "yes")),
        ("up_attention", (True, False, True)),
        ("sample_size", 9),
        ("sample_size", (8, 8, 8)),
        ("sample_size", 0),
        ("in_channels", 0),
        ("out_channels", 3.0),
        ("layers_per_block", "2"),
        ("attention_head_dim", 24),
        ("norm_num_groups", 5),
        ("norm_eps", 0.0),
        ("attn_norm_num_groups", 5),
        ("downsample_padding", 2),
        ("freq_shift", 8),
        ("time_embedding_dim", 0),
        ("mid_block_scale_factor", 0),
        ("dropout", 1.0),
        ("resnet_time_scale_shift", "spatial"),
        ("num_class_embeds", 0),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("resblock_updown", 1),
        ("timestep_input_dim", 0),
        ("timestep_scale", 0),
        ("timestep_scale", float("inf")),
    ],
)
def test_config_errors_name_the_field_and_what_is_allowed(field, value):
    named = "block_out_channels" if field == "norm_num_groups" else field
    with pytest.raises(ValueError, match=rf"UNetConfig\.{named}: got .*, allowed: "):
        replace(SMALL, **{field: value})


def test_heads_are_not_both():
    with pytest.raises(
        ValueError, match=r"num_attention_heads: got 2, allowed: None or, without attention_head"
    ):
        replace(SMALL, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize(
    ("x", "t", "labels", "message"),
    [
        (torch.zeros(2, 4, 8, 8), 1, None, r"\(B, 3, H, W\).*divisible by 2, got \(2, 4, 8, 8\)"),
        (torch.zeros(2, 3, 8, 7), 1, None, r"divisible by 2, got \(2, 3, 8, 7\)"),
        (torch.zeros(3, 8, 8), 1, None, r"got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8).double(), 1, None, "float64.*float32"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3), None, r"t must .*\(2,\), got \(3,\)"),
        (torch.zeros(2, 3, 8, 8), 1, torch.tensor([0, 1]), "takes no class_labels"),
    ],
)
def test_forward_errors(x, t, labels, message):
    with pytest.raises(ValueError, match=message):
        random_unet()(x, t, labels)


@pytest.mark.parametrize(
    ("timesteps", "labels", "message"),
    [
        (torch.tensor(3), None, r"timesteps must have shape \(N,\), N >= 1, got \(\)"),
        (torch.zeros(0), None, r"N >= 1, got \(0,\)"),
        (torch.arange(3), torch.tensor([0]), "takes no class_labels"),
    ],
)
def test_time_rows_errors(timesteps, labels, message):
    with pytest.raises(ValueError, match=message):
        random_unet().time_rows(timesteps, labels)


def test_forward_rows_errors():
    model, x = random_unet(replace(SMALL, num_class_embeds=3)), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="needs class_labels"):
        model.time_rows(torch.arange(3))
    rows = model.time_rows(torch.arange(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"i must have shape \(\) or \(2,\), got \(3,\)"):
        model.forward_rows(x, rows, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"class_labels must have shape \(1,\), got \(2,\)"):
        model.forward_rows(x[:1], rows, torch.tensor(0))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        model.forward_rows(x[:, :2], rows, torch.tensor(0))


def test_class_label_errors():
    model, x = random_unet(replace(SMALL, num_class_embeds=3)), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="needs class_labels"):
        model(x, 1)
    with pytest.raises(ValueError, match=r"\(2,\), got \(1,\)"):
        model(x, 1, torch.tensor([0]))
