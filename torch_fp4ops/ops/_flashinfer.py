"""Everything that the FlashInfer adapters share: versions, capabilities, signatures, known defects, first-use work.

FlashInfer is imported when a call on a GPU that it has kernels for needs it, and not before: that takes seconds. Which
arguments and backend names the installed version has is read from its own signatures, so one adapter serves all
versions from ``OLDEST`` on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contracts import Call
from ..probe import Probed
from ..registry import Op

__all__ = ["DEFECTS", "OLDEST", "SIGNATURES", "Defect", "Kernel", "accepted", "adapter", "function", "why_not"]

OLDEST = (0, 6, 11)
"""The oldest version that the adapters support: the first with the SM90 interleaves."""


class Signature(NamedTuple):
    """A function's module, the arguments that an adapter forwards by keyword, and those that only newer versions have;
    ``since`` is the first version that has the function, None for all from OLDEST on."""

    module: str
    arguments: str
    newer: tuple[str, ...] = ()
    since: tuple[int, ...] | None = None


SIGNATURES = {
    "fp4_quantize": Signature(
        "flashinfer",
        "input global_scale sf_vec_size sf_use_ue8m0 is_sf_swizzled_layout is_sf_8x4_layout is_global_scale_inversed "
        "backend",
        newer=("nvfp4_4over6",),
    ),
    "silu_and_mul_nvfp4_quantize": Signature(
        "flashinfer",
        "input global_scale sf_vec_size is_sf_swizzled_layout is_sf_8x4_layout",
        newer=("nvfp4_4over6",),
        since=(0, 6, 16),
    ),
    "mxfp8_quantize": Signature("flashinfer", "input is_sf_swizzled_layout alignment backend sf_swizzle_layout"),
    "mm_fp4": Signature(
        "flashinfer", "a b a_descale b_descale alpha out_dtype block_size use_8x4_sf_layout use_nvfp4 backend"
    ),
    "mm_mxfp8": Signature("flashinfer", "a b a_descale b_descale out_dtype use_8x4_sf_layout backend"),
    "mm_bf16_fp4": Signature("flashinfer", "a b b_descale alpha out_dtype block_size backend", since=(0, 6, 14)),
    "prepare_bf16_fp4_weights": Signature("flashinfer", "b b_descale alpha block_size backend", since=(0, 6, 14)),
    "nvfp4_kv_quantize": Signature("flashinfer", "input global_scale"),
    "nvfp4_kv_dequantize": Signature("flashinfer", "fp4_data block_scales global_scale output_dtype"),
    "nvfp4_kv_dequantize_paged": Signature(
        "flashinfer",
        "paged_kv_cache kv_cache_sf block_tables seq_lens k_scale v_scale output_k output_v kv_layout",
        since=(0, 6, 15),
    ),
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": Signature(
        "flashinfer",
        "append_key append_value slot_mapping paged_kv_cache kv_cache_sf k_scale v_scale kv_layout",
        since=(0, 6, 15),
    ),
    "cutlass_fused_moe": Signature(
        "flashinfer.fused_moe",
        "input token_selected_experts token_final_scales fc1_expert_weights fc2_expert_weights output_dtype "
        "quant_scales fc1_expert_biases fc2_expert_biases input_sf swiglu_alpha swiglu_beta swiglu_limit tp_size "
        "tp_rank ep_size ep_rank use_w4_group_scaling use_mxfp8_act_scaling activation_type swizzled_input_sf",
        newer=("use_fused_finalize", "use_wfp4afp8_humming"),
    ),
}
"""What the adapters call. Tests hold it against the installed version and against OLDEST."""


@dataclass(frozen=True)
class Defect:
    """Something that a FlashInfer kernel is known to do wrong; a call that meets it is refused with these words."""

    function: str
    what: str
    evidence: str
    capabilities: tuple[int, ...] | None = None
    """As 90 for 9.0; None: all."""
    choices: tuple[str, ...] | None = None
    """FlashInfer's own backends that have it; None: all."""
    when: Callable[[Call], bool] = lambda call: True

    def __str__(self) -> str:
        return f"{self.what} ({self.evidence})"


