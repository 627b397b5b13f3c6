"""Room is asked of a cluster's autoscaler, waited for and given back. A real autoscaler; its machines are raylets of this one.

pytest tests/launch/test_autoscaler.py
"""

import json
import time

import pytest

from launch.cluster import Need
from tests.launch.conftest import free_port, ray_head

MODULE = "launch.train"
IDLE_SEC = 3.0
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def test_need_under_each_placement():
    """Nodes with 8, 8 and 2 slots."""
    most = {name: Need(1, 1, name).most([8, 8, 2]) for name in ("pack", "spread", "strict_pack", "strict_spread")}
    assert most == {"pack": 18, "spread": 18, "strict_pack": 8, "strict_spread": 3}


@pytest.fixture
def autoscaled(tmp_path, tmp_path_factory):
    """A head with one CPU slot, whose autoscaler may start two machines more; `nodes()` are those that live."""
    port = free_port()
    provider = {
        "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {
        "cluster_name": "test", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": IDLE_SEC / 60, "provider": provider,
        "available_node_types": kinds, "head_node_type": "ray.head.default", "auth": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, **{f"{name}_commands": [] for name in COMMANDS},
    }  # fmt: skip
    path = tmp_path / "autoscaler.json"
    path.write_text(json.dumps(config))
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(tmp_path_factory, "--num-cpus=1", f"--autoscaling-config={path}", port=port, **variables) as head:
        yield head


def num_nodes(address: str) -> int:
    from ray._raylet import GcsClient

    return sum(node.state == 0 for node in GcsClient(address=address).get_all_node_info().values())  # 0: alive


def test_machines_come_for_a_run_and_go_after_it(start, small, tmp_path, autoscaled):
    run, address = tmp_path / "run", autoscaled.address
    # It starts on the head alone, and hears of the machine that it asked for.
    arguments = small(run, total=64000) + ["--workers", "1:2", "--grow-every", "0.5", "--wait", "2"]
    process = start(MODULE, [*arguments, "--address", address])
    process.until(lambda: "there is room for 2 workers now" in process.text, "room")
    assert num_nodes(address) == 2
    process.popen.terminate()
    assert process.wait() == 75, process.text
    gone_within(address, 60)
    # This one cannot start before its machine is there.
    process = start(MODULE, [*small(run, total=64000), "--workers", "2", "--address", address])
    process.until(lambda: "2 workers on" in process.text, "group")
    assert num_nodes(address) == 2
    process.popen.terminate()
    assert process.wait() == 75, process.text


def gone_within(address: str, seconds: float) -> None:
    """Nothing keeps a machine that nobody uses: it is ended some seconds after the run."""
    deadline = time.monotonic() + seconds
    while num_nodes(address) > 1:
        assert time.monotonic() < deadline, "the machine stays"
        time.sleep(0.5)
