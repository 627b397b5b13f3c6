"""Compiling DeepSpeed's CPU Adam: what a killed process leaves behind stops nobody. (That it trains: test_resume, marked slow.)"""

import pytest

from sivae import cpu_adam
from sivae.errors import UserError


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """DeepSpeed's builder with a stand-in for the compiler; `folder` is where torch would compile."""
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return deepspeed, CPUAdamBuilder, folder


def test_a_lock_that_nobody_holds_is_removed(builder, monkeypatch, capfd):
    deepspeed, kind, folder = builder
    (folder / "lock").touch()
    monkeypatch.setattr(
        kind, "load", lambda self, verbose: (folder / "lock").exists() and pytest.fail("waits for ever")
    )
    assert cpu_adam.load(deepspeed, tells=True) is deepspeed.ops.adam.DeepSpeedCPUAdam
    assert "takes minutes" in capfd.readouterr().err
    (folder / "cpu_adam.so").touch()
    cpu_adam.load(deepspeed, tells=True)
    assert "takes minutes" not in capfd.readouterr().err, "it is compiled already"


def test_a_lock_that_a_living_process_holds_is_left(builder, monkeypatch):
    deepspeed, kind, folder = builder
    seen = []
    monkeypatch.setattr(kind, "load", lambda self, verbose: seen.append((folder / "lock").exists()))
    with open(folder / "lock", "w"):
        cpu_adam.load(deepspeed, tells=False)
    cpu_adam.load(deepspeed, tells=False)
    assert seen == [True, False]


def test_what_cannot_be_compiled_is_one_sentence(builder, monkeypatch):
    deepspeed, kind, folder = builder

    def load(self, verbose):
        raise RuntimeError("Error building extension 'cpu_adam'")

    monkeypatch.setattr(kind, "load", load)
    with pytest.raises(UserError, match="^engine.offload_optimizer: .*Error building extension.*C\\+\\+ compiler"):
        cpu_adam.load(deepspeed, tells=False)
