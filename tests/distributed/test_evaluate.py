"""Two ranks judge a model as one does, to 1e-9, also while it trains; what is wrong is said once.

python -m pytest tests/distributed/test_evaluate.py
"""

import json
import re
from pathlib import Path

import pytest

from tests.processes import run_sivae, run_torchrun
from tests.unit.judged import Net, export_model, pack_images, save_script

METRICS = "frechet_pixels,frechet_mine,kernel_mine,precision_mine,coverage_pixels,mse,psnr"


def figures(folder) -> dict[str, float]:
    files = sorted(Path(folder, "evaluations").iterdir())
    return json.loads(files[-1].read_text())["figures"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data") / "images", 1037)  # the last batch is smaller


def test_two_ranks_equal_one(data, tmp_path):
    net = save_script(Net(), tmp_path / "net.pt")
    found = []
    for ranks in (1, 2):
        model = export_model(tmp_path / f"model{ranks}")
        done = run_sivae(
            ["evaluate", model, "--data", data, "--metrics", METRICS, "--detector", f"mine={net}", "--num-fakes", "1050",
             "--statistics", str(tmp_path / f"kept{ranks}")], ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("frechet_pixels ") == 1
        found.append(figures(model))
        (path,) = Path(model, "evaluations").iterdir()
        assert json.loads(path.read_text())["ranks"] == ranks
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-9)
    # What two ranks kept of the real images serves one.
    again = run_sivae(
        ["evaluate", model, "--data", data, "--metrics", METRICS, "--detector", f"mine={net}", "--num-fakes", "1050",
         "--statistics", str(tmp_path / "kept2")],
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert figures(model) == pytest.approx(found[0], rel=1e-9, abs=1e-9)


KEPT = """
import sys
import sivae
from sivae import distributed, evaluate
from sivae.data import open_stream
held = set()
add = evaluate._Features.add
def counted(self, features):
    held.add(len(self.rows))
    add(self, features)
evaluate._Features.add = counted
with distributed.join("cpu") as group:
    stream = open_stream(sys.argv[1], split="all", resolution=8, batch_size=1, progress=False)
    judging = evaluate.Evaluation(stream, evaluate.Protocol(("precision_pixels",), num_fakes=40, num_reals=200), group)
    judging.run(sivae.load(sys.argv[2]))
    features = judging.real["pixels"]
    print(f"rank {group.rank} held {sorted(held)}, keeps {len(features.rows)}, sums of {int(features.sums.count)}", flush=True)
    distributed.end_process(0)
"""


def test_a_rank_holds_the_features_of_its_own_images_and_rank_0_alone_keeps_the_real_ones(data, tmp_path):
    script = tmp_path / "kept.py"
    script.write_text(KEPT)
    done = run_torchrun(2, [str(script), data, export_model(tmp_path / "model")])
    assert done.returncode == 0, done.stderr
    told = re.findall(r"rank \d held .*?, keeps \d+, sums of \d+", done.stdout)  # two processes may write on one line
    # Batches of 64, 64, 64 and 8 real images in turn, and one of 40 samples, which is rank 0's.
    assert sorted(told) == [
        "rank 0 held [40, 128], keeps 200, sums of 200",
        "rank 1 held [72], keeps 0, sums of 0",
    ]


PATIENT = """
import sys, time
from sivae import distributed, evaluate
from sivae.data import open_stream
with distributed.join("cpu", timeout_sec=15) as group:
    stream = open_stream(sys.argv[1], split="all", resolution=8, batch_size=1, progress=False)
    judging = evaluate.Evaluation(stream, evaluate.Protocol(("mse",)), group)
    judging.patient.on_main(lambda: time.sleep(20))
    distributed.end_process(0)
"""


def test_ranks_wait_for_what_rank_0_computes_alone(data, tmp_path):
    """Longer than for anything else: large figures take it an hour."""
    script = tmp_path / "wait.py"
    script.write_text(PATIENT)
    done = run_torchrun(2, [str(script), data])
    assert done.returncode == 0, done.stderr


def test_a_wrong_argument_is_said_once(data, tmp_path):
    model = export_model(tmp_path / "model")
    done = run_sivae(["evaluate", model, "--data", data, "--metrics", "frechet_pixels", "--num-fakes", "5"], 2)
    assert done.returncode != 0 and done.stderr.count("there are 5 generated ones") == 1
    assert not Path(model, "evaluations").exists()


def test_a_run_on_two_ranks_is_judged_under_zero_3(cache_dir, tmp_path):
    """The same run on one rank at stage 0 learns the same to rounding, so its figures are the same to that."""
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        run = tmp_path / f"run{ranks}"
        done = run_sivae(
            ["train", "configs/digits.yaml", f"run.directory={run}", f"data.cache_dir={cache_dir}", "data.num_workers=0",
             "model.channels=[8,16]", "model.latent_dim=4", "schedule.total_images=64", "tracking.tensorboard=false",
             "tracking.progress=false", f"engine.zero_stage={stage}", "evaluate.every_images=32", "evaluate.num_fakes=300",
             "evaluate.metrics=[frechet_pixels,mse]"], ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(figures(run))
        assert (run / "checkpoints" / "best.json").exists() and len(list((run / "evaluations").iterdir())) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-3)
