"""Lesson 04, Torchrun example: its exercises, how answers are judged, which mistakes people make.

Ranks are played one after the other (`recording/turns.py`): a check starts no process and cannot hang.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import pickle
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from course_lib.layers.cpu_matmul import unpack
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question
from course_lib.teaching.recording.turns import OutOfStepError, in_turns

# ---- questions ----------------------------------------------------------------------------------

said_per_token = Question(
    "04.a",
    "Three ranks hold a third of every matrix each. To make one token of one request, how much must a rank tell the "
    "others? The model has 30 layers, and a position is a vector of 576 numbers of 4 bytes between them.",
    [
        Choice(
            "tens of megabytes: the weights that the others lack",
            "Weights never move. That is the idea: what moves instead is what a rank has made of its share, and that "
            "is as small as the activations of one token.",
        ),
        Choice(
            "hundreds of kilobytes",
            "Two sums of 576 numbers per layer, one for the embedding, and a third of the logits at the end: 140,544 "
            "and 65,536 bytes, in 62 calls.",
            right=True,
        ),
        Choice(
            "a few bytes: the token",
            "That would do if each rank computed whole layers, or whole requests. Here every rank has a part of every "
            "layer, so none of them can finish a layer alone.",
        ),
    ],
)

faster = Question(
    "04.b",
    "One process with all cores of this machine, or three processes with one thread each, on the same machine. How "
    "long does one decode step take with three ranks?",
    [
        Choice(
            "about a third of the time",
            "Each rank reads a third of the weights, but out of the same memory, and with cores that the one process "
            "had, too. Three memories would have to be three machines or three GPUs.",
        ),
        Choice(
            "about the same",
            "The arithmetic is about the same, all in all. What comes on top are 62 meetings per step, and at each of "
            "them everybody waits for the last.",
        ),
        Choice(
            "longer",
            "The same memory, no more cores, and 62 meetings per step on top, at each of which everybody waits for "
            "the last.",
            right=True,
        ),
    ],
)

swapped = Question(
    "04.c",
    "Two prompts of equal length. Rank 1 is handed them in the other order, and nobody compares anything. What do the "
    "answers look like?",
    [
        Choice(
            "the run hangs",
            "It would if the ranks came to different collectives, or with other sizes. Here every sum has the same "
            "shape on every rank: two rows of 576.",
        ),
        Choice(
            "rank 1 has the two answers exchanged",
            "Then rank 1 would have to compute its answers alone. Row 0 of every sum is two thirds of one request and "
            "one third of the other, for everybody.",
        ),
        Choice(
            "both answers are wrong, and all ranks have the same wrong ones",
            "Row 0 of every sum is two thirds of one request and one third of the other. All shapes agree, so nothing "
            "fails, and everybody gets the same sums, so nobody notices.",
            right=True,
        ),
    ],
)

# ---- 04.1 the MLP of one rank -------------------------------------------------------------------

mlp = Exercise(
    "04.1",
    "A rank's share of the MLP",
    target="course_lib.models.llama:LlamaMLP.forward",
    stars=2,
    minutes=10,
    importance="core",
    hints=(
        "How many of the six steps (product, split, silu, times, product, sum) need something that another rank has? "
        "Only the last.",
        "h = x @ gate_up.T has the rank's gate features first and its up features behind; chunk(2, dim=-1) parts them. "
        "The product with down gives a term of the sum for every output. The bias belongs to the sum, once.",
        "gate, up = (x @ gate_up.T).chunk(2, dim=-1); y = (silu(gate) * up) @ down.T; if there is a bias and this rank is "
        "the one to add it: y = y + bias; return ...(y).",
    ),
)


@mlp.cases
def _(rng: random.Random) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))

    def weights(*shape):
        return torch.randn(*shape, generator=generator)

    for label, tokens, hidden, inner, ranks, biased in (
        ("3 ranks, one token, no bias", 1, 3, 6, 3, False),
        ("3 ranks, four tokens, no bias", 4, 6, 12, 3, False),
        ("2 ranks, three tokens, with a bias", 3, 4, 8, 2, True),
        ("one rank alone", 2, 4, 6, 1, True),
        ("5 ranks, two tokens, with a bias", 2, 6, 10, 5, True),
    ):
        bias = weights(hidden) * 3 if biased else None
        yield Case(label, weights(tokens, hidden), weights(2 * inner, hidden), weights(hidden, inner), bias, ranks)


def _by_rank(results):
    """What the ranks return, in a form that names them where a difference is told."""
    return {f"rank {rank}": result for rank, result in enumerate(results)}


@mlp.expected
def _(x, gate_up, down, bias, ranks):
    """In one piece, in double precision; every rank must have it."""
    gate, up = gate_up.double().chunk(2)
    inner = x.double() @ gate.T
    y = (inner / (1 + (-inner).exp()) * (x.double() @ up.T)) @ down.double().T
    y = y if bias is None else y + bias.double()
    return _by_rank([y.float()] * ranks)


def _shares(gate_up, down, rank, ranks):
    size = down.shape[1] // ranks
    own = slice(rank * size, (rank + 1) * size)
    return torch.cat([half[own] for half in gate_up.chunk(2)]), down[:, own].contiguous()


@mlp.run
def _(answer, x, gate_up, down, bias, ranks):
    kept = _Kept(x=x, gate_up=gate_up, down=down, bias=bias)

    def rank(group):
        before = x, *_shares(gate_up, down, group.rank, ranks), bias
        own = [one if one is None else one.clone() for one in before]
        result = answer(*own, group)
        kept.compare(before, own)
        return result

    with kept:
        return _by_rank(in_turns(ranks, rank))


class _Kept:
    """The tensors of a case that ranks have copies of: at the end, those whose copies a rank has changed are changed,
    too, so that the check notices."""

    def __init__(self, **tensors):
        self.tensors = list(tensors.values())
        self.changed: set[int] = set()

    def compare(self, before, after):
        self.changed |= {i for i, (one, other) in enumerate(zip(before, after, strict=True))
                         if one is not None and not torch.equal(one, other)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for i in self.changed:
            self.tensors[i].add_(1)


@mlp.symptom(
    "out-of-step",
    "Your ranks do not come to the same collectives. Real ones would wait for each other for ever: every rank must call "
    "all_reduce the same number of times, with the same shape, whatever its number is.",
)
def _(failure):
    return isinstance(failure.error, OutOfStepError)


@mlp.symptom(
    "gathered",
    "You put the ranks' results next to each other. Each rank's product with its columns of down is a *term* for every "
    "output feature: they must be added, by all_reduce.",
)
def _(failure):
    got, expected = failure.got["rank 0"], failure.expected["rank 0"]
    return got.numel() == expected.numel() * failure.args[-1] and failure.args[-1] > 1


def _in_this_case(*variants):
    """Whether the answer gave what one of these variants of the solution gives in the case that failed.

    The first case has no bias: there a mistake shows whatever the answer does with the bias.
    """

    def given(failure):
        results = [mlp.run_function(_mlp(**joints), *failure.args) for joints in variants]
        return not failure.error and any(
            all(torch.allclose(failure.got[rank], one, 1e-4, 1e-5) for rank, one in theirs.items()) for theirs in results
        )

    return given


def _mlp(*, act=F.silu, up_act=lambda up: up, split="halves", order="gate first", bias_on="rank 0", reduce="y", where="end"):
    """The solution with its joints exposed, from which the mistakes are made."""

    def mlp_of_rank(x, gate_up, down, bias, group):
        h = x @ gate_up.T
        if where == "inside":
            h = group.all_reduce(h)  # of gate and up one by one it is the same
        gate, up = h.chunk(2, dim=-1) if split == "halves" else (h[:, 0::2], h[:, 1::2])
        if order == "up first":
            gate, up = up, gate
        inner = act(gate) * up_act(up)
        y = (group.all_reduce(inner) if where == "behind silu" else inner) @ down.T
        if bias is not None and bias_on in ("everywhere", f"rank {group.rank}"):
            y = y + bias
        if reduce == "y":
            y = group.all_reduce(y)
        elif reduce == "mean":
            y = group.all_reduce(y) / group.size
        if bias is not None and bias_on == f"late on rank {group.rank}":
            y = y + bias
        return y

    return mlp_of_rank


mlp.symptom(
    "no-sum",
    "You return this rank's own term. The output is the sum of all ranks' terms, and all_reduce returns it, on every rank: "
    "return what it returns. (What becomes of its argument is left open.)",
)(_in_this_case({"reduce": "nothing"}))


mlp.symptom(
    "sum-inside",
    "You add up the ranks' inner features. Those are *different* features, feature 0 of rank 1 is no term of feature 0 of "
    "rank 0: there is nothing to add before the second product. What the ranks make of their columns of down are terms of "
    "the same outputs: add those.",
)(_in_this_case(*({"where": where, "reduce": reduce} for where in ("inside", "behind silu") for reduce in ("y", "nothing"))))


mlp.mistake(
    "bias-on-every-rank",
    "Every rank adds the bias, and then everything is added up: it counts once per rank. Let only rank 0 add it before "
    "the sum, or all of them after it.",
)(_mlp(bias_on="everywhere"))


mlp.mistake("no-bias", "The bias is missing: one rank must add it before the sum, or all of them after it.")(
    _mlp(bias_on="nowhere")
)


mlp.mistake(
    "bias-late-on-one",
    "Rank 0 adds the bias after the sum, and the other ranks never see it. Ranks that disagree here compute nonsense in "
    "the next layer: add it on rank 0 *before* the sum, or on all ranks after it.",
)(_mlp(bias_on="late on rank 0"))


mlp.mistake(
    "up-first",
    "You took the first half for up. The rows are stacked as the name says, gate first: silu belongs on the first half.",
)(_mlp(order="up first"))


mlp.mistake(
    "interleaved",
    "You take every other feature for gate. This rank's gate features are the first half of h and its up features the "
    "second: h.chunk(2, dim=-1).",
)(_mlp(split="interleaved"))


mlp.mistake("silu-on-both", "silu belongs on the gate features only: silu(gate) * up. Split first.")(_mlp(up_act=F.silu))


mlp.mistake("mean", "You take the mean over ranks. The terms of a product must be added, not averaged.")(_mlp(reduce="mean"))


mlp.mistake("no-silu", "The gate goes through silu: silu(gate) * up, with torch.nn.functional.silu.")(_mlp(act=lambda gate: gate))


mlp.mistake("sigmoid", "silu(z) is z * sigmoid(z): the factor z is missing. There is torch.nn.functional.silu.")(
    _mlp(act=torch.sigmoid)
)


@mlp.symptom(
    "ranks-differ",
    "Your ranks return different results. The next layer takes it for granted that all of them have the same: what only "
    "this rank knows must be in the sum, or come from nowhere else.",
)
def _(failure):
    first, *others = failure.got.values()
    return any(not torch.allclose(first, one, 1e-4, 1e-5) for one in others)


@mlp.symptom(
    "changes-arguments",
    "You change an argument in place (/=, +=, copy_, out=). The weights and the bias are the model's, and the next step "
    "would meet them changed; x is still needed outside: make new tensors.",
)
def _(failure):
    return bool(failure.changed)


for name, bias_on in (("nothing", "rank 0"), ("nothing", "everywhere"), ("nothing", "nowhere")):
    mlp.wrong("no-sum")(_mlp(reduce=name, bias_on=bias_on))
for place in ("inside", "behind silu"):
    for reduce in ("y", "nothing"):
        mlp.wrong("sum-inside")(_mlp(where=place, reduce=reduce))
        mlp.wrong("sum-inside")(_mlp(where=place, reduce=reduce, bias_on="everywhere"))


@mlp.wrong("no-sum")
def _(x, gate_up, down, bias, group):
    y = _mlp(reduce="nothing")(x, gate_up, down, bias, group)
    group.all_reduce(y)
    return y


@mlp.wrong("ranks-differ")
def _(x, gate_up, down, bias, group):
    y = _mlp(reduce="nothing")(x, gate_up, down, bias, group)
    return group.all_reduce(y) + y


@mlp.wrong("changes-arguments")
def _(x, gate_up, down, bias, group):
    y = _mlp(reduce="nothing", bias_on="nowhere")(x, gate_up, down, bias, group)
    if bias is not None:
        bias /= group.size
        y += bias
    return group.all_reduce(y)


@mlp.wrong("changes-arguments")
def _(x, gate_up, down, bias, group):
    return group.all_reduce(x.copy_(_mlp(reduce="nothing")(x, gate_up, down, bias, group)))


@mlp.wrong("out-of-step")
def _(x, gate_up, down, bias, group):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    y = (F.silu(gate) * up) @ down.T
    if group.rank == 0:
        y = group.all_reduce(y)
    return y


@mlp.wrong("gathered")
def _(x, gate_up, down, bias, group):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_gather((F.silu(gate) * up) @ down.T, dim=-1)


mlp.accepts(_mlp())


@mlp.accepts
def _(x, gate_up, down, bias, group):
    """The bias on every rank, after the sum; slices instead of chunk."""
    half = len(gate_up) // 2
    gate, up = F.linear(x, gate_up[:half]), F.linear(x, gate_up[half:])
    y = group.all_reduce(F.linear(gate * torch.sigmoid(gate) * up, down))
    return y if bias is None else y + bias


@mlp.accepts
def _(x, gate_up, down, bias, group):
    """The bias in equal shares."""
    gate, up = (x @ gate_up.T).split(gate_up.shape[0] // 2, dim=1)
    part = torch.einsum("ti,hi->th", F.silu(gate) * up, down)
    return group.all_reduce(part + (0 if bias is None else bias / group.size))


@mlp.budget("One sum of the outputs is all the ranks need from each other.", most=1, unit="collectives")
def _(answer):
    generator = torch.Generator().manual_seed(0)
    gate_up, down, x = (torch.randn(*shape, generator=generator) for shape in ((12, 4), (4, 6), (3, 4)))

    def rank(group):
        answer(x.clone(), *_shares(gate_up, down, group.rank, 3), None, group)
        return group.traffic.all_reduce_calls + group.traffic.gather_calls

    return max(in_turns(3, rank))


@mlp.wasteful
def _(x, gate_up, down, bias, group):
    """Everybody gathers all inner features first."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    inner = group.all_gather(F.silu(gate) * up, dim=-1)
    size = down.shape[1]
    y = inner[:, group.rank * size : (group.rank + 1) * size] @ down.T
    return group.all_reduce(y if bias is None or group.rank else y + bias)


