"""Lesson 01, Basic: what its exercises ask, how answers are judged, which mistakes people make."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from course_lib.teaching.checking.counting import count_torch_calls
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

# ---- questions ----------------------------------------------------------------------------------

recomputed = Question(
    "01.a",
    "A plain loop writes 500 tokens. For each one it runs the model on everything written so far, from the "
    "first token. Of all the positions the model computes, which share had it computed before?",
    [
        Choice(
            "about half",
            "Half is the share of the 500 × 500 square that a loop fills. The question is how much of the filled "
            "part is new, and that is one position per token.",
        ),
        Choice(
            "about 90 %",
            "That would be the answer for 19 tokens. The share of repeated work grows with the length.",
        ),
        Choice(
            "more than 99 %",
            "It computes 1 + 2 + … + 500 = 125,250 positions, and 500 of them are new: 99.6 % is repetition.",
            right=True,
        ),
    ],
)

memory_bound = Question(
    "01.b",
    "With the cache, one step computes 1 position instead of 512. How much faster will the step be on this machine?",
    [
        Choice(
            "about 512 times",
            "That would be true if time went into arithmetic. One position still needs every weight of the model, "
            "and fetching those from memory takes as long for 1 position as for 10.",
        ),
        Choice(
            "5 to 100 times",
            "The arithmetic shrinks 512 times, but every weight must still be read from memory once per step. What "
            "remains is mostly that read, and a fixed cost per layer.",
            right=True,
        ),
        Choice(
            "less than 3 times",
            "Attention over the 511 cached positions is cheap here: each layer reads less than a megabyte of "
            "cache beside 14 megabytes of weights.",
        ),
    ],
)

# ---- 01.1 how large is the cache? ---------------------------------------------------------------

cache_bytes = Exercise(
    "01.1",
    "The size of a KV cache",
    target="course_lib.config:ModelConfig.kv_bytes_per_token",
    stars=1,
    minutes=5,
    importance="core",
    hints=(
        "What does one layer keep for one token? Look at the shape you printed above: [1, 3, 5, 64].",
        "Per token and layer: one key and one value, each num_kv_heads x head_dim numbers. The query heads keep nothing.",
        "2 * num_layers * num_kv_heads * head_dim numbers per token, times num_tokens, times bytes_per_number.",
    ),
)


@cache_bytes.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("SmolLM2-135M, one token, float32", 1, 30, 9, 3, 64, 4)
    yield Case("SmolLM2-135M, one block of 16 tokens, float32", 16, 30, 9, 3, 64, 4)
    yield Case("Llama-3.1-8B, 8,192 tokens, bfloat16", 8192, 32, 32, 8, 128, 2)
    for _ in range(5):
        kv_heads = rng.randint(1, 8)
        sizes = (rng.randint(1, 40), kv_heads * rng.randint(2, 5), kv_heads, rng.choice((64, 80, 128)))
        yield Case("a random model", rng.randint(1, 5000), *sizes, rng.choice((1, 2, 4)))


@cache_bytes.expected
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    dtype = {1: torch.int8, 2: torch.float16, 4: torch.float32}[bytes_per_number]
    return sum(
        torch.empty(num_tokens, num_kv_heads, head_dim, dtype=dtype, device="meta").nbytes
        for _ in range(num_layers)
        for _ in ("keys", "values")
    )


@cache_bytes.mistake(
    "keys-only", "You count one tensor per layer. A layer keeps two: the keys and the values."
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return num_tokens * num_layers * num_kv_heads * head_dim * bytes_per_number


@cache_bytes.mistake(
    "query-heads",
    "You count the query heads. Only keys and values are kept, and there are num_kv_heads of those: several query "
    "heads share one (grouped-query attention), which is the point of having fewer.",
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 2 * num_tokens * num_layers * num_heads * head_dim * bytes_per_number


@cache_bytes.mistake(
    "one-layer", "That is one layer's share. Every layer has keys and values of its own."
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 2 * num_tokens * num_kv_heads * head_dim * bytes_per_number


@cache_bytes.mistake(
    "numbers-not-bytes", "That is how many numbers the cache holds. Each takes bytes_per_number bytes."
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 2 * num_tokens * num_layers * num_kv_heads * head_dim


@cache_bytes.mistake(
    "bits", "That is in bits: bytes_per_number already counts bytes, so there is nothing to multiply by 8."
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 16 * num_tokens * num_layers * num_kv_heads * head_dim * bytes_per_number


@cache_bytes.mistake("kibibytes", "That is in KiB. The engine counts bytes: leave out the division by 1,024.")
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 2 * num_tokens * num_layers * num_kv_heads * head_dim * bytes_per_number // 1024


@cache_bytes.mistake(
    "always-four", "You count 4 bytes for every number. A model in bfloat16 has 2: bytes_per_number says how many."
)
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return 2 * num_tokens * num_layers * num_kv_heads * head_dim * 4


@cache_bytes.wrong("query-heads")
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    hidden_size = num_heads * head_dim
    return num_layers * 2 * hidden_size * num_tokens * bytes_per_number


@cache_bytes.accepts
def _(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    return int(np.prod([2, num_layers, num_kv_heads, head_dim, num_tokens, bytes_per_number], dtype=np.int64))


@cache_bytes.adapt
def _(answer, original):
    from course_lib.config import DTYPE_BYTES

    return property(
        lambda config: answer(
            1, config.num_layers, config.hf_config.num_attention_heads, config.num_kv_heads, config.head_dim, DTYPE_BYTES[config.dtype]
        )
    )


@cache_bytes.look
def _(answer, llm):
    core = llm.llm_engine.core
    config, size = core.config.model, core.config.cache.block_size
    sizes = (config.num_layers, config.hf_config.num_attention_heads, config.num_kv_heads, config.head_dim)
    print(f"One token of this engine's model takes {answer(1, *sizes, 4):,} bytes in float32,")
    print(f"a block of {size} tokens {answer(size, *sizes, 4):,}, a full context {answer(8192, *sizes, 4) / 2**20:.0f} MiB.")


# ---- 01.2 top-k and top-p -----------------------------------------------------------------------

truncate = Exercise(
    "01.2",
    "Top-k and top-p in one sort",
    target="course_lib.sampling.topk_topp:apply_top_k_top_p",
    stars=2,
    minutes=15,
    importance="core",
    hints=(
        "Sort each row once, in descending order. In sorted order both rules are about a position in the row: top-k "
        "keeps positions 0 … k-1, and top-p keeps a prefix too.",
        "Mask what top-k drops with -inf before the softmax, so that top-p sees probabilities that add up to 1 again. "
        "A token stays if the probability *before* it, cumsum - own, is still below p.",
        "values, ids = logits.sort(dim=-1, descending=True); values = values.masked_fill(arange(V) >= k[:, None], -inf); "
        "probs = values.softmax(-1); values = values.masked_fill(probs.cumsum(-1) - probs >= p[:, None], -inf); then "
        "write the values back where they came from: torch.empty_like(logits).scatter(-1, ids, values).",
    ),
)

_SORTS = ("sort", "argsort", "topk", "msort", "kthvalue")


def _clear_of_borders(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> bool:
    """No cumulative probability so near p that another order of additions would decide otherwise."""
    for row, row_k, row_p in zip(logits.double(), k.tolist(), p.tolist(), strict=True):
        probs = row.sort(descending=True).values[:row_k].softmax(0)
        if bool(((probs.cumsum(0) - row_p).abs() < 1e-3).any()) and row_p < 1:
            return False
    return True


@truncate.cases
def _(rng: random.Random) -> Iterator[Case]:
    one = torch.tensor([[2.0, 0.5, 1.0, -1.0]])
    yield Case("one row, k=2 alone", one, torch.tensor([2]), torch.tensor([1.0]))
    yield Case("one row, a p so small that only the best token is left", one, torch.tensor([4]), torch.tensor([0.01]))
    yield Case("one row, p=0.7 alone", one, torch.tensor([4]), torch.tensor([0.7]))
    yield Case("one row, k=3 and p=0.8", torch.tensor([[1.0, 2.0, 3.0, 0.0, 2.5]]), torch.tensor([3]), torch.tensor([0.8]))
    yield Case("both switched off", one, torch.tensor([4]), torch.tensor([1.0]))
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    for rows, vocab in ((1, 7), (3, 20), (5, 50)):
        while True:
            logits = torch.randn(rows, vocab, generator=generator) * 2
            k = torch.randint(1, vocab + 1, (rows,), generator=generator)
            p = torch.rand(rows, generator=generator) * 0.9 + 0.1
            if _clear_of_borders(logits, k, p):
                break
        yield Case(f"{rows} rows of {vocab} tokens, each with its own k and p", logits, k, p)


@truncate.expected
def _(logits, k, p):
    """Token by token, in plain Python."""
    result = torch.full_like(logits, float("-inf"))
    for row in range(len(logits)):
        order = sorted(range(logits.shape[1]), key=lambda token: -float(logits[row, token]))[: int(k[row])]
        weights = np.exp([float(logits[row, token]) for token in order])
        weights /= weights.sum()
        before = 0.0
        for token, weight in zip(order, weights, strict=True):
            if before >= float(p[row]):
                break
            result[row, token] = logits[row, token]
            before += weight
    return result


def _masked(failure) -> torch.Tensor | None:
    got = failure.got
    if isinstance(got, torch.Tensor) and got.shape == failure.expected.shape:
        return failure.expected.isinf()
    return None


@truncate.symptom(
    "mask",
    "You return the mask itself. The engine wants the logits, with -inf where the mask drops them: "
    "logits.masked_fill(dropped, float('-inf')).",
)
def _(failure):
    return isinstance(failure.got, torch.Tensor) and failure.got.dtype == torch.bool


@truncate.symptom(
    "a-large-number",
    "A large negative number is not -inf: the dropped tokens keep a probability, however small, and sums over them "
    "go wrong. Use float('-inf').",
)
def _(failure):
    masked = _masked(failure)
    if masked is None or not bool(masked.any()):
        return False
    return bool((failure.got[masked] < -1e3).all()) and not bool(failure.got[masked].isinf().any())


@truncate.symptom(
    "probabilities",
    "You return probabilities. The engine wants logits: the kept ones unchanged, the dropped ones -inf.",
)
def _(failure):
    return _masked(failure) is not None and bool((failure.got >= 0).all()) and bool(
        torch.isclose(failure.got.sum(-1), torch.ones(len(failure.got)), atol=1e-3).all()
    )


@truncate.symptom(
    "masked-with-zero",
    "The dropped tokens have logit 0. exp(0) is 1, so they would still be drawn: a dropped token needs the logit -inf.",
)
def _(failure):
    masked = _masked(failure)
    return masked is not None and bool(masked.any()) and bool((failure.got[masked] == 0).all())


@truncate.symptom(
    "empty-row",
    "A row has no token left: every logit is -inf, and its softmax is not a number. The most likely token must stay, "
    "however small p is: keep a token if the probability *before* it is below p.",
)
def _(failure):
    return _masked(failure) is not None and bool(failure.got.isinf().all(dim=-1).any())


def _reference(logits, k, p, *, keep_k=True, renormalise=True, exclusive=False, scatter=True, first_row=False):
    """The solution with its joints exposed, from which the mistakes are made."""
    if first_row:
        k, p = k[:1].expand_as(k), p[:1].expand_as(p)
    values, ids = logits.sort(dim=-1, descending=True)
    beyond = torch.arange(logits.shape[1]) >= k[:, None]
    limited = values.masked_fill(beyond, float("-inf")) if keep_k else values
    probs = (limited if renormalise else values).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - (0 if exclusive else probs)
    limited = limited.masked_fill(before >= p[:, None], float("-inf"))
    if exclusive:
        limited[:, 0] = values[:, 0]
    return torch.empty_like(logits).scatter(-1, ids, limited) if scatter else limited


@truncate.mistake(
    "not-put-back",
    "The kept logits are right but stand in sorted order. Token ids are positions: scatter the values back to where "
    "they came from, with the indices that sort gave you.",
)
def _(logits, k, p):
    return _reference(logits, k, p, scatter=False)


@truncate.mistake(
    "p-sees-everything",
    "Your top-p works on the probabilities of all tokens. It comes after top-k: mask what top-k dropped, then take the "
    "softmax, so that the survivors' probabilities add up to 1.",
)
def _(logits, k, p):
    return _reference(logits, k, p, renormalise=False)


@truncate.mistake(
    "drops-the-crossing-token",
    "You drop the token with which the running sum reaches p. Top-p keeps the shortest run whose probability *reaches* "
    "p, and that token is its last one: compare the sum before it (cumsum - own) with p.",
)
def _(logits, k, p):
    return _reference(logits, k, p, exclusive=True)


@truncate.mistake("ignores-k", "k has no effect: only positions below k in the sorted row may stay.")
def _(logits, k, p):
    return _reference(logits, k, p, keep_k=False)


@truncate.mistake("ignores-p", "p has no effect: after top-k, keep only the shortest run that reaches probability p.")
def _(logits, k, p):
    return _reference(logits, k, torch.full_like(p, 2.0))


@truncate.mistake(
    "one-k-for-all",
    "Every row is cut with the first row's k and p. The rows are different requests with different parameters: make "
    "k and p columns, k[:, None], and let them broadcast.",
)
def _(logits, k, p):
    return _reference(logits, k, p, first_row=True)


@truncate.mistake(
    "keeps-the-unlikely",
    "You keep the least likely tokens: torch.sort is ascending unless you pass descending=True.",
)
def _(logits, k, p):
    return -_reference(-logits, k, p).nan_to_num(neginf=float("-inf"), posinf=float("inf"))


@truncate.mistake(
    "gathered",
    "You gather with the indices of the sort, which reads *from* those places. To write each value back to the place it "
    "came from, scatter.",
)
def _(logits, k, p):
    ids = logits.sort(dim=-1, descending=True).indices
    return _reference(logits, k, p, scatter=False).gather(-1, ids)


@truncate.wrong("mask")
def _(logits, k, p):
    return _reference(logits, k, p).isfinite()


@truncate.wrong("a-large-number")
def _(logits, k, p):
    return _reference(logits, k, p).clamp(min=-1e9)


@truncate.wrong("masked-with-zero")
def _(logits, k, p):
    kept = _reference(logits, k, p)
    return torch.where(kept.isinf(), 0.0, kept)


@truncate.wrong("empty-row")
def _(logits, k, p):
    values, ids = logits.sort(dim=-1, descending=True)
    values = values.masked_fill(torch.arange(logits.shape[1]) >= k[:, None], float("-inf"))
    values = values.masked_fill(values.softmax(-1).cumsum(-1) > p[:, None] + 1e-6, float("-inf"))
    return torch.empty_like(logits).scatter(-1, ids, values)


@truncate.wrong("probabilities")
def _(logits, k, p):
    return _reference(logits, k, p).softmax(dim=-1)


@truncate.wrong("p-sees-everything")
def _(logits, k, p):
    order = logits.argsort(dim=-1, descending=True)
    probs = logits.softmax(-1).gather(-1, order)
    drop = (probs.cumsum(-1) - probs >= p[:, None]) | (torch.arange(logits.shape[1]) >= k[:, None])
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


@truncate.budget(
    "Each row needs to be sorted once: after top-k the row is still in order, so top-p can use the same sort. With "
    "49,152 tokens a row the sort is most of the work.",
    most=1,
    unit="sort",
)
def _(answer):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 40, generator=generator)
    calls = count_torch_calls(answer, logits, torch.tensor([3, 40, 10, 1]), torch.tensor([0.9, 0.5, 1.0, 0.3]))
    return sum(calls[name] for name in _SORTS)


@truncate.wasteful
def _(logits, k, p):
    kth = logits.sort(dim=-1, descending=True).values.gather(-1, k[:, None] - 1)
    return _reference(logits.masked_fill(logits < kth, float("-inf")), k, p)


@truncate.accepts
def _(logits, k, p):
    """vLLM's own formulation: ascending, what has at most 1 - p below and including it goes."""
    values, ids = logits.sort(dim=-1)
    kth = values.gather(-1, (logits.shape[1] - k)[:, None])
    values = values.masked_fill(values < kth, float("-inf"))
    drop = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p[:, None]
    drop[:, -1] = False
    values = values.masked_fill(drop, float("-inf"))
    return torch.empty_like(logits).scatter(-1, ids, values)


