"""The same run on a GPU: every ZeRO stage, bfloat16, and close to the CPU's. Skipped without one.

pytest -m gpu
"""

import json

import pytest
import torch

from sivae import config, trainer
from tests.processes import run_sivae
from tests.unit.test_instance_norm import of_both
from tests.unit.test_models import images, latents, small

pytestmark = pytest.mark.gpu


@pytest.fixture
def losses(cache_dir, tmp_path):
    """Loss of the encoder at each of four log lines of a small run on digits."""

    def train(name: str, *overrides: str, ranks: int = 1) -> list[float]:
        done = run_sivae(
            [
                "train", "configs/digits.yaml", f"run.directory={tmp_path / name}", f"data.cache_dir={cache_dir}", "model.channels=[8,16]",
                "model.latent_dim=4", "schedule.total_images=640", "tracking.log_images=160", "tracking.progress=false", *overrides,
            ],
            ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss/loss_encoder"] for line in lines]

    return train


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_is_close_to_the_cpu(losses, stage):
    # Other kernels: three digits of the loss agree over 40 steps.
    assert losses("gpu", f"engine.zero_stage={stage}") == pytest.approx(losses("cpu", "run.device=cpu"), rel=2e-2)


def test_bfloat16_is_close_to_float32(losses):
    assert losses("rounded", "engine.precision=bfloat16") == pytest.approx(losses("exact"), rel=5e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", [0, 3])
def test_two_gpus_learn_what_one_does(losses, stage):
    assert losses("two", f"engine.zero_stage={stage}", ranks=2) == pytest.approx(losses("one"), rel=2e-2)


def test_training_between_two_log_lines_never_waits_for_the_gpu(cache_dir, tmp_path, monkeypatch):
    """torch raises where the host would wait; logging, saving and fetching data may."""

    class Watched(trainer.Trainer):
        def _step(self, batch):
            torch.cuda.set_sync_debug_mode("error")
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch.cuda, "synchronize", waited)  # which that mode lets pass
                    super()._step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def waited(*_):
        raise AssertionError("torch.cuda.synchronize")

    monkeypatch.setattr(trainer, "Trainer", Watched)
    settings = config.load(
        "configs/digits.yaml",
        [f"run.directory={tmp_path}", f"data.cache_dir={cache_dir}", "data.num_workers=0", "schedule.total_images=320",
         "tracking.log_images=160", "tracking.progress=false"],
    )  # fmt: skip
    assert trainer.train(settings).images_seen == 320


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_instance_norm_is_that_of_the_cpu(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, by_y = (torch.randn(2, 3, 32, 32, generator=generator).to(dtype) for _ in range(2))
    style, by_statistics = (torch.randn(2, 6, generator=generator) for _ in range(2))
    found = {}
    for device in ("cpu", "cuda"):
        given = [value.to(device).requires_grad_() for value in (x * 3 + 5, style)]
        outputs = of_both(*given, 1e-5)
        gradients = torch.autograd.grad(outputs, given, (by_y.to(device), by_statistics.to(device)))
        assert gradients[0].dtype == outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
        found[device] = [value.float().cpu() for value in (*outputs, *gradients)]
    for value, expected in zip(found["cuda"], found["cpu"]):
        assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "family, stage", [("conv", {}), ("style", {}), ("style", {"level": 1, "blend": 0.5}), ("translation", {})]
)
def test_every_family_has_gradients_in_bfloat16(family, stage):
    encoder, decoder = (network.cuda() for network in small(family))
    with torch.autocast("cuda", torch.bfloat16):
        mu, logvar = encoder(images(2, resolution=4 << stage.get("level", 2)).cuda(), **stage)
        made = decoder(latents(2).cuda(), **stage)
    (mu.float().sum() + logvar.float().sum() + made.float().square().sum()).backward()
    for network in (encoder, decoder):
        found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert found and all(gradient.isfinite().all() for gradient in found)
