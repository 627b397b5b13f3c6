"""What the benchmarks make of their measurements: ratios, passes, differences of losses, seconds on paper. The measured step is
the real one: tests/numerics/test_published_step.py holds the yardstick to recorded numbers.

pytest tests/unit/test_benchmarks.py
"""

import argparse
import importlib
import math
import sys

import pytest

from benchmarks import contenders, data, loss_compare, scaling, step, toy2d
from sivae import config, distributed
from tests.processes import ROOT

SMALL = ["model.channels=[8,16]", "model.latent_dim=4", "engine.precision=float32"]


def entry(sec, **more):
    return {"batch_size": 10, "sec": sec, "flops": 4e9, "held": 2**30, "beyond": 2**31, "switches": []} | more


def test_a_ratio_is_taken_within_a_round():
    # The machine is four times slower in the second round and the last, for both.
    found = {
        "contenders": {"published": entry([1.0, 4.0, 1.0, 4.0, 1.0]), "ours + all": entry([0.5, 2.0, 0.5, 2.0, 2.0], switches=["bfloat16"])},
        "peaks": [{"convolution float32": 1e10, "convolution bfloat16": 2e10}] * 5, "time": "today",
    }  # fmt: skip
    lines = step.table(step.Case("conv", "cifar10", 10), found)
    ours = [cell.strip() for cell in next(line for line in lines if line.startswith("| ours + all |")).split("|")]
    # Names, images a second (10 in the median 2 seconds), from the slowest to the fastest, against the first, GiB, ...
    assert ours[2:7] == ["5.00", "5.00 to 20.0", "2.00x", "2.00", "3.00"]
    assert ours[9] == "10% of bfloat16"  # 0.4 GFLOP an image, 5 a second, of 20


def test_the_table_of_steps_tells_its_rounds_what_is_missing_and_why():
    found = {
        "contenders": {"published": entry([1.0, 2.0]), "ours": entry([1.0, 2.0], limit="ours ended with code 1")},
        "peaks": [{"convolution float32": 1e10}] * 2, "time": "today", "left_out": {"ours + compile": "ours + compile ended with code 1"},
        "note": "Of before something.",
    }  # fmt: skip
    text = "\n".join(step.table(step.Case("conv", "cifar10", 10), found))
    assert "| today, 2 rounds |" in text
    assert "Left out: ours + compile, ours + compile ended with code 1." in text
    assert "No larger batch was tried: ours, ours ended with code 1." in text
    assert "\nOf before something.\n" in text


@pytest.mark.parametrize(("ends_by", "told"), [(contenders.OUT_OF_MEMORY, None), (1, "code 1")])
def test_only_memory_ends_the_search_for_the_largest_batch_silently(monkeypatch, tmp_path, ends_by, told):
    """Contenders that take up to four images, and end with a code of their own at more."""
    program = f"""
import json, sys
if json.loads(sys.argv[3])["batch_size"] > 4:
    sys.exit({ends_by})
for answer in ("ready", 1.0):
    print(json.dumps(answer), flush=True)
    sys.stdin.readline()
"""
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{program}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(step.sys, "executable", str(tmp_path / "python"))
    options = argparse.Namespace(device="cpu", threads=1, log=str(tmp_path / "log"))
    fits, limit = step.largest_batch(step.CASES["conv1024"], step.Contender("ours", "ours"), options)
    assert fits == 4 and (told in limit if told else limit is None)


