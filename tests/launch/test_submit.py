"""`python -m launch.submit` with a real `ray start --head` on loopback, with a token: ship, stream, stop, true exit codes.

pytest tests/launch/test_submit.py
"""

import fnmatch
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest

from launch import submit, train
from sivae.errors import UserError
from tests.launch.conftest import EVERY_IMAGES, RAY_ENVIRONMENT, newest_images, refused, tensors
from tests.processes import ROOT

MODULE = "launch.submit"
TOKEN = RAY_ENVIRONMENT["RAY_AUTH_TOKEN"]


@pytest.fixture
def dashboard(head) -> str:
    return head.url


def job_id(text: str) -> str:
    return re.search(r"raysubmit_\w+", text)[0]


def test_submit_streams_and_ends_with_the_jobs_code(start, small, dashboard, tmp_path):
    run = tmp_path / "run"
    # Ray's client would follow these to another cluster.
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    process = start(
        MODULE, [*small(run, total=960), "--workers", "2", "--address", dashboard, "--env", "COLOUR=invisible-blue"],
        **elsewhere,
    )  # fmt: skip
    assert process.wait() == 0, process.text
    assert (
        "ranks 0, 1" in process.text
        and process.text.count("images/s") == 10
        and "SUCCEEDED (exit code 0)" in process.text
    )
    assert tensors(run, 960)
    assert "invisible-blue" not in process.text and TOKEN not in process.text
    job = job_id(process.text)
    for what in ("status", "list"):
        done = start(MODULE, [*([what, job] if what == "status" else [what]), "--address", dashboard])
        assert done.wait() == 0 and f"{job}  SUCCEEDED (exit code 0)" in done.text, done.text
        assert "launch.train configs/digits.yaml" in done.text and "invisible-blue" not in done.text
    again = start(MODULE, ["logs", job, "--address", dashboard])
    assert again.wait() == 0 and again.text.count("images/s") == 10, again.text


def test_stop_saves_and_a_failing_job_gives_its_code(start, small, dashboard, tmp_path):
    run = tmp_path / "run"
    submitted = start(MODULE, [*small(run, total=64000), "--no-wait", "--address", dashboard])
    assert submitted.wait() == 0, submitted.text
    job = submitted.text.strip()
    assert re.fullmatch(r"raysubmit_\w+", job)
    following = start(MODULE, ["logs", job, "--address", dashboard])
    following.until(lambda: newest_images(run) >= EVERY_IMAGES, "checkpoint")
    stop = start(MODULE, ["stop", job, "--address", dashboard])
    assert stop.wait() == 75, stop.text
    assert following.wait() == 75, following.text
    assert "is saved; run the same command to go on" in following.text
    assert 0 < newest_images(run) < 64000
    # What only a worker can find wrong: the job's own code and its one sentence.
    process = start(MODULE, [*small(run), "data.url=/no/where", "--address", dashboard])
    assert process.wait() == 1, process.text
    assert (
        "launch.train: error: there is no packed image set at /no/where" in process.text
        and "FAILED (exit code 1)" in process.text
    )
    process = start(MODULE, [*small(run), "--workers", "8", "--wait", "1", "--address", dashboard])
    assert process.wait() == 1 and "the cluster has room for 2" in process.text, process.text


def test_impossible_request_says_what_it_waits_for(start, small, dashboard, tmp_path):
    process = start(
        MODULE, [*small(tmp_path / "run"), "--driver-gpus", "1", "--pending-limit", "6", "--address", dashboard]
    )
    sentence = refused(process, MODULE)
    assert "did not start within 6 seconds" in sentence and "GPU" in sentence, sentence


