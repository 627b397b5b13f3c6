"""Proves the shapes of the conv and mlp families from 28 to 1024 pixels (test_style.py has the style family's), that labels matter, that no norm but `batch` lets an image see
the rest of its batch, and that the weights are a function of the seed alone.

    python -m pytest tests/unit/test_models.py
"""

import pytest
import torch
import torch.nn.functional as F

from sivae import models
from sivae.config import parse_model
from sivae.models.conv import GroupNorm, PixelNorm, ResidualBlock, make_norm
from sivae.step_trace import _GpuAutocast

NORMS = ("batch", "group", "layer", "pixel", "none")


def conv(resolution=16, channels=(4, 8), latent_dim=3, num_channels=1, seed=0, **fields):
    fields = {"norm": "group", "group_size": 2} | fields
    settings = parse_model(
        {"family": "conv", "resolution": resolution, "channels": list(channels), "latent_dim": latent_dim,
         "num_channels": num_channels, **fields}
    )  # fmt: skip
    return models.build(seed=seed, **settings.model_dump())


def mlp(seed=0, **fields):
    settings = parse_model({"family": "mlp", "num_hidden": 16, "num_layers": 2, **fields})
    return models.build(seed=seed, **settings.model_dump())


def style(seed=0, **fields):
    settings = parse_model(
        {"family": "style", "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 3, "num_channels": 1,
         "num_mapping_layers": 2, **fields}
    )  # fmt: skip
    return models.build(seed=seed, **settings.model_dump())


def translation(seed=0, **fields):
    settings = parse_model(
        {"family": "translation", "resolution": 16, "channels": [4, 8], "latent_dim": 3, "class_dim": 1, "num_channels": 1,
         "group_size": 2, **fields}
    )  # fmt: skip
    return models.build(seed=seed, **settings.model_dump())


def small(family, **fields):
    """A network for images of 16 pixels and 1 channel with 3 latents."""
    if family == "mlp":
        return mlp(sample_shape=[1, 16, 16], latent_dim=3, **fields)
    return {"conv": conv, "style": style, "translation": translation}[family](**fields)


def images(count, channels=1, resolution=16, seed=0):
    return torch.rand(count, channels, resolution, resolution, generator=torch.Generator().manual_seed(seed))


def latents(count, latent_dim=3, seed=1):
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


SIZES = [(28, [4, 4]), (28, [4]), (32, [4, 4, 4]), (64, [4] * 4), (128, [4] * 5), (256, [2] * 6), (1024, [2] * 8)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("resolution, channels", SIZES, ids=str)
def test_conv_shapes(resolution, channels, norm):
    count = 1 if resolution == 1024 else 2
    encoder, decoder = conv(resolution, channels, latent_dim=5, num_channels=3, norm=norm)
    with torch.no_grad():
        mu, logvar = encoder(images(count, 3, resolution))
        rec = decoder(latents(count, 5))
    assert mu.shape == logvar.shape == (count, 5)
    assert rec.shape == (count, 3, resolution, resolution)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in (mu, logvar, rec))


def test_conv_halves_and_doubles_once_per_level():
    encoder, decoder = conv(64, [4, 8, 16], latent_dim=5)
    assert encoder.head.in_features == 16 * 8 * 8 and encoder.head.out_features == 10
    assert decoder.stem.in_features == 5 and decoder.stem.out_features == 16 * 8 * 8
    assert [block.conv2.out_channels for block in encoder.blocks] == [8, 16, 16]
    assert [block.conv2.out_channels for block in decoder.blocks] == [16, 8, 4, 4]


@pytest.mark.parametrize("shape", [[2], [7], [1, 28, 28], [3, 32, 32]], ids=str)
def test_mlp_shapes(shape):
    encoder, decoder = mlp(sample_shape=shape, latent_dim=5)
    mu, logvar = encoder(torch.rand(4, *shape))
    assert mu.shape == logvar.shape == (4, 5)
    assert decoder(torch.randn(4, 5)).shape == (4, *shape)


def test_mlp_has_the_layers_that_were_asked_for():
    encoder, decoder = mlp(sample_shape=[2], latent_dim=5, num_layers=3)
    for network in (encoder, decoder):
        assert sum(isinstance(layer, torch.nn.Linear) for layer in network.layers) == 3 + 2
        assert sum(isinstance(layer, torch.nn.ReLU) for layer in network.layers) == 3 + 1
    assert not isinstance(decoder.layers[-1], torch.nn.ReLU)


