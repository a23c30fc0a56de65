"""The byte layout that the C++ kernels repeat equals the definition in ``tiers/formats.py``."""

from functools import cached_property
from itertools import combinations_with_replacement

import pytest

from mikv_vllm.kernels import cpu
from mikv_vllm.kernels.cpu import _C
from mikv_vllm.tiers import codec, formats
from mikv_vllm.tiers.formats import LowFormat, TierGeometry

EVERY_FORMAT = [
    LowFormat(key_bits, value_bits, name)
    for name, scales in formats.KEY_SCALES.items()
    for key_bits in combinations_with_replacement((6, 5, 4, 3, 2, 1), 4)
    if len(set(key_bits)) <= scales.widths
    for value_bits in (2, 3, 4, 5)
]


def offsets(layout):
    """Every offset and size of a layout, by name."""
    kinds = (property, cached_property)
    names = [name for name, value in vars(type(layout)).items() if isinstance(value, kinds)]
    return {name: getattr(layout, name) for name in names}


def test_constants():
    python = vars(formats) | vars(codec)
    constants = _C.constants()
    assert constants == {name: python[name] for name in constants}
    # Every number that formats.py defines is compared.
    numbers = {name for name, value in vars(formats).items() if type(value) in (int, float)}
    assert set(constants) >= {name for name in numbers if name.isupper()}


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def test_headers_and_pages(head_dim):
    for block_size in (16, 32, 64, 128):
        geometry = TierGeometry(head_dim, block_size)
        assert _C.page_bytes(head_dim, block_size) == geometry.page_bytes
        assert _C.header_layout(head_dim) == offsets(geometry.header)


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("high_bits", [8, 16])
def test_high_records(head_dim, high_bits):
    high = TierGeometry(head_dim, 16, high_bits).high
    assert _C.high_layout(head_dim, high_bits) == offsets(high)


@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
def test_low_records_of_every_format(head_dim):
    assert {low.name for ladder in formats.LADDERS.values() for low in ladder} <= {
        low.name for low in EVERY_FORMAT
    }
    for low_format in EVERY_FORMAT:
        low = TierGeometry(head_dim, 16).low(low_format)
        code = low_format.key_code
        assert _C.low_layout(head_dim, code, low_format.value_bits) == offsets(low), low_format
        assert _C.band_bits(head_dim, code) == low_format.band_bits(head_dim), low_format
