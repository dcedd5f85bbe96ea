"""Lesson 06, prefix caching: what its exercises ask, how answers are judged, which mistakes people make."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator

import torch

from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

# ---- questions ----------------------------------------------------------------------------------

the_time = Question(
    "06.a",
    "A server helps its model with the time and puts “It is 14:03.” in front of the letter. Four requests come, a minute "
    "apart, so that one digit differs. Of each prompt's 278 tokens, how many do the second, third and fourth find?",
    [
        Choice(
            "256, the letter's full blocks: the letter is the same",
            "The letter's tokens are the same. Their keys and values are not.",
        ),
        Choice(
            "about 250: all but the block with the digit in it",
            "The keys of everything behind the digit were computed by a model that had read another digit, in every layer "
            "but the lowest.",
        ),
        Choice(
            "none",
            "The digit is in the first block, so not even that one is the same, and behind it nothing can be. At the end of "
            "the letter the same sentence costs nothing.",
            right=True,
        ),
    ],
)  # fmt: skip

baseline = Question(
    "06.b",
    "vLLM's example builds an engine, LLM(model=…), has it answer the four prompts in one call and names that the baseline. "
    "Then it builds a second one with enable_prefix_caching=True and warms it with the first prompt. Of the prompts' 1,078 "
    "tokens, how many does the baseline compute?",
    [
        Choice(
            "1,078: nobody switched the cache on",
            "Nobody had to. It has been on by default since vLLM's second engine (V1), and it is here. Who wants a baseline "
            "must say enable_prefix_caching=False.",
        ),
        Choice(
            "1,078: it is on, but when the step begins nothing is in it",
            "The four are planned one after another. When the second one's turn comes, the first one's blocks have their "
            "owner and their content is known, though no key is computed yet.",
        ),
        Choice(
            "310: the letter once, and what is new in each",
            "The cache is on by default, and it works within one batch: every layer writes all new keys before any query "
            "of that layer looks at them. So the example compares caching with caching, finds equal texts, and prints that.",
            right=True,
        ),
    ],
)  # fmt: skip

which_layers = Question(
    "06.c",
    "The third letter begins with two blocks that are right for it and goes on with blocks from Paris, which hold the tokens that it "
    "has itself, at the same positions. In which layers are the keys in those blocks not its own?",
    [
        Choice("in all 30", "Layer 0 makes a key from the token and its position, and both are the same."),
        Choice(
            "in all but layer 0",
            "Layer 0 sees the token and its position, which are the same. From layer 1 on a key is made of what attention "
            "brought along, and that was Paris.",
            right=True,
        ),
        Choice("in the upper half", "The word is some tokens away, but one layer of attention reaches any distance."),
        Choice("in none: the tokens are the same", "The tokens are; the text before them is not."),
    ],
)

# ---- 06.1 what can be taken over ------------------------------------------------------------------

# "The capital of France is Paris", " was Lyon", " of Italy is Rome": as the notebook's example
PARIS, LYON, ROME = (
    [504, 3575, 282, 4649, 314, 7042],
    [504, 3575, 282, 4649, 436, 18205],
    [504, 3575, 282, 8108, 314, 9640],
)

reuse = Exercise(
    "06.1",
    "What can be taken over?",
    target="course_lib.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    stars=1,
    minutes=8,
    importance="core",
    hints=(
        "Three limits, one after the other: how far the texts agree, that a token is left, that blocks are whole. Which of "
        "them must come last?",
        "Count equal tokens from the front and stop at the first that differ; at most len(prompt) - 1 of them may be taken. "
        "Only then cut to whole blocks.",
        "With `same` tokens in common: min(same, len(prompt) - 1) // block_size * block_size. For `same`, go through "
        "zip(prompt, cached) and break at the first unequal pair.",
    ),
)


@reuse.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("Paris again", PARIS, [*PARIS], 4)
    yield Case("Lyon after Paris", LYON, PARIS, 4)
    yield Case("Rome after Paris", ROME, PARIS, 4)
    eight = [rng.randrange(1000) for _ in range(8)]
    yield Case("eight tokens, and the same eight again", eight, [*eight], 4)
    yield Case("one more token than is cached", [*eight, 5], eight, 4)
    yield Case("one token less than is cached", eight[:7], eight, 4)
    yield Case(
        "a text that agrees with the cached one except in its first token", [eight[0] + 1, *eight[1:], 3, 4], eight, 4
    )
    longer = [rng.randrange(1000) for _ in range(24)]
    yield Case(
        "a text that differs in token 9 and then goes on as the cached one",
        [*longer[:9], 2000, *longer[10:]],
        longer,
        4,
    )
    yield Case("the cached text with a word before it", [7, *longer], longer, 4)
    yield Case("the cached text's first two blocks in the other order", [*longer[4:8], *longer[:4], 5], longer, 4)
    yield Case("the beginning of a cached text", longer[:12], longer, 4)
    yield Case("a prompt of one token", longer[:1], longer, 4)
    yield Case("nothing is cached", longer, [], 4)
    yield Case("blocks of one token", longer[:9], longer, 1)
    for _ in range(4):
        size = rng.choice((2, 8, 16))
        text = [rng.randrange(50) for _ in range(rng.randint(1, 5 * size))]
        same = rng.randint(0, len(text))
        tail = [100 + rng.randrange(50) for _ in range(rng.randint(1, size))]
        yield Case("random texts with a common beginning", [*text[:same], *tail], text, size)


@reuse.expected
def _(prompt, cached, block_size):
    """The longest of all candidates that satisfies the rules, tried one by one."""
    counts = range(0, len(prompt), block_size)  # whole blocks, with at least one token behind them
    return max(n for n in counts if n <= len(cached) and prompt[:n] == cached[:n])


def _common(prompt, cached) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, cached, strict=False)))


@reuse.symptom(
    "past-the-end",
    "You look past the end of the shorter text. The two may differ in length: zip(prompt, cached) stops with the shorter.",
)
def _(failure):
    return isinstance(failure.error, IndexError)


reuse.wrong("past-the-end")(
    lambda prompt, cached, size: next(i for i in range(99) if prompt[i] != cached[i]) // size * size
)


@reuse.mistake(
    "not-whole-blocks",
    "You stop in the middle of a block. A block that is shared in part would be written to by its next owner, and by you "
    "with another text: cut to whole blocks, // block_size * block_size.",
)
def _(prompt, cached, size):
    return min(_common(prompt, cached), len(prompt) - 1)


@reuse.mistake(
    "parts-of-blocks",
    "You count every token that the texts have in common. Cut to whole blocks, and leave one token of the prompt.",
)
def _(prompt, cached, size):
    return _common(prompt, cached)


@reuse.mistake(
    "nothing-left",
    "When all blocks of the prompt are found, you leave nothing to compute. The cache has keys and values and no logits: "
    "without a query for the last token nobody says what comes next. Take at most len(prompt) - 1.",
)
def _(prompt, cached, size):
    return _common(prompt, cached) // size * size


@reuse.mistake(
    "cut-before-the-limit",
    "You leave one token, but of a whole block: it would have to be written into a block that others share. Apply the "
    "limit of len(prompt) - 1 first and cut to whole blocks after that.",
)
def _(prompt, cached, size):
    return min(_common(prompt, cached) // size * size, max(len(prompt) - 1, 0))


@reuse.mistake(
    "last-block-never",
    "You leave the last common block, also where the prompt goes on behind it and there is something to compute anyway.",
)
def _(prompt, cached, size):
    return max(_common(prompt, cached) // size - 1, 0) * size


for _name, _least in (("whole-block-less", 0), ("whole-block-less-than-none", -math.inf)):

    @reuse.mistake(
        _name,
        "You give up a block wherever the whole prompt is in the cached text. If it ends inside a block, that block is computed "
        "anyway: limit the tokens to len(prompt) - 1 first, then cut to whole blocks.",
    )
    def _(prompt, cached, size, least=_least):
        common = _common(prompt, cached)
        return max(common // size * size - size * (common == len(prompt)), least)


def _slices(prompt, cached, size, left=0) -> int:
    """Equal slices of a block's length, the last of which may be shorter."""
    blocks = range(0, len(prompt) - left, size)
    return size * sum(
        1 for _ in itertools.takewhile(lambda at: prompt[at : at + size] == cached[at : at + size], blocks)
    )


