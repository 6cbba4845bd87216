"""Codecs over every code and every 16-bit input, against definitions written out here with exact arithmetic."""

import math

import pytest
import torch

from torch_fp4ops import codecs

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_value(code: int) -> float:
    """The value of an E4M3 byte from the definition of its fields."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest(grid: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of an ascending grid, ties to the even index, beyond the end the last: by float64
    distances, which are exact for these values."""
    x = x.double().abs()
    upper = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    lower = upper - 1
    down, up = x - grid[lower], grid[upper] - x
    choose_upper = (up < down) | ((up == down) & (upper % 2 == 0))
    return torch.where(choose_upper, upper, lower)


def all_16_bit(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def neighbours(values: list[float]) -> torch.Tensor:
    """fp32 values, the fp32 numbers next to them, and all their negatives."""
    v = torch.tensor(values)
    v = torch.cat([v, torch.nextafter(v, torch.tensor(torch.inf)), torch.nextafter(v, torch.tensor(0.0))])
    return torch.cat([v, -v])


def midpoints(grid: torch.Tensor) -> list[float]:
    return ((grid[1:] + grid[:-1]) / 2).tolist()


E4M3_GRID = torch.tensor([e4m3_value(c) for c in range(0x7F)], dtype=torch.float64)
E2M1_GRID = torch.tensor(E2M1, dtype=torch.float64)
EXTREMES = [1e-45, 2.0**-149, 2.0**-126, 3.4e38, 0.0]


@pytest.mark.parametrize(
    "x",
    [
        all_16_bit(torch.bfloat16),
        all_16_bit(torch.float16),
        neighbours([*E2M1, *midpoints(E2M1_GRID), 7.0, *EXTREMES]),
    ],
    ids=["all bf16", "all fp16", "ties and neighbours"],
)
def test_encode_e2m1(x):
    code = codecs.encode_e2m1(x)
    nan = x.isnan()
    assert torch.equal(code[~nan] & 7, nearest(E2M1_GRID, x[~nan]).to(torch.uint8))
    assert torch.equal(code >> 3, torch.signbit(x).to(torch.uint8))
    assert (code[nan] & 7 == 7).all()


@pytest.mark.parametrize(
    "x",
    [
        all_16_bit(torch.bfloat16),
        all_16_bit(torch.float16),
        neighbours([*E4M3_GRID.tolist(), *midpoints(E4M3_GRID), 464.0, 480.0, *EXTREMES]),
    ],
    ids=["all bf16", "all fp16", "ties and neighbours"],
)
def test_encode_e4m3(x):
    code = codecs.encode_e4m3(x)
    nan = x.isnan()
    assert (code[nan] == 0x7F).all()
    x, code = x[~nan], code[~nan]
    assert torch.equal(code & 0x7F, nearest(E4M3_GRID, x).to(torch.uint8))
    assert torch.equal(code >> 7, torch.signbit(x).to(torch.uint8))


def test_decode_e2m1_every_code():
    decoded = codecs.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    wanted = torch.tensor(E2M1 + [-v for v in E2M1])
    assert torch.equal(decoded.view(torch.int32), wanted.view(torch.int32))  # the sign of zero too


def test_decode_e4m3_every_code():
    decoded = codecs.decode_e4m3(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    wanted = torch.tensor([e4m3_value(c) for c in range(256)])
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=0, equal_nan=True)


def test_decode_ue8m0_every_code():
    decoded = codecs.decode_ue8m0(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert decoded[:255].double().log2().tolist() == [c - 127 for c in range(255)]
    assert decoded[255].isnan()
    native = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu)
    torch.testing.assert_close(codecs.decode_ue8m0(native), native.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize(
    "x",
    [
        all_16_bit(torch.bfloat16),
        all_16_bit(torch.float16),
        neighbours([2.0**e for e in range(-149, 128)] + [1.5 * 2.0**e for e in range(-127, 127)]),
    ],
    ids=["all bf16", "all fp16", "powers of two and neighbours"],
)
def test_encode_ue8m0(x, rounding):
    byte = codecs.encode_ue8m0(x, rounding).int()
    assert (byte[x.isnan()] == 255).all()
    assert (byte[x.isinf()] == 254).all()
    finite = x.isfinite() & (x != 0)
    magnitude, byte = x[finite].double().abs(), byte[finite]
    step = (byte - 127).double().exp2()
    if rounding == "up":
        assert ((magnitude <= step) | (byte == 254)).all()
        assert ((magnitude > step / 2) | (byte == 0)).all()
    else:
        assert ((magnitude >= step) | (byte == 0)).all()
        assert (magnitude < step * 2).all()
    assert (codecs.encode_ue8m0(torch.tensor([0.0, -0.0]), rounding) == 0).all()


def test_encode_ue8m0_rejects_an_unknown_rounding():
    with pytest.raises(ValueError, match=r"rounding is 'nearest'.*'up' and 'down'"):
        codecs.encode_ue8m0(torch.ones(1), "nearest")


@pytest.mark.parametrize(
    "encode, decode, count", [("encode_e2m1", "decode_e2m1", 16), ("encode_e4m3", "decode_e4m3", 256)]
)
def test_round_trip_of_every_code(encode, decode, count):
    codes = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    values = getattr(codecs, decode)(codes)
    numbers = ~values.isnan()
    assert torch.equal(getattr(codecs, encode)(values)[numbers], codes[numbers])


def test_packing_every_byte():
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).reshape(2, 128)
    codes = codecs.unpack_e2m1(packed)
    assert codes.shape == (2, 256)
    for byte in (0x00, 0x1F, 0xA5, 0xFF):
        row, column = divmod(byte, 128)
        assert codes[row, 2 * column : 2 * column + 2].tolist() == [byte & 0xF, byte >> 4]  # low nibble is even k
    assert torch.equal(codecs.pack_e2m1(codes), packed)


def test_as_bytes_views_native_dtypes_only():
    data = torch.arange(8, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
        viewed = codecs.as_bytes(data.view(dtype))
        assert viewed.dtype == torch.uint8
        assert viewed.data_ptr() == data.data_ptr()
    assert codecs.as_bytes(data) is data
    assert codecs.as_bytes(floats := torch.ones(2)) is floats
