"""What goes wrong in a run ends it with one clear sentence, a code, and what was saved still whole. Real processes.

pytest tests/distributed/test_failures.py
"""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from sivae.checkpoint import list_names
from sivae.cli import EXIT_INTERRUPTED
from sivae.data import open_stream
from sivae.storage import Folder
from tests.processes import ROOT, TIMEOUT_SEC, environment, run_sivae, sivae_command


@pytest.fixture
def arguments(cache_dir, tmp_path):
    def make(*overrides: str) -> list[str]:
        return [
            "train", "configs/digits.yaml", f"run.directory={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "data.num_workers=0",
            "model.channels=[8,16]", "model.latent_dim=4", "schedule.total_images=640", "run.checkpoint_images=160",
            "tracking.log_images=160", "tracking.progress=false", "tracking.tensorboard=false", *overrides,
        ]  # fmt: skip

    return make


def refused(done) -> str:
    """The one sentence of a run that was refused."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("sivae: error")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_divergence_stops_before_the_step_and_says_what_helps(arguments, tmp_path):
    """A learning rate that really diverges: the weights that were saved are finite, the term and the advice are named."""
    done = run_sivae(arguments("encoder_optimizer.lr=1e6", "decoder_optimizer.lr=1e6"))
    sentence = refused(done)
    assert "non-finite" in sentence and "objective.beta_neg" in sentence and "images" in sentence
    assert any(term in sentence for term in ("rec", "kl_", "grad_norm_"))


def test_rollback_draws_anew_and_gives_up_after_its_limit(arguments, tmp_path):
    done = run_sivae(
        arguments(
            "encoder_optimizer.lr=1e6", "decoder_optimizer.lr=1e6", "run.on_nonfinite=rollback", "run.max_rollbacks=2"
        )
    )
    sentence = refused(done)
    assert "gave up after 2 rollbacks" in sentence
    images = [json.loads(line)["images_seen"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(images) == len(set(images)), "what was redone is told once"
    assert done.stderr.count("with other draws") == 2
    assert list_names(Folder(str(tmp_path / "run")))[0] == "000000000000"


def test_run_directory_of_another_model(arguments):
    assert run_sivae(arguments("schedule.total_images=160")).returncode == 0
    sentence = refused(run_sivae(arguments("model.latent_dim=5")))
    assert "latent_dim is 4 there and 5 here" in sentence and "run.directory" in sentence


def test_images_of_another_size(arguments, tmp_path):
    from sivae.data.pack import pack

    pack("digits:", tmp_path / "set", resolution=8, progress=False)
    sentence = refused(run_sivae(arguments(f"data.url={tmp_path / 'set'}")))
    assert "8" in sentence and "16" in sentence and "resolution" in sentence


def test_batch_larger_than_the_set(arguments):
    assert "1797" in refused(run_sivae(arguments("schedule.batch_size=1800", "schedule.total_images=3600")))


def test_batch_that_is_smaller_than_the_ranks(arguments):
    done = run_sivae(arguments("schedule.batch_size=1"), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("1 images a step are too few for 2 ranks") == 1


def test_a_second_run_in_the_same_directory(arguments, tmp_path):
    first = subprocess.Popen(
        sivae_command(arguments("schedule.total_images=64000", "data.num_workers=2")),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + TIMEOUT_SEC
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "another run works in this directory" in refused(run_sivae(arguments()))
    finally:
        first.kill()
        first.wait()
    assert run_sivae(arguments()).returncode == 0, "a killed run holds nothing"


def test_data_that_one_rank_cannot_read_is_one_sentence_of_all(arguments, tmp_path):
    from sivae.data.pack import pack

    index = pack("digits:", tmp_path / "set", resolution=16, progress=False)
    shard = tmp_path / "set" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[index.offset[900] + index.size[900] // 2] ^= 1
    shard.write_bytes(data)
    done = run_sivae(arguments(f"data.url={tmp_path / 'set'}", "schedule.total_images=3600"), ranks=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "sivae: error" in line]
    assert len(lines) == 1 and "train-000000.tar" in lines[0], done.stderr
    assert "sivae/cli.py" not in done.stderr, "no rank shows a traceback of its own"


@pytest.mark.parametrize("tensorboard", [False, True])
def test_full_disk_while_logging(arguments, cache_dir, tensorboard):
    open_stream("digits:", resolution=16, batch_size=1, cache_dir=cache_dir)  # packed before the disk is full

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    sentence = refused(
        run_sivae(arguments("tracking.log_images=16", f"tracking.tensorboard={tensorboard}".lower()), preexec_fn=limit)
    )
    assert "free space" in sentence


def test_missing_config():
    assert "nowhere.yaml" in refused(run_sivae(["train", "nowhere.yaml"]))


def test_missing_data(arguments, tmp_path):
    assert "sivae pack" in refused(run_sivae(arguments(f"data.url={tmp_path / 'nothing'}")))


def test_what_all_ranks_find_is_said_once(arguments, tmp_path):
    done = run_sivae(arguments(f"data.url={tmp_path / 'nothing'}"), ranks=2)
    assert done.returncode != 0 and done.stderr.count("sivae: error") == 1, done.stderr


def test_run_directory_that_cannot_be_written(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(run_sivae(arguments(f"run.directory={tmp_path / 'file' / 'run'}")))


def test_full_disk_while_saving_keeps_the_checkpoint_before(arguments, tmp_path):
    """The process may write no file larger than 30 kB from its second checkpoint on: a limit of the kernel, as a full disk is."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    assert run_sivae(arguments("schedule.total_images=160")).returncode == 0
    sentence = refused(run_sivae(arguments(), preexec_fn=limit))
    assert "cannot write" in sentence and "disk is full" in sentence
    run = Folder(str(tmp_path / "run"))
    assert list_names(run) == run.names("checkpoints") == ["000000000160"]
    assert run_sivae(arguments()).returncode == 0, "with space again, the same command goes on"


