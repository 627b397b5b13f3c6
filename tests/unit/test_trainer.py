"""The loop in one process: every objective, precision and family trains; what a run directory holds; when the host reads.

pytest tests/unit/test_trainer.py
"""

import json
import math
import shutil
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sivae
from sivae import checkpoint, config, distributed, engines, images, inference, models, objectives, trainer
from sivae.data import ImageStream
from sivae.engines import Engine
from sivae.errors import UserError
from sivae.graphs import PLAIN
from sivae.objectives import Draws
from sivae.state import TrainingState
from sivae.step import FiniteGate, Pass, train_step
from sivae.storage import Folder
from tests.host_reads import HostReads
from tests.processes import finished
from tests.proxy import ERROR_503, Proxy, address, object_store, s3_options

SECRET = "hidden-secret"


@pytest.fixture
def run(cache_dir, tmp_path):
    """Train a small model on digits for 64 images; returns the result, the settings and the lines of metrics.jsonl."""

    def train(*overrides: str, name: str = "run"):
        # `section:={...}` replaces a whole section, which an override of a key cannot.
        sections = dict(override.split(":=") for override in overrides if ":=" in override)
        tree = yaml.safe_load(Path("configs/digits.yaml").read_text()) | {
            key: yaml.safe_load(text) for key, text in sections.items()
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        settings = config.load(
            str(path),
            [
                f"run.directory={tmp_path / name}", f"data.cache_dir={cache_dir}", "data.num_workers=0",
                *([] if "model" in sections else ["model.channels=[8,16]", "model.latent_dim=4"]), "schedule.total_images=64", "run.checkpoint_images=32", "tracking.log_images=32",
                "tracking.picture_images=64", "tracking.progress=false", "tracking.tensorboard=false",
                *(override for override in overrides if ":=" not in override),
            ],
        )  # fmt: skip
        result = trainer.train(settings)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return result, settings, lines

    return train


SOFT_TERMS = {
    "rec",
    "kl_real",
    "kl_rec",
    "kl_fake",
    "exp_elbo_rec",
    "exp_elbo_fake",
    "rec_d",
    "kl_rec_d",
    "kl_fake_d",
    "kl_gap",
}


@pytest.mark.parametrize(
    "overrides, terms",
    [
        ([], SOFT_TERMS),
        (["objective.gamma_r=1e-8"], SOFT_TERMS | {"rec_rec_d", "rec_fake_d"}),
        (["objective.name=bootstrap", "objective.target_refresh_images=32"], SOFT_TERMS | {"rec_rec_d", "rec_fake_d"}),
        (["engine.precision=bfloat16", "engine.zero_stage=1"], SOFT_TERMS),
        (["objective.reconstruction=l1", "objective.beta_rec=0.1"], SOFT_TERMS),
        (["objective.reconstruction=bce", "model.output=sigmoid"], SOFT_TERMS),
        (["objective:={name: vae}"], {"rec", "kl_real", "rec_d"}),
        (
            ["objective:={name: intro_vae}"],
            {"rec", "kl_real", "kl_rec", "kl_fake", "rec_d", "kl_rec_d", "kl_fake_d", "kl_gap"},
        ),
        (["model.num_classes=10"], SOFT_TERMS),
        (["model:={family: mlp, sample_shape: [1, 16, 16], latent_dim: 4, num_hidden: 16, num_layers: 1}"], SOFT_TERMS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trains_and_tells_every_term(run, overrides, terms):
    result, settings, lines = run(*overrides)
    assert result.images_seen == 64 and [line["images_seen"] for line in lines] == [32, 64]
    named = {name.split("/")[1] for name in lines[-1] if name.startswith("terms/")}
    assert named == terms
    assert {"loss/loss_encoder", "loss/loss_decoder", "optimizer/grad_norm_encoder", "optimizer/grad_norm_decoder", "optimizer/lr_encoder",
            "optimizer/lr_decoder", "speed/images_per_sec", "speed/data_wait_fraction", "memory/peak_bytes"} <= set(lines[-1])  # fmt: skip
    assert all(math.isfinite(value) for value in lines[-1].values())
    model = sivae.load(settings.run.directory)
    assert model.sample(3).shape == (3, 1, 16, 16)


def test_bfloat16_stays_close_to_float32(run):
    """bfloat16 has 8 bits of mantissa, 0.4%; a few layers of it stay within 5% of the loss."""
    exact, rounded = (run(f"engine.precision={kind}", name=kind)[2][0] for kind in ("float32", "bfloat16"))
    assert exact["loss/loss_encoder"] != rounded["loss/loss_encoder"]
    assert rounded["loss/loss_encoder"] == pytest.approx(exact["loss/loss_encoder"], rel=0.05)


def test_run_directory_holds_settings_versions_and_pictures_but_no_secrets(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["sivae", "train", f"data.storage_options.key={SECRET}", f"data.url=s3://me:{SECRET}@host/set"]
    )
    run("data.storage_options.key=" + SECRET, "tracking.tensorboard=true")
    folder = tmp_path / "run"
    assert config.parse(yaml.safe_load((folder / "config.yaml").read_text())).model.channels == [8, 16]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch") and environment["ranks"] == 1
    assert (folder / "pictures" / "samples-000000000064.png").read_bytes().startswith(b"\x89PNG")
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_settings_kept_are_those_of_starts_that_train(run, tmp_path):
    run()
    kept = tmp_path / "run" / "config.yaml"
    before = kept.read_bytes()
    with pytest.raises(UserError):
        run("data.url=nowhere")
    run("schedule.total_images=32")  # nothing left to do
    assert kept.read_bytes() == before
    run("schedule.total_images=96")
    assert kept.read_bytes() != before and len(list(kept.parent.glob("config-*.yaml"))) == 1


def test_another_seed_on_resume_is_told(run, capfd):
    run()
    assert "run.seed" not in capfd.readouterr().err
    run("schedule.total_images=96", "run.seed=3")
    assert "run.seed was 0 up to checkpoint 000000000064;" in capfd.readouterr().err


def test_tensorboard_shows_scalars_pictures_histograms_settings_and_hparams(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    _, _, lines = run("tracking.tensorboard=true")
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    log.Reload()
    tags = log.Tags()
    assert set(lines[-1]) - {"images_seen", "time"} <= set(tags["scalars"])
    assert [event.step for event in log.Scalars("terms/rec")] == [32, 64]
    assert [event.value for event in log.Scalars("terms/rec")] == pytest.approx(
        [line["terms/rec"] for line in lines], rel=1e-6
    )
    assert set(tags["images"]) == {"samples", "traversals", "interpolation"} and set(tags["histograms"]) == {
        "latent/mu",
        "latent/logvar",
    }
    assert "settings/text_summary" in tags["tensors"]
    content = log.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert "loss/loss_encoder" in metrics and metrics <= set(tags["scalars"]), (
        "the table shows the last value of a scalar"
    )


def test_pictures_use_the_same_images_and_latents_each_time(run, tmp_path, monkeypatch):
    """With nothing left to learn, two pictures of a run are the same pixels: neither images nor latents were drawn anew."""
    sample, reads = ImageStream.sample, []
    monkeypatch.setattr(ImageStream, "sample", lambda stream, numbers: reads.append(numbers) or sample(stream, numbers))
    run("tracking.picture_images=32", "encoder_optimizer.lr=1e-30", "decoder_optimizer.lr=1e-30")
    first, second = sorted((tmp_path / "run" / "pictures").glob("samples-*.png"))
    assert first.read_bytes() == second.read_bytes()
    assert len(reads) == 1, "images of an object store are not fetched for every picture"


def test_report_hears_of_metrics_and_checkpoints(cache_dir, tmp_path, run):
    heard = []
    settings = config.load(
        "configs/digits.yaml",
        [f"run.directory={tmp_path}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]", "schedule.total_images=64",
         "run.checkpoint_images=32", "tracking.log_images=32", "tracking.progress=false", "tracking.tensorboard=false"],
    )  # fmt: skip
    published = Folder(str(tmp_path))

    def report(metrics, name):
        assert name is None or name in checkpoint.list_names(published), "named before it is there"
        heard.append((metrics["loss/loss_encoder"], name))

    trainer.train(settings, report=report)
    at_32, again, at_64 = heard
    assert (at_32[1], again[1], at_64[1]) == (None, "000000000032", "000000000064")
    assert at_32[0] == again[0] != at_64[0], "a checkpoint is told of with the metrics of when it was taken"
    before = len(heard)
    assert trainer.train(settings, report=lambda *told: heard.append(told)).images_seen == 64, (
        "a finished run has nothing left to do"
    )
    assert len(heard) == before


def test_an_orchestrator_can_stop_a_run(run, tmp_path, cache_dir):
    """A report that returns True: the run saves and ends as on a signal; started again it goes on."""
    settings = config.load(
        "configs/digits.yaml",
        [f"run.directory={tmp_path}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]", "schedule.total_images=128",
         "tracking.log_images=32", "tracking.progress=false", "tracking.tensorboard=false"],
    )  # fmt: skip
    result = trainer.train(settings, report=lambda metrics, name: True)
    assert result.interrupted and result.images_seen == 32 and result.checkpoint == "000000000032"
    result = trainer.train(settings)
    assert not result.interrupted and result.images_seen == 128


def test_a_wish_to_stop_is_not_taken_back(tmp_path, cache_dir):
    """An orchestrator that answers to a checkpoint, and has nothing to say to the log line of the same step."""
    settings = config.load(
        "configs/digits.yaml",
        [f"run.directory={tmp_path}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "model.channels=[8,16]", "schedule.total_images=256",
         "run.checkpoint_images=16", "tracking.log_images=16", "tracking.progress=false", "tracking.tensorboard=false"],
    )  # fmt: skip
    published = []

    def report(metrics, name):
        published.extend([name] if name else [])
        return len(published) == 1

    assert trainer.train(settings, report=report).interrupted


def test_what_a_run_counts_goes_on_where_it_stood(run, tmp_path):
    """Rollbacks, which decide the draws, log lines with a negative gap, and substituted samples. A plain VAE adds to none."""
    losses = []
    for attempt in (0, 2):
        name, short = f"run{attempt}", ["objective:={name: vae}", "schedule.total_images=32"]
        run(*short, name=name)
        folder = Folder(str(tmp_path / name))
        found = checkpoint.read(folder, checkpoint.list_names(folder)[-1])
        counts = {"attempt": attempt, "negative_gaps": 9, "substituted": 5}
        checkpoint.save(folder, found.state | counts, found.tensors)
        _, _, lines = run(*short[:1], name=name)
        later = checkpoint.read(folder, checkpoint.list_names(folder)[-1]).state
        assert later["images_seen"] == 64 and {key: later[key] for key in counts} == counts
        losses.append(lines[-1]["loss/loss_encoder"])
    assert losses[0] != losses[1], "after a rollback a step draws anew"


def test_training_goes_on_from_imported_weights(run, tmp_path):
    _, settings, _ = run()
    trained = sivae.load(settings.run.directory, weights="plain")
    inference.export(trained, str(tmp_path / "exported"))
    _, again, _ = run(
        f"run.init_from={tmp_path / 'exported'}",
        "encoder_optimizer.lr=1e-30",
        "decoder_optimizer.lr=1e-30",
        name="again",
    )
    with pytest.raises(UserError, match="exported: holds an exported model .* set another run.directory"):
        run(f"run.init_from={tmp_path / 'exported'}", name="exported")
    started = sivae.load(again.run.directory, weights="plain")
    for ours, theirs in zip((started.encoder, started.decoder), (trained.encoder, trained.decoder)):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_a_saved_batch_norm_model_samples_as_in_training(run):
    """The published code's most reported fault. The picture of the run and the loaded model are the same pixels."""
    result, settings, _ = run("model.norm=batch")
    model = sivae.load(settings.run.directory)
    samples = model.to_uint8(model.sample(32, seed=settings.run.seed))
    picture = np.asarray(Image.open(result.picture))
    expected = images.grid(samples, columns=16)
    assert (picture[-len(expected) :] == expected).all()


class InfiniteGradient(objectives.SoftIntroVae):
    """The loss is finite, its gradient is not: the root of something that is always zero."""

    def encoder_phase(self, encoder, decoder, x, *rest):
        phase = super().encoder_phase(encoder, decoder, x, *rest)
        return objectives.Phase(phase.loss + (encoder(x, None)[0] * 0).square().sum().sqrt(), phase.terms, phase.z)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_finite_loss_with_a_gradient_that_is_not_changes_no_weight(stage):
    with distributed.join("cpu") as group:
        gate, engines, item = small_step(group, stage)
        before = engines[0].state_dict()
        for index in range(2):
            train_step(
                *engines,
                None,
                InfiniteGradient(scale=1 / 256),
                [item],
                gate,
                10 + index,
                lr_encoder=1.0,
                lr_decoder=1.0,
                ema_decay=0.9,
            )
        bad = gate.read()
        assert bad.terms == ["grad_norm_encoder"] and bad.images_seen == 10
        assert all(torch.equal(value, before[name]) for name, value in engines[0].state_dict().items())


def small_step(group, stage=0):
    """A gate, two engines and one pass of four random images."""
    gate = FiniteGate(group)
    networks = models.build("conv", num_channels=1, resolution=16, channels=[8, 16], latent_dim=4)
    engines = [
        Engine(
            network, group, lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, clip_grad_norm=1.0, zero_stage=stage,
            precision="float32", offload_optimizer=False, micro_batch_size=4, accumulation=1, found_inf=gate.found_inf,
        )
        for network in networks
    ]  # fmt: skip
    return gate, engines, Pass(torch.rand(4, 1, 16, 16), None, Draws(*(torch.randn(4, 4) for _ in Draws.names())))


def test_a_step_reads_nothing_back_to_the_host():
    with distributed.join("cpu") as group:
        gate, engines, item = small_step(group)
        objective = objectives.build("soft_intro_vae", num_values=256)
        with HostReads() as reads:
            train_step(*engines, None, objective, [item], gate, 0, lr_encoder=1e-3, lr_decoder=1e-3, ema_decay=0.9)
        assert not reads.found
        with HostReads() as reads:
            gate.read()
        assert reads.found == {"_local_scalar_dense": 1}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x.sum()), lambda x: float(x.sum()), lambda x: f"{x.sum():.3f}", print, repr,
        lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.tolist(), lambda x: x.numpy(), np.asarray, lambda x: torch.equal(x, x),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: 1 if (x > 0).all() else 0, lambda x: torch.arange(int(x.sum())),
    ],
)  # fmt: skip
def test_every_way_of_reading_back_is_seen(read):
    with HostReads() as reads:
        read(torch.ones(3))
    assert reads.found
    with HostReads() as reads, reads.paused():
        read(torch.ones(3))
    assert not reads.found


STYLE = "model:={family: style, num_channels: 1, resolution: 16, base_channels: 4, max_channels: 8, latent_dim: 4, num_mapping_layers: 1}"
LEVELS = "schedule.levels=[{resolution: 8, images: 32%s}, {resolution: 16, fade_images: 64}]"


def test_a_level_multiplies_beta_neg(run):
    """As if objective.beta_neg were that much larger, in the losses of real training."""
    plain = ["schedule.total_images=32", STYLE, "objective.beta_neg=16.0"]
    runs = [
        run(*plain, LEVELS % ", beta_neg_factor: 4.0", name="factor"),
        run(*plain, LEVELS % "", "objective.beta_neg=64.0", name="larger"),
        run(*plain, LEVELS % "", name="smaller"),
    ]
    factor, larger, smaller = ([line["terms/exp_elbo_fake"] for line in lines] for _, _, lines in runs)
    assert factor == larger and factor != smaller


def test_learning_rates_follow_their_schedules_and_the_level(run):
    """Rates are those of the images at which a step ends, so the first one of a warm-up trains too."""
    growing = [STYLE, LEVELS % ", lr_factor: 0.5", "tracking.log_images=16"]
    schedules = [
        "encoder_optimizer.schedule={kind: constant, warmup_images: 64}",
        "decoder_optimizer.schedule={kind: milestones, warmup_images: 0, milestones_images: [48], gamma: 0.1}",
    ]
    _, settings, lines = run(*growing, *schedules, "encoder_optimizer.lr=0.001", "decoder_optimizer.lr=0.002")
    rates = [[line[f"optimizer/lr_{name}"] for line in lines] for name in ("encoder", "decoder")]
    assert rates[0] == pytest.approx([0.5 * 0.001 / 4, 0.5 * 0.001 / 2, 0.001 * 3 / 4, 0.001])
    assert rates[1] == pytest.approx([0.5 * 0.002, 0.5 * 0.002, 0.002, 0.0002])


@pytest.mark.parametrize("still, moves", [("encoder", "decoder"), ("decoder", "encoder")])
def test_each_network_moves_at_its_own_rate(run, still, moves):
    _, settings, _ = run("schedule.total_images=16", f"{still}_optimizer.lr=1e-30")
    weights = checkpoint.read(Folder(settings.run.directory), "000000000016").tensors["weights"]
    networks = models.build(seed=settings.run.seed, **settings.model.model_dump())
    stood = {
        name: [
            torch.allclose(value, weights[f"{name}.{key}"], rtol=0, atol=1e-20)
            for key, value in getattr(networks, name).state_dict().items()
        ]
        for name in (still, moves)
    }
    assert all(stood[still]) and not any(stood[moves])


def test_the_average_counts_the_first_step(run):
    """The half-life is half of the 16 images at its end: a quarter of what was there stays."""
    _, settings, _ = run("schedule.total_images=16", "ema.halflife_images=100", "ema.rampup_ratio=0.5")
    found = checkpoint.read(Folder(settings.run.directory), "000000000016").tensors
    networks = models.build(seed=settings.run.seed, **settings.model.model_dump())
    for name, network in zip(("encoder", "decoder"), networks):
        for key, start in network.state_dict().items():
            key = f"{name}.{key}"
            expected = torch.lerp(start, found["weights"][key], 0.75)
            assert not torch.equal(start, found["weights"][key])
            assert torch.allclose(found["average"][key], expected, rtol=1e-6, atol=1e-8)  # float32 rounding


def test_a_run_begins_as_a_plain_vae(run):
    """For so many images it is one, of the same betas; then it is told apart, and bootstrap's target starts from there."""
    often = ["tracking.log_images=16", "run.checkpoint_images=16", "run.keep_checkpoints=9"]
    bootstrap = ["objective.name=bootstrap", "objective.vae_images=32", "objective.target_refresh_images=1000"]
    _, settings, lines = run(*often, *bootstrap)
    _, _, plain = run(*often, "objective:={name: vae, beta_kl: 0.5}", name="vae")
    assert ["terms/exp_elbo_fake" in line for line in lines] == [False, False, True, True]
    assert [line["loss/loss_encoder"] for line in lines[:2]] == [line["loss/loss_encoder"] for line in plain[:2]]
    folder = Folder(settings.run.directory)
    found = {number: checkpoint.read(folder, f"{number:012d}").tensors for number in (16, 32, 64)}
    for name, value in found[32]["target"].items():
        assert torch.equal(value, found[32]["weights"][f"decoder.{name}"]), name
        assert torch.equal(value, found[64]["target"][name]), name
    assert any(
        not torch.equal(value, found[32]["weights"][f"decoder.{name}"]) for name, value in found[16]["target"].items()
    )


@pytest.mark.parametrize("vae_images, told", [(32, True), (16, False), (0, False)])
def test_a_run_that_stays_a_vae_says_so(run, capfd, vae_images, told):
    _, _, lines = run("schedule.total_images=32", f"objective.vae_images={vae_images}", "tracking.log_images=1")
    notes = [line for line in capfd.readouterr().err.splitlines() if "the run ends as a plain VAE" in line]
    assert len(notes) == told == ("terms/exp_elbo_fake" not in lines[-1])


@pytest.mark.parametrize(
    "total, told",
    [
        (32, "ends at 8 pixels, before its schedule reaches the last level; nor is it judged"),
        (80, "ends while its last level still fades in; nor is it judged"),
        (97, None),
    ],
)
def test_a_run_that_ends_before_it_is_grown_says_so(run, tmp_path, capfd, total, told):
    """What is said at the start is what becomes of it: a batch is 16, the second level fades in from 32 to 96 images."""
    judging = ["evaluate.every_images=16", "evaluate.metrics=[mse]", "evaluate.num_reals=16", "tracking.log_images=1"]
    _, _, lines = run(STYLE, LEVELS % "", f"schedule.total_images={total}", "schedule.batch_size=16", *judging)
    notes = [line for line in capfd.readouterr().err.splitlines() if "the run ends" in line]
    assert len(notes) == (told is not None) and all(told in note for note in notes)
    last = [line for line in lines if "schedule/blend" in line][-1]
    grown = (last["schedule/resolution"], last["schedule/blend"]) == (16, 1)
    assert grown == (told is None) == (tmp_path / "run" / "evaluations").exists()


def test_advice_after_a_loss_that_is_not_finite_names_what_the_objective_has(run):
    with pytest.raises(UserError, match="non-finite.*what usually helps: lower the learning rates$"):
        run("objective:={name: vae}", "encoder_optimizer.lr=1e20", "decoder_optimizer.lr=1e20")


def test_the_points_of_a_life_without_a_checkpoint_are_not_shown(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("tracking.tensorboard=true")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run("tracking.tensorboard=true", "schedule.total_images=32")
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("terms/rec")] == [32]


def test_a_compiled_run_can_begin(tmp_path, monkeypatch):
    """Nothing is compiled before the first step. In a process of its own: here others may have imported what it needs.

    DeepSpeed has the run's device, also where the environment still names the one that it was installed for.
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    code = (
        "from sivae import config, distributed; from sivae.state import TrainingState\n"
        f"settings = config.load('configs/digits.yaml', ['run.directory={tmp_path}', 'engine.compile=true'])\n"
        "with distributed.join('cpu') as group: state = TrainingState(settings, group, accumulation=1)\n"
        "print(state.encoder.network._compiled_call_impl is not None)\n"
    )
    done = finished([sys.executable, "-c", code])
    assert done.returncode == 0 and done.stdout.strip().endswith("True")


def test_a_process_that_trained_on_another_kind_of_device_says_so(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with distributed.join("cpu"):
        engines._import_deepspeed(torch.device("cpu"))
    with pytest.raises(UserError, match="trained on cpu before.*start another process"):
        engines._import_deepspeed(torch.device("cuda", 0))


@pytest.mark.slow  # a C++ compiler at work for a minute or two
def test_a_compiled_run_is_the_same_to_rounding(run):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    common = [
        "engine.channels_last=true",
        "schedule.total_images=32",
        "tracking.log_images=16",
        "schedule.batch_size=16",
    ]
    plain, compiled = (run(*common, f"engine.compile={on}", name=f"compile-{on}")[2] for on in ("false", "true"))
    assert len(plain) == len(compiled) > 1
    for ours, theirs in zip(compiled, plain):
        terms = {name: value for name, value in theirs.items() if name.startswith("terms/")}
        assert len(terms) > 5 and {name: ours[name] for name in terms} == pytest.approx(terms, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_reduction_reaches_both_engines(overlap):
    overrides = ["engine.zero_stage=2", f"engine.overlap_reduction={overlap}", "model.channels=[8,16]"]
    settings = config.load("configs/digits.yaml", overrides)
    with distributed.join("cpu") as group:
        state = TrainingState(settings, group, accumulation=1)
        assert (state.graphs(1) is PLAIN) == overlap
        assert [engine.engine.zero_overlap_comm() for engine in (state.encoder, state.decoder)] == [overlap, overlap]


def test_images_fade_in_as_their_level_does(run, tmp_path, monkeypatch):
    seen = []
    real = images.at_level
    monkeypatch.setattr(images, "at_level", lambda x, *stage: seen.append((x, real(x, *stage))) or seen[-1][1])
    run(STYLE, LEVELS % "", "schedule.total_images=64", "tracking.picture_images=1000")
    steps = [pair for pair in seen if len(pair[0]) == 16][:4]
    assert [out.shape[-1] for _, out in steps] == [8, 8, 16, 16]
    first, second = steps[2:]
    # The fade begins at 0: the images are as coarse as the level below; at 16 of 64 images, at 1/2 - 1/2 cos(pi / 4).
    coarse = lambda x: (
        x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )  # noqa: E731
    assert torch.allclose(first[1], coarse(first[0]), atol=1e-6)
    blend = 0.5 - 0.5 * math.cos(math.pi / 4)
    assert torch.allclose(second[1], blend * second[0] + (1 - blend) * coarse(second[0]), atol=1e-6)


# DeepSpeed's ZeRO looks on the host whether the norm of the gradient is finite, once a step of each network.
ZERO_READS = {"_local_scalar_dense": 2}


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], {}),
        (["engine.micro_batch_size=4", "encoder_optimizer.clip_grad_norm=1.0"], {}),
        (["objective.augment=[color]", "engine.precision=bfloat16"], {}),
        (["objective.name=intro_vae"], {}),
        (["objective.name=bootstrap"], {}),
        (["engine.recompute_from_pixels=8", "engine.shared_forward=false"], {}),
        ([STYLE, LEVELS % "", "objective.style_mixing=0.9"], {}),
        (["engine.zero_stage=1"], ZERO_READS),
        (["engine.zero_stage=2"], ZERO_READS),
        (["engine.zero_stage=3"], ZERO_READS),
    ],
    ids=str,
)
def test_training_between_two_log_lines_reads_nothing_back(run, monkeypatch, overrides, expected):
    """The loop as on a GPU, where only logging, saving and drawing look. Data may be read from the host's memory."""
    found = []

    class Watched(trainer.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.always_looks = False

        def _next(self, *arguments):
            found.append(dict(reads.found))
            reads.found.clear()
            with reads.paused():
                return super()._next(*arguments)

    monkeypatch.setattr(trainer, "Trainer", Watched)
    often = ["schedule.total_images=128", "run.checkpoint_images=1000", "tracking.picture_images=1000"]
    with HostReads() as reads:
        run(*often, "tracking.log_images=64", *overrides)
    # Before the first step, then one for each; the fourth logs, as does the last, which no other follows. In the first two steps of
    # stage 3 DeepSpeed compares among the ranks what it traced.
    steps = (3, 5, 6, 7) if "engine.zero_stage=3" in overrides else (1, 2, 3, 5, 6, 7)
    assert [found[step] for step in steps] == [expected] * len(steps)
    assert found[4] != expected, "a log line reads"


def test_a_store_that_is_away_for_a_while(cache_dir, monkeypatch, caplog):
    """Longer than the attempts take: a checkpoint waits for it, and training ends as if nothing had been."""
    monkeypatch.setitem(Folder.__init__.__kwdefaults__, "backoff_sec", 0.01)
    with object_store("runs") as options:
        proxy = Proxy(address(options))
        through = s3_options(("127.0.0.1", proxy.port)) | {"config_kwargs": {"retries": {"max_attempts": 0}}}
        settings = config.load("configs/digits.yaml", [
            "run.directory=s3://runs/run", f"run.storage_options={json.dumps(through)}", f"data.cache_dir={cache_dir}",
            "data.num_workers=0", "model.channels=[8,16]", "model.latent_dim=4", "schedule.total_images=64",
            "run.checkpoint_images=32", "tracking.log_images=32", "tracking.progress=false", "tracking.tensorboard=false",
        ])  # fmt: skip

        def asked_on() -> bool:
            return any("no answer" in message for message in caplog.messages)

        def come_back() -> None:
            while not asked_on() and threading.main_thread().is_alive():
                time.sleep(0.05)
            proxy.behave()

        away = threading.Thread(target=come_back, daemon=True)

        def report(metrics, name):
            if away.ident is None:
                proxy.disturb(ERROR_503, match="", method=None)
                away.start()

        result = trainer.train(settings, report)
        away.join()
        proxy.close()
        assert asked_on() and result.images_seen == 64 and result.checkpoint == "000000000064"
