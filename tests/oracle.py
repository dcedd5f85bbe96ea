"""The oracle: what a request must produce, computed in the most obvious way there is.

One request at a time, the whole sequence recomputed by `transformers` for every token, no cache, no
batch, no scheduler. It shares no model or attention code with the engine; only the final draw of a
seeded request uses the engine's `draw`, because both must consume the same random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from course_lib.sampling.draw import draw

# Scores closer than this may be ordered differently by another order of float32 additions.
NEAR_TIE = 1e-4


@dataclass
class OracleOutput:
    """`token_ids` are certain up to `certain`; from there on a near-tie allows another continuation."""

    token_ids: list[int]
    finish_reason: str
    certain: int

    def agrees(self, token_ids: list[int], finish_reason: str | None) -> bool:
        """Whether an engine's output is right, given what near-ties allow."""
        if self.certain < len(self.token_ids):
            return token_ids[: self.certain] == self.token_ids[: self.certain]
        return token_ids == self.token_ids and finish_reason == self.finish_reason


class Oracle:
    """Args:
    path: Hugging Face folder.
    max_model_len: sequences end here.
    """

    def __init__(self, path: str, max_model_len: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.max_model_len = max_model_len
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[V] float32: the scores of the token after `token_ids`."""
        key = tuple(token_ids)
        if key not in self._logits:
            self._logits[key] = self.model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
        return self._logits[key]

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """[P - 1] float32: log-probability of each prompt token after the first."""
        rows = torch.log_softmax(self.model(torch.tensor([token_ids]), use_cache=False).logits[0], dim=-1)
        return rows[:-1].gather(1, torch.tensor(token_ids[1:])[:, None]).squeeze(1)

    def generate(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        stop_token_ids: tuple[int, ...] = (),
        eos_token_id: int | None = None,
        min_tokens: int = 0,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> OracleOutput:
        """Greedy at temperature 0, otherwise seeded sampling."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        stops = {*stop_token_ids} | ({eos_token_id} if eos_token_id is not None else set())
        tokens = list(prompt)
        certain: int | None = None
        while True:
            output = tokens[len(prompt) :]
            logits = self.logits(tokens).clone()
            if len(output) < min_tokens:
                logits[list(stops)] = float("-inf")
            if temperature == 0:
                scores, token = logits, int(logits.argmax())
            else:
                probs = torch.softmax(logits / temperature, dim=-1)
                before = generator.get_state()
                token = int(draw(probs[None], {0: generator}, generator)[0])
                scores = self._draw_scores(probs, generator, before)
            top = scores.topk(2).values
            if certain is None and float(top[0] - top[1]) < NEAR_TIE:
                certain = len(output)
            tokens.append(token)
            output = tokens[len(prompt) :]
            reason = None
            if len(output) >= min_tokens and token in stops:
                reason = "stop"
            elif len(output) >= max_tokens or len(tokens) >= self.max_model_len:
                reason = "length"
            if reason is not None:
                return OracleOutput(output, reason, len(output) if certain is None else certain)

    @staticmethod
    def _draw_scores(probs: torch.Tensor, generator: torch.Generator, before: torch.Tensor) -> torch.Tensor:
        """How clearly a draw was decided: the same noise on slightly different probabilities must give
        the same token. Returns two scores whose difference is large if it does and zero if not."""
        after = generator.get_state()
        winners = set()
        for sign in (-1.0, 0.0, 1.0):
            generator.set_state(before)
            wobble = 1 + sign * NEAR_TIE * torch.linspace(-1, 1, probs.numel())
            winners.add(int(draw((probs * wobble)[None], {0: generator}, generator)[0]))
        generator.set_state(after)
        return torch.tensor([1.0, 0.0]) if len(winners) == 1 else torch.tensor([0.0, 0.0])
