"""Proves what the golden numbers of the style family do not: every size from 4 to 1024 pixels, that fading in a level starts
from the level below it, what each kind of noise does, truncation, style mixing, and the average style.

    python -m pytest tests/unit/test_style.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sivae import models
from sivae.config import ConfigError, parse_model
from sivae.models import style
from sivae.models.style import average_styles


def build(seed=0, **fields):
    settings = {"family": "style", "resolution": 16, "base_channels": 4, "max_channels": 8, "latent_dim": 3, "num_channels": 1, "num_mapping_layers": 2}  # fmt: skip
    networks = models.build(seed=seed, **parse_model(settings | fields).model_dump())
    with torch.no_grad():
        for block in networks.decoder.blocks:  # published they start at 0
            block.noise1.normal_(generator=torch.Generator().manual_seed(1))
            block.noise2.normal_(generator=torch.Generator().manual_seed(2))
    return networks


def normals(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("resolution", [4, 8, 64, 256, 1024])
def test_shapes_of_every_level(resolution):
    encoder, decoder = build(resolution=resolution, base_channels=2, max_channels=4, num_channels=3, latent_dim=5)
    assert encoder.num_levels == decoder.num_levels == math.log2(resolution) - 1
    for level in range(encoder.num_levels):
        size = 4 * 2**level
        for blend in (1.0, 0.5):
            with torch.no_grad():
                mu, logvar = encoder(normals(2, 3, size, size), level=level, blend=blend)
                rec = decoder(normals(2, 5), level=level, blend=blend)
            assert mu.shape == logvar.shape == (2, 5) and rec.shape == (2, 3, size, size)
            assert all(value.isfinite().all() and value.dtype == torch.float32 for value in (mu, logvar, rec))


def test_widths_double_inwards_up_to_the_most():
    encoder, decoder = build(resolution=64, base_channels=4, max_channels=16)
    assert [block.conv2.weight.shape[:2] for block in encoder.blocks] == [(8, 4), (16, 8), (16, 16), (16, 16), (16, 16)]
    assert [block.conv2.weight.shape[0] for block in decoder.blocks] == [16, 16, 16, 8, 4]
    assert decoder.constant.shape == (16, 4, 4)


def test_the_highest_level_is_the_default():
    encoder, decoder = build()
    x, z = normals(2, 1, 16, 16), normals(2, 3)
    assert torch.equal(encoder(x)[0], encoder(x, level=2)[0])
    assert torch.equal(decoder.eval()(z), decoder(z, level=2))


def test_a_level_fades_in_from_the_level_below():
    """At blend 0 a new level is the level below: its image enlarged, its encoding of the shrunk image."""
    encoder, decoder = build()
    decoder.eval()
    x, z = normals(2, 1, 16, 16), normals(2, 3)
    shrunk, enlarged = F.avg_pool2d(x, 2), F.interpolate(decoder(z, level=1), scale_factor=2, mode="nearest")
    assert torch.allclose(encoder(x, level=2, blend=0.0)[0], encoder(shrunk, level=1)[0], atol=1e-6)
    assert torch.allclose(decoder(z, level=2, blend=0.0), enlarged, atol=1e-6)
    # and near 1 it is the level itself
    assert torch.allclose(encoder(x, level=2, blend=1 - 1e-7)[0], encoder(x, level=2)[0], atol=1e-5)
    assert torch.allclose(decoder(z, level=2, blend=1 - 1e-7), decoder(z, level=2), atol=1e-5)


def test_what_does_not_exist_is_refused():
    encoder, decoder = build()
    with pytest.raises(ValueError, match="level 3 does not exist; this network has 0 to 2"):
        decoder(normals(2, 3), level=3)
    with pytest.raises(ValueError, match="level 2 takes images of 16 pixels, not 8"):
        encoder(normals(2, 1, 8, 8))
    with pytest.raises(ValueError, match="z has 4 latents an image; there are 6 layers"):
        decoder(normals(2, 4, 3))
    with pytest.raises(ConfigError, match="do not reach 48; 32 or 64 would do"):
        parse_model({"family": "style", "resolution": 48})
    with pytest.raises(ConfigError, match="less than or equal to 1024"):
        parse_model({"family": "style", "resolution": 2048})


def test_random_noise_differs_between_images_and_calls_and_batch_noise_between_calls():
    _, decoder = build()
    z = normals(1, 3).expand(2, -1)
    for mode, alike in (("random", False), ("batch", True), ("fixed", True), ("mean", True), ("none", True)):
        first, second = decoder(z, noise=mode), decoder(z, noise=mode)
        assert torch.allclose(first[0], first[1], atol=1e-6) == alike, mode
        assert torch.equal(first, second) == (mode in ("fixed", "mean", "none")), mode


@pytest.mark.parametrize("noise", ["random", "batch", "mean", "none"])
def test_the_setting_holds_in_training_and_eval_is_a_function_of_z(noise):
    _, decoder = build(noise=noise)
    z = normals(2, 3)
    torch.manual_seed(0)
    trained = decoder.train()(z)
    torch.manual_seed(0)
    assert torch.equal(trained, decoder(z, noise=noise))
    expected = decoder(z, noise=noise if noise in ("mean", "none") else "fixed")
    assert torch.equal(decoder.eval()(z), expected) and torch.equal(decoder(z), expected)


def test_noise_is_weighted_per_channel_and_has_unit_variance():
    x, weight = torch.zeros(3, 2, 64, 64), torch.tensor([0.0, 2.0])
    for mode, maps in (("random", 3), ("batch", 1), ("fixed", 1)):
        noisy = style.add_noise(x, weight, mode, layer=0)
        assert not noisy[:, 0].any()
        # 4096 draws: the deviation of the standard deviation is 1%.
        assert noisy[0, 1].std() == pytest.approx(2.0, rel=0.05) and abs(noisy[0, 1].mean()) < 0.15
        assert len({tuple(image.flatten().tolist()) for image in noisy[:, 1]}) == maps
    assert not torch.equal(style.add_noise(x, weight, "fixed", 0), style.add_noise(x, weight, "fixed", 1))


def test_truncation_pulls_the_first_layers_to_the_average_style():
    _, decoder = build(noise="none")
    decoder.average_style.normal_(generator=torch.Generator().manual_seed(3))
    z, other = normals(2, 3), normals(2, 3, seed=9)
    assert torch.equal(decoder(z, truncation=1.0), decoder(z))
    # All the way and in all layers: the same image whatever z. In four of six layers: no longer.
    assert torch.allclose(decoder(z, truncation=0.0), decoder(other, truncation=0.0), atol=1e-6)
    assert (decoder(z, truncation=0.0, truncation_layers=4) - decoder(other, truncation=0.0, truncation_layers=4)).abs().max() > 1e-3  # fmt: skip
    assert torch.equal(decoder(z, truncation=0.0, truncation_layers=0), decoder(z))
    # By hand: a decoder that is given the truncated styles.
    styles = decoder.styles(z).clone()
    styles[:, :4] = decoder.average_style + 0.7 * (styles[:, :4] - decoder.average_style)
    expected = decoder(z, truncation=0.7, truncation_layers=4)
    decoder.styles = lambda *arguments: styles
    assert torch.allclose(decoder(z), expected, atol=1e-6)


def test_style_mixing_takes_each_layer_from_its_latent():
    _, decoder = build(noise="none")
    a, b = normals(2, 3), normals(2, 3, seed=9)
    layers = torch.arange(6)[None, :, None]
    mixed = torch.where(layers < 2, a[:, None], b[:, None])
    assert torch.allclose(decoder(torch.where(layers < 6, a[:, None], b[:, None])), decoder(a), atol=1e-6)
    styles = decoder.styles(mixed)
    assert torch.allclose(styles[:, :2], decoder.styles(a)[:, :2]) and torch.allclose(styles[:, 2:], decoder.styles(b)[:, 2:])  # fmt: skip
    assert min((decoder(mixed) - decoder(z)).abs().max() for z in (a, b)) > 1e-3


def test_the_average_style_moves_by_each_call_and_not_by_the_number_of_passes():
    _, decoder = build(average_style_decay=0.9)
    z = normals(8, 3)
    expected = torch.zeros(3)
    for batch in (z, z * 2):
        expected = torch.lerp(expected, decoder.mapping(batch).mean(0), 0.1)
    for num_passes in (1, 2, 4):
        decoder.average_style.zero_()
        with average_styles(decoder, [1.0] * num_passes, lambda value: value):
            for part in z.split(8 // num_passes):
                decoder(part), decoder(part * 2)
        assert torch.allclose(decoder.average_style, expected.detach(), atol=1e-7)
    decoder(z)  # outside: nothing
    assert torch.allclose(decoder.average_style, expected.detach(), atol=1e-7)
    with average_styles(build().encoder, [1.0], lambda value: value):  # another network: nothing to average
        pass


def test_instance_norm_has_more_than_rounding_to_work_with_from_the_start():
    """A weight moved by rounding moves the image by rounding."""
    _, decoder = build(noise="none")
    z = normals(2, 3)
    before = decoder(z)
    with torch.no_grad():
        decoder.blocks[0].bias1 += 1e-6
    assert (decoder(z) - before).abs().max() < 1e-4


def test_a_constant_image_has_finite_gradients():
    encoder, _ = build(base_channels=2, resolution=4)
    with torch.no_grad():
        encoder.blocks[0].conv1.weight.zero_()
    sum(part.square().sum() for part in encoder(torch.ones(2, 1, 4, 4))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_every_parameter_of_the_highest_level_gets_a_gradient():
    encoder, decoder = build()
    mu, logvar = encoder(normals(3, 1, 16, 16))
    (mu.square().sum() + logvar.square().sum() + decoder(normals(3, 3)).square().sum()).backward()
    for network, others in ((encoder, ("from_rgb.1", "from_rgb.2")), (decoder, ("to_rgb.0", "to_rgb.1"))):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is None) == name.startswith(others), name
            assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_a_fused_layer_is_the_convolution_with_the_box():
    """Down: the convolution, then the mean of 2x2 pixels. Up: each pixel four times, then the convolution."""
    x = normals(1, 3, 8, 8)
    for resize, width in (("down", 5), ("up", 5)):
        fused = style.ScaledConv(3, width, 3, resize=resize)
        weight = fused.weight * fused.factors["weight"]
        if resize == "down":
            expected = F.avg_pool2d(F.conv2d(x, weight, padding=1), 2)
        else:
            enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
            expected = F.conv2d(enlarged, weight.transpose(0, 1).flip(2, 3), padding=1)
        assert torch.allclose(fused(x), expected, atol=1e-5), resize


def test_in_bfloat16_a_level_fades_in():
    encoder, decoder = build(noise="none")
    x, z = normals(2, 1, 16, 16), normals(2, 3)
    expected = (*encoder(x, level=2, blend=0.3), decoder(z, level=2, blend=0.3))
    with torch.autocast("cpu", torch.bfloat16):
        found = (*encoder(x, level=2, blend=0.3), decoder(z, level=2, blend=0.3))
    for value, exact in zip(found, expected):
        assert value.dtype == torch.bfloat16 and (value - exact).abs().max() < 0.05 * exact.abs().max()


def test_blur_is_the_binomial_kernel():
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    x = normals(2, 3, 8, 8)
    assert torch.allclose(style.blur(x), F.conv2d(x, kernel, padding=1, groups=3), atol=1e-6)
    assert torch.autograd.gradcheck(style.blur, x[:1, :2, :4, :3].double().requires_grad_())


def test_in_bfloat16_images_take_half_the_memory():
    """Of what is kept for the backward pass nothing but the smallest layers' is float32."""
    encoder, decoder = build(base_channels=8, resolution=64)
    x, z, kept = normals(1, 1, 64, 64), normals(1, 3), {}

    def keep(value):
        if value.dim() == 4 and value.shape[-1] >= 16 and value.shape[1] > 1:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    numbers = {}
    for dtype in (torch.float32, torch.bfloat16):
        kept.clear()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                outputs = (*encoder(x), decoder(z))
        assert {value.dtype for value in kept.values()} == {dtype}
        numbers[dtype] = len(kept)
    assert numbers[torch.bfloat16] == numbers[torch.float32] and outputs[2].dtype == torch.bfloat16


@pytest.mark.parametrize("level, blend", [(0, 1.0), (1, 0.0), (1, 0.3), (1, 1.0), (2, 0.5), (2, 1.0)])
def test_idle_layers_are_those_without_a_gradient(level, blend):
    encoder, decoder = build()
    size = 4 << level
    x, z = normals(2, 1, size, size), normals(2, 3)
    sum(value.sum() for value in encoder(x, level=level, blend=blend)).backward()
    decoder(z, level=level, blend=blend).sum().backward()
    for network in (encoder, decoder):
        idle = {id(p) for layers in network.idle(level, blend) for p in layers.parameters()}
        for name, parameter in network.named_parameters():
            assert (parameter.grad is None) == (id(parameter) in idle), name
