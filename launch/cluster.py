"""Connecting to Ray, and what the cluster has room for.

`ray.init()` without an address may start a Ray of its own in silence, and with a wrong one it waits two minutes and then ends
the process. So an address is always explicit here, and it is tried with a plain connection first.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sivae import startup
from sivae.errors import UserError

ROOT = Path(__file__).parents[1]
CONNECT_TIMEOUT_SEC = 5.0


def prepare_environment() -> None:
    """What Ray reads when it is imported or started; the caller's own values stay. Nothing is sent to the makers of Ray.

    Raises UserError where it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("this needs Ray; in the checkout: pip install -e '.[cluster]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process; launch/run.py looks itself
    # After a fault the survivors' process group is not left in order: the processes end anyway.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "1")


def connect(
    address: str | None,
    env_vars: dict[str, str] | None = None,
    wait_sec: float = 0.0,
    dashboard: bool = False,
    asked: threading.Event | None = None,
) -> None:
    """Join the cluster at `address` (host:port), or start a Ray on this machine alone when it is None.

    `env_vars` reach every worker. Waits up to `wait_sec` for the cluster to answer, or until `asked` is set, which raises
    KeyboardInterrupt. To be called beside the main thread, see `Signals.beside`. Raises UserError in one sentence when
    nothing answers there, or the token is wrong, or `dashboard` is needed and the cluster has none.
    """
    prepare_environment()
    if address is None:
        _start_local(env_vars, dashboard)
        return
    deadline = time.monotonic() + wait_sec
    while reason := _no_answer(address):
        if time.monotonic() >= deadline:
            raise UserError(
                f"--address: no Ray cluster answers at {address} ({reason}); start one with `ray start --head`,"
                " or leave --address out to use this machine alone"
            )
        if (asked or threading.Event()).wait(1.0):
            raise KeyboardInterrupt
    import ray
    from ray.exceptions import AuthenticationError, RaySystemError

    variables = _worker_environment() | (env_vars or {})
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env")
    if job is None:
        from launch.shipping import EXCLUDES

        # Workers on other machines need this code.
        runtime_env: dict = {"env_vars": variables, "working_dir": str(ROOT), "excludes": EXCLUDES}
    else:
        # The job has shipped it; what the job itself sets must not be set again.
        runtime_env = {"env_vars": {k: v for k, v in variables.items() if k not in job.get("env_vars", {})}}
    try:
        with _imports_beside(), _silence():
            joined = ray.init(
                address=address, runtime_env=runtime_env, logging_level=logging.ERROR, log_to_driver=False
            )
    except (AuthenticationError, ConnectionError, RaySystemError, RuntimeError, ValueError) as error:
        if _is_refused_token(error):
            raise wrong_token(address) from None
        raise UserError(f"--address: cannot join the Ray cluster at {address} ({_one_line(error)})") from None
    if dashboard and not joined.dashboard_url:
        raise UserError(
            f"--address: the cluster at {address} runs without its dashboard, which frees the places of trials that end"
            " early; start its head with `ray start --head --include-dashboard=true` (it listens on 127.0.0.1)"
        )


def leave() -> None:
    """Leave the cluster, and end a Ray that `connect` has started, whose compiled part complains of what goes first."""
    if "ray" in sys.modules:
        with _silence():
            sys.modules["ray"].shutdown()


def wrong_token(address: str) -> UserError:
    return UserError(
        f"--address: the cluster at {address} refuses this token; put the cluster's own into RAY_AUTH_TOKEN"
        " (or a file named by RAY_AUTH_TOKEN_PATH) and set RAY_AUTH_MODE=token"
    )


def _start_local(env_vars: dict[str, str] | None, dashboard: bool) -> None:
    # Ray's own switch for machines that form no cluster: every port of it is on 127.0.0.1 then.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Processes started in advance are of no use: those of a run have variables of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "false")
    # Ray would run workers with niceness 15, behind everything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without one Ray writes a token into the home directory.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    # A raylet that was started by hand on this machine is not ours.
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    with _imports_beside():
        # (Workers inherit this process's environment here.)
        ray.init(
            address="local", include_dashboard=dashboard, dashboard_host="127.0.0.1", logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": _worker_environment() | (env_vars or {})},
        )  # fmt: skip


@contextmanager
def _imports_beside() -> Iterator[None]:
    """Import what Ray Train and Tune need of others meanwhile: starting Ray is mostly waiting. (Of Ray itself nothing: its
    modules import each other in circles, which two threads must not walk at once.)"""

    def work() -> None:
        import pandas  # noqa: F401
        import torch  # noqa: F401

    with startup.importing():
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def _worker_environment() -> dict[str, str]:
    """Variables of this process that its workers and controllers need too."""
    names = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "RAY_USAGE_STATS_ENABLED")
    return {name: os.environ[name] for name in names}


