"""SamplingParams: defaults, rules, errors that name the field, and what depends on the model."""

from __future__ import annotations

import logging
import math
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from course_lib.sampling_params import RequestOutputKind, SamplingParams, SamplingType

VLLM_DEFAULTS = dict(
    n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0, top_p=1.0,
    top_k=0, min_p=0.0, seed=None, stop=[], stop_token_ids=[], bad_words=[], include_stop_str_in_output=False,
    ignore_eos=False, max_tokens=16, min_tokens=0, logprobs=None, prompt_logprobs=None, detokenize=True,
    skip_special_tokens=True, spaces_between_special_tokens=True, logits_processors=None,
    truncate_prompt_tokens=None, output_kind=RequestOutputKind.CUMULATIVE, structured_outputs=None,
    guided_decoding=None, logit_bias=None, allowed_token_ids=None, extra_args=None,
)


def test_names_order_and_defaults() -> None:
    params = SamplingParams()
    names = [f.name for f in fields(SamplingParams) if f.init]
    assert names == list(VLLM_DEFAULTS)
    assert {name: getattr(params, name) for name in names} == VLLM_DEFAULTS
    assert SamplingParams(2, 0.1, 0.2, 1.1, 0.8) == SamplingParams(
        n=2, presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.1, temperature=0.8)


NAN, INF = math.nan, math.inf
BAD_VALUES = [
    ("n", [0, -1, 20_000]), ("presence_penalty", [-2.1, 2.1, NAN]), ("frequency_penalty", [-2.1, 2.1, -INF]),
    ("repetition_penalty", [0, -1.0, NAN, INF]), ("temperature", [-0.1, NAN, INF, 1e39, 10**400]),
    ("top_p", [0, -0.5, 1.01, NAN]), ("top_k", [-2]), ("min_p", [-0.1, 1.1, NAN]),
    ("seed", [2**64, -(2**63) - 1]), ("stop", ["", ["a", ""]]), ("stop_token_ids", [[-1]]),
    ("bad_words", [[""], [" "]]), ("max_tokens", [0, -1]),
    ("min_tokens", [-1]), ("logprobs", [-2]), ("prompt_logprobs", [-2]), ("truncate_prompt_tokens", [0]),
    ("logit_bias", [{1: NAN}, {1: INF}, {-1: 0.0}, {"1": 0.0, 1: 1.0}]), ("allowed_token_ids", [[], [-1]]),
    ("structured_outputs", [{}]), ("guided_decoding", [{"regex": "a"}]),
]
BAD_TYPES = [
    ("n", [1.0, True, "1", None]), ("presence_penalty", ["0", None, True]), ("repetition_penalty", [[1.0]]),
    ("temperature", ["0.5", None, True, 1j]), ("top_p", [None]), ("top_k", [1.5, True, 3.0]),
    ("min_p", ["x"]), ("seed", [1.0, "7", True]), ("stop", [1, [1], {"a": 1}, [None]]),
    ("stop_token_ids", [5, "5", ["5"], [1.0], [True]]), ("bad_words", [7, [7]]), ("max_tokens", [16.0, True]),
    ("min_tokens", [None]), ("logprobs", [False, 1.0, "2"]),
    ("logit_bias", [[1], {"x": 1.0}, {1.5: 1.0}, {1: "2"}, {True: 1.0}]), ("allowed_token_ids", [3, {3: 1}]),
    ("logits_processors", [len, [1], "f"]), ("output_kind", ["delta", 1, None]),
    ("detokenize", [1, None, "yes"]),
    ("ignore_eos", [0]), ("extra_args", [[1]]), ("truncate_prompt_tokens", [1.0]),
]


@pytest.mark.parametrize(("name", "value", "error"), [
    *((name, value, ValueError) for name, values in BAD_VALUES for value in values),
    *((name, value, TypeError) for name, values in BAD_TYPES for value in values),
])
def test_bad_values_name_the_field(name: str, value: object, error: type) -> None:
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})
    params = SamplingParams()
    setattr(params, name, value)  # scripts change get_default_sampling_params(): checked at submission
    with pytest.raises(error, match=name):
        params.verify()


@pytest.mark.parametrize(("values", "message"), [
    (dict(min_tokens=5, max_tokens=4), "min_tokens.*max_tokens"),
    (dict(stop="x", detokenize=False), "stop.*detokenize=True"),
    (dict(n=2, temperature=0), "n must be 1 when using greedy"),
    (dict(n=3, seed=2**64 - 2), "seed"),
])
def test_contradictions(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_unknown_names() -> None:
    for call in (SamplingParams, SamplingParams.from_optional):
        with pytest.raises(TypeError, match="'temprature'.*Did you mean 'temperature'"):
            call(temprature=1.0)
        with pytest.raises(TypeError, match="'beams'.*It takes: n, "):
            call(beams=None)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_numpy_scalars_become_plain() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(7), max_tokens=np.int32(3), seed=np.uint8(9),
        stop_token_ids=np.array([4, 4, 2]), logit_bias={np.int64(3): np.float64(1)},
        ignore_eos=np.bool_(True))
    for value in (params.temperature, params.top_k, params.max_tokens, params.seed, *params.stop_token_ids,
                  *params.logit_bias, *params.logit_bias.values(), params.ignore_eos):
        assert type(value) in (int, float, bool)
    assert (params.top_k, params.stop_token_ids, params.logit_bias) == (7, [4, 2], {3: 1.0})
    with pytest.raises(TypeError, match="temperature"):
        SamplingParams(temperature=torch.tensor(0.5))


