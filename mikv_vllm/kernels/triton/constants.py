"""Constants of ``tiers/formats.py`` and ``kernels/batch.py`` for device functions."""

import triton.language as tl

from mikv_vllm.kernels import batch
from mikv_vllm.tiers import formats

LINE_BYTES = tl.constexpr(formats.LINE_BYTES)
LINE_WORDS = tl.constexpr(formats.LINE_BYTES // 4)
LOW_RECORD_TOKENS = tl.constexpr(formats.LOW_RECORD_TOKENS)
HIGH_RECORD_TOKENS = tl.constexpr(formats.HIGH_RECORD_TOKENS)
BAND_CHANNELS = tl.constexpr(formats.BAND_CHANNELS)
CHANNEL_MARGIN = tl.constexpr(formats.CHANNEL_MARGIN)
TOKEN_MARGIN = tl.constexpr(formats.TOKEN_MARGIN)
KEY_ZERO_STEPS = tl.constexpr(formats.KEY_ZERO_STEPS)
SCALE_BIAS = tl.constexpr(formats.SCALE_BIAS)
HIGH_OFFSET = tl.constexpr(formats.HIGH_OFFSET)

ROW_FIELDS = tl.constexpr(batch.ROW_FIELDS)
TOKEN = tl.constexpr(batch.TOKEN)
HIGH = tl.constexpr(batch.HIGH)
LOW = tl.constexpr(batch.LOW)
LOW_END_LINE = tl.constexpr(batch.LOW_END_LINE)
DEMOTED = tl.constexpr(batch.DEMOTED)
KEY_CODE = tl.constexpr(batch.KEY_CODE)
VALUE_BITS = tl.constexpr(batch.VALUE_BITS)
BLOCKS = tl.constexpr(batch.BLOCKS)
