"""Proves that the gate closes at the first loss that is not finite and stays closed, and what it tells of it.

pytest tests/unit/test_gate.py
"""

import pytest
import torch

from sivae.distributed import Group
from sivae.step import FiniteGate, NonFinite

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def gate():
    return FiniteGate(Group(0, 1, torch.device("cpu"), None))


def step(gate, images_seen, *passes):
    """One optimizer step: the terms of its accumulation passes, then the agreement of the ranks."""
    for terms in passes:
        gate.watch({name: torch.tensor(value) for name, value in terms.items()})
    gate.agree(images_seen)


def test_it_is_open_while_all_is_finite(gate):
    step(gate, 0, {"rec": 1.0, "kl_real": 3e38}, {"rec": 0.0, "kl_real": -1.0})
    assert gate.read() is None and gate.found_inf == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("passes", [(0, 1), (1, 0)])
def test_one_bad_pass_closes_it(gate, bad, passes):
    step(gate, 16, *({"rec": bad if index else 1.0, "kl_real": 1.0} for index in passes))
    assert gate.found_inf == 1 and gate.read() == NonFinite(["rec"], 16)


def test_the_first_step_is_told_and_what_follows_changes_nothing(gate):
    step(gate, 16, {"rec": 1.0, "kl_real": 1.0})
    step(gate, 32, {"rec": NAN, "kl_real": 1.0})
    step(gate, 48, {"rec": NAN, "kl_real": NAN})
    step(gate, 64, {"rec": 1.0, "kl_real": 1.0})
    assert gate.found_inf == 1, "a step after it that is finite does not open it"
    assert gate.read() == NonFinite(["rec"], 32)


@pytest.mark.parametrize(
    "bad, told",
    [
        (["rec", "loss_encoder", "grad_norm_encoder"], ["rec"]),
        (["loss_encoder", "grad_norm_encoder"], ["loss_encoder"]),
        (["grad_norm_encoder"], ["grad_norm_encoder"]),
    ],
)
def test_what_only_follows_from_another_is_not_told(gate, bad, told):
    step(gate, 0, {name: NAN for name in bad} | {"kl_real": 1.0})
    assert gate.read() == NonFinite(told, 0)


def test_cleared_it_knows_nothing_of_before(gate):
    """As after a rollback, whose second attempt can fail elsewhere."""
    step(gate, 32, {"rec": NAN, "kl_real": 1.0})
    gate.clear()
    assert gate.read() is None and gate.found_inf == 0
    step(gate, 48, {"rec": 1.0, "kl_real": NAN})
    assert gate.read() == NonFinite(["kl_real"], 48)