@truncate.accepts
def _(logits, k, p):
    """Row by row with NumPy."""
    rows = []
    for row, row_k, row_p in zip(logits.numpy(), k.tolist(), p.tolist(), strict=True):
        order = np.argsort(-row)[:row_k]
        weights = np.exp(row[order] - row.max())
        weights /= weights.sum()
        count = min(len(order), int(np.searchsorted(np.cumsum(weights), row_p)) + 1)
        kept = np.full_like(row, -np.inf)
        kept[order[:count]] = row[order[:count]]
        rows.append(torch.from_numpy(kept))
    return torch.stack(rows)


@truncate.adapt
def _(answer, original):
    def apply_top_k_top_p(logits, k, p, min_p=None):
        """The engine allows None and 0 for "off", adds min-p, and works in place."""
        if min_p is not None:
            original(logits, None, None, min_p)
        rows, vocab = logits.shape
        k = torch.full((rows,), vocab) if k is None else k.long()
        k = torch.where((k <= 0) | (k > vocab), vocab, k)
        p = torch.ones(rows) if p is None else p
        return logits.copy_(answer(logits, k, p))

    return apply_top_k_top_p


@truncate.look
def _(answer, llm):
    from course_lib import SamplingParams
    from course_lib.teaching.learner.patching import patched

    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=1, max_tokens=12)
    [theirs] = llm.generate("Once upon a time, there was a", params, use_tqdm=False)
    with patched(truncate, answer):
        [yours] = llm.generate("Once upon a time, there was a", params, use_tqdm=False)
    same = sum(map(int.__eq__, yours.outputs[0].token_ids, theirs.outputs[0].token_ids))
    print(f"In the engine (top_k=40, top_p=0.9, seed=1): {same} of 12 tokens are the ones its own code chooses.")


