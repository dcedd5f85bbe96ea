"""A generator is brought to where a number of draws would have left it."""

from __future__ import annotations

import pytest
import torch

from course_lib.sampling.draw import draw, skip_draws


@pytest.mark.parametrize("vocab", [61, 128, 1000])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_skipped_draws_leave_the_generator_where_draws_do(vocab: int, count: int) -> None:
    probs = torch.rand(3, vocab, generator=torch.Generator().manual_seed(0))

    def draws(generator: torch.Generator, number: int) -> list[int]:
        others = torch.Generator().manual_seed(1)  # of the rows beside it
        return [int(draw(probs.clone(), {1: generator}, others)[1]) for _ in range(number)]

    every = draws(torch.Generator().manual_seed(5), count + 20)
    late = torch.Generator().manual_seed(5)
    skip_draws(late, vocab, count)
    assert draws(late, 20) == every[count:]
