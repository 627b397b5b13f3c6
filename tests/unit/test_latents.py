"""Proves the geometry of latents against closed forms and brute force: spherical interpolation, nearest neighbours, the direction
of an attribute and the figures that judge it, which come from examples that it was not found from.

    python -m pytest tests/unit/test_latents.py
"""

import math
from dataclasses import replace

import pytest
import torch

from sivae.errors import UserError
from sivae.latents import Direction, DirectionFit, nearest, slerp
from sivae.metrics.ood import auroc
from sivae.storage import Folder


def at(*weights):
    return torch.tensor(weights)[:, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_quarter_of_a_circle():
    found = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), at(0.0, 1 / 3, 0.5, 1.0))
    expected = [
        [1, 0],
        [4 / 3 * math.cos(math.pi / 6), 4 / 3 * math.sin(math.pi / 6)],
        [1.5 * math.sqrt(0.5)] * 2,
        [0, 2],
    ]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_turns_evenly_and_stays_in_the_plane_of_its_ends():
    first, second = torch.randn(2, 5, 1, 32, generator=generator(), dtype=torch.float64)
    path = slerp(first, second, torch.linspace(0, 1, 9)[:, None])
    torch.testing.assert_close(path[:, 0], first[:, 0])
    torch.testing.assert_close(path[:, -1], second[:, 0])
    unit = path / path.norm(dim=-1, keepdim=True)
    angles = (unit[:, 1:] * unit[:, :-1]).sum(-1).acos()
    torch.testing.assert_close(angles, angles[:, :1].expand(-1, 8))
    torch.testing.assert_close(path.norm(dim=-1).diff(dim=1).std(dim=1), torch.zeros(5, dtype=torch.float64))
    for row, a, b in zip(path, first, second):
        assert torch.linalg.matrix_rank(torch.cat([row, a, b]), rtol=1e-9) == 2


def test_keeps_the_distance_that_a_gaussian_prior_has():
    first, second = torch.randn(2, 200, 512, generator=generator())
    middle = slerp(first, second, torch.tensor(0.5)).norm(dim=-1) / math.sqrt(512)
    straight = torch.lerp(first, second, 0.5).norm(dim=-1) / math.sqrt(512)
    # A norm of 512 normals spreads by 1 / sqrt(2 * 512), about 0.03, around its mean.
    assert (middle - 1).abs().max() < 0.15 and (straight - math.sqrt(0.5)).abs().max() < 0.15


@pytest.mark.parametrize(
    "first, second",
    [
        ([1.0, 2, 3], [1.0, 2, 3]),
        ([1.0, 2, 3], [2.0, 4, 6]),
        ([1.0, 2, 3], [1.0, 2, 3 + 1e-7]),
        ([0.0, 0, 0], [1.0, 2, 3]),
        ([1.0, 2, 3], [0.0, 0, 0]),
        ([0.0, 0, 0], [0.0, 0, 0]),
        ([-1.0], [2.0]),
    ],
)
def test_where_nothing_turns_it_is_the_straight_line(first, second):
    first, second, weights = torch.tensor(first), torch.tensor(second), at(0.0, 0.25, 0.5, 1.0)
    torch.testing.assert_close(slerp(first, second, weights), torch.lerp(first, second, weights), atol=1e-6, rtol=0)


def test_opposite_ends_are_joined_around_the_origin():
    first = torch.tensor([1.0, -2, 2])
    path = slerp(first, -2 * first, at(0.0, 0.5, 1.0))
    torch.testing.assert_close(path.norm(dim=-1), torch.tensor([3.0, 4.5, 6.0]))
    torch.testing.assert_close(path[[0, 2]], torch.stack([first, -2 * first]))
    assert abs(path[1] @ first) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_nearest_in_blocks_are_those_of_brute_force(size):
    query, latents = torch.randn(3, 8, generator=generator()), torch.randn(60, 8, generator=generator(1))
    numbers = torch.arange(60) * 2
    distances, found = nearest(query, zip(numbers.split(size), latents.split(size)), 9)
    expected = (query[:, None] - latents).norm(dim=-1).sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :9])
    assert torch.equal(found, numbers[expected.indices[:, :9]])


