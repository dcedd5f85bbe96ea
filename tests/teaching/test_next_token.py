"""The next-token explorer shows what the sampler would do."""

from __future__ import annotations

import torch

from course_lib.teaching.explorers.next_token import NUM_BARS, describe_next_token, draw_next_token, truncate


class Words:
    def decode(self, ids: list[int]) -> str:
        return f"w{ids[0]}"


LOGITS = torch.linspace(4, 0, 30)


def test_truncation_is_the_samplers() -> None:
    shape = truncate(LOGITS, Words(), temperature=1.0, top_k=3, top_p=1.0)
    assert shape.num_kept == 3 and shape.texts[:3] == ["'w0'", "'w1'", "'w2'"]
    assert abs(sum(shape.kept) - 1) < 1e-5 and shape.kept[3] == 0 and shape.full[3] > 0
    assert len(shape.full) == NUM_BARS


def test_a_low_temperature_and_a_small_p_leave_one() -> None:
    shape = truncate(LOGITS, Words(), temperature=0.1, top_k=0, top_p=0.05)
    assert describe_next_token(shape).startswith("Only 1 of 30 tokens")


def test_the_logits_are_left_as_they_were() -> None:
    before = LOGITS.clone()
    draw_next_token(truncate(LOGITS, Words(), temperature=0.5, top_k=5, top_p=0.9))
    assert torch.equal(LOGITS, before)
