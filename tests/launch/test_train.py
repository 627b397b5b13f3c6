"""`python -m launch.train` on a real Ray: the same bits as torchrun, undisturbed or after losing a worker, a node or its driver.

pytest tests/launch/test_train.py
"""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.launch.conftest import (
    EVERY_IMAGES,
    TOTAL_IMAGES,
    assert_equal,
    kill,
    logged_images,
    newest_images,
    ray_head,
    refused,
    tensors,
    worker_pids,
)

MODULE = "launch.train"


def test_two_workers_end_with_the_bits_of_torchrun(start, small, undisturbed, tmp_path, nothing_left):
    """On a Ray of its own, which listens on loopback alone and is gone afterwards."""
    process = start(MODULE, [*small(tmp_path / "run"), "--workers", "2"])
    process.until(lambda: newest_images(tmp_path / "run"), "checkpoint")
    ours = {p.pid for p in process.family()}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    open_to_others = [c for c in listening if c.laddr.ip not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]
    # torch's rendezvous on rank 0, which knows no other way: under torchrun it is the same.
    assert len(listening) > 8 and len(open_to_others) <= 1, open_to_others
    workers = worker_pids(process.text)
    assert all(c.pid == workers[0] for c in open_to_others), open_to_others
    assert {psutil.Process(pid).nice() for pid in workers.values()} == {psutil.Process().nice()}
    assert process.wait() == 0, process.text
    assert_equal(tensors(tmp_path / "run"), undisturbed())
    # It says which node has which rank, and hands on what rank 0 measures.
    assert f"node {socket.gethostname()} (127.0.0.1): ranks 0, 1" in process.text
    assert process.text.count("images/s") == TOTAL_IMAGES // EVERY_IMAGES, process.text
    assert "caches in /" in process.text and "images seen; checkpoint" in process.text


def test_one_run_through_all_that_can_happen_to_it(start, small, undisturbed, tmp_path, nothing_left):
    """Asked to stop, its watcher killed, its limit of failures reached, a worker lost, the driver lost with its whole local Ray:
    the same command each time, and in the end the same bits."""
    run = tmp_path / "run"

    # SIGTERM, with no report in between at which it could hear of it: it stops all the same, and saves first.
    process = start(MODULE, [*small(run, "tracking.log_images=1440", "run.checkpoint_images=1440"), "--workers", "2"])
    process.until(lambda: "2 workers on" in process.text, "group")
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.text
    assert "is saved; run the same command to go on" in process.text and newest_images(run) < TOTAL_IMAGES

    # The watcher is killed, so that nobody is left to hand anything on: nothing stays behind.
    process = start(MODULE, [*small(run), "--workers", "2"])
    process.until(lambda: "2 workers on" in process.text, "group")
    family = process.family()
    process.popen.kill()
    psutil.wait_procs(family, timeout=30)
    assert not [p for p in family if p.is_running()]

    # A worker is lost when none may be.
    process = start(MODULE, [*small(run), "--workers", "2", "--max-failures", "0"])
    process.until(lambda: newest_images(run) >= 96, "96 images")
    kill(worker_pids(process.text)[1])
    sentence = refused(process, MODULE)
    assert "rank 1 on node" in sentence and "gave up after 1 failures (--max-failures 0)" in sentence

    # A worker, then the driver: it recovers from both by itself.
    process = start(MODULE, [*small(run), "--workers", "2"])
    process.until(lambda: newest_images(run) >= 288, "288 images")
    kill(worker_pids(process.text)[1])
    process.until(lambda: process.text.count("2 workers on") == 2, "second group")
    process.until(lambda: newest_images(run) >= 768, "768 images")
    driver = next(p for p in process.family() if "launch.driver" in " ".join(p.cmdline()))
    kill(driver.pid)
    assert process.wait() == 0, process.text
    assert "rank 1 on node" in process.text and "was lost; starting again, failure 1 of at most 8" in process.text
    assert "the driver was ended by SIGKILL; starting it again, failure 2 of at most 8" in process.text
    assert_equal(tensors(run), undisturbed())
    assert logged_images(run) == list(range(EVERY_IMAGES, TOTAL_IMAGES + 1, EVERY_IMAGES))