_EMPTY_ON_SM90 = "the kernels' bodies are compiled for compute capability 10.0 and later only: 0.6.11 to 0.7.2.post1"
DEFECTS = (
    Defect(
        "fp4_quantize",
        "leaves its output unwritten",
        f"NVIDIA H200, 0.6.18.post1: every byte keeps its poison, no error; {_EMPTY_ON_SM90}",
        (90,),
    ),
    Defect(
        "mxfp8_quantize",
        "leaves its output unwritten",
        f"NVIDIA H200, 0.6.18.post1: every byte keeps its poison, no error; {_EMPTY_ON_SM90}",
        (90,),
    ),
    Defect(
        "fp4_quantize",
        "drops is_global_scale_inversed",
        "the cute-dsl path is not given it: 0.6.11 to 0.7.2.post1",
        None,
        ("cute-dsl",),
        lambda call: call.is_global_scale_inversed,
    ),
    Defect(
        "mm_mxfp8",
        "refuses or garbles small problems",
        "its own check wants n and k of 128 or more, as results may hold NaN otherwise: 0.6.11 to 0.7.2.post1",
        None,
        None,
        lambda call: call.b.shape[0] < 128 or call.b.shape[1] < 128,
    ),
)
"""Known defects, checked before a call. One that no check can catch: the W4A16 SM90 MoE faulted now and then (illegal
address, NVIDIA H200, 0.6.18.post1) with tactics 64x16x256 and 64x16x512 where K is no multiple of 256, never with the
default tactic. So no adapter chooses tactics."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """What one of FlashInfer's functions needs beside what a call looks like, in one of its own backends."""

    function: str
    capabilities: tuple[int, ...]
    """Compute capabilities with a kernel, as 100 for 10.0; FlashInfer's own list is asked too, where it has one."""
    choice: str | None = None
    """The value of FlashInfer's ``backend=``; None where it has no such argument."""
    packages: tuple[str, ...] = ()
    """Packages beside FlashInfer that it imports."""
    modules: Mapping[int, str] | str | None = None
    """Name of the CUDA extension that it loads, by capability where that differs; None: no extension."""
    at_run_time: str | None = None
    """What it builds anew in every process."""
    cubins: bool = False
    """Whether it loads cubins, which FlashInfer downloads unless the package flashinfer-cubin has them."""

    def why_not(self, call: Call) -> str | None:
        """Why this kernel can't run on the call's device, or has a known defect in this call."""
        reason = why_not(self, call.device.type, call.device.index)
        if reason is not None:
            return reason
        capability = capability_of(call.device)
        for defect in DEFECTS:
            if (
                defect.function == self.function
                and (defect.capabilities is None or capability in defect.capabilities)
                and (defect.choices is None or self.choice in defect.choices)
                and defect.when(call)
            ):
                return f"FlashInfer's {self.function} {defect}"
        return None

    def first_use(self, device: torch.device) -> str | None:
        """What the first call on the device has to build or fetch; None if all of it is there."""
        work = self._kernel_by_kernel()
        if work is not None:
            return work
        name = self.modules
        if isinstance(name, Mapping):
            name = name.get(capability_of(device))
        return None if name is None or _is_built(name) else f"compile FlashInfer's module {name}"

    def builds(self, call: Call) -> tuple[str, Hashable] | None:
        """What a call may have to build or fetch however often the kernel has run, and for what: of calls that are
        equal in this only the first one does. None if all calls share what the first one of all has built."""
        work = self._kernel_by_kernel()
        if work is None and self.choice == "auto":
            work = "build what FlashInfer chooses for it"  # a cuDNN graph, or a kernel with CuTe DSL
        return None if work is None else (work, (self, _metadata(call)))

    def _kernel_by_kernel(self) -> str | None:
        """What is built or fetched for one kernel after the other, as calls need them."""
        if self.at_run_time is not None:
            return self.at_run_time
        return "download FlashInfer's cubins" if self.cubins and not has_package("flashinfer_cubin") else None


Pick = Callable[[int, "Call | None"], str]
"""Which of an op's kernels its backend "flashinfer" is, by capability and, where that matters, call."""


