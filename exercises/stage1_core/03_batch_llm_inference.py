"""Lesson 03, Batch LLM inference: its exercises, how answers are judged, which mistakes people make."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from course_lib.config import SchedulerConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import ModelRunnerOutput
from course_lib.core.request import Request, RequestStatus
from course_lib.core.scheduler import Scheduler
from course_lib.sampling_params import SamplingParams
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

# ---- questions ----------------------------------------------------------------------------------

waiting = Question(
    "03.a",
    "16 questions are answered in two groups of 8, each group as one batch that ends when its longest "
    "answer does. Most answers have 5 to 20 tokens, one in each group has 32. Which share of all seats x "
    "steps makes a token that somebody reads?",
    [
        Choice(
            "about 90 %",
            "That would need answers of about the same length. One long answer in a group is enough to hold "
            "the seven other seats to the end, and each group has one.",
        ),
        Choice(
            "about two thirds",
            "Add it up for one group: 8 seats are held for 32 steps, 256 in all. One long answer uses 32 of "
            "them, and seven answers of 10 tokens use 70.",
        ),
        Choice(
            "less than half",
            "Every seat is held until the longest answer of its group has ended, and most answers are far "
            "shorter.",
            right=True,
        ),
    ],
)

whose_tokens = Question(
    "03.b",
    "Three steps of 32 tokens each: the next token of 32 requests; the whole of one 32-token prompt; or 16 "
    "of the first and 16 tokens of a prompt. How do their times compare?",
    [
        Choice(
            "32 requests take much longer than one prompt",
            "The layers see 32 rows in either case, and a row costs the same whoever it belongs to. One matrix "
            "does differ, the last, with a fifth of this model's weights: it makes a row of logits for each of "
            "32 requests, and a single one for a prompt.",
        ),
        Choice(
            "the prompt takes much longer",
            "It would if its 32 positions had to be computed one after the other. They are all known, so "
            "they go through each layer together, as the rows of 32 requests do.",
        ),
        Choice(
            "all three take about the same",
            "A step multiplies 32 rows with the weights. Whose they are matters in attention, which is small here, "
            "and in the last matrix, a fifth of this model's weights: it makes 32 rows of logits for 32 requests "
            "and one for a prompt, which is why the prompt takes less.",
            right=True,
        ),
    ],
)

long_prompt = Question(
    "03.c",
    "Four requests are being answered when a prompt of 384 tokens arrives. The budget per step is cut from "
    "2,048 tokens to 64. What happens to the first token of the newcomer?",
    [
        Choice(
            "it comes earlier",
            "Its prompt is cut in pieces, and the four others take part of every step. Nothing about that "
            "is faster for the newcomer.",
        ),
        Choice(
            "it comes later",
            "The prompt now takes seven steps instead of one, and each of them also carries the four "
            "others' tokens and one more trip of the weights. The four gain what the newcomer loses.",
            right=True,
        ),
        Choice(
            "nothing changes",
            "The arithmetic for the prompt is the same, but it is spread over seven steps, and each step "
            "has costs of its own: a trip of all weights, and the four others' tokens.",
        ),
    ],
)

# ---- 03.1 what a rectangle costs ----------------------------------------------------------------

rectangle = Exercise(
    "03.1",
    "What a static batch computes",
    target=None,
    stars=1,
    minutes=8,
    importance="core",
    spec="Count the positions that a static batch computes, and those that anybody needed.",
    hints=(
        "Go through the requests in groups: requests[0:seats], requests[seats:2*seats], … The last may be "
        "smaller.",
        "One group: its prompts are padded to the longest of them, so the first pass computes rows × "
        "longest prompt. Each later pass computes one position per row, until the longest answer is "
        "complete.",
        "computed += len(group) * (max(p for p, _ in group) + max(a for _, a in group) - 1), and needed += "
        "p + a - 1 for every (p, a): the first token of an answer comes out of the pass over the prompt.",
    ),
)


@rectangle.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("one group of three", [(5, 2), (3, 6), (4, 1)], 3)
    yield Case("a request alone", [(7, 4)], 4)
    yield Case("two groups of two", [(4, 3), (9, 8), (2, 6), (3, 2)], 2)
    yield Case(
        "five requests, two seats: the last group has one", [(4, 3), (2, 8), (6, 2), (3, 3), (5, 5)], 2
    )
    for count in (6, 11, 16):
        requests = [(rng.randint(2, 40), rng.choice((1, 3, 5, 8, 32))) for _ in range(count)]
        yield Case(f"{count} requests at random", requests, rng.choice((3, 4, 5)))


@rectangle.expected
def _(requests, seats):
    """Pass by pass, as such a batch runs."""
    computed = needed = 0
    for start in range(0, len(requests), seats):
        group = requests[start : start + seats]
        columns = max(prompt for prompt, _ in group)
        computed += sum(columns for _ in group)  # the pass over the prompts: one token for everybody
        written = 1
        while any(written < answer for _, answer in group):
            computed += len(group)
            written += 1
        needed += sum(prompt + len(range(1, answer)) for prompt, answer in group)
    return computed, needed


def _rectangles(
    requests,
    seats,
    *,
    minus=1,
    useful_minus=1,
    full=False,
    lost=False,
    prompt=max,
    steps="longest",
    order=list,
    minus_group=False,
    useful_minus_group=False,
    prompts_of="group",
    answers_of="group",
):
    """The solution with its joints exposed."""
    computed = needed = 0
    requests = order(requests)
    all_prompts, all_answers = [p for p, _ in requests], [a for _, a in requests]
    for start in range(0, len(requests) - (seats - 1 if lost else 0), seats):
        group = requests[start : start + seats]
        rows = seats if full else len(group)
        prompts, answers = [p for p, _ in group], [a for _, a in group]
        if steps == "longest request":
            computed += rows * (max(p + a for p, a in group) - minus)
        elif steps == "own":
            computed += rows * max(prompts) + sum(a - minus for a in answers)
        else:
            longest = max(all_prompts if prompts_of == "all" else prompts)
            first = rows * longest if prompt is max else sum(prompts)
            last = max(all_answers if answers_of == "all" else answers)
            computed += first + (rows * last - 1 if minus_group else rows * (last - minus))
        needed += sum(p + a for p, a in group) - (1 if useful_minus_group else useful_minus * len(group))
    return computed, needed


def _static(**joints):
    return lambda requests, seats: _rectangles(requests, seats, **joints)


@rectangle.symptom(
    "one-number", "Return both counts, computed and needed, as whole numbers: return computed, needed."
)
def _(failure):
    return isinstance(failure.got, int | float)


@rectangle.symptom(
    "swapped", "Your two numbers are right, in the wrong order: computed comes first, then needed."
)
def _(failure):
    return list(failure.got) == list(reversed(failure.expected))


rectangle.mistake(
    "pass-too-many",
    "In `computed` each group has one pass too many. The pass over the prompts already gives the first token "
    "of every answer, so an answer of n tokens takes n - 1 further passes.",
)(_static(minus=0))


rectangle.mistake(
    "last-token-needed",
    "In `needed` each request has one position too many: the last token of an answer is handed over, and "
    "nothing is computed on it. An answer of n tokens needs n - 1 positions after the prompt's.",
)(_static(useful_minus=0))


rectangle.mistake(
    "first-token-twice",
    "Both counts have one pass too many. The pass over the prompt already gives the first token of the "
    "answer, so an answer of n tokens takes n - 1 further passes, and its last token is never computed on.",
)(_static(minus=0, useful_minus=0))


rectangle.mistake(
    "minus-one-for-each-group",
    "In `computed` you take 1 off once for each group. The pass over the prompts spares one position in every "
    "row: rows × (longest prompt + longest answer - 1).",
)(_static(minus_group=True))


rectangle.mistake(
    "minus-one-for-each-group-twice",
    "You take 1 off once for each group, in both counts. The pass over a prompt spares one position in every "
    "row: rows × (longest prompt + longest answer - 1), and prompt + answer - 1 for each request.",
)(_static(minus_group=True, useful_minus_group=True))


@rectangle.mistake("wasted", "Your second number is what was wasted. Return what was needed.")
def _(requests, seats):
    computed, needed = _rectangles(requests, seats)
    return computed, computed - needed


rectangle.mistake(
    "longest-of-all",
    "You take the longest prompt of all requests. A group is a tensor of its own: its prompts are padded to "
    "the longest in the group.",
)(_static(prompts_of="all"))


rectangle.mistake(
    "longest-answer-of-all",
    "You take the longest answer of all requests. A group ends when the longest answer in it does.",
)(_static(answers_of="all"))


rectangle.wrong("swapped")(lambda requests, seats: _rectangles(requests, seats)[::-1])


@rectangle.wrong("one-number")
def _(requests, seats):
    computed, needed = _rectangles(requests, seats)
    return needed / computed


rectangle.mistake(
    "seats-always-full",
    "The last group is smaller than the others when the requests run out, and you give it `seats` rows all "
    "the same.",
)(_static(full=True))


@rectangle.mistake(
    "one-group",
    "You take the longest prompt and the longest answer of all requests, as if they were one group. A batch has "
    "`seats` rows: cut the list into groups of that many, and take the longest in each.",
)
def _(requests, seats):
    return _rectangles(requests, len(requests))


rectangle.mistake(
    "last-group-lost",
    "The requests of the last, smaller group are missing: range(0, len(requests), seats) reaches them.",
)(_static(lost=True))


rectangle.mistake(
    "longest-request",
    "You take the longest prompt + answer of any one request. The rectangle is larger than that: prompts "
    "are padded to the longest prompt and answers run to the longest answer, which may be two different "
    "requests.",
)(_static(steps="longest request"))


rectangle.mistake(
    "prompts-unpadded",
    "You count each prompt at its own length. In a tensor of rows × columns every row has as many columns "
    "as the longest: the shorter prompts are padded, and the padding is computed like anything else.",
)(_static(prompt=sum))


rectangle.mistake(
    "finished-rows-leave",
    "You let each row stop at its own end. That would be the better way; in a static batch a finished row "
    "is computed until the longest answer of its group is complete.",
)(_static(steps="own"))


rectangle.mistake(
    "sorted",
    "You sort the requests before you cut them into groups. They are served in the order in which they come.",
)(_static(order=sorted))


@rectangle.accepts
def _(requests, seats):
    """With NumPy: pad the list to full groups with rows of nothing."""
    sizes = np.array(requests)
    missing = -len(sizes) % seats
    groups = np.vstack([sizes, np.zeros((missing, 2), int)]).reshape(-1, seats, 2)
    rows = (groups[:, :, 0] > 0).sum(1)
    computed = rows * (groups[:, :, 0].max(1) + groups[:, :, 1].max(1) - 1)
    return int(computed.sum()), int(sizes.sum()) - len(requests)


@rectangle.accepts
def _(requests, seats):
    """By counting what is not needed: padding, and waiting for the longest answer."""
    needed = sum(prompt + answer - 1 for prompt, answer in requests)
    wasted = 0
    for i, (prompt, answer) in enumerate(requests):
        group = requests[i - i % seats :][:seats]
        wasted += max(p for p, _ in group) - prompt + max(a for _, a in group) - answer
    return needed + wasted, needed


@rectangle.look
def _(answer):
    requests = [(30, length) for length in (8, 3, 32, 7, 13, 12, 8, 14)]
    for label, group in (
        ("as they are", requests),
        ("without the long one", [r for r in requests if r[1] < 32]),
    ):
        computed, needed = answer(group, 8)
        print(
            f"Eight questions like those above, {label}: {computed:,} positions computed, {needed:,} needed."
        )


# ---- 03.2 the tokens of one step ----------------------------------------------------------------

share = Exercise(
    "03.2",
    "The tokens of one step",
    target="course_lib.core.scheduler:Scheduler._chunk",
    stars=2,
    minutes=10,
    importance="core",
    spec="Hand out one step's budget, request by request, so that num_computed catches up with num_tokens.",
    hints=(
        "How far behind is a request? num_tokens - num_computed. Which two things can keep it from getting all "
        "of that?",
        "A request gets the least of three numbers: how far behind it is, the threshold (if it is not 0), "
        "and what is left of the budget. Then less is left for the next one.",
        "For each (num_computed, num_tokens): count = min(num_tokens - num_computed, threshold or "
        "num_tokens, left); left -= count; append count, which may be 0.",
    ),
)


@share.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("prompts of 100, 30 and 10, budget 64", [(0, 100), (0, 30), (0, 10)], 64, 0)
    yield Case("the step after it", [(64, 100), (0, 30), (0, 10)], 64, 0)
    yield Case("and the next", [(100, 101), (28, 30), (0, 10)], 64, 0)
    yield Case("three decodes and a long prompt", [(41, 42), (17, 18), (80, 81), (0, 500)], 64, 0)
    yield Case("a threshold of 16", [(0, 100), (0, 30), (0, 10)], 64, 16)
    yield Case(
        "decodes, a long prompt, a short one, threshold 20", [(9, 10), (0, 90), (0, 15), (5, 6)], 64, 20
    )
    yield Case("more decodes than budget", [(5, 6), (8, 9), (3, 4), (2, 3)], 3, 0)
    for _ in range(4):
        requests = [
            (done := rng.choice((0, 0, 16, 40)), done + rng.choice((1, 1, 5, 30, 200))) for _ in range(6)
        ]
        yield Case("six requests at random", requests, rng.choice((8, 32, 64)), rng.choice((0, 0, 12)))


@share.expected
def _(requests, budget, threshold):
    """Token by token."""
    counts = [0] * len(requests)
    for index, (num_computed, num_tokens) in enumerate(requests):
        while budget and num_computed + counts[index] < num_tokens and counts[index] != (threshold or -1):
            counts[index] += 1
            budget -= 1
    return counts


def _shares(
    requests, budget, threshold, *, computed=True, pay=True, whole=None, even=False, off=True, cap=True,
    shortest=False, clamp=True, shared_cap=False, decodes_first=False, sign=1, cap_last=False,
):  # fmt: skip
    """The solution with its joints exposed."""
    left, long_left, counts = budget, threshold, [0] * len(requests)
    order = range(len(requests))
    if shortest:
        order = sorted(order, key=lambda i: requests[i][1] - requests[i][0])
    if decodes_first:
        order = sorted(order, key=lambda i: requests[i][1] - requests[i][0] > 1)
    for i in order:
        num_computed, num_tokens = requests[i]
        behind = sign * (num_tokens - num_computed) if computed else num_tokens
        count = behind
        if cap and shared_cap and threshold:
            count = min(count, long_left)
            long_left -= count
        elif cap and not cap_last and (threshold or not off):
            count = min(count, threshold)
        if whole and count > left:
            if whole == "stop":
                break
            continue
        limit = budget // len(requests) if even else left
        counts[i] = min(count, limit) if clamp or limit > 0 else limit
        if pay:
            left -= counts[i] if clamp else behind
        if cap_last and threshold:
            counts[i] = min(counts[i], threshold)
    return counts


def _sharing(**joints):
    return lambda requests, budget, threshold: _shares(requests, budget, threshold, **joints)


@share.symptom(
    "too-short",
    "Return one number for every request, 0 for those that get nothing in this step: the caller pairs them "
    "up.",
)
def _(failure):
    return (
        failure.error is None
        and isinstance(failure.got, list | tuple)
        and len(failure.got) < len(failure.expected)
    )


share.mistake(
    "wrong-way-round",
    "You subtract the wrong way round, and hand out a negative number of tokens: a request is num_tokens - "
    "num_computed behind.",
)(_sharing(sign=-1))


@share.symptom(
    "negative",
    "You hand out a negative number of tokens: the budget went below zero. What leaves the budget is what a "
    "request got, not what it wanted.",
)
def _(failure):
    return any(count < 0 for count in failure.got)


share.mistake(
    "ignores-computed",
    "You start every request from its first token again. What is in the cache need not be computed: a "
    "request is num_tokens - num_computed behind.",
)(_sharing(computed=False))


share.mistake(
    "budget-for-each",
    "Every request gets the whole budget. It is one budget for the step: subtract what each request gets "
    "before you come to the next.",
)(_sharing(pay=False))


share.mistake(
    "all-or-nothing",
    "You give a request everything or nothing, so a long prompt starves while shorter ones slip past it. "
    "Give it the part that fits: the rest catches up in the next step (that is chunked prefill).",
)(_sharing(whole="skip"))


share.mistake(
    "stops-at-the-first-that-does-not-fit",
    "You stop at the first request that does not fit whole, and the rest of the budget is wasted. Give that "
    "request the part that fits: this is where prefill is cut into chunks.",
)(_sharing(whole="stop"))


share.mistake(
    "even-shares",
    "You divide the budget evenly. Requests are served in order, each as far as the budget reaches: three "
    "requests that need one token each leave the rest to a long prompt.",
)(_sharing(even=True))


share.mistake(
    "threshold-zero", "A threshold of 0 means that there is none. You take it as a limit of 0 tokens."
)(_sharing(off=False))


share.mistake(
    "no-threshold", "`threshold` has no effect: above 0, no request gets more than that in one step."
)(_sharing(cap=False))


share.mistake(
    "shared-threshold",
    "You use up the threshold like a second budget. It is a limit for each request by itself, so that one "
    "long prompt cannot fill the step.",
)(_sharing(shared_cap=True))


share.mistake(
    "threshold-after-the-budget",
    "You take a request's tokens from the budget first and apply the threshold to them afterwards: what the "
    "threshold cut off is paid for, and nobody gets it. Take the least of all three, then subtract that.",
)(_sharing(cap_last=True))


share.mistake(
    "shortest-first",
    "You serve the shortest request first. That shortens the average wait, and a long prompt may wait for "
    "ever: here they are served in the order given.",
)(_sharing(shortest=True))


share.mistake(
    "decodes-first",
    "You serve requests that need one token before the others. The order given is the order of service. "
    "(Running requests come before waiting ones anyway, so decodes are early in it.)",
)(_sharing(decodes_first=True))


@share.wrong("too-short")
def _(requests, budget, threshold):
    return [count for count in _shares(requests, budget, threshold) if count]


share.wrong("negative")(_sharing(clamp=False))


@share.accepts
def _(requests, budget, threshold):
    """With NumPy: what everyone wants, added up, cut at the budget, and taken apart again."""
    wanted = np.array([num_tokens - num_computed for num_computed, num_tokens in requests])
    if threshold:
        wanted = np.minimum(wanted, threshold)
    return np.diff(np.minimum(np.cumsum(wanted), budget), prepend=0).tolist()


@share.accepts
def _(requests, budget, threshold):
    wanted = [min(t - c, threshold) if threshold else t - c for c, t in requests]
    before = accumulate(wanted, initial=0)
    return [max(0, min(want, budget - used)) for want, used in zip(wanted, before)]


@share.adapt
def _(answer, original):
    def chunk(scheduler, remaining, budget):
        """The engine asks for one request at a time, with what is left of the budget."""
        [count] = answer([(0, remaining)], budget, scheduler.config.long_prefill_token_threshold)
        return count

    return chunk


@share.look
def _(answer, llm):
    from course_lib.teaching.learner.patching import patched

    with patched(share, answer):
        plans = _plans(llm, [100, 30, 10], max_tokens=3, max_num_batched_tokens=64)
    for step, plan in enumerate(plans[:4]):
        print(f"In the engine, prompts of 100, 30 and 10, step {step}: {plan}")


def _plans(llm, prompts, *, max_tokens, **limits):
    """Which tokens each step of an engine without a model computes: request letter -> count."""
    from course_lib.teaching.explorers.style import marks
    from course_lib.teaching.recording.scheduling import limited
    from course_lib.teaching.recording.trace import record

    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    with limited(llm, enable_prefix_caching=False, run_model=False, **limits), record(llm) as trace:
        llm.generate([[100 + i] * length for i, length in enumerate(prompts)], params, use_tqdm=False)
    letters = {name: mark.letter for name, mark in marks(trace.requests).items()}
    return [", ".join(f"{letters[name]} {n}" for name, n in step.scheduled.items()) for step in trace.steps]


# ---- 03.3 who may join --------------------------------------------------------------------------

admit = Exercise(
    "03.3",
    "Who may join",
    target="course_lib.core.scheduler:Scheduler._admit_waiting",
    stars=2,
    minutes=12,
    importance="core",
    spec="From the front of the queue, admit requests while budget, seats and blocks last; nobody overtakes.",
    hints=(
        "Three things can run out: tokens of the budget, seats, free blocks. A request joins if it gets at "
        "least one token, a seat, and the blocks for the tokens it gets *in this step*.",
        "Count the blocks of its chunk, not of its whole prompt: count = min(length, budget), and -(-count "
        "// block_size) blocks, rounded up. If they are not free, stop: the requests behind it must wait "
        "too.",
        "for length in waiting: if not budget or not seats: break; count = min(length, budget); needed = "
        "-(-count // block_size); if needed > free_blocks: break; append count; budget -= count; seats -= "
        "1; free_blocks -= needed.",
    ),
)


@admit.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("one block is free, and 17 tokens need two", [17], 64, 4, 1, 16)
    yield Case("16 tokens, and one free block of 16", [16], 16, 1, 1, 16)
    yield Case("the first fills its blocks, the second takes the last", [32, 5], 64, 4, 3, 16)
    yield Case("budget for two and a part of the third", [30, 10, 40, 8], 64, 8, 20, 16)
    yield Case("two seats", [30, 10, 8], 64, 2, 20, 16)
    yield Case("the second needs more blocks than are free", [30, 40, 10], 256, 8, 4, 16)
    yield Case("a long prompt, of which the budget allows a part", [500, 10], 64, 8, 6, 16)
    yield Case("the budget ends with a request", [24, 40, 8], 64, 8, 20, 16)
    yield Case("no seat is free", [30, 10], 64, 0, 20, 16)
    yield Case("blocks of 4, all needed", [6, 5, 9, 2], 64, 8, 7, 4)
    for _ in range(6):
        waiting_lengths = [rng.choice((1, 5, 17, 33, 64, 300)) for _ in range(7)]
        limits = rng.choice((16, 64, 128)), rng.randint(1, 6), rng.randint(1, 12), rng.choice((4, 16))
        yield Case("seven requests at random", waiting_lengths, *limits)
    for _ in range(3):
        waiting_lengths = [rng.choice((3, 16, 16, 32, 48)) for _ in range(5)]
        free = sum(-(-length // 16) for length in waiting_lengths[: rng.randint(2, 4)])
        yield Case("full blocks, and exactly enough for some", waiting_lengths, 256, 8, free, 16)


@admit.expected
def _(waiting, budget, seats, free_blocks, block_size):
    """The longest beginning of the queue that fits."""
    for count in range(min(len(waiting), seats), -1, -1):
        ends = [min(end, budget) for end in accumulate(waiting[:count])]
        chunks = [end - start for start, end in zip([0, *ends], ends)]
        if all(chunks) and sum(len(range(0, chunk, block_size)) for chunk in chunks) <= free_blocks:
            return chunks
    return []


def _admitted(
    waiting, budget, seats, free_blocks, block_size, *, overtake=False, whole=False, blocks="up",
    packed=False, squeeze=False, chunked=True, guests=False, use_seats=True, use_budget=True, pay=True,
    count_seats=True, pay_blocks=True, order=list, pad=False, wanted=False,
):  # fmt: skip
    """The solution with its joints exposed."""
    chunks = []
    for length in order(waiting):
        if (use_seats and not seats) or (budget <= 0 and not guests):
            break
        count = min(length, max(budget, 0)) if chunked and use_budget else length
        if not chunked and count > budget:
            break
        size = length if whole else count
        if blocks == "up":
            needed = -(-size // block_size)
        elif blocks == "down":
            needed = size // block_size
        elif blocks == "one more":
            needed = size // block_size + 1
        elif blocks == "of 16":
            needed = -(-size // 16)
        else:
            needed = 0 if blocks == "none" else 1
        if packed:
            needed = -(-sum([*chunks, count]) // block_size) - (-(-sum(chunks) // block_size))
        if squeeze and needed > free_blocks > 0:
            count, needed = free_blocks * block_size, free_blocks
        if needed > free_blocks:
            if overtake:
                continue
            break
        chunks.append(count)
        if use_budget and pay:
            budget -= count
        seats, free_blocks = seats - count_seats, free_blocks - (needed if pay_blocks else 0)
        if wanted:
            chunks[-1] = length
    return chunks + [0] * (len(waiting) - len(chunks) if pad else 0)


def _admitting(**joints):
    return lambda *limits: _admitted(*limits, **joints)


@admit.symptom(
    "not-a-list",
    "Return a list with one number for each request that joins: how many tokens it gets in this step.",
)
def _(failure):
    return failure.error is None and not isinstance(failure.got, list | tuple)


@admit.symptom(
    "empty-guests",
    "There is a 0 in your list, and every number in it is a request that joins. Leave out those that do not; "
    "and one that joined with no tokens would hold a seat and do nothing: when the budget is used up, stop.",
)
def _(failure):
    return 0 in failure.got


@admit.symptom(
    "negative",
    "A request joins with a negative number of tokens: your budget went below zero. What leaves the budget is "
    "what a request got, not what it wanted.",
)
def _(failure):
    return any(count < 0 for count in failure.got)


admit.mistake(
    "overtakes",
    "A request does not fit, and you let a later, smaller one past it. Repeat that every step, and the "
    "large one waits for ever: stop at the first that does not fit.",
)(_admitting(overtake=True))


admit.mistake(
    "blocks-for-the-whole-prompt",
    "You ask for the blocks of the whole prompt. This step computes `count` tokens of it, and only those "
    "need blocks now. (Yours is a policy worth having: vLLM 0.32 looks whether the whole prompt would fit "
    "before it admits.)",
)(_admitting(whole=True))


admit.mistake(
    "rounds-down",
    "You round the number of blocks down. A block that is used in part is a whole block: 17 tokens in "
    "blocks of 16 need two, -(-17 // 16).",
)(_admitting(blocks="down"))


admit.mistake(
    "one-block-too-many",
    "You ask for a block too many when the tokens fill their blocks exactly: 16 tokens fill one block of 16, "
    "and you ask for two. Round up: -(-16 // 16) is 1.",
)(_admitting(blocks="one more"))


admit.mistake(
    "blocks-of-16", "You count in blocks of 16. How many tokens a block holds is an argument, block_size."
)(_admitting(blocks="of 16"))


admit.mistake(
    "blocks-not-counted-off",
    "Everybody is shown the same free blocks. What a request takes is gone for those behind it: free_blocks "
    "-= needed.",
)(_admitting(pay_blocks=False))


admit.mistake(
    "seats-not-counted-off",
    "You look at `seats`, and nobody takes one: every request that joins leaves one seat less.",
)(_admitting(count_seats=False))


admit.mistake(
    "budget-not-counted-off",
    "Every request gets tokens up to the whole budget. It is one budget for the step: what a request gets is "
    "gone for those behind it.",
)(_admitting(pay=False))


admit.mistake(
    "whole-prompts-listed",
    "Your list has the length of each prompt that joins. It should have the tokens that each gets in this "
    "step, which for the last may be a part.",
)(_admitting(wanted=True))


admit.mistake(
    "shortest-first",
    "You let the shortest in first. Nobody overtakes: the order of `waiting` is the order of the queue.",
)(_admitting(order=sorted))


admit.mistake(
    "one-block-each",
    "You count one block for each request. It needs one for every block_size tokens that it gets.",
)(_admitting(blocks="one"))


admit.mistake(
    "shares-blocks",
    "You add the tokens up first and round once. Two requests never write into the same block: round up for "
    "each of them.",
)(_admitting(packed=True))


admit.mistake(
    "squeezes",
    "When there are too few blocks you cut the request's tokens to what fits. It would join with the last "
    "blocks there are, and the requests already running need those for their next tokens: let it wait.",
)(_admitting(squeeze=True))


admit.mistake(
    "whole-prompts-only",
    "A prompt joins only when the budget covers all of it, so the rest of this step's budget is wasted, and "
    "a prompt longer than the budget never joins. Give it what is left.",
)(_admitting(chunked=False))


admit.mistake("no-seats", "`seats` has no effect: no more requests join than there are free seats.")(
    _admitting(use_seats=False)
)


admit.mistake(
    "no-blocks", "`free_blocks` has no effect: a request joins only if the blocks for its tokens are free."
)(_admitting(blocks="none"))


admit.mistake(
    "no-budget", "`budget` has no effect: all that join share it, and the last may get a part of its prompt."
)(_admitting(use_budget=False))


@admit.wrong("not-a-list")
def _(waiting, budget, seats, free_blocks, block_size):
    return len(_admitted(waiting, budget, seats, free_blocks, block_size))


admit.wrong("empty-guests")(_admitting(guests=True))
admit.wrong("empty-guests")(_admitting(pad=True))


@admit.wrong("negative")
def _(waiting, budget, seats, free_blocks, block_size):
    counts = []
    for length in waiting[:seats]:
        count = min(length, budget)
        free_blocks -= -(-count // block_size)
        if count == 0 or free_blocks < 0:
            break
        counts.append(count)
        budget -= length
    return counts


@admit.accepts
def _one_by_one(waiting, budget, seats, free_blocks, block_size):
    """By recursion."""
    if not (waiting and budget and seats):
        return []
    count = min(waiting[0], budget)
    blocks = (count + block_size - 1) // block_size
    if blocks > free_blocks:
        return []
    return [count, *_one_by_one(waiting[1:], budget - count, seats - 1, free_blocks - blocks, block_size)]


@admit.accepts
def _(waiting, budget, seats, free_blocks, block_size):
    """With NumPy: everyone's share as if only the budget counted, then cut where seats or blocks end."""
    ends = np.minimum(np.cumsum(waiting), budget)
    counts = np.diff(ends, prepend=0)
    fits = (counts > 0) & (np.arange(len(counts)) < seats)
    fits &= np.cumsum(np.ceil(counts / block_size)) <= free_blocks
    return [int(count) for count in counts[np.logical_and.accumulate(fits)]]


