"""`python -m launch.submit CONFIG [key=value ...] --address URL`: run `launch.train` as a job on a Ray cluster, from anywhere.

    python -m launch.submit configs/ffhq1024_conv.yaml run.directory=s3://bucket/run --workers 8 --address http://127.0.0.1:8265
    python -m launch.submit status|logs|stop ID --address URL
    python -m launch.submit list --address URL

It ships this checkout (no runs, data, secrets or history), follows the log, and ends with the job's own exit code. Ctrl-C stops
following; the job goes on. The token of a cluster that wants one comes from RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH,
with RAY_AUTH_MODE=token.

Exit codes: the job's own (0 done, 1 something is wrong, 75 stopped with a checkpoint saved), 1 when it cannot be submitted,
2 wrong arguments, 69 the cluster answers no more and nobody knows how the job fares, 130 stopped following.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch import paths, train
from launch.cluster import CONNECT_TIMEOUT_SEC, ROOT, prepare_environment, wrong_token
from launch.run import parse_workers, sizes
from launch.shipping import EXCLUDES, travels
from launch.train import EXIT_ERROR, EXIT_INTERRUPTED
from sivae import config
from sivae.config import ConfigError
from sivae.errors import UserError, shown

COMMANDS = ("status", "logs", "stop", "list")
STOP_WAIT_SEC = 120  # a job that is stopped saves a checkpoint first; Ray's own patience is 3 seconds
POLL_SEC = 1.0
PATIENCE_SEC = 300.0  # with a cluster that does not answer while its job is followed
EXIT_UNREACHABLE = 69


class Unreachable(UserError):
    """Nothing answers any more, and the job may be in any state."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit", description=__doc__.split("\n\n")[0],
    )  # fmt: skip
    parser.add_argument("what", help="YAML file inside this checkout, or its URL; or one of status, logs, stop, list")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value or ID", help="settings that replace the file's; the job's id"
    )
    train.add_run_options(parser)
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="http://host:port of the cluster's dashboard",
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment variable for the job; without a value, as it is here")  # fmt: skip
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    parser.add_argument("--pending-limit", type=float, default=300.0, metavar="SEC", help="give up on a job that has not started by then (default %(default)s)")  # fmt: skip
    parser.add_argument(
        "--driver-cpus",
        type=float,
        default=0.0,
        metavar="N",
        help="CPU slots of the driver itself, to place it (default 0)",
    )
    parser.add_argument(
        "--driver-gpus", type=float, default=0.0, metavar="N", help="GPUs of the driver itself, to place it (default 0)"
    )
    parser.add_argument(
        "--python",
        default="python",
        help="the Python there that has sivae's dependencies (default: the first on Ray's PATH)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def say(text: str) -> None:
    print(f"launch.submit: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        return manage(options) if options.what in COMMANDS else submit(options)
    except (UserError, ConfigError) as error:
        if options.debug:
            raise
        print(f"launch.submit: error: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_ERROR


def submit(options: argparse.Namespace) -> int:
    prepare_environment()
    entrypoint = command(options)
    variables = train.environment(options.env) | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SEC)}
    client = connect(options.address)
    try:
        job = client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDES, "env_vars": variables},
            entrypoint_num_cpus=options.driver_cpus or None, entrypoint_num_gpus=options.driver_gpus or None,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"--address: the cluster does not take the job ({_short(error)})") from None
    print(job, flush=True)
    if options.no_wait:
        return 0
    say(f"follow with `python -m launch.submit logs {job} --address {options.address}`, end with `stop`")
    try:
        return follow(client, job, options.pending_limit)
    except KeyboardInterrupt:
        say(f"no longer following; the job {job} goes on")
        return 130


def command(options: argparse.Namespace) -> str:
    """The shell command of the job. Raises ConfigError or UserError for all that can be known here to be wrong."""
    for override in options.overrides:
        if "storage_options" in override:
            raise UserError(
                f"{override.partition('=')[0]}: would stand in the job's command for all to read; give credentials by --env"
            )
    settings = config.load(options.what, options.overrides)
    sizes(settings, parse_workers(options.workers))
    for key, place in paths.of(settings).items():
        if paths.is_relative(place):
            raise UserError(
                f"{key}: {place} would lie in the job's temporary copy of this checkout; give an absolute path that all"
                " nodes share, or a URL"
            )
    path = options.what
    if "://" not in path:
        full = Path(path).resolve()
        if not full.is_relative_to(ROOT):
            raise UserError(
                f"{path}: lies outside of this checkout, which is what travels to the cluster; copy it into configs/"
            )
        path = str(full.relative_to(ROOT))
        if not travels(path):
            raise UserError(
                f"{path}: does not travel to the cluster, where sivae/, launch/ and configs/ go without what git ignores or what"
                " is named like a secret; copy it into configs/ under another name"
            )
    # exec: the signal that stops a job should reach Python, not a shell around it.
    return "exec " + shlex.join([options.python, "-m", "launch.train", path, *options.overrides, *handed_on(options)])