def test_counted_passes_and_losses_of_the_first_step():
    """The published step has 32 units; ours with its maths gives its losses, to the last bit or two."""
    batch_size, maths = 4, ["model.norm=batch", *step.SAME_MATHS, *step.Contender("", "").settings]
    settings = config.load("configs/cifar10.yaml", [*SMALL, *maths])
    with distributed.join("cpu") as group:
        theirs = contenders.counts(contenders.build("published", settings, batch_size, group))
        ours = contenders.counts(contenders.build("ours", settings, batch_size, group))
        losses = contenders.same_losses(settings, batch_size, group)
        shared = ["model.norm=batch", *step.Contender("", "", ("shared forward",)).settings]
        shared = config.load("configs/cifar10.yaml", [*SMALL, *shared])
        shared = contenders.counts(contenders.build("ours", shared, batch_size, group))
        memory = contenders.memory(contenders.build("plain", settings, batch_size, group), group.device)
    assert theirs["passes"] == {
        "encoder forward": 5, "encoder by_input": 5, "encoder by_weight": 3,
        "decoder forward": 8, "decoder by_input": 7, "decoder by_weight": 4,
    }  # fmt: skip
    assert theirs == ours and sum(theirs["passes"].values()) == 32
    assert {"loss_encoder", "loss_decoder", "exp_elbo_fake"} <= set(losses)
    assert all(a == pytest.approx(b, rel=1e-5) and math.isfinite(a) for a, b in losses.values())
    assert sum(shared["passes"].values()) == 24
    # The images of a step at the least: real, and four made in each phase.
    assert memory["beyond"] > 9 * batch_size * 3 * 32**2 * 4


def test_gradients_that_a_step_frees_count_as_freed():
    """The published step holds its gradients until the next one frees them; its memory is the same however often it is measured."""
    settings = config.load("configs/cifar10.yaml", [*SMALL, "model.norm=batch", *step.Contender("", "").settings])
    with distributed.join("cpu") as group:
        theirs = contenders.build("published", settings, 1, group)
        theirs()
        found = [contenders.memory(theirs, group.device)["beyond"] for _ in range(2)]
    assert found[0] == found[1]


def test_every_switch_alone_all_and_all_but_one():
    names = [contender.name for contender in step.contenders(step.CASES["conv256_b32"], list(step.SWITCHES), "cuda")]
    assert {"ours + tf32", "ours + compile", "ours + all", "ours + all but shared forward"} <= set(names)
    assert "ours + all but tf32" not in names
    for case in step.CASES.values():
        for contender in step.contenders(case, list(step.SWITCHES), "cuda"):
            config.load(f"configs/{case.config}.yaml", [*case.overrides, "engine.zero_stage=0", *contender.settings])
    # Cases of few contenders too have one that is counted for the compiled one, and it is what a GPU runs by default.
    found = step.contenders(step.CASES["conv256"], list(step.SWITCHES), "cuda")
    assert [contender.name for contender in found][-2:] == ["ours + all", "ours + all but compile"]
    assert set(found[-2].switches) - set(found[-1].switches) == {"compile"}
    # A compiled step cannot be counted; it has the FLOPs of one with the same passes.
    entries = {
        "published": entry([1]) | {"flops": 9}, "ours": entry([1]) | {"flops": 8},
        "ours + shared forward": entry([1], switches=["shared forward"]) | {"flops": 7},
    }  # fmt: skip
    assert step._flops_of(entries, {"switches": ["compile", "shared forward"]}) == 7
    assert step._flops_of(entries, {"switches": ["compile"]}) == 8
    assert math.isnan(step._flops_of({"published": entries["published"]}, {"switches": ["compile"]}))


def test_a_term_that_is_missing_or_not_a_number_differs():
    base = [
        {"loss/a": 1.0, "loss/b": 2.0, "loss/c": 0.0, "loss/d": 1.0},
        {"loss/a": 1.0, "loss/b": 2.0, "loss/c": 0.0, "loss/d": 1.0},
    ]
    test = [
        {"loss/a": 1.0, "loss/b": 2.0, "loss/c": 0.0, "loss/d": math.nan},
        {"loss/a": 1.1, "loss/c": 0.0, "loss/d": 1.0},
    ]
    worst = loss_compare.differences(base, test)
    assert worst["loss/a"] == (pytest.approx(1 / 11), 2)
    assert worst["loss/b"] == (math.inf, 2)
    assert worst["loss/c"] == (0.0, 1)
    assert worst["loss/d"] == (math.inf, 1)


