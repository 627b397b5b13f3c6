"""The norm in one operation is torch's with a scale and a shift after it, in both layouts and in bfloat16; its statistics are
the channels'; and it keeps one image.

pytest tests/unit/test_instance_norm.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sivae.models import instance_norm as module
from sivae.models.instance_norm import adaptive_instance_norm, instance_norm


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


def of_both(x, style, eps):
    """The image by the style, and the statistics that the norm without one takes away."""
    return adaptive_instance_norm(x, style, eps), instance_norm(x, eps)[1]


@pytest.fixture(params=[False, True], ids=["subtracting", "in one kernel"])
def way(request, monkeypatch):
    """As a CPU does it, and as a GPU does, on a CPU."""
    monkeypatch.setattr(module, "_has_kernel", lambda x: request.param)


LAYOUTS = ["contiguous", "channels last", "expanded", "every other pixel"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout_of_gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_in_every_layout(way, x, style, layout, layout_of_gradient, count, dtype, tolerance):
    x = laid_out(x.to(dtype)[:count], layout).detach().requires_grad_()
    style = style[:count].detach().requires_grad_()
    by_y = laid_out(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype), layout_of_gradient)
    by_statistics = torch.randn(count, 6, generator=torch.Generator().manual_seed(3))
    found = of_both(x, style, 1e-5)
    exact_inputs = [value.detach().double().requires_grad_() for value in (x, style)]
    exact = plain(*exact_inputs, 1e-5)
    gradients = torch.autograd.grad(found, (x, style), (by_y, by_statistics))
    exact_gradients = torch.autograd.grad(exact, exact_inputs, (by_y.double(), by_statistics.double()))
    for value, expected in zip((*found, *gradients), (*exact, *exact_gradients)):
        assert (value - expected).abs().max() <= tolerance * expected.abs().max()


def test_without_a_style(way, x):
    x.requires_grad_()
    y, statistics = instance_norm(x, 0.1)
    assert torch.allclose(y, F.instance_norm(x, eps=0.1), atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    by = [torch.randn(value.shape, generator=generator) for value in (y, statistics)]
    (together,) = torch.autograd.grad((y, statistics), x, by, retain_graph=True)
    parts = [torch.autograd.grad(value, x, part, retain_graph=True)[0] for value, part in zip((y, statistics), by)]
    assert torch.allclose(together, sum(parts), atol=1e-6)


def test_what_it_returns_may_be_changed_in_place(way, x, style):
    """As the layers behind it do. Autograd refuses that of a view that a Function made."""
    inputs = x.requires_grad_(), style
    for found in of_both(*inputs, 1e-5), instance_norm(x, 1e-5):
        changed = F.leaky_relu(found[0], 0.2)
        assert torch.equal(F.leaky_relu(found[0], 0.2, inplace=True), changed)


@pytest.mark.parametrize("index", [0, 1])
def test_gradients(way, x, style, index):
    inputs = x[:1, :2, :3, :3].double().requires_grad_(), style[:1, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: of_both(*given, 1e-2)[index], inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_of_one_alone(way, x, style, frozen):
    inputs = [x.requires_grad_(), style.requires_grad_()]
    kept = [value.detach() if index == frozen else value for index, value in enumerate(inputs)]
    found, expected = (
        torch.autograd.grad(adaptive_instance_norm(*given, 1e-2).square().sum(), inputs[1 - frozen])[0]
        for given in (kept, inputs)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_enough(dtype):
    """`sivae plan` traces a step of any size: no operation may fall back to computing with numbers."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        mode.allow_fallback_kernels = False
        x = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True)
        outputs = of_both(x, torch.randn(4, 6, dtype=dtype, requires_grad=True), 1e-5)
        sum(value.sum() for value in outputs).backward()
    assert x.grad.shape == x.shape and x.grad.dtype == outputs[0].dtype == dtype


def test_no_second_gradient(x):
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(instance_norm(x, 1e-5)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_constant_channel_has_a_gradient_by_its_mean_alone():
    x = torch.full((1, 1, 4, 4), 0.1, requires_grad=True)
    y, statistics = instance_norm(x, 1e-5)
    assert not y.any() and statistics.tolist() == [[pytest.approx(0.1), 0]]
    statistics.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1 / 16))


def test_what_is_small_beside_its_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 32, 32, generator=generator) + 1000 * (1 + torch.rand(1, 256, 1, 1, generator=generator))
    y, statistics = instance_norm(x, 1e-8)
    exact, expected = plain(x.double(), torch.zeros(1, 512, dtype=torch.double), 1e-8)
    assert (y - exact).abs().max() < 2000 * 2**-22  # the rounding of the mean
    assert torch.allclose(statistics.double(), expected, rtol=1e-6)


def test_of_bfloat16_the_statistics_are_float32_and_the_image_is_not(way):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 2, 256, 256, generator=generator) * 0.5 + 30).bfloat16()
    style = torch.randn(1, 4, generator=generator)
    y, statistics = of_both(x, style, 1e-5)
    exact, expected = plain(x.double(), style.double(), 1e-5)
    assert y.dtype == torch.bfloat16 and statistics.dtype == torch.float32
    assert torch.allclose(statistics.double(), expected, rtol=1e-6)
    assert (y - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_is_kept(way, dtype):
    x = torch.randn(2, 4, 64, 64).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        of_both(x, torch.zeros(2, 8, requires_grad=True), 1e-5)
    large = {value.data_ptr() for value in kept if value.numel() >= x.numel()}
    assert large == {x.data_ptr()}