@admit.adapt
def _(answer, original):
    def admit_waiting(scheduler, budget, plan):
        """The engine's bookkeeping around the learner's decision."""
        if not scheduler.config.enable_chunked_prefill:
            return original(scheduler, budget, plan)
        cache, queue, admitted = scheduler.kv_cache, list(scheduler.waiting), []
        lengths = [
            scheduler._chunk(
                one.num_tokens - len(cache.get_computed_blocks(one)) * cache.block_size, one.num_tokens
            )
            for one in queue
        ]
        seats = scheduler.config.max_num_seqs - len(scheduler.running)
        counts = answer(lengths, budget, seats, cache.pool.num_free, cache.block_size)
        for request, count in zip(queue, counts):
            hit = cache.get_computed_blocks(request)  # one admitted before it may have just offered more
            num_cached = len(hit) * cache.block_size
            count = min(count, request.num_tokens - num_cached)
            new_blocks = cache.allocate_slots(request, count, hit)
            if new_blocks is None:  # the hit itself lay among the free blocks
                break
            scheduler.waiting.pop()
            scheduler.running.append(request)
            request.status = RequestStatus.RUNNING
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = num_cached
                cache.record_lookup(request.num_tokens, num_cached)
                request.first_scheduled_time = request.first_scheduled_time or request.arrival_time
            plan[request] = (count, new_blocks)
            admitted.append(request)
        return admitted

    return admit_waiting


