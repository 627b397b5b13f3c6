"""Where the time and memory of training steps go: `sivae train --profile`.

The parts of a step are marked with `span`, which costs nothing to speak of while nobody profiles. A profile lets some steps
warm up, then times the spans of some undisturbed steps, then traces a few more with torch.profiler, which slows them: the
times are of the former, the operators, communication and (on a CPU) memory of the latter. On a GPU spans are timed by its own
events, so work counts where the GPU does it, and the host never waits for it in between.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from sivae.distributed import Group
from sivae.storage import Folder

# As the table lists them. What is in none of them is other.
SPANS = (
    "encoder phase", "decoder phase", "optimizer", "averages", "data", "waiting for ranks", "batch to device", "logging",
    "pictures", "checkpoint",
)  # fmt: skip
WARM_UP_STEPS, TRACED_STEPS = 3, 2
TOP_OPERATORS = 10
PREFIX = "sivae: "
GIB = 2**30

_recorder: _Recorder | None = None


@contextmanager
def span(name: str) -> Iterator[None]:
    """Mark a part of a training step, in traces too. A span inside another one counts for itself alone. Also a decorator."""
    with record_function(PREFIX + name):
        if _recorder is None:
            yield
        else:
            with _recorder.within(name):
                yield


@dataclass
class _Recorder:
    """Marks between spans, each with the name of what comes after it; None is what no span names."""

    device: torch.device
    stack: list[str | None] = field(default_factory=lambda: [None])
    marks: list[tuple[str | None, Any]] = field(default_factory=list)
    peak_bytes: dict[str | None, int] = field(default_factory=dict)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.stack.append(name)
        self.mark()
        try:
            yield
        finally:
            self.stack.pop()
            self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            if self.marks:
                before = self.marks[-1][0]
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peak_bytes[before] = max(peak, self.peak_bytes.get(before, 0))
            torch.cuda.reset_peak_memory_stats(self.device)
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.time_ns()
        self.marks.append((self.stack[-1], now))

    def seconds(self) -> dict[str | None, float]:
        """Of each name, over all marks. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str | None, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:]):
            elapsed = start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else (end - start) / 1e9
            found[name] = found.get(name, 0.0) + elapsed
        return found


