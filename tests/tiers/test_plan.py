"""Sizes of tiers: pure functions of counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv_vllm.tiers.formats import LADDERS, TierGeometry
from mikv_vllm.tiers.plan import TierPlanner, most_tokens, pages_needed

RECENT = 16
GEOMETRIES = [TierGeometry(64, 32), TierGeometry(128, 16), TierGeometry(256, 64, 16)]
RATIO = st.floats(1.1, 6.0)


def is_sound(geometry, planner, state):
    """Whether the tiers fit into their pages without touching each other."""
    low_bytes = state.low_chunks * geometry.low(planner.low_format).num_bytes
    return (
        geometry.high_bytes(state.high_tokens) + low_bytes <= state.low_end
        and state.low_end <= state.pages * geometry.page_bytes
        and state.high_tokens >= RECENT
    )


@pytest.mark.parametrize("codec", LADDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=150, deadline=None)
@given(
    ratio=RATIO,
    first=st.integers(256, 3000),
    chunks=st.lists(st.integers(1, 900), max_size=6),
    decoded=st.integers(0, 200),
)
def test_a_prompt_in_chunks_and_its_answer_fit_their_pages(
    geometry, codec, ratio, first, chunks, decoded
):
    total = first + sum(chunks)
    planner = TierPlanner.choose(geometry, ratio, RECENT, total, LADDERS[codec])
    state = planner.compress(first)
    if state is None:
        return
    for count in [*chunks, *[1] * decoded]:
        step = planner.append(state) if count == 1 else planner.extend(state, count)
        after = step.state
        assert after.num_tokens == state.num_tokens + count
        assert after.pages == state.pages + step.new_pages
        assert after.low_chunks == state.low_chunks + step.demoted_chunks
        assert step.moved_chunks <= state.low_chunks
        # What moves lands behind where it lay.
        chunk = geometry.low(planner.low_format).num_bytes
        assert not step.moved_chunks or after.low_end - state.low_end >= step.moved_chunks * chunk
        assert is_sound(geometry, planner, after)
        state = after


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=100, deadline=None)
@given(ratio=st.just(1.0) | RATIO, pages=st.integers(8, 400))
def test_most_tokens_fill_the_pages(geometry, ratio, pages):
    most = most_tokens(geometry, ratio, RECENT, pages)
    assert pages_needed(geometry, ratio, RECENT, most) <= pages
    assert most >= 0.85 * (pages - 2) * geometry.block_size * ratio


@settings(max_examples=50, deadline=None)
@given(ratio=RATIO, first=st.integers(300, 2000), count=st.integers(50, 4000))
def test_a_request_takes_no_more_pages_than_needed(ratio, first, count):
    geometry = GEOMETRIES[0]
    planner = TierPlanner.choose(geometry, ratio, RECENT, first + count)
    state = planner.compress(first)
    if state is not None:
        pages = planner.extend(state, count).state.pages
        assert pages <= pages_needed(geometry, ratio, RECENT, first + count)
