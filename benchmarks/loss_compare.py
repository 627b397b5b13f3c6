"""Do two versions, or two settings, train alike? Runs the same seed with both and compares every logged term of every step.

    python -m benchmarks.loss_compare --base main                                   # a revision against the working tree
    python -m benchmarks.loss_compare --base v1 --test HEAD --config configs/digits.yaml schedule.batch_size=8
    python -m benchmarks.loss_compare --test-with engine.zero_stage=2               # a setting against none, same tree

Prints the largest relative difference of each term, and exits with 1 when one is above --tolerance or a term is missing.
Practice after torchtitan's scripts/loss_compare.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPARED = ("loss/", "terms/", "optimizer/")
Steps = list[dict[str, float]]


@contextmanager
def tree_of(revision: str | None) -> Iterator[Path]:
    """A folder with the files of a git revision; None is the working tree."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def losses(revision: str | None, config: str, overrides: list[str], num_steps: int) -> Steps:
    """What is compared of each step of a run."""
    with tree_of(revision) as tree, tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "sivae", "train", config, *overrides, f"run.directory={folder}", "tracking.log_images=1",
            "tracking.tensorboard=false", "tracking.progress=false",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(tree)}
        # The batch is known once the settings are read.
        asked = (
            "import sys; from sivae import config; print(config.load(sys.argv[1], sys.argv[2:]).levels()[0].batch_size)"
        )
        batch = subprocess.check_output(
            [sys.executable, "-c", asked, *command[4:]], cwd=tree, env=environment, text=True
        )
        images = num_steps * int(batch)
        every = [f"schedule.total_images={images}", f"tracking.picture_images={images}"]
        subprocess.run([*command, *every], cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if k.startswith(COMPARED)} for line in lines]
    assert len(steps) == num_steps, f"{len(steps)} steps were logged"
    return steps


def differences(base: Steps, test: Steps) -> dict[str, tuple[float, int]]:
    """The largest relative difference of each term, and its step from 1; a term that one of them lacks differs infinitely."""
    worst: dict[str, tuple[float, int]] = {}
    for number, (one, other) in enumerate(zip(base, test, strict=True), 1):
        for name in one.keys() | other.keys():
            a, b = one.get(name), other.get(name)
            if a is None or b is None:
                found = float("inf")
            else:
                found = abs(a - b) / max(abs(a), abs(b), 1e-30)
                found = float("inf") if found != found else found
            if name not in worst or found > worst[name][0]:
                worst[name] = found, number
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="git revision; the working tree when not given")
    parser.add_argument("--test", help="git revision; the working tree when not given")
    parser.add_argument(
        "--base-with", nargs="+", default=[], metavar="key.path=value", help="settings of the base alone"
    )
    parser.add_argument(
        "--test-with", nargs="+", default=[], metavar="key.path=value", help="settings of the test alone"
    )
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of both")
    options = parser.parse_args()
    base = losses(options.base, options.config, [*options.overrides, *options.base_with], options.steps)
    test = losses(options.test, options.config, [*options.overrides, *options.test_with], options.steps)
    worst = differences(base, test)
    for name, (found, number) in sorted(worst.items(), key=lambda item: -item[1][0]):
        mark = "  ABOVE" if found > options.tolerance else ""
        print(f"{name:<32}{found:>10.2e} at step {number}{mark}")
    above = sum(found > options.tolerance for found, _ in worst.values())
    print(f"{len(worst)} terms of {options.steps} steps: {above or 'none'} above {options.tolerance:g}")
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main())
