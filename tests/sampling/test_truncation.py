"""min-p, top-k and top-p masks against brute force, ties and every path included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.sampling import blocks, topk_topp
from course_lib.sampling.topk_topp import apply_top_k_top_p
from tests.sampling.reference import generator, kept_tokens

NEG_INF = -math.inf
# Few distinct values: ties everywhere, as bfloat16 logits have them.
LOGITS = st.lists(st.sampled_from([NEG_INF, -3.0, -1.5, -1.25, 0.0, 0.5, 0.75, 1.0, 4.0]),
                  min_size=2, max_size=40).filter(lambda row: max(row) > NEG_INF)
ROW = st.tuples(LOGITS, st.integers(-1, 45), st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
                st.one_of(st.just(0.0), st.floats(0.0, 1.0)))


def _kept(row: torch.Tensor) -> set[int]:
    return set((row > NEG_INF).nonzero().squeeze(1).tolist())


def _apply(rows: list[tuple]) -> torch.Tensor:
    width = max(len(row[0]) for row in rows)
    logits = torch.tensor([row[0] + [NEG_INF] * (width - len(row[0])) for row in rows])
    k, p, m = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 3))
    out = apply_top_k_top_p(logits.clone(), k.int(), p.float(), m.float())
    assert bool(((out == logits) | (out == NEG_INF)).all()), "a kept logit was changed"
    return out


@pytest.mark.parametrize("width", [1, 3, 8, 99], ids=["1", "3", "8", "full sort"])
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_masks_equal_brute_force(width: int, rows: list[tuple]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_topp, "PREFIX_WIDTH", width)
        out = _apply(rows)
    for (logits, k, p, m), got in zip(rows, out, strict=True):
        top_p = float(torch.tensor(p))  # as float32 holds it
        # A border that hits p (or min_p) to the last bit may fall either way.
        least = kept_tokens(logits, k, max(top_p - 1e-6, 1e-9) if top_p < 1 else 1.0, min(m + 1e-6, 1.0))
        most = kept_tokens(logits, k, top_p + 1e-6 if top_p < 1 else 1.0, max(m - 1e-6, 0.0))
        if len(least) < len(most):
            assert _kept(got) <= most
        else:
            assert _kept(got) == least == most


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_full_sort_of_other_devices_agrees(rows: list[tuple]) -> None:
    """What a GPU does with wide rows: one full sort. Equal but for borders hit to the last bit."""
    width = max(len(row[0]) for row in rows)
    for logits, k, p, m in rows:
        x = torch.tensor([logits + [NEG_INF] * (width - len(logits))])
        k_row = torch.tensor([k if 0 < k < width else width])
        p_row, m_row = torch.tensor([p]), torch.tensor([m])
        ids, values, complete = topk_topp._judge(x, k_row, p_row, m_row, width)
        sorted_way = torch.full_like(x, NEG_INF).scatter_(1, ids, values)
        other_way = topk_topp._truncate_row(x[0], int(k_row), float(p_row), float(m_row))
        assert bool(complete.all())
        if not torch.equal(sorted_way[0], other_way):
            few = kept_tokens(logits, k, max(p - 1e-6, 1e-9) if p < 1 else 1.0, min(m + 1e-6, 1.0))
            assert few < kept_tokens(logits, k, p + 1e-6 if p < 1 else 1.0, max(m - 1e-6, 0.0))


def test_examples_worked_by_hand() -> None:
    log = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    cases = [
        (log, 0, 0.7, 0.0, {0, 1}),  # reaches 0.7 with two
        (log, 0, 0.71, 0.0, {0, 1, 2}),
        (log, 0, 0.01, 0.0, {0}),  # always at least one
        (log, 2, 0.57, 0.0, {0}),  # 0.4 / 0.7 = 0.571: top-p counts within top-k
        (log, 2, 0.58, 0.0, {0, 1}),
        (log, 0, 1.0, 0.5, {0, 1, 2}),
        (log, 1, 1.0, 0.0, {0}),
        ([1.0, 2.0, 2.0, 2.0], 2, 1.0, 0.0, {1, 2, 3}),  # vLLM keeps every tie of the k-th
        ([2.0, 2.0, 2.0, 2.0], 0, 0.5, 0.0, {0, 1}),  # top-p cuts ties, lower ids first
        (log, -1, 1.0, 0.0, {0, 1, 2, 3}),
        (log, 99, 1.0, 0.0, {0, 1, 2, 3}),
    ]
    out = _apply([case[:4] for case in cases])
    for case, row in zip(cases, out, strict=True):
        assert _kept(row) == case[4], case


def test_narrow_and_wide_nuclei() -> None:
    """Nuclei of 10, 500, 5,000 and 20,000 of 40,000 tokens, in one call: both ways of judging."""
    vocab, sizes = 40_000, (10, 500, 5_000, 20_000)
    logits = torch.full((4, vocab), -20.0)
    order = torch.randperm(vocab, generator=generator())
    for row, size in enumerate(sizes):
        logits[row, order[:size]] = torch.linspace(5.0, 4.0, size)
    out = apply_top_k_top_p(logits.clone(), None, torch.full((4,), 0.999))
    for row, size in enumerate(sizes):
        assert 0.99 * size <= len(_kept(out[row])) <= size
        assert len(_kept(out[row])) == len(kept_tokens(logits[row].tolist(), top_p=0.999))


@pytest.mark.parametrize("vocab", [5, 127, 128, 129, 1000, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_reductions_equal_torch(vocab: int, dtype: torch.dtype) -> None:
    x = torch.randn(6, vocab, generator=generator(vocab)).to(dtype)  # bfloat16: many ties
    x[1] = 1.0
    x[2] = NEG_INF
    x[3, :-1] = NEG_INF
    assert blocks.argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()]
    k = min(20, vocab)
    values, ids = blocks.topk(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids[[0, 1, 3, 4, 5]].tolist())


def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has power: without the check of what lies beyond the prefix it fails."""
    monkeypatch.setattr(topk_topp, "PREFIX_WIDTH", 3)
    right = topk_topp._judge

    def overconfident(*args: object) -> tuple:
        ids, values, complete = right(*args)
        return ids, values, torch.ones_like(complete)

    monkeypatch.setattr(topk_topp, "_judge", overconfident)
    out = _apply([([0.0] * 10, 0, 0.5, 0.0)])
    assert _kept(out[0]) != kept_tokens([0.0] * 10, top_p=0.5)
