"""Rows of the later passes of draft layers."""

import numpy as np
import pytest

from mikv_vllm.engine.step_plan import BlockTable
from mikv_vllm.engine.tier_tables import TierTables
from mikv_vllm.kernels.batch import ACCEPTED, BLOCKS, HIGH, QUERIES
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import TierGeometry

GEOMETRY = TierGeometry(64, 16)
PLANNER = BlockPlanner(GEOMETRY, 4.0, 16)
WHOLE = PLANNER.block_tokens


def add(tables: TierTables, name: str, num_tokens: int) -> None:
    blocks, page = [], 0
    for block in PLANNER.blocks(num_tokens):
        pages = tuple(range(page, page + block.sizes.pages))
        blocks.append(BlockTable(pages, block.sizes, block.low_format))
        page += block.sizes.pages
    tables.add(name, blocks)


@pytest.fixture
def tables():
    """Requests with a tail only, with a sealed block and a tail, and with a sealed block only."""
    tables = TierTables()
    for name, num_tokens in (("short", 600), ("long", WHOLE + 700), ("full", WHOLE)):
        add(tables, name, num_tokens)
    return tables


def draft_rows(tables: TierTables, **lengths: int):
    slots = tables.slots(lengths)
    return tables.draft_rows(
        slots, np.arange(len(slots)), np.array(list(lengths.values())), GEOMETRY
    )


@pytest.mark.parametrize("rejected", [0, 3])
def test_a_draft_joins_the_tail_behind_the_accepted_tokens(tables, rejected):
    tails = [PLANNER.blocks(count)[-1].sizes for count in (600, WHOLE + 700)]
    rooms = [PLANNER.free_slots(0, tails[0]), PLANNER.free_slots(WHOLE, tails[1])]
    for step in range(max(rooms) + rejected + 2):
        more = step - rejected
        rows, page_tables, has_room = draft_rows(tables, short=600 + more, long=WHOLE + 700 + more)
        assert has_room.tolist() == [more < room for room in rooms]
        last = rows[rows[:, BLOCKS] > 0]
        expected = [t.high_tokens + more for t, has in zip(tails, has_room, strict=True) if has]
        assert last[:, HIGH].tolist() == expected
        assert (last[:, QUERIES] == 1).all()
        assert (last[:, ACCEPTED] == 0).all()
        assert len(rows) == len(page_tables) == has_room[0] + 2 * has_room[1]


def test_a_full_block_takes_no_draft(tables):
    rows, _, has_room = draft_rows(tables, full=WHOLE, short=600)
    assert has_room.tolist() == [False, True]
    assert len(rows) == 1


def test_a_request_beyond_the_longest_length_takes_no_draft(tables):
    """vLLM gives it the length 1."""
    assert not draft_rows(tables, short=0, full=0, long=0)[2].any()


def test_the_tables_do_not_change(tables):
    before = [tables.blocks(name) for name in ("short", "long", "full")]
    draft_rows(tables, short=598, long=WHOLE + 701, full=WHOLE)
    assert [tables.blocks(name) for name in ("short", "long", "full")] == before
