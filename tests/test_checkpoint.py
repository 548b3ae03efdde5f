"""checkpoint: diffusers' folders and live objects, each scheduler's settings, our own format, the errors."""

import json
import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_fast import checkpoint
from ddpm_fast.checkpoint import load, load_diffusers, save, save_diffusers
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet, UNetConfig

CONFIG = UNetConfig((16, 32), (False, True), (True, False), norm_num_groups=8, sample_size=8)
SETTINGS = {"method": "ddim", "clip": 1.0, "spacing": "trailing", "final_alpha_cumprod": 0.9998999834060669}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def theirs(diffusers):
    """A small UNet2DModel; every layer kind is in it."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


@pytest.fixture
def ours() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG)
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0, 0.1)
    return model.eval()


@pytest.fixture
def saved(tmp_path, ours):
    save(tmp_path / "checkpoint", ours, Schedule.linear(10), SETTINGS)
    return tmp_path / "checkpoint"


def assert_same_output(model: UNet, theirs) -> None:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    with torch.inference_mode():
        torch.testing.assert_close(model(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def schedule_and_settings(theirs, scheduler):
    return load_diffusers(SimpleNamespace(unet=theirs, scheduler=scheduler))[1:]


# diffusers


def test_live_model(theirs):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, schedule, settings = load_diffusers(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert model.sample_shape == (3, 8, 8)
    assert_same_output(model, theirs)
    assert schedule.T == 1000
    assert settings == {
        "method": "ddpm",
        "prediction": "epsilon",
        "clip": 1.0,
        "spacing": "leading",
        "steps_offset": 0,
        "variance": "fixed_small",
    }


def test_live_model_is_copied(theirs):
    model = load_diffusers(theirs)[0]
    shared = {value.data_ptr() for value in model.parameters()} & {v.data_ptr() for v in theirs.parameters()}
    assert not shared


def test_compiled_live_model(theirs):
    assert_same_output(load_diffusers(torch.compile(theirs, backend="eager"))[0], theirs)


def test_pipeline_folder_and_live_pipeline(theirs, diffusers, tmp_path):
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline = diffusers.DDIMPipeline(theirs, scheduler)
    pipeline.scheduler = scheduler  # the pipeline makes its own from the config
    pipeline.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), pipeline):
        model, schedule, settings = load_diffusers(source)
        assert_same_output(model, theirs)
        np.testing.assert_array_equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
        assert settings["method"] == "ddim"
        assert settings["prediction"] == "v"
    assert_same_output(load(tmp_path)[0], theirs)


def test_unet_folder(theirs, diffusers, tmp_path):
    theirs.save_pretrained(tmp_path)
    model, schedule, settings = load_diffusers(tmp_path)
    assert_same_output(model, theirs)
    np.testing.assert_array_equal(schedule.alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod.double())
    assert settings["variance"] == "fixed_small"
    diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(
        tmp_path
    )  # as google/ddpm-cifar10-32
    assert load_diffusers(tmp_path)[2]["variance"] == "fixed_large"


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_weight_files(theirs, tmp_path, safe, sharded):
    theirs.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size="100KB" if sharded else "10GB")
    assert any(tmp_path.glob("*.index.json")) == sharded
    assert any(tmp_path.glob("*.safetensors")) == safe
    assert_same_output(load_diffusers(tmp_path)[0], theirs)


def test_safetensors_before_pickles(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"not opened")
    assert_same_output(load_diffusers(tmp_path)[0], theirs)


def test_old_attention_keys_and_block_names(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in OLD_ATTENTION.items():
        tensors = {name.replace(f".{new}.", f".{old}."): value for name, value in tensors.items()}
    assert not any(".to_" in name for name in tensors)
    save_file(tensors, file)
    edit_json(
        tmp_path / "config.json",
        down_block_types=["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
    )
    assert_same_output(load_diffusers(tmp_path)[0], theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(theirs, tmp_path, dtype):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    model = load_diffusers(tmp_path)[0]
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert torch.equal(model.conv_in.weight, theirs.conv_in.weight.to(dtype))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid", "beta_start": 1e-3, "num_train_timesteps": 50}),
        ("DDPMScheduler", {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.25]}),
        ("DDPMScheduler", {"trained_betas": np.linspace(0.01, 0.1, 7)}),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_schedule_is_their_float32_one(theirs, diffusers, name, config, tmp_path):
    scheduler = getattr(diffusers, name)(**config)
    schedule, _ = schedule_and_settings(theirs, scheduler)
    np.testing.assert_array_equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
    assert schedule.alphas_cumprod.dtype == np.float64
    theirs.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    np.testing.assert_array_equal(load_diffusers(tmp_path)[1].alphas_cumprod, schedule.alphas_cumprod)


DDPM = {"method": "ddpm", "prediction": "epsilon", "clip": 1.0, "spacing": "leading", "steps_offset": 0}
DDIM = DDPM | {"method": "ddim"}
DDPM = DDPM | {"variance": "fixed_small"}
DPM_SOLVER = {
    "method": "dpm_solver",
    "prediction": "epsilon",
    "clip": None,
    "spacing": "linspace",
}


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("DDPMScheduler", {}, DDPM),
        ("DDPMScheduler", {"variance_type": "fixed_small_log"}, DDPM),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, DDPM | {"variance": "fixed_large"}),
        ("DDPMScheduler", {"variance_type": "learned_range"}, DDPM | {"variance": "learned_range"}),
        ("DDPMScheduler", {"prediction_type": "sample"}, DDPM | {"prediction": "x0"}),
        ("DDPMScheduler", {"clip_sample": False}, DDPM | {"clip": None}),
        ("DDPMScheduler", {"clip_sample_range": 2.5}, DDPM | {"clip": 2.5}),
        ("DDPMScheduler", {"clip_sample_range": 2.5, "thresholding": True}, DDPM),
        ("DDIMScheduler", {}, DDIM),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, DDIM | {"prediction": "v"}),
        (
            "DDIMScheduler",
            {"timestep_spacing": "trailing", "steps_offset": 1},  # which "trailing" does not read
            {"method": "ddim", "prediction": "epsilon", "clip": 1.0, "spacing": "trailing"},
        ),
        ("DDIMScheduler", {"steps_offset": 1}, DDIM | {"steps_offset": 1}),
        (
            "DDIMScheduler",
            {"set_alpha_to_one": False},
            DDIM | {"final_alpha_cumprod": float(torch.tensor(1.0) - torch.tensor(1e-4))},
        ),
        ("DPMSolverMultistepScheduler", {}, DPM_SOLVER),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, DPM_SOLVER | {"clip": 1.0}),
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "leading", "lower_order_final": False, "euler_at_final": True},
            DPM_SOLVER | {"spacing": "leading", "steps_offset": 0},
        ),
    ],
)
def test_settings(theirs, diffusers, name, config, expected, tmp_path):
    scheduler = getattr(diffusers, name)(**config)
    assert schedule_and_settings(theirs, scheduler)[1] == expected
    theirs.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    assert load_diffusers(tmp_path)[2] == expected


def test_old_configs_get_their_class_defaults(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "tensor_format": "pt"}')
    assert load_diffusers(tmp_path)[2] == DDIM


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "DDPMScheduler",
            {"variance_type": "fixed_large_log"},
            "variance_type is 'fixed_large_log', allowed",
        ),
        ("DDPMScheduler", {"variance_type": "learned"}, r"allowed: \['fixed_small', .*'learned_range'\]"),
        ("DDPMScheduler", {"beta_schedule": "laplace"}, "beta_schedule is 'laplace', allowed: .*sigmoid"),
        (
            "DDPMScheduler",
            {"thresholding": True, "sample_max_value": 2.0},
            "sample_max_value is 2.0, allowed",
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order is 3, allowed"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-"),
        (
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min"},
            "final_sigmas_type is 'sigma_min'",
        ),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("PNDMScheduler", {}, "_class_name is 'PNDMScheduler', allowed: .*'DDIMScheduler'"),
    ],
)
def test_scheduler_errors_name_field_value_and_allowed(theirs, diffusers, name, config, message):
    with pytest.raises(ValueError, match=message):
        schedule_and_settings(theirs, getattr(diffusers, name)(**config))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "down_block_types",
            ["DownBlock2D", "SkipDownBlock2D"],
            r"\['SkipDownBlock2D'\], allowed: .*AttnDownBlock2D",
        ),
        ("up_block_types", ["AttnDownBlock2D", "UpBlock2D"], r"up_block_types has \['AttnDownBlock2D'\]"),
        ("time_embedding_type", "fourier", "time_embedding_type is 'fourier', allowed: .*positional"),
        ("mid_block_type", None, "mid_block_type is None"),
        ("downsample_type", "resnet", "downsample_type is 'resnet'"),
        ("class_embed_type", "timestep", r"class_embed_type is 'timestep', allowed: \[None\]"),
        ("act_fn", "gelu", "act_fn is 'gelu'"),
        ("norm_num_groups", 5, "block_out_channels.*norm_num_groups=5"),
        ("_class_name", "UNet2DConditionModel", "config.json.*UNet2DConditionModel"),
        ("_class_name", None, "neither of a ddpm_fast checkpoint nor"),
    ],
)
def test_unet_config_errors(theirs, tmp_path, field, value, message):
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    with pytest.raises(ValueError, match=message):
        load_diffusers(tmp_path)


def test_weights_that_do_not_fit(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)

    def change(tensors):
        tensors["conv_in.wrong"] = tensors.pop("conv_in.weight")
        tensors["conv_out.bias"] = torch.zeros(4)
        name = "mid_block.attentions.0.to_k.weight"
        tensors[name] = tensors[name][:5].contiguous()
        tensors["conv_in.bias"] = tensors["conv_in.bias"].to(torch.int8)

    edit_tensors(tmp_path / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ValueError, match="do not fit the config") as caught:
        load_diffusers(tmp_path)
    told = str(caught.value)
    assert str(tmp_path) in told
    assert "missing: conv_in.weight;" in told
    assert "unexpected: conv_in.wrong;" in told
    assert "conv_out.bias (is torch.float32 (4,), must be floating (3,))" in told
    assert "mid_block.attentions.0.to_k.weight (is torch.float32 (5, 32), must be floating (32, 32))" in told
    assert "conv_in.bias (is torch.int8" in told


def test_many_missing_keys_are_counted(theirs):
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("up_blocks")}
    missing = len(theirs.state_dict()) - len(state)
    with pytest.raises(ValueError, match=f"missing: .* and {missing - 10} more$"):
        load_diffusers(SimpleNamespace(config=theirs.config, state_dict=lambda: state))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 4, 1000, -10])
def test_truncated_weights(theirs, tmp_path, kind, kept):
    theirs.save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
    file = tmp_path / f"diffusion_pytorch_model.{kind}"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or damaged"):
        load_diffusers(tmp_path)


def test_pickles_that_run_code_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    file = tmp_path / "diffusion_pytorch_model.bin"
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"conv_in.weight": Payload()}, file)
    with pytest.raises(ValueError, match=r"\.bin is refused.*weights_only=False"):
        load_diffusers(tmp_path)
    assert not marker.exists()


def test_pickles_of_something_else(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"state_dict": theirs.state_dict(), "step": 3}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\.bin must hold a dict of tensors"):
        load_diffusers(tmp_path)


def test_missing_files(theirs, diffusers, tmp_path):
    with pytest.raises(NotADirectoryError, match="google/ddpm-cat-256 is not a folder"):
        load_diffusers("google/ddpm-cat-256")
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no unet/config\.json"):
        load(tmp_path)
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is a pipeline, but .*scheduler_config\.json is missing"):
        load_diffusers(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_diffusers(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        load_diffusers(3)


def test_residual_blocks_that_resize_go_to_diffusers_and_back(diffusers, tmp_path):
    config = replace(CONFIG, resblock_updown=True, norm_eps=1e-5)
    torch.manual_seed(0)
    model = UNet(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0, 0.1)
    save_diffusers(tmp_path / "pipeline", model, Schedule.linear())
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet")
    assert theirs.config.down_block_types == ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]
    assert_same_output(model, theirs)
    assert load(tmp_path / "pipeline")[0].config == config
    # A convolution in one level and a residual block in the other is no config of ours.
    edit_json(
        tmp_path / "pipeline" / "unet" / "config.json", down_block_types=["DownBlock2D", "AttnDownBlock2D"]
    )
    with pytest.raises(ValueError, match=r"has \['DownBlock2D'\], allowed: \['ResnetDownsampleBlock2D'"):
        load(tmp_path / "pipeline")


@pytest.mark.parametrize("field", ["num_attention_heads", "timestep_input_dim", "timestep_scale"])
def test_what_diffusers_has_no_word_for(tmp_path, field):
    model = UNet(replace(CONFIG, **{field: 8}))
    with pytest.raises(ValueError, match=f"UNet2DModel has no word for UNetConfig.{field}=8"):
        save_diffusers(tmp_path / "pipeline", model, Schedule.linear(3))
    assert os.listdir(tmp_path) == []


# Our own format


@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.cosine(37).rescale_zero_terminal_snr()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(ours, tmp_path, schedule, dtype):
    ours = ours.to(dtype).to(memory_format=torch.channels_last).train()
    save(tmp_path / "deep" / "checkpoint", ours, schedule, SETTINGS)
    model, again, settings = load(tmp_path / "deep" / "checkpoint")
    assert model.config == ours.config
    assert not model.training
    assert model.state_dict().keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert model.state_dict()[name].dtype == dtype
        assert torch.equal(model.state_dict()[name], value)
    assert again.betas.tobytes() == schedule.betas.tobytes()
    assert again.alphas_cumprod.tobytes() == schedule.alphas_cumprod.tobytes()
    assert settings == SETTINGS
    assert os.listdir(tmp_path / "deep") == ["checkpoint"]


def test_without_settings(ours, tmp_path):
    save(tmp_path / "checkpoint", ours, Schedule.linear(3))
    assert load(tmp_path / "checkpoint")[2] == {}


def test_files_are_as_readable_as_any_other(saved, tmp_path):
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {expected}


def test_a_checkpoint_is_replaced_whole(saved, ours, tmp_path):
    (saved / "leftover").touch()
    with torch.no_grad():
        ours.conv_in.weight.fill_(2.0)
    save(saved, ours, Schedule.linear(20))
    model, schedule, settings = load(saved)
    assert (model.conv_in.weight == 2).all()
    assert (schedule.T, settings) == (20, {})
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("step", ["save_file", "rename"])
def test_a_failed_save_leaves_the_old_checkpoint(saved, ours, tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError("disk full")

    if step == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    else:
        rename = checkpoint.Path.rename
        monkeypatch.setattr(
            checkpoint.Path, "rename", lambda a, b: fail() if a.name.endswith(".new") else rename(a, b)
        )
    with pytest.raises(OSError, match="disk full"):
        save(saved, ours, Schedule.linear(20))
    monkeypatch.undo()
    assert load(saved)[1].T == 10
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_save_replaces_nothing_else(ours, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="not replaced"):
            save(folder, ours, Schedule.linear(3))
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", ours, Schedule.linear(3))
    assert load(tmp_path / "empty")[1].T == 3


def test_save_argument_errors(ours, tmp_path):
    with pytest.raises(TypeError, match="OptimizedModule"):
        save(tmp_path / "checkpoint", torch.compile(ours, backend="eager"), Schedule.linear(3))
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "checkpoint", ours, Schedule.linear(3), {"noise": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_load_errors_name_the_file(saved):
    weights, config = saved / "model.safetensors", saved / "config.json"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load(saved)
    weights.write_bytes(intact)
    edit_tensors(weights, lambda tensors: tensors.update(surplus=tensors.pop("conv_in.bias")))
    with pytest.raises(ValueError, match=r"missing: conv_in\.bias; unexpected: surplus$"):
        load(saved)
    edit_tensors(weights, lambda tensors: tensors.pop("schedule.betas"))
    with pytest.raises(ValueError, match=r"model.safetensors lacks \['schedule.betas'\]"):
        load(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(saved)

    edit_json(config, version=2)
    with pytest.raises(ValueError, match=r"config\.json: version is 2, this ddpm_fast reads 1"):
        load(saved)
    config.write_text('{"format": "ddpm_fast", "version": 1, "unet": {}}')
    with pytest.raises(ValueError, match=r"config.json: settings must be an object, got None"):
        load(saved)
    config.write_text("[1, 2")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(saved)
    config.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        load(saved)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        load(config)


def test_diffusers_to_ours(theirs, tmp_path):
    model, schedule, settings = load_diffusers(theirs)
    save(tmp_path / "checkpoint", model, schedule, settings)
    again, schedule_again, settings_again = load(tmp_path / "checkpoint")
    assert_same_output(again, theirs)
    np.testing.assert_array_equal(schedule_again.betas, schedule.betas)
    assert settings_again == settings


def test_digits_is_a_folder_of_the_package():
    assert checkpoint.DIGITS.parts[-3:] == ("ddpm_fast", "weights", "digits")
