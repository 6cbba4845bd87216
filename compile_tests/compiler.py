"""Compiles kernels without a GPU, in a process that serves one case after another and that a failure may end.

MLIR and LLVM abort on some failures, so nothing compiles in the process that asks. A process of its own for each case
would begin with cold caches, which takes longer than most kernels take to compile.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from torch_fp4ops.ops import _triton_prims

TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm_{cc}": ("cuda", cc, 32) for cc in (80, 86, 89, 90, 100, 103, 120)},
    **{arch: ("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    TARGETS["sm_121"] = ("cuda", 121, 32)

SHARES = triton.__version__.startswith("3.6.")
"""Whether NVIDIA's targets may share LLVM IR: Triton 3.9's differs by target, and another's can end the compiler."""

TIMEOUT_S = 120


@dataclass
class Compiled:
    """What a compilation gave; ``error`` is empty if it went well."""

    error: str = ""
    registers: int = -1
    spilled_bytes: int = -1
    shared_bytes: int = -1
    instructions: Counter[str] = field(default_factory=Counter)
    assembly: str = ""
    seconds: float = 0.0
    """Processor time, the assembler's included."""


def compile_apart(case: Any, target: str, listing: bool = False, keep: bool = False, share: bool = True) -> Compiled:
    """Compile in another process, one of each thread that calls this.

    Args:
        case: an ``AotCase``.
        target: one of ``TARGETS``.
        listing: count instructions.
        keep: leave the kernel where Triton looks for it before it compiles.
        share: see :func:`_compile`.
    """
    if not hasattr(_own, "process"):
        _own.process = _Process()
    return _own.process.compile(case, target, listing, keep, share)


_own = threading.local()


class _Process:
    """A process that compiles; started when there is something to do, and anew where the compiler has ended it."""

    _starting = threading.Lock()  # else two would inherit each other's ends of pipes, and an end go unnoticed

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def compile(self, *request: Any) -> Compiled:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(request)
            if self._pipe.poll(TIMEOUT_S):
                return self._pipe.recv()
            error = f"took more than {TIMEOUT_S} s"
        except (EOFError, ConnectionError):
            self._process.join()
            error = f"the compiler ended the process (exit code {self._process.exitcode})"
        self.stop()
        return Compiled(error=error)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None

    def _start(self) -> None:
        # fork: Triton and torch are imported already, and nothing here has touched a GPU.
        context = multiprocessing.get_context("fork")
        with self._starting:
            self._pipe, its_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(its_end, self._pipe), daemon=True)
            self._process.start()
            its_end.close()


def _serve(pipe: Any, other_end: Any) -> None:
    other_end.close()
    faulthandler.disable()  # pytest has one that writes to a file of its own
    quiet = os.open(os.devnull, os.O_WRONLY)  # MLIR dumps whole modules when it fails
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    gc.freeze()  # there is much that torch has made, and no garbage in it
    gc.disable()  # and little in what a case leaves
    with contextlib.suppress(EOFError):
        for number in itertools.count(1):
            if number % 100 == 0:
                gc.collect()
            request = pipe.recv()
            before = sum(os.times()[:4])
            try:
                result = compile_case(*request)
            except BaseException as error:
                last = (str(error).strip().splitlines() or [""])[-1]
                result = Compiled(error=f"{type(error).__name__}: {last[:200]}")
            result.seconds = sum(os.times()[:4]) - before
            pipe.send(result)


def _kernel_by_name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# Kernels are sent to the other process by name: what they are pickled as is the function below them.
def _reduce_kernel(kernel: Any) -> Any:
    return _kernel_by_name, (kernel.fn.__module__, kernel.fn.__name__)


for _kind in (JITFunction, GluonJITFunction):
    ForkingPickler.register(_kind, _reduce_kernel)


