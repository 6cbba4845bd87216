"""Warp groups of programs as tasks that take turns, what the hardware does meanwhile, and the barriers between them.

One task runs at a time. Where it waits, what goes on is drawn by lot: another task, or a copy under way. So each seed
is another order of events, always the same one, and if nothing can go on, that is a deadlock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["Barrier", "Deadlock", "Scheduler", "Task"]


class Deadlock(AssertionError):
    pass


class _Stopped(BaseException):
    """Ends tasks whose results nobody wants any more."""


class Task:
    """A warp group of a program."""

    def __init__(self, scheduler: Scheduler, name: str, function: Callable[[], None], program: Any):
        self.name, self.program, self.scheduler = name, program, scheduler
        self.ready: Callable[[], bool] = lambda: True
        self.what = "its turn"
        self.done = False
        self.error: BaseException | None = None
        self.may_touch_memory = False
        self.sees_cluster = False
        self.copies: list[list[Callable[[], None]]] = [[]]
        """Groups of copies to shared memory that were not waited for; the last one is not closed yet."""
        self.products: list[Any] = []
        self.stores: list[Callable[[], None]] = []
        self._function = function
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._pause()
            self._function()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.scheduler.turn.release()

    def _pause(self) -> None:
        self._go.acquire()
        if self.scheduler.stopping:
            raise _Stopped

    def wait(self, what: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until it is ready at least."""
        self.what, self.ready = what, ready
        self.scheduler.turn.release()
        self._pause()

    def resume(self) -> None:
        self._go.release()
        self.scheduler.turn.acquire()
        if self.error is not None:
            raise self.error

    def join(self) -> None:
        self._go.release()
        self._thread.join()


class Scheduler:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.prefers_copies = self.random.choice([None, False, True])
        self.turn = threading.Semaphore(0)
        self.tasks: list[Task] = []
        self.copies: list[Callable[[], None]] = []
        """What TMA was asked for and has not done."""
        self.current: Task | None = None
        self.stopping = False

    def run(self, functions: Sequence[tuple[str, Callable[[], None], Any]]) -> None:
        """Programs that run at a time, to their end."""
        for function in functions:
            self.start(*function)
        try:
            for event in self._events():
                if isinstance(event, Task):
                    self.current = event
                    event.resume()
                else:
                    event()
        finally:
            self.stopping = True
            for task in self.tasks:
                if not task.done:
                    task.join()

    def start(self, name: str, function: Callable[[], None], program: Any) -> Task:
        task = Task(self, name, function, program)
        self.tasks.append(task)
        return task

    def _events(self) -> Iterator[Task | Callable[[], None]]:
        while any(not task.done for task in self.tasks) or self.copies:
            ready = [task for task in self.tasks if not task.done and task.ready()]
            copies = self.copies
            if ready and copies and self.prefers_copies is not None:
                ready, copies = ([], copies) if self.prefers_copies else (ready, [])
            if not ready and not copies:
                raise Deadlock("; ".join(f"{task.name} waits for {task.what}" for task in self.tasks if not task.done))
            i = self.random.randrange(len(ready) + len(copies))
            yield ready[i] if i < len(ready) else self.copies.pop(i - len(ready))


class Barrier:
    """An mbarrier: a phase ends once all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        assert self.count == 0, "the barrier is there already"
        self.count = self.missing = count

    def arrive(self, more_bytes: int = 0) -> None:
        assert self.count > 0, "the barrier is not there yet"
        self.missing -= 1
        self.bytes += more_bytes
        assert self.missing >= 0, "more arrive than the barrier counts"
        self._end_phase()

    def complete(self, size: int) -> None:
        self.bytes -= size
        assert self.bytes >= 0, "more bytes come than the barrier was told of"
        self._end_phase()

    def _end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase in progress is one of the other parity."""
        assert self.count > 0, "the barrier is not there yet"
        return self.phase & 1 != parity