def test_seconds_of_a_ring():
    """1 GB over the eight cards of a node, 400 Gb/s each, at 80%, nearly twice; within a node over NVLink."""
    messages = scaling.NUM_REDUCES * 2 * 511 * scaling.HOP_SEC
    assert scaling.paper_seconds(10**9, 512) == pytest.approx(2 * 511 / 512 / (8 * 40) + messages)
    assert scaling.paper_seconds(10**9, 8) == pytest.approx(
        2 * 7 / 8 / 360 + scaling.NUM_REDUCES * 2 * 7 * scaling.HOP_SEC
    )
    assert scaling.paper_seconds(10**9, 1) == 0


@pytest.mark.parametrize("images", ["0", "12"])
def test_images_that_are_no_whole_batches_are_refused(images, monkeypatch, capsys):
    """Whole batches are read and divided by the images asked for: 12 would count as four more than were read."""
    monkeypatch.setattr(data.sys, "argv", ["data", "--images", images])
    monkeypatch.setattr(data, "run", lambda options, work: "")
    with pytest.raises(SystemExit):
        data.main()
    assert f"--images {images} is not a multiple of 8" in capsys.readouterr().err


def cell(seed, images_seen, kl):
    return {
        "seed": seed,
        "images_seen": images_seen,
        "finite": True,
        "kl": kl,
        "jsd": kl,
        "gnelbo": 0.0,
    } | dict.fromkeys(["histogram_kl", "histogram_jsd"], 0.0)


def test_a_cell_of_the_2d_table_takes_seeds_of_both_precisions_and_keeps_the_longer_run(tmp_path):
    whole = toy2d.STEPS * toy2d.BATCH_SIZE
    for precision, figures in (
        ("bfloat16", [cell(0, whole, 4.0)]),
        ("float32", [cell(0, whole // 2, 9.0), cell(1, whole, 6.0)]),
    ):
        options = argparse.Namespace(output=tmp_path, precision=precision)
        toy2d.store(options, "rings", "soft_intro_vae", figures)
    found = toy2d.read(tmp_path, "rings", "soft_intro_vae")
    assert {seed: (entry["kl"], entry["precision"]) for seed, entry in found.items()} == {
        0: (4.0, "bfloat16"),
        1: (6.0, "float32"),
    }
    line = toy2d.row("Soft-IntroVAE", found)
    assert line.startswith("| Soft-IntroVAE (1 of 2 in float32) |") and "5.00 ± 1.41" in line


def test_the_2d_table_says_where_soft_intro_vae_falls_short_and_what_real_points_get(tmp_path):
    for method, kl in (("soft_intro_vae", 5.0), ("vae", 20.0), ("vae_sharp", 8.0), ("intro_vae", 4.0)):
        toy2d.store(argparse.Namespace(output=tmp_path, precision="float32"), "rings", method, [cell(0, 1, kl)])
    said = toy2d.verdict(tmp_path, "rings", {"kl": 2.0, "jsd": 2.0})
    assert "KL 0.25 times that of VAE;" in said
    assert "KL 0.62 times that of VAE, beta_rec 1, beta_kl 0.05 (**falls short**; real points: 0.25)" in said
    assert "KL 1.2 times that of IntroVAE (**falls short**; real points: 0.5)" in said
    assert said.endswith("; 1 of 1 seeds finite.")


def test_the_2d_table_says_which_seeds_are_finite_and_cover_every_mode():
    def seed(modes, on_mode, finite=True):
        return {"finite": finite, "modes": modes, "num_modes": 8, "on_mode": on_mode}

    whole, fewer, blurred, broken = seed(8, 0.97), seed(7, 0.97), seed(8, 0.03), seed(None, None, finite=False)
    assert toy2d.coverage([whole, whole]) == ["2 of 2 seeds finite", "every mode covered by 2 of 2"]
    short = " (**falls short**)"
    for other in (fewer, blurred):
        assert toy2d.coverage([whole, other]) == ["2 of 2 seeds finite", f"every mode covered by 1 of 2{short}"]
    assert toy2d.coverage([whole, broken]) == [f"1 of 2 seeds finite{short}", f"every mode covered by 1 of 2{short}"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_runs_as_a_module(path):
    """`python -m benchmarks.NAME`, as each says of itself and of the table it made."""
    assert importlib.import_module(f"benchmarks.{path.stem}").__doc__
    assert f"python benchmarks/{path.name}" not in path.read_text()
