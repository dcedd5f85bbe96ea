"""What the user reads: log-probabilities per position, and the result classes."""

from __future__ import annotations

import copy
import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from course_lib.core.messages import LogprobsLists
from course_lib.engine.logprobs import LogprobsProcessor
from course_lib.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from course_lib.sampling_params import SamplingParams

LISTS = LogprobsLists(
    token_ids=[[7, 5, 6, 7], [9, 5, 6, 7]],
    logprobs=[[-2.0, -0.5, -1.0, -2.0], [-5.0, -0.25, -1.5, -3.0]],
    ranks=[3, 12],
)


def rows(start: int, end: int) -> LogprobsLists:
    """Some rows of LISTS, as one step delivers them."""
    return LogprobsLists(LISTS.token_ids[start:end], LISTS.logprobs[start:end], LISTS.ranks[start:end])


def _values(position: dict[int, Logprob]) -> dict[int, tuple[float, int | None]]:
    return {token: (entry.logprob, entry.rank) for token, entry in position.items()}


@pytest.mark.parametrize(("asked", "wanted"), [
    (0, [{7: (-2.0, 3)}, {9: (-5.0, 12)}]),
    (1, [{7: (-2.0, 3), 5: (-0.5, 1)}, {9: (-5.0, 12), 5: (-0.25, 1)}]),  # the batch carried 3
    (3, [{7: (-2.0, 3), 5: (-0.5, 1), 6: (-1.0, 2)},
         {9: (-5.0, 12), 5: (-0.25, 1), 6: (-1.5, 2), 7: (-3.0, 3)}]),
    (-1, [{7: (-2.0, 3), 5: (-0.5, 1), 6: (-1.0, 2)},
          {9: (-5.0, 12), 5: (-0.25, 1), 6: (-1.5, 2), 7: (-3.0, 3)}]),
])
def test_positions(asked: int, wanted: list[dict]) -> None:
    processor = LogprobsProcessor(None, asked, None)
    processor.update_from_sample(rows(0, 1))
    assert processor.cumulative_logprob == -2.0
    processor.update_from_sample(rows(1, 2))
    assert [_values(position) for position in processor.logprobs] == wanted
    assert [list(position)[0] for position in processor.logprobs] == [7, 9]
    assert processor.cumulative_logprob == -7.0
    assert processor.prompt_logprobs is None
    processor.truncate(1)
    assert len(processor.logprobs) == 1 and processor.cumulative_logprob == -2.0


def test_prompt_positions_in_chunks() -> None:
    processor = LogprobsProcessor(None, None, 2)
    processor.update_from_prompt(rows(0, 1))
    processor.update_from_prompt(rows(1, 2))
    assert processor.prompt_logprobs[0] is None and len(processor.prompt_logprobs) == 3
    assert _values(processor.prompt_logprobs[2]) == {9: (-5.0, 12), 5: (-0.25, 1), 6: (-1.5, 2)}
    assert processor.logprobs is None and processor.cumulative_logprob is None
    assert len(processor.take_prompt_logprobs()) == 3 and processor.take_prompt_logprobs() == []


def test_not_asked_for_is_ignored() -> None:
    processor = LogprobsProcessor(None, None, None)
    processor.update_from_sample(LISTS)
    processor.update_from_prompt(LISTS)
    assert (processor.logprobs, processor.prompt_logprobs, processor.cumulative_logprob) == (None, None, None)
    assert processor.take_prompt_logprobs() is None


def test_decoded_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokens read as text with their leading space; half a character as the vocabulary's piece."""
    the = tokenizer.encode("hello the", add_special_tokens=False)[-1]
    special = tokenizer.eos_token_id
    half = next(i for p, i in tokenizer.get_vocab().items() if p in ("<0xE2>", "â"))
    lists = LogprobsLists([[the, special, half]], [[-1.0, -2.0, -3.0]], [1])
    for detokenize in (True, False):
        params = SamplingParams(logprobs=3, detokenize=detokenize)
        processor = LogprobsProcessor.from_request(tokenizer, params)
        processor.update_from_sample(lists)
        decoded = [entry.decoded_token for entry in processor.logprobs[0].values()]
        piece = tokenizer.convert_ids_to_tokens(half)
        assert decoded == ([" the", "</s>", piece] if detokenize else [None] * 3)


def _output(**changes: object) -> RequestOutput:
    completion = dict(index=0, text=" Paris", token_ids=[7], cumulative_logprob=-0.5,
                      logprobs=[{7: Logprob(-0.5, 1, " Paris")}], finish_reason=None) | changes
    return RequestOutput("3", "The capital", [1, 2], None, [CompletionOutput(**completion)],
                         completion["finish_reason"] is not None, RequestMetrics(arrival_time=1.0),
                         num_cached_tokens=0)


def test_outputs_read_compare_copy_and_pickle() -> None:
    output = _output()
    text = repr(output)
    for part in ("RequestOutput(request_id='3'", "prompt='The capital'", "prompt_token_ids=[1, 2]",
                 "CompletionOutput(index=0, text=' Paris', token_ids=[7]", "Logprob(logprob=-0.5, rank=1",
                 "finish_reason=None", "num_cached_tokens=0"):
        assert part in text
    assert pickle.loads(pickle.dumps(output)) == output == copy.deepcopy(output)
    assert not output.outputs[0].finished() and _output(finish_reason="stop").outputs[0].finished()


def test_merging_what_a_slow_consumer_missed() -> None:
    later = _output(text=", of", token_ids=[8, 9], cumulative_logprob=-2.0, finish_reason="length",
                    logprobs=[{8: Logprob(-1.0)}, {9: Logprob(-0.5)}])
    merged = _output()
    merged.add(copy.deepcopy(later), aggregate=True)
    completion = merged.outputs[0]
    assert (completion.text, completion.token_ids) == (" Paris, of", [7, 8, 9])
    assert len(completion.logprobs) == 3 and completion.cumulative_logprob == -2.0
    assert merged.finished and completion.finish_reason == "length"
    replaced = _output()
    replaced.add(later, aggregate=False)
    assert replaced.outputs == later.outputs
    second = _output(index=1)
    second.add(later, aggregate=True)
    assert [o.index for o in second.outputs] == [1, 0]
