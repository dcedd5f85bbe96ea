"""Lesson 02, LLM engine example: what its exercises ask, how answers are judged, which mistakes people make."""

from __future__ import annotations

import contextlib
import functools
import json
import linecache
import math
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from course_lib.errors import CourseError
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question
from kernels import reference

# ---- questions ----------------------------------------------------------------------------------

longest = Question(
    "02.a",
    "Nine questions go to the model, among them these four. Whose answer will be the longest?",
    [
        Choice(
            "Tell me a joke.",
            "16 tokens: “What's a joke about a person who can't remember their own name?” That is all of it.",
        ),
        Choice(
            "Correct this sentence: he go to school.",
            "34 tokens: the corrected sentence, and a remark about an apostrophe that is not in it. Nothing in the prompt "
            "says so, and the engine has to find room before the model has written a word.",
            right=True,
        ),
        Choice(
            "Summarize in one sentence: The cat sat on the mat and looked at the rain.",
            "13 tokens: the longest question, and the sentence comes back as it was, but for one word.",
        ),
        Choice("What is the largest ocean?", "25 tokens, in which it names a trench. It does not lack confidence."),
    ],
)

small_blocks = Question(
    "02.b",
    "Blocks of one token would waste nothing at all. What speaks against them?",
    [
        Choice(
            "The block tables would be larger than the cache itself.",
            "An entry has 4 bytes, and it points to 45 KiB of keys and values.",
        ),
        Choice(
            "Attention would read the cache in pieces too small to be read fast.",
            "A block is stored head by head here: one token of a head is 256 bytes, sixteen are 4 KiB in one piece. Memory "
            "delivers neighbours together, so a thousand scattered pieces of 256 bytes take about twice as long as 63 of 4 KiB.",
            right=True,
        ),
        Choice(
            "Nothing: 16 is a habit of operating systems.",
            "Their pages have 4 KiB for the same reason as these blocks have 16 tokens, but it is a reason.",
        ),
    ],
)

who_finds_it = Question(
    "02.c",
    "Suspect 1: the runner writes keys into wrong slots. Suspect 2: the pool hands a block on while another request "
    "still reads it. The engine's scheduler has a method check_invariants(), which runs after every step if you start Python "
    "with COURSE_DEBUG=1. Which of the two does it find?",
    [
        Choice("both", "It looks at the books: tables, counts, queues. No wrong entry is in them for suspect 1."),
        Choice(
            "only the slots",
            "Slots are arithmetic in the runner, and the invariants are the scheduler's: they never see a slot.",
        ),
        Choice(
            "only the pool",
            "The books no longer add up: a table holds a block whose count says that nobody does. Wrong slots leave the "
            "books in order; the cache itself has to be compared with a computation that has no cache.",
            right=True,
        ),
        Choice("neither", "A block that two tables hold and the pool counts as free is what it looks for."),
    ],
)

# ---- 02.1 slots -----------------------------------------------------------------------------------

slots = Exercise(
    "02.1",
    "Where does a token's key go?",
    target="course_lib.runner.input_batch:slot_mapping",
    stars=1,
    minutes=10,
    importance="core",
    hints=(
        "Take position 5 of the six-token prompt and blocks of four. Which entry of the table is it, and which of the "
        "block's four slots?",
        "Quotient and remainder of the division by block_size say which of the request's blocks it is and which slot in "
        "that block. NumPy takes an array of rows and one of columns between the same brackets: one entry per token.",
        "Look up block_table[token_rows, positions // block_size] and make it int64. Those are the ids of the blocks: how "
        "many slots come before each, and how far into it is the token?",
    ),
)


@slots.cases
def _(rng: random.Random) -> Iterator[Case]:
    def case(label: str, table: list[list[int]], rows: list[int], positions: list[int], block_size: int) -> Case:
        return Case(label, np.array(table, np.int32), np.array(rows), np.array(positions), block_size)

    # As wide as a block: an entry looked up with % is a wrong one, and only positions themselves are out of range.
    first = [7, 2, 0, 0]
    yield case("six tokens in blocks 7 and 2", [first], [0] * 6, [0, 1, 2, 3, 4, 5], 4)
    yield case("the seventh token, alone", [first], [0], [6], 4)
    yield case("two requests, one new token each", [first, [5, 0, 0, 0]], [0, 1], [7, 2], 4)
    yield case("a chunk that starts inside a block, of the second row", [first, [5, 1, 3, 0]], [1] * 4, [3, 4, 5, 6], 4)
    for _ in range(3):
        size, width, num_rows = rng.choice((2, 8, 16)), 5, rng.randint(2, 5)
        ids = rng.sample(range(500), width * num_rows)
        table = [ids[row * width : (row + 1) * width] for row in range(num_rows)]
        rows, positions = [], []
        for row in rng.sample(range(num_rows), num_rows):  # the scheduler's order, not the rows'
            start, count = rng.randint(0, 2 * size), rng.choice((1, 1, 3, size + 1))
            rows += [row] * count
            positions += range(start, start + count)
        yield case("a ragged batch: chunks and single tokens, rows in any order", table, rows, positions, size)
    yield case("a cache of three billion slots", [[200_000_000, 150_000_001]], [0, 0], [15, 16], 16)


