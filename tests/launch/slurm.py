"""A real Slurm on loopback: munged, slurmctld and two slurmd of this machine, with a folder of their own. For tests, as root."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from launch.supervise import end_with

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={ctld}
AuthType=auth/munge
# A job that was requeued waits until its old credential has expired.
AuthInfo=socket={munge},cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs of Slurm that are not on this machine."""
    paths = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=paths) is None]


class Slurm:
    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        ports = free_ports(2)
        first = free_pair()
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(folder=folder, munge=folder / "munge.socket", ctld=ports[0], first=first, last=first + 1)
        )
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = outside | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

    def start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # (munged insists on folders that nobody else may write, all the way up.)
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                     f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log")  # fmt: skip
        self._until(lambda: (folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(
            lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes"
        )

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{len(self.daemons)}-{command[0]}.out", "wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, preexec_fn=end_with(os.getpid())
                )
            )

    def _until(self, true, what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            died = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            assert not died and time.monotonic() < deadline, f"no {what} ({died}): {self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def run(self, *command: str, **options) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **options)
        return done.stdout

    def stop(self) -> None:
        """All jobs, then the daemons, the last started first."""
        if self.daemons:
            self.run("scancel", "--signal=KILL", "--full", "-u", "root")
            self.run("scancel", "-u", "root")
            time.sleep(2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def free_pair() -> int:
    while True:
        (port,) = free_ports(1)
        try:
            with socket.socket() as second:
                second.bind(("127.0.0.1", port + 1))
            return port
        except OSError:
            continue
