"""The layout "hopper": bytes against its formulas in slow loops, its inverse, and blocks that have several forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_fp4ops.block_quantization import dequantize_blocks, quantize_mx, quantize_nvfp4
from torch_fp4ops.codecs import unpack_e2m1
from torch_fp4ops.formats import FORMATS, MXFP4, MXFP8, NVFP4, BlockFormat
from torch_fp4ops.testing import assert_same_bytes
from torch_fp4ops.testing.samples import values
from torch_fp4ops.weight_layouts import hopper_size, pack_hopper_weight, unpack_hopper_weight

formats = st.sampled_from(list(FORMATS.values()))
few = settings(max_examples=25, deadline=None)
EVERY_FORMAT = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
STORED = {"nvfp4": (1, 126), "mxfp4": (0, 128), "mxfp8": (3, 134)}
ONE = {"nvfp4": 0x38, "mxfp4": 127, "mxfp8": 127}


def random_weight(n: int, k: int, fmt: BlockFormat, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every code that is a number, and every scale that is stored as it is."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // fmt.elements_per_byte), generator=generator).to(torch.uint8)
    if fmt is MXFP8:
        codes = torch.where((codes & 0x7F) == 0x7F, 0x38, codes).to(torch.uint8)
    low, high = STORED[fmt.name]
    scales = torch.randint(low, high + 1, (n, k // fmt.block_size), generator=generator)
    return codes, scales.to(torch.uint8)


def cropped(weight: Tensor, scale: Tensor, fmt: BlockFormat, n: int, k: int) -> tuple[Tensor, Tensor]:
    codes, scales = unpack_hopper_weight(weight, scale, fmt)
    columns, blocks = k // fmt.elements_per_byte, k // fmt.block_size
    assert not codes[n:].any() and not codes[:, columns:].any()
    assert not scales[n:].any() and not scales[:, blocks:].any()
    fresh = torch.contiguous_format  # for one row, contiguous() would keep its strides
    return codes[:n, :columns].clone(memory_format=fresh), scales[:n, :blocks].clone(memory_format=fresh)


@few
@given(formats, st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**31))
def test_the_inverse_gives_the_same_bytes(fmt, n, blocks, seed):
    k = blocks * fmt.block_size
    codes, scales = random_weight(n, k, fmt, seed)
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    rows, columns = hopper_size(n, k)
    assert (rows % 128, columns % 256) == (0, 0) and rows - n < 128 and columns - k < 256
    assert weight.shape == (rows, columns // fmt.elements_per_byte) and scale.shape == (rows, columns // fmt.block_size)
    assert weight.dtype == scale.dtype == torch.uint8 and weight.is_contiguous() and scale.is_contiguous()
    for got, wanted in zip(cropped(weight, scale, fmt, n, k), (codes, scales), strict=True):
        assert_same_bytes(got, wanted)


def bit_of(stored: bytes, word: int, bit: int) -> int:
    return stored[4 * word + bit // 8] >> bit % 8 & 1


@EVERY_FORMAT
def test_bits_lie_where_the_layout_says(fmt):
    n, k = 256, 512
    codes, scales = random_weight(n, k, fmt)
    weight, scale = (t.flatten().tolist() for t in pack_hopper_weight(codes, scales, fmt))
    elements = (codes if fmt is MXFP8 else unpack_e2m1(codes)).tolist()
    # By (k3, n3), of words of even and of odd i; 32 and more is in the odd one.
    fp4 = {
        (0, 0): ((15, 8, 7, 6), (47, 40, 39, 38)),
        (1, 0): ((21, 14, 13, 12), (53, 46, 45, 44)),
        (0, 1): ((9, 2, 1, 0), (41, 34, 33, 32)),
        (1, 1): ((19, 42, 11, 10), (43, 36, 35, 4)),
    }
    fp8 = ((15, 10, 9, 8, 7, 6, 5, 4), (11, 14, 13, 12, 3, 2, 1, 0))
    generator = torch.Generator().manual_seed(1)
    for r, c in torch.stack([torch.randint(0, top, (4000,), generator=generator) for top in (n, k)], 1).tolist():
        tile, sub, w, n3, g = r // 128, r // 64 % 2, r // 16 % 4, r // 8 % 2, r % 8
        kt, i, k3, t, k0 = c // 64, c // 16 % 4, c // 8 % 2, c // 2 % 4, c % 2
        piece = (tile * (k // 64) + kt) * 2 + sub
        if fmt is MXFP8:
            word = (((((piece * 2 + i // 2) * 4 + w) * 8 + g) * 4 + t) * 2 + i % 2) * 2 + n3
            places = fp8[k3]
        else:
            word = (((piece * 4 + w) * 8 + g) * 4 + t) * 4 + i // 2 * 2
            places = fp4[k3, n3][i % 2]
        bits = [bit_of(weight, word + place // 32, place % 32 ^ 16 * k0) for place in places]
        assert sum(bit << len(bits) - 1 - j for j, bit in enumerate(bits)) == elements[r][c]
        thread = (piece * 4 + w) * 8 + g
        if fmt is NVFP4:
            byte = scale[((thread * 2 + i // 2) * 2 + n3) * 2 + i % 2]
            value = 2.0 ** ((byte >> 3) - 22) * (1 + (byte & 7) / 8)
            assert value == scales[r, c // 16].view(torch.float8_e4m3fn).float()
        else:
            assert scale[(thread * 2 + n3) * 2 + i // 2] == scales[r, c // 32]


def test_shifts_and_a_mask_make_pairs_of_fp4_codes():
    """As the kernel decodes: three pairs of a word by themselves, and one of what is left of two words."""
    codes, scales = random_weight(128, 256, NVFP4)
    words = [
        word & 0xFFFFFFFF for word in pack_hopper_weight(codes, scales, NVFP4)[0].view(torch.int32).flatten().tolist()
    ]
    elements = unpack_e2m1(codes).tolist()

    def pair(word: int, left: int) -> list[int]:
        """Signs at 15 and magnitudes at 8 to 6 of both halves; to the right is a rotation."""
        turned = (word << left if left >= 0 else word >> -left | word << 32 + left) & 0x81C081C0
        return [half >> 12 & 8 | half >> 6 & 7 for half in (turned & 0xFFFF, turned >> 16)]

    for r, c in itertools.product(range(128), range(0, 256, 2)):
        sub, w, n3, g = r // 64, r // 16 % 4, r // 8 % 2, r % 8
        kt, i, k3, t = c // 64, c // 16 % 4, c // 8 % 2, c // 2 % 4
        at = (((kt * 2 + sub) * 4 + w) * 8 + g) * 16 + t * 4 + i // 2 * 2
        even, odd = words[at : at + 2]
        left = even & 0x0C180C18 | odd << 2 & ~0x0C180C18
        if (n3, k3) == (1, 1):
            got = pair(left & 0xFFFFFFFF, (-4, 2)[i % 2])
        else:
            got = pair((even, odd)[i % 2], {(0, 0): 0, (0, 1): -6, (1, 0): 6}[n3, k3])
        assert got == elements[r][c : c + 2]


@EVERY_FORMAT
def test_what_a_quantiser_gives_comes_back(fmt):
    x = values(0, 70, 320).float()
    x[3] = 0
    x[:, 64:128] = -0.0
    if fmt is NVFP4:
        codes, scales = quantize_nvfp4(x, torch.tensor(1e-2), torch.tensor(1e2))  # some scales are subnormal, or zero
        assert bool((scales == 0).any()) and bool((scales[scales > 0] < 8).any())
    else:
        codes, scales = quantize_mx(x, fmt)
    codes = codes.view(torch.uint8)
    weight, scale = pack_hopper_weight(codes, scales, fmt)
    for got, wanted in zip(cropped(weight, scale, fmt, 70, 320), (codes, scales), strict=True):
        assert_same_bytes(got, wanted)


def one_row(fmt: BlockFormat, code: int, scale: int) -> tuple[Tensor, Tensor]:
    codes = torch.full((1, 64 // fmt.elements_per_byte), code, dtype=torch.uint8)
    scales = torch.full((1, 64 // fmt.block_size), ONE[fmt.name], dtype=torch.uint8)
    scales[0, 1] = scale
    return codes, scales


def decoded(codes: Tensor, scales: Tensor, fmt: BlockFormat) -> Tensor:
    return dequantize_blocks(codes.view(torch.float8_e4m3fn) if fmt is MXFP8 else codes, scales, fmt)


@pytest.mark.parametrize("code", [0x00, 0x88, 0x2B, 0xF7])
def test_every_nvfp4_scale_keeps_the_values(code):
    for scale in range(256):
        check_nvfp4_scale(scale, code)


def check_nvfp4_scale(scale: int, code: int) -> None:
    codes, scales = one_row(NVFP4, code, scale)
    back = cropped(*pack_hopper_weight(codes, scales, NVFP4), NVFP4, 1, 64)
    given, got = decoded(codes, scales, NVFP4), decoded(*back, NVFP4)
    number = (scale & 0x7F) != 0x7F
    assert bool(given[:, 16:32].isnan().all()) != number
    assert_same_bytes(got.nan_to_num(1e9), given.nan_to_num(1e9))  # signs of zeros included
    unchanged = 0 < scale < 0x80 or (scale == 0 and code in (0x00, 0x88))
    if unchanged:
        assert_same_bytes(back[0], codes)
        assert_same_bytes(back[1], scales)
    assert not (back[1] & 0x80).any()


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8], ids=["mxfp4", "mxfp8"])
@pytest.mark.parametrize("code", [0x00, 0x80, 0x2B, 0xF7])
def test_every_mx_scale_keeps_the_values_or_is_refused(fmt, code):
    for scale in range(256):
        check_mx_scale(fmt, scale, code)


def check_mx_scale(fmt: BlockFormat, scale: int, code: int) -> None:
    codes, scales = one_row(fmt, code, scale)
    low, high = STORED[fmt.name]
    zero = code in (0x00, 0x80)
    if not (low <= scale <= high or scale == 0xFF or zero):
        with pytest.raises(
            ValueError, match=f"the weight is of {fmt.name} with 1 blocks that can't be stored; allowed"
        ):
            pack_hopper_weight(codes, scales, fmt)
        return
    weight, scale_bytes = pack_hopper_weight(codes, scales, fmt)
    assert scale_bytes.max() <= high + 1  # what lies above would not decode to a power of two
    back = cropped(weight, scale_bytes, fmt, 1, 64)
    given, got = decoded(codes, scales, fmt), decoded(*back, fmt)
    assert bool(given[:, 32:].isnan().all()) == (scale == 0xFF)
    assert_same_bytes(got.nan_to_num(1e9), given.nan_to_num(1e9))
    assert_same_bytes(back[1][0, 1], torch.tensor(127 if zero and high < scale < 0xFF else scale, dtype=torch.uint8))
    if scale == 0xFF:  # an infinity times these is a NaN
        assert not (back[0][0, 32 // fmt.elements_per_byte :] & 0x77).any()
    else:
        assert_same_bytes(back[0], codes)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_mxfp8_element_that_is_nan(code):
    codes, scales = one_row(MXFP8, 0x38, 127)
    codes[0, 40] = code
    with pytest.raises(ValueError, match="1 blocks that can't be stored; allowed: .* no element NaN"):
        pack_hopper_weight(codes, scales, MXFP8)
    scales[0, 1] = 0xFF  # the whole block is NaN
    back = cropped(*pack_hopper_weight(codes, scales, MXFP8), MXFP8, 1, 64)
    assert decoded(*back, MXFP8)[0, 32:].isnan().all()


def test_strides_and_dtypes_do_not_matter():
    codes, scales = random_weight(40, 128, NVFP4)
    wanted = pack_hopper_weight(codes, scales, NVFP4)
    strided = torch.stack([codes, codes], -1)[..., 0]
    given = strided, scales.T.contiguous().T.view(torch.float8_e4m3fn)
    for got, want in zip(pack_hopper_weight(*given, NVFP4), wanted, strict=True):
        assert_same_bytes(got, want)


CODES, SCALES = random_weight(8, 64, NVFP4)
PACKED = pack_hopper_weight(CODES, SCALES, NVFP4)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (
            pack_hopper_weight,
            (CODES.int(), SCALES),
            r"codes is torch.int32 of shape \(8, 32\); allowed: two dimensions",
        ),
        (pack_hopper_weight, (CODES, SCALES[0]), r"scales is torch.uint8 of shape \(4,\); allowed: two dimensions"),
        (pack_hopper_weight, (CODES[:, :4], SCALES), r"codes is of K = 8; allowed: K a multiple of 16 \(nvfp4\)"),
        (pack_hopper_weight, (CODES, SCALES[:, :3]), r"scales is of shape \(8, 3\); allowed: \(8, 4\)"),
        (
            unpack_hopper_weight,
            (PACKED[0][:8], PACKED[1]),
            r"weight is torch.uint8 of shape \(8, 128\); allowed: .*128",
        ),
        (unpack_hopper_weight, (PACKED[0], PACKED[1][:, :4]), r"scale is torch.uint8 of shape \(128, 4\); allowed"),
        (unpack_hopper_weight, (PACKED[0][0, 0], PACKED[1]), r"weight is torch.uint8 of shape \(\); allowed"),
        (unpack_hopper_weight, (PACKED[0].int(), PACKED[1]), r"weight is torch.int32 of shape"),
    ],
)
def test_rejections(function, args, message):
    with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
        function(*args, NVFP4)
