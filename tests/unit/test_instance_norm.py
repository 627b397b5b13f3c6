"""The norm in one operation is torch's with a scale and a shift after it, in both layouts and in bfloat16; its statistics are
the channels'; and it keeps one image.

pytest tests/unit/test_instance_norm.py
"""

import pytest
import torch
import torch.nn.functional as F

from sivae.models.instance_norm import instance_norm


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 5


@pytest.fixture
def style():
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def plain(x, style, eps):
    """Written out: F.instance_norm's own backward pass is wrong of one image whose gradient has channels last."""
    scale, shift = style[:, :, None, None].chunk(2, dim=1)
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * (1 + scale) + shift
    return y, torch.cat([mean, variance.sqrt()], dim=1).flatten(1)


def laid_out(x, layout):
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "every other pixel":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return x.contiguous(memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format)


LAYOUTS = ["contiguous", "channels last", "expanded", "every other pixel"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout_of_gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_in_every_layout(x, style, layout, layout_of_gradient, count, dtype, tolerance):
    x = laid_out(x.to(dtype)[:count], layout).detach().requires_grad_()
    style = style[:count].detach().requires_grad_()
    by_y = laid_out(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype), layout_of_gradient)
    by_statistics = torch.randn(count, 6, generator=torch.Generator().manual_seed(3))
    found = instance_norm(x, style, 1e-5)
    exact_inputs = [value.detach().double().requires_grad_() for value in (x, style)]
    exact = plain(*exact_inputs, 1e-5)
    gradients = torch.autograd.grad(found, (x, style), (by_y, by_statistics))
    exact_gradients = torch.autograd.grad(exact, exact_inputs, (by_y.double(), by_statistics.double()))
    for value, expected in zip((*found, *gradients), (*exact, *exact_gradients)):
        assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def test_without_a_style():
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(instance_norm(x, None, 0.1)[0], F.instance_norm(x, eps=0.1), atol=1e-6)


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradients(x, style, outputs):
    def some(x, style):
        found = instance_norm(x, style, 1e-2)
        return tuple(found[index] for index in outputs)

    inputs = x[:1, :2, :3, :3].double().requires_grad_(), style[:1, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(some, inputs)
    for frozen in range(2):
        if frozen == 0 and outputs == (1,):  # no gradient left to take
            continue
        kept = [value if index != frozen else value.detach() for index, value in enumerate(inputs)]
        gradients = [
            torch.autograd.grad(sum(part.square().sum() for part in some(*given)), given[1 - frozen], allow_unused=True)
            for given in (kept, inputs)
        ]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients))


def test_no_second_gradient(x):
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(instance_norm(x, None, 1e-5)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_constant_channel_has_a_gradient_by_its_mean_alone():
    x = torch.full((1, 1, 4, 4), 0.1, requires_grad=True)
    y, statistics = instance_norm(x, None, 1e-5)
    assert not y.any() and statistics.tolist() == [[pytest.approx(0.1), 0]]
    statistics.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1 / 16))


def test_what_is_small_beside_its_mean_is_no_worse_than_torchs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 32, 32, generator=generator) + 1000 * (1 + torch.rand(1, 256, 1, 1, generator=generator))
    y, statistics = instance_norm(x, None, 1e-8)
    exact, expected = plain(x.double(), torch.zeros(1, 512, dtype=torch.double), 1e-8)
    error, of_torch = ((found - exact).abs().mean() for found in (y, F.instance_norm(x, eps=1e-8)))
    assert error < 0.9 * of_torch < 1e-4
    assert torch.allclose(statistics.double(), expected, rtol=1e-6)


def test_of_bfloat16_the_statistics_are_float32_and_the_image_is_not(x, style):
    half = x.bfloat16()
    y, statistics = instance_norm(half, style, 1e-5)
    exact, expected = plain(half.double(), style.double(), 1e-5)
    assert y.dtype == torch.bfloat16 and statistics.dtype == torch.float32
    assert torch.allclose(statistics.double(), expected, rtol=1e-6)
    assert ((y - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_is_kept(dtype):
    x = torch.randn(2, 4, 64, 64).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        instance_norm(x, torch.zeros(2, 8, requires_grad=True), 1e-5)
    large = {value.data_ptr() for value in kept if value.numel() >= x.numel()}
    assert large == {x.data_ptr()}