reuse.mistake(
    "short-slices",
    "The last slice of a text may be shorter than a block, and two short ones that are equal count as a full block in your "
    "code. Stop where fewer than block_size tokens are left, and leave one of the prompt.",
)(_slices)


@reuse.mistake(
    "short-slices-cut",
    "Two equal slices that are shorter than a block count as a full one in your code, and the limit then cuts it to no whole "
    "number of blocks. Cut first, to len(prompt) - 1 tokens, and then to whole blocks.",
)
def _(prompt, cached, size):
    return min(_slices(prompt, cached, size), len(prompt) - 1)


reuse.mistake(
    "short-slices-of-the-rest",
    "You count a block that is not full: two short slices are equal, too. Stop where fewer than block_size tokens are left "
    "in the prompt.",
)(functools.partial(_slices, left=1))


for _name, _left in (("as-sets", 0), ("as-sets-one-left", 1)):

    @reuse.mistake(
        _name, "Sets know no order and no place. Compare the texts from the front, and stop at the first token that differs."
    )
    def _(prompt, cached, size, left=_left):
        return min(len({*prompt} & {*cached}), len(prompt) - left) // size * size


@reuse.mistake(
    "counts-equal-tokens",
    "You count equal tokens wherever they are. Behind the first difference no key is the same, even if the tokens are: "
    "stop there.",
)
def _(prompt, cached, size):
    equal = sum(one == other for one, other in zip(prompt, cached, strict=False))
    return min(equal, len(prompt) - 1) // size * size


