"""How long one call takes: CUDA-graph replays over rotating buffers on a GPU, ``perf_counter`` on a CPU.

Launching from Python takes longer than most of these kernels run, so calls are captured into a graph and replayed.
Inputs rotate through copies that together are larger than the L2, so that they come from memory as they do in a
model; outputs rotate as well.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]

ROTATED_BYTES = 340 << 20
MOST_SETS = 128  # tiny inputs: they are L2 resident in a model, too
MOST_CALLS = 400
_STREAMS = 16


@dataclass(frozen=True)
class Effort:
    """How long a figure may take: of one replay, and of all of them together."""

    replay_us: float = 3000.0
    total_us: float = 1.5e6
    most_replays: int = 15
    warm_replays: int = 3


FULL = Effort()
QUICK = Effort(replay_us=1000.0, total_us=20000.0, most_replays=9, warm_replays=2)
"""For tables of hundreds of rows: a long call is replayed three times."""


@dataclass(frozen=True)
class Measurement:
    us: float
    how: str
    """"graph", "events" (the call could not be captured) or "cpu"."""


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches with the simplest kernels, measured in the same run as everything else."""

    copy_gbps: float
    matmul_tflops: float
    node_us: float

    def floor_us(self, nbytes: float, flops: float) -> float:
        """The least time a call can take: memory or arithmetic, whichever binds."""
        return max(nbytes / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)

    def fraction(self, us: float, nbytes: float, flops: float) -> float:
        return self.floor_us(nbytes, flops) / us


def gbps(nbytes: float, us: float) -> float:
    return nbytes / us / 1e3


def tflops(flops: float, us: float) -> float:
    return flops / us / 1e6


def sets_for(bytes_per_set: int, l2_bytes: int = 0) -> int:
    """How many copies of the inputs make 340 MiB, and more than twice the L2."""
    wanted = max(ROTATED_BYTES, 2 * l2_bytes + 1)
    return max(1, min(MOST_SETS, math.ceil(wanted / max(1, bytes_per_set))))


def calls_per_replay(estimate_us: float, sets: int, effort: Effort = FULL) -> int:
    """Enough calls for a replay of some milliseconds, in whole rounds through the sets where those are short."""
    if estimate_us > effort.replay_us:
        return min(sets, max(1, int(4 * effort.replay_us / estimate_us)))
    rounds = math.ceil(effort.replay_us / max(estimate_us, 0.5) / sets)
    return max(1, min(rounds, MOST_CALLS // sets)) * sets


def replays_for(replay_us: float, effort: Effort = FULL) -> int:
    return int(min(effort.most_replays, max(3, effort.total_us / max(replay_us, 1.0))))


def time_calls(calls: Calls, device: torch.device, effort: Effort = FULL) -> Measurement:
    """Median microseconds of one of ``calls``, which do the same on different buffers."""
    return timer_of(calls, device, effort)()


def timer_of(calls: Calls, device: torch.device, effort: Effort = FULL) -> Callable[[], Measurement]:
    """What measures ``calls`` as often as it is called; they are compiled, tuned and captured before this returns."""
    if device.type != "cuda":
        return lambda: Measurement(time_on_cpu(calls), "cpu")
    _use_streams(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls[:2], calls[0]):  # compiles and tunes
            call()
        estimate = _time_events(lambda: (calls[0](), calls[-1]()), 1)[0] / 2
        count = calls_per_replay(estimate, len(calls), effort)
        replays = replays_for(count * estimate, effort)
        try:
            run, how = _captured(calls, count, stream), "graph"
        except Exception:
            torch.cuda.synchronize()  # raises if more than the capture is broken
            how = "events"

            def run() -> None:
                for i in range(count):
                    calls[i % len(calls)]()

    def measure() -> Measurement:
        with torch.cuda.stream(stream):
            if how == "graph":
                for _ in range(min(effort.warm_replays, replays)):
                    run()
            return Measurement(median(_time_events(run, replays)) / count, how)

    return measure


@functools.cache
def _use_streams(device: torch.device) -> None:
    """More than a process uses before its graphs slow down, so that no figure depends on what was timed before it.

    On an H200 each plain kernel node takes 0.3 to 0.4 us longer once a process has a fourth graph, or has used six more
    streams: in graphs from before, too, and for good.
    """
    for _ in range(_STREAMS):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            torch.zeros(1, device=device)
    torch.cuda.synchronize(device)


def _captured(calls: Calls, count: int, stream: torch.cuda.Stream) -> Callable[[], None]:
    """The replay of a graph of ``count`` of the calls; it owns the outputs' memory."""
    # As many outputs stay alive as there are input sets: freed at once, they would all share one warm block.
    outputs: deque[Any] = deque(maxlen=len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            outputs.append(calls[i % len(calls)]())
    return graph.replay


def _time_events(function: Callable[[], Any], times: int) -> list[float]:
    """Microseconds of each of some runs, between two CUDA events."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def time_on_cpu(calls: Calls, budget_s: float = 0.4, most: int = 200) -> float:
    """Median microseconds over single calls, as many as the budget allows and three at least."""
    calls[0]()
    times: list[float] = []
    while len(times) < 3 or (len(times) < most and sum(times) < budget_s * 1e6):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return median(times)


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _copy_gbps(source: torch.Tensor) -> float:
    target = torch.empty_like(source)
    return gbps(2 * source.nbytes, time_calls([lambda: torch.neg(source, out=target)], source.device).us)


def measure_ceilings(device: torch.device) -> Ceilings:
    """The copy rate of an elementwise kernel, the rate of a large matrix product, and the cost of a graph node.

    A graph's memcpy node is much slower than a copy kernel on some GPUs, so a kernel is what is timed.
    """
    on_gpu = device.type == "cuda"
    elements, size = (1 << 30, 8192) if on_gpu else (1 << 24, 1024)
    if on_gpu:
        elements = min(elements, torch.cuda.mem_get_info(device)[0] // 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32  # what the reference multiplies in on a CPU
    copy = _copy_gbps(torch.randn(elements, device=device, dtype=dtype))
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    us = time_calls([lambda: torch.mm(a, b, out=out)], device).us
    matmul = tflops(2 * size**3, us)
    one = torch.zeros(1, device=device)
    node = time_calls([lambda: one.add_(1.0)] * (MOST_CALLS if on_gpu else 1), device).us
    return Ceilings(copy, matmul, node)


def works(device: torch.device) -> bool:
    """False once a kernel has broken the process's GPU context (an illegal address, for one)."""
    try:
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def free_memory(device: torch.device) -> None:
    """Give back what the last case held, so that a large one does not fail for fragments."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