class StepProfile:
    """Profiles `num_steps` steps of a run and the TRACED_STEPS after them. `step` is called after every step, by all ranks."""

    def __init__(self, num_steps: int, group: Group):
        self.num_steps, self.group, self.count = num_steps, group, 0
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own start and end are nothing to tell
        self.timed, self.traced = _Recorder(group.device), _Recorder(group.device)
        self.trace: profile | None = None

    @property
    def total_steps(self) -> int:
        return WARM_UP_STEPS + self.num_steps + TRACED_STEPS

    def step(self) -> bool:
        """One more step is done; True when that was the last."""
        global _recorder
        self.count += 1
        if self.count == WARM_UP_STEPS:
            self._wait()
            self.start_sec, self.start_host_sec, _recorder = time.monotonic(), time.process_time(), self.timed
            _recorder.mark()
        elif self.count == WARM_UP_STEPS + self.num_steps:
            _recorder.mark()
            self._wait()
            self.wall_sec = (time.monotonic() - self.start_sec) / self.num_steps
            self.host_sec = (time.process_time() - self.start_host_sec) / self.num_steps
            on_gpu = self.group.device.type == "cuda"
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
            self.trace = profile(activities=activities, profile_memory=not on_gpu)
            self.trace.start()
            _recorder = self.traced
            _recorder.mark()
        elif self.count == self.total_steps:
            _recorder.mark()
            self._wait()
            self.trace.stop()
            self.close()
            return True
        return False

    def close(self) -> None:
        """Nothing is recorded from now on."""
        global _recorder
        _recorder = None

    def _wait(self) -> None:
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)

    def report(self, folder: Folder, images_seen: int, batch_size: int) -> str:
        """Write the trace of rank 0 and the table to `profile/` of the run; returns the table. A collective."""
        names = [*SPANS, None]
        mine = self.timed.seconds()
        times = torch.tensor([mine.get(name, 0.0) for name in names] + [self.wall_sec], device=self.group.device)
        times[:-1] /= self.num_steps
        slowest = self.group.max(times.clone()).tolist()
        mean = self.group.mean(times).tolist()
        peaks = self.timed.peak_bytes if self.group.device.type == "cuda" else self._peaks()
        peak = self.group.max(torch.tensor([float(peaks.get(name, 0)) for name in names], device=self.group.device))
        communication = torch.tensor(self.communication_sec() / TRACED_STEPS, device=self.group.device)
        communication = self.group.mean(communication).item()

        def write() -> str:
            number = f"{images_seen:012d}"
            trace = f"trace-{number}.json.gz"
            with tempfile.TemporaryDirectory() as scratch:
                path = os.path.join(scratch, trace)
                self.trace.export_chrome_trace(path)
                with open(path, "rb") as file:
                    folder.write(file.read(), "profile", trace)
            rows = list(zip(names, mean, slowest, peak.tolist()))
            text = self._table(rows, mean[-1], batch_size, communication)
            text += f"\n\ntrace of {TRACED_STEPS} steps, for ui.perfetto.dev or chrome://tracing: {folder.url}/profile/{trace}\n"
            folder.write(text.encode(), "profile", f"steps-{number}.txt")
            return text

        return self.group.on_main(write)

    def _table(self, rows: list[tuple[Any, ...]], wall_sec: float, batch_size: int, communication_sec: float) -> str:
        ranks = self.group.world_size
        on_gpu = self.group.device.type == "cuda"
        lines = [
            f"{batch_size / wall_sec:,.1f} images/s: {1e3 * wall_sec:.1f} ms a step of {batch_size} images,"
            f" mean of {self.num_steps} steps" + (f" and {ranks} ranks" if ranks > 1 else ""),
            "",
            f"{'part of a step':<20}{'share':>8}{'ms':>10}{'slowest rank':>14}{'peak GiB':>10}",
        ]
        total = sum(mean for _, mean, _, _ in rows)
        for name, mean, slowest, peak in rows:
            if mean:
                told_peak = f"{peak / GIB:>10.3f}" if peak else f"{'':>10}"
                lines.append(
                    f"{name or 'other':<20}{mean / total:>8.1%}{1e3 * mean:>10.2f}{1e3 * slowest:>14.2f}{told_peak}"
                )
        missing = [name for name, mean, _, _ in rows if not mean]
        if missing:
            lines.append(f"not due in these steps: {', '.join(missing)}")
        lines.append(
            "peak: " + ("all that torch had allocated" if on_gpu else "what a step allocated beyond what lay there before it")
            + " at its highest during that part, on the rank that had most"
        )  # fmt: skip
        if ranks > 1:
            lines.append(
                f"communication: {1e3 * communication_sec:.2f} ms a step inside the parts above, waiting for the slowest rank included"
            )
        if on_gpu:
            lines.append(
                "on a GPU work counts when it is done there, and waiting for data only while the GPU has nothing to do"
            )
        lines += ["", f"{'operator':<44}{'share':>8}{'ms a step':>11}{'calls a step':>14}"]
        operators = self._operators()
        everything = sum(seconds for _, seconds, _ in operators)
        for name, seconds, calls in operators[:TOP_OPERATORS]:
            lines.append(
                f"{name[:43]:<44}{seconds / everything:>8.1%}{1e3 * seconds / TRACED_STEPS:>11.2f}{calls / TRACED_STEPS:>14,.0f}"
            )
        return "\n".join(lines)

    def _operators(self) -> list[tuple[str, float, int]]:
        """Name, seconds of its own, and calls, in the traced steps; those that took most come first."""
        attribute = "self_device_time_total" if self.group.device.type == "cuda" else "self_cpu_time_total"
        found = [
            (event.key, getattr(event, attribute) / 1e6, event.count)
            for event in self.trace.key_averages()
            # A kernel's time is in its operator's account too, which has the name that a person knows.
            if not event.key.startswith(PREFIX) and event.device_type == DeviceType.CPU
        ]
        return sorted((item for item in found if item[1] > 0), key=lambda item: -item[1])

    def communication_sec(self) -> float:
        """Of collectives in the traced steps, on the device or, on a CPU, where gloo does them."""
        where, prefix = (
            (DeviceType.CUDA, "nccldev") if self.group.device.type == "cuda" else (DeviceType.CPU, "gloo:")
        )  # beside its kernels NCCL has annotations of both the host and the device
        events = self.trace.profiler.kineto_results.events()
        return (
            sum(e.duration_ns() for e in events if e.device_type() == where and e.name().lower().startswith(prefix))
            / 1e9
        )

    def _peaks(self) -> dict[str | None, int]:
        """From the CPU allocator's own account: bytes beyond those at the start of the trace, the highest within each part."""
        changes = [e for e in self.trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        timeline = [(event.start_ns(), event.nbytes(), None) for event in changes]
        timeline += [(at, 0, (name,)) for name, at in self.traced.marks]
        found: dict[str | None, int] = {}
        name, live = None, 0
        for _, num_bytes, entered in sorted(timeline, key=lambda entry: entry[0]):
            live += num_bytes
            if entered:
                (name,) = entered
            found[name] = max(live, found.get(name, 0))
        return found