def test_lost_node_that_is_replaced(start, small, undisturbed, tmp_path, raylets):
    """A raylet is SIGKILLed with its worker; another one joins; two workers again, so the same bits."""
    cluster, run = raylets(2), tmp_path / "run"
    process = start(MODULE, [*small(run), "--workers", "2", "--placement", "spread", "--address", cluster.address])
    process.until(lambda: newest_images(run) >= 480, "480 images")
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    process.until(lambda: "starting again, failure 1" in process.text, "word of the failure")
    cluster.add_node(num_cpus=1)
    assert process.wait() == 0, process.text
    assert "was lost" in process.text
    assert_equal(tensors(run), undisturbed())


def test_elastic_goes_on_with_fewer_and_grows_again(start, small, undisturbed, tmp_path, raylets):
    cluster, run, total = raylets(2), tmp_path / "run", 3 * TOTAL_IMAGES
    arguments = small(run, total=total) + ["--workers", "1:3", "--grow-every", "0.5", "--wait", "2"]
    process = start(MODULE, [*arguments, "--address", cluster.address])
    process.until(lambda: newest_images(run) >= 480, "480 images")
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    process.until(lambda: "1 workers on 1 nodes" in process.text, "smaller group")
    lost_at = newest_images(run)
    process.until(lambda: newest_images(run) > lost_at, "progress")
    another = cluster.add_node(num_cpus=1)
    process.until(lambda: process.text.count("2 workers on") == 2, "grown group")
    # A node whose end is announced, as spot machines do.
    drain(cluster, another)
    process.until(lambda: process.text.count("1 workers on") == 2, "smaller group again")
    assert newest_images(run) < total, "it was to happen in mid-run"
    assert process.wait() == 0, process.text
    cluster.remove_node(another)
    assert "elastic: 1, 2, 3 workers share the global batch of 16, which stays the same" in process.text
    assert "there is room for 2 workers now" in process.text
    assert "is about to be taken away: saving a checkpoint first" in process.text
    assert "failure 2" not in process.text, "growing and leaving in order are no failures"
    assert_equal(tensors(run, total), undisturbed(total), tolerance=1e-5)


def drain(cluster, node) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={cluster.address}", f"--node-id={node.node_id}",
               "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


NODE_PROGRAM = """
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
Node(RayParams(gcs_address=sys.argv[1], num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 * 2**20), head=False)
time.sleep(600)
"""


