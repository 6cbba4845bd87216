"""Weight layouts: bytes against index formulas in slow loops, inverses, batches and FlashInfer."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_fp4ops import weight_layouts
from torch_fp4ops.weight_layouts import GATE_UP_ORDERS, SM90_QUANT_TYPES

quick = settings(max_examples=60, deadline=None)
leads = st.sampled_from(((), (1,), (3,), (2, 2)))
tiles = st.sampled_from((16, 32, 64, 128, 192, 256))
seeds = st.integers(0, 2**31)


def random_bytes(shape: tuple[int, ...], seed: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def items(*tensors: torch.Tensor, ndim: int = 2):
    """The tensors' matching batch items, each item of `ndim` dimensions."""
    lead = tensors[0].shape[: tensors[0].dim() - ndim]
    for index in itertools.product(*map(range, lead)):
        yield [tensor[index] for tensor in tensors]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def is_fresh(result: torch.Tensor, source: torch.Tensor) -> bool:
    """Shares no memory; two empty tensors share none whatever their pointers say."""
    return not source.numel() or result.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


# --- nibbles ----------------------------------------------------------------------------------------


def test_swap_nibbles_of_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    swapped = weight_layouts.swap_nibbles(packed)
    assert swapped.flatten().tolist() == [(b % 16) * 16 + b // 16 for b in range(256)]
    assert torch.equal(weight_layouts.swap_nibbles(swapped), packed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float4_e2m1fn_x2])
def test_swap_nibbles_keeps_the_dtype(dtype):
    packed = random_bytes((4, 8), 0)
    swapped = weight_layouts.swap_nibbles(packed.view(dtype))
    assert swapped.dtype == dtype
    assert torch.equal(swapped.view(torch.uint8), weight_layouts.swap_nibbles(packed))


# --- trtllm-gen row shuffle -------------------------------------------------------------------------


def old_row(new_row: int, tile: int) -> int:
    block = 32 if tile % 128 == 0 else 16
    r = new_row % block
    return new_row - r + (block // 8) * (r % 8) + r // 8


@quick
@given(leads, st.integers(0, 4), st.integers(1, 5), tiles, seeds)
def test_shuffle_matrix_a(lead, blocks, cols, tile, seed):
    weight = random_bytes((*lead, 32 * blocks, cols), seed)
    shuffled = weight_layouts.shuffle_matrix_a(weight, tile)
    assert shuffled.is_contiguous() and is_fresh(shuffled, weight)
    for new, old in items(shuffled, weight):
        expected = [old[old_row(r, tile)] for r in range(32 * blocks)]
        assert torch.equal(new, torch.stack(expected) if expected else old)
    assert same_bits(weight_layouts.unshuffle_matrix_a(shuffled, tile), weight)
    assert same_bits(weight_layouts.shuffle_matrix_a(weight_layouts.unshuffle_matrix_a(weight, tile), tile), weight)


def test_shuffle_matrix_a_takes_half_a_block_for_small_tiles():
    weight = random_bytes((48, 3), 0)
    assert not torch.equal(weight_layouts.shuffle_matrix_a(weight, 64), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2])
def test_shuffle_matrix_a_keeps_the_dtype(dtype):
    weight = random_bytes((32, 8), 0).view(dtype)
    shuffled = weight_layouts.shuffle_matrix_a(weight)
    assert shuffled.dtype == dtype
    expected = torch.stack([weight.view(torch.uint8)[old_row(r, 128)] for r in range(32)])
    assert torch.equal(shuffled.view(torch.uint8), expected)


