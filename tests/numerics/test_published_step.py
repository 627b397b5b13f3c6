"""The yardstick of benchmarks/step.py computes what the published code computed: losses of each recorded step.

pytest tests/numerics/test_published_step.py
"""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import published, published_style
from tests.numerics.test_golden import FOLDER, LOSS_TOLERANCE, Golden
from tests.numerics.test_golden_style import IMAGE_TOLERANCE

ORDER = ("z_prior", "eps_real", "eps_rec", "eps_fake", "eps_rec_d", "eps_fake_d")


@pytest.mark.parametrize("observes_mean", [False, True])
@pytest.mark.parametrize("family", ["conv", "mlp"])
def test_losses_of_the_recorded_steps(family, observes_mean):
    golden = Golden(FOLDER / f"{family}_soft_intro_vae.npz")
    settings = golden.found.settings
    if family == "conv":
        shape = [settings[name] for name in ("num_channels", "resolution", "channels", "latent_dim")]
        encoder, decoder = published.ConvEncoder(*shape), published.ConvDecoder(*shape)
    else:
        shape = [settings["sample_shape"][0], *(settings[name] for name in ("latent_dim", "num_hidden", "num_layers"))]
        encoder, decoder = published.PointEncoder(*shape), published.PointDecoder(*shape)
    for name, network in (("encoder", encoder), ("decoder", decoder)):
        start = {
            key.removeprefix(f"init/{name}."): golden.tensor(key)
            for key in golden.data.files
            if key.startswith(f"init/{name}.") and not key.endswith("loggamma")
        }
        network.load_state_dict(start)
    hp = {name: golden.hp[name] for name in ("scale", "beta_rec", "beta_kl", "beta_neg", "gamma_r")}
    step = published.PublishedStep(encoder, decoder, settings["latent_dim"], **hp, observes_mean=observes_mean)
    for index in range(golden.num_steps):
        x, draws = golden.step(index)
        queue = [dataclasses.asdict(draws)[name] for name in ORDER]
        step.randn = lambda like: queue.pop(0).view_as(like)
        terms = step(x)
        assert not queue
        # The published code keeps the reconstruction error of the decoder phase.
        for name in ("loss_encoder", "loss_decoder", "kl_real", "exp_elbo_rec", "exp_elbo_fake"):
            expected = float(golden.tensor(f"step{index}/{name}"))
            assert terms[name].item() == pytest.approx(expected, rel=LOSS_TOLERANCE), f"{name} of step {index}"


def test_losses_of_the_recorded_style_steps():
    data = np.load(FOLDER / "style_soft_intro_vae.npz")
    arch = {
        name: int(data[f"arch/{name}"]) for name in ("startf", "maxf", "layer_count", "latent_size", "mapping_layers")
    }
    widths = [min(arch["maxf"], arch["startf"] * 2**i) for i in range(arch["layer_count"] + 1)]
    hp = {name: float(data[f"hp/{name}"]) for name in ("scale", "beta_rec", "beta_kl", "beta_neg", "gamma_r", "lr")}
    step = published_style.PublishedStyleStep(
        3, widths, arch["latent_size"], arch["mapping_layers"], **hp, style_mixing=0, device=torch.device("cpu")
    )
    entries = {
        "discriminator": step.encoder,
        "generator": step.decoder,
        "mapping_tl": step.mapping_tl,
        "mapping_fl": step.mapping_fl,
    }
    for entry, network in entries.items():
        start = f"train_init/{entry}/"
        network.load_state_dict(
            {key.removeprefix(start): torch.from_numpy(data[key]) for key in data.files if key.startswith(start)}
        )
        network.requires_grad_(True)
    order = ("z_prior", "eps_real", "eps_rec", "eps_fake", "z_prior_d", "eps_real_d", "eps_rec_d", "eps_fake_d")
    for index in range(3):
        queue = [torch.from_numpy(data[f"step{index}/{name}"]) for name in order]
        step.randn = lambda like: queue.pop(0)
        losses = step(torch.from_numpy(data[f"step{index}/x"]))
        assert not queue
        for name, value in losses.items():
            assert value.item() == pytest.approx(float(data[f"step{index}/{name}"]), rel=LOSS_TOLERANCE), (name, index)
        # Noise weights were not trained in the recorded steps.
        with torch.no_grad():
            for name, parameter in step.decoder.named_parameters():
                if "noise_weight" in name:
                    parameter.zero_()


def test_the_style_encoder_where_kernels_change_the_size():
    data = np.load(FOLDER / "style_fused_scale.npz")
    groups = [
        name.removesuffix("/x") for name in data.files if name.endswith("blend1/x") and data[name].shape[-1] == 128
    ]
    levels = sum(key.startswith("init/generator/to_rgb.") and key.endswith("weight") for key in data.files)
    assert groups and 2 ** (levels + 1) == 128
    widths = [data[f"init/discriminator/encode_block.{i}.bias_1"].shape[1] for i in range(levels)]
    widths.append(data[f"init/discriminator/encode_block.{levels - 1}.bias_2"].shape[1])
    latent_dim, channels = data["init/dlatent_avg/buff"].shape[1], int(data["arch/channels"])
    networks = {
        "discriminator": published_style.Encoder(channels, widths, latent_dim),
        "generator": published_style.Decoder(channels, widths, latent_dim),
        "mapping_tl": published_style.Mapping(latent_dim, 2 * latent_dim, 3),
    }
    for entry, network in networks.items():
        start = f"init/{entry}/"
        network.load_state_dict(
            {key.removeprefix(start): torch.from_numpy(data[key]) for key in data.files if key.startswith(start)}
        )
    with torch.no_grad():
        for group in groups:
            x = torch.from_numpy(data[f"{group}/x"])
            mu, logvar = networks["mapping_tl"](networks["discriminator"](x)[:, 0]).chunk(2, dim=1)
            assert np.abs(mu.numpy() - data[f"{group}/mu"]).max() <= IMAGE_TOLERANCE
            assert np.abs(logvar.numpy() - data[f"{group}/logvar"]).max() <= IMAGE_TOLERANCE


def test_a_nan_stops():
    encoder, decoder = published.PointEncoder(2, 2, 4, 1), published.PointDecoder(2, 2, 4, 1)
    step = published.PublishedStep(encoder, decoder, 2, scale=0.5, beta_rec=1, beta_kl=1, beta_neg=1)
    with pytest.raises(RuntimeError, match="NaN"):
        step(torch.full((2, 2), float("nan")))
