"""Sizes of tiered blocks: pure functions of counts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikv_vllm.tiers.blocks import (
    BLOCK_NATIVE_PAGES,
    EMPTY,
    LEAST_IMPORTANT,
    MOST_SAVED_PAGES,
    SAVED_PAGES,
    BlockPlanner,
    most_tokens,
    pages_needed,
)
from mikv_vllm.tiers.formats import LADDERS, TierGeometry
from mikv_vllm.tiers.plan import largest_ratio

GEOMETRIES = [
    TierGeometry(64, 32),
    TierGeometry(64, 16),
    TierGeometry(64, 128),
    TierGeometry(128, 16),
    TierGeometry(80, 32),
    TierGeometry(256, 64, 16),
]
RECENT = 16
RECENTS = [1, RECENT, 100]
RATIO = st.floats(1.1, 6.0)


def check(planner, start, sizes):
    """The tiers fit into the stream without touching each other."""
    whole = sizes.num_tokens == planner.block_tokens
    check_form(planner, planner.sealed_form(start) if whole else planner.tail_form(start), sizes)


def check_form(planner, form, sizes):
    geometry = planner.geometry
    low_bytes = sizes.low_records * geometry.low(form.low_format).num_bytes
    assert sizes.pages <= form.sizes.pages
    assert sizes.low_end_bytes == sizes.pages * geometry.page_bytes
    assert geometry.high_bytes(sizes.high_tokens) + low_bytes <= sizes.low_end_bytes
    assert sizes.low_records <= form.sizes.low_records
    assert not sizes.low_records or sizes.high_tokens >= planner.recent + LEAST_IMPORTANT


def check_new_pages(planner, start, before, step):
    """New pages come between the tiers; the page that both tiers are in is split."""
    positions, page = step.new_positions, planner.geometry.page_bytes
    assert len(positions) == step.after.pages - before.pages
    if not positions:
        assert not step.is_split
        return
    assert positions == tuple(range(positions[0], positions[0] + len(positions)))
    low = planner.geometry.low(planner.tail_form(start).low_format)
    low_bytes = before.low_records * low.num_bytes
    high_pages = {*range(-(-planner.geometry.high_bytes(before.high_tokens) // page))}
    low_pages = {
        *range((before.low_end_bytes - low_bytes) // page, before.pages if low_bytes else 0)
    }
    assert positions[0] == len(high_pages)
    assert high_pages & low_pages == ({positions[0] - 1} if step.is_split else set())


@pytest.mark.parametrize("codec", LADDERS)
@pytest.mark.parametrize("recent", RECENTS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    ratio=RATIO,
    page=st.integers(0, 200),
    first=st.integers(1, 511),
    chunks=st.lists(st.integers(1, 200), max_size=4),
)
def test_a_tail_grows_until_it_is_full(geometry, recent, codec, ratio, page, first, chunks):
    planner = BlockPlanner(geometry, ratio, recent, LADDERS[codec])
    start = page * geometry.block_size
    sizes = planner.tail(start, first)
    assert sizes.num_tokens == first
    check_form(planner, planner.tail_form(start), sizes)
    counts = iter(chunks)
    while sizes.num_tokens < planner.block_tokens:
        count = min(next(counts, 1), planner.block_tokens - sizes.num_tokens)
        step = planner.append(start, sizes) if count == 1 else planner.extend(start, sizes, count)
        after = step.after
        check_form(planner, planner.tail_form(start), after)
        assert after.num_tokens == sizes.num_tokens + step.new_tokens
        assert after.low_records == sizes.low_records + step.demoted_records
        check_new_pages(planner, start, sizes, step)
        # A decode step demotes before it appends, a chunk afterwards: recent tokens stay.
        candidates = sizes.high_tokens + (step.new_tokens if count > 1 else 0) - recent
        assert 32 * step.demoted_records <= max(0, candidates)
        sizes = after
    assert sizes == planner.tail_form(start).sizes


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    ratio=RATIO,
    first=st.integers(1, 511),
    is_short=st.booleans(),
    drafts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1),
)
def test_accepted_drafts_leave_the_sizes_of_single_tokens(geometry, ratio, first, is_short, drafts):
    planner = BlockPlanner(geometry, ratio, RECENT)
    whole = planner.block_tokens
    capacity = min(whole, first + 100) if is_short else whole
    sizes = single = planner.tail(0, min(first, whole - 1))
    for drafted, wanted in drafts:
        if sizes.num_tokens == capacity:
            break
        step = planner.append_drafts(0, sizes, capacity, drafted)
        assert 1 <= step.new_tokens <= 1 + drafted
        # Drafts demote nothing, and a draft does not fill the block.
        assert step.demoted_records == planner.append(0, sizes).demoted_records
        assert step.after.num_tokens < capacity or step.new_tokens == 1
        accepted = min(wanted, step.new_tokens - 1)
        for _ in range(1 + accepted):
            single = planner.append(0, single).after
        rejected = step.new_tokens - 1 - accepted
        sizes = replace(step.after, high_tokens=step.after.high_tokens - rejected)
        # A page that a rejected draft took stays.
        assert single.pages <= sizes.pages <= single.pages + 1
        assert sizes == planner.lengthen(single, sizes.pages)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=100, deadline=None)
@given(ratio=RATIO, num_tokens=st.integers(100, 500))
def test_only_one_page_of_a_tail_is_partly_filled(geometry, ratio, num_tokens):
    planner = BlockPlanner(geometry, ratio, RECENT)
    sizes = planner.tail(0, num_tokens)
    low_bytes = sizes.low_records * geometry.low(planner.tail_form(0).low_format).num_bytes
    unused = sizes.low_end_bytes - geometry.high_bytes(sizes.high_tokens) - low_bytes
    assert unused < geometry.page_bytes


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=100, deadline=None)
@given(ratio=RATIO, num_tokens=st.integers(2000, 40_000))
def test_the_blocks_of_a_request_follow_its_ratio(geometry, ratio, num_tokens):
    planner = BlockPlanner(geometry, min(ratio, largest_ratio(geometry.head_dim)), 16)
    blocks = planner.blocks(num_tokens)
    assert sum(block.sizes.num_tokens for block in blocks) == num_tokens
    for start, block in zip(planner.starts(num_tokens), blocks, strict=True):
        check(planner, start, block.sizes)


@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
@pytest.mark.parametrize("ratio", [2.0, 3.0, 4.0, 4.5, 5.0])
def test_sealed_blocks_save_pages_and_the_tail_gets_them(geometry, ratio):
    planner = BlockPlanner(geometry, ratio, RECENT)
    saved = 0
    for start in range(0, 8 * planner.block_tokens, planner.block_tokens):
        share = planner.budget(start + planner.block_tokens) - planner.budget(start)
        tail, sealed = planner.tail_form(start), planner.sealed_form(start)
        assert tail.sizes.pages == share + saved
        saves = SAVED_PAGES if saved < MOST_SAVED_PAGES else 0
        assert sealed.sizes.pages == share - saves
        assert tail.low_format.token_bits >= sealed.low_format.token_bits
        saved += saves
    assert saved == MOST_SAVED_PAGES


def test_blocks_in_the_poorest_format_save_nothing():
    planner = BlockPlanner(GEOMETRIES[0], 100, RECENT)
    for start in range(0, 8 * planner.block_tokens, planner.block_tokens):
        assert planner.sealed_form(start) == planner.sealed_form(0)


@settings(max_examples=100, deadline=None)
@given(ratio=RATIO, index=st.integers(0, 7), count=st.integers(1, 2048))
def test_a_block_that_a_chunk_fills_keeps_its_pages(ratio, index, count):
    planner = BlockPlanner(GEOMETRIES[0], ratio, RECENT)
    start = index * planner.block_tokens
    before = EMPTY
    if count < planner.block_tokens:
        before = planner.tail(start, planner.block_tokens - count)
    step = planner.seal(start, before, count)
    assert step.after == planner.sealed_form(start).sizes
    assert step.new_tokens == count
    pages = step.insert(range(before.pages), [-1] * len(step.new_positions))
    assert pages[: before.pages] == [*range(before.pages)]
    assert len(pages) == max(before.pages, step.after.pages)


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("ratio", [1.9 + 0.1 * i for i in range(42)])
def test_ratios_are_met_as_the_settings_page_says(page, ratio):
    planner = BlockPlanner(TierGeometry(64, page), ratio, RECENT)
    for num_tokens in range(2400, 30_000, 61):
        pages = sum(block.sizes.pages for block in planner.blocks(num_tokens))
        assert num_tokens / (page * pages) == pytest.approx(ratio, rel=0.13)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@settings(max_examples=100, deadline=None)
@given(ratio=st.just(1.0) | RATIO, pages=st.integers(8, 400))
def test_most_tokens_fill_the_pages(geometry, ratio, pages):
    most = most_tokens(geometry, ratio, RECENT, pages)
    assert pages_needed(geometry, ratio, RECENT, most) <= pages
    # A block takes no fewer pages than with the poorest format, and a tail up to two in part.
    reachable = BLOCK_NATIVE_PAGES / BlockPlanner(geometry, 100, RECENT).sealed_form(0).sizes.pages
    assert most >= 0.95 * (pages - 4) * geometry.block_size * min(ratio, reachable)


@settings(max_examples=50, deadline=None)
@given(ratio=RATIO, first=st.integers(300, 2000), count=st.integers(50, 4000))
def test_a_request_takes_no_more_pages_than_needed(ratio, first, count):
    geometry = GEOMETRIES[0]
    planner = BlockPlanner(geometry, ratio, RECENT)
    forms = planner.compress(first)
    if forms is None:
        return
    blocks, most = [form.sizes for form in forms], 0
    for _ in range(count):
        start = (len(blocks) - 1) * planner.block_tokens
        if blocks[-1].num_tokens == planner.block_tokens:
            blocks[-1] = planner.sealed_form(start).sizes
            blocks.append(EMPTY)
            start += planner.block_tokens
        blocks[-1] = planner.append(start, blocks[-1]).after
        most = max(most, sum(sizes.pages for sizes in blocks))
    assert most <= pages_needed(geometry, ratio, RECENT, first + count)