def _no_answer(address: str) -> str | None:
    """Why no head answers there; None when something does that may be one."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        raise UserError(
            f"--address (or RAY_ADDRESS): {address} is not the host:port of a Ray head, for example 10.0.0.1:6379"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_SEC) as connection:
            # To the dashboard Ray would talk for ever in a protocol that it does not know.
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            is_web = connection.recv(5) == b"HTTP/"
    except TimeoutError:
        return None
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    if is_web:
        raise UserError(f"--address (or RAY_ADDRESS): {address} is a web server, such as Ray's dashboard; the head listens on another port, 6379 if not told otherwise")  # fmt: skip
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr, not even from compiled code: Ray repeats a refused token twenty times there before it raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_refused_token(error: BaseException | None) -> bool:
    from ray.exceptions import AuthenticationError

    while error is not None:
        if (
            isinstance(error, AuthenticationError)
            or "InvalidAuthToken" in str(error)
            or "authentication token" in str(error).lower()
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class Quiet:
    """A stream without what Ray prints of its own accord when a node or worker dies: pages of its log. The driver says who was lost."""

    def __init__(self, stream):
        self._stream, self._dropped = stream, False

    def write(self, text: str) -> int:
        ended, self._dropped = self._dropped, "(raylet)" in text
        if not self._dropped and not (ended and text == "\n"):
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@dataclass(frozen=True)
class Node:
    """`free` and `total`: workers that fit now, and with nobody else there."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Need:
    """What one worker takes, and how workers are laid over nodes: pack, spread, strict_pack or strict_spread."""

    cpus: float
    gpus: float
    placement: str = "pack"

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def most(self, slots: list[int]) -> int:
        """Workers that nodes with so many slots hold together under this placement."""
        if self.placement == "strict_pack":
            return max(slots, default=0)
        if self.placement == "strict_spread":
            return sum(slot > 0 for slot in slots)
        return sum(slots)


def nodes(need: Need) -> list[Node]:
    """Nodes that live, as far as a connection tells: the cluster itself notices a dead one only after some seconds."""
    import ray
    from ray._private.state import available_resources_per_node

    free, leaving = available_resources_per_node(), draining()
    found = []
    for node in ray.nodes():
        if (
            node["Alive"]
            and node["NodeID"] not in leaving
            and _listens(node["NodeManagerAddress"], node["NodeManagerPort"])
        ):
            found.append(
                Node(
                    f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
                    _slots(free.get(node["NodeID"], {}), need),
                    _slots(node["Resources"], need),
                )  # fmt: skip
            )
    return found


class Demand:
    """Room asked of the autoscaler from `open` on, for as long as the `with` lasts and never longer than this process: a placement group that
    waits. (Ray's own call for it, request_resources, would keep machines running after everybody has gone.)"""

    def __init__(self, need: Need, number: int):
        self._need, self._number, self._group = need, number, None

    def __enter__(self) -> Demand:
        return self

    def open(self) -> None:
        if self._group is None and self._number > 0:
            from ray.util.placement_group import placement_group

            self._group = placement_group([self._need.resources] * self._number, strategy=self._need.placement.upper())

    def met(self) -> bool:
        if self._group is None:
            return False
        from ray.util.placement_group import placement_group_table

        # (`wait(0)` of a placement group waits for ever.)
        return placement_group_table(self._group).get("state") == "CREATED"

    def close(self) -> None:
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None

    def __exit__(self, *error) -> None:
        self.close()


def most_ever(need: Need) -> int | None:
    """Workers that fit when an autoscaler has started all it may; None when there is none to ask."""
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config()
    return None if not limits else _slots(limits, need)


def has_gpus() -> bool:
    """Whether the cluster has GPUs, or an autoscaler that may start some."""
    import ray
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config() or {}
    return bool(ray.cluster_resources().get("GPU") or limits.get("GPU"))


def draining() -> set[str]:
    """Ids of nodes that are about to be taken away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _slots(resources: dict[str, float], need: Need) -> int:
    return min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in need.resources.items() if amount)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True
