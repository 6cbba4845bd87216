"""Weight layouts: what each function refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from torch_fp4ops import weight_layouts


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_swap_nibbles_rejects_wide_dtype():
    with pytest.raises(ValueError, match=r"packed must have a 1-byte dtype, got torch.int32"):
        weight_layouts.swap_nibbles(zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("call", [weight_layouts.shuffle_matrix_a, weight_layouts.unshuffle_matrix_a])
class TestShuffleRejections:
    @pytest.mark.parametrize(("rows", "tile", "block"), [(48, 128, 32), (24, 64, 16)])
    def test_rows(self, call, rows, tile, block):
        with pytest.raises(ValueError, match=rf"rows must be a multiple of {block}, got {rows}"):
            call(zeros(rows, 4), tile)

    def test_vector(self, call):
        with pytest.raises(ValueError, match=r"must have at least 2 dimensions, got shape \(32,\)"):
            call(zeros(32))

    def test_tile(self, call):
        with pytest.raises(ValueError, match=r"epilogue_tile_m must be at least 1, got 0"):
            call(zeros(32, 4), 0)


def test_shuffle_matrix_sf_a_rejects_rows():
    with pytest.raises(ValueError, match=r"input_tensor: rows must be a multiple of 128, got 64"):
        weight_layouts.shuffle_matrix_sf_a(zeros(64, 4))


def test_shuffle_matrix_sf_a_rejects_wide_dtype():
    with pytest.raises(ValueError, match=r"input_tensor must have a 1-byte dtype, got torch.float32"):
        weight_layouts.shuffle_matrix_sf_a(zeros(128, 4, dtype=torch.float32))


def test_shuffle_matrix_sf_a_rejects_tile():
    with pytest.raises(ValueError, match=r"epilogue_tile_m must be at least 1, got -128"):
        weight_layouts.shuffle_matrix_sf_a(zeros(128, 4), -128)


def test_unshuffle_matrix_sf_a_rejects_rows():
    with pytest.raises(ValueError, match=r"rows must be a multiple of 128, got 64"):
        weight_layouts.unshuffle_matrix_sf_a(zeros(512), 64, 4)


def test_unshuffle_matrix_sf_a_rejects_size():
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 128, 8\] or, flat, \[\.\.\., 1024\].*got shape \(640,\)"):
        weight_layouts.unshuffle_matrix_sf_a(zeros(640), 128, 5)


def test_unshuffle_matrix_sf_a_rejects_tile():
    with pytest.raises(ValueError, match=r"epilogue_tile_m must be at least 1, got 0"):
        weight_layouts.unshuffle_matrix_sf_a(zeros(512), 128, 4, 0)


def test_reorder_gate_up_rejects_source():
    with pytest.raises(ValueError, match=r"source must be one of .*'up_gate'.*, got 'w3_w1'"):
        weight_layouts.reorder_gate_up(zeros(4, 2), "w3_w1", "up_gate")


def test_reorder_gate_up_rejects_target():
    with pytest.raises(ValueError, match=r"target must be one of .*'up_gate'.*, got 'w3_w1'"):
        weight_layouts.reorder_gate_up(zeros(4, 2), "up_gate", "w3_w1")


@pytest.mark.parametrize("dim", [2, -3])
def test_reorder_gate_up_rejects_dim(dim):
    with pytest.raises(ValueError, match=rf"dim must be a dimension of x, got dim={dim} for shape \(4, 2\)"):
        weight_layouts.reorder_gate_up(zeros(4, 2), "up_gate", "gate_up", dim)


def test_reorder_gate_up_rejects_odd_rows():
    with pytest.raises(ValueError, match=r"x: rows must be a multiple of 2, got 5"):
        weight_layouts.reorder_gate_up(zeros(5, 2), "up_gate", "gate_up")


@pytest.mark.parametrize(
    "call",
    [
        weight_layouts.interleave_moe_weights_for_sm90_mixed_gemm,
        weight_layouts.deinterleave_moe_weights_for_sm90_mixed_gemm,
    ],
)
class TestSm90WeightRejections:
    def test_quant_type(self, call):
        with pytest.raises(ValueError, match=r"quant_type must be one of \('fp4', 'int4', 'fp4_fp8'\), got 'fp8'"):
            call(zeros(1, 16, 32), "fp8")

    def test_dtype(self, call):
        with pytest.raises(ValueError, match=r"weight must have a 1-byte dtype, got torch.int64"):
            call(zeros(1, 16, 32, dtype=torch.int64))

    def test_vector(self, call):
        with pytest.raises(ValueError, match=r"weight must have at least 2 dimensions, got shape \(32,\)"):
            call(zeros(32))

    def test_rows(self, call):
        with pytest.raises(ValueError, match=r"weight: rows must be a multiple of 16, got 24"):
            call(zeros(1, 24, 32))

    def test_columns(self, call):
        with pytest.raises(ValueError, match=r"weight: columns .* must be a multiple of 32, got 48"):
            call(zeros(1, 16, 48))


@pytest.mark.parametrize("group_size", [0, -32, 48, 256])
@pytest.mark.parametrize(
    "call",
    [
        weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm,
        weight_layouts.deinterleave_moe_scales_for_sm90_mixed_gemm,
    ],
)
def test_sm90_scales_reject_group_size(call, group_size):
    with pytest.raises(ValueError, match=rf"group_size must be positive and divide 128, got {group_size}"):
        call(zeros(1, 1, 64, 16), group_size)


def test_sm90_scales_reject_groups_that_do_not_fit_16_bytes():
    with pytest.raises(ValueError, match=r"group_size must be at least 16 for scales of torch.bfloat16, got 8"):
        weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(zeros(1, 64, 16, dtype=torch.bfloat16), 8)


def test_sm90_scales_reject_rows():
    with pytest.raises(ValueError, match=r"scales: rows must be a multiple of 64, got 32"):
        weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(zeros(1, 32, 4))


def test_sm90_scales_reject_columns():
    with pytest.raises(ValueError, match=r"scales: columns must be a multiple of 4, got 6"):
        weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(zeros(1, 64, 6))


def test_sm90_scales_reject_a_vector():
    with pytest.raises(ValueError, match=r"scales must have at least 2 dimensions, got shape \(64,\)"):
        weight_layouts.interleave_moe_scales_for_sm90_mixed_gemm(zeros(64))


@pytest.mark.parametrize("shape", [(1, 1, 16, 4), (16, 16), (1, 64, 4)])
def test_sm90_scales_reject_unfolded_shape(shape):
    with pytest.raises(ValueError, match=r"scales must be \[.*, 16, 16\] for torch.uint8 and group_size=32"):
        weight_layouts.deinterleave_moe_scales_for_sm90_mixed_gemm(zeros(*shape))