def handed_on(options: argparse.Namespace) -> list[str]:
    """The options of launch.train that were given, as arguments."""
    parser = argparse.ArgumentParser()
    train.add_run_options(parser)
    given = [(action, getattr(options, action.dest)) for action in parser._actions if action.dest != "help"]
    return [
        word for action, value in given if value != action.default for word in (action.option_strings[0], str(value))
    ]


def manage(options: argparse.Namespace) -> int:
    if options.what != "list" and len(options.overrides) != 1:
        raise UserError(f"{options.what}: needs the id of one job; `list` shows them")
    client = connect(options.address)
    if options.what == "list":
        for job in sorted(client.list_jobs(), key=lambda one: one.start_time or 0):
            if job.submission_id:
                print(describe(job))
        return 0
    job = options.overrides[0]
    info = details(client, job)
    if options.what == "status":
        print(describe(info))
        return 0
    if options.what == "stop":
        if info.status.is_terminal():
            print(describe(info))
            return 0
        client.stop_job(job)
        say(f"asked {job} to save and stop")
    return follow(client, job, options.pending_limit, show=options.what == "logs")


def connect(address: str | None) -> Any:
    if not address:
        raise UserError("--address: give the URL of the cluster's dashboard, for example http://127.0.0.1:8265")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address: {address} is not a URL like http://127.0.0.1:8265")
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_SEC).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--address: no Ray cluster answers at {shown(address)} ({reason}); is its head running, and its dashboard reached?"
        ) from None
    prepare_environment()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray's client would go there in place of `address`, token and all
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they list every file that is not shipped
        client.list_jobs()
        return client
    except AuthenticationError:
        raise wrong_token(shown(address)) from None
    except (RuntimeError, ConnectionError, ValueError, OSError) as error:
        if any(word in str(error).lower() for word in ("401", "403", "unauthori", "token", "forbidden")):
            raise wrong_token(shown(address)) from None
        raise UserError(
            f"--address: what answers at {shown(address)} is no Ray cluster with jobs ({_short(error)})"
        ) from None


def follow(client: Any, job: str, pending_limit: float, show: bool = True) -> int:
    """Print the job's log until it ends; its exit code. Raises UserError when it does not start in time."""
    from ray.job_submission import JobStatus

    start, told = time.monotonic(), None
    while (info := details(client, job, PATIENCE_SEC)).status == JobStatus.PENDING:
        waited = time.monotonic() - start
        waits_for = " ".join((info.message or "its runtime environment").split())
        if waited >= pending_limit:
            client.stop_job(job)
            raise UserError(
                f"job {job} did not start within {pending_limit:g} seconds (--pending-limit) and was taken back; it waited for:"
                f" {waits_for}"
            )
        if waits_for != told and waited > 2:
            told = waits_for
            say(f"pending, waiting up to {pending_limit:g} seconds: {waits_for}")
        time.sleep(POLL_SEC)
    printed = 0
    while True:
        if show:
            printed = asyncio.run(_tail(client, job, printed))
        info = details(client, job, PATIENCE_SEC)
        if info.status.is_terminal():
            break
        time.sleep(POLL_SEC)
    say(describe(info))
    if info.driver_exit_code is not None:
        return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code
    return {"SUCCEEDED": 0, "STOPPED": EXIT_INTERRUPTED}.get(info.status.value, EXIT_ERROR)


async def _tail(client: Any, job: str, printed: int) -> int:
    """Print what comes after the first `printed` characters; returns how many there are now. A connection that breaks ends it."""
    seen = 0
    try:
        async for lines in client.tail_job_logs(job):
            seen += len(lines)
            if seen > printed:
                sys.stdout.write(lines[-(seen - printed) :])
                sys.stdout.flush()
                printed = seen
    except Exception as error:  # noqa: BLE001 (websockets raise many kinds; the caller looks whether the job still runs)
        say(f"the log's connection broke ({type(error).__name__}), trying again")
    return printed


def details(client: Any, job: str, patience_sec: float = 0.0) -> Any:
    """What the cluster knows of a job. Raises UserError when there is none, and Unreachable when nothing has answered for so long."""
    deadline = time.monotonic() + patience_sec
    told = False
    while True:
        try:
            return client.get_job_info(job)
        except (RuntimeError, OSError) as error:  # a connection's errors are OSErrors
            if "404" in str(error) or "does not exist" in str(error):
                raise UserError(f"{job}: the cluster knows no such job; `list` shows them") from None
            if time.monotonic() >= deadline:
                raise Unreachable(
                    f"{job}: the cluster does not answer ({_short(error)}); the job goes on without this, and `logs` follows it again"
                ) from None
            if not told:
                say(f"the cluster does not answer, trying for {patience_sec:g} seconds")
                told = True
        time.sleep(POLL_SEC)


def describe(job: Any) -> str:
    """One line: id, status, exit code, start, command. No environment variables."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
    code = "" if job.driver_exit_code is None else f" (exit code {job.driver_exit_code})"
    entrypoint = " ".join(
        "storage_options=..." if "storage_options" in word else shown(word) for word in job.entrypoint.split()
    )
    return f"{job.submission_id}  {job.status.value}{code}  {started}  {entrypoint.removeprefix('exec ')}"


def _short(error: BaseException) -> str:
    return " ".join(shown(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main())
