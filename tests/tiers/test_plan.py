"""Sizes of tiers: pure functions of counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv_vllm.tiers.formats import LADDERS, TierGeometry
from mikv_vllm.tiers.plan import TierPlanner, most_tokens, pages_needed

RECENT = 16
GEOMETRIES = [TierGeometry(64, 32), TierGeometry(128, 16), TierGeometry(256, 64, 16)]
RATIO = st.floats(1.1, 6.0)


def is_sound(geometry, planner, sizes):
    """Whether the tiers fit into their pages without touching each other."""
    low_bytes = sizes.low_records * geometry.low(planner.low_format).num_bytes
    return (
        geometry.high_bytes(sizes.high_tokens) + low_bytes <= sizes.low_end_bytes
        and sizes.low_end_bytes <= sizes.pages * geometry.page_bytes
        and sizes.high_tokens >= RECENT
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
    sizes = planner.compress(first)
    if sizes is None:
        return
    for count in [*chunks, *[1] * decoded]:
        step = planner.append(sizes) if count == 1 else planner.extend(sizes, count)
        after = step.after
        assert after.num_tokens == sizes.num_tokens + count
        assert after.pages == sizes.pages + step.new_pages
        assert after.low_records == sizes.low_records + step.demoted_records
        assert step.moved_records <= sizes.low_records
        # What moves lands behind where it lay.
        chunk = geometry.low(planner.low_format).num_bytes
        assert (
            not step.moved_records
            or after.low_end_bytes - sizes.low_end_bytes >= step.moved_records * chunk
        )
        assert is_sound(geometry, planner, after)
        sizes = after


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
    sizes = planner.compress(first)
    if sizes is not None:
        pages = planner.extend(sizes, count).after.pages
        assert pages <= pages_needed(geometry, ratio, RECENT, first + count)