@quick
@given(leads, st.integers(0, 2), st.integers(1, 6), tiles, seeds)
def test_shuffle_matrix_sf_a(lead, blocks, cols, tile, seed):
    rows, col_tiles = 128 * blocks, (cols + 3) // 4
    scales = random_bytes((*lead, rows, cols), seed, low=1)
    shuffled = weight_layouts.shuffle_matrix_sf_a(scales, tile)
    assert shuffled.shape == (*lead, rows * col_tiles * 4)
    for [flat], [linear] in zip(items(shuffled, ndim=1), items(scales), strict=True):
        expected, values = [0] * (rows * col_tiles * 4), linear.tolist()
        for r, k in itertools.product(range(rows), range(cols)):
            position = ((r // 128) * col_tiles + k // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + k % 4
            expected[position] = values[old_row(r, tile)][k]
        assert flat.tolist() == expected
    assert same_bits(weight_layouts.unshuffle_matrix_sf_a(shuffled, rows, cols, tile), scales)
    matrix = shuffled.unflatten(-1, (rows, col_tiles * 4))
    assert same_bits(weight_layouts.unshuffle_matrix_sf_a(matrix, rows, cols, tile), scales)


@quick
@given(st.integers(1, 2), st.integers(1, 2), tiles, seeds)
def test_shuffle_matrix_sf_a_inverts_its_inverse(blocks, col_tiles, tile, seed):
    flat = random_bytes((blocks * 128 * col_tiles * 4,), seed)
    linear = weight_layouts.unshuffle_matrix_sf_a(flat, blocks * 128, col_tiles * 4, tile)
    assert same_bits(weight_layouts.shuffle_matrix_sf_a(linear, tile), flat)


# --- gate/up row orders -----------------------------------------------------------------------------


def labelled(order: str, pairs: int) -> list[int]:
    """Row labels of a projection stored in `order`: i for row i of up, 1000 + i for row i of gate."""
    up, gate = list(range(pairs)), [1000 + i for i in range(pairs)]
    return {
        "up_gate": up + gate,
        "gate_up": gate + up,
        "alternating_gate_up": [label for i in range(pairs) for label in (gate[i], up[i])],
        "alternating_up_gate": [label for i in range(pairs) for label in (up[i], gate[i])],
    }[order]


@pytest.mark.parametrize("source", GATE_UP_ORDERS)
@pytest.mark.parametrize("target", GATE_UP_ORDERS)
@pytest.mark.parametrize("pairs", [0, 1, 2, 5])
def test_reorder_gate_up(source, target, pairs):
    before, after = (torch.tensor(labelled(order, pairs)) for order in (source, target))
    reorder = weight_layouts.reorder_gate_up
    assert same_bits(reorder(before, source, target, dim=-1), after)
    assert same_bits(reorder(after, target, source, dim=0), before)
    payload = before[None, :, None] * 10 + torch.arange(6).reshape(2, 1, 3)  # [experts, rows, cols]
    assert same_bits(reorder(payload, source, target), after[None, :, None] * 10 + torch.arange(6).reshape(2, 1, 3))


@quick
@given(
    st.sampled_from(GATE_UP_ORDERS),
    st.sampled_from(GATE_UP_ORDERS),
    st.sampled_from((torch.uint8, torch.bfloat16, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)),
    st.integers(1, 6),
    st.sampled_from((0, 1, 2, -1, -2, -3)),
    seeds,
)
def test_reorder_gate_up_is_a_bijection_in_any_dimension(source, target, dtype, pairs, dim, seed):
    shape = [4, 6, 8]
    shape[dim] = 2 * pairs * (2 if dim in (2, -1) else 1)  # the last one counts bytes, bf16 needs two
    x = random_bytes(tuple(shape), seed).view(dtype)
    result = weight_layouts.reorder_gate_up(x, source, target, dim)
    assert result.is_contiguous() and is_fresh(result, x)
    assert same_bits(weight_layouts.reorder_gate_up(result, target, source, dim), x)


def test_reorder_gate_up_is_contiguous_for_a_channels_last_input():
    x = random_bytes((2, 4, 6, 8), 0).contiguous(memory_format=torch.channels_last)
    result = weight_layouts.reorder_gate_up(x, "gate_up", "up_gate")
    assert result.is_contiguous()
    assert torch.equal(result, torch.cat((x[:, :, 3:], x[:, :, :3]), 2))


def test_gpt_oss_rows_to_cutlass_fused_moe():
    rows = random_bytes((2, 10, 4), 0)
    bias = torch.randn(2, 10, dtype=torch.bfloat16)
    ordered = weight_layouts.reorder_gate_up(rows, "alternating_gate_up", "up_gate")
    ordered_bias = weight_layouts.reorder_gate_up(bias, "alternating_gate_up", "up_gate", dim=-1)
    assert torch.equal(ordered, torch.cat((rows[:, 1::2], rows[:, 0::2]), 1))
    assert torch.equal(ordered_bias, torch.cat((bias[:, 1::2], bias[:, 0::2]), 1))


# --- SM90 mixed-input MoE GEMM: weights -------------------------------------------------------------

# For each byte of a word: where bits 0, 1, 2 (magnitude) and 3 (sign) of its low nibble go.
FP4_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14))
FP4_FP8_SIGNS = {3: 7, 7: 15, 11: 23, 15: 31, 19: 3, 23: 11, 27: 19, 31: 27}


