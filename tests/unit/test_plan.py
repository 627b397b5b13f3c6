"""Proves that `sivae plan` tells the truth: activations within 15% of what a real step takes at two sizes of either family, what
the engines hold at every ZeRO stage, FLOPs by hand, the size of a real checkpoint; that what does not fit is told with what
would; and that wrong questions get one sentence.

    python -m pytest tests/unit/test_plan.py
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import live_and_peak_bytes, measure
from sivae import checkpoint, config, distributed, plan, trainer
from sivae.cli import main
from sivae.data.pack import pack
from sivae.errors import UserError
from sivae.objectives import SoftIntroVae
from sivae.state import TrainingState
from sivae.step_trace import trace_step
from sivae.storage import Folder
from tests.processes import ROOT

DIGITS = str(ROOT / "configs" / "digits.yaml")
CONV = {"family": "conv", "num_channels": 3, "channels": [8, 16, 32], "group_size": 4, "latent_dim": 32}
STYLE = {
    "family": "style",
    "num_channels": 3,
    "base_channels": 8,
    "max_channels": 16,
    "latent_dim": 16,
    "num_mapping_layers": 2,
}
HEAVY = ["model.channels=[128,256]"]  # many weights, few activations


def settings_of(model, engine={}, objective={}, batch_size=16):
    tree = config.load(DIGITS).model_dump()
    tree["model"] = model
    tree["engine"] |= engine
    tree["objective"] |= objective | ({"style_mixing": 0.9} if model["family"] == "style" else {})
    tree["schedule"]["batch_size"] = batch_size
    return config.parse(tree)


@pytest.mark.parametrize(
    "engine, resolution, batch_size",
    [({}, 64, 4), ({}, 128, 1), ({"precision": "bfloat16"}, 64, 4), ({"recompute_from_pixels": 1}, 128, 1)],
    ids=["plain-64", "plain-128", "bfloat16-64", "recompute-128"],
)
@pytest.mark.parametrize("family", ["conv", "style"])
def test_activations_are_within_15_percent_of_a_real_step(family, engine, resolution, batch_size):
    """Measured is what torch's allocator hands out in a step through the real engines, over what lay there before it."""
    settings = settings_of({"conv": CONV, "style": STYLE}[family] | {"resolution": resolution}, engine)
    expected = trace_step(settings, batch_size, device_type="cpu").activation_bytes
    found = measure(settings, batch_size, num_steps=1)["peak_bytes"]
    assert 0.85 < expected / found < 1.15, (expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["conv", "style"])
def test_a_step_at_1024_pixels(family):
    from benchmarks.memory import settings_of as at_1024

    settings = at_1024(family, ["engine.precision=float32", "engine.recompute_from_pixels=1"])
    expected = trace_step(settings, 1, device_type="cpu").activation_bytes
    assert 0.85 < expected / measure(settings, 1, num_steps=1)["peak_bytes"] < 1.15


