"""plan_linear_logprobs: the route, tiles, bytes and products that a call will take."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import _plan, plan_linear_logprobs
from rlhf_fast.ops._linear import kept_tile
from rlhf_fast.ops._plan import make_tiles

TILES = make_tiles(2048, 50257, "cpu")
LOGITS = TILES.count * TILES.slot * 4


@pytest.mark.parametrize(
    ("frozen", "budget", "route", "products"),
    [
        (False, LOGITS, "keep", 3.0),
        (False, LOGITS - 1, "partial", 3.0),
        (False, 0, "recompute", 4.0),
        (True, LOGITS, "keep", 2.0),
        (True, LOGITS - 1, "direct", 2.0),
        (True, 2048 * 512 * 4, "direct", 2.0),
        (True, 2048 * 512 * 4 - 1, "recompute", 3.0),
    ],
)
def test_the_cheapest_route_that_fits(frozen: bool, budget: int, route: str, products: float):
    plan = plan_linear_logprobs(2048, 512, 50257, weight_grad=not frozen, memory_budget=budget)
    assert plan.route == route
    if route == "partial":
        assert products < plan.products < 4.0
        assert plan.kept_tiles == plan.tiles.count - 1
        assert plan.products == pytest.approx(4.0 - plan.kept_tiles / plan.tiles.count)
    else:
        assert plan.products == products


def test_a_call_without_gradients_keeps_nothing():
    plan = plan_linear_logprobs(64, 8, 1000, hidden_grad=False, weight_grad=False)
    assert (plan.route, plan.kept_tiles, plan.products) == ("forward", 0, 1.0)


def test_no_rows_make_no_tiles():
    plan = plan_linear_logprobs(0, 8, 1000)
    assert plan.tiles.count == 0 and plan.kept_tiles == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 151_936), (5, 7), (100_000, 50_257), (8192, 151_936)]
)
def test_tiles_cover_the_logits_once_and_are_near_equal(kind: str, shape: tuple[int, int]):
    tiles = make_tiles(*shape, kind)
    for size, slices in zip(shape, (tiles.row_slices(), tiles.column_slices()), strict=True):
        assert slices[0].start == 0 and slices[-1].stop == size
        assert all(a.stop == b.start for a, b in zip(slices, slices[1:], strict=False))
    assert tiles.row_step <= _plan.TILE_ROWS[kind]
    width = _plan.COLUMN_MULTIPLE
    assert tiles.row_step * (tiles.column_step - width) <= _plan.TILE_ELEMENTS[kind]
    assert tiles.column_step % width == 0 or len(tiles.column_slices()) == 1
    assert tiles.slot >= tiles.row_step * tiles.column_step and tiles.slot % width == 0


def test_kept_tiles_begin_where_a_cache_line_does_and_do_not_overlap():
    tiles = _plan.Tiles(rows=5, columns=10, row_step=3, column_step=4)
    kept = torch.zeros(6 * tiles.slot)
    for rows in tiles.row_slices():
        for columns in tiles.column_slices():
            tile = kept_tile(kept, tiles, 6, rows, columns)
            assert tile is not None and tile.storage_offset() % 128 == 0
            assert tile.stride() == (16, 1)  # no row begins within a vector
            assert tile.shape == (rows.stop - rows.start, columns.stop - columns.start)
            tile += 1.0
    assert kept.max() == 1.0 and kept.sum() == 50
    assert kept_tile(kept, tiles, 5, slice(3, 5), slice(8, 10)) is None


def test_an_entropy_gradient_rules_out_the_sum_in_the_forward():
    plans = [
        plan_linear_logprobs(
            *(2048, 512, 50257), weight_grad=False, entropy_grad=entropy, memory_budget=LOGITS // 2
        )
        for entropy in (False, True)
    ]
    assert [plan.route for plan in plans] == ["direct", "partial"]
    assert plans[1].products < 3.0


def test_free_memory_of_this_machine_is_known_and_of_others_is_none():
    assert _plan.free_memory(torch.device("meta")) == 0
    assert _plan.free_memory(torch.device("cpu")) >= 0


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="V=0; expected N >= 0, D, V > 0"):
        plan_linear_logprobs(4, 8, 0)
    with pytest.raises(ValueError, match="memory_budget=-1"):
        plan_linear_logprobs(4, 8, 10, memory_budget=-1)