@admit.look
def _(answer, llm):
    from course_lib.teaching.learner.patching import patched

    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 3, "num_blocks": 9}
    with patched(admit, answer):
        plans = _plans(llm, [30, 60, 20, 8], max_tokens=3, **limits)
    print("In the engine, prompts of 30, 60, 20 and 8, a budget of 64, three seats, nine blocks:")
    for step, plan in enumerate(plans[:5]):
        print(f"  step {step}: {plan}")


# ---- the scheduler as a bench for the last two exercises ----------------------------------------


def _scheduler(num_blocks, block_size, kind=Scheduler, caching=False, **limits):
    """A scheduler without an engine."""
    fields = {
        "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 4096,
        "enable_chunked_prefill": True, "long_prefill_token_threshold": 0, "policy": "priority",
    }  # fmt: skip
    return kind(SchedulerConfig(**(fields | limits)), KVCacheManager(num_blocks, block_size, caching))


def _request(name, prompt, max_tokens=64, priority=0, arrival=0.0):
    """Prompts of different names have nothing in common."""
    start = sum(ord(letter) * 1000**i for i, letter in enumerate(name))
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(name, list(range(start, start + prompt)), params, None, arrival, priority)


def _sample(scheduler, plan):
    """What a runner would answer: one token for everyone who is caught up."""
    ids = list(plan.num_scheduled_tokens)
    requests = [scheduler.requests[one] for one in ids]
    return ModelRunnerOutput(
        ids, [[7] if one.num_computed_tokens == one.num_tokens else [] for one in requests]
    )