def move_fp4_bits(word: int) -> int:
    moved = 0
    for byte, (nibble, bit) in itertools.product(range(4), itertools.product(range(2), range(4))):
        if word >> (8 * byte + 4 * nibble + bit) & 1:
            moved |= 1 << (FP4_BITS[byte][bit] + 16 * nibble)
    return moved


def move_fp4_fp8_signs(word: int) -> int:
    moved = word & 0x77777777
    for source, target in FP4_FP8_SIGNS.items():
        moved |= (word >> source & 1) << target
    return moved


MOVE_BITS: dict[str, Callable[[int], int]] = {
    "fp4": move_fp4_bits,
    "int4": lambda word: word,
    "fp4_fp8": move_fp4_fp8_signs,
}


def slow_interleave_weights(weight: torch.Tensor, quant_type: str) -> torch.Tensor:
    rows, cols = weight.shape
    w, out = weight.tolist(), [[0] * cols for _ in range(rows)]
    for n, k, r in itertools.product(range(0, rows, 16), range(0, cols, 32), range(8)):
        top, bottom = w[n + r][k : k + 32], w[n + r + 8][k : k + 32]
        for lane in range(16):
            if quant_type == "fp4":
                mma, column = lane // 4, 8 * (lane // 4) + lane % 4
                word = [top[column], bottom[column], top[column + 4], bottom[column + 4]]
                row, start = n + r + 8 * (mma % 2), 16 * (mma // 2) + 4 * (lane % 4)
            else:
                word = [*top[2 * lane : 2 * lane + 2], *bottom[2 * lane : 2 * lane + 2]]
                row, start = n + r + 8 * ((lane % 8) // 4), 2 * ((lane // 8) * 8 + (lane % 4) * 2)
            value = int.from_bytes(bytes(word), "little")
            out[row][k + start : k + start + 4] = MOVE_BITS[quant_type](value).to_bytes(4, "little")
    return torch.tensor(out, dtype=torch.uint8).reshape(rows, cols)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SM90_QUANT_TYPES), st.integers(1, 3), st.integers(1, 3), st.sampled_from(((), (2,))), seeds)
def test_sm90_weights(quant_type, row_tiles, col_tiles, lead, seed):
    weight = random_bytes((*lead, 16 * row_tiles, 32 * col_tiles), seed)
    out = weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(weight, quant_type)
    assert out.is_contiguous() and is_fresh(out, weight)
    for new, old in items(out, weight):
        assert torch.equal(new, slow_interleave_weights(old, quant_type))


@quick
@given(st.sampled_from(SM90_QUANT_TYPES), st.integers(0, 3), st.integers(0, 3), leads, seeds)
def test_sm90_weights_are_a_bijection(quant_type, row_tiles, col_tiles, lead, seed):
    weight = random_bytes((*lead, 16 * row_tiles, 32 * col_tiles), seed)
    forward = weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm
    backward = weight_layouts.deinterleave_moe_weights_for_sm90_mixed_gemm
    assert same_bits(backward(forward(weight, quant_type), quant_type), weight)
    assert same_bits(forward(backward(weight, quant_type), quant_type), weight)