def adapter(
    op: Op,
    kernels: Mapping[str, Kernel],
    unsupported: Callable[[Call, str], str | None],
    pick: Pick | None = None,
    *,
    exact: bool = True,
    tolerance: float = 0.02,
    part: Callable[[Call], str] | None = None,
    differing: float = 0.01,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated adapter as a backend for each kernel, and as "flashinfer" for the one that ``pick`` says.

    Args:
        op: the op.
        kernels: by backend name; with "flashinfer" among them if there is no ``pick``.
        unsupported: why the kernel of that name can't take a call that passed the checks here.
        pick: see :data:`Pick`.
        exact: whether quantised bytes equal the reference's.
        tolerance, part, differing: of the probe.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for name, kernel in kernels.items():
            trust = Probed(kernel.first_use, tolerance, part, differing, kernel.builds)
            op.backend(name, unsupported=_checks(kernel, name, unsupported), trust=trust, exact=exact)(run)
        if pick is not None:
            checks = {name: _checks(kernel, name, unsupported) for name, kernel in kernels.items()}

            def unsupported_by_picked(call: Call) -> str | None:
                reason = on_nvidia(call.device.type)
                return reason or checks[pick(capability_of(call.device), call)](call)

            def first_use(device: torch.device) -> str | None:
                return kernels[pick(capability_of(device), None)].first_use(device)

            def builds(call: Call) -> tuple[str, Hashable] | None:
                return kernels[pick(capability_of(call.device), call)].builds(call)

            trust = Probed(first_use, tolerance, part, differing, builds)
            op.backend("flashinfer", unsupported=unsupported_by_picked, trust=trust, exact=exact)(run)
        return run

    return register


def _checks(kernel: Kernel, name: str, unsupported: Callable[[Call, str], str | None]) -> Callable[[Call], str | None]:
    return lambda call: kernel.why_not(call) or unsupported(call, name)


def _metadata(call: Call) -> Hashable:
    """All that FlashInfer can choose a kernel by.

    What it compiles a kernel for is K, dtypes and layouts, for most products sizes that it tiles M and N by, for some
    M and N themselves; the quantisers have another kernel from some M on. That differs by version and GPU, so
    nothing of a call is left out but its data.
    """

    def of(given: Any) -> Hashable:
        if isinstance(given, Tensor):
            return given.dtype, given.shape
        return tuple(map(of, given)) if isinstance(given, list) else given

    return tuple(of(given) for name, given in call.__dict__.items() if name != "backend")


@functools.cache
def version() -> tuple[int, ...] | None:
    """The installed version's numbers, without importing it; None if it isn't installed."""
    try:
        text = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def on_nvidia(device_type: str) -> str | None:
    """Why FlashInfer can't run on that type of device."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "FlashInfer's kernels run on NVIDIA GPUs"
    return None


@functools.cache
def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def capability_of(device: torch.device) -> int:
    return _capability(device.index)


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def why_not(kernel: Kernel, device_type: str, index: int | None) -> str | None:
    """Why a kernel can't run on a device, whatever the call. The cheap questions come before the import."""
    reason = on_nvidia(device_type)
    if reason is not None:
        return reason
    capability = _capability(index)
    if capability not in kernel.capabilities:
        allowed = ", ".join(f"{c // 10}.{c % 10}" for c in kernel.capabilities)
        return f"FlashInfer's kernel is for compute capability {allowed}, not {capability // 10}.{capability % 10}"
    installed = version()
    if installed is None:
        return "FlashInfer is not installed"
    if installed < OLDEST:
        return f"FlashInfer {_dotted(installed)} is installed; {_dotted(OLDEST)} or later is needed"
    for package in kernel.packages:
        if not has_package(package):
            return f"FlashInfer needs the package {package!r} for it, which is not installed"
    try:
        run = function(kernel.function)
    except ImportError as error:
        return f"FlashInfer {_dotted(installed)} does not import, or has no {kernel.function}: {error}"
    allowed_choices = choices(kernel.function)
    if kernel.choice is not None and allowed_choices and kernel.choice not in allowed_choices:
        return f"FlashInfer {_dotted(installed)} has no backend {kernel.choice!r} of {kernel.function}"
    asks = getattr(run, "is_backend_supported", None)
    if asks is not None and kernel.choice not in (None, "auto") and not asks(kernel.choice, capability):
        return f"FlashInfer {_dotted(installed)} says that it has no such kernel for this GPU"
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """One of the functions in SIGNATURES. ImportError if this version has none of that name."""
    module = importlib.import_module(SIGNATURES[name].module)
    try:
        found: Callable[..., Any] = getattr(module, name)
    except AttributeError as error:
        since = SIGNATURES[name].since
        later = "" if since is None else f"; {_dotted(since)} and later have it"
        raise ImportError(f"no {name} in {module.__name__}{later}") from error
    return found


@functools.cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function(name)).parameters


def accepted(name: str, **optional: Any) -> dict[str, Any]:
    """Those of the arguments that the installed version's function has."""
    return {k: v for k, v in optional.items() if k in _parameters(name)}


@functools.cache
def choices(name: str) -> tuple[str, ...]:
    """The values that the function's ``backend`` is annotated with; empty if it isn't."""
    parameter = _parameters(name).get("backend")
    annotation = None if parameter is None else parameter.annotation
    return tuple(c for c in typing.get_args(annotation) if isinstance(c, str))


def _is_built(name: str) -> bool:
    from flashinfer.jit import env

    folders = [*getattr(env, "FLASHINFER_AOT_DIRS", [env.FLASHINFER_AOT_DIR]), env.FLASHINFER_JIT_DIR]
    return any((Path(folder) / name / f"{name}.so").exists() for folder in folders)