def _step(scheduler, check=False):
    plan = scheduler.schedule()
    if check:
        scheduler.check_invariants(plan)
    scheduler.update_from_output(_sample(scheduler, plan))
    return plan


# ---- 03.4 preemption ----------------------------------------------------------------------------

preempt = Exercise(
    "03.4",
    "Taking the cache away",
    target="course_lib.core.scheduler:Scheduler._preempt",
    stars=3,
    minutes=15,
    importance="core",
    spec="Take a running request's blocks away, so that it can be served later as if nothing had happened.",
    hints=(
        "Ask of every field what it says: which of them speak of the cache, and which of the text? What the "
        "cache held is gone; the tokens are not.",
        "It leaves `running`, returns its blocks, has computed nothing any more, is PREEMPTED, is counted, "
        "and waits at the front of its class. The queue has a method for that: return_preempted. "
        "kv_cache.free looks at num_computed_tokens, so the order of two of these lines matters.",
        "scheduler.running.remove(request); scheduler.kv_cache.free(request); request.num_computed_tokens = "
        "0; request.num_preemptions += 1; request.status = RequestStatus.PREEMPTED; "
        "scheduler.waiting.return_preempted(request)",
    ),
)


@preempt.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("the youngest of three, one more is waiting", [6, 9, 5], 1, 3, 2)
    yield Case("the oldest of three, two more are waiting", [6, 9, 5], 2, 6, 0)
    yield Case("a request alone", [11], 0, 2, 0)
    for _ in range(3):
        prompts = [rng.randint(2, 20) for _ in range(rng.randint(2, 5))]
        yield Case("at random", prompts, rng.randint(1, 3), rng.randint(1, 9), rng.randrange(len(prompts)))
    yield Case("the same request twice, two steps apart", [6, 9, 5], 1, 3, 1, steps_to_the_next=2)


