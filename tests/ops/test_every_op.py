"""What holds for every op, every backend and every sample."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_fp4ops import OPS
from torch_fp4ops.codecs import as_bytes
from torch_fp4ops.registry import Op
from torch_fp4ops.testing import Sample, assert_right, assert_same_bytes, comparable, samples

CASES = [pytest.param(name, i, id=f"{name}-{s}") for name in OPS for i, s in enumerate(samples(OPS[name]))]


@functools.cache
def cached_samples(name: str) -> list[Sample]:
    return samples(OPS[name])


def tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def is_fp8(t: Tensor) -> bool:
    return t.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "i"), CASES)
def test_opcheck(name, i):
    sample = cached_samples(name)[i]
    checks = ["test_autograd_registration", "test_faketensor"]
    # opcheck's schema test multiplies its inputs and outputs, which float8 can't.
    if not any(map(is_fp8, tensors((sample.args, sample.kwargs)))):
        checks.append("test_schema")
    # Its comparison takes NaN for a difference.
    out = OPS[name](*sample.clone().args, **sample.kwargs)
    if not any(t.float().isnan().any() for t in tensors(out)):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS[name].default, sample.args, sample.kwargs, test_utils=tuple(checks))


@pytest.mark.parametrize(("name", "i"), CASES)
def test_outputs_are_fresh_contiguous_and_as_promised(name, i):
    op, sample = OPS[name], cached_samples(name)[i].clone()
    before = sample.clone()
    out = tensors(op.default(*sample.args, **sample.kwargs))
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, (sample.args, sample.kwargs))
        promised = tensors(op.default(*fake[0], **fake[1]))
    assert len(out) == len(promised)
    storages = {t.untyped_storage().data_ptr() for t in tensors((sample.args, sample.kwargs)) if t.numel()}
    for real, said in zip(out, promised, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (said.shape, said.dtype, said.stride())
        assert real.is_contiguous()
        assert real.untyped_storage().data_ptr() not in storages
        assert real.numel() == 0 or real.untyped_storage().nbytes() == real.nbytes
    written = [a.name for a in op.default._schema.arguments if a.is_write]
    for argument, old, new in zip(op.default._schema.arguments, before.args, sample.args, strict=False):
        for o, n in zip(tensors(old), tensors(new), strict=True):
            if argument.name not in written:
                assert_same_bytes(n, o, argument.name)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    """It is for the types of torch's own products, not for those that an op is made of."""
    op = OPS[name]
    for sample in cached_samples(name)[:4]:
        cast, wanted = sample.clone(), sample.clone()
        with torch.autocast("cpu", dtype=dtype):
            out = op(*cast.args, **cast.kwargs)
            assert torch.is_autocast_enabled("cpu")
        pairs = zip(tensors((out, cast.args)), tensors((op(*wanted.args, **wanted.kwargs), wanted.args)), strict=True)
        for given, expected in pairs:
            assert_same_bytes(given, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_torch_defaults_change_nothing(name, dtype, default_dtype):
    op = OPS[name]
    for sample in cached_samples(name):
        given, wanted = sample.clone(), sample.clone()
        expected = op(*wanted.args, **wanted.kwargs)
        default_dtype(dtype)
        with torch.device("meta"):
            out = op(*given.args, **given.kwargs)
            again = samples(op)
        default_dtype(torch.float32)
        for got, right in zip(tensors((out, given.args)), tensors((expected, wanted.args)), strict=True):
            assert_same_bytes(got, right)
    for got, right in zip(tensors([s.args for s in again]), tensors([s.args for s in samples(op)]), strict=True):
        assert_same_bytes(got, right)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_backend_that_can_take_the_sample_is_right(name, i):
    _check_backends(OPS[name], cached_samples(name)[i])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_backend_that_can_take_the_sample_is_right_on_the_gpu(name, i):
    _check_backends(OPS[name], cached_samples(name)[i].map_tensors(lambda t: t.cuda()))


def _check_backends(op: Op, sample: Sample) -> None:
    call = op.check(*sample.args, **sample.kwargs)
    able = [b for b in op.backend_names() if op.why_not(b, call, launch=True) is None and comparable(op, sample, b)]
    assert "reference" in able
    for backend in able:
        assert_right(op, sample, backend)


@pytest.mark.parametrize("name", OPS)
def test_docstring_is_complete(name):
    op = OPS[name]
    for section in ("Args:", "Raises:", "Source:"):
        assert section in op.__doc__
    for argument in op.signature.parameters:
        assert argument in op.__doc__, f"{argument} is not documented"


@pytest.mark.parametrize("name", OPS)
def test_unknown_backend_is_refused(name):
    sample = cached_samples(name)[-1]
    with pytest.raises(ValueError, match=rf"torch.ops.fp4.{name}: backend is 'fast'.*allowed: 'auto', 'reference'"):
        OPS[name].default(*sample.args, **sample.kwargs, backend="fast")


@pytest.mark.parametrize("name", OPS)
def test_none_for_a_tensor_is_refused(name):
    op, sample = OPS[name], cached_samples(name)[-1]
    required = [i for i, a in enumerate(op.default._schema.arguments) if str(a.type) == "Tensor"]
    assert required
    for i in required:
        args = (*sample.args[:i], None, *sample.args[i + 1 :])
        message = rf"fp4.{name}: {op.default._schema.arguments[i].name} is None; allowed: a tensor"
        with pytest.raises(ValueError, match=message):
            op.default(*args, **sample.kwargs)
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
            fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, sample.kwargs))
            op.default(*fake_args, **fake_kwargs)