# ---- 01.3 the draw ------------------------------------------------------------------------------

draw = Exercise(
    "01.3",
    "A random draw that is an argmax",
    target="course_lib.sampling.draw:draw",
    stars=2,
    minutes=10,
    importance="core",
    hints=(
        "You need one exponential number per entry: a tensor of the shape of probs, filled by .exponential_(generator=…).",
        "Divide each probability by its own exponential number. The largest quotient in a row wins.",
        "noise = torch.empty_like(probs).exponential_(generator=generator); return (probs / noise).argmax(dim=-1)",
    ),
)

_DRAWS = 20_000
_UNSEEDED, _REPEATED = "other tokens for an equal seed", "the same tokens again from one generator"
_ROW = [0.5, 0.25, 0.15, 0.1, 0.0]


@draw.cases
def _(rng: random.Random) -> Iterator[Case]:
    seed = rng.randint(0, 10**6)
    yield Case("probabilities 0.5, 0.25, 0.15, 0.1 and 0", _ROW, 1.0, seed)
    yield Case("the same weights, not normalised (they add up to 3)", _ROW, 3.0, seed + 1)
    yield Case("one token has all the probability", [0.0, 0.0, 1.0, 0.0], 1.0, seed + 2)
    weights = [rng.random() ** 2 for _ in range(12)]
    yield Case("twelve tokens", [w / sum(weights) for w in weights], 1.0, seed + 3)