def test_a_small_network_takes_a_step_at_1024_pixels():
    model = CONV | {"resolution": 1024, "channels": [8, 8, 8, 8, 8, 8, 8, 8], "group_size": 4}
    settings = settings_of(model, {"recompute_from_pixels": 1})
    expected = trace_step(settings, 1, device_type="cpu").activation_bytes
    assert 0.85 < expected / measure(settings, 1, num_steps=1)["peak_bytes"] < 1.15


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_the_engines_hold_at_rest(stage, monkeypatch):
    settings = config.load(DIGITS, [*HEAVY, f"engine.zero_stage={stage}"])
    with distributed.join("cpu") as group:
        gc.collect()  # what other tests left is not to be freed meanwhile
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
            state = TrainingState(settings, group, accumulation=1)
        found, _ = live_and_peak_bytes(allocations)
    counts = [
        sum(torch.Size(shape).numel() for shape in engine.shapes.values()) for engine in (state.encoder, state.decoder)
    ]
    expected = plan.state_bytes(*counts, stage, num_gpus=1)
    total = 4 * sum(counts)
    at_rest = expected["weights"] + expected["optimizer"] + expected["average"]
    if stage == 3:  # on one rank nothing is gathered; the buffers that stay are for both networks
        at_rest += 2 * total - total
    # At stage 3 DeepSpeed pads its buffers.
    assert found == pytest.approx(at_rest, rel=0.05 if stage == 3 else 0.01)
    if stage not in (1, 2):
        return
    # A checkpoint has one moment of one parameter whole on the device, then the next. This rank keeps none; nor does gloo, which
    # may hold what it reduced.
    monkeypatch.setattr("deepspeed.utils.safe_get_full_optimizer_state", lambda parameter, _: parameter.clone())
    engine = state.encoder
    engine.group = replace(group, rank=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
        engine.optimizer_state_dict(main_only=True)
    _, peak = live_and_peak_bytes(allocations)
    assert peak <= 2.1 * 4 * max(torch.Size(shape).numel() for shape in engine.shapes.values())


def test_zero_divides_what_it_says():
    numbers = (30_000_000, 10_000_000)
    one, many = ({stage: plan.state_bytes(*numbers, stage, n) for stage in range(4)} for n in (2, 64))
    assert one[0] == many[0] and one[0]["optimizer"] == 8 * 40_000_000
    for stage in (1, 2, 3):
        assert many[stage]["optimizer"] == pytest.approx(one[stage]["optimizer"] / 32)
    assert many[3]["average"] == pytest.approx(one[3]["average"] / 32) and many[1]["average"] == one[1]["average"]


def test_flops_by_hand():
    """Of one layer each way: an encoder of one linear layer and a decoder of one, counted through both phases."""
    tree = config.load(str(ROOT / "configs" / "digits_mlp.yaml")).model_dump()
    tree["model"] = {"family": "mlp", "sample_shape": [1, 4, 4], "latent_dim": 3, "num_hidden": 5, "num_layers": 0}
    settings = config.parse(tree)
    found = trace_step(settings, 2)
    first, second = 2 * 16 * 5, 2 * 5 * 6  # the encoder's layers, forward, of one image
    third, fourth = 2 * 3 * 5, 2 * 5 * 16  # the decoder's
    # Encoder phase. Encoder: x, rec and fake forward, weight gradients of both layers, the input gradient of the second.
    expected = 3 * (first + second + first + second + second)
    # Decoder: fake, rec, and two reconstructions of them forward. It is frozen: input gradients alone, where the encoder's
    # output is behind it (rec, and both second reconstructions), but not of the fake, which comes from the prior.
    expected += 4 * (third + fourth) + 3 * (third + fourth)
    # Decoder phase. Encoder: both generated images forward, and the gradient to them.
    expected += 2 * (first + second + first + second)
    # Decoder: all weight gradients, the input gradient of its second layer, and, left over, that of z of the real images.
    expected += 2 * (third + fourth + fourth) + third
    assert found.flops == 2 * expected and found.num_images == 2
    # Where the phases share nothing: fake and rec forward once more, and no gradient to z.
    tree["engine"]["shared_forward"] = False
    assert trace_step(config.parse(tree), 2).flops == 2 * (expected + 2 * (third + fourth) - third)


def test_a_pass_that_the_objective_adds_is_counted(monkeypatch):
    """No formula: the FLOPs are those of the code that runs."""
    small = settings_of(CONV | {"resolution": 16, "channels": [8, 8]})
    before = trace_step(small, 1)
    again = settings_of(CONV | {"resolution": 16, "channels": [8, 8]}, objective={"gamma_r": 1.0})
    assert trace_step(again, 1).flops > 1.1 * before.flops
    run = SoftIntroVae.encoder_phase

    def twice(self, encoder, decoder, x, draws, *rest):
        encoder(x, None)
        return run(self, encoder, decoder, x, draws, *rest)

    monkeypatch.setattr(SoftIntroVae, "encoder_phase", twice)
    assert trace_step(small, 1).flops > 1.02 * before.flops


def test_flops_of_all_images_and_of_passes_add_up():
    settings = settings_of(CONV | {"resolution": 32}, {"shared_forward": False})
    one, two = trace_step(settings, 2), trace_step(settings, 2, num_passes=2)
    assert two.flops == 2 * one.flops and two.num_images == 2 * one.num_images
    # A pass frees its activations before the next: only gradients and latents stay.
    assert two.activation_bytes < 1.1 * one.activation_bytes


def test_a_gpu_keeps_more_in_bfloat16_than_a_cpu():
    """Where its autocast gives float32, as to the mean square of PixelNorm; group norm keeps bfloat16 there too."""

    def kept(norm, precision):
        settings = settings_of(
            CONV | {"resolution": 32, "norm": norm}, {"precision": precision, "channels_last": False}
        )
        return [trace_step(settings, 2, device_type=device).activation_bytes for device in ("cpu", "cuda")]

    cpu, gpu = kept("pixel", "bfloat16")
    assert 1.1 * cpu < gpu
    cpu, gpu = kept("group", "bfloat16")
    assert gpu == pytest.approx(cpu, rel=0.02)
    for norm in ("pixel", "group"):
        assert len(set(kept(norm, "float32"))) == 1


@pytest.mark.parametrize("setting", ["offload_optimizer", "overlap_reduction"])
def test_no_stage_is_planned_that_the_settings_refuse(setting):
    settings = settings_of(CONV | {"resolution": 16, "channels": [8, 8]}, {"zero_stage": 1, setting: True})
    made = plan.make(settings, num_gpus=1, gpu_name="h100")
    assert {row["stage"] for row in made["memory"]} == {1, 2, 3}


def test_the_checkpoint_has_the_size_that_was_planned(tmp_path, cache_dir):
    overrides = [
        f"run.directory={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "schedule.total_images=16", *HEAVY,
        "tracking.tensorboard=false", "tracking.progress=false",
    ]  # fmt: skip
    settings = config.load(DIGITS, overrides)
    made = plan.make(settings, num_gpus=1, gpu_name="h100")
    name = trainer.train(settings).checkpoint
    folder = tmp_path / "run" / "checkpoints" / name
    found = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert made["checkpoint_bytes"] == pytest.approx(found, rel=0.01)
    assert len(checkpoint.list_names(Folder(str(tmp_path / "run")))) == 1


def test_storage_comes_from_the_index_where_there_is_one(tmp_path):
    packed = tmp_path / "set"
    index = pack("digits:", str(packed), resolution=16, progress=False)
    for url, size in ((str(packed), index.size.mean()), ("digits:", 0.4 * 256), (str(tmp_path / "none"), 0.4 * 256)):
        made = plan.make(config.load(DIGITS, [f'data.url="{url}"']), num_gpus=2, gpu_name="a100-40gb")
        assert made["sample_bytes"] == pytest.approx(size)
        assert made["storage_bytes_per_sec"] == pytest.approx(made["images_per_sec"] * size)
        assert any("0.4 bytes" in line for line in made["assumptions"]) == (size != index.size.mean())
    pack("digits:", str(tmp_path / "pyramid"), resolution=16, pyramid=True, progress=False)
    made = plan.make(config.load(DIGITS, [f"data.url={tmp_path / 'pyramid'}"]), num_gpus=2, gpu_name="h100")
    assert not any("0.4 bytes" in line for line in made["assumptions"])


def test_hours_follow_from_speed():
    settings = config.load(DIGITS, [])
    half, whole = (plan.make(settings, num_gpus=4, gpu_name="h100", utilization=u) for u in (0.001, 0.002))
    assert half["gpu_hours"] == pytest.approx(2 * whole["gpu_hours"])
    assert half["hours"] == pytest.approx(half["total_images"] / half["images_per_sec"] / 3600)
    assert half["gpu_hours"] == pytest.approx(4 * half["hours"])
    # A network as small as this waits for its launches, however fast the GPU.
    assert plan.make(settings, num_gpus=4, gpu_name="h100", utilization=1.0)["gpu_hours"] == pytest.approx(
        plan.make(settings, num_gpus=4, gpu_name="h200", utilization=1.0)["gpu_hours"]
    )


@pytest.mark.parametrize(
    "batch_size, verdict",
    [
        (8, "fits as configured (stage 0)"),
        (32, "does not fit at stage 0; fits with engine.recompute_from_pixels=1, or with engine.micro_batch_size=16"),
        (128, "does not fit at stage 0; fits with engine.micro_batch_size=16"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(monkeypatch, batch_size, verdict):
    monkeypatch.setitem(plan.GPUS, "h100", replace(plan.GPUS["h100"], memory_gib=0.15))
    settings = settings_of(CONV | {"resolution": 64}, batch_size=batch_size)
    made = plan.make(settings, num_gpus=1, gpu_name="h100")
    assert made["verdict"] == verdict
    assert [row["fits"] for row in made["memory"]] == [row["total"] <= 0.9 * 0.15 * 2**30 for row in made["memory"]]
    assert ("does not fit" in plan.render(made)) == (batch_size != 8)


def test_a_run_that_grows_costs_the_sum_of_its_levels():
    """Each level at its own batch, up to the end of the run; memory is that of the level that takes most."""
    tree = settings_of(STYLE | {"resolution": 32}).model_dump()
    levels = [
        {"resolution": 8, "images": 1000, "batch_size": 64, "micro_batch_size": 8},
        {"resolution": 16, "images": 3000, "fade_images": 1000},
        {"resolution": 32},
    ]
    tree["schedule"] |= {"total_images": 10_000, "levels": levels}
    settings = config.parse(tree)
    run = plan.parts(settings, num_gpus=3)
    assert [(part.resolution, part.num_images) for part in run] == [(8, 1000), (16, 3000), (32, 6000)]
    assert [(part.micro_batch_size, part.num_passes) for part in run] == [(8, 3), (6, 1), (6, 1)]
    made = plan.make(settings, num_gpus=3, gpu_name="h100", utilization=0.01)
    traces = [part.trace() for part in run]
    flops = [trace.flops / trace.num_images for trace in traces]
    assert flops[0] < flops[1] < flops[2] == made["flops_per_image"]
    alone = plan.make(config.parse(tree | {"schedule": tree["schedule"] | {"levels": []}}), num_gpus=3, gpu_name="h100", utilization=0.01)  # fmt: skip
    assert made["gpu_hours"] < alone["gpu_hours"] and made["total_images"] == 10_000
    assert made["memory"][0]["activations"] == pytest.approx(alone["memory"][0]["activations"], rel=0.02)
    short = config.parse(tree | {"schedule": tree["schedule"] | {"total_images": 2500}})
    assert [(part.resolution, part.num_images) for part in plan.parts(short, num_gpus=1)] == [(8, 1000), (16, 1500)]


def test_the_command(capsys):
    assert main(["plan", DIGITS, "engine.zero_stage=2", "--gpus", "2", "--gpu", "a100-80gb"]) == 0
    text = capsys.readouterr().out
    assert "2 x a100-80gb" in text and "ZeRO 3, recompute" in text and "fits as configured (stage 2)" in text
    assert "--utilization" in text and "assumed:" in text
    assert main(["plan", DIGITS, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["model"]["encoder_parameters"] > 0 and len(made["memory"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_can_be_planned(path: Path):
    made = plan.make(config.load(str(path), ["engine.precision=float32"]), num_gpus=1, gpu_name="v100-16gb")
    assert made["flops_per_image"] > 0 and made["verdict"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--gpu", "h1000"], "--gpu: 'h1000' is not known; did you mean h100? known are v100-16gb,"),
        (["--gpus", "0"], "--gpus: 0 is not a number of GPUs"),
        (["--gpus", "17"], "schedule.batch_size: 16 images a step are too few for 17 ranks"),
        (["--utilization", "0"], "--utilization: 0.0 is not above 0 and up to 1"),
        (["--utilization", "1.5"], "--utilization: 1.5 is not above 0 and up to 1"),
        (["engine.precision=bfloat16", "--gpu", "v100-32gb"], "--gpu: v100-32gb has no bfloat16; plan with engine.precision=float32"),
        (["engine.precisoin=bfloat16"], "engine.precisoin: unknown setting; did you mean `precision`?"),
    ],
)  # fmt: skip
def test_wrong_questions_get_one_sentence(arguments, sentence, capsys):
    assert main(["plan", DIGITS, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sivae: error: {sentence}") and error.count("\n") == 1


def test_an_unknown_gpu_is_a_user_error():
    with pytest.raises(UserError, match="'tpu' is not known; known are"):
        plan.find_gpu("tpu")
