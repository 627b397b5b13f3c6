"""Every figure equals its closed form, or a computation written down another way.

python -m pytest tests/unit/test_metrics.py
"""

import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from sivae.errors import UserError
from sivae.metrics import catalogue, ood, reconstruction
from sivae.metrics.frechet import MomentSums, frechet_distance, moments
from sivae.metrics.kid import kernel_distance
from sivae.metrics.precision_recall import density_coverage, neighbour_distances, precision_recall


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Fréchet


def test_sums_over_parts_give_the_moments_of_the_whole():
    features = normal(300, 7) * torch.arange(1, 8) + 5
    whole = moments(features.numpy())
    parts = [MomentSums(7), MomentSums(7)]
    for number, part in enumerate(features.split(37)):
        parts[number % 2].add(part)
    added = MomentSums.of(
        {name: a + b for (name, a), b in zip(parts[0].tensors().items(), parts[1].tensors().values())}
    )
    for ours, expected in zip(added.moments(), whole):
        np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)  # float64, with means of about 5


def test_sums_are_kept_in_float64():
    """100,000 float32 values beside a large mean: float32 sums would lose the variance."""
    features = (normal(100_000, 1) + 1000).float()
    sums = MomentSums(1)
    for part in features.split(64):
        sums.add(part)
    expected = features.double().var().item()
    assert sums.moments()[1].item() == pytest.approx(expected, rel=1e-6)
    assert abs(float((features**2).sum() / len(features) - features.mean() ** 2) - expected) > 1e-3


def test_the_frechet_distance_of_samples_nears_the_closed_form():
    """Of N(0, I) and N(m, s^2 I): |m|^2 + D (1 - s)^2."""
    first, second = MomentSums(4), MomentSums(4)
    first.add(normal(200_000, 4))
    second.add(2 * normal(200_000, 4, seed=1) + 0.5)
    # The deviation of a mean of 200,000 is 0.002 to 0.005.
    assert frechet_distance(first.moments(), second.moments()) == pytest.approx(4 * 0.25 + 4, rel=0.01)