@slots.expected
def _(block_table, token_rows, positions, block_size):
    """Token by token, in Python's own integers."""
    table = block_table.tolist()
    return np.array(
        [
            list(range(table[row][p // block_size] * block_size, (table[row][p // block_size] + 1) * block_size))[
                p % block_size
            ]
            for row, p in zip(token_rows.tolist(), positions.tolist(), strict=True)
        ],
        np.int64,
    )


def _slots(table, rows, positions, size, *, entry=None, block=None, offset=None, wide=True, times=True):
    """The solution with its joints exposed."""
    rows = rows if block is None else block
    ids = table[rows, positions // size if entry is None else entry]
    ids = ids.astype(np.int64) if wide else ids
    offsets = positions % size if offset is None else offset
    return (ids * size if times else ids) + offsets


def _index_error(failure, words: str) -> bool:
    return isinstance(failure.error, IndexError) and words in str(failure.error)


@slots.symptom(
    "float-index",
    "An index must be a whole number, and / gives floats even where nothing is left over: divide with //.",
)
def _(failure):
    return _index_error(failure, "integer")


@slots.symptom(
    "rows-come-first",
    "You look up a row of the table that does not exist. The first index of block_table is the token's row, the second the "
    "entry in that row: block_table[token_rows, …].",
)
def _(failure):
    return _index_error(failure, "out of bounds for axis 0")


@slots.symptom(
    "entry-per-token",
    "You look up a table entry that does not exist. The table has one entry per block, not per token: the token at position "
    "p belongs to entry p // block_size.",
)
def _(failure):
    table, rows, positions, _ = failure.args
    try:
        table[rows, positions]
    except IndexError as error:
        return str(error) == str(failure.error)


@slots.symptom(
    "whole-rows",
    "You compute with whole rows of the table. Put both indices between the same brackets, block_table[rows, entries], and "
    "you get one entry for each token.",
)
def _(failure):
    if failure.error is not None:
        return isinstance(failure.error, ValueError) and "broadcast" in str(failure.error)
    table, rows, *_ = failure.args
    return failure.got.shape == (len(rows), table.shape[1])


@slots.mistake(
    "restart-in-every-block",
    "Your slots restart at 0 in every block, so all blocks share the first few slots: multiply the block id by the block "
    "size and add the offset to that.",
)
def _(table, rows, positions, size):
    return positions % size


@slots.mistake(
    "not-multiplied",
    "You add the offset to the block id itself. Block 7 does not begin at slot 7: the blocks before it take 7 * "
    "block_size slots.",
)
def _(table, rows, positions, size):
    return _slots(table, rows, positions, size, times=False)


@slots.mistake(
    "no-offset",
    "All tokens of a block get its first slot, so each overwrites the one before. Add the offset in the block, "
    "positions % block_size.",
)
def _(table, rows, positions, size):
    return _slots(table, rows, positions, size, offset=np.zeros_like(positions))


@slots.mistake(
    "no-table",
    "You use positions as if the request lay at the beginning of the cache. Where its blocks are, only the block table "
    "knows: look up block_table[token_rows, positions // block_size].",
)
def _(table, rows, positions, size):
    return positions.copy()


@slots.mistake(
    "first-row",
    "Every token is looked up in row 0 of the table. The batch mixes requests: token i belongs to row token_rows[i].",
)
def _(table, rows, positions, size):
    return _slots(table, rows, positions, size, block=np.zeros_like(rows))


@slots.mistake(
    "batch-order",
    "You number the rows in the order in which they come in the batch. token_rows already says which row of the table "
    "each token has, and the scheduler may serve them in any order.",
)
def _(table, rows, positions, size):
    order = np.cumsum(np.concatenate([[0], rows[1:] != rows[:-1]]))
    return _slots(table, rows, positions, size, block=order.astype(np.int64))


@slots.mistake(
    "quotient-and-remainder",
    "You exchanged // and %. positions // block_size says which block of the request it is, positions % block_size "
    "which slot inside that block.",
)
def _(table, rows, positions, size):
    return _slots(table, rows, positions, size, entry=positions % size, offset=positions // size)


@slots.mistake(
    "remainder-twice",
    "You look up the entry with positions % block_size, the slot inside a block. Which of the request's blocks it is says "
    "positions // block_size.",
)
def _(table, rows, positions, size):
    return _slots(table, rows, positions, size, entry=positions % size)


@slots.mistake(
    "overflow",
    "The table is int32, and block id * block size is more than 32 bits can hold in a cache of billions of slots: make "
    "the block ids int64 *before* you multiply.",
)
def _(table, rows, positions, size):
    with np.errstate(over="ignore"):
        return _slots(table, rows, positions, np.int32(size), wide=False).astype(np.int64)


def _written(lines: str, names: str = "table, rows, positions, size"):
    """An answer as a learner writes it, for mistakes that are a matter of a character."""
    space = {"np": np, "torch": torch, "deque": deque, "OrderedDict": OrderedDict}
    exec(f"def answer({names}):\n    " + lines.strip().replace("\n", "\n    "), space)
    return space["answer"]


for _lines in ("return table[rows, positions / size] * size + positions % size",
               "return [table[r][p / size] * size + p % size for r, p in zip(rows, positions)]"):  # fmt: skip
    slots.wrong("float-index")(_written(_lines))
for _lines in ("return table[positions // size, rows].astype(np.int64) * size + positions % size",
               "return table[positions // size].astype(np.int64) * size + positions % size"):  # fmt: skip
    slots.wrong("rows-come-first")(_written(_lines))
for _lines in ("return table[rows, positions].astype(np.int64) * size + positions % size",
               "return table[rows, positions + 0 // size].astype(np.int64) * size + positions % size",
               "return np.array([int(table[r, p]) * size + p % size for r, p in zip(rows, positions)])"):  # fmt: skip
    slots.wrong("entry-per-token")(_written(_lines))
for _lines in ("return table[rows][positions // size].astype(np.int64)",
               "return table[rows][positions // size] * size + positions % size",
               "return table[rows].astype(np.int64) * size + positions % size"):  # fmt: skip
    slots.wrong("whole-rows")(_written(_lines))


@slots.wrong("restart-in-every-block")
def _(table, rows, positions, size):
    return (table[rows, positions // size] * 0 + positions % size).astype(np.int64)


@slots.accepts
def _(table, rows, positions, size):
    """A loop, and one division for both."""
    found = []
    for row, position in zip(rows, positions, strict=True):
        index, offset = divmod(int(position), size)
        found.append(int(table[row, index]) * size + offset)
    return np.array(found, dtype=np.int64)


@slots.accepts
def _(table, rows, positions, size):
    """The table written out slot by slot, then one look-up per token."""
    every = table.astype(np.int64)[:, :, None] * size + np.arange(size)
    return every.reshape(len(table), -1)[rows, positions]


@slots.look
def _(answer):
    from course_lib import SamplingParams
    from course_lib.teaching.learner.patching import patched

    llm = _small_llm()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = ["The capital of France is Paris", "One two three four five six seven eight nine ten"]
    theirs = _fresh_tokens(llm, prompts, params)
    with patched(slots, answer):
        yours = _fresh_tokens(llm, prompts, params)
    same = sum(map(int.__eq__, sum(yours, []), sum(theirs, [])))
    print(f"In the engine, two requests at once: {same} of 12 tokens are the ones its own slots give.")


# ---- engines to try answers in ------------------------------------------------------------------------

# The lesson's own engine: in its notebook this one is loaded already.
SMALL = {"block_size": 16, "num_gpu_blocks_override": 16, "max_model_len": 256}
_TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _small_llm():
    from course_lib.teaching import course_llm

    return course_llm(**SMALL)


def _fresh_tokens(llm, prompts, params) -> list[list[int]]:
    """Token ids of each output, from an engine that is otherwise empty."""
    llm.llm_engine.core.reset()
    llm.llm_engine.frontend.forget_all()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [one.token_ids for output in outputs for one in output.outputs]


@functools.cache
def _tiny_model() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="course-tiny-")
    Path(folder.name, "config.json").write_text(json.dumps(_TINY), encoding="utf-8")
    return folder


@functools.cache
def _tiny_engine(backend: str = "torch"):
    """One layer of random weights: its steps take about a millisecond, its tokens depend on the prompt."""
    from course_lib import EngineArgs, LLMEngine

    args = EngineArgs(
        model=_tiny_model().name, load_format="dummy", skip_tokenizer_init=True, block_size=4, dtype="float32",
        num_gpu_blocks_override=64, disable_log_stats=True, attention_backend=backend,
        device="cuda" if backend == "triton" and not _interpreted() else "cpu",
    )  # fmt: skip
    return LLMEngine.from_engine_args(args)


def _tiny_params(max_tokens: int):
    from course_lib import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def _tiny_tokens(engine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Tokens of each prompt, from requests served together in an emptied engine."""
    engine.core.reset()
    engine.frontend.forget_all()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, _tiny_params(max_tokens))
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    return [last[str(i)] for i in range(len(prompts))]


# ---- 02.2 the pool ----------------------------------------------------------------------------------

pool = Exercise(
    "02.2",
    "A pool of blocks with several holders",
    target="course_lib.core.block_pool:BlockPool",
    stars=2,
    minutes=20,
    importance="core",
    hints=(
        "Two things change: how many tables hold each block, and in which order the free ones wait. A block is in the "
        "queue exactly while its count is 0.",
        "share must take a block out of the middle of the queue without walking along it. A dict remembers the order in "
        "which keys came, and collections.OrderedDict also gives up its oldest key quickly.",
        "self.free = OrderedDict.fromkeys(range(num_blocks)): popitem(last=False) takes the key in front, pop(id, None) one "
        "that may be there, and a new key joins at the back. Look at the counts to know when each of them is due.",
    ),
)


@pool.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("take three blocks, give them back in another order, take four", 6,
               [("allocate", 3), ("release", [1, 0, 2]), ("allocate", 4)])  # fmt: skip
    yield Case("one request more than there is room for", 4,
               [("allocate", 3), ("allocate", 2), ("allocate", 1)])  # fmt: skip
    yield Case("two requests share block 0; each gives it back", 4,
               [("allocate", 2), ("share", [0]), ("release", [0, 1]), ("allocate", 3), ("release", [0])])  # fmt: skip
    yield Case("three holders", 3,
               [("allocate", 1), ("share", [0]), ("share", [0]), ("release", [0]), ("release", [0]), ("allocate", 2)])  # fmt: skip
    yield Case("a free block is shared again: it leaves the middle of the queue", 5,
               [("allocate", 5), ("release", [4, 3, 2, 1, 0]), ("share", [2]), ("allocate", 3), ("allocate", 2)])  # fmt: skip
    for _ in range(4):
        size = rng.randint(5, 9)
        yield Case("a random life of a pool", size, _random_life(rng, size))


def _random_life(rng: random.Random, num_blocks: int) -> list[tuple[str, object]]:
    """Operations that a scheduler could ask for."""
    truth, tables, life = _Truth(num_blocks), [], []
    for _ in range(25):
        kind = rng.choice(("allocate", "allocate", "share", "release"))
        if kind == "allocate":
            life.append((kind, rng.randint(1, 4)))
            if (ids := truth.allocate(life[-1][1])) is not None:
                tables.append(ids)
        elif kind == "share":
            ids = rng.sample(range(num_blocks), rng.randint(1, 2))
            life.append((kind, ids))
            truth.share(ids)
            tables.append(ids)
        elif tables:
            ids = tables.pop(rng.randrange(len(tables)))
            life.append((kind, ids[::-1]))
            truth.release(ids[::-1])
    return life


@pool.run
def _(answer, num_blocks, life):
    """What each operation returned and the pool's books after it, up to the first one that goes wrong: what
    follows from that tells nothing of the mistake."""
    blocks, truth, history = answer(num_blocks), _Truth(num_blocks), []
    for kind, argument in life:
        given = list(argument) if isinstance(argument, list) else argument
        entry = {f"{kind}({argument})": _operate(blocks, kind, given, truth.num_free), **_books(blocks)}
        if given != argument:
            entry["the list that was passed"] = given
        history.append(entry)
        if entry != {f"{kind}({argument})": getattr(truth, kind)(argument), **_books(truth)}:
            break
    return history + ["not asked any more"] * (len(life) - len(history))


def _operate(blocks, kind, argument, num_free):
    try:
        return getattr(blocks, kind)(argument)
    except Exception as error:
        error.during = kind, argument, num_free  # for the symptoms
        raise


def _books(blocks):
    return {"num_free": blocks.num_free, "ref_counts": [int(count) for count in blocks.ref_counts]}


class _Truth:
    """The rules as they are said, on plain lists."""

    def __init__(self, num_blocks):
        self.ref_counts, self.queue = [0] * num_blocks, list(range(num_blocks))

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self, count):
        if count > len(self.queue):
            return None
        taken, self.queue = self.queue[:count], self.queue[count:]
        for block_id in taken:
            self.ref_counts[block_id] = 1
        return taken

    def share(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] += 1
            self.queue = [other for other in self.queue if other != block_id]

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.queue.append(block_id)


@pool.expected
def _(num_blocks, life):
    return pool.run_function(_Truth, num_blocks, life)


class _Went:
    """The first operation that went otherwise than it should. Before it all was as it should be."""

    def __init__(self, failure):
        pairs = list(zip(failure.args[1], failure.got, failure.expected, strict=True))
        at, ((self.kind, self.argument), mine, right) = next((i, p) for i, p in enumerate(pairs) if p[1] != p[2])
        (self.got, self.free, self.counts), (self.right, self.right_free, self.right_counts) = (
            list(entry.values())[:3] for entry in (mine, right)
        )
        self.changed_list = "the list that was passed" in mine
        self.free_before, self.counts_before = failure.args[0], [0] * failure.args[0]
        if at:
            self.free_before, self.counts_before = list(failure.expected[at - 1].values())[1:]

    @property
    def did_nothing(self):
        return (self.free, self.counts) == (self.free_before, self.counts_before)


def _at(kind):
    """A symptom of what went wrong in an operation of this kind."""
    return lambda function: lambda failure: (went := _Went(failure)).kind == kind and function(went)


def _during(failure, kind, *errors):
    return isinstance(failure.error, errors) and getattr(failure.error, "during", [""])[0] == kind


@pool.symptom(
    "no-num-free",
    "The pool needs an attribute num_free, the number of blocks without a holder: the scheduler asks it before it admits "
    "a request. Keep it up to date, or make it a @property.",
)
def _(failure):
    return isinstance(failure.error, AttributeError) and "num_free" in str(failure.error)


@pool.symptom(
    "empty-queue",
    "allocate takes from a queue that is empty. Before it touches anything: with fewer than `count` blocks free, return None.",
)
def _(failure):
    if not _during(failure, "allocate", IndexError, KeyError, StopIteration):
        return False
    _, count, num_free = failure.error.during
    return count > num_free


@pool.symptom(
    "not-in-the-queue",
    "share takes a block out of the queue that is not in it: one that has a holder does not wait there. Take it out only if "
    "its count is 0.",
)
def _(failure):
    return _during(failure, "share", KeyError, ValueError)


@pool.symptom(
    "changes-the-list",
    "Your code changes the list that it is given, which its caller still needs: it is a request's block table. Loop over it "
    "and leave it as it is.",
)
def _(failure):
    return _Went(failure).changed_list


@pool.symptom(
    "no-ids",
    "allocate must return the ids of the blocks that it took, a list of ints: they become the request's block table.",
)
@_at("allocate")
def _(went):
    return went.right is not None and not isinstance(went.got, list) and not went.did_nothing


@pool.symptom(
    "refuses",
    "allocate returned None and took nothing, though enough blocks are free. None is for a count larger than num_free; one "
    "that is equal can still be served.",
)
@_at("allocate")
def _(went):
    return went.right is not None and went.got is None and went.did_nothing


@pool.symptom(
    "half-an-allocation",
    "allocate takes what there is although it cannot take all. Those blocks are lost then: look at num_free first, and "
    "return None with nothing changed.",
)
@_at("allocate")
def _(went):
    return went.right is None and not went.did_nothing


@pool.symptom(
    "held-by-another",
    "allocate hands out a block that a table holds already. Who left it in the queue: share, which must take it out wherever "
    "it stands, or release, which must put it back only when no holder is left?",
)
@_at("allocate")
def _(went):
    return any(went.counts_before[block_id] > 0 for block_id in went.got)


@pool.symptom("no-holder", "A block that allocate hands out has one holder, so its count must be 1.")
@_at("allocate")
def _(went):
    taken = went.right is not None and (went.got, went.free) == (went.right, went.right_free)
    return taken and any(went.counts[block_id] == 0 for block_id in went.got)


def _make(*, takes="front", joins="back", backwards=False, moves=True, adds=True):
    """A pool with its joints exposed; a list as its queue."""

    class Pool(_Truth):
        def allocate(self, count):
            if count > len(self.queue):
                return None
            if takes == "smallest":
                self.queue.sort()
            taken = [self.queue.pop(-1 if takes == "back" else 0) for _ in range(count)]
            for block_id in taken:
                self.ref_counts[block_id] = 1
            return taken

        def share(self, block_ids):
            for block_id in block_ids:
                self.ref_counts[block_id] = self.ref_counts[block_id] + 1 if adds else 2
                if block_id in self.queue:
                    self.queue.remove(block_id)

        def release(self, block_ids):
            if not moves:
                block_ids = sorted(block_ids)
            for block_id in reversed(block_ids) if backwards else block_ids:
                self.ref_counts[block_id] -= 1
                if self.ref_counts[block_id] == 0:
                    self.queue.insert(0 if joins == "front" else len(self.queue), block_id)

    return Pool


pool.mistake(
    "newest-first",
    "allocate begins at the other end: at first block 0 is in front. Take from the front, where the one stands that has been "
    "free longest; what joined the back lately may still be wanted, its contents are there.",
)(_make(takes="back"))
pool.mistake(
    "joins-the-front",
    "release puts freed blocks at the front, so that the latest is handed out next. They join at the back: what was freed "
    "lately may still be wanted, its contents are there.",
)(_make(joins="front"))
pool.mistake(
    "smallest-first",
    "allocate hands out the smallest ids. The order is that of time: the block that has been free longest comes first.",
)(_make(takes="smallest"))
pool.mistake(
    "own-order",
    "release works through the ids in reverse. The caller has chosen the order: the first in the list is freed first.",
)(_make(backwards=True))
pool.mistake(
    "sorts",
    "release sorts the ids. The caller has chosen the order: the first in the list is freed first.",
)(_make(moves=False))
pool.mistake(
    "always-two",
    "share sets the count to 2. There may be a third holder, or (a free block) a first one: add 1.",
)(_make(adds=False))


@pool.mistake(
    "a-set",
    "A set keeps no order, and its pop() takes any element. The queue must remember who has been free longest.",
)
class _Set:
    def __init__(self, num_blocks):
        self.ref_counts, self.queue = [0] * num_blocks, set(range(num_blocks))

    @property
    def num_free(self):
        return len(self.queue)

    def allocate(self, count):
        if count > len(self.queue):
            return None
        taken = [self.queue.pop() for _ in range(count)]
        for block_id in taken:
            self.ref_counts[block_id] = 1
        return taken

    def share(self, block_ids):
        for block_id in block_ids:
            self.queue.discard(block_id)
            self.ref_counts[block_id] += 1

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.queue.add(block_id)


@pool.mistake(
    "its-old-place",
    "A block that share took out leaves its old entry lying in your queue. Freed again, it is found there, and comes out "
    "before its turn. Take the entry out, or mark it so that only the newest counts.",
)
class _Stale:
    def __init__(self, num_blocks):
        self.ref_counts, self.entries = [0] * num_blocks, deque(range(num_blocks))

    @property
    def num_free(self):
        return self.ref_counts.count(0)

    def allocate(self, count):
        if count > self.num_free:
            return None
        taken = []
        while len(taken) < count:
            if self.ref_counts[block_id := self.entries.popleft()] == 0:
                self.ref_counts[block_id] = 1
                taken.append(block_id)
        return taken

    def share(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] += 1

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.entries.append(block_id)


@pool.symptom(
    "another-order",
    "allocate hands out free blocks, and as many as it should, but in another order than time's: first comes the one that "
    "has been free longest. Blocks leave at the front, join at the back, and release frees them in the order of its list.",
)
@_at("allocate")
def _(went):
    free = all(went.counts_before[block_id] == 0 for block_id in went.got)
    return free and went.got != went.right and len(set(went.got)) == len(went.right)


@pool.symptom(
    "shared-but-free",
    "After share, num_free still counts a block that has a holder now. It must leave the queue, wherever it stands, or "
    "allocate may hand it to someone else.",
)
@_at("share")
def _(went):
    return went.free > went.right_free


@pool.symptom(
    "not-from-the-queue",
    "share makes num_free smaller for a block that was not free. Only one that had no holder leaves the queue.",
)
@_at("share")
def _(went):
    return went.free < went.right_free


@pool.symptom(
    "freed-while-held",
    "release frees a block, or counts it as free, although another table still holds it: the next request would write over a "
    "prefix that someone is reading. Count one holder less, and free the block only when none is left.",
)
@_at("release")
def _(went):
    return went.free > went.right_free


@pool.symptom(
    "not-freed",
    "After release a block without a holder is not free again: when its count falls to 0 it joins the queue at the back, and "
    "num_free counts it.",
)
@_at("release")
def _(went):
    return went.free < went.right_free


@pool.symptom(
    "counts-differ",
    "The holders are not counted right. allocate: 1 for each block taken; share: one more; release: one less.",
)
def _(failure):
    went = _Went(failure)
    return (went.got, went.free) == (went.right, went.right_free) and went.counts != went.right_counts


@pool.symptom("miscounted", "num_free is not the number of blocks without a holder after this operation.")
def _(failure):
    went = _Went(failure)
    return (went.got, went.counts) == (went.right, went.right_counts) and went.free != went.right_free


def _pool_with(queue="deque(range(n))", take="self.free.popleft()", enough="count <= len(self.free)", free="len(self.free)",
               share="if i in self.free: self.free.remove(i)", holder="+= 1", release="for i in block_ids:", less="-= 1",
               when="self.ref_counts[i] == 0", put="self.free.append(i)", give="ids", first="1", extra="pass"):  # fmt: skip
    """A pool as learners write it, on a deque, with one line changed."""
    space = {"deque": deque, "OrderedDict": OrderedDict}
    exec(f"""class Pool:
    def __init__(self, n):
        self.ref_counts, self.free, self.number = [0] * n, {queue}, n
    @property
    def num_free(self): return {free}
    def allocate(self, count):
        if not ({enough}): return None
        ids = []
        for _ in range(count):
            ids.append({take})
            {extra}
            self.ref_counts[ids[-1]] = {first}
        return {give}
    def share(self, block_ids):
        for i in block_ids:
            {share}
            self.ref_counts[i] {holder}
    def release(self, block_ids):
        {release}
            self.ref_counts[i] {less}
            if {when}: {put}
""", space)  # fmt: skip
    return space["Pool"]


for _name, _lines in (
    ("own-order", {"release": "for i in reversed(block_ids):"}),
    ("joins-the-front", {"put": "self.free.appendleft(i)"}),
    ("newest-first", {"take": "self.free.pop()"}),
    ("a-set", {"queue": "set(range(n))", "take": "self.free.pop()", "put": "self.free.add(i)"}),
    ("smallest-first", {"take": "min(self.free)", "extra": "self.free.remove(ids[-1])"}),
    ("smallest-first", {"queue": "set(range(n))", "take": "min(self.free)", "extra": "self.free.remove(ids[-1])",
                        "put": "self.free.add(i)"}),
    ("joins-the-front", {"queue": "OrderedDict.fromkeys(range(n))", "take": "self.free.popitem(last=False)[0]",
                         "share": "self.free.pop(i, None)",
                         "put": "self.free[i] = None; self.free.move_to_end(i, last=False)"}),
    ("newest-first", {"queue": "OrderedDict.fromkeys(range(n))", "take": "self.free.popitem()[0]",
                      "share": "self.free.pop(i, None)", "put": "self.free[i] = None"}),
    ("another-order", {"queue": "dict.fromkeys(range(n))", "take": "min(self.free, key=lambda i: -i % 3)",
                       "extra": "del self.free[ids[-1]]", "share": "self.free.pop(i, None)", "put": "self.free[i] = None"}),
    ("sorts", {"release": "for i in sorted(block_ids):"}),
    ("refuses", {"enough": "count < len(self.free)"}),
    ("refuses", {"enough": "False"}),
    ("changes-the-list", {"release": "while block_ids:\n            i = block_ids.pop(0)"}),
    ("empty-queue", {"enough": "True"}),
    ("half-an-allocation", {"enough": "True", "take": "self.free.popleft() if self.free else 0"}),
    ("no-ids", {"give": "None"}),
    ("no-ids", {"give": "tuple(ids)"}),
    ("no-holder", {"first": "0"}),
    ("not-in-the-queue", {"share": "self.free.remove(i)"}),
    ("shared-but-free", {"share": "pass"}),
    ("held-by-another", {"share": "pass", "free": "self.ref_counts.count(0)"}),
    ("held-by-another", {"when": "True", "free": "self.ref_counts.count(0)"}),
    ("its-old-place", {"share": "pass", "free": "self.ref_counts.count(0)", "enough": "count <= self.num_free",
                       "extra": "\n            while self.ref_counts[ids[-1]]: ids[-1] = self.free.popleft()"}),
    ("not-from-the-queue", {"queue": "deque(range(n))", "free": "self.number", "enough": "count <= self.number",
                            "share": "self.number -= 1", "extra": "self.number -= 1",
                            "put": "self.free.append(i); self.number += 1"}),
    ("freed-while-held", {"when": "True"}),
    ("freed-while-held", {"less": "= 0"}),
    ("not-freed", {"put": "pass"}),
    ("not-freed", {"less": "-= 0"}),
    ("counts-differ", {"holder": "+= 0"}),
    ("counts-differ", {"first": "2"}),
    ("miscounted", {"free": "self.number"}),
    ("always-two", {"holder": "= 2"}),
):
    pool.wrong(_name)(_pool_with(**_lines))


@pool.wrong("no-num-free")
class _Private:
    def __init__(self, num_blocks):
        self.ref_counts, self._free = [0] * num_blocks, deque(range(num_blocks))

    def allocate(self, count):
        return [self._free.popleft() for _ in range(count)]

    share = release = allocate


def _steps_of(function: Callable[[], object]) -> int:
    """Steps of Python's interpreter, and elements that its lists and deques had to move or compare."""
    steps = 0

    def count_steps(frame, event, _):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return count_steps

    def count_elements(_, event, called):
        nonlocal steps
        owner = getattr(called, "__self__", None)
        if event == "c_call" and isinstance(owner, list | deque) and called.__name__ in _WALKS:
            steps += len(owner)

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(count_steps)
    sys.setprofile(count_elements)
    try:
        function()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return steps


_WALKS = ("remove", "index", "insert", "count", "copy", "sort", "reverse")


_WALKING = (
    "{} walks along the queue for one block: with 2,000 blocks in the pool it costs hundreds of times what it costs with ten, "
    "and the engine does it for every {}. Find the block in a dict (collections.OrderedDict keeps the order as well), or link "
    "the blocks to their neighbours."
)


def _steps_for_one_block(operation: str):
    def count(answer):
        blocks = answer(2000)
        ids = blocks.allocate(2000)
        blocks.release(ids)
        if operation == "release":
            blocks.share([ids[1000]])
        return _steps_of(lambda: getattr(blocks, operation)(1 if operation == "allocate" else [ids[1000]]))

    return count


for _operation, _occasion in (("share", "prefix hit"), ("release", "request that ends"), ("allocate", "block that fills up")):
    pool.budget(_WALKING.format(_operation, _occasion), most=400, unit="step of the interpreter")(
        _steps_for_one_block(_operation)
    )


pool.wasteful(_Truth)
pool.wasteful(_pool_with())
pool.wasteful(_pool_with(share="self.free = deque(j for j in self.free if j != i)"))
pool.wasteful(_pool_with(free="self.ref_counts.count(0)", enough="count <= self.num_free"))


@pool.accepts
class _Ordered:
    """An OrderedDict as an ordered set."""

    def __init__(self, num_blocks):
        self.ref_counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self):
        return len(self.free)

    def allocate(self, count):
        if count > len(self.free):
            return None
        taken = []
        while len(taken) < count:
            block_id, _ = self.free.popitem(last=False)
            self.ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def share(self, block_ids):
        for block_id in block_ids:
            if not self.ref_counts[block_id]:
                del self.free[block_id]
            self.ref_counts[block_id] += 1

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                self.free[block_id] = None


@pool.accepts
class _Linked:
    """The engine's way: neighbours in two arrays, with a ring that closes at index num_blocks."""

    def __init__(self, num_blocks):
        self.ref_counts = np.zeros(num_blocks, int)
        self.end, self.num_free = num_blocks, num_blocks
        self.next = [(i + 1) % (num_blocks + 1) for i in range(num_blocks + 1)]
        self.previous = [(i - 1) % (num_blocks + 1) for i in range(num_blocks + 1)]

    def _take(self, block_id):
        before, after = self.previous[block_id], self.next[block_id]
        self.next[before], self.previous[after] = after, before
        self.num_free -= 1

    def allocate(self, count):
        if count > self.num_free:
            return None
        ids = []
        for _ in range(count):
            ids.append(self.next[self.end])
            self._take(ids[-1])
            self.ref_counts[ids[-1]] = 1
        return ids

    def share(self, block_ids):
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                self._take(block_id)
            self.ref_counts[block_id] += 1

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                last = self.previous[self.end]
                self.next[last], self.previous[self.end] = block_id, block_id
                self.previous[block_id], self.next[block_id] = last, self.end
                self.num_free += 1


@pool.accepts
class _Tombstones:
    """A deque in which entries that no longer count are left lying and skipped."""

    def __init__(self, num_blocks):
        self.ref_counts = [0] * num_blocks
        self.entries, self.newest = deque((i, 0) for i in range(num_blocks)), [0] * num_blocks
        self.num_free = num_blocks

    def allocate(self, count):
        if count > self.num_free:
            return None
        ids = []
        while len(ids) < count:
            block_id, serial = self.entries.popleft()
            if self.ref_counts[block_id] == 0 and serial == self.newest[block_id]:
                ids.append(block_id)
                self.ref_counts[block_id] = 1
        self.num_free -= count
        return ids

    def share(self, block_ids):
        for block_id in block_ids:
            self.num_free -= self.ref_counts[block_id] == 0
            self.ref_counts[block_id] += 1

    def release(self, block_ids):
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.num_free += 1
                self.newest[block_id] += 1
                self.entries.append((block_id, self.newest[block_id]))


@pool.adapt
def _(answer, original):
    class YourBlockPool(original):
        """The engine's pool, in which who holds what and which block comes next is the learner's business."""

        def __init__(self, num_blocks):
            super().__init__(num_blocks)
            self._yours = answer(num_blocks)

        @property
        def num_free(self):
            return self._yours.num_free

        def allocate(self, count):
            ids = self._yours.allocate(count)
            for block_id in ids:
                if self.blocks[block_id].content_hash is not None:
                    self._forget(self.blocks[block_id])
            return self._noted(ids)

        def share(self, block_ids):
            block_ids = list(block_ids)
            self._yours.share(block_ids)
            self._noted(block_ids)

        def release(self, block_ids):
            block_ids = list(block_ids)
            self._yours.release(block_ids)
            self._noted(block_ids)

        def _noted(self, ids):
            for block_id in ids:
                self.blocks[block_id].ref_count = int(self._yours.ref_counts[block_id])
            return ids

        def check_invariants(self):
            held = sum(block.ref_count > 0 for block in self.blocks)
            assert held + self.num_free == self.num_blocks, f"{held} blocks held, {self.num_free} free"

    return YourBlockPool


@pool.look
def _(answer):
    from course_lib import SamplingParams
    from course_lib.teaching import record
    from course_lib.teaching.learner.patching import patched

    llm = _small_llm()
    core = llm.llm_engine.core
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=3, ignore_eos=True)
    with patched(pool, answer):
        core.reset()  # the pool is made with the scheduler
        llm.llm_engine.frontend.forget_all()
        with record(llm) as trace:
            llm.generate("one two three four five six seven eight nine ten " * 2, params, use_tqdm=False)
        first, second = trace.steps[0].block_tables.values()
        shared = len(set(first) & set(second))
        core.scheduler.check_invariants()
        print(f"In the engine, n=2: tables {list(first)} and {list(second)}, {shared} shared; at the end")
        print(f"{core.scheduler.kv_cache.pool.num_free} of {core.num_blocks} blocks are free.")
    core.reset()


# ---- 02.3 the loop ------------------------------------------------------------------------------------

serve = Exercise(
    "02.3",
    "Requests come, and go",
    target="course_lib.entrypoints.llm:LLM._run_engine",
    stars=2,
    minutes=20,
    importance="core",
    hints=(
        "One turn of your loop is one engine.step(). Before it, add whoever arrives at this turn; after it, look at the "
        "outputs and abort whoever has had enough.",
        "The loop goes on while someone is still to arrive *or* engine.has_unfinished_requests(). An idle engine's step() "
        "returns an empty list, so waiting for the next arrival needs no special case.",
        "In each turn: while arrivals and arrivals[0][0] == step, add; for each output of engine.step(), keep it under its "
        "request_id, and abort if it is not finished and has patience.get(request_id, infinity) tokens or more; step += 1.",
    ),
)


@serve.cases
def _(rng: random.Random) -> Iterator[Case]:
    _tiny_engine()  # here, where its making takes no time from the answer

    def arrival(step: int, request_id: str, max_tokens: int) -> tuple[int, str, list[int], int]:
        return step, request_id, [rng.randint(3, 96) for _ in range(rng.randint(2, 5))], max_tokens

    yield Case("B joins when A has 5 tokens", [arrival(0, "A", 9), arrival(5, "B", 6)], {})
    yield Case("A's reader hangs up after 3 tokens", [arrival(0, "A", 12), arrival(0, "B", 5)], {"A": 3})
    yield Case("B comes long after A has finished", [arrival(0, "A", 3), arrival(9, "B", 4)], {})
    yield Case("nobody comes before step 2, then two at once", [arrival(2, "A", 4), arrival(2, "B", 4)], {})
    yield Case("a reader who is patient enough", [arrival(0, "A", 4)], {"A": 4})
    steps = sorted(rng.randint(0, 12) for _ in range(5))
    yield Case("five requests, two of them abandoned", [arrival(s, i, rng.randint(3, 12)) for s, i in zip(steps, "ABCDE")],
               {"B": rng.randint(1, 3), "D": 2})  # fmt: skip


class _Watched:
    """The tiny engine, and what was asked of it."""

    def __init__(self, engine):
        self.engine, self.steps, self.joined, self.aborted = engine, 0, {}, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def add_request(self, request_id, *args, **kwargs):
        self.engine.add_request(request_id, *args, **kwargs)
        self.joined[request_id] = self.steps

    def abort_request(self, request_ids):
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self.aborted += [i for i in ids if self.engine.frontend.output_processor.core_ids(i)]
        self.engine.abort_request(ids)

    def step(self):
        self.steps += 1
        if self.steps > 300:
            raise _NeverEnds("300 steps, and your loop still goes on")
        return self.engine.step()


class _NeverEnds(RuntimeError):
    """Told by a symptom."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for further threads, and on a busy machine they wait long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@serve.run
@_one_thread()
def _(answer, arrivals, patience):
    engine = _tiny_engine()
    engine.core.reset()
    engine.frontend.forget_all()
    watched = _Watched(engine)
    requests = [(step, i, {"prompt_token_ids": prompt}, _tiny_params(most)) for step, i, prompt, most in arrivals]
    outputs = answer(watched, requests, dict(patience))
    if not isinstance(outputs, dict) or not all(hasattr(output, "outputs") for output in outputs.values()):
        return outputs
    blocks = engine.core.scheduler.kv_cache.pool
    return {
        "tokens you return": {i: outputs[i].outputs[0].token_ids for i in sorted(outputs)},
        "calls of step() before each joined": dict(sorted(watched.joined.items())),
        "aborted": sorted(watched.aborted),
        "blocks held at the end": blocks.num_blocks - blocks.num_free,
    }


@serve.expected
@_one_thread()
def _(arrivals, patience):
    """Each request alone in the engine, cut where its reader leaves."""
    alone = {
        request_id: _tiny_tokens(_tiny_engine(), [prompt], max_tokens)[0]
        for _, request_id, prompt, max_tokens in arrivals
    }
    impatient = [i for i in alone if patience.get(i, len(alone[i])) < len(alone[i])]
    return {
        "tokens you return": {i: alone[i][: patience.get(i)] for i in sorted(alone)},
        "calls of step() before each joined": {i: step for step, i, _, _ in sorted(arrivals, key=lambda one: one[1])},
        "aborted": sorted(impatient),
        "blocks held at the end": 0,
    }


@serve.symptom(
    "never-ends",
    "Your loop was stopped after 300 steps. It is done when nobody is still to arrive and engine.has_unfinished_requests() is "
    "False: does your step counter grow in every turn?",
)
def _(failure):
    return isinstance(failure.error, _NeverEnds)


@serve.symptom(
    "added-twice",
    "A request is added a second time: take each arrival out of your list when you add it.",
)
def _(failure):
    return isinstance(failure.error, ValueError) and "unfinished request" in str(failure.error)


@serve.symptom(
    "not-outputs",
    "Return a dict from request id to the request's last RequestOutput, the object that step() gave you: the caller wants "
    "its text and finish reason too.",
)
def _(failure):
    return failure.error is None and not (isinstance(failure.got, dict) and "aborted" in failure.got)


def _loop(engine, arrivals, patience, *, when="step", gap=True, abort="at", keep="all", late=0, idle=True):
    """The solution with its joints exposed."""
    arrivals, last, step = list(arrivals), {}, 0
    while (arrivals and (gap or not step)) or engine.has_unfinished_requests():
        while arrivals and (
            when == "start" or (when == "empty" and not engine.has_unfinished_requests()) or arrivals[0][0] + late == step
        ):
            engine.add_request(*arrivals.pop(0)[1:])
        for output in engine.step() if idle or engine.has_unfinished_requests() else ():
            if keep == "all" or output.finished:
                last[output.request_id] = output
            enough = patience.get(output.request_id, 10**9) + (abort == "late")
            if abort != "never" and len(output.outputs[0].token_ids) >= enough and not output.finished:
                engine.abort_request(output.request_id)
        step += 1
    return last


@serve.mistake(
    "one-after-the-other",
    "A request is added only when the engine has nothing left to do: that is static batching, and B waits for all of A. "
    "Add it at its step, whatever else is running.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, when="empty")


@serve.mistake(
    "all-at-the-start",
    "You add every request before the first step. Each has a step of its own: add it when your loop has counted that far.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, when="start")


@serve.mistake(
    "one-step-late",
    "Requests are added one step late: add those of step s before the s-th call of engine.step(), counting from 0.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, late=1)


@serve.mistake(
    "skips-idle-steps",
    "You do not call engine.step() while nobody is there. A step is a call of it, idle ones included: call it in every turn.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, idle=False)


@serve.mistake(
    "leaves-too-early",
    "Your loop ends when the engine is idle, although someone is still to arrive. Go on while there are arrivals left "
    "*or* unfinished requests.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, gap=False)


@serve.mistake(
    "never-aborts",
    "patience has no effect: a reader who has gone still costs a place in every step, and blocks. Call "
    "engine.abort_request(request_id) when that many tokens have come.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, abort="never")


@serve.mistake(
    "one-token-too-many",
    "The reader who wants n tokens is given n + 1. Abort as soon as len(token_ids) >= n.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, abort="late")


@serve.mistake(
    "loses-the-aborted",
    "What an abandoned request had written is missing. step() never reports a finished output for an aborted one, so keep "
    "every request's newest output, not only finished ones.",
)
def _(engine, arrivals, patience):
    return _loop(engine, arrivals, patience, keep="finished")


@serve.symptom(
    "blocks-lost",
    "At the end the engine still holds blocks: a request was left running. Abort it, or step until it has finished.",
)
def _(failure):
    return failure.got["blocks held at the end"] > 0


@serve.symptom(
    "needless-abort",
    "You abort a request that has finished by itself, or whose reader is content to wait. Look at output.finished and at "
    "patience first.",
)
def _(failure):
    return bool(set(failure.got["aborted"]) - set(failure.expected["aborted"]))


@serve.symptom(
    "wrong-step",
    "A request was added at another step than its own. Steps are calls of engine.step(), counted from 0: add the arrivals of "
    "step s when it has been called s times.",
)
def _(failure):
    here, there = (outcome["calls of step() before each joined"] for outcome in (failure.got, failure.expected))
    return here != there


@serve.symptom(
    "requests-missing",
    "The dict that you return lacks a request. Everybody has an entry, those who have hung up too.",
)
def _(failure):
    return failure.expected["tokens you return"].keys() > failure.got["tokens you return"].keys()


@serve.symptom(
    "other-tokens",
    "The tokens that you return are not those of a run alone, cut where the reader leaves. Keep each request's newest "
    "output: it holds all its tokens so far.",
)
def _(failure):
    return failure.expected["tokens you return"] != failure.got["tokens you return"]


@serve.wrong("never-ends")
def _(engine, arrivals, patience):
    while True:
        while arrivals:
            engine.add_request(*arrivals.pop(0)[1:])
        engine.step()


@serve.wrong("not-outputs")
def _(engine, arrivals, patience):
    return {i: output.outputs[0].token_ids for i, output in _loop(engine, arrivals, patience).items()}


@serve.wrong("blocks-lost")
def _(engine, arrivals, patience):
    last = {}
    for step in range(30):
        while arrivals and arrivals[0][0] == step:
            engine.add_request(*arrivals.pop(0)[1:])
        last |= {output.request_id: output for output in engine.step()}
        if any(len(last[i].outputs[0].token_ids) >= n for i, n in patience.items() if i in last):
            break
    return last


_SERVE = """
last, step = {}, 0
while arrivals or engine.has_unfinished_requests():
    while arrivals and arrivals[0][0] == step:
        engine.add_request(*arrivals.pop(0)[1:])
    for output in engine.step():
        last[output.request_id] = output
        if len(output.outputs[0].token_ids) >= patience.get(output.request_id, 99) and not output.finished:
            engine.abort_request(output.request_id)
    step += 1
return last"""
for _name, *_change in (
    ("never-ends", "    step += 1", "    pass"),
    ("added-twice", ".pop(0)", "[0]"),
    ("skips-idle-steps", "    for output in engine.step():", "    if not engine.has_unfinished_requests():\n"
                         "        step += 1\n        continue\n    for output in engine.step():"),
    ("skips-idle-steps", "    while arrivals and", "    if not engine.has_unfinished_requests():\n"
                         "        step = arrivals[0][0]\n    while arrivals and"),
    ("needless-abort", "output.request_id, 99)", "output.request_id, 3)"),
    ("wrong-step", "    step += 1", "    step += 2", "[0] == step", "[0] <= step"),
    ("wrong-step", "    while arrivals and arrivals[0][0] == step", "    if arrivals and arrivals[0][0] <= step"),
    ("requests-missing", "        last[", "        if output.request_id not in patience: last["),
    ("other-tokens", "        last[output.request_id] = output", "        last.setdefault(output.request_id, output)"),
    ("loses-the-aborted", "        last[", "        if output.finished: last["),
    ("one-token-too-many", ">=", ">"),
    ("one-step-late", "== step", "== step - 1"),
    ("leaves-too-early", "while arrivals or engine.", "while step == 0 or engine."),
):  # fmt: skip
    _lines = _SERVE
    for _old, _new in zip(_change[::2], _change[1::2], strict=True):
        assert _lines.count(_old) == 1
        _lines = _lines.replace(_old, _new)
    serve.wrong(_name)(_written(_lines, "engine, arrivals, patience"))
serve.accepts(_written(_SERVE, "engine, arrivals, patience"))


@serve.accepts
def _(engine, arrivals, patience):
    """A loop over steps, with arrivals in a dict and aborts collected."""
    by_step = {}
    for step, *request in arrivals:
        by_step.setdefault(step, []).append(request)
    last, step = {}, 0
    while True:
        for request in by_step.pop(step, ()):
            engine.add_request(*request)
        gone = set()
        for output in engine.step():
            last[output.request_id] = output
            count = len(output.outputs[0].token_ids)
            if output.request_id in patience and count == patience[output.request_id] and not output.finished:
                gone.add(output.request_id)
        if gone:
            engine.abort_request(gone)
        step += 1
        if not by_step and not engine.get_num_unfinished_requests():
            return last


@serve.adapt
def _(answer, original):
    def _run_engine(self, request_ids, use_tqdm):
        """All requests are in the engine already; without a progress bar."""
        outputs = answer(self.llm_engine, [], {})
        return [outputs[request_id] for request_id in request_ids]

    return _run_engine


@serve.look
def _(answer):
    from course_lib import SamplingParams

    llm = _small_llm()
    eight, four = (SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (8, 4))
    prompts = ["The capital of France is Paris", "One two three four five six"]
    alone = [_fresh_tokens(llm, [prompt], params)[0] for prompt, params in zip(prompts, (eight, four), strict=True)]
    arrivals = [(0, "A", prompts[0], eight), (5, "B", prompts[1], eight)]
    together = answer(llm.llm_engine, arrivals, {"B": 4})
    tokens = {i: output.outputs[0].token_ids for i, output in together.items()}
    print("With the course model: B joined when A had 5 tokens and left with 4.")
    print(f"The tokens of each solo run: A {tokens['A'] == alone[0]}, B {tokens['B'] == alone[1]}.")


# ---- attention: cases and truth for 02.4 and 02.5 ---------------------------------------------------------


def _paged_case(rng: random.Random, label: str, lens: list[int], heads: int, kv_heads: int, dim: int, size: int,
                *, stale: str = "old", scale: float | None = None) -> Case:  # fmt: skip
    """Requests in scattered blocks; slots that no request fills hold old values, or NaN."""
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    width = max(-(-n // size) for n in lens) + 1
    num_blocks = sum(-(-n // size) for n in lens) + 3
    caches = 3 * torch.randn(2, num_blocks, size, kv_heads, dim, generator=generator)
    ids = torch.randperm(num_blocks - 1, generator=generator) + 1  # block 0 belongs to somebody else
    table, written = torch.zeros(len(lens), width, dtype=torch.int32), torch.zeros(num_blocks, size, dtype=torch.bool)
    for row, n in enumerate(lens):
        count = -(-n // size)
        table[row, :count], ids = ids[:count], ids[count:]
        positions = torch.arange(n)
        written[table[row, positions // size].long(), positions % size] = True
    if stale == "nan":
        caches[:, ~written] = math.nan
    query = torch.randn(len(lens), heads, dim, generator=generator)
    scale = dim**-0.5 if scale is None else scale
    return Case(label, query, caches[0], caches[1], table, torch.tensor(lens, dtype=torch.int32), scale)


def _attention_truth(query, key_cache, value_cache, block_table, seq_lens, scale):
    """Request by request, key by key, in float64."""
    wide = (query.double(), key_cache.double(), value_cache.double())
    return reference.paged_attention_decode(*wide, block_table, seq_lens, scale).float()


# ---- 02.4 paged attention in torch -----------------------------------------------------------------------

attend = Exercise(
    "02.4",
    "Attention through a table",
    target="course_lib.attention.torch_paged:TorchPagedBackend._decode",
    stars=3,
    minutes=30,
    importance="core",
    hints=(
        "First bring each request's keys together: what shape has key_cache[block_table], and which two of its dimensions "
        "make the position?",
        "[B, M, BS, Hkv, D]: flatten M and BS, and dimension 1 counts positions 0, 1, 2, … Query heads that share a KV head "
        "lie next to each other, so give the query a dimension for the KV heads and one for the heads in each group.",
        "With the query as [B, Hkv, G, D], torch.einsum('bkgd,blkd->bkgl', …) gives the scores. Scale them, put -inf where "
        "torch.arange(L) >= seq_lens[:, None] (with two dimensions more), softmax over the last, and an einsum with the "
        "values; at the end [B, H, D] again.",
    ),
)


@attend.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield _paged_case(rng, "six tokens in blocks of four, one head", [6], 1, 1, 4, 4)
    yield _paged_case(rng, "two full blocks, one head", [8], 1, 1, 4, 4)
    yield _paged_case(rng, "three requests of different lengths, one head", [6, 1, 11], 1, 1, 4, 4)
    yield _paged_case(rng, "four query heads share two KV heads", [6], 4, 2, 8, 4)
    yield _paged_case(rng, "a model that scales by 1/10", [7], 2, 1, 8, 4, scale=0.1)
    yield _paged_case(rng, "SmolLM2's heads, ragged", [17, 5, 40, 16], 9, 3, 64, 16)
    lens = [rng.randint(1, 30) for _ in range(rng.randint(2, 5))]
    kv_heads = rng.randint(1, 3)
    yield _paged_case(rng, "a random batch", lens, kv_heads * rng.choice((2, 3)), kv_heads, 16, rng.choice((2, 8)))


attend.expected(_attention_truth)


def _attend(query, key_cache, value_cache, block_table, seq_lens, scale, *, table="table", shape="right", hide="right",
            heads="groups", scaled=True, dim=-1, shift=0):  # fmt: skip
    """The solution with its joints exposed."""
    batch, num_heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    ids = block_table.long()
    if table == "none":
        ids = torch.arange(ids.shape[1]).expand_as(ids) % len(key_cache)
    elif table == "first row":
        ids = ids[:1].expand_as(ids)
    gathered = [cache[ids] for cache in (key_cache, value_cache)]
    if shape == "reshaped":
        keys, values = (t.reshape(batch, kv_heads, -1, head_dim) for t in gathered)
    else:
        keys, values = (t.flatten(1, 2).transpose(1, 2) for t in gathered)
    group = num_heads // kv_heads
    if heads == "tiled":
        keys, values = keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1)
    else:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhld->bhl", query, keys) * {True: scale, False: 1, "own": head_dim**-0.5}[scaled]
    lens = seq_lens.max().expand_as(seq_lens) if hide == "longest" else seq_lens
    hidden = torch.arange(scores.shape[-1]) >= (lens.long() + shift)[:, None]
    if hide in ("right", "longest"):
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    elif hide in ("zero", "finite"):
        scores = scores.masked_fill(hidden[:, None], 0.0 if hide == "zero" else -1e9)
    weights = scores.softmax(dim)
    if hide == "after":
        weights = weights.masked_fill(hidden[:, None], 0.0)
    return torch.einsum("bhl,bhld->bhd", weights, values)


def _attention_mistakes(exercise: Exercise, base: Callable, mistakes: dict[str, tuple[str, dict]]) -> None:
    for name, (message, options) in mistakes.items():
        exercise.mistake(name, message)(functools.partial(base, **options))


_attention_mistakes(attend, _attend, {
    "no-table": (
        "You read blocks 0, 1, 2, … of the cache, which may be anybody's. Request b's i-th block is block_table[b, i].",
        {"table": "none"},
    ),
    "first-row": (
        "Every request reads the first request's blocks. Index the cache with the whole table, so that each row of it "
        "gathers its own.",
        {"table": "first row"},
    ),
    "no-mask": (
        "Slots behind the end of a sequence take part: the last block is rarely full, and tables are padded. What lies "
        "there is old and still has a score. Make scores -inf where position >= seq_lens.",
        {"hide": "never"},
    ),
    "masked-with-zero": (
        "You give hidden positions the score 0, and exp(0) is 1: they keep their share of the softmax. Use -inf.",
        {"hide": "zero"},
    ),
    "masked-too-late": (
        "You mask the weights after the softmax. The hidden positions have taken their share of the sum by then, so what "
        "is left no longer adds up to 1. Mask the scores, with -inf, before.",
        {"hide": "after"},
    ),
    "one-length-for-all": (
        "All requests are masked at the length of the longest. Compare positions with seq_lens[:, None], a column.",
        {"hide": "longest"},
    ),
    "shows-one-more": (
        "You let one position too many take part: position seq_len has not been written. Hide positions >= seq_lens.",
        {"shift": 1},
    ),
    "not-scaled": ("The scores are not multiplied by scale.", {"scaled": False}),
    "own-scale": (
        "You divide by the root of D. Most models do, not all: multiply by the argument scale.",
        {"scaled": "own"},
    ),
    "reshaped": (
        "You reshaped [blocks, slots, heads, D] straight into [heads, positions, D]. reshape keeps the order of the "
        "numbers, so positions and heads are mixed: flatten the blocks and slots first, then transpose.",
        {"shape": "reshaped"},
    ),
    "heads-tiled": (
        "Query head h reads KV head h % Hkv. Heads that share a KV head are neighbours: it is h // (H // Hkv), which "
        "repeat_interleave gives and repeat does not.",
        {"heads": "tiled"},
    ),
    "softmax-over-heads": (
        "Your softmax runs over the heads. The weights of one head over all positions must add up to 1: dim=-1.",
        {"dim": 1, "hide": "finite"},
    ),
})  # fmt: skip


@attend.symptom(
    "hides-the-newest",
    "You hide one position too many, the newest token itself. seq_lens counts it: positions 0 to seq_len - 1 are in.",
)
def _(failure):
    seen = failure.args[4] > 1  # of a single token nothing is left to compare
    theirs = _attend(*failure.args, shift=-1)
    return bool(seen.any()) and torch.allclose(failure.got[seen], theirs[seen], rtol=1e-4, atol=1e-5)


@attend.symptom(
    "nan",
    "The result is not a number: a softmax over nothing but -inf, or 0 times -inf. Do you hide too many positions, is the "
    "softmax taken over another dimension than the positions, or is a mask multiplied with -inf (masked_fill is safe)?",
)
def _(failure):
    return isinstance(failure.got, torch.Tensor) and bool(failure.got.isnan().any())


_ATTEND = """
B, H, D = q.shape
kv, values = K[table.long()].flatten(1, 2).transpose(1, 2), V[table.long()].flatten(1, 2).transpose(1, 2)
kv, values = kv.repeat_interleave(H // kv.shape[1], 1), values.repeat_interleave(H // kv.shape[1], 1)
scores = (kv @ q[..., None])[..., 0] * scale
mask = torch.arange(scores.shape[-1]) < seq_lens[:, None]
scores = scores.masked_fill(~mask[:, None], float("-inf"))
return (scores.softmax(-1)[:, :, None] @ values)[:, :, 0]"""
for _name, _old, _new in (
    ("hides-the-newest", "seq_lens[:, None]", "seq_lens[:, None] - 1"),
    ("shows-one-more", "<", "<="),
    ("nan", "softmax(-1)", "softmax(1)"),
    ("nan", 'scores.masked_fill(~mask[:, None], float("-inf"))', 'scores + ~mask[:, None] * float("-inf")'),
    ("own-scale", "* scale", "/ D ** 0.5"),
    ("softmax-over-heads", 'float("-inf"))\nreturn (scores.softmax(-1)', '-1e9)\nreturn (scores.softmax(1)'),
    ("first-row", "[table.long()]", "[table.long()[:1].expand(B, -1)]"),
    ("no-mask", "scores = scores.masked", "scores.masked"),
    ("heads-tiled", "repeat_interleave(H // kv.shape[1], 1)", "repeat(1, H // kv.shape[1], 1, 1)"),
    ("reshaped", ".flatten(1, 2).transpose(1, 2)", ".reshape(B, K.shape[2], -1, D)"),
):
    assert _old in _ATTEND
    attend.wrong(_name)(_written(_ATTEND.replace(_old, _new), "q, K, V, table, seq_lens, scale"))
attend.accepts(_written(_ATTEND, "q, K, V, table, seq_lens, scale"))


@attend.wrong("hides-the-newest")
def _(query, key_cache, value_cache, block_table, seq_lens, scale):
    """Request by request; one without tokens gives zeros."""
    out = torch.zeros_like(query)
    for b, n in enumerate((seq_lens - 1).tolist()):
        keys, values = (cache[block_table[b].long()].flatten(0, 1)[:n] for cache in (key_cache, value_cache))
        for h in range(query.shape[1]):
            g = h // (query.shape[1] // key_cache.shape[2])
            out[b, h] = (keys[:, g] @ query[b, h] * scale).softmax(0) @ values[:, g]
    return out


@attend.wrong("nan")
def _(query, key_cache, value_cache, block_table, seq_lens, scale):
    keys, values = (cache[block_table.long()].flatten(1, 2).transpose(1, 2) for cache in (key_cache, value_cache))
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("bhd,bhld->bhl", query, keys.repeat_interleave(group, 1)) * scale
    scores = scores.masked_fill((torch.arange(scores.shape[-1]) >= 0)[None, None], -math.inf)
    return torch.einsum("bhl,bhld->bhd", scores.softmax(-1), values.repeat_interleave(group, 1))


@attend.accepts
def _(query, key_cache, value_cache, block_table, seq_lens, scale):
    """A loop over requests and heads that takes each key where it lies."""
    out, size, group = torch.zeros_like(query), key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    for b, n in enumerate(seq_lens.tolist()):
        positions = torch.arange(n)
        place = block_table[b, positions // size].long(), positions % size
        for h in range(query.shape[1]):
            keys, values = key_cache[place][:, h // group], value_cache[place][:, h // group]
            out[b, h] = (keys @ query[b, h] * scale).softmax(0) @ values
    return out


@attend.accepts
def _(query, key_cache, value_cache, block_table, seq_lens, scale):
    """Slots instead of blocks, and torch's own attention."""
    size, width = key_cache.shape[1], block_table.shape[1]
    place = (block_table.long()[:, :, None] * size + torch.arange(size)).flatten(1)
    keys, values = (cache.flatten(0, 1)[place].transpose(1, 2) for cache in (key_cache, value_cache))
    seen = (torch.arange(width * size) < seq_lens[:, None])[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )[:, :, 0]


@attend.adapt
def _(answer, original):
    def _decode(self, query, kv_cache, group, scale, sliding_window):
        if sliding_window is not None:
            return original(self, query, kv_cache, group, scale, sliding_window)
        width = -(-int(group.seq_lens.max()) // self.block_size)
        return answer(query, *kv_cache, group.block_table[:, :width], group.seq_lens, scale)

    return _decode


@attend.look
def _(answer):
    from course_lib import SamplingParams
    from course_lib.teaching.learner.patching import patched

    llm = _small_llm()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = ["The capital of France is Paris", "One two three four five six seven eight nine ten"]
    theirs = _fresh_tokens(llm, prompts, params)
    with patched(attend, answer):
        yours = _fresh_tokens(llm, prompts, params)
    same = sum(map(int.__eq__, sum(yours, []), sum(theirs, [])))
    print(f"In all 30 layers of the course model: {same} of 12 tokens are the same.")


# ---- 02.5 the same as a kernel -------------------------------------------------------------------------------

kernel = Exercise(
    "02.5",
    "A kernel that reads block by block",
    target="kernels.triton.paged_decode:paged_attention_decode",
    stars=4,
    minutes=40,
    importance="useful",
    hints=(
        "One turn of the loop is one block: load its keys, score them, and merge them into best, total and acc. Begin "
        "with the loads: key_cache + rows[:, None] * D + dims[None, :] is a BS × D tile of addresses.",
        "The scores are tl.sum(k * q[None, :], axis=1) * scale, and -inf where not inside (tl.where). Then the new best, "
        "and the factor by which all that came before shrinks, acc and total alike.",
        "Both loads have mask=inside[:, None], other=0.0. new_best = tl.maximum(best, tl.max(scores, axis=0)); the factor is "
        "tl.exp(best - new_best), this block's weights are tl.exp(scores - new_best); acc and total each become what they "
        "were, times the factor, plus a tl.sum; at the end of the turn, best = new_best.",
    ),
    needs=("triton", 'Triton has packages for Linux only. Read the solution: solution("02.5", anyway=True).'),
)


def _no_triton() -> str | None:
    """Why Triton kernels cannot run here although there is Triton."""
    if not torch.cuda.is_available():
        try:
            import kernels.triton  # noqa: F401
        except ImportError as error:  # an interpreter that does not fit this NumPy
            return str(error)
    return None


@kernel.cases
def _(rng: random.Random) -> Iterator[Case]:
    if reason := _no_triton():
        raise CourseError(
            f"02.5 · not checked here\n{reason}\nNothing else in the course depends on this exercise. Compare yours with "
            'solution("02.5", anyway=True), or check it on another machine.'
        )
    # Few different shapes: on a GPU each is compiled on its own.
    yield _paged_case(rng, "six tokens in blocks of four, one head", [6], 1, 1, 8, 4)
    yield _paged_case(rng, "eight tokens: the last block is full", [8], 1, 1, 8, 4)
    yield _paged_case(rng, "one block, scores of several hundred: exp() of them is infinite", [4], 1, 1, 8, 4, scale=80.0)
    yield _paged_case(rng, "scores of several hundred, in two blocks", [5, 7, 6, 5], 1, 1, 8, 4, scale=80.0)
    yield _paged_case(rng, "ragged, four query heads on two KV heads", [rng.randint(9, 12), 1, rng.randint(3, 7)], 4, 2, 8, 4)
    yield _paged_case(rng, "slots that nobody has written hold NaN", [5, 2], 1, 1, 8, 4, stale="nan")
    yield Case("Triton's compiler reads the kernel, for a GPU that need not be there")


@kernel.expected
def _(query=None, key_cache=None, value_cache=None, block_table=None, seq_lens=None, scale=None):
    if query is None:
        return "compiles"
    return _attention_truth(query, key_cache, value_cache, block_table, seq_lens, scale)


@kernel.run
def _(answer, query=None, key_cache=None, value_cache=None, block_table=None, seq_lens=None, scale=None):
    if query is None:
        file = getattr(getattr(answer, "__code__", None), "co_filename", "")
        return _compiled(getattr(answer, "cell", "".join(linecache.getlines(file))))
    device = "cuda" if torch.cuda.is_available() and not _interpreted() else "cpu"
    tensors = (query, key_cache, value_cache, block_table, seq_lens)
    out = answer(*(tensor.to(device) for tensor in tensors), scale)
    return out.cpu() if isinstance(out, torch.Tensor) else out


def _interpreted() -> bool:
    from kernels.triton.launch import INTERPRETED

    return INTERPRETED


@functools.cache
def _compiled(cell: str) -> str | list[str]:
    """"compiles", or the line of the kernel that Triton's compiler refuses, and why. The interpreter runs some
    Python that no compiler takes. A process of its own, since Triton is either interpreter or compiler in one process;
    it takes a third of a second on a machine that does nothing else. What cannot be found out that way is taken to compile."""
    if "def paged_decode_kernel" not in cell:
        return "compiles"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="course-kernel-") as folder:
        Path(folder, "cell.py").write_text(_CELL_HEAD + cell, encoding="utf-8")
        Path(folder, "ask.py").write_text(_ASK_COMPILER, encoding="utf-8")
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "ask.py"], cwd=folder, env=environment, capture_output=True, timeout=20, check=False)
        if Path(folder, "refused").exists():
            line, reason = Path(folder, "refused").read_text(encoding="utf-8").split("\n", 1)
            return [line[:78], *textwrap.wrap(reason, 78)[:3]]
    return "compiles"


_CELL_HEAD = """import triton
import triton.language as tl


def exercise(*_, **__):
    return lambda answer: answer


"""
_ASK_COMPILER = r'''
import builtins
import pathlib
import re

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.compiler.errors import CompilationError

import cell

names = "query key_cache value_cache block_table seq_lens out scale width H HKV D BS".split()
types = ["*fp32"] * 3 + ["*i32"] * 2 + ["*fp32", "fp32", "i32"] + ["constexpr"] * 4
source = ASTSource(cell.paged_decode_kernel, dict(zip(names, types)), {"H": 4, "HKV": 2, "D": 8, "BS": 4})
target = GPUTarget("cuda", 80, 32)
backend, context = make_backend(target), ir.context()
options = backend.parse_options({})
ir.load_dialects(context)
backend.load_dialects(context)
try:
    codegen = backend.get_codegen_implementation(options)
    source.make_ir(target, options, codegen, backend.get_module_map(), context)
except CompilationError as error:
    while isinstance(error.__cause__, CompilationError):
        error = error.__cause__
    reason = re.sub(r"""^\w+\(['"](.*)['"]\)$""", r"\1", str(error.__cause__ or error.error_message or ""))
    unknown = re.match(r"(\w+) is not defined", reason)
    if not unknown or hasattr(builtins, unknown[1]):  # otherwise another cell of the notebook may define it
        line = error.src.splitlines()[error.node.lineno - 1].strip() if error.src else ""
        pathlib.Path("refused").write_text(line + "\n" + reason, encoding="utf-8")
'''


@kernel.same
def _(got, expected, case):
    """A GPU may multiply in TF32, with 10 bits of mantissa."""
    if isinstance(expected, str):
        return got == expected
    return got.shape == expected.shape and got.dtype == expected.dtype and bool(
        torch.isclose(got, expected, rtol=2e-3, atol=2e-3).all()
    )


@kernel.symptom(
    "not-interpreted",
    "Triton wants to compile for a GPU and finds none: it was imported before TRITON_INTERPRET=1 was set. Restart the "
    "kernel and run the cells from the top.",
)
def _(failure):
    return failure.error is not None and "active driver" in str(failure.error)


def _block_by_block(query, key_cache, value_cache, block_table, seq_lens, scale, *, mask="right", shrink="both",
                    subtract=True, per_block=False, accumulate=True, scaled=True, best="running", totals=True, swap=False):  # fmt: skip
    """What a kernel does, in torch on the CPU, with its joints exposed."""
    query, key_cache, value_cache = query.cpu(), key_cache.cpu(), (key_cache if swap else value_cache).cpu()
    size, kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // kv_heads
    out = torch.empty_like(query)
    for request, seq_len in enumerate(seq_lens.tolist()):
        for head in range(query.shape[1]):
            top, total, acc, turns = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(query.shape[2]), 0
            for first in range(0, seq_len, size):
                block = int(block_table[request, first // size])
                inside = first + torch.arange(size) < seq_len
                keys, values = key_cache[block, :, head // group], value_cache[block, :, head // group]
                if mask in ("right", "loads"):
                    keys, values = (torch.where(inside[:, None], t, 0.0) for t in (keys, values))
                scores = (keys * query[request, head]).sum(-1) * {True: scale, False: 1, "own": query.shape[2] ** -0.5}[scaled]
                if mask in ("right", "scores"):
                    scores = torch.where(inside, scores, -math.inf)
                new = torch.maximum(top, scores.max()) if best == "running" else scores.max()  # "block", "falling"
                new = new if subtract else torch.tensor(0.0)
                weights = (scores - new).exp()
                factor = (top - new).exp() if subtract and turns else torch.tensor(float(bool(turns)))
                if shrink == "inverted":
                    factor = (new - top).exp()
                if per_block:
                    weights, factor = weights / weights.sum(), torch.tensor(1.0)
                if not accumulate:
                    factor = torch.tensor(0.0)
                acc = acc * (factor if shrink in ("both", "acc", "inverted") else 1) + (weights[:, None] * values).sum(0)
                total = total * (factor if shrink in ("both", "total", "inverted") else 1) + (weights.sum() if totals else 0)
                top, turns = new, turns + 1
            out[request, head] = acc / total
    return out


_attention_mistakes(kernel, _block_by_block, {
    "nothing-shrinks": (
        "What came from earlier blocks was weighed against an older maximum. When the maximum grows, multiply both acc and "
        "total by tl.exp(best - new_best), with the old best: compute it before you overwrite best.",
        {"shrink": "none"},
    ),
    "acc-does-not-shrink": (
        "total is rescaled when the maximum grows, and acc is not: multiply acc by tl.exp(best - new_best) as well.",
        {"shrink": "total"},
    ),
    "total-does-not-shrink": (
        "acc is rescaled when the maximum grows, and total is not: multiply total by tl.exp(best - new_best) as well.",
        {"shrink": "acc"},
    ),
    "every-block-its-maximum": (
        "Each block is weighed against its own maximum, and nothing relates the blocks to one another. Keep one maximum for "
        "all so far, tl.maximum(best, …), and rescale acc and total when it grows.",
        {"best": "block", "shrink": "none"},
    ),
    "best-not-kept": (
        "best is never set to new_best, so that tl.exp(best - new_best) is 0 in every turn and only the last block is left.",
        {"best": "block", "accumulate": False},
    ),
    "a-softmax-per-block": (
        "You finish a softmax in every block, so that each block counts the same. The weights are divided by one sum over "
        "all blocks, at the very end.",
        {"per_block": True},
    ),
    "last-block-only": (
        "Only the last block is left: you assign to acc and total. Add to what the blocks before have left there.",
        {"accumulate": False},
    ),
    "no-mask": (
        "The empty slots of the last block take part. inside says which slots hold a token: mask the loads with it, and "
        "set the scores of the others to -inf.",
        {"mask": "never"},
    ),
    "mask-on-loads-only": (
        "Masked loads give keys of 0 and so scores of 0, and exp(0 - best) still weighs something. Set the scores to -inf "
        "where not inside.",
        {"mask": "loads"},
    ),
    "not-scaled": ("The scores are not multiplied by scale.", {"scaled": False}),
    "own-scale": (
        "You divide by the root of D. Most models do, not all: multiply by the argument scale.",
        {"scaled": "own"},
    ),
    "keys-as-values": ("v is loaded from key_cache. The values are in value_cache, at the same places.", {"swap": True}),
})  # fmt: skip


@kernel.symptom(
    "unwritten-slot",
    "NaN: a slot that nobody has written may hold anything, and 0 times NaN is NaN. A weight of 0 does not help, the load "
    "of k and of v must be masked: mask=inside[:, None], other=0.0.",
)
def _(failure):
    return "NaN" in failure.case.label and bool(failure.got.isnan().any())


@kernel.symptom(
    "overflow",
    "exp() of a score of several hundred is infinite, and infinity divided by infinity is not a number. Subtract the "
    "largest score so far, best, before every exp.",
)
def _(failure):
    return failure.case.label.startswith("one block") and not bool(failure.got.isfinite().all())


@kernel.symptom(
    "best-falls",
    "Your best can become smaller from one block to the next, and then what you call shrinking makes the past infinite. It "
    "is the largest score of all so far: tl.maximum(best, …).",
)
def _(failure):
    return "in two blocks" in failure.case.label and bool(failure.got.isnan().any())


@kernel.symptom(
    "positive-exponent",
    "Not a number, already here: best starts at -inf, and something like exp(inf) came of it. The past shrinks by "
    "tl.exp(best - new_best), this block weighs tl.exp(scores - new_best). Neither exponent is ever above 0: is one of them "
    "the other way round, or taken with the old best?",
)
def _(failure):
    return "six tokens" in failure.case.label and bool(failure.got.isnan().all())


@kernel.symptom(
    "no-total",
    "The result is infinite. At the end acc is divided by total, which is still 0: does every turn add its weights to it?",
)
def _(failure):
    return "six tokens" in failure.case.label and bool(failure.got.isinf().all())


@kernel.symptom(
    "does-not-compile",
    "The numbers are right, but only the interpreter runs this, which takes any Python. Triton's compiler refuses a line of "
    "the kernel: no continue, break or list in a loop, and a variable keeps its type from turn to turn.",
)
def _(failure):
    return failure.expected == "compiles"


@kernel.symptom("zeros", "Nothing is accumulated: does the loop assign to acc and total, the names that the last line uses?")
def _(failure):
    return bool((failure.got == 0).all())


_KERNEL = """import triton
import triton.language as tl
@triton.jit
def paged_decode_kernel(query, key_cache, value_cache, block_table, seq_lens, out, scale, width,
                        H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BS: tl.constexpr):
    request, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (H // HKV)
    seq_len = tl.load(seq_lens + request)
    offsets, dims = tl.arange(0, BS), tl.arange(0, D)
    q = tl.load(query + (request * H + head) * D + dims)
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([D], dtype=tl.float32)
    for first in range(0, seq_len, BS):
        block = tl.load(block_table + request * width + first // BS).to(tl.int64)
        rows = (block * BS + offsets) * HKV + kv_head
        inside = first + offsets < seq_len
        at = rows[:, None] * D + dims[None, :]
        k = tl.load(key_cache + at, mask=inside[:, None], other=0.0)
        v = tl.load(value_cache + at, mask=inside[:, None], other=0.0)
        s = tl.sum(k * q[None, :], axis=1) * scale
        s = tl.where(inside, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, axis=0))
        shrink = tl.exp(best - new)
        w = tl.exp(s - new)
        acc = acc * shrink + tl.sum(w[:, None] * v, axis=0)
        total = total * shrink + tl.sum(w, axis=0)
        best = new
    tl.store(out + (request * H + head) * D + dims, acc / total)
def launch(query, key_cache, value_cache, block_table, seq_lens, scale):
    out = torch.empty_like(query)
    (batch, H, D), (_, BS, HKV, _) = query.shape, key_cache.shape
    paged_decode_kernel[batch, H](query, key_cache, value_cache, block_table, seq_lens, out,
                                  scale, block_table.shape[1], H, HKV, D, BS)
    return out
"""


def _changed_kernel(*changes: str) -> str:
    text = _KERNEL
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    return text


def _kernel_with(*changes: str):
    """A kernel as learners write it, with some texts replaced by others; made when it is first called."""
    text = _changed_kernel(*changes)

    @functools.cache
    def launch():
        name = f"<kernel {abs(hash(text))}>"
        linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name  # where Triton reads a kernel
        space = {"torch": torch, "__name__": "kernel"}
        exec(compile(text, name, "exec"), space)
        return space["launch"]

    def answer(*args):
        return launch()(*args)

    answer.cell = text
    return answer


# Kernels proper need the interpreter: tests/lessons/test_lesson_02.py starts one.
_WITH_INTERPRETER = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
for _name, *_changes in (
    ("positive-exponent", "shrink = tl.exp(best - new)", "shrink = tl.exp(new - best)"),
    ("positive-exponent", "w = tl.exp(s - new)", "w = tl.exp(s - best)"),
    ("nothing-shrinks", "        shrink = tl.exp(best - new)", "        best = new\n        shrink = tl.exp(best - new)"),
    ("best-falls", "tl.maximum(best, tl.max(s, axis=0))", "tl.max(s, axis=0)"),
    ("every-block-its-maximum", "tl.maximum(best, tl.max(s, axis=0))", "tl.max(s, axis=0)",
     "acc * shrink", "acc", "total * shrink", "total"),
    ("best-not-kept", "        best = new\n", ""),
    ("overflow", "tl.exp(best - new)", "1.0", "tl.exp(s - new)", "tl.exp(s)"),
    ("no-total", "        total = total * shrink + tl.sum(w, axis=0)\n", ""),
    ("total-does-not-shrink", "total * shrink", "total"),
    ("acc-does-not-shrink", "acc * shrink", "acc"),
    ("last-block-only", "acc * shrink + ", "", "total * shrink + ", ""),
    ("mask-on-loads-only", '        s = tl.where(inside, s, float("-inf"))\n', ""),
    ("not-scaled", " * scale", ""),
    ("own-scale", " * scale", " / D ** 0.5"),
    ("zeros", "        acc = acc * shrink + tl.sum(w[:, None] * v, axis=0)\n", ""),
    ("unwritten-slot", "value_cache + at, mask=inside[:, None], other=0.0", "value_cache + at"),
    ("does-not-compile", "        best = new", "        if tl.sum(w, axis=0) == 0.0:\n            continue\n        best = new"),
    ("does-not-compile", "    total = 0.0", "    total = 0"),
    ("does-not-compile", "acc * shrink + tl.sum(w[:, None] * v, axis=0)", "sum([acc * shrink, tl.sum(w[:, None] * v, axis=0)])"),
):  # fmt: skip
    if _WITH_INTERPRETER:
        kernel.wrong(_name)(_kernel_with(*_changes))
if _WITH_INTERPRETER:
    kernel.accepts(_kernel_with())
    kernel.accepts(_kernel_with("new = tl.maximum(best, tl.max(s, axis=0))", "new = tl.max(tl.where(s > best, s, best), 0)"))


@kernel.wrong("does-not-compile")
def _compiler_refuses(*args):
    return _block_by_block(*args)


_compiler_refuses.cell = _changed_kernel("        best = new", "        if tl.sum(w, axis=0) == 0.0:\n            continue\n"
                                         "        best = new")  # fmt: skip


@kernel.wrong("not-interpreted")
def _(*args):
    raise RuntimeError("0 active drivers ([]). There should only be one.")


kernel.wrong("no-total")(functools.partial(_block_by_block, totals=False))
kernel.wrong("positive-exponent")(functools.partial(_block_by_block, shrink="inverted"))
kernel.wrong("best-falls")(functools.partial(_block_by_block, best="falling"))
kernel.wrong("overflow")(functools.partial(_block_by_block, subtract=False))
kernel.wrong("unwritten-slot")(functools.partial(_block_by_block, mask="scores"))
kernel.wrong("zeros")(lambda query, *rest: torch.zeros_like(query))
kernel.accepts(functools.partial(_block_by_block))


@kernel.adapt
def _(answer, original):
    @functools.wraps(original)
    def paged_attention_decode(query, k_cache, v_cache, block_table, seq_lens, scale, **options):
        """Windows, other layouts and head sizes that are no power of two stay with the engine's kernel."""
        window, out = options.get("sliding_window"), options.get("out")
        plain = k_cache.is_contiguous() and v_cache.is_contiguous() and query.shape[2].bit_count() == 1
        if window is not None or not plain:
            return original(query, k_cache, v_cache, block_table, seq_lens, scale, **options)
        result = answer(query.contiguous(), k_cache, v_cache, block_table.contiguous(), seq_lens, scale)
        return result if out is None else out.copy_(result)

    return paged_attention_decode


@kernel.look
def _(answer):
    from course_lib.teaching.learner.patching import patched

    prompts = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]
    engine = _tiny_engine("triton")
    theirs = _tiny_tokens(engine, prompts, 4)
    with patched(kernel, answer):
        yours = _tiny_tokens(engine, prompts, 4)
    same = sum(map(int.__eq__, sum(yours, []), sum(theirs, [])))
    print('In a small engine with attention_backend="triton":')
    print(f"{same} of 8 tokens are those that the engine's own kernel gives.")
