"""What benchmarks share: lines with the time, checks that go on after a failure, and files that are always whole."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

START = time.time()


def say(*words: object) -> None:
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


class Checks:
    """Counts comparisons and failures; a failure is printed, and the next comparison goes on."""

    def __init__(self) -> None:
        self.comparisons = self.failures = 0

    def attempt(self, what: object, function: Callable[[], Any]) -> bool:
        """Whether ``function`` raised nothing."""
        self.comparisons += 1
        try:
            function()
        except Exception as error:
            self.failures += 1
            say("WRONG" if isinstance(error, AssertionError) else "ERROR", what, str(error)[:300])
            return False
        return True

    def __str__(self) -> str:
        return f"{self.comparisons} comparisons, {self.failures} failures"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows, which have the same keys, so far; nothing where there are none."""
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: a run that is ended meanwhile leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