@draw.run
def _(answer, row, scale, seed):
    """How often each token comes up in 20,000 rows that are all the same."""
    probs = (torch.tensor(row) * scale).expand(_DRAWS, -1).contiguous()
    generator = torch.Generator().manual_seed(seed)
    tokens = answer(probs, generator)
    if not isinstance(tokens, torch.Tensor):
        return tokens
    if tokens.dtype != torch.int64 or tokens.shape != (_DRAWS,):
        return tokens
    if len(set(tokens.tolist())) > 1:  # where one token always comes, seeds show nothing
        if torch.equal(tokens, answer(probs, generator)):
            return _REPEATED
        if not torch.equal(tokens, answer(probs, torch.Generator().manual_seed(seed))):
            return _UNSEEDED
    return torch.bincount(tokens, minlength=len(row)) / _DRAWS


@draw.expected
def _(row, scale, seed):
    return torch.tensor(row)


@draw.same
def _(got, expected, case):
    """Frequencies, within five standard deviations of a fair draw (one failure in two million)."""
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    spread = (expected * (1 - expected) / _DRAWS).sqrt()
    return bool(((got - expected).abs() <= 5 * spread + 1e-9).all())


@draw.symptom(
    "unseeded",
    "Two generators with the same seed gave different tokens: your noise comes from somewhere else. A request with a seed "
    "must be repeatable, so draw with generator=generator.",
)
def _(failure):
    return isinstance(failure.got, str) and failure.got == _UNSEEDED


