"""Seconds from a fault to the next training step, and what they are made of. Prints a table and writes it.

    python -m benchmarks.recovery [--output benchmarks/results] [--repeats 3]

A digits run on two workers of a Ray of two raylets on this machine; a worker or a raylet is really killed. The parts: until the
driver says who was lost, until all workers of the next group have joined, until the next logged step. Two settings of Ray for
how soon a silent node counts as dead: its defaults, and three looks half a second apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.digits import machine

ROOT = Path(__file__).parents[1]
QUICK = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef", "PYTHONPATH": str(ROOT),
}  # fmt: skip
PROGRAM = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "remove\\n":
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=1)
        print("removed", flush=True)
    else:
        break
cluster.shutdown()
"""


def measure(fault: str, variables: dict[str, str]) -> dict[str, float]:
    """Seconds of each part for one fault: `worker` or `node`."""
    environment = os.environ | ENVIRONMENT | variables
    with tempfile.TemporaryDirectory() as folder:
        holder = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        address = holder.stdout.readline().strip()
        run = Path(folder) / "run"
        command = [
            sys.executable, "-u", "-m", "launch.train", "configs/digits.yaml", f"run.directory={run}", f"data.cache_dir={folder}/cache",
            "data.num_workers=0", "run.device=cpu", "run.checkpoint_images=160", "tracking.log_images=160", "tracking.tensorboard=false", "--workers", "2",
            "--placement", "spread", "--address", address,
        ]  # fmt: skip
        driver = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        try:
            for line in driver.stderr:
                if found := re.search(r"ranks? (\d[\d, ]*), processes ([\d, ]+), caches", line):
                    pids = [int(pid) for pid in found[2].split(",")]
                if "checkpoint 000000000480" in line:
                    break
            else:
                raise RuntimeError("the run ended before its third checkpoint")
            start = time.time()
            if fault == "worker":
                os.kill(pids[-1], signal.SIGKILL)
            else:
                holder.stdin.write("remove\n")
                holder.stdin.flush()
            parts = {}
            for line in driver.stderr:
                now = time.time()
                if "starting again" in line:
                    parts["noticed"] = now - start
                elif "2 workers on" in line:
                    parts["joined"] = now - start
                elif "resuming at" in line:
                    resumed = time.time()
                elif "joined" in parts and "images/s" in line:
                    break
            else:
                raise RuntimeError(f"the run ended after the fault; seen by then: {', '.join(parts) or 'nothing'}")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            first = next(line for line in lines if line["time"] > resumed)
            # The logged line is ten steps on; one step of them.
            parts["stepped"] = first["time"] - start - 9 * 16 / first["speed/images_per_sec"]
        finally:
            driver.send_signal(signal.SIGTERM)
            driver.communicate(timeout=120)
            holder.stdin.write("end\n")
            holder.stdin.close()
            holder.wait(timeout=60)
    return {
        "noticed": parts["noticed"], "workers": parts["joined"] - parts["noticed"], "state": parts["stepped"] - parts["joined"],
        "total": parts["stepped"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    import ray
    import torch

    lines = [
        f"# From a fault to the next step: {time.strftime('%Y-%m-%d')}, {machine()}, Ray {ray.__version__}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.recovery --repeats {options.repeats}`, medians, in seconds. Two workers on two raylets of one machine, digits.",
        "",
        "| killed | a silent node counts as dead | fault noticed | new workers started | state restored, one step | total |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for fault, name, variables in (
        ("worker", "by Ray's defaults", {}),
        ("node", "by Ray's defaults", {}),
        ("node", "after 1.5 s", QUICK),
    ):
        measured = [measure(fault, variables) for _ in range(options.repeats)]
        middle = {part: statistics.median(one[part] for one in measured) for part in measured[0]}
        lines.append(
            f"| {fault} | {name} | {middle['noticed']:.1f} | {middle['workers']:.1f} | {middle['state']:.1f} | {middle['total']:.1f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "New workers started: the placement, and each process's imports (torch, DeepSpeed), which share the machine's cores here."
        " State restored: the run directory's check, the engines, the checkpoint. Work since the last checkpoint is done again on top.",
        "",
    ]
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "recovery.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