def test_of_equally_near_ones_the_first_are_taken():
    latents = torch.tensor([[5.0], [1], [-1], [1], [0]])
    distances, found = nearest(torch.zeros(1, 1), zip(torch.arange(5).split(2), latents.split(2)), 3)
    assert found.tolist() == [[4, 1, 2]] and distances.tolist() == [[0, 1, 1]]
    far = torch.full((1, 4), 1e4)  # products instead of differences would lose the distance here
    assert nearest(far, [(torch.arange(2), far + torch.tensor([[0.0], [0.5]]))], 2)[0].tolist() == [[0, 1]]
    assert nearest(torch.zeros(1, 1), [(torch.arange(2), latents[:2])], 3)[1].tolist() == [[1, 0]]


def fitted(positives, negatives, block=None):
    fit = DirectionFit(positives.shape[1])
    examples = torch.cat([negatives, positives])
    flags = torch.cat([torch.zeros(len(negatives)), torch.ones(len(positives))]).bool()
    for latents, positive in zip(examples.split(block or len(examples)), flags.split(block or len(examples))):
        fit.add(latents, positive)
    return fit.finish("smile", "0" * 64)


def test_a_direction_of_two_gaussians():
    # Classes along (3, 4) / 5, 2 apart; within a class the deviation is 2 along the first axis and 1 along the others.
    count, scale = 20_000, torch.tensor([2.0, 1, 1])
    negatives, positives = (torch.randn(count, 3, generator=generator(seed)) * scale for seed in range(2))
    found = fitted(positives + torch.tensor([1.2, 1.6, 0]), negatives)
    # 16,000 examples of a class give each mean to 0.01 an axis, or 0.02 along the first.
    torch.testing.assert_close(found.vector, torch.tensor([0.6, 0.8, 0]), atol=0.03, rtol=0)
    assert found.vector.norm() == pytest.approx(1, abs=1e-6)
    deviation = math.sqrt((0.6 * 2) ** 2 + 0.8**2)
    assert found.deviation == pytest.approx(deviation, rel=0.03)
    separation = found.separation
    assert separation.distance == pytest.approx(2 / deviation, rel=0.03)

    def below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    assert separation.auroc == pytest.approx(below(2 / deviation / math.sqrt(2)), abs=0.02)
    assert separation.accuracy == pytest.approx(below(1 / deviation), abs=0.02)
    assert (separation.num_positives, separation.held_out) == (16_000, (4_000, 4_000)) and not separation.is_chance


def test_the_deviation_is_that_within_the_classes_by_hand():
    """Pooled over both, unbiased (n1 + n2 - 2), of few examples; every fifth of a class is held out."""
    negatives, positives = torch.randn(2, 15, 3, generator=generator()).double()
    positives += 1
    found = fitted(positives, negatives)
    kept = torch.arange(15) % 5 != 4
    along = [latents[kept] @ found.vector.double() for latents in (positives, negatives)]
    squares = sum(float((values - values.mean()).square().sum()) for values in along)
    assert found.deviation == pytest.approx(math.sqrt(squares / 22), rel=1e-6)  # the vector is rounded to float32


def test_a_strength_is_a_standard_deviation():
    direction = replace(
        fitted(torch.randn(20, 2) + 5, torch.randn(20, 2)), vector=torch.tensor([0.0, 1.0]), deviation=0.5
    )
    moved = direction.move(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([-2.0, 0.0, 4.0]))
    assert moved.tolist() == [[[1, 0], [1, 1], [1, 3]], [[2, 1], [2, 2], [2, 4]]]


def test_it_is_judged_by_examples_that_it_was_not_found_from():
    positives, negatives = torch.randn(2, 100, 4, generator=generator())
    positives[:, 0] += 20
    held_out = torch.arange(100) % 5 == 4
    clean = fitted(positives, negatives)
    assert clean.separation.auroc == clean.separation.accuracy == 1
    positives[held_out, 0] -= 40  # those, and only those, lie on the wrong side
    negatives[held_out, 0] += 40
    turned = fitted(positives, negatives)
    assert torch.equal(turned.vector, clean.vector) and turned.deviation == clean.deviation
    assert turned.separation.auroc == turned.separation.accuracy == 0