@draw.symptom(
    "reseeded",
    "Two draws from one generator gave the same tokens: you set its seed. Leave the generator as it comes; it has moved on "
    "since the last token.",
)
def _(failure):
    return isinstance(failure.got, str) and failure.got == _REPEATED


@draw.symptom(
    "wrong-shape",
    "Return one token id per row: an int64 tensor of shape [rows]. argmax(dim=-1) over the tokens gives exactly that.",
)
def _(failure):
    return failure.error is None and (
        not isinstance(failure.got, torch.Tensor) or failure.got.shape != failure.expected.shape
    )


@draw.mistake("always-the-best", "This always takes the most likely token. The noise must decide along with probs.")
def _(probs, generator):
    return probs.argmax(dim=-1)


@draw.mistake(
    "same-noise-for-every-row",
    "All rows draw with the same noise, so equal rows always get equal tokens. Each row is a request of its own: the "
    "noise needs the shape of probs, not of one row.",
)
def _(probs, generator):
    noise = torch.empty(probs.shape[1]).exponential_(generator=generator)
    return (probs / noise).argmax(dim=-1)


@draw.mistake(
    "multiplied",
    "You multiply by the noise. A *small* exponential number should win, so probabilities are divided by it.",
)
def _(probs, generator):
    return (probs * torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)


@draw.mistake(
    "uniform",
    "Your noise is uniform. With uniform noise likely tokens win too often; only Exponential(1) makes the chance of "
    "winning equal to the probability. Use .exponential_().",
)
def _(probs, generator):
    return (probs / torch.rand(probs.shape, generator=generator)).argmax(dim=-1)


@draw.mistake(
    "argmin",
    "You take the smallest quotient, so unlikely tokens win. Take the argmax of p / e (or the argmin of e / p).",
)
def _(probs, generator):
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmin(dim=-1)


@draw.mistake(
    "log-plus-uniform",
    "This adds uniform noise to log-probabilities. The trick with a sum needs Gumbel noise, -log(e) with e exponential.",
)
def _(probs, generator):
    return (probs.log() + torch.rand(probs.shape, generator=generator)).argmax(dim=-1)


@draw.mistake("uniform-choice", "Every token comes up equally often: probs has no influence.")
def _(probs, generator):
    return torch.randint(probs.shape[1], (len(probs),), generator=generator)


@draw.wrong("unseeded")
def _(probs, generator):
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)


@draw.wrong("reseeded")
def _(probs, generator):
    noise = torch.empty_like(probs).exponential_(generator=generator.manual_seed(0))
    return (probs / noise).argmax(dim=-1)


@draw.wrong("wrong-shape")
def _(probs, generator):
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax()


@draw.wrong("same-noise-for-every-row")
def _(probs, generator):
    gumbel = -torch.empty(1, probs.shape[1]).exponential_(generator=generator).log()
    return (probs.log() + gumbel).argmax(dim=-1)