def test_temperature_rules(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "0.001" in caplog.text and "0.01" in caplog.text
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=5, min_p=0.1, seed=3)
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)
    assert greedy.sampling_type is SamplingType.GREEDY
    assert SamplingParams(temperature=1e-6).sampling_type is SamplingType.GREEDY
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED
    assert SamplingParams(seed=-1).seed is None


def test_normalisation() -> None:
    params = SamplingParams(stop="a", bad_words=["x", "x"], logit_bias={"5": 1000, 6: -1000}, logprobs=True)
    assert (params.stop, params.bad_words) == (["a"], ["x"])
    assert params.logit_bias == {5: 100.0, 6: -100.0}
    assert params.logprobs == 1
    absent = SamplingParams.from_optional(temperature=None, top_k=None, stop=None, max_tokens=None)
    assert absent == SamplingParams(max_tokens=None)


def test_clone_shares_nothing_but_callables() -> None:
    class Processor:
        def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            return logits

    processor = Processor()
    params = SamplingParams(
        stop=["a"], logit_bias={1: 2.0}, logits_processors=[processor], extra_args={"k": [1]})
    twin = params.clone()
    assert twin == params and twin is not params
    assert twin.logits_processors[0] is processor
    twin.stop.append("b")
    twin.extra_args["k"].append(2)
    twin.logit_bias.clear()
    twin.logits_processors.clear()
    assert (params.stop, params.logit_bias, params.extra_args) == (["a"], {1: 2.0}, {"k": [1]})
    assert len(params.logits_processors) == 1
    plain = SamplingParams(seed=4, stop="x")
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert "seed=4" in repr(plain) and "stop=['x']" in repr(plain)


def _resolve(tokenizer: object = None, max_logprobs: int = 20, **values: object) -> SamplingParams:
    params = SamplingParams(**values)
    params.resolve(100, [2, 3], tokenizer, max_logprobs)
    return params


def test_resolve_against_the_model() -> None:
    for name, value in (("stop_token_ids", [100]), ("allowed_token_ids", [1, 100]),
                        ("logit_bias", {100: 1.0})):
        with pytest.raises(ValueError, match=f"{name}.*100.*0 to 99"):
            _resolve(**{name: value})
    for name in ("logprobs", "prompt_logprobs"):
        assert getattr(_resolve(**{name: 20}), name) == 20
        assert getattr(_resolve(max_logprobs=-1, **{name: -1}), name) == -1
        for value in (21, -1):
            with pytest.raises(ValueError, match=f"{name}={value}.*max_logprobs=20"):
                _resolve(**{name: value})
    assert _resolve(stop_token_ids=[7]).all_stop_token_ids == frozenset({2, 3, 7})
    assert _resolve(ignore_eos=True).all_stop_token_ids == frozenset({2, 3})
    assert _resolve(top_k=10**12).top_k == 0
    for name in ("stop", "bad_words"):
        with pytest.raises(ValueError, match=f"{name} needs a tokenizer"):
            _resolve(**{name: ["x"]})
    for values in (dict(allowed_token_ids=[2, 3], min_tokens=1),
                   dict(allowed_token_ids=[2, 7], stop_token_ids=[7], min_tokens=1)):
        with pytest.raises(ValueError, match="allowed_token_ids leaves no token"):
            _resolve(**values)
    assert _resolve(allowed_token_ids=[2, 3]).allowed_token_ids == [2, 3]


def test_bad_words_in_two_variants(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    """A word is forbidden at the start of a text and after a space; " the" is one token of its own."""
    def resolve(*words: str) -> list[list[int]]:
        params = SamplingParams(bad_words=list(words))
        params.resolve(len(byte_level_tokenizer), [], byte_level_tokenizer)
        return params.bad_words_token_ids

    def ids(text: str) -> list[int]:
        return byte_level_tokenizer.encode(text, add_special_tokens=False)

    assert len(ids(" hello")) == len(ids("hello")) and ids(" hello") != ids("hello")
    assert resolve("hello") == resolve(" hello") == [ids("hello"), ids(" hello")]
    # " 你" starts with a bare space token: forbidding that way would forbid another length of sequence.
    assert len(ids(" 你")) != len(ids("你"))
    assert resolve("你") == [ids("你")]
    with pytest.raises(ValueError, match="bad_words.*outside the model's vocabulary"):
        SamplingParams(bad_words=["hello"]).resolve(10, [], byte_level_tokenizer)