def test_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr("sivae.latents.MAX_HELD_OUT", 7)
    positives, negatives = torch.randn(2, 60, 4, generator=generator())
    whole, parts = fitted(positives + 1, negatives), fitted(positives + 1, negatives, block=7)
    torch.testing.assert_close(whole.vector, parts.vector)
    # The rest of those that are too many to hold is used.
    assert whole.separation.held_out == parts.separation.held_out == (7, 7) and whole.separation.num_positives == 53
    assert whole.separation.auroc == pytest.approx(parts.separation.auroc)


def test_a_useless_direction_says_so():
    useless = fitted(*torch.randn(2, 500, 16, generator=generator()))
    assert useless.separation.is_chance and "no better than chance" in useless.separation.sentence()
    good = fitted(torch.randn(500, 16, generator=generator()) + 0.5, torch.randn(500, 16, generator=generator(1)))
    assert not good.separation.is_chance and "chance" not in good.separation.sentence()
    # The level of the test: of many useless directions one in 40 is let through.
    draws = torch.rand(400, 2, 50, generator=generator())
    passed = sum(not replace(good.separation, auroc=auroc(a, b), held_out=(50, 50)).is_chance for a, b in draws)
    assert 1 <= passed <= 25
    # Without ties the rank sum's deviation is sqrt((n1 + n2 + 1) / (12 n1 n2)), here 0.058 for AUROC.
    border = [replace(good.separation, auroc=value, held_out=(50, 50)).is_chance for value in (0.613, 0.615)]
    assert border == [True, False]


def test_auroc_is_the_share_of_pairs_in_order():
    negatives, positives = torch.randint(0, 6, (2, 40), generator=generator()).double()
    pairs = positives[:, None] - negatives
    assert auroc(negatives, positives) == pytest.approx(
        float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
    )


POINT = torch.arange(8.0).sin()


@pytest.mark.parametrize(
    "positives, negatives, sentence",
    [
        (torch.zeros(0, 2), torch.randn(50, 2), "smile: there are 0 examples with it; give 10 or more"),
        (torch.randn(50, 2), torch.randn(9, 2), "smile: there are 9 examples without it; give 10 or more"),
        (torch.ones(20, 2), torch.ones(20, 2), "smile: examples with and without it have the same mean latent"),
        (torch.ones(20, 2), torch.zeros(20, 2), "smile: the examples of each kind do not differ among themselves"),
        # Of which rounding leaves a scatter of 1e-14.
        (POINT.expand(21, 8), POINT.flip(0).expand(22, 8), "smile: the examples of each kind do not differ"),
        (torch.full((20, 2), torch.nan), torch.randn(50, 2), "smile: some latents are not finite"),
    ],
)
def test_examples_that_give_no_direction(positives, negatives, sentence):
    with pytest.raises(UserError, match=sentence):
        fitted(positives, negatives)


def test_a_saved_direction_is_the_same_and_is_of_one_model(tmp_path):
    folder = Folder(tmp_path)
    direction = fitted(torch.randn(60, 3) + 2, torch.randn(60, 3))
    direction.save(folder, "smile.safetensors")
    again = Direction.load(folder, "smile.safetensors")
    assert torch.equal(again.vector, direction.vector)
    assert replace(again, vector=None) == replace(direction, vector=None)
    again.check(3, "0" * 64, "FILE")
    with pytest.raises(UserError, match="FILE: is a direction among 3 latent dimensions, and this model has 4"):
        again.check(4, "0" * 64, "FILE")
    with pytest.raises(UserError, match="FILE: was found with other weights"):
        again.check(3, "1" * 64, "FILE")


def test_what_is_no_direction_is_refused(tmp_path):
    folder = Folder(tmp_path)
    fitted(torch.randn(60, 3) + 2, torch.randn(60, 3)).save(folder, "a")
    data = folder.read("a")
    for bad in (
        b"",
        b"x" * 40,
        data[:-1],
        data.replace(b"direction-1", b"direction-2"),
        data.replace(b"auroc", b"aurox"),
    ):
        folder.write(bad, "b")
        with pytest.raises(UserError, match="b: is no direction that sivae can read"):
            Direction.load(folder, "b")
    with pytest.raises(UserError, match="there is no such file"):
        Direction.load(folder, "c")