def test_a_disk_that_fills_up_on_rank_0_is_one_sentence_of_all(arguments, cache_dir, tmp_path):
    """Rank 0 alone writes, and not in the thread that trains: the others hear of it where they agree on the next step."""
    open_stream("digits:", resolution=16, batch_size=1, cache_dir=cache_dir)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = run_sivae(arguments("schedule.total_images=64000"), ranks=2, preexec_fn=limit)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "sivae: error" in line]
    assert len(lines) == 1 and "cannot write" in lines[0] and "disk is full" in lines[0], done.stderr
    assert "sivae/cli.py" not in done.stderr, "no rank shows a traceback of its own"
    assert Folder(str(tmp_path / "run")).names("checkpoints") == []


SLOW_SAVES = """
import sys, time
from sivae import cli, storage
write = storage.Folder.write
def slow(self, data, *names):
    if names[0] == "checkpoints" and names[1] != "000000000160" and names[-1] == "state.json":
        print("in the middle", flush=True)
        time.sleep(2)
    return write(self, data, *names)
storage.Folder.write = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_save_in_the_background_that_is_interrupted(arguments, tmp_path, number):
    """Killed in its middle, the checkpoint before it is whole and used; asked to stop, the run finishes it, and saves once more."""
    command = [sys.executable, "-c", SLOW_SAVES, *arguments("schedule.total_images=64000")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in the middle\n"
    run = Folder(str(tmp_path / "run"))
    assert list_names(run) == ["000000000160"]
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_SEC)
    if number == signal.SIGKILL:
        assert process.returncode == -number and list_names(run) == ["000000000160"]
        assert run.names("checkpoints") == ["000000000160", "000000000320"], "half a checkpoint, which does not count"
        done = run_sivae(arguments("schedule.total_images=320"))
        assert done.returncode == 0 and "resuming at 160 images" in done.stderr, done.stderr
        assert list_names(run) == ["000000000160", "000000000320.1"]
    else:
        assert process.returncode == EXIT_INTERRUPTED, errors
        assert "Traceback" not in errors
        first, second = list_names(run)
        assert first == "000000000320" and int(second) > 320, "both are whole"


def test_kl_gap_that_stays_negative_is_warned_of(arguments):
    """A plain VAE objective has no gap; with beta_neg 0 the encoder is not told apart, and fakes get the lower KL at some point."""
    done = run_sivae(arguments("objective.beta_neg=0", "tracking.log_images=16", "schedule.total_images=3200"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(arguments()[2].removeprefix("run.directory=") + "/metrics.jsonl")]
    gaps = [line["terms/kl_gap"] < 0 for line in lines]
    runs = "".join("n" if gap else "p" for gap in gaps)
    assert ("n" * 10 in runs) == ("published advice" in done.stderr), runs