def compile_case(case: Any, target: str, listing: bool = False, keep: bool = False, share: bool = True) -> Compiled:
    """As :func:`compile_apart`, in this process; raises what Triton raises."""
    from torch_fp4ops.ops._triton_launch import LAUNCH_OPTIONS

    gpu = GPUTarget(*TARGETS[target])
    if gpu.backend == "hip" and case.on_hip is not None:
        constants, threads = case.on_hip
        case = case._replace(constants=constants, threads=threads)
    options = {**LAUNCH_OPTIONS, "num_warps": max(1, case.threads // gpu.warp_size)}
    if case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.nullcontext() if keep else _apart_from_cache():
            stages, shared = _compile(case, gpu, options, share and not keep)
    if gpu.backend == "cuda":
        return _nvidia(stages, shared, log.getvalue(), listing)
    return _amd(stages, shared)


@contextlib.contextmanager
def _apart_from_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as scratch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = scratch
        triton.knobs.compilation.disable_line_info = True  # the code is the same, and a fifth of the time saved
        yield


class _Last(NamedTuple):
    """What the last case became in LLVM's language, for targets that give the same."""

    key: Any
    gpu: Any
    traits: frozenset[str]
    llir: str
    shared: int


_last = _Last(None, None, frozenset(), "", 0)
_asked_for_capability = False


def _compile(case: Any, gpu: Any, options: dict[str, Any], share: bool) -> tuple[dict[str, Any], int]:
    """What Triton makes of a case, by stage, and its bytes of shared memory.

    NVIDIA's targets that get the same LLVM IR of a kernel share the way there, which takes most of the time; LLVM's
    code for the target and the assembler run for each. A test compares both ways.
    """
    global _last, _asked_for_capability
    if share and _last.key == (case, options) and _same_llir(gpu, _last.gpu, _last.traits):
        backend = make_backend(gpu)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, backend.parse_options(options), Language.TRITON)
        ptx = stages["ptx"](_for_target(_last.llir, gpu), {})
        return {"ptx": ptx, "cubin": stages["cubin"](ptx, {})}, _last.shared
    _asked_for_capability = False
    kernel = triton.compile(_source(case), target=gpu, options=options)
    ttir = kernel.asm.get("ttir", "tt.dot")  # Gluon has none
    traits = {"dots"} if "tt.dot" in ttir else set()
    if re.search(r'"tt\.reduce".*\n.*\n.*arith\.max\w*f ', ttir):
        traits.add("maxima")
    if _asked_for_capability:
        traits.add("capability")
    _last = _Last((case, options), gpu, frozenset(traits), kernel.asm["llir"], kernel.metadata.shared)
    return kernel.asm, kernel.metadata.shared


def _for_target(llir: str, gpu: Any) -> str:
    """The same but for what kernels begin with, which is a comment before compute capability 9.0."""
    for action in ("wait", "launch_dependents"):
        for either in (80, 90):
            forms = (_triton_prims.griddepcontrol(action, capability) for capability in (either, gpu.arch))
            llir = llir.replace(*forms)
    return llir


def _same_llir(a: Any, b: Any, traits: frozenset[str]) -> bool:
    """Whether two targets get the same LLVM IR of a kernel with these traits."""
    if not SHARES or a.backend == "hip" or b.backend == "hip":
        return False
    if "dots" in traits:
        family = {86: 80, 89: 80, 103: 100}
        return family.get(a.arch, a.arch) == family.get(b.arch, b.arch)
    if "maxima" in traits and (a.arch == 100) != (b.arch == 100):  # across threads by one instruction there
        return False
    return "capability" not in traits or (a.arch >= 86) == (b.arch >= 86)


@tl.core.builtin
def _noted_capability(_semantic: Any = None) -> Any:
    global _asked_for_capability
    _asked_for_capability = True
    return _cuda_capability(_semantic=_semantic)


_cuda_capability, _triton_prims.cuda_capability = _triton_prims.cuda_capability, _noted_capability


def _source(case: Any) -> Any:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    whole = [signature[name].startswith("*") or name in case.multiples_of_16 for name in names]
    aligned = {(i,): [["tt.divisibility", 16]] for i, is_whole in enumerate(whole) if is_whole}
    source_type = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    return source_type(case.kernel, signature, case.constants, aligned)


def _nvidia(stages: dict[str, Any], shared: int, log: str, listing: bool) -> Compiled:
    sass = ""
    if listing:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
            binary.write(stages["cubin"])
            binary.flush()
            disassemble = [triton.knobs.nvidia.cuobjdump.path, "-sass", binary.name]
            sass = subprocess.run(disassemble, capture_output=True, text=True).stdout
    # What Triton reports as spills mixes in arrays, and needs a device.
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled_bytes=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared_bytes=shared,
        instructions=Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass)),
        assembly=stages["ptx"],
    )


def _amd(stages: dict[str, Any], shared: int) -> Compiled:
    assembly = stages["amdgcn"]
    if not stages["hsaco"]:
        return Compiled(error="an empty hsaco")

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return Compiled(
        registers=number("vgpr_count"),
        spilled_bytes=4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        + number("private_segment_fixed_size"),
        shared_bytes=shared,
        instructions=Counter(re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|ds_\w+)", assembly, re.M)),
        assembly=assembly,
    )