@draw.accepts
def _(probs, generator):
    """Gumbel-max: the logarithm of the same thing."""
    return (probs.log() - torch.empty_like(probs).exponential_(generator=generator).log()).argmax(dim=-1)


@draw.accepts
def _(probs, generator):
    """The textbook way: where a uniform number falls in the cumulative sum."""
    edges = probs.double().cumsum(dim=-1)
    point = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64) * edges[:, -1:]
    return (edges <= point).sum(dim=-1)


@draw.accepts
def _(probs, generator):
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


@draw.adapt
def _(answer, original):
    def draw_tokens(probs, generators, default_generator):
        """Requests with a seed draw from their own generator, one row each; the others together."""
        tokens = torch.empty(len(probs), dtype=torch.int64)
        shared = [row for row in range(len(probs)) if row not in generators]
        if shared:
            tokens[shared] = answer(probs[shared], default_generator)
        for row, generator in generators.items():
            tokens[row : row + 1] = answer(probs[row : row + 1], generator)
        return tokens

    return draw_tokens


@draw.look
def _(answer, llm):
    from course_lib import SamplingParams
    from course_lib.teaching.learner.patching import patched

    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)
    with patched(draw, answer):
        first, second = (llm.generate("The weather today is", params, use_tqdm=False)[0] for _ in range(2))
    texts = [{tuple(one.token_ids) for one in output.outputs} for output in (first, second)]
    print(f"In the engine, four outputs of one prompt with a seed: {len(texts[0])} different ones,")
    print(f"and the same again with the same seed: {texts[0] == texts[1]}.")


# ---- 01.4 text while it grows -------------------------------------------------------------------

stream = Exercise(
    "01.4",
    "Text that is never taken back",
    target="course_lib.engine.detokenizer:IncrementalDetokenizer",
    stars=3,
    minutes=25,
    importance="core",
    hints=(
        "Keep two things: an incremental UTF-8 decoder (codecs.getincrementaldecoder), which keeps half a character to "
        "itself until the rest comes, and all the text so far. What you have shown is a count of characters.",
        "After each piece: look for the stop strings in the text. If there is one, cut the text before it, remember it "
        "in self.stopped and show what is left up to the cut. If not, hold back one character less than the longest "
        "stop string has: a stop string could still be beginning there.",
        "push: self.text += self.decoder.decode(piece); found = the stop whose end, text.find(stop) + len(stop), comes "
        "first; if found: self.text = self.text[:start]; limit = len(self.text); else limit = max(self.shown, "
        "len(self.text) - self.hold). "
        "new = self.text[self.shown:limit]; self.shown = limit; return new. finish: the same with limit = len(text), after "
        "decoder.decode(b'', final=True).",
    ),
)

_TEXTS = (
    "The capital of France is Paris.",
    "naïve café 🙂🚀, 日本 and Ελλάδα",
    "1. one\n2. two\n3. three\n\nUser: and then?",
    "👩‍🚀🇫🇷 done END of it",
    "aaab aab ab",
)
_STOPS = ((), ("\n\nUser:",), ("END", "three"), ("aab",), ("🚀",), ("日本",), ("is Paris.",))


def _cut(rng: random.Random, data: bytes, longest: int) -> list[bytes]:
    pieces = []
    while data:
        size = rng.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@stream.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("plain text, one piece a word", [b"The", b" capital", b" is", b" Paris", b"."], [])
    yield Case("a rocket in three pieces, as the model writes it", [b"go ", b"\xf0\x9f", b"\x9a", b"\x80", b" up"], [])
    yield Case("a stop string in two pieces", [b"1, 2", b", 3.", b"\n", b"\nUser", b": hi"], ["\n\nUser:"])
    yield Case("what looks like a stop string and is none", [b"see E", b"N", b"V and", b" go"], ["END"])
    yield Case("the output ends inside a character", [b"caf", b"\xc3"], [])
    yield Case("of two stop strings, one is completed first", [b"abcd"], ["abcd", "bc"])
    yield Case("the same, in two pieces", [b"abc", b"d"], ["abcd", "bc"])
    for text in _TEXTS:
        for stop in rng.sample(_STOPS, 3):
            pieces = _cut(rng, text.encode(), rng.choice((1, 3, 8)))
            yield Case(f"{text!r} cut at random, stop {list(stop)}", pieces, list(stop))


@stream.run
def _(answer, pieces, stop):
    """Feed the pieces; note whether anything came too late or as half a character."""
    text_stream = answer(list(stop))
    shown, late, half = "", False, False
    hold = max([len(one) for one in stop], default=1) - 1
    for count, piece in enumerate(pieces, 1):
        new = text_stream.push(piece)
        if not isinstance(new, str):
            return new
        shown += new
        half |= "\ufffd" in new
        if text_stream.stopped is not None:
            break
        certain = b"".join(pieces[:count]).decode("utf-8", "ignore")
        late |= len(certain) - len(shown) > hold
    else:
        rest = text_stream.finish()
        if not isinstance(rest, str):
            return rest
        shown += rest
    return {"text": shown, "stopped": text_stream.stopped, "half characters": half, "late": late}