@preempt.run
def _(answer, prompts, num_waiting, num_steps, victim, steps_to_the_next=0):
    """The facts about scheduler and request after one preemption, or after a second one."""
    scheduler = _scheduler(100, 4, max_num_seqs=len(prompts), policy="fcfs")
    requests = [_request(letter, size) for letter, size in zip("ABCDE", prompts)]
    for request in [*requests, *(_request(letter, 6) for letter in "XYZ"[:num_waiting])]:
        scheduler.add_request(request)
    for _ in range(num_steps):
        _step(scheduler)
    request, running = requests[victim], scheduler.running
    answer(scheduler, request)
    if steps_to_the_next:
        for _ in range(steps_to_the_next):
            _step(scheduler)
        answer(scheduler, request)
    return {
        "running": [one.request_id for one in running],
        "same list": scheduler.running is running,
        "waiting": [one.request_id for one in scheduler.waiting],
        "known": request.request_id in scheduler.requests,
        "tokens": request.num_tokens,
        "computed": request.num_computed_tokens,
        "blocks held": len(request.block_ids),
        "blocks free": scheduler.kv_cache.pool.num_free,
        "status": request.status.name if isinstance(request.status, RequestStatus) else repr(request.status),
        "preemptions": request.num_preemptions,
    }


@preempt.expected
def _(prompts, num_waiting, num_steps, victim, steps_to_the_next=0):
    """By arithmetic: after k steps a request has k tokens of output, and computed all but the last."""
    num_steps += steps_to_the_next  # the victim comes back at once and catches up in one step
    others = [size for i, size in enumerate(prompts) if i != victim]
    return {
        "running": [letter for i, letter in enumerate("ABCDE"[: len(prompts)]) if i != victim],
        "same list": True,
        "waiting": ["ABCDE"[victim], *"XYZ"[:num_waiting]],
        "known": True,
        "tokens": prompts[victim] + num_steps,
        "computed": 0,
        "blocks held": 0,
        "blocks free": 100 - sum(len(range(0, size + num_steps - 1, 4)) for size in others),
        "status": "PREEMPTED",
        "preemptions": 2 if steps_to_the_next else 1,
    }


@preempt.symptom(
    "new-list",
    "You put a new list in the place of scheduler.running. The loop that called you is still going through "
    "the old one, and will serve the victim once more: take it out of that list, "
    "scheduler.running.remove(request).",
)
def _(failure):
    return not failure.got["same list"]


@preempt.symptom(
    "still-running",
    "The request is still in scheduler.running: it would be given tokens again in the next step, with no "
    "blocks to write them to.",
)
def _(failure):
    return len(failure.got["running"]) > len(failure.expected["running"])


@preempt.symptom(
    "lost", "The request is in neither list: nobody will ever serve it again. It waits, in scheduler.waiting."
)
def _(failure):
    return not set(failure.expected["waiting"]) <= set(failure.got["waiting"])


@preempt.symptom(
    "forgotten",
    "The scheduler does not know the request any more: it is not in scheduler.requests, so its next token "
    "would be thrown away. Preempted is not finished: only its blocks and its place among the running are "
    "gone.",
)
def _(failure):
    return not failure.got["known"]


@preempt.symptom(
    "added-again",
    "scheduler.add_request is for newcomers, and this id is in use. A preempted request goes back with "
    "scheduler.waiting.return_preempted(request).",
)
def _(failure):
    return isinstance(failure.error, ValueError) and "already in use" in str(failure.error)


@preempt.symptom(
    "end-of-the-queue",
    "The request waits behind newcomers, which will take the blocks that it needs: with enough of them it "
    "never ends. Its turn had come before theirs: scheduler.waiting.return_preempted puts it in front.",
)
def _(failure):
    return failure.got["waiting"] != failure.expected["waiting"]


@preempt.symptom(
    "drops-the-answer",
    "You threw away tokens of the answer. They have been shown to the user and cost nothing to keep: only "
    "the *cache* is gone. Prompt and answer so far are computed again, together, as if they were one long "
    "prompt.",
)
def _(failure):
    return failure.got["tokens"] != failure.expected["tokens"]


@preempt.symptom(
    "leaks-blocks",
    "You emptied the request's block table, and nobody has the blocks: they are neither free nor held, and "
    "lost until the engine ends. kv_cache.free(request) reads the table, so leave that to it.",
)
def _(failure):
    return not failure.got["blocks held"] and failure.got["blocks free"] < failure.expected["blocks free"]


@preempt.symptom(
    "keeps-blocks",
    "The request still holds its blocks, and those were the reason to preempt it: "
    "scheduler.kv_cache.free(request).",
)
def _(failure):
    return failure.got["blocks held"] > 0


@preempt.symptom(
    "keeps-its-count",
    "num_computed_tokens still counts keys and values that went with the blocks. The request would go on "
    "from there, and attend to whatever its new blocks happen to hold: set it to 0.",
)
def _(failure):
    return failure.got["computed"] != 0


@preempt.symptom(
    "status-running",
    "Its status is still RUNNING, so an abort would look for it among the running requests: request.status "
    "= RequestStatus.PREEMPTED.",
)
def _(failure):
    return failure.got["status"] == "RUNNING"


@preempt.symptom(
    "status-waiting",
    "You set its status to WAITING, which says that it never ran. This one did, and has an answer begun: "
    "RequestStatus.PREEMPTED.",
)
def _(failure):
    return failure.got["status"] == "WAITING"


@preempt.symptom(
    "status-finished",
    "You set its status to one of those that say FINISHED, and nobody computes a finished request again. "
    "This one goes on later: RequestStatus.PREEMPTED.",
)
def _(failure):
    return failure.got["status"].startswith("FINISHED")


@preempt.symptom(
    "not-counted",
    "num_preemptions should go up by one: it is what an operator looks at to see that the cache is too "
    "small.",
)
def _(failure):
    return failure.got["preemptions"] == 0


@preempt.symptom(
    "counts-to-one",
    "A request can be preempted more than once, and your count stays at 1: request.num_preemptions += 1.",
)
def _(failure):
    return failure.got["preemptions"] == 1 < failure.expected["preemptions"]


def _preempting(
    *, remove="in place", free="free", reset=True, status=RequestStatus.PREEMPTED, count=True, queue="front",
    drop=False, reset_first=False,
):  # fmt: skip
    """The solution with its joints exposed."""

    def preempt_request(scheduler, request):
        if remove == "in place":
            scheduler.running.remove(request)
        elif remove == "new list":
            scheduler.running = [one for one in scheduler.running if one is not request]
        if reset_first:
            request.num_computed_tokens = 0
        if free == "free":
            scheduler.kv_cache.free(request)
        elif free == "clear":
            request.block_ids = []
        elif free == "clear, then free":
            request.block_ids.clear()
            scheduler.kv_cache.free(request)
        if reset:
            request.num_computed_tokens = 0
        if drop:
            request.token_ids = request.token_ids[: request.num_prompt_tokens]
        if status is not None:
            request.status = status
        if count:
            request.num_preemptions = 1 if count == "one" else request.num_preemptions + 1
        if queue == "front":
            scheduler.waiting.return_preempted(request)
        elif queue == "end":
            scheduler.waiting.add(request)
        elif queue == "add":
            scheduler.add_request(request)

    return preempt_request