@mlp.adapt
def _(answer, original):
    def forward(module, hidden):
        gate_up, down = module.gate_up_proj, module.down_proj
        if gate_up.bias is not None:  # no model of the course
            return original(module, hidden)
        weights = (unpack(layer.weight, hidden.dtype) for layer in (gate_up, down))
        return answer(hidden, *weights, down.bias, down.group)

    return forward


@mlp.look
def _(answer, llm):
    """The real first layer's MLP, cut for two and for three ranks."""
    model = llm.llm_engine.core.executor.runner.model
    layer = model.model.layers[0].mlp
    gate_up, down = (unpack(linear.weight, model.dtype) for linear in (layer.gate_up_proj, layer.down_proj))
    gate, up = gate_up.chunk(2)
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        for ranks in (2, 3):
            traffic = []

            def rank(group, ranks=ranks, traffic=traffic):
                traffic.append(group.traffic)
                return answer(x.clone(), *_shares(gate_up, down, group.rank, ranks), None, group)

            results = in_turns(ranks, rank)
            same = all(torch.allclose(one, whole, atol=1e-5 * whole.abs().max()) for one in results)
            print(f"The model's first MLP, five tokens, {ranks} ranks: "
                  f"{1536 // ranks} inner features each, {traffic[-1].all_reduce_bytes:,} bytes to the sum, "
                  f"{'the same as in one piece' if same else 'NOT the same'}.")  # fmt: skip