@stream.expected
def _(pieces, stop):
    text = b"".join(pieces).decode("utf-8", "replace")
    ends = [(text.find(one) + len(one), one) for one in stop if one in text]
    if ends:
        end, found = min(ends)
        text = text[: end - len(found)]
    return {"text": text, "stopped": found if ends else None, "half characters": False, "late": False}


def _told(failure) -> bool:
    return isinstance(failure.got, dict)


@stream.symptom(
    "no-text",
    "push and finish must return the text that may be shown now, a str: the empty string when there is none.",
)
def _(failure):
    return failure.error is None and not _told(failure)


@stream.symptom(
    "flag",
    "self.stopped should be the stop string that was found, not True: the engine reports which one it was.",
)
def _(failure):
    return _told(failure) and failure.got["stopped"] is True


@stream.symptom("includes-the-stop", "The text must end *before* the stop string. Yours contains it.")
def _(failure):
    got, expected = failure.got, failure.expected
    return _told(failure) and bool(expected["stopped"]) and got["text"] == expected["text"] + expected["stopped"]


@stream.symptom(
    "another-stop",
    "Two stop strings are in the text, and the one that is completed first ends it, whatever begins first or stands "
    "first in the list. So where the text ends does not depend on how it was cut into tokens.",
)
def _(failure):
    if not _told(failure):
        return False
    got, expected = failure.got["stopped"], failure.expected["stopped"]
    return None not in (got, expected) and got != expected


@stream.symptom(
    "half-characters",
    "You show U+FFFD, the sign for a broken character, while the rest of that character is still to come. A character "
    "may be spread over several pieces: keep incomplete bytes until the others arrive.",
)
def _(failure):
    return _told(failure) and failure.got["half characters"]


@stream.symptom(
    "lost-characters",
    "Characters that are spread over several pieces vanish: errors='ignore' throws their bytes away. Keep them and "
    "decode when the character is whole.",
)
def _(failure):
    if not _told(failure) or failure.got["stopped"] != failure.expected["stopped"]:
        return False
    got, expected = failure.got["text"], failure.expected["text"]
    ascii_only = "".join(c for c in expected if c.isascii())
    return got != expected and "".join(c for c in got if c.isascii()) == ascii_only and len(got) < len(expected) and (
        expected[-1:] != "\ufffd"
    )


@stream.symptom(
    "leaks-the-stop",
    "Characters of a stop string, or after it, were shown before you knew that it was one. A stop string could still be "
    "beginning in the last characters, one fewer than the longest has: hold those back.",
)
def _(failure):
    if not _told(failure) or not failure.expected["stopped"]:
        return False
    got, expected = failure.got, failure.expected
    return got["stopped"] is not None and got["text"].startswith(expected["text"]) and got["text"] != expected["text"]


@stream.symptom(
    "misses-the-stop",
    "There is a stop string in the text and you did not stop: it lies across two pieces. Search the whole text so far "
    "(or at least the new text and the end of the old), and set self.stopped to the string you found.",
)
def _(failure):
    return _told(failure) and failure.expected["stopped"] is not None and failure.got["stopped"] is None


@stream.symptom(
    "unfinished",
    "The end of the text is missing: finish must return what was held back, and half a character as U+FFFD.",
)
def _(failure):
    if not _told(failure) or failure.expected["stopped"]:
        return False
    got, expected = failure.got["text"], failure.expected["text"]
    return got != expected and expected.startswith(got)


@stream.symptom(
    "too-late",
    "The text is right but comes later than it could. Show everything except half a character and what could begin a "
    "stop string, one character less than the longest has; without stop strings, hold nothing back.",
)
def _(failure):
    return _told(failure) and failure.got["late"] and failure.got["text"] == failure.expected["text"]


@stream.symptom(
    "twice",
    "Some text is shown twice: push returns only what is *new*, so count how many characters you have shown.",
)
def _(failure):
    return _told(failure) and len(failure.got["text"]) > len(failure.expected["text"])


