"""Proves that activation checkpointing changes no gradient, by a bit, in any family, with random noise and bfloat16 too, and
at no ZeRO stage; that it takes the blocks it is told to; and that fewer activations are kept.

    python -m pytest tests/unit/test_recompute.py
"""

import pytest
import torch

from sivae import config, distributed, models, objectives, randomness
from sivae.config import parse_model
from sivae.engines import Engine
from sivae.graphs import BriefGraphs, Graphs, SharedGraphs
from sivae.models import recompute
from sivae.objectives import Draws
from sivae.state import TrainingState
from sivae.step import FiniteGate, Pass, train_step
from tests.processes import ROOT
from tests.unit.test_graphs import run

MODELS = {
    "conv": {"family": "conv", "num_channels": 1, "resolution": 32, "channels": [4, 8, 8], "group_size": 4, "latent_dim": 4},
    "style": {
        "family": "style", "num_channels": 1, "resolution": 32, "base_channels": 4, "max_channels": 8, "latent_dim": 4,
        "num_mapping_layers": 2,
    },
    "translation": {
        "family": "translation", "num_channels": 1, "resolution": 32, "channels": [4, 8, 8], "group_size": 4, "latent_dim": 4,
        "class_dim": 2, "style_dim": 8,
    },
}  # fmt: skip


def build(family, from_pixels=None):
    networks = models.build(**parse_model(MODELS[family]).model_dump())
    if family == "style":
        for block in networks.decoder.blocks:  # so that noise is seen
            torch.nn.init.ones_(block.noise1), torch.nn.init.ones_(block.noise2)
    marked = [recompute.mark(network, from_pixels) for network in networks] if from_pixels else None
    return networks, marked


@pytest.mark.parametrize(
    "family, from_pixels, expected",
    [("conv", 1, [4 - 1, 4]), ("conv", 16, [1, 2]), ("conv", 32, [0, 1]), ("style", 1, [4, 4]), ("style", 16, [2, 2]), ("style", 64, [0, 0]),
     ("translation", 1, [6, 4]), ("translation", 16, [2, 2]), ("translation", 32, [0, 1])],
)  # fmt: skip
def test_blocks_are_taken_by_their_size(family, from_pixels, expected):
    networks, marked = build(family, from_pixels)
    assert marked == expected
    for network in networks:
        sizes = [pixels for pixels, block in zip(network.block_pixels, network.blocks) if hasattr(block, "recomputed")]
        assert all(pixels >= from_pixels for pixels in sizes)
        seen = []  # the size that each block really makes or takes
        hooks = [
            block.register_forward_hook(
                lambda module, inputs, output: seen.append(
                    max(inputs[0].shape[-1], (output[0] if isinstance(output, tuple) else output).shape[-1])
                )
            )
            for block in network.blocks
        ]
        with torch.no_grad():
            network(torch.rand(2, 1, 32, 32) if network is networks.encoder else torch.randn(2, 4))
        for hook in hooks:
            hook.remove()
        assert seen == network.block_pixels


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_the_same_and_fewer_activations_are_kept(family, bfloat16):
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    results = {}
    for from_pixels in (None, 1):
        (encoder, decoder), _ = build(family, from_pixels)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)  # the noise
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                mu, logvar = encoder(x)
                rec = decoder(mu + logvar)
            loss = (rec.float() - x).square().sum() + mu.float().square().sum()
        loss.backward()
        parameters = [*encoder.parameters(), *decoder.parameters()]
        grads = [p.grad for p in parameters if p.grad is not None]
        results[from_pixels] = loss.detach(), grads, sum(kept.values())
    (loss, grads, kept), (again, same, fewer) = results[None], results[1]
    assert torch.equal(loss, again) and len(grads) == len(same) > 20
    assert all(torch.equal(a, b) for a, b in zip(grads, same))
    assert fewer < 0.5 * kept, (fewer, kept)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", MODELS)
def test_a_step_is_the_same_at_every_stage(family, stage):
    states = []
    with distributed.join("cpu") as group:
        for from_pixels in (None, 1):
            networks, _ = build(family, from_pixels)
            gate = FiniteGate(group)
            engines = [
                Engine(
                    network, group, lr=1e-3, betas=[0.5, 0.99], eps=1e-8, weight_decay=0.0, clip_grad_norm=None,
                    zero_stage=stage, precision="float32", offload_optimizer=False, micro_batch_size=2, accumulation=2,
                    found_inf=gate.found_inf,
                )
                for network in networks
            ]  # fmt: skip
            objective = objectives.build("soft_intro_vae", num_values=32**2, gamma_r=0.5)
            for step in range(2):
                x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(step))
                draws = [randomness.step_draws(0, range(4 * step + i, 4 * step + i + 2), 4, x.device) for i in (0, 2)]
                passes = [Pass(x[i : i + 2], None, draws[i // 2]) for i in (0, 2)]
                randomness.seed_noise(0, step, 0)
                train_step(
                    *engines, None, objective, passes, gate, step, lr_encoder=1e-3, lr_decoder=1e-3, ema_decay=0.5
                )
            assert gate.read() is None
            states.append([engine.state_dict() for engine in engines])
    for plain, recomputed in zip(*states):
        assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    "family, kind",
    [
        *((family, BriefGraphs) for family in MODELS),
        *((family, SharedGraphs) for family in MODELS if family != "style"),
    ],
)
def test_gradients_are_the_same_however_graphs_are_kept(family, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 32, 32, generator=generator)
    draws = Draws(*(torch.randn(2, 4, generator=generator) for _ in Draws.names()))
    objective = objectives.build("soft_intro_vae", num_values=32**2, gamma_r=0.5)
    found = []
    for from_pixels, chosen in ((None, Graphs), (1, kind)):
        networks, _ = build(family, from_pixels)
        torch.manual_seed(0)  # the noise
        graphs = Graphs() if chosen is Graphs else kind(*networks)
        found.append(run(objective, (*networks, None), graphs, x, draws))
    (terms, gradients, _), (again, same, _) = found
    assert all(torch.allclose(again[name], value, rtol=1e-5) for name, value in terms.items())
    assert len(gradients) == len(same) > 20
    for gradient, other in zip(gradients, same):
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.allclose(
            gradient, other, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9
        )


def test_the_setting_reaches_both_networks():
    settings = config.load(
        str(ROOT / "configs" / "digits.yaml"), ["engine.recompute_from_pixels=8", "data.num_workers=0"]
    )
    with distributed.join("cpu") as group:
        state = TrainingState(settings, group, accumulation=1)
    for engine in (state.encoder, state.decoder):
        network = engine.network
        found = [hasattr(block, "recomputed") for block in network.blocks]
        assert found == [pixels >= 8 for pixels in network.block_pixels] and any(found) and not all(found)