def test_sm90_fp4_words_decode_to_bf16_by_shifts():
    """The purpose of the bit order: each code at bits 15 and 8:6 of a BF16 pattern, 2^126 below its value."""
    decode = (
        lambda h: h & 0x81C0,
        lambda h: (h << 3) & 0x81C0,
        lambda h: (h << 6) & 0x81C0,
        lambda h: ((h << 1) & 0x8000) | ((h >> 3) & 0x0180) | ((h >> 7) & 0x0040),
    )
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    weight = random_bytes((16, 32), 0)
    out = weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(weight).tolist()
    for r, lane, byte, nibble in itertools.product(range(8), range(4), range(4), range(2)):
        half = int.from_bytes(bytes(out[r][4 * lane + 2 * nibble : 4 * lane + 2 * nibble + 2]), "little")
        pattern = decode[byte](half)
        value = torch.tensor([pattern << 16], dtype=torch.int64).to(torch.int32).view(torch.float32) * 2.0**126
        code = int(weight[r + 8 * (byte % 2), lane + 4 * (byte // 2)]) >> (4 * nibble) & 15
        assert value.item() == magnitudes[code % 8] * (-1) ** (code // 8)


@pytest.mark.parametrize("quant_type", SM90_QUANT_TYPES)
def test_sm90_weights_take_strided_int8(quant_type):
    weight = random_bytes((32, 16), 3)
    strided = weight.t().view(torch.int8)
    out = weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm(strided, quant_type)
    assert out.dtype == torch.int8 and out.is_contiguous()
    assert torch.equal(out.view(torch.uint8), slow_interleave_weights(weight.t(), quant_type))


# --- SM90 mixed-input MoE GEMM: scales --------------------------------------------------------------

# The first two are in use; (uint8, 8) folds nothing.
SCALE_FORMS = (
    (torch.uint8, 32),
    (torch.bfloat16, 128),
    (torch.float8_e8m0fnu, 32),
    (torch.uint8, 128),
    (torch.uint8, 8),
)


def random_scales(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return random_bytes((*shape[:-1], shape[-1] * dtype.itemsize), seed).view(dtype)


@quick
@given(st.sampled_from(SCALE_FORMS), leads, st.integers(1, 2), st.integers(1, 3), seeds)
def test_sm90_scales(form, lead, row_blocks, k_blocks, seed):
    dtype, group_size = form
    groups, cols = 128 // group_size, 16 // dtype.itemsize
    folded = 64 * groups // cols
    scales = random_scales(dtype, (*lead, 64 * row_blocks, groups * k_blocks), seed)
    out = weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size)
    assert out.dtype == dtype and out.shape == (*lead, row_blocks, k_blocks, folded, cols)
    assert out.is_contiguous() and is_fresh(out, scales)
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    for index in itertools.product(*map(range, lead)):
        new, old = out.view(bits)[index].tolist(), scales.view(bits)[index].tolist()
        for r, g in itertools.product(range(64 * row_blocks), range(groups * k_blocks)):
            column = (r % 64) // folded * groups + g % groups
            assert new[r // 64][g // groups][r % folded][column] == old[r][g]
    assert same_bits(weight_layouts.deinterleave_moe_scales_for_sm90_mixed_gemm(out, group_size), scales)


def test_sm90_scales_are_fresh_where_nothing_moves():
    scales = random_bytes((64, 16), 0)
    out = weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(scales, 8)
    assert torch.equal(out.reshape(64, 16), scales) and is_fresh(out, scales)
    assert is_fresh(weight_layouts.deinterleave_moe_scales_for_sm90_mixed_gemm(out, 8), out)


@quick
@given(st.sampled_from(SCALE_FORMS), leads, st.integers(0, 2), st.integers(0, 3), seeds)
def test_sm90_scales_invert_their_inverse(form, lead, row_blocks, k_blocks, seed):
    dtype, group_size = form
    cols = 16 // dtype.itemsize
    folded = 64 * (128 // group_size) // cols
    out = random_scales(dtype, (*lead, row_blocks, k_blocks, folded, cols), seed)
    scales = weight_layouts.deinterleave_moe_scales_for_sm90_mixed_gemm(out, group_size)
    assert scales.shape == (*lead, row_blocks * 64, k_blocks * (128 // group_size))
    assert same_bits(weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size), out)


# --- FlashInfer's helpers that run on CPU -----------------------------------------------------------


@pytest.mark.parametrize("tile", [64, 128])
def test_row_shuffles_are_flashinfers(tile):
    pytest.importorskip("flashinfer")
    from flashinfer import shuffle_matrix_a
    from flashinfer.utils import get_shuffle_matrix_sf_a_row_indices

    weight = random_bytes((256, 12), tile)
    assert torch.equal(weight_layouts.shuffle_matrix_a(weight, tile), shuffle_matrix_a(weight, tile))
    flat = weight_layouts.shuffle_matrix_sf_a(weight, tile)
    swizzled = flat.reshape(2, 3, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(256, 12)
    assert torch.equal(swizzled, weight[get_shuffle_matrix_sf_a_row_indices(weight, tile)])


def test_alternating_up_gate_is_flashinfers():
    pytest.importorskip("flashinfer")
    from flashinfer.fused_moe import reorder_rows_for_gated_act_gemm

    weight = random_bytes((64, 5), 0)
    ours = weight_layouts.reorder_gate_up(weight, "up_gate", "alternating_up_gate")
    assert torch.equal(ours, reorder_rows_for_gated_act_gemm(weight))


@pytest.mark.parametrize(("dtype", "group_size"), SCALE_FORMS)
def test_sm90_scales_are_flashinfers(dtype, group_size):
    fused_moe = pytest.importorskip("flashinfer.fused_moe")
    scales = random_scales(dtype, (2, 128, 32), 0)
    ours = weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size)
    assert same_bits(ours, fused_moe.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size))
