"""One progress bar for everything that takes long."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, enabled: bool = True) -> tqdm:
    """A bar on stderr. Where there is no terminal, as in a job's log, a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, initial=initial, disable=not enabled,
        dynamic_ncols=terminal, mininterval=0.2 if terminal else 30.0, file=sys.stderr if terminal else _Lines(),
    )  # fmt: skip


class _Lines:
    """Every state of the bar as a line of its own."""

    def write(self, text: str) -> None:
        sys.stderr.write(text.replace("\r", "\n"))

    def flush(self) -> None:
        sys.stderr.flush()