def test_too_few_vectors_and_nan_have_no_moments():
    one = MomentSums(3)
    one.add(normal(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        one.moments()
    one.add(torch.full((1, 3), torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        one.moments()


# Kernel distance


def test_the_kernel_distance_equals_its_definition():
    x, y = normal(9, 4), normal(9, 4, seed=1) + 1

    def k(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    pairs = list(itertools.permutations(range(9), 2))
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / len(pairs)
    expected -= 2 * sum(k(a, b) for a in x for b in y) / 81
    # A subset of all is the whole set, in another order.
    value, deviation = kernel_distance(x, y, num_subsets=3, subset_size=9)
    assert value == pytest.approx(expected, rel=1e-12) and deviation == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_deviation():
    value, deviation = kernel_distance(normal(4000, 8), normal(4000, 8, seed=1), num_subsets=100, subset_size=500)
    # Subsets of the same 4,000 vectors are not independent: the mean of all is as uncertain as about 8 of them.
    assert abs(value) < 3 * deviation / 8**0.5 and 0 < deviation < 0.05
    apart, _ = kernel_distance(normal(4000, 8), normal(4000, 8, seed=1) + 0.5, num_subsets=100, subset_size=500)
    assert apart > 10 * deviation


def test_the_kernel_distance_is_the_closed_form_of_two_gaussians():
    """D = 1: E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3 for independent x, y."""

    def cross(first, second):
        return 1 + sum(c * a * b for c, a, b in zip((3, 3, 1), first, second))

    at_zero, at_one = (0, 1, 0), (1, 2, 4)  # the first three moments of N(0, 1) and of N(1, 1)
    expected = cross(at_zero, at_zero) + cross(at_one, at_one) - 2 * cross(at_zero, at_one)
    value, _ = kernel_distance(normal(50_000, 1), normal(50_000, 1, seed=1) + 1, num_subsets=25)
    assert value == pytest.approx(expected, rel=0.05)


# Precision, recall, density, coverage


def naive(real, fake, k):
    """By the definitions, with numpy and loops over points."""
    real, fake = real.numpy(), fake.numpy()

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(points):
        return np.sort(distances(points, points), axis=1)[:, k]  # at 0 is the point itself

    to_real = distances(fake, real)
    inside = to_real <= radii(real)[None]
    recall = (distances(real, fake) <= radii(fake)[None]).any(axis=1).mean()
    return inside.any(axis=1).mean(), recall, inside.sum() / (k * len(fake)), inside.any(axis=0).mean()


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_of_shifted_sets(shift, monkeypatch):
    monkeypatch.setattr("sivae.metrics.precision_recall.BLOCK_BYTES", 17 * 8 * 100)  # many blocks, the last one smaller
    real, fake = normal(100, 3), normal(80, 3, seed=1) + shift
    expected = naive(real, fake, 3)
    assert precision_recall(real, fake) == pytest.approx(expected[:2], abs=1e-12)
    assert density_coverage(real, fake, k=3) == pytest.approx(expected[2:], abs=1e-12)
    assert density_coverage(real, fake) == pytest.approx(naive(real, fake, 5)[2:], abs=1e-12)


def test_of_equal_and_of_disjoint_sets():
    real = normal(50, 4)
    assert precision_recall(real, real) == (1.0, 1.0) and density_coverage(real, real)[1] == 1.0
    assert precision_recall(real, real + 100) == (0.0, 0.0) and density_coverage(real, real + 100) == (0.0, 0.0)
    half = torch.cat([real[:25], real[:25] + 100])  # half of the fakes are real images, the other half like nothing
    assert precision_recall(real, half)[0] == 0.5


def test_a_point_is_not_its_own_neighbour():
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    assert neighbour_distances(points, 1).tolist() == [1, 1, 0, 0]


def test_a_ball_has_its_border():
    """As of a set that holds images several times, whose balls are points: a fake that is one of them is covered."""
    real = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).repeat_interleave(6, dim=0)
    assert precision_recall(real, real) == (1.0, 1.0)
    # Of 12 balls 6 are around each fake, over k = 5.
    assert density_coverage(real, real) == (6 / 5, 1.0)


def test_sets_that_do_not_fit_are_refused():
    for work in (precision_recall, density_coverage, lambda a, b: kernel_distance(a, b, subset_size=5)):
        with pytest.raises(ValueError, match="different sizes"):
            work(normal(20, 3), normal(20, 4))
        with pytest.raises(ValueError, match="there are 3 and 20"):
            work(normal(3, 4), normal(20, 4))
    with pytest.raises(ValueError, match="different sizes"):
        frechet_distance(moments(normal(20, 3).numpy()), moments(normal(20, 4).numpy()))


# Reconstructions


def scipy_ssim(first, second):
    """SSIM of one channel by scipy's Gaussian filter: luminance map and contrast map, where the window lies inside."""

    def blur(image):
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]  # radius 5

    m1, m2 = blur(first), blur(second)
    v1, v2, c = blur(first**2) - m1**2, blur(second**2) - m2**2, blur(first * second) - m1 * m2
    return (2 * m1 * m2 + 0.01**2) / (m1**2 + m2**2 + 0.01**2), (2 * c + 0.03**2) / (v1 + v2 + 0.03**2)


def pair_of_images(size, channels=3):
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(0).random((2, channels, size, size)), (0, 0, 2, 2))
    smooth = torch.from_numpy((smooth - smooth.min()) / np.ptp(smooth))
    return smooth, (smooth + 0.1 * normal(*smooth.shape)).clamp(0, 1)


def test_ssim_equals_scipys_filter():
    first, second = pair_of_images(40)
    expected = [
        np.mean([np.prod(scipy_ssim(a, b), axis=0).mean() for a, b in zip(x.numpy(), y.numpy())])
        for x, y in zip(first, second)
    ]
    np.testing.assert_allclose(reconstruction.ssim(first, second), expected, rtol=1e-10)
    assert 0.1 < min(expected) < 0.9


def test_ms_ssim_equals_scipys_filter():
    first, second = pair_of_images(176, channels=1)
    expected = []
    for a, b in zip(first[:, 0].numpy(), second[:, 0].numpy()):
        product = 1.0
        for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            luminance, contrast = scipy_ssim(a, b)
            product *= (luminance * contrast if scale == 4 else contrast).mean() ** exponent
            if scale < 4:
                a, b = (x.reshape(len(x) // 2, 2, len(x) // 2, 2).mean(axis=(1, 3)) for x in (a, b))
        expected.append(product)
    np.testing.assert_allclose(reconstruction.ms_ssim(first, second), expected, rtol=1e-10)


def test_of_equal_images_and_of_known_errors():
    image, black = torch.rand(3, 3, 176, 176), torch.zeros(3, 3, 176, 176)
    assert (reconstruction.mse(image, image) == 0).all() and reconstruction.psnr(image, image).isinf().all()
    for figure in (reconstruction.ssim, reconstruction.ms_ssim):
        assert torch.allclose(figure(image, image), torch.ones(3, dtype=torch.float64))
    assert (reconstruction.ms_ssim(image, 1 - image) == 0).all(), "negative contrast terms count as 0"
    assert torch.allclose(
        reconstruction.psnr(black, black + 0.1), torch.full((3,), 20.0, dtype=torch.float64), atol=1e-5
    )
    # Without texture only the luminance term is left.
    assert reconstruction.ssim(black, black + 1)[0].item() == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-6)


def test_images_that_cannot_be_compared_are_refused():
    small, smaller = torch.rand(1, 1, 175, 175), torch.rand(1, 1, 10, 10)
    for figure, images in ((reconstruction.ms_ssim, small), (reconstruction.ssim, smaller)):
        with pytest.raises(ValueError, match="needs images of"):
            figure(images, images)
    for figure in (reconstruction.mse, reconstruction.psnr, reconstruction.ssim):
        with pytest.raises(ValueError, match="different sizes"):
            figure(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 12))


# Outliers


def naive_separation(inliers, outliers):
    auroc = np.mean([(o > i) + 0.5 * (o == i) for o in outliers for i in inliers])
    average, caught_before = 0.0, 0.0
    for limit in sorted({*inliers, *outliers}, reverse=True):
        caught, wrong = (outliers >= limit).sum(), (inliers >= limit).sum()
        average += (caught / len(outliers) - caught_before) * caught / (caught + wrong)
        caught_before = caught / len(outliers)
    limit = min(v for v in inliers if (inliers <= v).mean() >= 0.95 - 1e-12)
    return auroc, average, (outliers <= limit).mean()


@pytest.mark.parametrize("ties", [False, True])
def test_separation_equals_its_definitions(ties):
    draw = np.random.default_rng(0)
    inliers, outliers = draw.normal(size=60), draw.normal(size=45) + 1
    if ties:
        inliers, outliers = inliers.round(), outliers.round()
    found = ood.separation(inliers, outliers)
    expected = naive_separation(inliers, outliers)
    assert (found.auroc[0], found.aupr[0], found.fpr_at_95_tpr[0]) == pytest.approx(expected, abs=1e-12)
    assert ood.threshold(inliers) == min(v for v in inliers if (inliers <= v).mean() >= 0.95 - 1e-12)


def test_separation_of_known_scores():
    assert ood.separation([1, 2, 3], [4, 5]).auroc == (1.0, 1.0, 1.0)
    assert ood.separation([4, 5], [1, 2, 3]).auroc[0] == 0 and ood.separation([4, 5], [1, 2]).fpr_at_95_tpr[0] == 1
    assert ood.separation([1, 2], [1, 2]).auroc[0] == 0.5
    assert ood.separation([1, 3], [2, 4]).auroc[0] == 0.75


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """N(0, 1) beside N(1, 1): the true AUROC is Phi(1 / sqrt 2) = 0.760."""
    draw, hits = np.random.default_rng(0), 0
    for trial in range(40):
        _, low, high = ood.separation(draw.normal(size=80), draw.normal(size=80) + 1, seed=trial).auroc
        hits += low <= 0.7602 <= high
        assert 0.05 < high - low < 0.25
    assert hits >= 33  # 38 are expected; fewer than 33 happen once in 500 times


def test_the_interval_is_as_wide_as_its_sets_make_it():
    """By DeLong's variance of the AUROC (Biometrics 1988), of sets of two sizes and shapes. 1,000 resamples find the ends of
    an interval to some 5% of its width."""
    draw = np.random.default_rng(0)
    inliers, outliers = draw.normal(size=400), 1 + 0.2 * draw.normal(size=40)
    above = (outliers[:, None] > inliers).astype(float)
    deviation = math.sqrt(above.mean(0).var(ddof=1) / len(inliers) + above.mean(1).var(ddof=1) / len(outliers))
    _, low, high = ood.separation(inliers, outliers).auroc
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_a_share_of_the_inliers_is_kept_whatever_its_product_rounds_to():
    assert 0.55 * 100 > 55
    assert ood.threshold(np.arange(1, 101), kept=0.55) == 55


@pytest.mark.parametrize("inliers, outliers", [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.inf])])
def test_scores_that_cannot_be_compared_are_refused(inliers, outliers):
    with pytest.raises(ValueError):
        ood.separation(inliers, outliers)


