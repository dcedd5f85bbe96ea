"""How one request wants its tokens chosen, and when it wants to stop.

Owns `SamplingParams`: vLLM's names, order, defaults and meanings. Invariant: after `verify()` (run by
the constructor, and again at submission because scripts change fields of
`llm.get_default_sampling_params()`) every field has its documented type and range, so nothing further
down checks them. What depends on the model (vocabulary size, EOS, tokenizer) waits for `resolve()`.

vLLM: `vllm/sampling_params.py`.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any

from course_lib import sampling_checks as check

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-5  # below this the temperature counts as 0: take the most likely token
MIN_TEMPERATURE = 1e-2  # smaller ones overflow float32 logits
MAX_SEQUENCES = 16384  # vLLM's limit on n
MAX_LOGIT_BIAS = 100.0
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # what torch.Generator.manual_seed takes


class SamplingType(IntEnum):
    """How the next token is drawn."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class RequestOutputKind(Enum):
    """What each `RequestOutput` of a streaming request carries."""

    CUMULATIVE = 0  # the whole output so far
    DELTA = 1  # only what is new
    FINAL_ONLY = 2  # nothing until the request is finished


@dataclass
class SamplingParams:
    """Sampling parameters of a request; field for field vLLM's class of the same name.

    Raises `TypeError` for a wrong type or an unknown name, `ValueError` for a value out of range or
    one that contradicts another; the sentence names the field and the remedy.
    """

    n: int = 1
    """Outputs per prompt."""
    presence_penalty: float = 0.0
    """In [-2, 2]; subtracted once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """In [-2, 2]; subtracted once per occurrence in the output."""
    repetition_penalty: float = 1.0
    """> 0; divides positive and multiplies negative logits of tokens in the prompt or the output."""
    temperature: float = 1.0
    """0 is greedy; (0, 0.01) is raised to 0.01."""
    top_p: float = 1.0
    """In (0, 1]: keep the smallest set of most likely tokens whose probability reaches top_p."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and -1 switch it off."""
    min_p: float = 0.0
    """In [0, 1]: keep tokens at least min_p times as likely as the most likely one."""
    seed: int | None = None
    """Makes the draw repeatable whatever else is in the batch; -1 means None, as in vLLM."""
    stop: str | list[str] | None = None
    """Strings that end the output; cut off from the text unless `include_stop_str_in_output`."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the output (they stay in `token_ids`)."""
    bad_words: list[str] | None = None
    """Words that may not be generated: the last token of each is forbidden after its first ones."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as `max_model_len` allows."""
    min_tokens: int = 0
    """No EOS, stop token or stop string before this many tokens."""
    logprobs: int | None = None
    """Log-probabilities of this many most likely tokens, and of the sampled one; -1: all."""
    prompt_logprobs: int | None = None
    """The same for every prompt token."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable] | None = None
    """`f(output_ids, logits)` or `f(prompt_ids, output_ids, logits)` -> logits of one row [V]."""
    truncate_prompt_tokens: int | None = None
    """Keep only the last so many prompt tokens."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: Any = None
    guided_decoding: Any = None
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; clipped to [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """Every other token is forbidden."""
    extra_args: dict[str, Any] | None = None
    """Carried along unread, for code of your own."""

    # Filled by resolve().
    all_stop_token_ids: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    """What `min_tokens` must mask: `stop_token_ids` and EOS (also under `ignore_eos`, as vLLM)."""
    bad_words_token_ids: list[list[int]] | None = field(default=None, init=False, repr=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        for name in kwargs:
            if name not in _INIT_NAMES:
                raise TypeError(_unknown_argument(name))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.verify()

    @staticmethod
    def from_optional(**kwargs: Any) -> SamplingParams:
        """As the constructor, but None means "the default" for every field (what servers pass on),
        except `max_tokens`, whose None has a meaning of its own."""
        may_be_none = {name for name in _INIT_NAMES if name != "max_tokens"}
        return SamplingParams(**{k: v for k, v in kwargs.items() if v is not None or k not in may_be_none})

    @property
    def sampling_type(self) -> SamplingType:
        if self.temperature < GREEDY_TEMPERATURE:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    def clone(self) -> SamplingParams:
        """A copy that shares nothing mutable, except that callables stay the same objects."""
        return copy.deepcopy(self, {id(f): f for f in self.logits_processors or ()})

    def verify(self) -> None:
        """Check and normalise every field; idempotent. Raises ValueError or TypeError."""
        for name in ("structured_outputs", "guided_decoding"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not supported yet: it comes with the structured-outputs "
                                 "lesson; leave it out (allowed_token_ids can restrict single tokens).")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens",
                     "spaces_between_special_tokens"):
            setattr(self, name, check.boolean(name, getattr(self, name)))
        self._verify_numbers()
        self._verify_lists()
        self._verify_together()

    def _verify_numbers(self) -> None:
        self.n = check.integer("n", self.n, low=1, high=MAX_SEQUENCES)
        for name in ("presence_penalty", "frequency_penalty"):
            setattr(self, name, check.number(name, getattr(self, name), low=-2.0, high=2.0))
        self.repetition_penalty = check.number("repetition_penalty", self.repetition_penalty, above=0.0)
        self.temperature = check.number("temperature", self.temperature, low=0.0)
        self.top_p = check.number("top_p", self.top_p, above=0.0, high=1.0)
        self.top_k = check.integer("top_k", self.top_k, low=-1, note=" (0 or -1 switches it off)")
        self.min_p = check.number("min_p", self.min_p, low=0.0, high=1.0)
        if self.seed is not None:
            self.seed = check.integer("seed", self.seed, low=MIN_SEED, high=MAX_SEED)
            if self.seed == -1:
                self.seed = None
        if self.max_tokens is not None:
            self.max_tokens = check.integer("max_tokens", self.max_tokens, low=1,
                                            note=" (None: as many as the context allows)")
        self.min_tokens = check.integer("min_tokens", self.min_tokens, low=0)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is True:  # vLLM takes it as 1
                value = 1
            if value is not None:
                value = check.integer(name, value, low=-1, note=" (-1: the whole vocabulary; None: none)")
            setattr(self, name, value)
        if self.truncate_prompt_tokens is not None:
            self.truncate_prompt_tokens = check.integer(
                "truncate_prompt_tokens", self.truncate_prompt_tokens, low=1)

    def _verify_lists(self) -> None:
        self.stop = check.strings("stop", self.stop)
        self.bad_words = check.strings("bad_words", self.bad_words)
        self.stop_token_ids = check.token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check.token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty, so no token could be generated; "
                                 "list at least one id, or pass None to allow all.")
        if self.logit_bias is not None:
            self.logit_bias = check.logit_bias(self.logit_bias, MAX_LOGIT_BIAS)
        if self.logits_processors is not None:
            self.logits_processors = check.callables("logits_processors", self.logits_processors)
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise TypeError(f"extra_args must be a dict, got {type(self.extra_args).__name__}.")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError("output_kind must be a RequestOutputKind, for example "
                            f"RequestOutputKind.DELTA, got {self.output_kind!r}.")

    def _verify_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must be at most max_tokens "
                             f"({self.max_tokens}); raise max_tokens.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are searched in the text, so they need detokenize=True; "
                             "use stop_token_ids to stop without detokenizing.")
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed ({self.seed}) must be at most {MAX_SEED - self.n + 1} when n={self.n}, "
                             "because output i uses seed + i.")
        if self.temperature < GREEDY_TEMPERATURE:
            if self.n > 1:
                raise ValueError(f"n must be 1 when using greedy sampling (temperature=0), got n={self.n}: "
                                 "all outputs would be equal; raise the temperature.")
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s: smaller values overflow float32 logits. "
                           "Use 0 for greedy sampling.", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE

    def resolve(self, vocab_size: int, eos_token_ids: Iterable[int], tokenizer: Any = None,
                max_logprobs: int = 20) -> None:
        """Check against the model and fill the derived fields; call it on a `clone()`.

        `tokenizer` (Hugging Face) is needed for `bad_words` and `stop` only. `max_logprobs` is the
        engine's limit, -1 for none. Raises ValueError.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            outside = [t for t in getattr(self, name) or () if t >= vocab_size]
            if outside:
                raise ValueError(f"{name} has token ids outside the vocabulary: {outside[:8]}; "
                                 f"ids of this model are 0 to {vocab_size - 1}.")
        if self.top_k >= vocab_size:
            self.top_k = 0
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            wanted = vocab_size if value == -1 else value or 0
            if wanted > limit:
                raise ValueError(f"{name}={value} asks for {wanted} log-probabilities per token, more than "
                                 f"max_logprobs={max_logprobs}; ask for fewer, or construct the engine "
                                 "with a larger max_logprobs (-1: no limit).")
        if tokenizer is None and (self.stop or self.bad_words):
            name = "stop" if self.stop else "bad_words"
            raise ValueError(f"{name} needs a tokenizer, and this engine has none; use token ids instead.")
        self.all_stop_token_ids = frozenset(self.stop_token_ids) | frozenset(eos_token_ids)
        self.bad_words_token_ids = check.tokenize_bad_words(self.bad_words, tokenizer, vocab_size)
        self._refuse_nothing_left()

    def _refuse_nothing_left(self) -> None:
        """`allowed_token_ids` of which other fields forbid every one."""
        if self.allowed_token_ids is None:
            return
        forbidden = {words[0] for words in self.bad_words_token_ids or () if len(words) == 1}
        if self.min_tokens > 0:
            forbidden |= self.all_stop_token_ids
        if forbidden.issuperset(self.allowed_token_ids):
            raise ValueError("allowed_token_ids leaves no token: bad_words or min_tokens (which forbids EOS "
                             "and stop tokens at first) forbid all of them; allow at least one other id.")


_INIT_NAMES = tuple(f.name for f in fields(SamplingParams) if f.init)


def _unknown_argument(name: str) -> str:
    near = difflib.get_close_matches(name, _INIT_NAMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" It takes: {', '.join(_INIT_NAMES)}."
    if name == "best_of":
        hint = " Ask for n outputs and choose among them by cumulative_logprob."
    return f"SamplingParams has no argument {name!r}.{hint}"