# The translation family takes no labels at all.
CONDITIONAL = [family for family in models.FAMILIES if family != "translation"]


def conditional(family):
    encoder, decoder = small(family, num_classes=3)
    return encoder, decoder.eval()  # without fresh noise


@pytest.mark.parametrize("family", CONDITIONAL)
def test_labels_change_the_output(family):
    encoder, decoder = conditional(family)
    x, z = images(1).expand(3, -1, -1, -1), latents(1).expand(3, -1)
    mu, logvar = encoder(x, torch.arange(3))
    rec = decoder(z, torch.arange(3))
    for output in (mu, logvar, rec):
        assert len({tuple(row.flatten().tolist()) for row in output}) == 3  # same input, three answers
    same = decoder(z, torch.tensor([1, 1, 1]))
    assert torch.allclose(same[0], rec[1], atol=1e-6)  # the row of another batch: another order of summation


@pytest.mark.parametrize("family", CONDITIONAL)
def test_a_conditional_model_refuses_to_guess_labels(family):
    encoder, decoder = conditional(family)
    for network, x in ((encoder, images(2)), (decoder, latents(2))):
        with pytest.raises(ValueError, match="labels are needed"):
            network(x)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_unconditional_model_ignores_labels(family):
    encoder, _ = small(family)
    x = images(2)
    assert torch.equal(encoder(x, torch.tensor([0, 1]))[0], encoder(x)[0])


def dependence(norm):
    """Largest change of image 0's encoding and decoding when the other images of a batch in train mode change."""
    encoder, decoder = conv(norm=norm, channels=[4, 4])
    encoder.train(), decoder.train()
    x, y = images(4), images(4, seed=7)
    z, w = latents(4), latents(4, seed=7)
    y[0], w[0] = x[0], z[0]
    changes = [(encoder(x)[part][0] - encoder(y)[part][0]).abs().max() for part in (0, 1)]
    return max(*changes, (decoder(z)[0] - decoder(w)[0]).abs().max()).item()


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "batch"])
def test_an_image_does_not_depend_on_its_batch(norm):
    # Same shapes and the same place in the batch: not even the order of summation differs.
    assert dependence(norm) == 0


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "batch"])
def test_an_image_alone_is_the_image_in_a_batch(norm):
    encoder, decoder = conv(norm=norm, channels=[4, 4])
    x, z = images(4), latents(4)
    # Other shapes may choose other kernels: float32 rounding of values of size one.
    assert torch.allclose(encoder(x)[0][:1], encoder(x[:1])[0], atol=1e-5)
    assert torch.allclose(decoder(z)[:1], decoder(z[:1]), atol=1e-5)


def test_batch_norm_mixes_the_images_of_a_batch():
    """What the others avoid; so the check above can fail."""
    assert dependence("batch") > 1e-3


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "batch"])
def test_train_and_eval_are_the_same(norm):
    encoder, decoder = conv(norm=norm, channels=[4, 4])
    x, z = images(2), latents(2)
    trained = encoder.train()(x)[0], decoder.train()(z)
    used = encoder.eval()(x)[0], decoder.eval()(z)
    assert all(torch.equal(a, b) for a, b in zip(trained, used))
    assert not list(encoder.buffers())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_weights_are_a_function_of_the_seed(family):
    def weights(seed):
        networks = small(family, seed=seed)
        return torch.cat([p.flatten() for network in networks for p in network.parameters()])

    torch.manual_seed(1)
    first = weights(3)
    torch.rand(5)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


def test_building_leaves_the_global_generators_alone(monkeypatch):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs' generators"))
    conv()
    assert torch.equal(torch.rand(3), expected)


def test_encoder_and_decoder_start_from_different_draws():
    encoder, decoder = conv(channels=[4, 4])
    assert not torch.equal(encoder.blocks[0].conv1.weight, decoder.blocks[0].conv1.weight)


@pytest.mark.parametrize("family", ["mlp", "conv", "translation"])
def test_sigmoid_output_lies_in_zero_to_one_and_linear_does_not(family):
    def decode(output):
        _, decoder = small(family, output=output)
        return decoder(latents(8) * 20)

    linear, squashed = decode("linear"), decode("sigmoid")
    assert linear.min() < 0 and ((squashed > 0) & (squashed < 1)).all()
    assert torch.equal(squashed, linear.sigmoid())


def block(residual, width_in=4, width_out=8):
    torch.manual_seed(0)
    made = ResidualBlock(width_in, width_out, "batch", 2, residual, project=width_in != width_out)
    with torch.no_grad():
        made.norm2.weight.uniform_(0.5, 2)
    return made


