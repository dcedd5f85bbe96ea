"""The course model in the whole engine against transformers: same logits, same greedy tokens.

Twenty prompts are served together, 64 new tokens each, with a token budget so small that prompts are
computed in chunks beside running requests. transformers then reads prompt and answer in one pass,
without cache or batch: if its best token at each place is the one that the engine chose, then its own
greedy decoding gives the same answer.

About the tolerances: with logits up to 40, float32 leaves transformers' own two attention
implementations, eager and SDPA, up to 1.0e-4 apart on these texts. The engine was measured at most
0.7e-4 from eager on the prompts and 0.9e-4 on the answers.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from course_lib.engine.llm_engine import LLMEngine
from course_lib.engine_args import EngineArgs
from course_lib.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

PROMPT_TOLERANCE, ANSWER_TOLERANCE = 1e-4, 2e-4
NEW_TOKENS = 64
PROMPTS = {
    "plain": "The capital of France is",
    "one-letter": "A",
    "question": "What is the difference between a process and a thread?",
    "story": "Once upon a time, in a village by the sea, there lived a clockmaker who could not sleep.",
    "numbers": "1 1 2 3 5 8 13 21 34 55 89 144",
    "digits": "3.14159265358979323846264338327950288419716939937510",
    "sum": "Compute: 1234567 + 7654321 =",
    "python": "def quicksort(xs: list[int]) -> list[int]:\n    if len(xs) <= 1:\n        return xs\n",
    "c": "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; ++i) {\n",
    "json": '{"name": "Ada", "languages": ["en", "fr"], "born": 1815, "alive": false, "notes": null, "x":',
    "german": "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "russian": "В начале было слово, и слово было у Бога",
    "arabic": "كان يا ما كان في قديم الزمان",
    "hindi": "एक समय की बात है, एक गाँव में",
    "chinese": "人工智能的发展正在改变我们的生活方式。",
    "japanese": "吾輩は猫である。名前はまだ無い。",
    "emoji": "🎉🚀👩‍👩‍👧‍👦 party time!!! 🥳 → ✨ ❤️‍🔥",
    "spaces": "  leading   and \t\t strange \n\n\n   spaces    ",
    "repeated": "ha " * 60,
    "chat": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ),
}


class Served:
    """All prompts through one engine; keeps the hidden state of every token that was computed."""

    def __init__(self, path: str) -> None:
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                dtype="float32",
                device="cpu",
                max_model_len=512,
                max_num_seqs=12,
                max_num_batched_tokens=96,
                enable_prefix_caching=False,  # a cached token would have no hidden state to compare
                kv_cache_memory_bytes=256 << 20,
            )
        )
        self.model = self.engine.core.executor.runner.model
        self.hidden: dict[str, list[torch.Tensor]] = {name: [] for name in PROMPTS}
        self.largest_batch = 0
        self.model.register_forward_hook(self._keep_hidden)
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        for name, prompt in PROMPTS.items():
            self.engine.add_request(name, prompt, params)
        self.token_ids: dict[str, list[int]] = {}
        self.num_prompt_tokens: dict[str, int] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                name, prompt_ids = output.request_id, output.prompt_token_ids
                self.num_prompt_tokens[name] = len(prompt_ids)
                self.token_ids[name] = [*prompt_ids, *output.outputs[0].token_ids]

    def _keep_hidden(self, module: torch.nn.Module, inputs: tuple, hidden: torch.Tensor) -> None:
        scheduled = self.engine.core.last_scheduled.num_scheduled_tokens
        self.largest_batch = max(self.largest_batch, len(scheduled))
        for core_id, rows in zip(scheduled, hidden.split(list(scheduled.values())), strict=True):
            self.hidden[core_id.rpartition("#")[0]].append(rows.clone())  # "name#3" in the core

    @torch.inference_mode()
    def logits(self, name: str) -> torch.Tensor:
        """[prompt + answer - 1, vocab]: the last token of an answer is never fed back."""
        return self.model.compute_logits(torch.cat(self.hidden[name]))


@pytest.fixture(scope="module")
def served(course_model_path) -> Served:
    return Served(str(course_model_path))


@pytest.fixture(scope="module")
def reference(course_model_path):
    return AutoModelForCausalLM.from_pretrained(
        course_model_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_the_engine_really_batched_and_chunked(served):
    assert served.largest_batch > 8
    assert max(len(chunks) for chunks in served.hidden.values()) > NEW_TOKENS, "no prompt came in chunks"
    for name, ids in served.token_ids.items():
        assert len(ids) == served.num_prompt_tokens[name] + NEW_TOKENS


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_greedy_tokens_equal_transformers(name, served, reference):
    ids = served.token_ids[name]
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    ours = served.logits(name)
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().amax(dim=-1)  # per position
    first = served.num_prompt_tokens[name] - 1  # the position whose logits give the first new token
    assert worst[: first + 1].max() < PROMPT_TOLERANCE
    assert worst.max() < ANSWER_TOLERANCE

    best = theirs[first:].topk(2)
    chosen = torch.tensor(ids[first + 1 :])
    clear = best.values[:, 0] - best.values[:, 1] > ANSWER_TOLERANCE  # a near-tie may go either way
    assert clear.sum() >= NEW_TOKENS - 1
    assert torch.equal(best.indices[clear, 0], chosen[clear])