# ---- 04.2 heads of a rank -----------------------------------------------------------------------

heads = Exercise(
    "04.2",
    "Whose heads",
    target="course_lib.layers.linear:QKVLinear.__init__",
    stars=2,
    minutes=10,
    importance="core",
    hints=(
        "Query heads are dealt out evenly, in order. Then ask which KV head the first of a rank's query heads reads: with "
        "g = num_heads // num_kv_heads query heads per KV head, query head h reads KV head h // g.",
        "With at most num_kv_heads ranks each holds num_kv_heads // ranks KV heads. With more, each holds one whole head: "
        "ranks // num_kv_heads *neighbours* hold the same. Multiply head numbers by head_dim at the end.",
        "queries = num_heads // ranks; copies = max(1, ranks // num_kv_heads); kv = max(1, num_kv_heads // ranks); "
        "return (rank * queries * head_dim, (rank + 1) * queries * head_dim), (first * head_dim, (first + kv) * head_dim), "
        "where first = ... is the rank's first KV head: what is it on rank 4 of 9, with copies = 3?",
    ),
)


@heads.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("the course model on 3 ranks", 9, 3, 64, 1, 3)
    yield Case("the course model on one rank", 9, 3, 64, 0, 1)
    yield Case("the course model on 9 ranks: more ranks than KV heads", 9, 3, 64, 4, 9)
    yield Case("Llama-3.1-8B on 4 ranks", 32, 8, 128, 3, 4)
    yield Case("Llama-3.1-8B on 16 ranks", 32, 8, 128, 5, 16)
    yield Case("one KV head for all queries, on 4 ranks", 8, 1, 64, 3, 4)
    for _ in range(8):
        kv_heads, per_kv = rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 4))
        total = kv_heads * per_kv
        ranks = rng.choice([n for n in range(1, total + 1) if total % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)])
        yield Case("a random model", total, kv_heads, rng.choice((64, 80, 128)), rng.randrange(ranks), ranks)


