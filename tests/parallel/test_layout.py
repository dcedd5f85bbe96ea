"""Every rank is in exactly one group of each kind, and in the right company."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.parallel.layout import ParallelLayout, split_evenly

sizes = st.integers(1, 5)
layouts = st.builds(ParallelLayout, tensor=sizes, pipeline=sizes, data=sizes)


@given(layouts)
def test_coordinates_and_ranks_are_inverse(layout: ParallelLayout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(*place) for place in places] == list(range(layout.world_size))
    assert len(set(places)) == layout.world_size
    for rank in (-1, layout.world_size):
        with pytest.raises(ValueError, match=f"rank {rank} "):
            layout.coordinates(rank)


@given(layouts)
def test_groups_of_each_kind_part_the_world_and_differ_in_their_own_axes_alone(layout: ParallelLayout) -> None:
    kinds = {
        ("tensor",): (layout.tensor_groups(), layout.tensor),
        ("pipeline",): (layout.pipeline_groups(), layout.pipeline),
        ("data", "tensor"): (layout.expert_groups(), layout.data * layout.tensor),
    }
    for axes, (groups, size) in kinds.items():
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert all(len(group) == size and group == sorted(group) for group in groups)
        for group in groups:
            shared = [layout.coordinates(rank)._replace(**dict.fromkeys(axes, 0)) for rank in group]
            assert len(set(shared)) == 1


def test_eight_ranks_by_hand() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    assert layout.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.pipeline_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.expert_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@given(st.integers(0, 200), st.integers(1, 20))
def test_an_even_split_covers_everything_in_order_and_is_even(count: int, parts: int) -> None:
    split = split_evenly(count, parts)
    assert [i for part in split for i in part] == list(range(count))
    lengths = [len(part) for part in split]
    assert len(lengths) == parts and lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
