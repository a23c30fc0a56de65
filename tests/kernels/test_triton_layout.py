"""The byte layout that the Triton kernels use equals the definition in ``tiers/formats.py``."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from mikv_vllm.kernels import batch
from mikv_vllm.kernels.triton import HEAD_DIMS, constants
from mikv_vllm.kernels.triton.layout import Layout, LowLines
from mikv_vllm.tiers import formats
from mikv_vllm.tiers.formats import LINE_BYTES, LowFormat, TierGeometry

NOT_ON_DEVICE = {
    *("NATIVE_BYTES", "VALUE_GROUP", "KEYS_PER_TOKEN_BIT", "PAGES"),
    *("QUERIES", "ACCEPTED", "SLOT"),  # of drafts
}
"""Constants that no kernel names. ``Layout`` and ``LowLines`` depend on the first three."""
FORMATS = [
    *(low for ladder in formats.LADDERS.values() for low in ladder),
    *map(LowFormat.parse, ("K6666V2", "K5432V3", "K2222V5", "K3211V2", "B6V2")),
]


def numbers(module):
    """The numbers that a module defines, by name."""
    found = vars(module).items()
    return {name: n for name, n in found if name.isupper() and type(n) in (int, float)}


def test_constants():
    device = {n: c.value for n, c in vars(constants).items() if isinstance(c, tl.constexpr)}
    expected = numbers(formats) | numbers(batch) | {"LINE_WORDS": LINE_BYTES // 4}
    assert device == {name: expected[name] for name in device}
    assert expected.keys() - device.keys() == NOT_ON_DEVICE


def test_tiles_of_the_kernels():
    # A tile is a line: 4 channels x 16 tokens of keys, or 4 tokens x 16 channels of values.
    assert formats.LINE_BYTES == 4 * 16
    assert formats.BAND_CHANNELS == 16
    assert formats.VALUE_GROUP == 4 * 16
    # A block of decode attention is one low record or two high records.
    assert formats.LOW_RECORD_TOKENS == 2 * formats.HIGH_RECORD_TOKENS == 32


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("high_bits", [8, 16])
def test_headers_and_high_records(head_dim, high_bits):
    for block_size in (16, 32, 64, 128):
        layout = Layout(head_dim, 4, block_size, high_bits)
        geometry = TierGeometry(head_dim, block_size, high_bits)
        assert layout.page_lines * LINE_BYTES == geometry.page_bytes
    header, high = geometry.header, geometry.high
    assert 2 * layout.header_centers == header.centers
    assert 2 * layout.header_units == header.units
    assert layout.header_order == header.order
    assert layout.header_lines * LINE_BYTES == header.num_bytes
    assert high.keys == 0
    assert layout.high_values == high.values
    assert layout.high_key_scales == high.key_scales
    assert layout.high_value_scales == high.value_scales
    assert layout.high_scores == high.scores
    assert layout.high_record_lines * LINE_BYTES == high.num_bytes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_low_records(head_dim):
    for low_format in FORMATS:
        lines, low = LowLines(head_dim, low_format), TierGeometry(head_dim, 16).low(low_format)
        assert low.keys == 0
        assert lines.values * LINE_BYTES == low.values
        assert lines.key_scales * LINE_BYTES == low.key_scales
        assert lines.key_slices == low.key_zeros - low.key_scales
        assert lines.value_scales * LINE_BYTES == low.value_scales
        assert lines.value_groups == low.value_groups
        assert lines.count * LINE_BYTES == low.num_bytes
        bits = low_format.band_bits(head_dim)
        assert list(lines.band_bits[: len(bits)]) == bits
        assert not any(lines.band_bits[len(bits) :])
        # A band of 32 tokens x 16 channels takes one line per bit.
        starts = [sum(bits[:band]) for band in range(len(bits))]
        assert list(lines.band_lines[: len(bits)]) == starts
        assert lines.values == sum(bits)
