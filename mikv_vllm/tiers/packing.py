"""Packing of integers into the lines of a record: tiles and bit planes.

A *tile* is 16 x 4 small integers, in the order that a byte dot product over the last axis reads
them: 16 tokens x 4 channels of keys, or 16 channels x 4 tokens of values. Unpacked, with one byte
per integer, it is one 64-byte line.

A *bit plane* of ``p`` bits stores ``p`` bits of every integer. One line of it holds ``8 // p``
consecutive tiles: tile ``j`` in bits ``p * j`` to ``p * (j + 1) - 1`` of every byte. The planes of
an integer are stored one after the other, low bits first (:data:`PLANES`): 3 bits, for example, are
a plane of 2 bits and a plane of 1 bit. The keys of a low record are packed band by band, each band
of 8 tiles with its own bits.
"""

import torch

from mikv_vllm.tiers.formats import LINE_BYTES

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of an integer -> bits of its planes, low bits first."""


def key_tiles(integers: torch.Tensor) -> torch.Tensor:
    """Arrange keys ``[..., tokens, head_dim]`` as tiles ``[..., tiles, 64]``.

    Tile ``i`` has the 4 channels from ``4 * (i // halves)`` and the 16 tokens from
    ``16 * (i % halves)``, where ``halves`` is ``tokens / 16``.
    """
    *lead, tokens, head_dim = integers.shape
    split = integers.reshape(*lead, tokens // 16, 16, head_dim // 4, 4)
    return split.movedim(-2, -4).reshape(*lead, -1, LINE_BYTES)


def key_tiles_inverse(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
    """Undo :func:`key_tiles`: ``[..., tiles, 64]`` -> ``[..., tokens, head_dim]``."""
    *lead, _, _ = tiles.shape
    split = tiles.reshape(*lead, -1, tokens // 16, 16, 4)
    return split.movedim(-4, -2).reshape(*lead, tokens, -1)


def value_tiles(integers: torch.Tensor) -> torch.Tensor:
    """Arrange values ``[..., tokens, head_dim]`` as tiles ``[..., tiles, 64]``.

    Tile ``i`` has the 4 tokens from ``4 * (i // (head_dim // 16))`` and the 16 channels from
    ``16 * (i % (head_dim // 16))``.
    """
    *lead, tokens, head_dim = integers.shape
    split = integers.reshape(*lead, tokens // 4, 4, head_dim // 16, 16)
    return split.movedim(-3, -1).reshape(*lead, -1, LINE_BYTES)


def value_tiles_inverse(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
    """Undo :func:`value_tiles`: ``[..., tiles, 64]`` -> ``[..., tokens, head_dim]``."""
    *lead, _, _ = tiles.shape
    split = tiles.reshape(*lead, tokens // 4, -1, 16, 4)
    return split.movedim(-1, -3).reshape(*lead, tokens, -1)


def pack_bands(tiles: torch.Tensor, band_bits: list[int]) -> torch.Tensor:
    """Pack key tiles ``[tiles, 64]``, 8 per band with the bits of the band; uint8 ``[n]``."""
    bands = tiles.reshape(len(band_bits), -1, LINE_BYTES)
    return torch.cat([pack(band, bits) for band, bits in zip(bands, band_bits, strict=True)])


def unpack_bands(packed: torch.Tensor, band_bits: list[int]) -> torch.Tensor:
    """Undo :func:`pack_bands`: bytes ``[n]`` -> tiles ``[tiles, 64]``, int32."""
    bands = packed.split([LINE_BYTES * bits for bits in band_bits])
    tiles = [unpack(band, bits, 8) for band, bits in zip(bands, band_bits, strict=True)]
    return torch.cat(tiles)


def pack(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack tiles ``[..., tiles, 64]`` of integers below ``2**bits``; uint8 ``[..., n]``."""
    values = tiles.to(torch.int32)
    planes = []
    shift = 0
    for plane_bits in PLANES[bits]:
        plane = (values >> shift) & ((1 << plane_bits) - 1)
        per_line = 8 // plane_bits
        plane = plane.reshape(*plane.shape[:-2], -1, per_line, LINE_BYTES)
        shifts = torch.arange(per_line, dtype=torch.int32)[:, None] * plane_bits
        planes.append((plane << shifts).sum(-2).flatten(-2))
        shift += plane_bits
    return torch.cat(planes, dim=-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, num_tiles: int) -> torch.Tensor:
    """Undo :func:`pack`: bytes ``[..., n]`` -> tiles ``[..., num_tiles, 64]``, int32."""
    values = packed.to(torch.int32)
    tiles = torch.zeros(*packed.shape[:-1], num_tiles, LINE_BYTES, dtype=torch.int32)
    offset = shift = 0
    for plane_bits in PLANES[bits]:
        per_line = 8 // plane_bits
        size = num_tiles // per_line * LINE_BYTES
        plane = values[..., offset : offset + size]
        plane = plane.reshape(*plane.shape[:-1], -1, 1, LINE_BYTES)
        shifts = torch.arange(per_line, dtype=torch.int32)[:, None] * plane_bits
        plane = (plane >> shifts) & ((1 << plane_bits) - 1)
        tiles += plane.flatten(-3, -2) << shift
        offset += size
        shift += plane_bits
    return tiles