preempt.wrong("new-list")(_preempting(remove="new list"))
preempt.wrong("still-running")(_preempting(remove="not"))
preempt.wrong("lost")(_preempting(queue="no"))
preempt.wrong("end-of-the-queue")(_preempting(queue="end"))
preempt.wrong("added-again")(_preempting(queue="add"))
preempt.wrong("drops-the-answer")(_preempting(drop=True))
preempt.wrong("leaks-blocks")(_preempting(free="clear"))
preempt.wrong("leaks-blocks")(_preempting(free="clear, then free"))
preempt.wrong("keeps-blocks")(_preempting(free="no"))
preempt.wrong("keeps-its-count")(_preempting(reset=False))
preempt.wrong("status-running")(_preempting(status=None))
preempt.wrong("status-waiting")(_preempting(status=RequestStatus.WAITING))
preempt.wrong("status-finished")(_preempting(status=RequestStatus.FINISHED_ABORTED))
preempt.wrong("not-counted")(_preempting(count=False))
preempt.wrong("counts-to-one")(_preempting(count="one"))


@preempt.wrong("forgotten")
def _(scheduler, request):
    scheduler._forget(request)
    _preempting(free="is done")(scheduler, request)


@preempt.budget(
    "Right, but the prefix cache (lesson 07) loses what it could have kept. kv_cache.free asks num_computed_tokens "
    "which of the request's full blocks hold anything, and those stay findable until somebody needs the "
    "room: give the blocks back first and reset the count afterwards, or the request computes every token "
    "again.",
    most=3,
    unit="tokens to compute again",
)
def _(answer):
    scheduler = _scheduler(100, 4, caching=True)
    request = _request("A", 14)
    scheduler.add_request(request)
    for _ in range(6):
        _step(scheduler)
    answer(scheduler, request)
    return request.num_tokens - 4 * len(scheduler.kv_cache.get_computed_blocks(request)) - 1


preempt.wasteful(_preempting(reset_first=True))


@preempt.accepts
def _(scheduler, request):
    """Another order, by index, and the blocks returned to the pool by hand."""
    scheduler.waiting.return_preempted(request)
    request.status = RequestStatus.PREEMPTED
    del scheduler.running[scheduler.running.index(request)]
    request.num_computed_tokens, request.num_preemptions = 0, request.num_preemptions + 1
    scheduler.kv_cache.pool.release(reversed(request.block_ids))
    request.block_ids, request.num_registered_blocks = [], 0


@preempt.accepts
def _(scheduler, request):
    scheduler.running[:] = [one for one in scheduler.running if one is not request]
    _preempting(remove="is done")(scheduler, request)


@preempt.look
def _(answer, llm):
    from course_lib.teaching.learner.patching import patched

    with patched(preempt, answer):
        for num_blocks in (16, 10, 6):
            scheduled = _plans(llm, [28] * 4, max_tokens=24, num_blocks=num_blocks)
            tokens = sum(int(part.split()[1]) for plan in scheduled for part in plan.split(", "))
            facts = f"{len(scheduled)} steps, {tokens} tokens computed"
            print(f"In the engine, four requests in {num_blocks} blocks: {facts}.")


# ---- 03.5 the running pass, with priorities -----------------------------------------------------

serve = Exercise(
    "03.5",
    "The heart of the scheduler",
    target="course_lib.core.scheduler:Scheduler._continue_running",
    stars=4,
    minutes=30,
    importance="useful",
    spec="Give every running request its next tokens; when blocks run out, the least deserving loses all.",
    hints=(
        "Write it first without preemption: go through the running requests, find each one's chunk, "
        "allocate, enter it in the plan, pay from the budget. Then: what must happen when allocate_slots "
        "returns None, and how often?",
        "While there are no blocks: the victim is the request with the largest (priority, arrival_time), of "
        "equals the last in the list. It may be one you served earlier in this step (take it out of the "
        "plan and give its tokens back to the budget), a later one, or the very request that asks (then "
        "stop trying, and go on to the next). Since the list shrinks, go through a copy and skip those that "
        "are no longer in it.",
        "for request in list(scheduler.running): if budget <= 0: break; if request not in "
        "scheduler.running: continue; count = scheduler._chunk(request.num_tokens - "
        "request.num_computed_tokens, budget); blocks = scheduler.kv_cache.allocate_slots(request, count); "
        "while blocks is None: victim = max(reversed(scheduler.running), key=lambda one: (one.priority, "
        "one.arrival_time)); if victim in plan: budget += plan.pop(victim)[0]; scheduler._preempt(victim); "
        "preempted.add(victim.request_id); if victim is request: break; blocks = allocate again. else: "
        "plan[request] = (count, blocks); budget -= count. return budget",
    ),
)


def _written(name: str, priority: int, arrival: int, num_tokens: int, computed: int) -> str:
    """A running request as a case shows it."""
    return f"{name}: priority {priority}, arrival {arrival}, {computed} of {num_tokens} computed"


def _read(text: str) -> tuple[str, int, int, int, int]:
    name, rest = text.split(": ")
    priority, arrival, computed, num_tokens = map(int, re.findall(r"\d+", rest))
    return name, priority, arrival, num_tokens, computed


def _running(rng: random.Random, count: int) -> list[str]:
    """Running requests at random: most decode, and most of those need a block in this step (blocks of 4)."""
    requests = []
    for name in "ABCDEFGH"[:count]:
        computed = 4 * rng.randint(1, 4) + rng.choice((0, 0, 0, 2))
        num_tokens = computed + rng.choice((1, 1, 1, 9))
        requests.append(_written(name, rng.randint(0, 2), rng.randint(0, 2), num_tokens, computed))
    return requests


@serve.cases
def _(rng: random.Random) -> Iterator[Case]:
    first = [_written("A", 0, 0, 9, 8), _written("B", 0, 1, 14, 4), _written("C", 0, 2, 6, 5)]
    yield Case("everybody fits", first, 9, 64, 0)
    yield Case("the budget ends in the middle of B", first, 9, 6, 0)
    yield Case("nobody gets more than three", first, 9, 64, 3)
    decodes = [_written("A", 0, 0, 9, 8), _written("B", 0, 1, 8, 7), _written("C", 0, 2, 6, 5)]
    yield Case("A needs a block, none is free: the latest must go", decodes, 0, 64, 0)
    urgent, later = _written("B", 0, 1, 9, 8), _written("C", 1, 2, 10, 9)
    yield Case(
        "the least deserving was served earlier in this step",
        [_written("A", 2, 0, 8, 5), urgent, later],
        0,
        64,
        0,
    )
    yield Case(
        "the one that asks is the least deserving", [urgent, later, _written("D", 2, 3, 13, 12)], 0, 64, 0
    )
    middle = [urgent, _written("D", 2, 0, 13, 12), _written("E", 0, 2, 7, 6)]
    yield Case("the one that asks must go, and somebody comes after it", middle, 1, 64, 0)
    equals = [_written(name, 1, 5, 9, 8) for name in "ABC"]
    yield Case("three answers to one prompt, equal in everything", equals, 1, 64, 0)
    again = [_written("A", 0, 2, 6, 5), _written("B", 0, 3, 9, 8), _written("C", 0, 1, 10, 9)]
    yield Case("B came last, C was preempted and came back", again, 0, 64, 0)
    tight = [_written("A", 3, 0, 16, 5), _written("B", 1, 1, 9, 8), _written("C", 0, 2, 30, 4)]
    yield Case("what a victim gives back goes to those behind it", tight, 2, 12, 0)
    long_chunk = [
        _written("A", 0, 0, 17, 8),
        *(_written(name, 0, i, i + 1, i) for i, name in enumerate("BCD", 1)),
    ]
    yield Case("A's chunk takes the blocks of two others", long_chunk, 1, 64, 0)
    for _ in range(8):
        requests = _running(rng, rng.randint(3, 6))
        yield Case(
            "at random", requests, rng.choice((0, 0, 1, 2)), rng.choice((4, 16, 64)), rng.choice((0, 0, 5))
        )


class _Bench(Scheduler):
    """A scheduler in which the choice of the victim is the learner's to write."""

    def _choose_victim(self):
        raise NotImplementedError("_choose_victim is part of the exercise: choose the victim yourself")