@heads.expected
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    """Row by row: which rows of q_proj, and the rows of k_proj that those queries meet."""
    group = num_heads // num_kv_heads
    own = [head for head in range(num_heads) if head * ranks // num_heads == rank]
    rows = [head * head_dim + i for head in own for i in range(head_dim)]
    met = sorted({head // group * head_dim + i for head in own for i in range(head_dim)})
    return (rows[0], rows[-1] + 1), (met[0], met[-1] + 1)


@heads.symptom(
    "ranges",
    "Return two pairs, no ranges and no slices: (start, stop) of the query rows, then (start, stop) of the key rows, with "
    "stop one past the last row.",
)
def _(failure):
    pairs = failure.got
    return not failure.error and not (
        isinstance(pairs, tuple | list) and [len(one) for one in pairs if isinstance(one, tuple | list)] == [2, 2]
    )


def _heads(*, unit=True, kv="replicated", neighbours=True, inclusive=False, fused=False, as_length=False):
    """The solution with its joints exposed, from which the mistakes are made."""

    def rows_of_rank(num_heads, num_kv_heads, head_dim, rank, ranks):
        size = head_dim if unit else 1
        queries = num_heads // ranks
        copies, held = max(1, ranks // num_kv_heads), max(1, num_kv_heads // ranks)
        first = rank // copies * held if neighbours else rank * held % num_kv_heads
        q = (rank * queries * size, (rank + 1) * queries * size)
        k = (first * size, (first + held) * size)
        if kv == "all":
            k = (0, num_kv_heads * size)
        elif kv == "by rows":
            rows = num_kv_heads * size / ranks
            k = (int(rank * rows), int((rank + 1) * rows))
        elif kv == "by whole rows":
            rows = num_kv_heads * size // ranks
            k = (rank * rows, (rank + 1) * rows)
        elif kv == "as queries":
            k = q
        elif kv == "first":
            k = (0, held * size)
        elif kv == "own":
            k = (rank * held * size, (rank + 1) * held * size)
        if fused:
            k = (q[1] - q[0], q[1] - q[0] + k[1] - k[0]) if fused == "local" else tuple(num_heads * size + one for one in k)
        if inclusive:
            q, k = (q[0], q[1] - 1), (k[0], k[1] - 1)
        if as_length:
            q, k = (q[0], q[1] - q[0]), (k[0], k[1] - k[0])
        return q, k

    return rows_of_rank


heads.mistake(
    "heads-not-rows", "Those are numbers of heads. A head is head_dim rows of the weight: multiply by head_dim."
)(_heads(unit=False))


heads.mistake(
    "every-other-rank",
    "You deal the KV heads out in turn: rank 0 the first, rank 1 the second, and round again. But rank 1's queries are "
    "neighbours of rank 0's and read the same KV head: it is rank // copies that counts, not rank % num_kv_heads.",
)(_heads(neighbours=False))


@heads.symptom(
    "cuts-through-a-head",
    "With more ranks than KV heads you cut a head in pieces. Attention multiplies whole heads: a rank needs all head_dim "
    "rows of the one that its queries read, so neighbours hold the same head.",
)
def _(failure):
    _, num_kv_heads, head_dim, _, ranks = failure.args
    start, stop = failure.got[1]
    return ranks > num_kv_heads and 0 < stop - start < head_dim


heads.mistake(
    "beyond-the-last",
    "With more ranks than KV heads your ranks go on counting: these rows do not exist. Neighbours share a head, so divide "
    "the rank by the number of copies, ranks // num_kv_heads.",
)(_heads(kv="own"))


heads.mistake(
    "all-kv-heads",
    "Every rank holds all KV heads. That gives right answers, and a KV cache that is as large on every rank as on one "
    "alone: hold only the heads that this rank's queries read.",
)(_heads(kv="all"))


heads.mistake("always-the-first", "Every rank holds the first KV heads. Rank 1's queries read other ones.")(_heads(kv="first"))


heads.mistake(
    "kv-like-queries",
    "You cut keys like queries. There are fewer KV heads: num_heads // num_kv_heads query heads read the same one.",
)(_heads(kv="as queries"))


heads.mistake("stop-included", "Your second numbers are the last rows themselves. Take one past it, as slices do.")(
    _heads(inclusive=True)
)


heads.mistake("lengths", "Your second numbers are counts of rows. Give the end: one past the last row.")(_heads(as_length=True))


heads.mistake(
    "fused-rows",
    "Your key rows are counted in a stacked matrix that has the queries on top. The question is which rows of the "
    "checkpoint's k_proj this rank takes, and that is a tensor of its own, which starts at 0.",
)(_heads(fused=True))


heads.mistake(
    "local-rows",
    "Your key rows are places in this rank's own stacked matrix. The question is which rows of the checkpoint's k_proj "
    "they come from.",
)(_heads(fused="local"))


@heads.symptom(
    "empty-share",
    "A rank holds no KV rows at all. num_kv_heads // ranks is 0 where there are more ranks than KV heads: then every rank "
    "holds one whole head, the same as some of its neighbours.",
)
def _(failure):
    start, stop = failure.got[1]
    return start == stop and failure.args[-1] > failure.args[1]


@heads.symptom(
    "stop-is-start",
    "Your key rows start and stop at the same row. The stop is one past the last row: where the last head *begins* is "
    "head_dim rows too early.",
)
def _(failure):
    start, stop = failure.got[1]
    return start == stop and failure.args[-1] <= failure.args[1]


heads.wrong("cuts-through-a-head")(_heads(kv="by rows"))
heads.wrong("cuts-through-a-head")(_heads(kv="by whole rows"))


@heads.wrong("stop-is-start")
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    per, g = num_heads // ranks, num_heads // num_kv_heads
    a, b = rank * per, rank * per + per - 1
    return (a * head_dim, (b + 1) * head_dim), (a // g * head_dim, b // g * head_dim)


@heads.wrong("ranges")
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    q, k = _heads()(num_heads, num_kv_heads, head_dim, rank, ranks)
    return q, k, k


@heads.wrong("empty-share")
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    queries, held = num_heads // ranks * head_dim, num_kv_heads // ranks * head_dim
    return (rank * queries, (rank + 1) * queries), (rank * held, (rank + 1) * held)


heads.accepts(_heads())


@heads.accepts
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    """By the query heads that a rank holds."""
    own = np.array_split(np.arange(num_heads), ranks)[rank]
    met = own // (num_heads // num_kv_heads)
    return [own[0] * head_dim, (own[-1] + 1) * head_dim], [met[0] * head_dim, (met[-1] + 1) * head_dim]


@heads.accepts
def _(num_heads, num_kv_heads, head_dim, rank, ranks):
    queries = num_heads // ranks
    if ranks <= num_kv_heads:
        held = num_kv_heads // ranks
        first = rank * held
    else:
        held, first = 1, rank * num_kv_heads // ranks
    return (rank * queries * head_dim, queries * (rank + 1) * head_dim), (first * head_dim, (first + held) * head_dim)


@heads.adapt
def _(answer, original):
    from course_lib.layers.linear import MergedLinear

    def __init__(layer, hidden_size, head_dim, num_heads, num_kv_heads, *, bias, group, dtype, device):
        q, k = answer(num_heads, num_kv_heads, head_dim, group.rank, group.size)
        query, kv = range(*map(int, q)), range(*map(int, k))
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        names = ("q_proj", "k_proj", "v_proj")
        MergedLinear.__init__(layer, hidden_size, sizes, (query, kv, kv), names, bias=bias, dtype=dtype, device=device)
        layer.num_heads, layer.num_kv_heads = len(query) // head_dim, len(kv) // head_dim

    return __init__


@heads.look
def _(answer):
    for ranks in (3, 9):
        shares = [answer(9, 3, 64, rank, ranks) for rank in range(ranks)]
        held = [f"{int(k[0]) // 64}" for _, k in shares]
        cache = sum(int(k[1] - k[0]) for _, k in shares) * 2 * 4 * 30
        print(f"{ranks} ranks: KV heads {' '.join(held)}, and a token's cache takes {cache:,} bytes in all.")
    print("One process needs 46,080: replication is paid for with cache.")


# ---- 04.3 the embedding of one rank -------------------------------------------------------------

embedding = Exercise(
    "04.3",
    "A third of a dictionary",
    target="course_lib.layers.embedding:TokenEmbedding.forward",
    stars=2,
    minutes=12,
    importance="core",
    hints=(
        "A token is on exactly one rank. What must the other ranks bring, so that the sum is that rank's row?",
        "rows = ids - group.rank * len(table) are places in this rank's table; those below 0 or from len(table) on are "
        "other ranks' tokens. Look up row 0 for them, say, and make the result zero afterwards.",
        "rows = ids - group.rank * len(table); absent = (rows < 0) | ...; found = table[rows.masked_fill(absent, 0)]; return "
        "group.all_reduce(found.masked_fill(absent[:, None], 0)).",
    ),
)


@embedding.cases
def _(rng: random.Random) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))

    def table(vocab, hidden):
        return torch.randn(vocab, hidden, generator=generator)

    yield Case("10 tokens on 3 ranks: 4 rows each, the last two are padding", torch.tensor([0, 5, 9, 3]), table(10, 2), 3)
    yield Case("first and last row of each rank", torch.tensor([0, 3, 4, 7, 8, 11]), table(12, 3), 3)
    yield Case("one rank alone", torch.tensor([5, 0, 6]), table(7, 2), 1)
    yield Case("all tokens on one rank", torch.tensor([4, 6, 4]), table(12, 2), 3)
    for ranks, vocab in ((2, 9), (4, 30), (5, 23)):
        ids = torch.tensor([rng.randrange(vocab) for _ in range(12)])
        yield Case(f"12 tokens of {vocab}, {ranks} ranks", ids, table(vocab, 4), ranks)


@embedding.expected
def _(ids, table, ranks):
    return _by_rank([torch.stack([table[int(i)] for i in ids])] * ranks)


def _vocab_share(table, rank, ranks):
    rows = -(-len(table) // ranks)
    padded = F.pad(table, (0, 0, 0, rows * ranks - len(table)))
    return padded[rank * rows : (rank + 1) * rows].clone()


@embedding.run
def _(answer, ids, table, ranks):
    kept = _Kept(ids=ids, table=table)

    def rank(group):
        before = ids.clone(), _vocab_share(table, group.rank, ranks)
        own = tuple(one.clone() for one in before)
        result = answer(*own, group)
        kept.compare(before, own)
        return result

    with kept:
        return _by_rank(in_turns(ranks, rank))


@embedding.symptom(
    "changes-arguments",
    "You write into an argument. The caller still needs ids, and table is the model's own weights: make new tensors. "
    "(Zeros for other ranks' tokens go into what you have found, not into the table.)",
)
def _(failure):
    return bool(failure.changed)


@embedding.symptom(
    "rows-left-out",
    "You leave the rows of other ranks' tokens out. Ranks that are to add up must bring the same shape: keep one row per "
    "token, with zeros for the others' tokens.",
)
def _(failure):
    ids, table, ranks = failure.args
    own = [int((ids // -(-len(table) // ranks) == rank).sum()) for rank in range(ranks)]
    if isinstance(failure.error, OutOfStepError):
        brought = re.findall(r"all_(?:reduce|gather) of \[(\d+), \d+\]", str(failure.error))
        return len(brought) == 2 and int(brought[0]) == own[0] and int(brought[1]) in own
    return not failure.error and [one.shape[0] for one in failure.got.values()] == own


@embedding.symptom(
    "out-of-step",
    "Your ranks do not come to the same collectives: every rank must call all_reduce, also one that holds none of the "
    "tokens. Real ranks would wait for it for ever.",
)
def _(failure):
    return isinstance(failure.error, OutOfStepError) and "no further collective" in str(failure.error)


@embedding.symptom(
    "one-past-the-last",
    "You look up place len(table), one past this rank's last row: its places are 0 to len(table) - 1.",
)
def _(failure):
    found = re.match(r"index (\d+) is out of bounds for dimension 0 with size (\d+)", str(failure.error))
    return isinstance(failure.error, IndexError) and found[1] == found[2]


@embedding.symptom(
    "out-of-the-table",
    "You look up rows that this rank does not have. First make places of ids (subtract what the ranks before hold), then "
    "replace the places of other ranks' tokens by one that exists, and zero what you found there.",
)
def _(failure):
    return isinstance(failure.error, IndexError)


@embedding.symptom(
    "flat-mask",
    "Shapes: the mask is [T] and the rows are [T, H], so make the mask a column, absent[:, None].",
)
def _(failure):
    ids, table, _ = failure.args
    sizes = {f"({len(ids)})", f"({table.shape[1]})"}
    return "must match the size" in str(failure.error) and sizes == set(re.findall(r"\(\d+\)", str(failure.error)))


def _look_up(*, start=True, low=True, high=True, zero=True, reduce=True, low_strict=False, mean=False):
    """The solution with its joints exposed, from which the mistakes are made."""

    def look_up(ids, table, group):
        rows = ids - group.rank * len(table) if start else ids % len(table)
        absent = torch.zeros_like(ids, dtype=torch.bool)
        if low:
            absent |= (rows <= 0) if low_strict else (rows < 0)
        if high:
            absent |= rows >= len(table)
        found = table[rows.masked_fill(absent, 0)] if low or high else table[rows.clamp(0, len(table) - 1)]
        if zero:
            found = found.masked_fill(absent[:, None], 0)
        if reduce:
            found = group.all_reduce(found)
        return found / group.size if mean else found

    return look_up


embedding.mistake(
    "no-sum",
    "You return what this rank has found, with zeros for all other tokens. Add up over the ranks: return "
    "group.all_reduce(found).",
)(_look_up(reduce=False))


embedding.mistake(
    "row-zero-everywhere",
    "For tokens of other ranks you look up row 0, and leave it in: the sum has it once too often for every other rank. "
    "Zero those rows before you add up.",
)(_look_up(zero=False))


embedding.mistake(
    "clamped",
    "You clamp the places, so that a token of another rank finds this rank's first or last row, and leave it in the sum. "
    "Clamping only makes the look-up legal: zero the rows of other ranks' tokens afterwards.",
)(_look_up(low=False, high=False, zero=False))


embedding.mistake(
    "wraps-around",
    "Places below 0 are not masked. Indexing with -1 finds the last row, without an error: tokens of the ranks before get "
    "a row of yours on top.",
)(lambda ids, table, group: _wrapping(ids, table, group))


def _wrapping(ids, table, group):
    rows = ids - group.rank * len(table)
    absent = rows >= len(table)
    found = table[rows.masked_fill(absent, 0).clamp(min=-len(table)) % len(table)]
    return group.all_reduce(found.masked_fill(absent[:, None], 0))


@embedding.mistake(
    "modulo-alone",
    "ids % len(table) is the place of a token on the rank that has it, but every rank finds something there. Also ask "
    "whether ids // len(table) is this rank, and zero the others.",
)
def _(ids, table, group):
    return group.all_reduce(table[ids % len(table)])


embedding.mistake(
    "loses-the-first",
    "The first row of every rank is lost: place 0 is this rank's own. A token is absent if its place is *below* 0.",
)(_look_up(low_strict=True))


embedding.mistake("mean", "You take the mean. All but one rank bring zeros, so the sum is the row itself.")(_look_up(mean=True))


@embedding.wrong("changes-arguments")
def _(ids, table, group):
    ids -= group.rank * len(table)
    absent = (ids < 0) | (ids >= len(table))
    ids[absent] = 0
    return group.all_reduce(table[ids].masked_fill(absent[:, None], 0))


@embedding.wrong("changes-arguments")
def _(ids, table, group):
    table[0] = 0
    rows = ids - group.rank * len(table)
    absent = (rows < 0) | (rows >= len(table))
    return group.all_reduce(table[rows.masked_fill(absent, 0)])


@embedding.wrong("one-past-the-last")
def _(ids, table, group):
    rows = ids - group.rank * len(table)
    absent = (rows < 0) | (rows > len(table))
    return group.all_reduce(table[rows.masked_fill(absent, 0)].masked_fill(absent[:, None], 0))


@embedding.wrong("one-past-the-last")
def _(ids, table, group):
    found, first = torch.zeros(len(ids), table.shape[1]), group.rank * len(table)
    for i, token in enumerate(ids):
        if first <= token <= first + len(table):
            found[i] = table[token - first]
    return group.all_reduce(found)


@embedding.wrong("rows-left-out")
def _(ids, table, group):
    first = group.rank * len(table)
    mine = (ids >= first) & (ids < first + len(table))
    return group.all_reduce(table[ids[mine] - first])


@embedding.wrong("rows-left-out")
def _(ids, table, group):
    first = group.rank * len(table)
    mine = (ids >= first) & (ids < first + len(table))
    return group.all_gather(table[ids[mine] - first])


@embedding.wrong("out-of-step")
def _(ids, table, group):
    rows = ids - group.rank * len(table)
    absent = (rows < 0) | (rows >= len(table))
    if absent.all():
        return torch.zeros(len(ids), table.shape[1])
    return group.all_reduce(table[rows.masked_fill(absent, 0)].masked_fill(absent[:, None], 0))


@embedding.wrong("out-of-the-table")
def _(ids, table, group):
    return group.all_reduce(table[ids])


@embedding.wrong("flat-mask")
def _(ids, table, group):
    rows = ids - group.rank * len(table)
    absent = (rows < 0) | (rows >= len(table))
    return group.all_reduce(table[rows.masked_fill(absent, 0)].masked_fill(absent, 0))


@embedding.wrong("rows-left-out")
def _(ids, table, group):
    rows = ids - group.rank * len(table)
    mine = (rows >= 0) & (rows < len(table))
    return table[rows[mine]]


@embedding.accepts
def _(ids, table, group):
    """One-hot rows times the table."""
    places = torch.arange(len(table)) + group.rank * len(table)
    return group.all_reduce((ids[:, None] == places).to(table.dtype) @ table)


@embedding.accepts
def _(ids, table, group):
    """Token by token."""
    found = torch.zeros(len(ids), table.shape[1], dtype=table.dtype)
    for i, token in enumerate(ids.tolist()):
        rank, row = divmod(token, len(table))
        if rank == group.rank:
            found[i] = table[row]
    return group.all_reduce(found)


embedding.accepts(_look_up())


@embedding.budget(
    "The table itself need not travel. Look up on each rank and add up: one row per token goes over the wire.",
    most=5 * 4 * 4,
    unit="bytes given to collectives",
)
def _(answer):
    table = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))

    def rank(group):
        answer(torch.tensor([0, 21, 45, 59, 3]), _vocab_share(table, group.rank, 3), group)
        return group.traffic.bytes

    return max(in_turns(3, rank))


@embedding.budget(
    "One meeting does for all tokens: fill in the rows of all of them first, then add up once.", most=1, unit="collectives"
)
def _(answer):
    table = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))

    def rank(group):
        answer(torch.tensor([0, 21, 45, 59, 3]), _vocab_share(table, group.rank, 3), group)
        return group.traffic.all_reduce_calls + group.traffic.gather_calls

    return max(in_turns(3, rank))


@embedding.wasteful
def _(ids, table, group):
    return group.all_gather(table)[ids]


@embedding.wasteful
def _(ids, table, group):
    """A meeting per token."""
    nothing = torch.zeros(table.shape[1])
    ranks_and_rows = [divmod(token, len(table)) for token in ids.tolist()]
    return torch.stack([group.all_reduce(table[row] if rank == group.rank else nothing) for rank, row in ranks_and_rows])


@embedding.adapt
def _(answer, original):
    return lambda module, input_ids: answer(input_ids, module.weight, module.vocab.group)


@embedding.look
def _(answer, llm):
    """The real table, in three parts."""
    table = llm.llm_engine.core.executor.runner.model.embedding_weight()
    text = "The capital of Iceland is Reykjavik"
    ids = torch.tensor(llm.get_tokenizer().encode(text))
    with torch.inference_mode():
        parts = [_vocab_share(table, rank, 3) for rank in range(3)]
        rows = in_turns(3, lambda group: answer(ids.clone(), parts[group.rank], group))
    print(f"{len(table):,} rows, {len(parts[0]):,} on each of three ranks. Of {text!r} the tokens are on ranks "
          f"{', '.join(str(int(i) // len(parts[0])) for i in ids)};")  # fmt: skip
    print("every rank ends up with every row:", all(torch.equal(one, table[ids]) for one in rows))


# ---- 04.4 groups --------------------------------------------------------------------------------

groups = Exercise(
    "04.4",
    "Who belongs together",
    target="course_lib.parallel.layout:ParallelLayout.pipeline_groups",
    stars=1,
    minutes=8,
    importance="useful",
    hints=(
        "Write the ranks of one replica as a table: one line per pipeline stage, `tensor` ranks in each line. Which "
        "direction is a pipeline group?",
        "Rank = (replica * pipeline + stage) * tensor + place. A pipeline group fixes replica and place, and runs over "
        "the stages.",
        "[[(d * pipeline + p) * tensor + t for p in range(pipeline)] for d in ... for t in ...]",
    ),
)


@groups.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("one replica on 6 ranks: 3 x 2", 3, 2, 1)
    yield Case("two stages, three replicas, no tensor parallelism", 1, 2, 3)
    yield Case("world 8: tensor 2, pipeline 2, two replicas", 2, 2, 2)
    yield Case("tensor parallelism alone", 3, 1, 1)
    for _ in range(4):
        yield Case("a random layout", rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3))


@groups.expected
def _(tensor, pipeline, data):
    """By reshaping all ranks, as vLLM does."""
    ranks = np.arange(tensor * pipeline * data).reshape(data, pipeline, tensor)
    return ranks.transpose(0, 2, 1).reshape(-1, pipeline).tolist()


@groups.same
def _(got, expected, case):
    return _are_lists_of_ranks(got) and sorted(map(list, got)) == sorted(expected)


def _are_lists_of_ranks(got):
    return isinstance(got, list | tuple) and all(
        isinstance(group, list | tuple) and all(isinstance(rank, int | np.integer) for rank in group) for group in got
    )


@groups.symptom(
    "nested", "Your groups are nested one level too deep: return one flat list with the groups of all replicas."
)
def _(failure):
    return bool(failure.got) and all(bool(one) and _are_lists_of_ranks(one) for one in failure.got)


@groups.symptom(
    "no-lists",
    "Return a list of lists of whole numbers, [[0, 3], [1, 4], [2, 5]]: no flat list, no generators, arrays or tensors.",
)
def _(failure):
    return not failure.error and failure.got is not None and not _are_lists_of_ranks(failure.got)


@groups.symptom(
    "shared-ranks",
    "A rank is in no group or in two. Every rank belongs to exactly one pipeline group.",
)
def _(failure):
    members = sorted(rank for group in failure.got for rank in group)
    return members != sorted(rank for group in failure.expected for rank in group)


@groups.symptom("last-stage-first", "Your groups start with the last stage. The first stage comes first.")
def _(failure):
    backwards = sorted(list(reversed(group)) for group in failure.got)
    return backwards == sorted(failure.expected)


@groups.mistake(
    "tensor-groups",
    "Those are the tensor groups: neighbours, which hold slices of the *same* layers. A pipeline group has one rank of each "
    "stage, `tensor` apart.",
)
def _(tensor, pipeline, data):
    return [list(range(i, i + tensor)) for i in range(0, tensor * pipeline * data, tensor)]


@groups.mistake(
    "neighbours",
    "You group neighbours. Neighbouring ranks are a tensor group (they talk most, so they sit closest); stages are "
    "`tensor` apart.",
)
def _(tensor, pipeline, data):
    return [list(range(i, i + pipeline)) for i in range(0, tensor * pipeline * data, pipeline)]


@groups.mistake(
    "across-replicas",
    "Your stride is right, but a group runs on into the next replica. Each replica has a pipeline of its own: fix the "
    "replica, then run over its stages.",
)
def _(tensor, pipeline, data):
    world = tensor * pipeline * data
    return [list(range(i, world, tensor)) for i in range(tensor)]


@groups.mistake(
    "data-groups",
    "Those ranks hold the *same* part in different replicas. A pipeline group stays inside one replica.",
)
def _(tensor, pipeline, data):
    size = tensor * pipeline
    return [list(range(i, size * data, size)) for i in range(size)]


@groups.mistake(
    "pipeline-fastest",
    "You number the ranks with the replica running fastest. It is the slowest: a replica's ranks are "
    "tensor * pipeline neighbours.",
)
def _(tensor, pipeline, data):
    return [[(p * tensor + t) * data + d for p in range(pipeline)] for d in range(data) for t in range(tensor)]


@groups.wrong("nested")
def _(tensor, pipeline, data):
    return [[[(d * pipeline + p) * tensor + t for p in range(pipeline)] for t in range(tensor)] for d in range(data)]


@groups.wrong("no-lists")
def _(tensor, pipeline, data):
    return list(torch.arange(tensor * pipeline * data).view(data, pipeline, tensor).transpose(1, 2).reshape(-1, pipeline))


@groups.wrong("no-lists")
def _(tensor, pipeline, data):
    size = tensor * pipeline
    return (list(range(d * size + t, (d + 1) * size, tensor)) for d in range(data) for t in range(tensor))


@groups.wrong("shared-ranks")
def _(tensor, pipeline, data):
    return [[p * tensor + t for p in range(pipeline)] for t in range(tensor)]


@groups.wrong("last-stage-first")
def _(tensor, pipeline, data):
    return [
        [(d * pipeline + p) * tensor + t for p in reversed(range(pipeline))] for d in range(data) for t in range(tensor)
    ]


@groups.accepts
def _(tensor, pipeline, data):
    size = tensor * pipeline
    return [list(range(d * size + t, (d + 1) * size, tensor)) for d in range(data) for t in range(tensor)]


@groups.accepts
def _(tensor, pipeline, data):
    """By the coordinates of each rank; the groups come in another order."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(tensor * pipeline * data):
        found.setdefault((rank % tensor, rank // (tensor * pipeline)), []).append(rank)
    return list(found.values())


@groups.adapt
def _(answer, original):
    def pipeline_groups(layout):
        return [list(map(int, group)) for group in answer(layout.tensor, layout.pipeline, layout.data)]

    return pipeline_groups


@groups.look
def _(answer):
    print("world 8, tensor 2, pipeline 2:", sorted(answer(2, 2, 2)))
    print("16 GPUs in two machines, tensor 8, pipeline 2:", " ".join(str(one) for one in sorted(answer(8, 2, 1))[:3]),
          "…: only these pairs talk across the network.")  # fmt: skip


# ---- 04.5 out of step ---------------------------------------------------------------------------

agree = Exercise(
    "04.5",
    "Who is out of step",
    target="course_lib.executor.lock_step:LockStep.agree",
    stars=3,
    minutes=20,
    importance="core",
    hints=(
        "Make text of the plan, so that equal plans give equal text in every process, and a short digest of the text. "
        "What in the plan has no order of its own?",
        "json.dumps on the plan with `ended` sorted; hashlib.blake2b(text.encode(), digest_size=8).digest(). Python's own "
        "hash() of a text differs from process to process. Of the gathered digests, collections.Counter finds the usual.",
        "text = json.dumps(plan | {'ended': ...}); digests = group.all_gather_object(hashlib.blake2b(text.encode(), "
        "digest_size=8).digest()); usual = Counter(digests).most_common(1)[0][0]; return [rank for rank, one in "
        "enumerate(digests) if one != usual].",
    ),
)


class _RankText(str):
    """A request id as another process has it: equal, with a hash of its own, so that sets have another order."""

    def __new__(cls, text: str, rank: int):
        self = super().__new__(cls, text)
        self.rank = rank
        return self

    def __hash__(self):
        return zlib.crc32(f"{self.rank}:{str.__str__(self)}".encode())

    def __reduce__(self):  # what is sent is only the text
        return str, (str.__str__(self),)


def _on_rank(value, rank):
    """A plan as rank `rank` would have it."""
    if isinstance(value, str):
        return _RankText(value, rank)
    if isinstance(value, dict):
        return {_on_rank(key, rank): _on_rank(one, rank) for key, one in value.items()}
    if isinstance(value, set):
        return {_on_rank(one, rank) for one in value}
    return [_on_rank(one, rank) for one in value] if isinstance(value, list) else value


def _plan_on_rank(plan, rank):
    return {part: _on_rank(value, rank) for part, value in plan.items()}


@agree.run
def _(answer, plans):
    """`hash` of a text differs from process to process; so it does here."""
    plain = builtins.hash
    results, changed = _Results(), set()

    def rank(group):
        def hash_here(value):
            results.used_hash = True
            return plain(value) ^ (group.rank * 0x9E3779B97F4A7C15 >> 3)

        plan, before = (_plan_on_rank(plans[group.rank], group.rank) for _ in range(2))
        with mock.patch.object(builtins, "hash", hash_here):
            result = answer(plan, group)
        changed.update([group.rank] * (plan != before))
        return result

    results |= _by_rank(in_turns(len(plans), rank))
    if changed:
        plans.append(None)  # so that the check notices
    return results


class _Results(dict):
    """What the ranks return, and whether one of them has called Python's hash()."""

    used_hash = False


def _plan(**changes):
    plan = {
        "new": {"7": [504, 3575, 282]},
        "tokens": {"3": 1, "5": 1, "7": 3},
        "blocks": {"3": [], "5": [12], "7": [4]},
        "sampled": {"3": [260], "5": [1135]},
        "ended": {"1", "2", "4", "6", "8", "9"},
    }
    return plan | changes


@agree.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("three ranks in step, nothing has ended yet", [_plan(ended=set()) for _ in range(3)])
    yield Case("three ranks in step", [_plan() for _ in range(3)])
    yield Case("one rank alone", [_plan()])
    odd = rng.randrange(1, 3)
    fewer = {"3": 1, "5": 1, "7": 2}
    yield Case("one rank computes a token less", [_plan(tokens=fewer) if r == odd else _plan() for r in range(3)])
    yield Case("rank 0 is the odd one", [_plan(tokens=fewer if r == 0 else _plan()["tokens"]) for r in range(3)])
    other = {"3": [], "5": [13], "7": [4]}
    yield Case("the same counts, another block", [_plan(blocks=other) if r == odd else _plan() for r in range(3)])
    drew = {"3": [260], "5": [1136]}
    yield Case("another token was sampled", [_plan(sampled=drew) if r == odd else _plan() for r in range(3)])
    ended = {"1", "2", "4", "6", "8"}
    yield Case("one rank has a request less ended", [_plan(ended=ended) if r == odd else _plan() for r in range(3)])
    prompt = {"7": [504, 3575, 283]}
    yield Case("another prompt", [_plan(new=prompt) if r == odd else _plan() for r in range(3)])
    order = {"5": 1, "3": 1, "7": 3}
    yield Case("the same requests in another order", [_plan(tokens=order) if r == odd else _plan() for r in range(3)])
    yield Case("five ranks, three ways", [_plan(tokens=fewer), _plan(), _plan(), _plan(ended=set()), _plan()])
    for blocks in range(4):  # many, because a set of digests may happen to have rank 0's first
        one, other = _plan(), _plan(blocks={"3": [], "5": [rng.randrange(20, 90)], "7": [blocks]})
        yield Case("two ranks that differ: rank 0's plan counts", [one, other])
        yield Case("two against two: rank 0's plan counts", [other, one, one, other])


@agree.expected
def _(plans):
    """By comparing the plans themselves, pair by pair."""

    def alike(one, other):
        return one == other and list(one["tokens"]) == list(other["tokens"])

    votes = [sum(alike(one, other) for other in plans) for one in plans]
    usual = plans[votes.index(max(votes))]
    return _by_rank([[rank for rank, plan in enumerate(plans) if not alike(plan, usual)]] * len(plans))


@agree.symptom(
    "not-json",
    "JSON has no sets. Give it something with an order: sorted(plan['ended']) for the set.",
)
def _(failure):
    return isinstance(failure.error, TypeError) and "not JSON serializable" in str(failure.error)


@agree.symptom(
    "not-bytes",
    "hashlib hashes bytes: text.encode(), or json.dumps(…).encode().",
)
def _(failure):
    return isinstance(failure.error, TypeError) and "encod" in str(failure.error)


@agree.symptom(
    "unhashable",
    "hash() does not take dicts, lists or sets. And of a text it gives another number in every process: make text of the "
    "plan and digest that with hashlib.",
)
def _(failure):
    return isinstance(failure.error, TypeError) and "unhashable" in str(failure.error)


@agree.symptom(
    "out-of-step",
    "Your ranks call all_gather_object a different number of times: which rank exchanges more must not depend on what only "
    "that rank knows. (After the digests are gathered everybody knows the same.)",
)
def _(failure):
    return isinstance(failure.error, OutOfStepError)


@agree.symptom(
    "not-a-list",
    "Return the list of the ranks that are out of step, [] when all agree.",
)
def _(failure):
    return not failure.error and not all(isinstance(one, list | tuple) for one in failure.got.values())


def _digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _ordered(plan):
    return plan | {"ended": sorted(plan["ended"])}


def _agree(digest, choose=None):
    """The solution with its joints exposed, from which the mistakes are made."""

    def agree(plan, group):
        digests = group.all_gather_object(digest(plan))
        if choose is not None:
            return choose(digests, group)
        usual = Counter(digests).most_common(1)[0][0]
        return [rank for rank, one in enumerate(digests) if one != usual]

    return agree


def _good(plan):
    return _digest_of(json.dumps(_ordered(plan)))


@agree.symptom(
    "pythons-hash",
    "You use hash(). Of a text it gives another number in every process (Python adds a secret to it, PYTHONHASHSEED), so "
    "equal plans look different. Use hashlib on the encoded text.",
)
def _(failure):
    return failure.got.used_hash and failure.expected["rank 0"] == []


agree.mistake(
    "order-of-the-set",
    "The set of ended requests has no order: in another process its elements come in another one, so equal plans give "
    "different text. Sort them before you make text.",
)(_agree(lambda plan: _digest_of(repr(plan))))


agree.mistake(
    "order-lost",
    "You sort the requests, and so miss a rank that serves the same ones in another order. The order is part of the plan: "
    "row i of every sum must be the same request on all ranks. Sort only the set.",
)(_agree(lambda plan: _digest_of(json.dumps(_ordered(plan), sort_keys=True))))


agree.mistake(
    "counts-only",
    "You compare how many tokens each request gets, and nothing else. Ranks that write into other blocks, or that have "
    "sampled another token, go wrong as well: digest the whole plan.",
)(_agree(lambda plan: _digest_of(json.dumps(plan["tokens"]))))


agree.mistake(
    "total-only",
    "You compare totals. Equal sizes keep the ranks from waiting for ever, but not from adding up different requests: "
    "digest the whole plan.",
)(_agree(lambda plan: sum(plan["tokens"].values())))


agree.mistake(
    "ended-left-out",
    "The set of ended requests is not in your digest. A rank that still keeps one will hold its blocks, and plan "
    "otherwise sooner or later: sort it, and include it.",
)(_agree(lambda plan: _digest_of(json.dumps({part: value for part, value in plan.items() if part != "ended"}))))


agree.mistake(
    "sampled-left-out",
    "What was sampled is not in your digest. A rank with another seed draws another token and feeds it into the next "
    "step: digest the whole plan.",
)(_agree(lambda plan: _digest_of(json.dumps({part: value for part, value in _ordered(plan).items() if part != "sampled"}))))


agree.mistake(
    "rank-0-is-right",
    "You take rank 0 for right. If it is the odd one out, you accuse everybody else: go by what most ranks have, and by "
    "rank 0 only where no plan has more ranks than another.",
)(_agree(_good, lambda digests, group: [rank for rank, one in enumerate(digests) if one != digests[0]]))


agree.mistake(
    "i-am-right",
    "You compare with this rank's own plan. Then every rank accuses others, and each returns something else: go by what "
    "most ranks have.",
)(_agree(_good, lambda digests, group: [rank for rank, one in enumerate(digests) if one != digests[group.rank]]))


agree.mistake(
    "the-usual-ones",
    "You return the ranks that are in step. Return the others.",
)(
    _agree(
        _good,
        lambda digests, group: [
            rank for rank, one in enumerate(digests) if one == Counter(digests).most_common(1)[0][0]
        ],
    )
)


@agree.symptom(
    "last-of-equals",
    "Where no plan has more ranks than another, rank 0's counts as the usual one: Counter(…).most_common(1) keeps the "
    "first of equals, max over a set may not (and the order of a set differs from process to process).",
)
def _(failure):
    (plans,) = failure.args
    votes = [plans.count(plan) for plan in plans]
    of_tied = [[rank for rank, one in enumerate(plans) if one != plan] for plan in plans if plans.count(plan) == max(votes)]
    is_tie = any(odd != of_tied[0] for odd in of_tied)
    return is_tie and not failure.error and all(list(odd) in of_tied for odd in failure.got.values())


@agree.symptom(
    "changes-plan",
    "You change the plan. The engine still needs it as it was: make a new dict, plan | {…}, or text of its parts.",
)
def _(failure):
    return bool(failure.changed)


def _odd_with_last(digests):
    usual = Counter(reversed(digests)).most_common(1)[0][0]
    return [rank for rank, one in enumerate(digests) if one != usual]


@agree.symptom(
    "false-alarm",
    "You report ranks that are in step. Something in what you compare differs from process to process although the plans "
    "are equal: the order of a set, an address, a time, the number of the rank.",
)
def _(failure):
    return not failure.error and failure.expected["rank 0"] == [] and any(len(one) for one in failure.got.values())


@agree.symptom(
    "overlooks",
    "A rank that plans otherwise escapes you: some part of the plan does not get into what you compare. The keys alone are "
    "the same on all ranks; their values count.",
)
def _(failure):
    return not failure.error and bool(failure.expected["rank 0"]) and not any(failure.got.values())


@agree.symptom(
    "lists-differ",
    "Your ranks return different lists. Everybody has the same digests, and must return the same list of *all* ranks that "
    "are out of step: otherwise one of them stops, and the others wait for it.",
)
def _(failure):
    first, *others = failure.got.values()
    return any(list(one) != list(first) for one in others)


agree.wrong("last-of-equals")(_agree(_good, lambda digests, group: _odd_with_last(digests)))


@agree.wrong("lists-differ")
def _(plan, group):
    digests = group.all_gather_object(_good(plan))
    return [] if digests[group.rank] == Counter(digests).most_common(1)[0][0] else [group.rank]


def _with_max(algorithm):
    def agree(plan, group):
        digests = group.all_gather_object(hashlib.new(algorithm, json.dumps(_ordered(plan)).encode()).hexdigest())
        most = max(set(digests), key=digests.count)
        return [rank for rank, one in enumerate(digests) if one != most]

    return agree


for algorithm in ("sha256", "sha1", "md5", "sha512"):
    agree.wrong("last-of-equals")(_with_max(algorithm))


@agree.wrong("changes-plan")
def _(plan, group):
    plan["ended"] = sorted(plan["ended"])
    return _agree(lambda plan: _digest_of(json.dumps(plan)))(plan, group)


agree.wrong("overlooks")(_agree(lambda plan: _digest_of(str(plan.keys()))))
agree.wrong("not-json")(_agree(lambda plan: _digest_of(json.dumps(plan))))
agree.wrong("not-bytes")(_agree(lambda plan: hashlib.sha256(json.dumps(_ordered(plan))).digest()))
agree.wrong("unhashable")(_agree(lambda plan: hash(tuple(plan.items()))))
agree.wrong("not-a-list")(_agree(_good, lambda digests, group: len(set(digests)) == 1))
agree.wrong("order-of-the-set")(_agree(lambda plan: _digest_of(json.dumps(plan, default=list))))
agree.wrong("pythons-hash")(_agree(lambda plan: hash(repr(_ordered(plan)))))
agree.wrong("pythons-hash")(_agree(lambda plan: hash(json.dumps(_ordered(plan)))))
agree.wrong("false-alarm")(_agree(lambda plan: id(plan)))
agree.wrong("pythons-hash")(_agree(lambda plan: hash(frozenset(plan["ended"]))))


@agree.wrong("out-of-step")
def _(plan, group):
    digests = group.all_gather_object(_good(plan))
    if digests[group.rank] != digests[0]:
        group.all_gather_object(plan)
    return [rank for rank, one in enumerate(digests) if one != digests[0]]


agree.accepts(_agree(_good))
agree.accepts(_agree(lambda plan: hashlib.sha256(repr(sorted(plan["ended"])).encode() + repr(
    {part: value for part, value in plan.items() if part != "ended"}).encode()).hexdigest()))
agree.accepts(_agree(lambda plan: zlib.crc32(json.dumps(plan, default=sorted).encode())))


@agree.accepts
def _(plan, group):
    """Plans are exchanged only if the digests differ."""
    parts = [repr(plan[part]) for part in ("new", "tokens", "blocks", "sampled")] + sorted(plan["ended"])
    digests = group.all_gather_object(hashlib.md5("|".join(parts).encode()).digest())
    if len(set(digests)) == 1:
        return []
    plans = group.all_gather_object(parts)
    votes = [plans.count(one) for one in plans]
    return [rank for rank, one in enumerate(plans) if one != plans[votes.index(max(votes))]]


@agree.budget(
    "Ranks are in step nearly always, so that case must be cheap: exchange a digest of a few bytes, and the plans "
    "themselves only if the digests differ.",
    most=200,
    unit="bytes sent by a rank in a step of 40 requests",
)
def _(answer):
    names = [str(i) for i in range(40)]
    plan = _plan(tokens=dict.fromkeys(names, 1), blocks={one: [] for one in names}, sampled={one: [7] for one in names})

    def rank(group):
        answer(_plan_on_rank(plan, 0), group)
        return group.traffic.gather_bytes

    return max(in_turns(3, rank))


@agree.wasteful
def _(plan, group):
    plans = group.all_gather_object(json.dumps(_ordered(plan)))
    usual = Counter(plans).most_common(1)[0][0]
    return [rank for rank, one in enumerate(plans) if one != usual]


def _plan_of(scheduled, sampled):
    """The plan that the exercise speaks of, from the engine's."""
    cached = scheduled.cached_requests
    blocks = {new.request_id: list(new.block_ids) for new in scheduled.new_requests}
    blocks |= {name: list(ids) for name, ids in zip(cached.request_ids, cached.new_block_ids, strict=True)}
    return {
        "new": {new.request_id: list(new.prompt_token_ids) for new in scheduled.new_requests},
        "tokens": dict(scheduled.num_scheduled_tokens),
        "blocks": blocks,
        "sampled": {name: list(tokens) for _, name, tokens in sampled},
        "ended": set(scheduled.finished_request_ids),
    }


@agree.adapt
def _(answer, original):
    from course_lib.errors import RankDivergenceError

    def agree(lock_step, scheduled):
        lock_step._num_steps += 1
        sampled, lock_step._sampled = lock_step._sampled, []
        if odd := answer(_plan_of(scheduled, sampled), lock_step._group):
            names = ", ".join(map(str, odd))
            raise RankDivergenceError(f"your agree found before step {lock_step._num_steps}: out of step is rank {names}")

    return agree


@agree.look
def _(answer):
    """Three real schedulers; the third has a block less than the others, until they take the minimum of all."""
    for blocks in ([12, 12, 11], [11, 11, 11]):
        steps, odd = _steps_together(answer, blocks)
        found = f"you name rank {', '.join(map(str, odd))} before step {steps + 1}" if odd else "nobody is ever named"
        print(f"KV blocks {blocks}: {steps} steps together, and {found}.")
    print("That is why ranks take the least number of blocks of all before they begin.")


def _steps_together(answer, blocks):
    """(steps until the answer names somebody, whom)"""
    from course_lib.config import SchedulerConfig
    from course_lib.core.kv_cache_manager import KVCacheManager
    from course_lib.core.messages import ModelRunnerOutput
    from course_lib.core.request import Request
    from course_lib.core.scheduler import Scheduler
    from course_lib.sampling_params import SamplingParams

    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=32, max_model_len=256, enable_chunked_prefill=True,
        long_prefill_token_threshold=0, policy="fcfs",
    )  # fmt: skip
    schedulers = [Scheduler(config, KVCacheManager(number, 4, False)) for number in blocks]
    for scheduler in schedulers:
        for name in "abc":
            params = SamplingParams(max_tokens=14, ignore_eos=True)
            scheduler.add_request(Request(name, list(range(6)), params, None, 0.0))
    sampled: list[tuple[int, str, list[int]]] = []
    for step in range(1000):
        if not schedulers[0].requests:
            return step, []
        scheduled = [scheduler.schedule() for scheduler in schedulers]
        plans = [_plan_of(one, sampled) for one in scheduled]
        odd = in_turns(len(plans), lambda group, plans=plans: answer(pickle.loads(pickle.dumps(plans[group.rank])), group))[0]
        if odd:
            return step, odd
        for scheduler, one in zip(schedulers, scheduled, strict=True):
            ids = list(one.num_scheduled_tokens)
            done = [scheduler.requests[name].num_computed_tokens == scheduler.requests[name].num_tokens for name in ids]
            output = ModelRunnerOutput(ids, [[7] if ready else [] for ready in done])
            scheduler.update_from_output(output)
        sampled = [(step, name, tokens) for name, tokens in zip(output.request_ids, output.sampled_token_ids, strict=True)]
    return 1000, []