def test_the_residual_block_of_each_paper():
    """Against the two formulas, written out; both are evaluated in eval mode of the same weights."""
    x = images(2, 4, 8, seed=3)
    outputs = {}
    for residual in ("soft_intro_vae", "intro_vae"):
        made = block(residual).eval()
        y = F.leaky_relu(made.norm1(F.conv2d(x, made.conv1.weight, padding=1)), 0.2)
        y, skip = F.conv2d(y, made.conv2.weight, padding=1), F.conv2d(x, made.project.weight)
        y = made.norm2(y) + skip if residual == "soft_intro_vae" else made.norm2(y + skip)
        outputs[residual] = made(x)
        assert torch.equal(outputs[residual], F.leaky_relu(y, 0.2))
    assert (outputs["soft_intro_vae"] - outputs["intro_vae"]).abs().max() > 1e-2


@pytest.mark.parametrize("norm, together", [("group", 4), ("layer", 32)])
def test_what_a_norm_takes_together(norm, together):
    """Groups of `group_size` channels, or all channels of an image."""
    x = images(2, 32) * torch.arange(1.0, 33)[:, None, None]
    groups = x.unflatten(1, (-1, together)).flatten(2)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    expected = ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x)
    assert torch.allclose(make_norm(norm, 32, group_size=4)(x), expected, atol=1e-5)


def test_pixel_norm_gives_unit_mean_square():
    norm = PixelNorm(8)
    with torch.no_grad():
        norm.bias.fill_(0.25)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    mean_square = (norm(x) - 0.25).square().mean(dim=1)
    # The epsilon of 1e-5 beside a mean square of about 900.
    assert torch.allclose(mean_square, torch.ones_like(mean_square), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_gets_a_gradient(norm):
    encoder, decoder = conv(norm=norm, num_channels=1)
    mu, logvar = encoder(images(3))
    (mu.square().sum() + logvar.square().sum() + decoder(latents(3)).square().sum()).backward()
    for network in (encoder, decoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_of_bfloat16_is_that_of_float32_rounded(layout):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 8, 6, 6, generator=generator).bfloat16().float() for _ in range(2))
    norm = GroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    exact = torch.nn.GroupNorm(2, 8)
    exact.load_state_dict(norm.state_dict())
    x.requires_grad_()
    exact(x).backward(gradient)
    low = x.detach().bfloat16().contiguous(memory_format=layout).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(low)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=layout)
    assert torch.equal(y, exact(x).bfloat16())
    y.backward(gradient.bfloat16())
    assert torch.equal(low.grad, x.grad.bfloat16())
    for ours, theirs in zip(norm.parameters(), exact.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    # Frozen, only the image gets a gradient.
    norm.requires_grad_(False).zero_grad()
    low.grad = None
    norm(low).backward(gradient.bfloat16())
    assert torch.equal(low.grad, x.grad.bfloat16()) and norm.weight.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_channels_last_changes_rounding_alone(norm):
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        encoder, decoder = conv(norm=norm)
        encoder.memory_format = decoder.memory_format = layout
        layouts = []
        for network in (encoder, decoder):
            network.blocks[0].conv1.register_forward_hook(lambda _, inputs, y: layouts.append(y.stride()[1] == 1))
        x = images(4, seed=1)
        mu, logvar = encoder(x)
        image = decoder(mu)
        assert layouts == [layout is torch.channels_last] * 2
        (image.square().sum() + logvar.sum()).backward()
        found.append([image, mu, *(p.grad for network in (encoder, decoder) for p in network.parameters())])
    for expected, ours in zip(*found):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "family, stage", [("conv", {}), ("style", {}), ("style", {"level": 1, "blend": 0.5}), ("translation", {})]
)
def test_under_a_gpus_autocast_blocks_give_bfloat16(family, stage):
    """Where one gives float32, its activations take twice the memory, and fading in refuses to mix both."""
    found = []
    encoder, decoder = small(family)
    for block in [*encoder.blocks, *decoder.blocks]:
        block.register_forward_hook(lambda block, inputs, y: found.append(y[0] if type(y) is tuple else y))
    with torch.autocast("cpu", torch.bfloat16), _GpuAutocast():
        encoder(images(2, resolution=4 << stage.get("level", 2)), **stage)
        decoder(latents(2), **stage)
    assert {value.dtype for value in found} == {torch.bfloat16}