@serve.run
def _(answer, running, free_blocks_of_4, budget, threshold):
    """One pass over a scheduler in the given state: what it planned, who lost, what is left."""
    running = list(map(_read, running))
    held = sum(len(range(0, computed, 4)) for *_, computed in running)
    scheduler = _scheduler(held + free_blocks_of_4, 4, kind=_Bench, long_prefill_token_threshold=threshold)
    for name, priority, arrival, num_tokens, computed in running:
        request = _request(name, num_tokens, priority=priority, arrival=arrival)
        scheduler.requests[name] = request
        scheduler.running.append(request)
        scheduler.kv_cache.allocate_slots(request, computed)
        request.num_computed_tokens, request.status = computed, RequestStatus.RUNNING
    plan, preempted = {}, set()
    left = answer(scheduler, budget, plan, preempted)
    entries = {_named(one): value if isinstance(value, tuple) else (value,) for one, value in plan.items()}
    return {
        "plan": {name: value[0] for name, value in entries.items()},
        "preempted": sorted(map(str, preempted)),
        "still running": [request.request_id for request in scheduler.running],
        "budget left": left,
        "amiss": [
            *(f"the key {key!r}" for key in plan if not isinstance(key, Request)),
            *(f"the value {value!r}" for value in plan.values() if not _is_entry(value)),
            *(f"preempted: a {type(one).__name__}" for one in preempted if not isinstance(one, str)),
            *(f"no blocks for {name}" for name, value in entries.items() if value[-1] is None),
        ],
    }


def _named(one):
    return one.request_id if isinstance(one, Request) else str(one)


def _is_entry(value):
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], list | None)