def test_wrong_token(start, small, dashboard, tmp_path):
    process = start(MODULE, [*small(tmp_path / "run"), "--address", dashboard], RAY_AUTH_TOKEN="f" * 32)
    sentence = refused(process, MODULE)
    assert "refuses this token" in sentence and "f" * 32 not in process.text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["configs/digits.yaml"], ["run.directory", "runs/digits", "absolute path"]),
        (["configs/digits.yaml", "run.directory=/tmp/x", "data.url=data/set"], ["data.url", "data/set"]),
        (["configs/digits.yaml", "run.directory=~/x", "evaluate.lpips=nets/l.pt"], ["evaluate.lpips", "nets/l.pt"]),
        (
            ["configs/digits.yaml", "run.directory=/tmp/x", "schedule.batchsize=2"],
            ["schedule.batchsize", "unknown setting"],
        ),
        (["configs/digits.yaml", "run.directory=/tmp/x", "--workers", "17"], ["too few for 17 ranks"]),
        (
            ["configs/digits.yaml", "run.directory=/tmp/x", "run.storage_options={key: hidden}"],
            ["run.storage_options", "--env"],
        ),
        (["/etc/hostname", "run.directory=/tmp/x"], ["/etc/hostname"]),
        (
            ["configs/digits.yaml", "run.directory=/tmp/x", "--address", "http://127.0.0.1:9"],
            ["no Ray cluster answers"],
        ),
        (["configs/digits.yaml", "run.directory=/tmp/x", "--address", "127.0.0.1:8265"], ["is not a URL"]),
        (["status", "raysubmit_nothing"], ["knows no such job"]),
        (["status"], ["needs the id of one job"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_submitted(start, dashboard, arguments, words):
    if "--address" not in arguments:
        arguments = [*arguments, "--address", dashboard]
    process = start(MODULE, arguments)
    sentence = refused(process, MODULE)
    assert all(word in sentence for word in words) and "hidden" not in process.text, sentence
    assert "raysubmit_" not in process.text.replace("raysubmit_nothing", "")


def test_a_cluster_that_does_not_answer_for_a_while(monkeypatch, capsys):
    """The job goes on without who follows it: that is neither its failure nor its end."""
    answers = [ConnectionError("refused"), RuntimeError("Request failed with status code 503"), "found"]

    class Client:
        def get_job_info(self, job):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(submit, "POLL_SEC", 0.01)
    assert submit.details(Client(), "job", patience_sec=60.0) == "found"
    assert capsys.readouterr().err.count("does not answer, trying for 60 seconds") == 1
    answers[:] = [ConnectionError("refused")] * 1000
    with pytest.raises(submit.Unreachable, match="job: the cluster does not answer .refused.; the job goes on"):
        submit.details(Client(), "job", patience_sec=0.1)
    answers[:] = [RuntimeError("Request failed with status code 404: does not exist")]
    with pytest.raises(UserError, match="knows no such job"):
        submit.details(Client(), "job", patience_sec=60.0)
    monkeypatch.setattr(submit, "manage", lambda options: submit.details(Client(), "job"))
    answers[:] = [ConnectionError("refused")]
    assert submit.main(["logs", "job", "--address", "http://127.0.0.1:9"]) == 69


class Jobs:
    """A cluster whose job is in these states one after the other, the last for ever. Its log comes again after each break of its connection."""

    def __init__(self, *states: str, code: int | None = None):
        self.states, self.code, self.stopped = list(states), code, False
        self.log = ["one\n", "two\n", "three\n"]

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        status = JobStatus(self.states.pop(0) if len(self.states) > 1 else self.states[0])
        entrypoint = "exec python -m launch.train c.yaml run.storage_options={key:hidden}"
        return SimpleNamespace(
            status=status, message="waits for a GPU", start_time=0, submission_id=job, entrypoint=entrypoint,
            driver_exit_code=self.code,
        )  # fmt: skip

    async def tail_job_logs(self, job):
        seen = self.log[: 4 - len(self.states)]
        yield "".join(seen)
        if len(seen) < len(self.log):
            raise ConnectionError

    def stop_job(self, job):
        self.stopped = True


@pytest.mark.parametrize(
    "state, code, expected",
    [
        ("SUCCEEDED", 0, 0), ("FAILED", 75, 75), ("FAILED", -15, 143), ("SUCCEEDED", None, 0), ("STOPPED", None, 75),
        ("FAILED", None, 1),
    ],
)  # fmt: skip
def test_a_job_is_followed_to_its_code(monkeypatch, capsys, state, code, expected):
    """Every line of its log is printed once, however often its connection breaks."""
    monkeypatch.setattr(submit, "POLL_SEC", 0.01)
    client = Jobs("PENDING", "RUNNING", "RUNNING", state, code=code)
    assert submit.follow(client, "job", pending_limit=60.0) == expected and not client.stopped
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\n" and "hidden" not in err and "launch.train c.yaml" in err


def test_a_job_that_does_not_start_is_taken_back(monkeypatch):
    monkeypatch.setattr(submit, "POLL_SEC", 0.01)
    client = Jobs("PENDING")
    with pytest.raises(UserError, match="did not start within 0.05 seconds .* it waited for: waits for a GPU"):
        submit.follow(client, "job", pending_limit=0.05)
    assert client.stopped


def test_the_job_gets_the_options_that_were_given():
    given = [
        "--workers", "2:4", "--placement", "spread", "--cpus-per-worker", "2", "--max-failures", "-1", "--wait", "0",
        "--grow-every", "7", "--cache-dir", "/tmp/a b", "--", "configs/digits.yaml", "run.directory=/shared/a b",
    ]  # fmt: skip
    options = submit.build_parser().parse_intermixed_args(given)
    words = shlex.split(submit.command(options))
    assert words[:4] == ["exec", "python", "-m", "launch.train"]
    told, asked = (vars(train.build_parser().parse_intermixed_args(arguments)) for arguments in (words[4:], given))
    assert told == asked


def test_a_job_has_its_variables_and_time_to_save(monkeypatch, capsys):
    asked = {}
    client = SimpleNamespace(submit_job=lambda **options: asked.update(options) or "job")
    monkeypatch.setattr(submit, "connect", lambda address: client)
    monkeypatch.setattr(submit, "prepare_environment", lambda: None)
    monkeypatch.setenv("SIZE_HERE", "large")
    arguments = [
        "configs/digits.yaml",
        "run.directory=/shared/run",
        "--env",
        "COLOUR=blue",
        "--env",
        "SIZE_HERE",
        "--no-wait",
    ]
    assert submit.main(arguments) == 0 and capsys.readouterr().out == "job\n"
    assert asked["runtime_env"]["env_vars"] == {
        "COLOUR": "blue",
        "SIZE_HERE": "large",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
    }


def test_a_config_that_would_not_travel_is_refused():
    from launch.shipping import travels

    for config in ("configs/digits.yaml", "configs/sweeps/betas_digits.yaml"):
        assert travels(config)
    for config in (
        "mine.yaml",
        "sweeps/mine/best.yaml",
        "runs/a/config.yaml",
        "configs/secret.yaml",
        "configs/runs/a.yaml",
    ):
        assert not travels(config)
    options = submit.build_parser().parse_args(["README.md", "run.directory=/shared/run", "data.url=/shared/set"])
    options.what = "configs/digits.yaml"
    assert "configs/digits.yaml" in submit.command(options)
    own = ROOT / "mine.yaml"
    own.write_text((ROOT / "configs" / "digits.yaml").read_text())
    try:
        options.what = str(own)
        with pytest.raises(UserError, match="mine.yaml: does not travel to the cluster"):
            submit.command(options)
    finally:
        own.unlink()


def test_what_is_shipped(tmp_path):
    """By Ray's own packing of a copy of this checkout: code and configs, nothing that is big or secret."""
    import shutil
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    from launch.shipping import EXCLUDES

    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    copy = tmp_path / "checkout"
    for file in files:
        if (ROOT / file).exists():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    unwanted = [
        ".git/config", ".venv/bin/python", "runs/a/checkpoints/1/weights.safetensors", "data/set/index.json", "data/set/shard-0.tar", ".env",
        "sweeps/b/table.md", "key.pem", ".aws/credentials", "configs/my_secret.yaml", "model.pth", "sivae/__pycache__/x.pyc", ".netrc",
        "service-account.json", "configs/gcp-key.json", ".envrc", ".boto", "sa.p12", "photos/me.jpg", "mydata/set.tfrecords", "a/b.py", "notes.txt",
        "configs/.env", "configs/my-service-account.json",
    ]  # fmt: skip
    for file in unwanted:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True, excludes=EXCLUDES)
    shipped = {
        name.split("/", 1)[-1] if name.startswith("checkout/") else name for name in zipfile.ZipFile(package).namelist()
    }
    assert not [file for file in unwanted if any(fnmatch.fnmatch(name, f"*{file}") for name in shipped)]
    wanted = [file for file in files if file.startswith(("sivae/", "launch/", "configs/")) and (ROOT / file).exists()]
    assert {"sivae/data/reader.py", "launch/train.py"} <= set(wanted) and set(wanted) <= shipped
    assert package.stat().st_size < 2**20