@reuse.mistake(
    "counts-equal-blocks",
    "You compare block by block and go on behind one that differs. What stands before a block is part of what its keys "
    "mean: stop at the first that differs.",
)
def _(prompt, cached, size):
    blocks = range(0, (len(prompt) - 1) // size * size, size)
    return sum(size for at in blocks if len(cached) >= at + size and prompt[at : at + size] == cached[at : at + size])


@reuse.mistake(
    "blocks-anywhere",
    "You look for the prompt's blocks anywhere in the cached text. A key knows its position and all that stands before "
    "it: only the common beginning counts.",
)
def _(prompt, cached, size):
    known = {tuple(cached[at : at + size]) for at in range(0, len(cached) - size + 1, size)}
    return sum(
        size for at in range(0, (len(prompt) - 1) // size * size, size) if tuple(prompt[at : at + size]) in known
    )


@reuse.mistake(
    "rounds-up",
    "You round up, so the block in which the texts part is taken too: it has somebody else's tokens in it. Round down.",
)
def _(prompt, cached, size):
    return -(-min(_common(prompt, cached), len(prompt) - 1) // size) * size


@reuse.mistake(
    "counts-blocks", "You return the number of blocks. The question is how many tokens they hold: times block_size."
)
def _(prompt, cached, size):
    return min(_common(prompt, cached), len(prompt) - 1) // size


@reuse.mistake(
    "all-or-nothing",
    "You take the cached text as a whole or not at all. Its first blocks are of use even where its end is not.",
)
def _(prompt, cached, size):
    return min(len(cached), len(prompt) - 1) // size * size if prompt[: len(cached)] == cached else 0


@reuse.mistake("prompt-alone", "You go by the prompt's length alone. How far does it agree with the cached text?")
def _(prompt, cached, size):
    return (len(prompt) - 1) // size * size


@reuse.symptom("what-is-left", "You return what is left to compute. The question is how many tokens can be taken over.")
def _(failure):
    return failure.got == len(failure.args[0]) - failure.expected != failure.expected


@reuse.symptom(
    "one-less-in-any-case",
    "You take one token less than the texts have in common, also where the prompt goes on behind them. The limit is "
    "the prompt's length less one: min(common, len(prompt) - 1).",
)
def _(failure):
    prompt, cached, size = failure.args
    common = _common(prompt, cached)
    return common < len(prompt) and failure.got in ((common - 1) // size * size, max(common - 1, 0) // size * size)


reuse.wrong("one-less-in-any-case")(lambda prompt, cached, size: (_common(prompt, cached) - 1) // size * size)
reuse.wrong("one-less-in-any-case")(lambda prompt, cached, size: max(_common(prompt, cached) - 1, 0) // size * size)
reuse.wrong("what-is-left")(
    lambda prompt, cached, size: len(prompt) - min(_common(prompt, cached), len(prompt) - 1) // size * size
)
reuse.accepts(lambda prompt, cached, size: (min(_common(prompt, cached), len(prompt) - 1) // size) * size)


@reuse.accepts
def _(prompt, cached, block_size):
    """Block by block, from the left."""
    found = 0
    while found + block_size < len(prompt) and found + block_size <= len(cached):
        if prompt[found : found + block_size] != cached[found : found + block_size]:
            break
        found += block_size
    return found


@reuse.accepts
def _(prompt, cached, block_size):
    """A library function made for file names."""
    same = len(os.path.commonprefix([prompt[:-1], cached]))
    return same - same % block_size


@reuse.adapt
def _(answer, original):
    def get_computed_blocks(self, request):
        """What the lookup finds is the cached text; the answer says how much of it may be used."""
        hit = original(self, request)
        tokens = list(request.token_ids)
        count = answer(tokens, tokens[: len(hit) * self.block_size], self.block_size)
        return hit[: count // self.block_size]

    return get_computed_blocks


def _rehearse(prompts: list[list[int]], batches: bool = False):
    """The trace of these prompts in the course's engine, with caching and without the model."""
    from course_lib import SamplingParams
    from course_lib.teaching import course_llm, record
    from course_lib.teaching.recording.scheduling import limited

    llm = course_llm()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    with limited(llm, enable_prefix_caching=True, run_model=False), record(llm) as trace:
        for together in [prompts] if batches else [[prompt] for prompt in prompts]:
            llm.generate(together, params, use_tqdm=False)
    return trace


def _four_behind(length: int, *tails: int) -> list[list[int]]:
    """Prompts of `length` common tokens and so many of their own each."""
    return [[*range(1000, 1000 + length), *range(2000 + 100 * i, 2000 + 100 * i + n)] for i, n in enumerate(tails)]


@reuse.look
def _(answer):
    from course_lib.teaching.learner.patching import patched

    prompts = _four_behind(264, 5, 7, 5, 5)
    with patched(reuse, answer):
        counts = [sum(step.scheduled.values()) for step in _rehearse(prompts).steps]
    print(f"In the engine, four prompts behind 264 common tokens: {counts} are computed.")


# ---- 06.2 tables that share blocks ------------------------------------------------------------------

tables = Exercise(
    "06.2",
    "Tables that share blocks",
    target=None,
    stars=2,
    minutes=15,
    importance="core",
    hints=(
        "Two full blocks hold the same keys when the texts up to their ends are the same, from the first token on. What "
        "could be the key of a dict of such blocks?",
        "Keep a dict from tuple(tokens[:end]) to the block's id, for every full block of every prompt so far. A new "
        "prompt's block ending at `end` is looked up if end < len(tokens): equality would leave nothing to compute.",
        "For each `end` in range(block_size, len(tokens) + block_size, block_size): if end < len(tokens) and the text is "
        "known, append the known id; else append the next number, and if end <= len(tokens), remember it with setdefault.",
    ),
)


@tables.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("Paris, Lyon and Rome in blocks of four", [PARIS, LYON, ROME], 4)
    yield Case("Paris, and Paris again", [PARIS, [*PARIS]], 4)
    yield Case(
        "a text that goes on with a block of another's",
        [[1, 2, 3, 4, 5, 6, 7], [8, 2, 1, 1, 3, 4, 5, 6], [1, 2, 9, 9, 5, 6, 3]],
        2,
    )
    yield Case(
        "eight tokens three times, then eight and one more", [[*range(8)], [*range(8)], [*range(8)], [*range(9)]], 4
    )
    yield Case(
        "the first and the third begin alike, then the second again", [[1, 2, 3], [4, 5, 6], [1, 2, 7], [4, 5, 8]], 2
    )
    yield Case("a text that repeats itself", [[1, 2, 1, 2, 1, 2, 1]], 2)
    yield Case("a shorter one, then one that goes on", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]], 2)
    yield Case("blocks of one token", [[5, 6, 7], [5, 6, 8], [5, 6]], 1)
    yield Case("two beginnings and one way to go on", [[1, 2, 5, 6, 9], [3, 4, 5, 6, 9], [3, 4, 5, 6, 8]], 2)
    yield Case("a text that begins as another goes on", [[1, 1, 2, 2, 9], [2, 2, 9]], 2)
    yield Case("the same two tokens in the other order", [[1, 2, 9], [2, 1, 9]], 2)
    for _ in range(3):
        size = rng.choice((2, 3, 4))
        stem = [rng.randrange(9) for _ in range(5 * size)]
        prompts = []
        for _ in range(rng.randint(4, 7)):
            own = [rng.randrange(9) for _ in range(rng.randint(0, 2 * size))]
            prompts.append([*stem[: rng.randint(1, len(stem))], *own])
        yield Case("random prompts with common beginnings", prompts, size)
        here, there = ([first, *(rng.randrange(9) for _ in range(size - 1))] for first in (10, 11))
        yield Case("a random text behind one beginning, and twice behind another",
                   [here + stem, there + stem, there + stem], size)  # fmt: skip


@tables.expected
def _(prompts, block_size):
    """Every block is compared with the same place of every earlier prompt."""
    made: list[list[int]] = []
    count = 0
    for number, tokens in enumerate(prompts):
        table = []
        for index in range(-(-len(tokens) // block_size)):
            end = (index + 1) * block_size
            alike = [j for j in range(number) if end < len(tokens) and prompts[j][:end] == tokens[:end]]
            if alike:
                table.append(made[alike[0]][index])
            else:
                table.append(count)
                count += 1
        made.append(table)
    return made


def _tables(prompts, size, *, key="text", half=False, last="computed", ids="next", among="all", keep="oldest",
            offers_last=True, rest=True, spare=False, shares=True):  # fmt: skip
    """The solution with its joints exposed."""
    made, known, count = [], {}, 0
    for number, tokens in enumerate(prompts):
        table, offered = [], {}
        if ids == "restart":
            count = 0
        num_blocks = -(-len(tokens) // size) if rest else len(tokens) // size
        for index in range(num_blocks + (spare and len(tokens) % size == 0)):
            end = (index + 1) * size
            text = tuple(tokens[:end] if key == "text" else tokens[end - size : end])
            full = end <= len(tokens)
            free = {"computed": end < len(tokens), "shared": full, "early": end < len(tokens) - size}[last]
            if shares and text in known and (free or (half and not full)):
                table.append(known[text])
                count += ids == "by place"
                continue
            table.append(count)
            count += 1
            if (full or half) and (offers_last or end < len(tokens)):
                offered[text] = table[-1]
                if key != "text":
                    known.setdefault(text, table[-1])
        if among == "previous":
            known = {
                tuple(tokens[: (i + 1) * size]): block for i, block in enumerate(table) if (i + 1) * size <= len(tokens)
            }
        elif among == "all" or number == 0:
            known = {**known, **offered} if keep == "newest" else {**offered, **known}
        made.append(table)
    return made


def _mistakes(exercise: Exercise, base: Callable, mistakes: dict[str, tuple[str, dict]]) -> None:
    for name, (message, options) in mistakes.items():
        exercise.mistake(name, message)(functools.partial(base, **options))


_mistakes(tables, _tables, {
    "half-filled": (
        "You share a block that is not full. Its next free slot would be written to by both requests: only full blocks are "
        "shared.",
        {"half": True},
    ),
    "half-filled-and-all": (
        "You share every block whose text is known, full or not. Only full blocks are shared, and the last token of a "
        "prompt has to be in a block of its own.",
        {"half": True, "last": "shared"},
    ),
    "nothing-left": (
        "A prompt that is found completely has nothing left to compute, and no logits come out of a cache. Its last token "
        "must be in a block of its own: share a block only if the prompt goes on behind it.",
        {"last": "shared"},
    ),
    "leaves-a-block": (
        "You compute a block more than needed: one token behind a shared block is enough. Share while end < len(tokens).",
        {"last": "early"},
    ),
    "with-the-previous-only": (
        "You compare each prompt with the one right before it. All earlier ones still have their blocks.",
        {"among": "previous"},
    ),
    "with-the-first-only": (
        "You compare each prompt with the first one. All earlier ones have blocks to share.",
        {"among": "first"},
    ),
    "no-sharing": ("Every prompt gets blocks of its own. Equal beginnings are to share theirs.", {"shares": False}),
    "restarts": (
        "You begin at block 0 again with each prompt, and its own blocks are then somebody else's. The next free block has "
        "the next number, whichever prompt takes it.",
        {"ids": "restart"},
    ),
    "counts-shared": (
        "You count a shared block as taken. Numbers are for new blocks; a shared one is there already.",
        {"ids": "by place"},
    ),
    "last-not-offered": (
        "A full block at the end of a prompt is not shared with those who come later. That its owner had to compute it "
        "does not make it private: remember every full block.",
        {"offers_last": False},
    ),
    "no-block-for-the-rest": (
        "The last tokens of a prompt have no block. A block that is not full is a block too: round up.",
        {"rest": False},
    ),
    "one-to-spare": (
        "A prompt that fills its blocks exactly gets one more. Round up, do not add one.",
        {"spare": True},
    ),
})  # fmt: skip


@tables.symptom(
    "same-list",
    "A table that you returned for an earlier prompt grew while you made a later one: both are one list. Take a copy of what "
    "is shared, such as table[:n], and append to that.",
)
def _(failure):
    prompts, size = failure.args
    return any(len(got) > -(-len(tokens) // size) for got, tokens in zip(failure.got, prompts, strict=True))


@tables.symptom("flat", "Return a list of tables: for each prompt the list of its blocks' numbers.")
def _(failure):
    return isinstance(failure.got, dict) or any(isinstance(one, int) for one in failure.got)


def _by_comparing(prompts, size, *, flat=False, youngest=False, up=False, first=False):
    """Each prompt against all earlier ones: the longest common beginning wins, the oldest of equals."""
    made, count = [], 0
    for number, tokens in enumerate(prompts):
        best, source = 0, None
        for j in range(number):
            common = min(_common(tokens, prompts[j]), len(tokens) - 1)
            whole = -(-common // size) if up else common // size
            if (whole > best or youngest and whole == best) and not (first and best):
                best, source = whole, j
        table = [] if source is None else made[source][:best]
        while len(table) * size < len(tokens):
            table.append(count)
            count += 1
        made.append(table)
    return sum(made, []) if flat else made


tables.accepts(_by_comparing)
tables.wrong("flat")(functools.partial(_by_comparing, flat=True))
tables.mistake(
    "rounds-up",
    "You share the block in which two texts part, and the one that comes second would write its own tokens into it. Only "
    "blocks that agree to their very end are shared: round down.",
)(functools.partial(_by_comparing, up=True))
tables.mistake(
    "first-that-fits",
    "You share with the first earlier prompt that has a block in common. A later one may have more: take the longest common "
    "beginning.",
)(functools.partial(_by_comparing, first=True))


@tables.wrong("same-list")
def _(prompts, size):
    """Takes the other prompt's list itself, cuts nothing and appends its own blocks to it."""
    made, count = [], 0
    for number, tokens in enumerate(prompts):
        table, shared = [], 0
        for j in range(number):
            whole = min(_common(tokens, prompts[j]), len(tokens) - 1) // size
            if whole > shared:
                shared, table = whole, made[j]
        for _ in range(-(-len(tokens) // size) - shared):
            table.append(count)
            count += 1
        made.append(table)
    return made


@tables.symptom(
    "newest-twin",
    "Of two blocks with the same content you share the younger one. The oldest is asked for: the first prompt that has it "
    "wins (with a dict, setdefault does not overwrite).",
)
def _(failure):
    prompts, size = failure.args
    texts = {}
    for tokens, table in zip(prompts, failure.expected, strict=True):
        for index, block in enumerate(table):
            texts[block] = tokens[: (index + 1) * size]
    pairs = zip(sum(failure.got, []), sum(failure.expected, []), strict=True)
    return all(texts[one] == texts[other] for one, other in pairs)


def _unlike(failure) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Pairs of places with one number and different texts up to their ends, each text in blocks: the first and a later."""
    prompts, size = failure.args
    texts, pairs = {}, []
    for tokens, table in zip(prompts, failure.got, strict=True):
        blocks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        for index, block in enumerate(table):
            text = blocks[: index + 1]
            if texts.setdefault(block, text) != text:
                pairs.append((texts[block], text))
    return pairs


@tables.symptom(
    "number-twice",
    "One number stands for two blocks with other tokens, at other places of their texts. A new block takes a number that no "
    "block has had: your numbering does not count every block that is taken.",
)
def _(failure):
    return any(len(one) != len(other) and one[-1] != other[-1] for one, other in _unlike(failure))


@tables.symptom(
    "by-own-tokens",
    "You share blocks that hold the same tokens, whatever stands before them. Their keys differ wherever an earlier "
    "token does: two blocks are the same when the texts from the first token to their ends are.",
)
def _(failure):
    pairs = _unlike(failure)
    return (pairs and all(one[-1] == other[-1] for one, other in pairs)
            and any(one[-2:-1] != other[-2:-1] for one, other in pairs))  # fmt: skip


@tables.symptom(
    "shares-unlike",
    "You share a block between places whose texts from the first token on differ. Its keys were made from all that stands "
    "there: two blocks are the same when the texts from the first token to their ends are.",
)
def _(failure):
    return bool(_unlike(failure))


def _known_by(key: Callable, number: Callable | None = None) -> Callable:
    """An answer that knows a full block by key(tokens, its beginning, its end), and stops at the first it does not know."""

    def answer(prompts, size):
        made, known, count = [], {}, 0
        for tokens in prompts:
            table, hit = [], True
            for at in range(0, len(tokens), size):
                mine, full = key(tokens, at, at + size), at + size <= len(tokens)
                hit = hit and mine in known and at + size < len(tokens)
                if not hit:
                    if full:
                        known.setdefault(mine, number(known) if number else count)
                    table.append(number(known) - 1 if number else count)
                    count += 1
                else:
                    table.append(known[mine])
            made.append(table)
        return made

    return answer


tables.accepts(_known_by(lambda tokens, at, end: tuple(tokens[:end])))
tables.wrong("by-own-tokens")(functools.partial(_tables, key="block"))
tables.wrong("by-own-tokens")(functools.partial(_tables, key="block", keep="newest", offers_last=False))
tables.wrong("by-own-tokens")(_known_by(lambda tokens, at, end: tuple(tokens[at:end])))
tables.wrong("by-own-tokens")(_known_by(lambda tokens, at, end: (at, *tokens[at:end])))
tables.wrong("shares-unlike")(_known_by(lambda tokens, at, end: (at, sum(tokens[:end]))))
tables.wrong("shares-unlike")(_known_by(lambda tokens, at, end: tuple(tokens[max(0, 2 * at - end) : end])))
tables.wrong("number-twice")(_known_by(lambda tokens, at, end: tuple(tokens[:end]), number=len))
tables.wrong("newest-twin")(functools.partial(_tables, keep="newest"))
tables.wrong("newest-twin")(functools.partial(_by_comparing, youngest=True))


@tables.accepts
def _(prompts, block_size):
    """A tree: each node a block, each branch the tokens of the next."""
    root, made, number = {}, [], itertools.count()
    for tokens in prompts:
        node, table = root, []
        for at in range(0, len(tokens), block_size):
            piece = tuple(tokens[at : at + block_size])
            goes_on = at + block_size < len(tokens)
            if len(piece) < block_size:
                table.append(next(number))
            elif piece in node and goes_on:
                table.append(node[piece][0])
                node = node[piece][1]
            else:
                table.append(next(number))
                node = node.setdefault(piece, (table[-1], {}))[1]
        made.append(table)
    return made


@tables.look
def _(answer):
    prompts = [*_four_behind(264, 5, 7, 5, 5), *_four_behind(32, 0, 0)]
    step = _rehearse(prompts, batches=True).steps[0]
    theirs = [list(table) for table in step.block_tables.values()]
    taken = len(set(sum(theirs, [])))
    print(f"Six prompts in one step of the engine: your tables are its tables: {answer(prompts, 16) == theirs}.")
    print(f"{sum(map(len, theirs))} entries in the tables, {taken} blocks in the cache.")


# ---- 06.3 what is left to do --------------------------------------------------------------------------

work = Exercise(
    "06.3",
    "What is left to compute",
    target=None,
    stars=1,
    minutes=6,
    importance="useful",
    hints=(
        "Rows are easy. For the looks, count how many keys the query of token 4 looks at, and that of token 5.",
        "The token at position p looks at positions 0 to p, itself included: p + 1 looks. Which positions are computed?",
        "sum(p + 1 for p in range(start, num_tokens)), or with a triangle taken from a triangle: n * (n + 1) // 2 - "
        "start * (start + 1) // 2.",
    ),
)


@work.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("six tokens from the beginning", 6, 0)
    yield Case("six tokens, four of them in the cache", 6, 4)
    yield Case("six tokens, the last one left", 6, 5)
    yield Case("a single token", 1, 0)
    yield Case("the letter and a question", 269, 256)
    for _ in range(4):
        num_tokens = rng.randint(2, 600)
        yield Case("a random prompt", num_tokens, rng.randrange(num_tokens))


@work.expected
def _(num_tokens, start):
    """Look by look."""
    looks = [(query, key) for query in range(start, num_tokens) for key in range(num_tokens) if key <= query]
    return num_tokens - start, len(looks)


_mistakes(work, lambda n, s, *, rows=None, looks: (n - s if rows is None else rows(n, s), looks(n, s)), {
    "among-the-new": (
        "Your new tokens look at each other only. They look at everything before them, and what they find there in the "
        "cache must be read and multiplied like any other key.",
        {"looks": lambda n, s: (n - s) * (n - s + 1) // 2},
    ),
    "at-the-cached-only": (
        "Your new tokens look at the cached ones only. They look at themselves and at new ones before them as well.",
        {"looks": lambda n, s: (n - s) * s},
    ),
    "no-mask": (
        "Every new token looks at the whole prompt in your count. Nobody looks ahead: the one at position p has p + 1 keys.",
        {"looks": lambda n, s: (n - s) * n},
    ),
    "not-at-itself": (
        "A token looks at itself, too: p + 1 keys for position p, not p.",
        {"looks": lambda n, s: sum(range(s, n))},
    ),
    "from-the-beginning": (
        "These are the looks of the whole prompt. The rows of the cached tokens are not computed again.",
        {"looks": lambda n, s: n * (n + 1) // 2},
    ),
    "squares": (
        "You take a square from a square. Who looks at whom is a triangle: about half of that.",
        {"looks": lambda n, s: n * n - s * s},
    ),
    "half-squares": (
        "Half of a square leaves out half of the diagonal: a triangle with n rows has n * (n + 1) / 2 cells.",
        {"looks": lambda n, s: (n * n - s * s) // 2},
    ),
    "square-of-the-new": (
        "You count a square with a side for the new tokens. Each of them looks at everything up to itself: its place and what "
        "stands before it, cached or not.",
        {"looks": lambda n, s: (n - s) ** 2},
    ),
    "all-rows": (
        "Only the tokens from `start` on go through the weights: num_tokens - start rows.",
        {"rows": lambda n, s: n, "looks": lambda n, s: sum(range(s + 1, n + 1))},
    ),
    "nothing-saved": (
        "This is the work of the whole prompt. What is computed begins at `start`.",
        {"rows": lambda n, s: n, "looks": lambda n, s: n * (n + 1) // 2},
    ),
    "one-row-less": (
        "You leave out the last token: positions start to num_tokens - 1 are computed, num_tokens - start of them.",
        {"rows": lambda n, s: n - s - 1, "looks": lambda n, s: sum(range(s + 1, n))},
    ),
    "the-cached-part": (
        "This is the work that the cache has spared. What is computed begins at `start`.",
        {"rows": lambda n, s: s, "looks": lambda n, s: s * (s + 1) // 2},
    ),
    "other-way-round": (
        "Rows first, then looks.",
        {"rows": lambda n, s: sum(range(s + 1, n + 1)), "looks": lambda n, s: n - s},
    ),
})  # fmt: skip


@work.symptom(
    "one-term-off",
    "Your sum of looks is one term off. The token at position p has p + 1 keys, and p runs from start to num_tokens - 1: the "
    "terms are start + 1, …, num_tokens.",
)
def _(failure):
    num_tokens, start = failure.args
    off_by = abs(failure.got[1] - failure.expected[1])
    return failure.got[0] == failure.expected[0] and off_by in {start, start + 1, num_tokens, num_tokens + 1} - {0}


work.wrong("one-term-off")(lambda n, s: (n - s, sum(range(s, n + 1))))
work.wrong("one-term-off")(lambda n, s: (n - s, n * (n + 1) // 2 - (s + 1) * (s + 2) // 2))
work.accepts(lambda num_tokens, start: (num_tokens - start, (num_tokens - start) * (num_tokens + start + 1) // 2))
work.accepts(lambda n, s: [n - s, n * (n + 1) // 2 - s * (s + 1) // 2])


@work.look
def _(answer):
    (rows, looks), (rest, others) = answer(8192, 0), answer(8192, 7376)
    print(f"8,192 tokens, 90 % of them in the cache: {100 * rest / rows:.0f} % of the rows are left, and "
          f"{100 * others / looks:.0f} % of the looks.")  # fmt: skip


# ---- 06.4 attention from the middle -------------------------------------------------------------------

chunk = Exercise(
    "06.4",
    "A prompt that starts in the middle",
    target="course_lib.attention.torch_paged:TorchPagedBackend._prefill",
    stars=3,
    minutes=25,
    importance="core",
    hints=(
        "Give the new tokens their positions first, start … start + n - 1. Both halves need them: where they are written, "
        "and how far each of them looks.",
        "Write: key_cache[table[positions // BS], positions % BS] = key. Read: key_cache[table].flatten(0, 1) has position "
        "after position. Hide the keys whose position is larger than the query's.",
        "With keys [L, Hkv, D] and the query as [n, Hkv, G, D], torch.einsum('nkgd,lkd->kgnl', …) gives the scores. -inf "
        "where torch.arange(L) > positions[:, None], softmax over the last dimension, einsum('kgnl,lkd->nkgd', …) with the "
        "values, then the shape of the query.",
    ),
)


def _chunk_case(rng: random.Random, label: str, start: int, num_new: int, heads: int, kv_heads: int, dim: int, size: int,
                *, scale: float | None = None, spare: int = 0) -> Case:  # fmt: skip
    """A request in scattered blocks, stored heads first as the engine does; other slots hold other texts."""
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    used = -(-(start + num_new) // size) + spare
    caches = 2 * torch.randn(2, used + 4, kv_heads, size, dim, generator=generator)
    table = torch.randperm(used + 3, generator=generator)[:used] + 1  # block 0 is somebody else's
    query = torch.randn(num_new, heads, dim, generator=generator)
    new = torch.randn(2, num_new, kv_heads, dim, generator=generator)
    key_cache, value_cache = (cache.transpose(1, 2) for cache in caches)
    return Case(label, query, new[0], new[1], key_cache, value_cache, table, start, dim**-0.5 if scale is None else scale,
                may_change=("key_cache", "value_cache"))  # fmt: skip


@chunk.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield _chunk_case(rng, "six tokens, four of them cached, blocks of four, one head", 4, 2, 1, 1, 4, 4)
    yield _chunk_case(rng, "the same from the beginning", 0, 6, 1, 1, 4, 4)
    yield _chunk_case(rng, "only the last token is left", 8, 1, 1, 1, 4, 4)
    yield _chunk_case(rng, "a chunk that starts inside a block", 6, 5, 1, 1, 4, 4)
    yield _chunk_case(rng, "four query heads share two KV heads", 8, 3, 4, 2, 8, 4)
    yield _chunk_case(rng, "a model that scales by 1/10", 4, 3, 2, 1, 8, 4, scale=0.1)
    yield _chunk_case(rng, "a block more than the prompt fills", 4, 3, 2, 2, 8, 4, spare=1)
    yield _chunk_case(rng, "SmolLM2's heads", 32, 13, 9, 3, 64, 16)
    kv_heads, size = rng.randint(1, 3), rng.choice((2, 8))
    yield _chunk_case(
        rng, "a random chunk", rng.randint(0, 20), rng.randint(2, 12), kv_heads * rng.choice((2, 3)), kv_heads, 16, size
    )


_WRONG_IN = "wrong in key_cache", "wrong in value_cache"


def _slots(table, start, num_new, block_size) -> list[tuple[int, int]]:
    """(block, offset) of the chunk's tokens."""
    return [(int(table[p // block_size]), p % block_size) for p in range(start, start + num_new)]


@chunk.run
def _(answer, query, key, value, key_cache, value_cache, table, start, scale):
    """The attention, and of each cache what it should not hold: {(block, offset): [Hkv, D]}."""
    right = key_cache.clone(), value_cache.clone()
    for cache, rows in zip(right, (key, value), strict=True):
        for slot, row in zip(_slots(table, start, len(rows), cache.shape[1]), rows, strict=True):
            cache[slot] = row
    found = {"attention": answer(query, key, value, key_cache, value_cache, table, start, scale)}
    for name, cache, wanted in zip(_WRONG_IN, (key_cache, value_cache), right, strict=True):
        wrong = (cache != wanted).flatten(2).any(-1).nonzero().tolist()
        found[name] = {(block, offset): cache[block, offset] for block, offset in wrong}
    return found


@chunk.expected
def _(query, key, value, key_cache, value_cache, table, start, scale):
    """Token by token and head by head, in float64: what a prefill of the whole text has in these rows."""
    size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    for i in range(len(query)):
        block, offset = int(table[(start + i) // size]), (start + i) % size
        key_cache[block, offset], value_cache[block, offset] = key[i], value[i]
    attention = torch.zeros_like(query)
    for i, h in itertools.product(range(len(query)), range(query.shape[1])):
        keys, values = (
            torch.stack([cache[int(table[p // size]), p % size, h // group] for p in range(start + i + 1)]).double()
            for cache in (key_cache, value_cache)
        )
        attention[i, h] = ((keys @ query[i, h].double() * scale).softmax(0) @ values).float()
    return {"attention": attention, **{name: {} for name in _WRONG_IN}}


def _chunk(query, key, value, key_cache, value_cache, table, start, scale, *, write="before", at="start", both=True,
           mask="right", mask_with="inf", sees="all", read="table", heads="groups", scaled=True, dim=-1, cut=True):  # fmt: skip
    """The solution with its joints exposed."""
    num_new, num_heads, head_dim = query.shape
    size, kv_heads = key_cache.shape[1:3]
    positions = torch.arange(start, start + num_new)
    places = {"start": positions, "zero": torch.arange(num_new), "block": positions - start % size}[at]
    blocks = places // size if read == "none" else table[places // size]
    kept = key_cache.clone(), value_cache.clone()

    def put():
        key_cache[blocks, places % size] = key
        if both:
            value_cache[blocks, places % size] = value

    if write == "before":
        put()
    ids = torch.arange(len(table)) if read == "none" else table
    sources = kept if write == "after" else (key_cache, value_cache)
    keys, values = (cache[ids].flatten(0, 1)[: start + num_new if cut else None] for cache in sources)
    key_positions = torch.arange(len(keys))
    if write == "after":
        put()
    if sees == "new":
        keys, values, key_positions = key, value, positions
    elif sees == "cached":
        keys, values, key_positions = keys[:start], values[:start], key_positions[:start]
    group = num_heads // kv_heads
    if heads == "tiled":
        keys, values = keys.repeat(1, group, 1), values.repeat(1, group, 1)
    else:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", query, keys) * {True: scale, False: 1, "own": head_dim**-0.5}[scaled]
    hidden = {
        "right": key_positions > positions[:, None],
        "from the left": key_positions > torch.arange(num_new)[:, None],
        "strict": key_positions >= positions[:, None],
        "one more": key_positions > positions[:, None] + 1,
        "none": torch.zeros(num_new, len(keys), dtype=torch.bool),
        "past only": (key_positions >= start) & (key_positions != positions[:, None]),
    }[mask]
    fill = 0.0 if mask_with == "zero" else -1e9 if dim != -1 else -math.inf
    weights = scores.masked_fill(hidden, fill).softmax(dim)
    return torch.einsum("hnl,lhd->nhd", weights, values)


_mistakes(chunk, _chunk, {
    "from-the-left": (
        "Query 0 of the chunk sees key 0 only, as if the prompt began here. It stands at position `start`: hide the keys "
        "behind start + i. (torch's is_causal=True aligns the triangle at the upper left, so it is right for start 0 only.)",
        {"mask": "from the left"},
    ),
    "no-mask": (
        "The chunk's tokens look ahead at one another. Hide from the token at position p all keys behind p.",
        {"mask": "none"},
    ),
    "masked-with-zero": (
        "You give hidden keys the score 0, and exp(0) is 1: they keep their share of the softmax. Use -inf.",
        {"mask_with": "zero"},
    ),
    "masked-with-zero-to-the-end": (
        "You give hidden keys and empty slots the score 0, and exp(0) is 1: they keep their share of the softmax. Use -inf.",
        {"mask_with": "zero", "cut": False},
    ),
    "no-mask-no-end": (
        "Every token sees all slots of the table, also those in which nothing has been written yet. The token at position p "
        "sees positions 0 to p.",
        {"mask": "none", "cut": False},
    ),
    "one-ahead": ("Each token sees the one after it. Hide key positions > its own.", {"mask": "one more"}),
    "not-each-other": (
        "The chunk's tokens see the cached ones and themselves, and not the new ones before them.",
        {"mask": "past only"},
    ),
    "new-only": (
        "You attend over the chunk's own keys and leave out what is in the cache. The chunk continues a text of `start` "
        "tokens, which it must be able to read.",
        {"sees": "new"},
    ),
    "cached-only": (
        "You read the cache up to `start`, without the chunk's own keys. They belong to what its tokens look at.",
        {"sees": "cached", "mask": "none"},
    ),
    "read-before-written": (
        "You read the cache before the chunk's keys and values are in it, so its slots show whatever was there before. Write "
        "first.",
        {"write": "after"},
    ),
    "written-at-zero": (
        "You write the chunk to positions 0, 1, 2, …, over the keys of the text that it continues, which others may share. "
        "Its first token has position `start`.",
        {"at": "zero"},
    ),
    "written-at-the-block": (
        "You write from the beginning of a block on. A chunk may start inside one: offset is position % BS, from `start` on.",
        {"at": "block"},
    ),
    "values-not-written": ("The values never get into the cache. Keys and values go to the same slots.", {"both": False}),
    "no-table": (
        "You use blocks 0, 1, 2, … of the cache, which may be anybody's. The i-th block of this request is table[i].",
        {"read": "none"},
    ),
    "not-scaled": ("The scores are not multiplied by scale.", {"scaled": False}),
    "own-scale": (
        "You divide by the root of D. Most models do, not all: multiply by the argument scale.",
        {"scaled": "own"},
    ),
    "heads-tiled": (
        "Query head h reads KV head h % Hkv. Heads that share a KV head are neighbours: it is h // (H // Hkv), which "
        "repeat_interleave gives and repeat does not.",
        {"heads": "tiled"},
    ),
    "softmax-over-queries": (
        "Your softmax runs over another dimension than the keys. The weights of one query must add up to 1.",
        {"dim": 1},
    ),
})  # fmt: skip


@chunk.symptom(
    "one-index",
    "The cache has two dimensions for places. The first is the block, table[p // BS], the second the slot in that block, "
    "p % BS; a slot number is an index into neither.",
)
def _(failure):
    words = "shape mismatch", "out of bounds", "out of range"
    return isinstance(failure.error, RuntimeError | IndexError) and any(one in str(failure.error) for one in words)


@chunk.symptom(
    "heads-do-not-match",
    "There are more query heads than KV heads, and query head h reads KV head h // (H // Hkv). Give the query a dimension for "
    "the groups, or repeat each KV head with repeat_interleave.",
)
def _(failure):
    query, key, *_ = failure.args
    words = "einsum", "must match", "broadcast", "batch"
    return (isinstance(failure.error, RuntimeError) and query.shape[1] != key.shape[1]
            and any(one in str(failure.error) for one in words))  # fmt: skip


@chunk.symptom(
    "not-itself",
    "You hide one key too many, the token's own. It is in the cache when it looks: its keys are those of positions 0 to p, "
    "p + 1 of them.",
)
def _(failure):
    seen = slice(1 if failure.args[6] == 0 else 0, None)  # the very first token would be left with nothing
    theirs = _chunk(*copy.deepcopy(failure.args), mask="strict")
    return len(theirs[seen]) and torch.allclose(failure.got["attention"][seen], theirs[seen], rtol=1e-4, atol=1e-5)


@chunk.symptom(
    "view-of-the-cache",
    "The engine stores a block head by head, so this [blocks, BS, Hkv, D] is not contiguous and has no flat view. Use two "
    "indices, [block, offset], and no slots are needed.",
)
def _(failure):
    return isinstance(failure.error, RuntimeError) and "view size" in str(failure.error)


@chunk.symptom(
    "not-written",
    "The new keys, or the new values, are not in the cache afterwards. Assign to key_cache[blocks, offsets]. (flatten and reshape "
    "would give you a copy here, since the engine stores a block head by head.)",
)
def _(failure):
    return any(
        wrong and all(torch.equal(row, before[slot]) for slot, row in wrong.items())
        for wrong, before in zip((failure.got[name] for name in _WRONG_IN), failure.args[3:5], strict=True)
    )


@chunk.symptom(
    "somebody-elses-slots",
    "Slots of the cache have changed that are not this chunk's. Position p belongs to block table[p // BS], offset p % BS, "
    "and only positions start to start + n - 1 are to be written.",
)
def _(failure):
    query, *_, cache, _, table, start, _ = failure.args
    own = _slots(table, start, len(query), cache.shape[1])
    return any(slot not in own for name in _WRONG_IN for slot in failure.got[name])


@chunk.symptom(
    "nan",
    "The result is not a number: a softmax over nothing but -inf, or 0 times -inf. Does every query see at least itself, is "
    "the softmax taken over the keys, and do you use masked_fill?",
)
def _(failure):
    return bool(failure.got["attention"].isnan().any())


def _written(lines: str):
    """An answer as a learner writes it, for mistakes that are a matter of a character."""
    space = {"torch": torch, "math": math, "F": torch.nn.functional}
    names = "query, key, value, key_cache, value_cache, table, start, scale"
    exec(f"def answer({names}):\n    " + lines.strip().replace("\n", "\n    "), space)
    return space["answer"]


_ANSWER = """
n, H, D = query.shape
BS, Hkv = key_cache.shape[1], key_cache.shape[2]
p = torch.arange(start, start + n)
key_cache[table[p // BS], p % BS] = key
value_cache[table[p // BS], p % BS] = value
L = start + n
k = key_cache[table].reshape(-1, Hkv, D)[:L].repeat_interleave(H // Hkv, dim=1).transpose(0, 1)
v = value_cache[table].reshape(-1, Hkv, D)[:L].repeat_interleave(H // Hkv, dim=1).transpose(0, 1)
mask = torch.arange(L)[None, :] <= p[:, None]
scores = (query.transpose(0, 1) @ k.transpose(1, 2)) * scale
scores = scores.masked_fill(~mask, float("-inf"))
return (scores.softmax(-1) @ v).transpose(0, 1)"""
_TORCHS_OWN = (
    _ANSWER[: _ANSWER.index("scores =")]
    + """
out = F.scaled_dot_product_attention(query.transpose(0, 1), k, v, attn_mask=mask, scale=scale)
return out.transpose(0, 1)"""
)
_SLOTS = """
slots = table[p // BS] * BS + p % BS
key_cache.flatten(0, 1)[slots] = key
value_cache.flatten(0, 1)[slots] = value"""
_INDEXED = """
key_cache[table[p // BS], p % BS] = key
value_cache[table[p // BS], p % BS] = value"""
chunk.accepts(_written(_ANSWER))
chunk.accepts(_written(_TORCHS_OWN))
for _name, _text, *_changes in (
    ("from-the-left", _ANSWER, "<= p[:, None]", "<= torch.arange(n)[:, None]"),
    ("from-the-left", _TORCHS_OWN, "attn_mask=mask", "is_causal=True"),
    ("masked-with-zero", _ANSWER, 'scores.masked_fill(~mask, float("-inf"))', "scores * mask"),
    ("heads-do-not-match", _ANSWER, ".repeat_interleave(H // Hkv, dim=1)", ""),
    ("heads-do-not-match", _TORCHS_OWN, ".repeat_interleave(H // Hkv, dim=1)", ""),
    ("one-index", _ANSWER, _INDEXED, _SLOTS.replace(".flatten(0, 1)", "")),
    ("no-mask", _TORCHS_OWN, "attn_mask=mask, ", ""),
    ("no-mask", _ANSWER, "scores = scores.masked_fill", "scores.masked_fill"),
    ("not-itself", _ANSWER, "<= p[:, None]", "< p[:, None]"),
    ("one-ahead", _ANSWER, "<= p[:, None]", "<= p[:, None] + 1"),
    ("not-written", _ANSWER, _INDEXED, _SLOTS),
    ("view-of-the-cache", _ANSWER, _INDEXED, _SLOTS.replace("flatten(0, 1)", "view(-1, Hkv, D)")),
    ("written-at-zero", _ANSWER, "key_cache[table[p // BS], p % BS] = key\nvalue_cache[table[p // BS], p % BS] = value",
     "q = torch.arange(n)\nkey_cache[table[q // BS], q % BS] = key\nvalue_cache[table[q // BS], q % BS] = value"),
    ("somebody-elses-slots", _ANSWER, _INDEXED, _INDEXED.replace("table[p // BS]", "p // BS")),
    ("nan", _ANSWER, "~mask, float", "mask, float"),
    ("nan", _ANSWER, 'scores.masked_fill(~mask, float("-inf"))', 'scores + ~mask * float("-inf")'),
    ("values-not-written", _ANSWER, "\nvalue_cache[table[p // BS], p % BS] = value", ""),
    ("heads-tiled", _ANSWER, "repeat_interleave(H // Hkv, dim=1)", "repeat(1, H // Hkv, 1)"),
    ("own-scale", _ANSWER, "* scale", "/ D ** 0.5"),
    ("softmax-over-queries", _ANSWER, '"-inf"))\nreturn (scores.softmax(-1)', '-1e9))\nreturn (scores.softmax(1)'),
):  # fmt: skip
    assert _changes[0] in _text, _name
    chunk.wrong(_name)(_written(_text.replace(*_changes)))


@chunk.wrong("not-itself")
def _(query, key, value, key_cache, value_cache, table, start, scale):
    """Row by row; a row without keys gives zeros."""
    size, group, out = key_cache.shape[1], query.shape[1] // key_cache.shape[2], []
    for i in range(len(query)):
        place = table[(start + i) // size], (start + i) % size
        key_cache[place], value_cache[place] = key[i], value[i]
        keys, values = (
            cache[table].flatten(0, 1)[: start + i].repeat_interleave(group, 1) for cache in (key_cache, value_cache)
        )
        weights = (torch.einsum("hd,lhd->hl", query[i], keys) * scale).softmax(-1)
        out.append(torch.einsum("hl,lhd->hd", weights, values))
    return torch.stack(out)


@chunk.wrong("not-written")
def _(query, key, value, key_cache, value_cache, table, start, scale):
    """Right rows, but the new keys only ever join a copy."""
    kept = key_cache.clone(), value_cache.clone()
    result = _chunk(query, key, value, key_cache, value_cache, table, start, scale)
    key_cache.copy_(kept[0]), value_cache.copy_(kept[1])
    return result


@chunk.accepts
def _(query, key, value, key_cache, value_cache, table, start, scale):
    """Row by row: each new token is a decode step after the one before."""
    size, group, out = key_cache.shape[1], query.shape[1] // key_cache.shape[2], []
    for i in range(len(query)):
        block, offset = divmod(start + i, size)
        key_cache[table[block], offset], value_cache[table[block], offset] = key[i], value[i]
        keys, values = (
            cache[table].flatten(0, 1)[: start + i + 1].repeat_interleave(group, 1)
            for cache in (key_cache, value_cache)
        )
        weights = (torch.einsum("hd,lhd->hl", query[i], keys) * scale).softmax(-1)
        out.append(torch.einsum("hl,lhd->hd", weights, values))
    return torch.stack(out)


@chunk.adapt
def _(answer, original):
    def _prefill(self, query, key, value, kv_cache, request, scale, sliding_window):
        """Where something was computed before, there is a table. The backend has written already: again does no harm."""
        if request.cache_rows is None or sliding_window is not None:
            return original(self, query, key, value, kv_cache, request, scale, sliding_window)
        table = request.cache_rows.view(self.num_kv_heads, -1)[0] // self.num_kv_heads
        return answer(query, key, value, *kv_cache, table, request.seq_len - len(query), scale)

    return _prefill


@chunk.look
def _(answer):
    from course_lib import SamplingParams
    from course_lib.teaching import course_llm
    from course_lib.teaching.learner.patching import patched
    from course_lib.teaching.recording.scheduling import limited

    llm = course_llm()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    counting = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen. "
    prompts, started = [counting + "Ten plus one is", counting + "The last number was"], []

    def counted(query, key, value, key_cache, value_cache, table, start, scale):
        started.append(start)
        return answer(query, key, value, key_cache, value_cache, table, start, scale)

    def tokens():
        with limited(llm, enable_prefix_caching=True):
            return [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]

    theirs = tokens()
    with patched(chunk, counted):
        yours = tokens()
    same = sum(map(int.__eq__, sum(yours, []), sum(theirs, [])))
    print(
        f"In the course model the second of two prompts started at token {started[0]}, in {len(started)} layers of yours."
    )
    print(f"{same} of 8 tokens are the ones that the engine's own attention gives.")
