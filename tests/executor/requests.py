"""What the tests ask engines, here and in processes that import nothing heavy: a few prompts of token ids."""

from __future__ import annotations

from course_lib import LLM, LLMEngine, SamplingParams

PROMPTS = [[3 + i, 4, 5, 6, 7, 8, 9 + 2 * i][: 4 + i] for i in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
SAMPLED = SamplingParams(temperature=1, max_tokens=10, ignore_eos=True, detokenize=False)


def tokens(engine: LLM | LLMEngine, params: SamplingParams = GREEDY) -> list[list[int]]:
    """The engine's answers to `PROMPTS`."""
    engine = engine.llm_engine if isinstance(engine, LLM) else engine
    answers: dict[str, list[int]] = {}
    try:
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            answers |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step()}
    finally:
        engine.abort_request(str(number) for number in range(len(PROMPTS)))
    return [answers[str(number)] for number in range(len(PROMPTS))]