def _make(*, errors="strict", hold=True, search=True, flush=True, lazy=False, whole=False, keep=False, order=min):
    """The solution with its joints exposed."""
    import codecs

    class TextStream:
        def __init__(self, stop):
            self.stop, self.stopped = stop, None
            self.text, self.shown = "", 0
            self.hold = max([len(one) for one in stop], default=1) - 1 if hold else 0
            self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def push(self, piece):
            new = self.decoder.decode(piece) if errors == "strict" else piece.decode("utf-8", errors)
            self.text += new
            where = self.text if search else new
            found = [(where.find(one) + len(one), one) for one in self.stop if one in where]
            if found:
                end, self.stopped = order(found)
                self.text = self.text[: end + len(self.text) - len(where) - (0 if keep else len(self.stopped))]
            limit = len(self.text) - (0 if found else self.hold)
            if lazy and not found:
                return ""
            if whole:
                return self.text[:limit]
            new = self.text[self.shown : max(self.shown, limit)]
            self.shown = max(self.shown, limit)
            return new

        def finish(self):
            if not flush:
                return ""
            if errors == "strict":
                self.text += self.decoder.decode(b"", True)
            return self.text[self.shown :]

    return TextStream


stream.wrong("half-characters")(_make(errors="replace"))
stream.wrong("lost-characters")(_make(errors="ignore"))
stream.wrong("leaks-the-stop")(_make(hold=False))
stream.wrong("misses-the-stop")(_make(search=False))
stream.wrong("unfinished")(_make(flush=False))
stream.wrong("too-late")(_make(lazy=True))
stream.wrong("includes-the-stop")(_make(keep=True))
stream.wrong("another-stop")(_make(order=lambda found: min(found, key=lambda pair: pair[0] - len(pair[1]))))
stream.wrong("twice")(_make(whole=True))


@stream.wrong("flag")
class _Flag(_make()):
    def push(self, piece):
        new = super().push(piece)
        self.stopped = True if self.stopped else None
        return new


@stream.wrong("no-text")
class _Silent:
    def __init__(self, stop):
        self.stopped = None

    def push(self, piece):
        print(piece.decode("utf-8", "ignore"), end="")

    def finish(self):
        return ""


@stream.accepts
class _BytesOnly:
    """Everything in bytes, and holding back only what really could become a stop string."""

    def __init__(self, stop):
        self.stop = [one.encode() for one in stop]
        self.data, self.shown, self.stopped = b"", 0, None

    def push(self, piece):
        self.data += piece
        found = [(self.data.find(one) + len(one), one) for one in self.stop if one in self.data]
        if found:
            end, one = min(found)
            self.data, self.stopped = self.data[: end - len(one)], one.decode()
            return self._show(len(self.data))
        end = len(self.data)
        for one in self.stop:
            for size in range(min(len(one) - 1, len(self.data)), 0, -1):
                if self.data.endswith(one[:size]):
                    end = min(end, len(self.data) - size)
                    break
        return self._show(end)

    def _show(self, end, errors="strict"):
        for back in range(4):
            try:
                text = self.data[self.shown : end - back].decode("utf-8", errors)
            except UnicodeDecodeError:
                continue
            self.shown = max(self.shown, end - back)
            return text
        return ""

    def finish(self):
        return self._show(len(self.data), "replace")


@stream.adapt
def _(answer, original):
    from course_lib.engine.token_text import TokenizerText

    class YourDetokenizer:
        """The engine's interface in front of the learner's class."""

        def __init__(self, text_stream, shared, skipped):
            self.token_ids, self.output_text = [], ""
            self._stream, self._pieces, self._skipped = text_stream, shared.pieces, skipped
            self._shown, self._final = 0, False

        @staticmethod
        def from_request(tokenizer, prompt_token_ids, params):
            shared = TokenizerText.of(tokenizer) if tokenizer is not None and params.detokenize else None
            if shared is None or shared.pieces is None or params.include_stop_str_in_output or params.min_tokens:
                return original.from_request(tokenizer, prompt_token_ids, params)
            skipped = shared.special_ids if params.skip_special_tokens else frozenset()
            return YourDetokenizer(answer(list(params.stop or ())), shared, skipped)

        def update(self, new_token_ids, stop_terminated):
            for token_id in new_token_ids:
                self.token_ids.append(token_id)
                if (stop_terminated and token_id == new_token_ids[-1]) or token_id in self._skipped:
                    continue
                self.output_text += self._stream.push(self._pieces[token_id])
                if self._stream.stopped is not None:
                    self._final = True
                    return self._stream.stopped
            return None

        def get_next_output_text(self, finished, delta):
            if finished and not self._final:
                self.output_text += self._stream.finish()
                self._final = True
            start, self._shown = (self._shown if delta else 0), len(self.output_text)
            return self.output_text[start:]

    return YourDetokenizer


@stream.look
def _(answer, llm):
    from course_lib import SamplingParams
    from course_lib.teaching.learner.patching import patched

    conversation = [{"role": "user", "content": "Repeat exactly: 🙂🚀🙂🚀"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    [theirs] = llm.chat(conversation, params, use_tqdm=False)
    with patched(stream, answer):
        [yours] = llm.chat(conversation, params, use_tqdm=False)
    print(f"In the engine: the same text as its own detokenizer's: {yours.outputs[0].text == theirs.outputs[0].text}.")