E2M1, E4M3, E8M0 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu
CACHES = {"k_cache": E2M1, "v_cache": E2M1, "k_cache_sf": None, "v_cache_sf": None}
# By op, its arguments of bytes: their native dtype, or None for scales, where that depends on the call.
BYTES = {
    "mm_fp4": {"a": E2M1, "b": E2M1, "a_descale": None, "b_descale": None},
    "mm_bf16_fp4": {"b": E2M1, "b_descale": None},
    "mm_mxfp8": {"a_descale": None, "b_descale": None},
    "fp4_dequantize": {"input": E2M1, "scale": None},
    "mxfp8_dequantize": {"scale_tensor": None},
    "nvfp4_kv_dequantize": {"fp4_data": E2M1, "block_scales": None},
    "nvfp4_kv_quantize_store": CACHES,
    "nvfp4_kv_dequantize_paged": CACHES,
    "fp4_kv_attention_decode": CACHES,
    "cutlass_fused_moe": {"quant_scales": None, "input_sf": None},
}


def dtype_of_scales(name: str, given: dict[str, Any]) -> torch.dtype:
    if name == "cutlass_fused_moe":
        nvfp4 = len(given["quant_scales"]) == (4 if given.get("use_w4_group_scaling") else 6)
    else:
        nvfp4 = "mx" not in name and given.get("block_size") != 32 and not given.get("sf_use_ue8m0")
    return E4M3 if nvfp4 else E8M0


@pytest.mark.parametrize(("name", "i"), [case for case in CASES if case.values[0] in BYTES])
def test_native_dtypes_of_bytes_are_those_of_the_format(name, i):
    """``torch_fp4ops.<op>`` reads their bytes, and refuses those of another format."""
    op, sample = OPS[name], cached_samples(name)[i]
    names = [a.name for a in op.default._schema.arguments]
    given = dict(zip(names, sample.args, strict=False)) | sample.kwargs

    def arguments() -> dict[str, Any]:
        return Sample(name, (), given).clone().kwargs

    expected = arguments()
    wanted = op.default(**expected)
    for argument in BYTES[name].keys() & given.keys():
        right = BYTES[name][argument] or dtype_of_scales(name, given)
        whole = not isinstance(given[argument], (list, tuple))
        places = [argument] if whole else range(len(given[argument]))
        for place, dtype in itertools.product(places, (E2M1, E4M3, E8M0)):
            changed = arguments()
            holder = changed if whole else changed[argument]
            if holder[place] is None or holder[place].dtype != torch.uint8:
                continue
            holder[place] = holder[place].view(dtype)
            if dtype == right:
                out = op(**changed)
                for a, b in zip(tensors((out, changed)), tensors((wanted, expected)), strict=True):
                    assert_same_bytes(as_bytes(a), as_bytes(b))
            else:
                which = argument if whole else rf"{argument}\[{place}\]"
                message = rf"fp4.{name}: {which} is {dtype}; allowed: torch.uint8 or {right}$"
                with pytest.raises(ValueError, match=message):
                    op(**changed)


def test_arguments_of_bytes_are_known():
    assert {name: set(op._byte_arguments) for name, op in OPS.items() if op._byte_arguments} == {
        name: set(arguments) for name, arguments in BYTES.items()
    }


@pytest.mark.parametrize("name", OPS)
def test_mixed_devices_are_refused(name):
    sample = cached_samples(name)[-1]
    op = OPS[name]
    for position, (argument, given) in enumerate(zip(op.default._schema.arguments, sample.args, strict=False)):
        if position == 0 or not tensors(given):
            continue
        moved = tree_map_only(Tensor, lambda t: t.to("meta"), given)
        args = (*sample.args[:position], moved, *sample.args[position + 1 :])
        with pytest.raises(ValueError, match=rf"fp4.{name}: {argument.name} is meta; allowed: cpu, where"):
            op.default(*args, **sample.kwargs)


@pytest.mark.parametrize("name", OPS)
def test_autograd_raises_instead_of_zero_gradients(name):
    """A floating-point input that requires grad: an error at once from ops with integer outputs, else in backward."""
    op = OPS[name]
    if any(a.is_write for a in op.default._schema.arguments):
        pytest.skip("writes into integer caches: nothing could be differentiated")
    sample = next(s for s in cached_samples(name) if tensors(s.args)[0].numel())
    leaves = []

    def require_grad(t: Tensor) -> Tensor:
        if not t.dtype.is_floating_point or is_fp8(t):
            return t
        leaves.append(t.clone().requires_grad_())
        return leaves[-1]

    sample = sample.map_tensors(require_grad)
    if not leaves:
        pytest.skip("no input can require grad")
    with pytest.raises(NotImplementedError, match=f"torch.ops.fp4.{name} .*no_grad"):
        outputs = tensors(op.default(*sample.args, **sample.kwargs))
        sum(t.float().sum() for t in outputs if t.requires_grad).backward()
    assert all(t.grad is None for t in leaves)