# Names


def test_only_inceptions_are_called_fid_and_kid():
    by_name = {
        figure.name: figure for figure in catalogue.parse(["fid", "kid", "frechet_pixels", "kernel_mine", "mse"])
    }
    assert by_name["fid"].detector == by_name["kid"].detector == "inception"
    assert by_name["frechet_pixels"].detector == "pixels" and by_name["kernel_mine"].detector == "mine"
    assert by_name["mse"].detector is None
    for name in ("fid_pixels", "frechet_inception", "kernel_inception", "FID", "frechet_", "banana", "fid pixels"):
        with pytest.raises(UserError, match="metrics: "):
            catalogue.parse([name])
    with pytest.raises(UserError, match="none is named"):
        catalogue.parse([""])


def test_which_way_a_figure_is_better():
    """As by what it is for a set and itself, and for one that is far away."""
    real, far = normal(20, 4), normal(20, 4) + 9
    first, second = pair_of_images(176, channels=1)
    found = {name: (getattr(reconstruction, name)(first, first + 1e-9).mean(), getattr(reconstruction, name)(first, second).mean())
             for name in ("mse", "psnr", "ssim", "ms_ssim")}  # fmt: skip
    for names, figures in ((("precision", "recall"), precision_recall), (("density", "coverage"), density_coverage)):
        found |= {f"{name}_pixels": pair for name, pair in zip(names, zip(figures(real, real), figures(real, far)))}
    found["frechet_pixels"] = tuple(frechet_distance(moments(real.numpy()), moments(x.numpy())) for x in (real, far))
    found["kernel_pixels"] = tuple(kernel_distance(real, x, subset_size=20)[0] for x in (real, far))
    for figure in catalogue.parse(found):
        same, other = found[figure.name]
        assert figure.higher_is_better == (same > other), figure.name
    assert not any(figure.higher_is_better for figure in catalogue.parse(["lpips", "fid", "kid"]))


@pytest.mark.parametrize(
    "name, reals, fakes, least",
    [
        ("frechet_x", 256, 9999, "257"),
        ("kernel_x", 9999, 999, "1,000"),
        ("recall_x", 3, 9, "4"),
        ("density_x", 9, 5, "6"),
    ],
)
def test_fewer_images_than_a_figure_needs(name, reals, fakes, least):
    (figure,) = catalogue.parse([name])
    with pytest.raises(UserError, match=f"{name}: needs .* at least {least}; there are"):
        figure.check_images(reals, fakes, 256)
    figure.check_images(9999, 9999, 256)