@serve.expected
def _(running, free_blocks_of_4, budget, threshold):
    """On plain numbers, and with the budget added up anew for each request."""
    table = {name: [priority, arrival, num_tokens - computed, computed]
             for name, priority, arrival, num_tokens, computed in map(_read, running)}  # fmt: skip
    blocks = {name: -(-one[3] // 4) for name, one in table.items()}
    alive, plan, preempted = list(table), {}, []
    for name in table:
        left = budget - sum(plan.values())
        if left <= 0:
            break
        if name not in alive:
            continue
        count = min(table[name][2], threshold or left, left)
        needed = -(-(table[name][3] + count) // 4) - blocks[name]
        while name in alive and needed > free_blocks_of_4:
            worst = sorted(alive, key=lambda other: (table[other][:2], alive.index(other)))[-1]
            alive.remove(worst)
            free_blocks_of_4 += blocks[worst]
            plan.pop(worst, None)
            preempted.append(worst)
        if name in alive:
            plan[name] = count
            blocks[name] += needed
            free_blocks_of_4 -= needed
    return {
        "plan": plan,
        "preempted": sorted(preempted),
        "still running": alive,
        "budget left": budget - sum(plan.values()),
        "amiss": [],
    }


def _serving(
    *, victim="worst", refund=True, unplan=True, shift=True, tries="while", after_self="next", chunk=True,
    note=True, pay=True, stop=False, returned="left", empty_list="fits",
):  # fmt: skip
    """The solution with its joints exposed, written with an index."""

    def choose(scheduler, request):
        candidates = scheduler.running
        if victim == "last":
            return candidates[-1]
        if victim == "not itself":
            others = [one for one in candidates if one is not request]
            candidates = others or candidates
        if victim == "best":
            return min(candidates, key=lambda one: (one.priority, one.arrival_time))
        if victim == "last of the best":
            return min(reversed(candidates), key=lambda one: (one.priority, one.arrival_time))
        if victim == "arrival alone":
            return max(reversed(candidates), key=lambda one: one.arrival_time)
        if victim == "oldest of equals":
            return max(candidates, key=lambda one: (one.priority, one.arrival_time))
        if victim == "earliest":
            return max(reversed(candidates), key=lambda one: (one.priority, -one.arrival_time))
        if victim == "first by arrival alone":
            return max(candidates, key=lambda one: one.arrival_time)
        if victim == "priority alone":
            return max(reversed(candidates), key=lambda one: one.priority)
        if victim == "first by priority alone":
            return max(candidates, key=lambda one: one.priority)
        if victim == "most blocks":
            return max(candidates, key=lambda one: len(one.block_ids))
        return max(reversed(candidates), key=lambda one: (one.priority, one.arrival_time))

    def serve_running(scheduler, budget, plan, preempted):
        given, index = budget, 0
        while index < len(scheduler.running) and budget > 0:
            request = scheduler.running[index]
            count = request.num_tokens - request.num_computed_tokens
            if chunk == "budget alone":
                count = min(count, budget)
            elif chunk:
                count = scheduler._chunk(count, budget)
            new_blocks = scheduler.kv_cache.allocate_slots(request, count)
            while (not new_blocks if empty_list == "preempts" else new_blocks is None) and tries != "never":
                loser = choose(scheduler, request)
                if loser in plan and unplan:
                    back = plan.pop(loser)[0]
                    budget += back if refund else 0
                position = scheduler.running.index(loser)
                scheduler._preempt(loser)
                if note:
                    preempted.add(loser.request_id)
                if loser is request:
                    break
                if position < index and shift:
                    index -= 1
                new_blocks = scheduler.kv_cache.allocate_slots(request, count)
                if tries == "once":
                    break
            if stop and preempted:
                break
            if after_self == "stop" and request not in scheduler.running:
                break
            if (new_blocks is None if empty_list == "fits" else not new_blocks) and after_self != "plan":
                index += request in scheduler.running
                continue
            plan[request] = (count, new_blocks)
            budget -= count if pay else 0
            index += 1
        return budget if pay and returned == "left" else given

    return serve_running


@serve.symptom(
    "plan-by-id",
    "The keys of the plan are the requests themselves, not their ids: plan[request] = (count, blocks).",
)
def _(failure):
    return any("the key" in one for one in failure.got["amiss"])


@serve.symptom(
    "plan-without-both",
    "What the plan holds for a request is the pair of what it computes and what it got: plan[request] = "
    "(count, blocks), with the blocks as allocate_slots returned them.",
)
def _(failure):
    return any("the value" in one for one in failure.got["amiss"])


@serve.symptom(
    "preempted-without-id",
    "`preempted` takes request ids: preempted.add(victim.request_id). The runner knows a request by its id.",
)
def _(failure):
    return any("preempted" in one for one in failure.got["amiss"])


serve.mistake(
    "empty-is-none",
    "allocate_slots returns an empty list when the tokens fit in the blocks that the request has, and you take "
    "that for a refusal: ask whether it is None.",
)(_serving(empty_list="left out"))


serve.mistake(
    "empty-preempts",
    "allocate_slots returns an empty list when the tokens fit in the blocks that the request has, and you "
    "preempt somebody all the same: ask whether it is None.",
)(_serving(empty_list="preempts"))


serve.mistake(
    "victim-stays-planned",
    "The victim had been served earlier in this step, and it is still in the plan, with blocks that are not its "
    "own any more: plan.pop(victim), and its tokens go back to the budget.",
)(_serving(unplan=False))


serve.mistake(
    "threshold-ignored",
    "A request gets more than the threshold allows. scheduler._chunk(remaining, budget) knows it: the least of "
    "what remains, the threshold and the budget.",
)(_serving(chunk="budget alone"))


@serve.symptom(
    "planned-without-blocks",
    "A request is in the plan that got no blocks for its tokens: it would write into blocks that belong to "
    "others. Enter a request in the plan only once allocate_slots has returned a list, not None.",
)
def _(failure):
    return any("no blocks" in one for one in failure.got["amiss"])


@serve.symptom(
    "serves-the-preempted",
    "The plan has a request that was preempted in this very step. If you go through a copy of "
    "scheduler.running, skip those that are no longer in the list itself; and take a victim that was served "
    "before out of the plan.",
)
def _(failure):
    return not set(failure.got["plan"]) <= set(failure.got["still running"])


@serve.symptom(
    "nothing-planned",
    "A request is in the plan with no tokens at all: when the budget is used up, end the pass.",
)
def _(failure):
    return 0 in failure.got["plan"].values()


@serve.symptom(
    "over-budget",
    "The plan has more tokens than the budget: scheduler._chunk(remaining, budget) cuts a request's tokens "
    "to what is left of it, and what a request gets must be subtracted before the next one's turn.",
)
def _(failure):
    return sum(failure.got["plan"].values()) > failure.args[2]


serve.mistake(
    "goes-by-place",
    "Your victim is the last in the list whatever its priority. That is right when everybody is equal; here "
    "an urgent request may have been admitted last. Take the largest (priority, arrival_time).",
)(_serving(victim="last"))


serve.mistake(
    "preempts-the-urgent",
    "You preempt the most deserving request: a small priority number means that it goes first. Take the "
    "largest.",
)(_serving(victim="best"))


serve.mistake(
    "never-itself",
    "You look for a victim among the others only. When the request that asks is itself the least deserving, "
    "it must give way: otherwise it takes the blocks of somebody more urgent, which is a priority inversion.",
)(_serving(victim="not itself"))


serve.mistake(
    "oldest-of-equals",
    "Of several requests with equal priority and arrival (n answers to one prompt), you preempt the first "
    "in the list: the one with the most work done. max() keeps the first of equals, so give it "
    "reversed(scheduler.running).",
)(_serving(victim="oldest of equals"))


serve.mistake(
    "ignores-arrival",
    "Among requests of one priority you go by their place in the list. A request that was preempted and "
    "came back stands last in it although it came first: compare (priority, arrival_time).",
)(_serving(victim="priority alone"))


serve.mistake(
    "ignores-arrival-first",
    "Among requests of one priority you preempt the first in the list, which has the most work done. The latest "
    "arrival goes: compare (priority, arrival_time).",
)(_serving(victim="first by priority alone"))


serve.mistake(
    "earliest-arrival",
    "Among requests of one priority you preempt the one that came first. It has waited longest and has the "
    "most work done: the latest arrival goes.",
)(_serving(victim="earliest"))


serve.mistake(
    "preempts-the-last-of-the-urgent",
    "You preempt the most deserving request: a small priority number means that it goes first. Take the "
    "largest.",
)(_serving(victim="last of the best"))


serve.mistake(
    "ignores-priority",
    "Your victim is the latest arrival, whatever its priority. An urgent request may have come last: compare "
    "(priority, arrival_time).",
)(_serving(victim="arrival alone"))


serve.mistake(
    "ignores-priority-first",
    "Your victim is the latest arrival, whatever its priority. An urgent request may have come last: compare "
    "(priority, arrival_time).",
)(_serving(victim="first by arrival alone"))


serve.mistake(
    "most-blocks",
    "Your victim is the request with the most blocks. That frees the most room, and throws away the most "
    "work: go by (priority, arrival_time).",
)(_serving(victim="most blocks"))


serve.mistake(
    "no-refund",
    "The victim had been served earlier in this step, and the tokens it was given are not computed now: "
    "they belong to the budget again.",
)(_serving(refund=False))


serve.mistake(
    "skips-the-next",
    "When a victim stood before the current place, everybody behind it moved up by one, and your index now "
    "skips somebody. Reduce it by one, or go through a copy of the list.",
)(_serving(shift=False))


serve.mistake(
    "never-preempts",
    "When there are no blocks you leave the request out and go on. If all running requests need a block, "
    "nobody ever moves again: somebody has to give up its blocks.",
)(_serving(tries="never"))


serve.mistake(
    "one-victim",
    "You preempt once and give up. A chunk may need more blocks than one victim has: repeat until "
    "allocate_slots succeeds, or until the request itself was the victim.",
)(_serving(tries="once"))


serve.mistake(
    "stops-after-itself",
    "When the request that asks is the victim itself, you end the pass. (So does vLLM.) Those behind it may fit "
    "in what it gave back: here the pass goes on with the next.",
)(_serving(after_self="stop"))


serve.mistake(
    "stops-after-a-preemption",
    "After a preemption you end the pass. The victim's blocks were freed for the sake of the others: serve "
    "the request that asked, and go on with the rest. (Only the *admission* of waiting requests is skipped "
    "in such a step.)",
)(_serving(stop=True))


serve.mistake(
    "not-reported",
    "Put the victim's request_id into `preempted`: the runner must be told to forget its row, and the "
    "second pass must know that the cache is full.",
)(_serving(note=False))


serve.mistake(
    "budget-untouched",
    "You never take from the budget what a request gets. Everybody is served from all of it, and the second "
    "pass would hand the same tokens out once more: subtract, and return what is left.",
)(_serving(pay=False))


serve.mistake(
    "old-budget-returned",
    "You count the budget down and return it as it came. The second pass would hand the same tokens out once "
    "more: return what is left.",
)(_serving(returned="given"))


serve.wrong("planned-without-blocks")(_serving(after_self="plan"))
serve.wrong("over-budget")(_serving(chunk=False))


def _recording(plan_as, preempted_as):
    """The solution, with other things written down."""

    def serve_running(scheduler, budget, plan, preempted):
        requests, ids = {}, set()
        left = _serving()(scheduler, budget, requests, ids)
        known = scheduler.requests
        for request, (count, blocks) in requests.items():
            key, value = plan_as(request, count, blocks)
            plan[key] = value
        preempted.update(preempted_as(known[name]) for name in ids)
        return left

    return serve_running


serve.wrong("plan-by-id")(_recording(lambda one, n, ids: (one.request_id, (n, ids)), lambda one: one.request_id))
serve.wrong("plan-without-both")(_recording(lambda one, n, ids: (one, n), lambda one: one.request_id))
serve.wrong("preempted-without-id")(_recording(lambda one, n, ids: (one, (n, ids)), lambda one: one))


def _going_through(requests_of, *, skip, stop=True, again=False):
    """The solution as a for loop, over what `requests_of` makes of the list."""

    def serve_running(scheduler, budget, plan, preempted):
        for request in requests_of(scheduler.running):
            if stop and budget <= 0:
                break
            if skip and request not in scheduler.running:
                continue
            count = scheduler._chunk(request.num_tokens - request.num_computed_tokens, budget)
            blocks = scheduler.kv_cache.allocate_slots(request, count)
            while blocks is None:
                victim = max(reversed(scheduler.running), key=lambda one: (one.priority, one.arrival_time))
                budget += plan.pop(victim, (0, None))[0]
                scheduler._preempt(victim)
                preempted.add(victim.request_id)
                if victim is request:
                    break
                if again:
                    count = scheduler._chunk(request.num_tokens - request.num_computed_tokens, budget)
                blocks = scheduler.kv_cache.allocate_slots(request, count)
            else:
                plan[request] = (count, blocks)
                budget -= count
        return budget

    return serve_running


serve.mistake(
    "urgent-first",
    "You serve the running requests in order of priority. They are served in the order of scheduler.running; "
    "priority decides who joins and who is preempted.",
)(_going_through(lambda running: sorted(running, key=lambda one: (one.priority, one.arrival_time)), skip=True))


serve.mistake(
    "changes-the-list-it-walks",
    "Your loop goes through scheduler.running while _preempt takes requests out of it. Python then skips "
    "whoever moved up into the freed place: go through list(scheduler.running), and skip those that are no "
    "longer in it.",
)(_going_through(lambda running: running, skip=False))


serve.wrong("serves-the-preempted")(_going_through(list, skip=False))
serve.wrong("nothing-planned")(_going_through(list, skip=True, stop=False))
serve.accepts(_going_through(list, skip=True))
serve.accepts(_going_through(list, skip=True, again=True))  # with what a victim gave back


@serve.accepts
def _(scheduler, budget, plan, preempted):
    """Over a copy of the list, the budget added up anew each time."""
    for request in list(scheduler.running):
        left = budget - sum(count for count, _ in plan.values())
        if left <= 0:
            break
        if request.request_id in preempted:
            continue
        count = scheduler._chunk(request.num_tokens - request.num_computed_tokens, left)
        while (blocks := scheduler.kv_cache.allocate_slots(request, count)) is None:
            order = sorted(scheduler.running, key=lambda one: (one.priority, one.arrival_time))
            victim = order[-1]  # sorted keeps equals in their order, so the last of them is the youngest
            plan.pop(victim, None)
            scheduler._preempt(victim)
            preempted.add(victim.request_id)
            if victim is request:
                break
        else:
            plan[request] = (count, blocks)
    return budget - sum(count for count, _ in plan.values())


serve.accepts(_serving())


@serve.look
def _(answer):
    """Whole random runs, with every invariant checked after every step."""
    preemptions = inversions = unfinished = 0
    for seed in range(60):
        rng = random.Random(seed)
        kind = type("YourScheduler", (Scheduler,), {"_continue_running": answer})
        scheduler = _scheduler(rng.randint(6, 14), 4, kind=kind, max_num_batched_tokens=rng.choice((8, 32)))
        coming = [
            _request(f"r{i}", rng.randint(1, 12), rng.randint(1, 10), rng.randint(0, 2), float(i))
            for i in range(8)
        ]
        for _ in range(400):
            if coming and rng.random() < 0.5:
                scheduler.add_request(coming.pop(0))
            before = {one.request_id: one for one in scheduler.running}
            lost = [before[name] for name in _step(scheduler, check=True).preempted_request_ids]
            kept = [(one.priority, one.arrival_time) for one in scheduler.running]
            preemptions += len(lost)
            inversions += sum((one.priority, one.arrival_time) < max(kept, default=(-1, 0)) for one in lost)
        unfinished += len(scheduler.requests)
    print(f"60 random runs of 8 requests: {preemptions} preemptions, {inversions} of them unjust,")
    print(f"{unfinished} requests unfinished, and every invariant held after every step.")
