"""Selection of tokens by importance score: a radix select, one program per KV head."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit
def rank_of(scores, LARGEST: tl.constexpr):
    """Map float32 scores to uint32 so that the chosen tokens have the largest numbers."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) | (-0x7FFFFFFF - 1))
    rank = bits.to(tl.uint32, bitcast=True)
    return rank if LARGEST else ~rank


@triton.jit
def select_threshold(scores, num_tokens, count, LARGEST: tl.constexpr):
    """Find the rank of the last of ``count`` tokens chosen among ``num_tokens``.

    Returns:
        The rank, and how many of the tokens with this rank are chosen.
    """
    lane = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    prefix = tl.zeros([], tl.uint32)
    rest = count
    for turn in tl.static_range(4):
        shift = 24 - 8 * turn
        counts = tl.zeros([256], tl.int32)
        for start in range(0, num_tokens, BLOCK):
            valid = start + lane < num_tokens
            rank = rank_of(tl.load(scores + start + lane, mask=valid, other=0.0), LARGEST)
            if turn > 0:
                valid &= (rank >> (shift + 8)) == prefix
            counts += tl.histogram((rank >> shift & 255).to(tl.int32), 256, mask=valid)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.maximum(tl.sum((at_least >= rest).to(tl.int32), 0) - 1, 0)
        rest -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    return prefix, rest


@triton.jit
def split_tokens(
    scores, num_tokens, num_candidates, count, chosen_out, rest_out, LARGEST: tl.constexpr
):
    """Write the positions of the chosen tokens and of all other tokens, both ascending.

    Of the first ``num_candidates`` tokens, the ``count`` tokens with the largest scores (smallest
    scores, unless ``LARGEST``) are chosen. Of equal scores, earlier tokens are chosen first. Tokens
    from ``num_candidates`` on stay in the high tier: they are chosen if ``LARGEST``.

    Args:
        scores: float32 pointer; chosen_out, rest_out: int32 pointers.
    """
    threshold, ties = select_threshold(scores, num_candidates, count, LARGEST)
    lane = tl.arange(0, BLOCK)
    num_chosen = tl.zeros([], tl.int32)
    num_ties = tl.zeros([], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + lane
        valid = token < num_candidates
        rank = rank_of(tl.load(scores + token, mask=valid, other=0.0), LARGEST)
        tie = (valid & (rank == threshold)).to(tl.int32)
        earlier = num_ties + tl.cumsum(tie, 0) - tie
        chosen = valid & ((rank > threshold) | ((tie > 0) & (earlier < ties)))
        if LARGEST:
            chosen |= (token >= num_candidates) & (token < num_tokens)
        flags = chosen.to(tl.int32)
        place = num_chosen + tl.cumsum(flags, 0) - flags
        tl.store(chosen_out + place, token, mask=chosen)
        tl.store(rest_out + token - place, token, mask=(flags == 0) & (token < num_tokens))
        num_chosen += tl.sum(flags, 0)
        num_ties += tl.sum(tie, 0)
