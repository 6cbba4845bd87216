"""Facts of the formats, and which flags name which."""

import pytest

from torch_fp4ops.formats import BLOCKFP4, FORMATS, MXFP4, MXFP8, NVFP4, fp4_format, kv_format


@pytest.mark.parametrize(
    ("fmt", "block", "bits"), [(NVFP4, 16, 4 + 0.5), (MXFP4, 32, 4 + 0.25), (MXFP8, 32, 8 + 0.25)], ids=str
)
def test_storage(fmt, block, bits):
    assert (fmt.block_size, fmt.bits_per_element) == (block, bits)
    assert FORMATS[fmt.name] is fmt


def test_flags_name_a_format_or_none():
    assert fp4_format(16, False) is NVFP4
    assert fp4_format(32, True) is MXFP4
    assert fp4_format(16, True) is None
    assert fp4_format(32, False) is None


def test_flags_name_a_cache_format_or_none():
    assert kv_format(16, False) is NVFP4
    assert kv_format(32, True) is MXFP4
    assert kv_format(16, True) is BLOCKFP4
    assert kv_format(32, False) is None


def test_formats_are_frozen():
    with pytest.raises(AttributeError):
        NVFP4.block_size = 32