def test_directory_that_is_not_shared(small, start, tmp_path, raylets):
    """Two nodes, one of which sees another folder at the same path: told at the start, not when rank 0 moves there."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    shared, own, cluster = tmp_path / "shared", tmp_path / "own", raylets(1)
    shared.mkdir(), own.mkdir()
    # A mount namespace of its own gives the second raylet another folder there.
    command = f"mount --bind {own} {shared} && exec {sys.executable} -c '{NODE_PROGRAM}' {cluster.address}"
    with open(tmp_path / "node.log", "wb") as log:
        node = subprocess.Popen(["unshare", "--mount", "bash", "-c", command], stdout=log, stderr=log)
    try:
        process = start(
            MODULE, [*small(shared / "run"), "--workers", "2", "--address", cluster.address, "--wait", "60"]
        )
        sentence = refused(process, MODULE)
        assert "is not the same place on every node" in sentence and "object store" in sentence
    finally:
        node.terminate()
        node.wait(timeout=30)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workers", "17"], ["16 images a step are too few for 17 ranks"]),
        (["--workers", "17:19"], ["none of 17 to 19 workers can share"]),
        (["--workers", "8:2"], ["--workers", "2:8"]),
        (["schedule.batchsize=3"], ["schedule.batchsize", "unknown setting"]),
        (["--env", "NO_SUCH_VARIABLE"], ["NO_SUCH_VARIABLE is not set here"]),
        (["--address", "127.0.0.1:9"], ["no Ray cluster answers at 127.0.0.1:9"]),
        (["--address", "somewhere"], ["host:port"]),
        (["--address", "http://127.0.0.1:8265"], ["host:port"]),
    ],
)
def test_bad_input_is_one_sentence(start, small, tmp_path, nothing_left, arguments, words):
    sentence = refused(start(MODULE, [*small(tmp_path / "run"), *arguments]), MODULE)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workers", "8", "--wait", "1"], ["8 are asked for", "the cluster has room for 2"]),
        (["run.directory=/proc/nothing"], ["run.directory", "/proc/nothing", "cannot write"]),
    ],
)
def test_what_only_the_cluster_can_tell_is_one_sentence(start, small, head, tmp_path, nothing_left, arguments, words):
    sentence = refused(start(MODULE, [*small(tmp_path / "run"), *arguments, "--address", head.address]), MODULE)
    assert all(word in sentence for word in words), sentence


def test_the_dashboards_port_is_told_from_the_heads(start, small, head, tmp_path, nothing_left):
    port = head.url.removeprefix("http://")
    sentence = refused(start(MODULE, [*small(tmp_path / "run"), "--address", port]), MODULE)
    assert f"{port} is a web server, such as Ray's dashboard" in sentence


def test_places_of_workers_that_could_not_start_come_free(
    start, small, tmp_path, tmp_path_factory, nothing_left, monkeypatch
):
    """Ray has a GPU here and torch has none. The reason is told each time, and not that the GPU is taken."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")
    with ray_head(tmp_path_factory, "--num-cpus=1", "--num-gpus=1") as own:
        arguments = [*small(tmp_path / "run"), "--wait", "20", "--max-failures", "1", "--address", own.address]
        process = start(MODULE, arguments)
        assert process.wait() == 1
    assert process.text.count("the workers could not be started (RuntimeError: ") == 2, process.text
    assert "in use" not in process.text and "gave up after 2 failures" in process.text
    assert "no new checkpoint was saved" in process.text, "an earlier driver may have saved some"


@pytest.mark.parametrize("after_sec", [0.0, 1.5, 4.0])
def test_asked_to_stop_while_it_starts(start, small, tmp_path, nothing_left, after_sec):
    """While the driver imports, while Ray starts, and while the workers do."""
    process = start(MODULE, small(tmp_path / "run", total=64000))
    while not psutil.Process(process.popen.pid).children():
        time.sleep(0.01)
    time.sleep(after_sec)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.text
    last = process.text.strip().splitlines()[-1]
    assert last.startswith("launch.train: stopped") and last.endswith("run the same command to go on"), process.text


def test_wrong_token(start, small, head, tmp_path, nothing_left):
    process = start(MODULE, [*small(tmp_path / "run"), "--address", head.address], RAY_AUTH_TOKEN="f" * 32)
    sentence = refused(process, MODULE)
    assert "refuses this token" in sentence and "RAY_AUTH_TOKEN" in sentence and "f" * 32 not in process.text


def test_a_lost_head_is_told_and_waited_for(start, small, tmp_path, raylets, nothing_left):
    """Ray ends a driver whose head is gone without a word; the watcher has one."""
    cluster = raylets(1)
    process = start(MODULE, [*small(tmp_path / "run"), "--wait", "3", "--address", cluster.address])
    process.until(lambda: newest_images(tmp_path / "run"), "checkpoint")
    cluster.head_node.kill_gcs_server()
    cluster.head_node.kill_raylet()
    assert process.wait() == 1, process.text
    assert "failure 1 of at most 8" in process.text
    assert process.text.strip().splitlines()[-1].startswith("launch.train: error: --address: no Ray cluster answers at")
