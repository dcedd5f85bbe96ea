"""Lesson 07, automatic prefix caching: what its exercises ask, how answers are judged, which mistakes people make."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from hashlib import sha256

from course_lib.core.block_pool import BlockPool, KVBlock
from course_lib.teaching.checking.comparing import difference
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

# ---- questions ----------------------------------------------------------------------------------

a_quarter_less = Question(
    "07.a",
    "Four readers with a page each ask in turn, two rounds. In a cache of 48 blocks the second round finds every page. In a "
    "cache of 36, a quarter less, what will it find?",
    [
        Choice("all four pages", "A page and its question take twelve blocks: 36 hold three prompts."),
        Choice(
            "three of the four pages",
            "Three do fit at any time, but never the one that is asked for next: that was thrown away last.",
        ),
        Choice(
            "none of them",
            "What has not been used for the longest time is thrown away first. When everybody asks in turn, that is the very "
            "page that comes next, every time.",
            right=True,
        ),
    ],
)

beginning_first = Question(
    "07.b",
    "24 questions about the four pages in random order, in 20 blocks, which hold not quite two pages. The engine has a request "
    "give back its last block first. Let it give back its first block first: what happens to the share of tokens found?",
    [
        Choice(
            "It stays the same: as many blocks are kept as before.",
            "As many are kept, but a part of them can never be found again: their beginning is gone.",
        ),
        Choice(
            "It rises: the end of a prompt is the newest.",
            "The newest end is somebody's question, which nobody will ask again.",
        ),
        Choice(
            "It falls.",
            "A page that lost its first block is lost as a whole. One that lost its last five is still found up to there.",
            right=True,
        ),
    ],
)

which_tool = Question(
    "07.c",
    "Two bugs. One gives blocks back in the wrong order. The other takes new blocks before it takes the ones it found. "
    "Which does check_invariants() find?",
    [
        Choice("both", "Any order of the queue is a legal order. Only its hit rate is worse."),
        Choice("the wrong order", "No count and no table is wrong then: blocks are forgotten that could have been of use."),
        Choice(
            "the early taking",
            "A block that was found is handed out as new: the block table holds it twice, and its content is no longer what "
            "its name says.",
            right=True,
        ),
        Choice("neither", "The second leaves a block table with a block that has the name of other content."),
    ],
)

# ---- 07.1 names -----------------------------------------------------------------------------------

chain = Exercise(
    "07.1",
    "A name for a block and all before it",
    target="course_lib.core.prefix_hash:extend_block_hashes",
    stars=1,
    minutes=12,
    importance="core",
    hints=(
        "How many blocks of `tokens` are full, and how many of them have a name already? Only those in between are new.",
        "Block i has tokens[i * block_size : (i + 1) * block_size]. Its parent is the name in front of it in `hashes`; for "
        "block 0 there is none in front, and the parent is root.",
        "for i in range(len(hashes), len(tokens) // block_size): parent = hashes[-1] if hashes else root; then append "
        "name(parent, the tokens of block i).",
    ),
)


def toy_name(parent, tokens):
    """A name that can be read: the parent, and behind it the tokens."""
    return f"{parent}/{'.'.join(map(str, tokens))}"


def _named(tokens, size, root="R", name=toy_name):
    names, parent = [], root
    for i in range(len(tokens) // size):
        parent = name(parent, tokens[i * size : (i + 1) * size])
        names.append(parent)
    return names


@chain.cases
def _(rng: random.Random) -> Iterator[Case]:
    def case(label, named, tokens, size, root="R"):
        return Case(label, named, tokens, size, root, toy_name, may_change=("hashes",))

    yield case("six tokens, blocks of two, nothing named yet", [], [4, 7, 1, 1, 8, 3], 2)
    yield case("seven tokens, blocks of four: the second block is not full", [], [4, 7, 1, 1, 8, 3, 5], 4)
    yield case("three tokens, blocks of four: nothing to name", [], [4, 7, 1], 4)
    yield case("one block is named, one has become full", ["R/4.7"], [4, 7, 1, 1], 2)
    yield case("nothing new is full", ["R/4.7"], [4, 7, 1], 2)
    yield case("equal tokens in two blocks", [], [5, 5, 5, 5], 2, "another root")
    for _ in range(4):
        size = rng.choice((1, 2, 4))
        tokens = [rng.randint(0, 9) for _ in range(rng.randint(size, 5 * size))]
        known = rng.randint(0, len(tokens) // size)
        yield case("a text that has grown", _named(tokens, size)[:known], tokens, size)


@chain.run
def _(answer, hashes, tokens, block_size, root, name):
    before = list(hashes)
    result = answer(hashes, tokens, block_size, root, name)
    if result is not None and hashes == before != _named(tokens, block_size, root):
        return {"returned": result, "hashes": hashes}
    return hashes  # the engine ignores the result


@chain.expected
def _(hashes, tokens, block_size, root, name):
    """Written from the definition: a name per full block, over everything before."""
    return [
        "/".join([root, *(".".join(map(str, tokens[b : b + block_size])) for b in range(0, end, block_size))])
        for end in range(block_size, len(tokens) + 1, block_size)
    ]


@chain.symptom(
    "returns",
    "Append the names to the list `hashes` itself and return nothing: it is the request's own list, and the engine calls "
    "you again whenever the text has grown.",
)
def _(failure):
    return isinstance(failure.got, dict)


@chain.symptom(
    "rebinds",
    "`hashes` is unchanged. `hashes = …` and `hashes = hashes + …` make a new list that nobody else sees: use "
    "hashes.append(…).",
)
def _(failure):
    return failure.got == failure.args[0] and failure.got != failure.expected


@chain.symptom(
    "own-hash",
    "Your names are not those that `name` makes. Use the function you are given, name(parent, tokens): the engine puts in "
    "SHA-256, the salt and whatever else counts.",
)
def _(failure):
    got = failure.got
    return bool(got) and not any(isinstance(one, str) for one in got[len(failure.args[0]) :])


@chain.symptom(
    "nothing-in-front",
    "Block 0 has no name in front of it, so there is nothing to look up: its parent is root.",
)
def _(failure):
    return isinstance(failure.error, IndexError) and not failure.args[0]


def _make_chain(*, start="known", parent="last", full="whole", tokens_of="block", step=None):
    """The solution with its joints exposed."""

    def extend(hashes, tokens, size, root, name):
        known = len(hashes) if start == "known" else 0
        count = {"whole": len(tokens) // size, "ceil": -(-len(tokens) // size), "less": (len(tokens) - 1) // size}[full]
        before = hashes[-1] if hashes else root
        for i in range(known, count):
            own = {
                "block": tokens[i * size : (i + 1) * size],
                "all": tokens[: (i + 1) * size],
                "shifted": tokens[(i - known) * size : (i - known + 1) * size],
                "slide": tokens[i : i + size],
            }[tokens_of]
            front = hashes[-1] if hashes else root
            fronts = {"last": front, "root": root, "first": before, "fresh": root if i == known else front,
                      "block 0": hashes[0] if hashes else root}  # fmt: skip
            hashes.append(name(fronts[parent], own))

    return extend


chain.mistake(
    "no-parent",
    "Every block is named by its own tokens alone. Two prompts with the same third block and other words before it would "
    "then share keys and values that depend on those words: the parent of a block is the name in front of it.",
)(_make_chain(parent="root"))
chain.mistake(
    "one-parent",
    "All new blocks get the same parent, the name that was last when you began. The parent of a block is the name right in "
    "front of it, which may be one you have appended a moment ago.",
)(_make_chain(parent="first"))
chain.mistake(
    "parent-is-block-0",
    "The parent of every block is the name of block 0, hashes[0]. It must be the name right in front of the block, which "
    "stands for everything before: hashes[-1].",
)(_make_chain(parent="block 0"))
chain.mistake(
    "starts-over",
    "When some blocks have names already, your next one begins at root again. Its parent is the last name in `hashes`.",
)(_make_chain(parent="fresh"))
chain.mistake(
    "names-twice",
    "Blocks that have names get them once more. `hashes` has one name per block: begin at block len(hashes).",
)(_make_chain(start="zero"))
chain.mistake(
    "unfinished-block",
    "You name a block that is not full. Its next token will change its content, so only full blocks have names: there are "
    "len(tokens) // block_size of them.",
)(_make_chain(full="ceil"))
chain.mistake(
    "one-too-few",
    "You leave out a block that has become full with the last token.",
)(_make_chain(full="less"))
chain.mistake(
    "hashes-everything",
    "You give `name` all tokens up to the end of the block. What comes before the block is in the parent's name already; "
    "reading it again makes naming a long text quadratic.",
)(_make_chain(tokens_of="all"))


@chain.mistake(
    "everything-no-parent",
    "You name each block by all tokens from the beginning. That tells prefixes apart, but the 500th block then reads 8,000 "
    "tokens: give `name` the parent's name and the block's own tokens.",
)
def _(hashes, tokens, size, root, name):
    for i in range(len(hashes), len(tokens) // size):
        hashes.append(name(root, tokens[: (i + 1) * size]))


chain.mistake(
    "begins-at-the-front",
    "For the first new block you take the tokens of block 0. Block i has tokens[i * block_size : (i + 1) * block_size], "
    "also when i begins at len(hashes).",
)(_make_chain(tokens_of="shifted"))
chain.mistake(
    "slides",
    "Your blocks overlap: each begins one token after the one before. Block i begins at i * block_size.",
)(_make_chain(tokens_of="slide"))


@chain.mistake(
    "one-block-only",
    "You name one block per call. Several may have become full since the last one, as in a new prompt.",
)
def _(hashes, tokens, size, root, name):
    begin = len(hashes) * size
    if begin + size <= len(tokens):
        hashes.append(name(hashes[-1] if hashes else root, tokens[begin : begin + size]))


@chain.wrong("own-hash")
def _(hashes, tokens, size, root, name):
    for i in range(len(hashes), len(tokens) // size):
        hashes.append(sha256(repr(tokens[i * size : (i + 1) * size]).encode()).digest())


@chain.wrong("nothing-in-front")
def _(hashes, tokens, size, root, name):
    for i in range(len(hashes), len(tokens) // size):
        hashes.append(name(hashes[i - 1], tokens[i * size : (i + 1) * size]))


@chain.wrong("returns")
def _(hashes, tokens, size, root, name):
    return _named(tokens, size, root, name)


@chain.wrong("rebinds")
def _(hashes, tokens, size, root, name):
    hashes = _named(tokens, size, root, name)  # noqa: F841


@chain.budget(
    "All names are right, but you make those again that were there. A text grows by one token per step: one new block, "
    "one call of `name`.",
    most=40,
    unit="calls of name while a text grows to 640 tokens, blocks of 16",
)
def _(answer):
    calls = itertools.count()

    def name(parent, tokens):
        next(calls)
        return toy_name(parent, tokens)[-8:]

    hashes, tokens = [], list(range(10, 650))
    for length in range(1, len(tokens) + 1):
        answer(hashes, tokens[:length], 16, "R", name)
    return next(calls)


@chain.wasteful
def _(hashes, tokens, size, root, name):
    hashes[:] = _named(tokens, size, root, name)


chain.accepts(_make_chain())


@chain.accepts
def _(hashes, tokens, size, root, name):
    """In place, and returned as well."""
    _make_chain()(hashes, tokens, size, root, name)
    return hashes


@chain.accepts
def _(hashes, tokens, size, root, name):
    """A while loop, and extend at the end."""
    new, parent, begin = [], (hashes or [root])[-1], len(hashes) * size
    while begin + size <= len(tokens):
        parent = name(parent, tuple(tokens[begin : begin + size]))
        new.append(parent)
        begin += size
    hashes.extend(new)


@chain.accepts
def _(hashes, tokens, size, root, name):
    """accumulate carries the parent along."""
    begins = range(len(hashes) * size, len(tokens) - size + 1, size)
    blocks = [tokens[begin : begin + size] for begin in begins]
    hashes += list(itertools.accumulate(blocks, name, initial=hashes[-1] if hashes else root))[1:]


@chain.adapt
def _(answer, original):
    from course_lib.core.prefix_hash import ROOT, block_extra_keys, hash_block

    def extend_block_hashes(request, block_size):
        places = itertools.count(len(request.block_hashes))  # asked for in order: each name needs the one before

        def name(parent, tokens):
            return hash_block(parent, list(tokens), block_extra_keys(request, next(places), block_size))

        answer(request.block_hashes, request.token_ids, block_size, ROOT, name)

    return extend_block_hashes


@chain.look
def _(answer):
    from course_lib.teaching.recording.replay import replay
    from course_lib.teaching.learner.patching import patched

    page = list(range(1000, 1100))
    prompts = [page + [1], page + [2], page[:40] + [3] + page[41:]]
    with patched(chain, answer):
        found = replay(prompts, 40).found_tokens
    print("In the engine's cache, blocks of 16: a page of 100 tokens, the page with another last token, and the page")
    print(f"with another token 40 find {found[0]}, {found[1]} and {found[2]} tokens.")


# ---- 07.2 the queue -----------------------------------------------------------------------------------

queue = Exercise(
    "07.2",
    "A queue that can be left in the middle",
    target="course_lib.core.block_pool:FreeBlockQueue",
    stars=2,
    minutes=18,
    importance="core",
    hints=(
        "Draw three boxes in a row, with an arrow to the right and one to the left between neighbours. Which arrows change "
        "when the middle box goes, and which when a box comes in before the last?",
        "remove: the block's two neighbours must point at each other, and the block at nobody. append: the newcomer stands "
        "between self.tail.prev and self.tail, so four arrows are set. Because of the two ends, every block has neighbours.",
        "append: last = self.tail.prev; block.prev, block.next = last, self.tail; last.next = self.tail.prev = block. remove: "
        "block.prev.next, block.next.prev = block.next, block.prev; then block.prev = block.next = None. popleft: remove "
        "self.head.next and return it. And count in append and remove.",
    ),
)


@queue.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("three blocks, none leaves", 3, [])
    yield Case("one leaves in the middle", 3, [("remove", 1)])  # what is wrong in remove shows before popleft
    yield Case("the first is removed", 3, [("remove", 0)])
    yield Case("the last one leaves", 3, [("remove", 2)])
    yield Case("the first leaves", 3, [("popleft", None)])
    yield Case("one leaves and comes back", 3, [("remove", 1), ("append", 1)])
    yield Case("the only block leaves and comes back", 1, [("popleft", None), ("append", 0), ("remove", 0), ("append", 0)])
    for _ in range(3):
        size = rng.randint(4, 7)
        inside, life = list(range(size)), []
        for _ in range(24):
            outside = [one for one in range(size) if one not in inside]
            kind = rng.choice(["popleft", "remove"] * bool(inside) + ["append"] * 2 * bool(outside))
            if kind == "popleft":
                inside.pop(0)
                life.append((kind, None))
            else:
                block_id = rng.choice(outside if kind == "append" else inside)
                (inside.append if kind == "append" else inside.remove)(block_id)
                life.append((kind, block_id))
        yield Case("a random life of a queue", size, life)


@queue.run
def _(answer, num_blocks, life):
    """The queue after each operation, seen from both ends. What follows from a wrong one tells nothing more."""
    blocks = [KVBlock(i) for i in range(num_blocks)]
    line = answer(blocks)
    seen = {}
    for name, kind, block_id, right in _life(num_blocks, life):
        returned = None
        if seen:
            returned = line.popleft() if kind == "popleft" else getattr(line, kind)(blocks[block_id])
        if kind == "popleft":
            returned = returned.block_id if isinstance(returned, KVBlock) else "no block"
        seen[name] = _books(returned, line, blocks, right["from the front"])
        if seen[name] != right:
            break
    return {name: seen.get(name, "not asked any more") for name, *_ in _life(num_blocks, life)}


def _life(num_blocks, life):
    """(name, kind, block, what the books should be) of each operation; at first the queue is made."""
    model = list(range(num_blocks))
    for number, (kind, block_id) in enumerate([("append", None), *life]):
        returned = None
        if number and kind == "popleft":
            returned = model.pop(0)
        elif number:
            (model.append if kind == "append" else model.remove)(block_id)
        name = f"{number}: {kind}" + ("" if block_id is None else f"({block_id})")
        yield name if number else "made", kind, block_id, {
            "returned": returned, "from the front": list(model), "from the back": model[::-1],
            "num_blocks": len(model), "outside, but linked": [],
        }  # fmt: skip


def _books(returned, line, blocks, model):
    """What can be seen of a queue; walks give up after more steps than there are blocks."""
    limit = len(blocks) + 2
    forward: list[object] = []
    try:
        forward += (block.block_id for block in itertools.islice(line, limit))
    except AttributeError:  # an arrow that leads to None
        forward.append("nowhere")
    backward, at = [], blocks[model[-1]] if model else None
    while at is not None and at.block_id >= 0 and len(backward) < limit:
        backward.append(at.block_id)
        at = getattr(at, "prev", None)
    outside = [one for one in blocks if one.block_id not in model]
    whole = [one for one in outside if hasattr(one, "prev") and hasattr(one, "next")]
    linked = [one.block_id for one in whole if one.prev is not None or one.next is not None]
    books = {"returned": returned, "from the front": forward, "from the back": backward,
             "num_blocks": line.num_blocks, "outside, but linked": linked}  # fmt: skip
    ends = [getattr(line, name, None) for name in ("head", "tail")]
    if any(isinstance(end, KVBlock) and end.block_id >= 0 for end in ends):
        books["head and tail"] = [getattr(end, "block_id", None) for end in ends]
    if len(whole) < len(outside):
        books["without prev or next"] = [one.block_id for one in outside if one not in whole]
    return books


@queue.expected
def _(num_blocks, life):
    """On a plain list."""
    return {name: right for name, _, _, right in _life(num_blocks, life)}


def _went_wrong(failure):
    """The first operation that went wrong: its kind, and the books as they are and as they should be."""
    for name, kind, _, right in _life(*failure.args):
        if failure.got[name] != right:
            return kind, failure.got[name], right


def _when(*kinds):
    """A symptom of what went wrong in an operation of these kinds; making the queue is appending."""

    def decorate(function):
        def applies(failure):
            kind, got, right = _went_wrong(failure)
            return (not kinds or kind in kinds) and function(got, right)

        return applies

    return decorate


@queue.symptom(
    "not-threaded",
    "The blocks' own prev and next are not used. The queue must live in the blocks themselves, so that a block which is "
    "pulled out knows its neighbours without a search, and nothing has to be hashed or allocated.",
)
@_when("append")
def _(got, right):
    front = right["from the front"]
    return len(front) > 1 and got["from the front"] == front and len(got["from the back"]) == 1


@queue.symptom(
    "moves-the-ends",
    "self.head and self.tail must stay the two blocks that are never handed out. The first block of the queue is "
    "self.head.next: change arrows, not the ends.",
)
@_when()
def _(got, right):
    return "head and tail" in got


@queue.symptom(
    "deletes-the-arrows",
    "A block that has left the queue has no prev or no next any more. Both must exist and be None: block.prev = None, not "
    "del block.prev.",
)
@_when()
def _(got, right):
    return "without prev or next" in got


@queue.symptom(
    "points-at-itself",
    "append links the newcomer to itself: self.tail.prev was overwritten before you read it. Remember the block that was "
    "last, last = self.tail.prev, before you change any arrow.",
)
@_when("append")
def _(got, right):
    back = got["from the back"]
    return len(back) > 1 and back[0] == back[1]


@queue.symptom(
    "pops-no-block",
    "popleft must return the block, the object with prev and next, that it took out.",
)
@_when("popleft")
def _(got, right):
    return got["returned"] == "no block"


@queue.symptom(
    "at-the-front",
    "append puts the block at the front, where it is given away next. It belongs before self.tail: what was freed last is "
    "kept longest.",
)
@_when("append")
def _(got, right):
    front = right["from the front"]
    return len(front) > 1 and got["from the front"] in (front[::-1], front[-1:] + front[:-1])


@queue.symptom(
    "takes-the-back",
    "popleft takes the last block. Take self.head.next, the one that has been free longest.",
)
@_when("popleft")
def _(got, right):
    return bool(right["from the front"]) and got["returned"] == right["from the front"][-1]


@queue.symptom(
    "popleft-leaves-it",
    "popleft returns the first block and leaves it in the queue: the next one to ask gets it as well. Take it out with "
    "self.remove(block).",
)
@_when("popleft")
def _(got, right):
    return got["from the front"] == [right["returned"], *right["from the front"]]


@queue.symptom(
    "counts-twice",
    "num_blocks goes down by two in popleft: remove has counted already.",
)
@_when("popleft")
def _(got, right):
    return got["num_blocks"] == right["num_blocks"] - 1


@queue.symptom(
    "one-way-append",
    "append sets only some of the four arrows: from one end the newcomer is seen, from the other it is not. The one that "
    "was last must point forward at it (next), and self.tail back at it (prev).",
)
@_when("append")
def _(got, right):
    front = got["from the front"]
    return front != got["from the back"][::-1] or front == right["from the front"][-1:] != right["from the front"]


@queue.symptom(
    "one-way-popleft",
    "popleft changes only one of the two arrows at the front: seen from one end the block is gone, from the other it is not. "
    "self.head.next must become the second block, and that block's prev self.head: self.remove(first) does both.",
)
@_when("popleft")
def _(got, right):
    front, back = got["from the front"], got["from the back"]
    return front != back[::-1] and right["from the front"] in (front, back[::-1])


@queue.symptom(
    "one-way-remove",
    "A neighbour still points at the block that left: seen from one end it is gone, from the other it is not. Both must "
    "change: block.prev.next and block.next.prev.",
)
@_when("remove")
def _(got, right):
    front, back = got["from the front"], got["from the back"]
    return front != back[::-1] and right["from the front"] in (front, back[::-1])


@queue.symptom(
    "not-counted",
    "num_blocks is not the number of blocks in the queue. The scheduler decides by it who may join: one more in append, one "
    "less in remove (and in popleft, if that does not call remove).",
)
@_when()
def _(got, right):
    return got["num_blocks"] != right["num_blocks"]


@queue.symptom(
    "still-linked",
    "A block that has left still points at its old neighbours. Set its prev and next to None, so that removing it once more "
    "is an error at once and not a broken queue later.",
)
@_when("remove", "popleft")
def _(got, right):
    return got | {"outside, but linked": []} == right


@queue.symptom(
    "lost",
    "A block that should wait in the queue is not in it any more: the arrows around it lead past it.",
)
@_when()
def _(got, right):
    return not set(right["from the front"]) <= set(got["from the front"])


def _line(*, joins="back", forward=True, backward=True, counts=True, clears=True, counts_again=False, takes="front",
          leaves=True, returns="block", unlinks=(True, True)):  # fmt: skip
    """The solution with its joints exposed."""

    class Line:
        def __init__(self, blocks):
            self.head, self.tail = KVBlock(-1), KVBlock(-1)
            self.head.next, self.tail.prev = self.tail, self.head
            self.num_blocks = 0
            for block in blocks:
                self.append(block)

        def __iter__(self):
            block = self.head.next
            while block is not self.tail:
                yield block
                block = block.next

        def append(self, block):
            before, behind = (self.tail.prev, self.tail) if joins == "back" else (self.head, self.head.next)
            block.prev, block.next = before, behind
            if forward:
                before.next = block
            if backward:
                behind.prev = block
            self.num_blocks += counts in (True, "append")

        def remove(self, block):
            if unlinks[0]:
                block.prev.next = block.next
            if unlinks[1]:
                block.next.prev = block.prev
            if clears:
                block.prev = block.next = None
            self.num_blocks -= counts is True

        def popleft(self):
            block = self.head.next if takes == "front" else self.tail.prev
            removed = self.remove(block) if leaves else None
            self.num_blocks -= counts_again
            return {"block": block, "id": block.block_id, "what remove returns": removed}[returns]

    return Line


queue.wrong("at-the-front")(_line(joins="front"))
queue.wrong("takes-the-back")(_line(takes="back"))
queue.wrong("popleft-leaves-it")(_line(leaves=False))
queue.wrong("counts-twice")(_line(counts_again=True))
queue.wrong("not-counted")(_line(counts=False))
queue.wrong("not-counted")(_line(counts="append"))
queue.wrong("still-linked")(_line(clears=False))
queue.wrong("pops-no-block")(_line(returns="id"))
queue.wrong("pops-no-block")(_line(returns="what remove returns"))
queue.wrong("one-way-append")(_line(backward=False))
queue.wrong("one-way-append")(_line(forward=False))
queue.wrong("one-way-remove")(_line(unlinks=(True, False)))
queue.wrong("one-way-remove")(_line(unlinks=(False, True)))
_Line = _line()


@queue.wrong("points-at-itself")
class _SelfLink(_Line):
    def append(self, block):
        self.tail.prev.next = block
        self.tail.prev = block
        block.prev = self.tail.prev
        block.next = self.tail
        self.num_blocks += 1


@queue.wrong("deletes-the-arrows")
class _Deletes(_Line):
    def remove(self, block):
        block.prev.next, block.next.prev = block.next, block.prev
        del block.prev, block.next
        self.num_blocks -= 1


@queue.wrong("one-way-popleft")
class _PopsOneWay(_Line):
    def popleft(self):
        first = self.head.next
        self.head.next = first.next
        first.prev = first.next = None
        self.num_blocks -= 1
        return first


@queue.wrong("one-way-popleft")
class _PopsTheOtherWay(_Line):
    def popleft(self):
        first = self.head.next
        first.next.prev = self.head
        first.prev = first.next = None
        self.num_blocks -= 1
        return first


@queue.wrong("moves-the-ends")
class _HeadMoves(_Line):
    def popleft(self):
        first = self.head.next
        self.head = first
        self.num_blocks -= 1
        return first


@queue.wrong("moves-the-ends")
class _TailMoves(_Line):
    def append(self, block):
        self.tail.next, block.prev = block, self.tail
        self.tail = block
        self.num_blocks += 1


@queue.wrong("not-threaded")
class _Dict:
    def __init__(self, blocks):
        self.blocks = dict.fromkeys(blocks)

    num_blocks = property(lambda self: len(self.blocks))

    def __iter__(self):
        return iter(list(self.blocks))

    def append(self, block):
        self.blocks[block] = None

    def remove(self, block):
        del self.blocks[block]

    def popleft(self):
        block = next(iter(self.blocks))
        del self.blocks[block]
        return block


@queue.wrong("lost")
class _CutsTheRest(_Line):
    def remove(self, block):
        block.prev.next = self.tail
        self.tail.prev = block.prev
        block.prev = block.next = None
        self.num_blocks -= 1


class _Seen(KVBlock):
    """A block that counts how often its arrows are read."""

    __slots__ = ()
    reads = itertools.count()

    @property
    def prev(self):
        next(_Seen.reads)
        return KVBlock.prev.__get__(self)

    @prev.setter
    def prev(self, value):
        KVBlock.prev.__set__(self, value)

    @property
    def next(self):
        next(_Seen.reads)
        return KVBlock.next.__get__(self)

    @next.setter
    def next(self, value):
        KVBlock.next.__set__(self, value)


@queue.budget(
    "The block knows its neighbours: nothing has to be searched. A walk through a queue of 40,000 blocks for every block "
    "that a hit revives would take longer than the hit saves.",
    most=20,
    unit="arrows read to remove one block out of the middle of 1,000",
)
def _(answer):
    blocks = [_Seen(i) for i in range(1000)]
    line = answer(blocks)
    before = next(_Seen.reads)
    line.remove(blocks[500])
    return next(_Seen.reads) - before - 1


@queue.wasteful
class _Walks(_Line):
    def remove(self, block):
        at = self.head
        while at.next is not block:
            at = at.next
        at.next, block.next.prev = block.next, at
        block.prev = block.next = None
        self.num_blocks -= 1


queue.accepts(_Line)


@queue.accepts
class _OneEnd:
    """A ring: one sentinel is both ends."""

    def __init__(self, blocks):
        self.ring = KVBlock(-1)
        self.ring.prev = self.ring.next = self.ring
        self.num_blocks = 0
        for block in blocks:
            self.append(block)

    def __iter__(self):
        block = self.ring.next
        while block is not self.ring:
            yield block
            block = block.next

    def append(self, block):
        block.next = self.ring
        block.prev = self.ring.prev
        self.ring.prev.next = block
        self.ring.prev = block
        self.num_blocks += 1

    def remove(self, block):
        left, right = block.prev, block.next
        left.next = right
        right.prev = left
        block.prev, block.next = None, None
        self.num_blocks -= 1

    def popleft(self):
        first = self.ring.next
        self.remove(first)
        return first


@queue.accepts
class _PopsByItself(_Line):
    """popleft without remove."""

    def popleft(self):
        block = self.head.next
        self.head.next = block.next
        block.next.prev = self.head
        block.prev = block.next = None
        self.num_blocks -= 1
        return block


@queue.look
def _(answer):
    from course_lib.teaching.learner.patching import patched

    with patched(queue, answer):
        pool = BlockPool(4000)
        rng = random.Random(0)
        held: list[int] = []
        for _ in range(10_000):
            if held and rng.random() < 0.5:
                pool.release([held.pop(rng.randrange(len(held)))])
            else:
                block_id = rng.randrange(4000)
                if pool.is_free(block_id):
                    pool.share([block_id])
                    held.append(block_id)
        pool.check_invariants()
    print("In the engine's pool of 4,000 blocks: 10,000 random blocks revived or freed, and its books are in order.")


# ---- 07.3 taking over a hit ---------------------------------------------------------------------------

take = Exercise(
    "07.3",
    "Take what was found before somebody else gets it",
    target="course_lib.core.kv_cache_manager:KVCacheManager.allocate_slots",
    stars=2,
    minutes=15,
    importance="core",
    hints=(
        "Blocks that nobody holds wait in the free queue, the found ones as well, and num_free counts them. How "
        "many blocks will be left for `needed` once the found ones have been taken out?",
        "Decide first, change afterwards. The blocks of `hit` that are free are not there to be taken: compare `needed` with "
        "num_free less their number. Then share the hit, and only then allocate, or the queue may give away what you found.",
        "reserved = how many of hit are free; if needed > pool.num_free - reserved: return None; pool.share(hit); return "
        "hit + pool.allocate(needed).",
    ),
)


class _Pool(BlockPool):
    """The engine's pool, which says so when more is taken than there is."""

    def allocate(self, count):
        if count > self.num_free:
            raise RuntimeError(f"allocate({count}): only {self.num_free} blocks are free")
        return super().allocate(count)


@take.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("nothing was found, there is room", [0, 1, 2, 3], {}, [], 2)
    yield Case("found and held by another request", [2, 3, 4], {0: 1, 1: 2}, [0, 1], 2)
    yield Case("found and free, at the back of the queue", [2, 3, 4, 1, 0], {}, [0, 1], 2)
    yield Case("found and free, at the front of the queue", [1, 0, 2, 3, 4], {}, [0, 1], 2)
    yield Case("as many as are left, not one more", [2, 1, 3, 0], {4: 1}, [0, 1], 2)
    yield Case("one too few: two of the four free ones were found", [1, 0, 2, 3], {4: 1}, [0, 1], 3)
    yield Case("held ones take nothing away", [2, 3], {0: 1, 1: 1}, [0, 1], 2)
    yield Case("all that is needed was found", [1, 0], {2: 1}, [0, 1], 0)
    yield Case("nothing was found, and too few are free", [1, 2], {0: 1}, [], 3)
    for _ in range(5):
        ids = list(range(rng.randint(5, 9)))
        hit = rng.sample(ids, rng.randint(1, 3))
        held = {one: rng.randint(1, 2) for one in rng.sample(ids, rng.randint(0, 3))}
        free = [one for one in ids if one not in held]
        rng.shuffle(free)
        yield Case("at random", free, held, hit, rng.randint(0, len(free)))


def _pool_of(free, held):
    """A pool with this free queue and these holders, in which every block is cached."""
    pool = _Pool(len(free) + len(held))
    for block_id in pool.allocate(pool.num_blocks):
        pool.register(block_id, b"content of %d" % block_id)
    for block_id, holders in held.items():
        pool.share([block_id] * (holders - 1))
    pool.release(free)
    return pool


@take.run
def _(answer, free, held, hit, needed):
    pool = _pool_of(free, held)
    given = list(hit)
    table = answer(pool, given, needed)
    return {"table": table, "holders": [block.ref_count for block in pool.blocks],
            "free": [block.block_id for block in pool.free_queue]}  # fmt: skip


@take.expected
def _(free, held, hit, needed):
    """On plain lists."""
    holders = [held.get(block_id, 0) for block_id in range(len(free) + len(held))]
    left = [block_id for block_id in free if block_id not in hit]
    if needed > len(left):
        return {"table": None, "holders": holders, "free": list(free)}
    table = [*hit, *left[:needed]]
    return {"table": table, "holders": [n + (i in table) for i, n in enumerate(holders)], "free": left[needed:]}


def _take_needed(failure):
    return failure.args[3]


@take.symptom(
    "found-too-late",
    "You share first and then find too few blocks to allocate. The found blocks that nobody held were counted in num_free, "
    "and are not there any more: subtract them before you decide.",
)
def _(failure):
    return failure.error is not None and "blocks are free" in str(failure.error)


@take.symptom(
    "nothing-returned",
    "take_over must return the table: the ids of the blocks that were found, then those of the new ones.",
)
def _(failure):
    got, right = failure.got["table"], failure.expected["table"]
    return right is not None and got is None and failure.got["holders"] == failure.expected["holders"]


@take.symptom(
    "handed-out-twice",
    "A block that was found is in the table twice: allocate took it from the front of the queue, as if it were anybody's, "
    "and its content is gone. Share the hit before you allocate; that takes it out of the queue.",
)
def _(failure):
    table = failure.got["table"]
    return isinstance(table, list) and len(set(table)) < len(table)


@take.symptom(
    "changed-before-refusing",
    "You return None, but the found blocks have a holder more, or another place in the queue, than before. The request will "
    "ask again in the next step: decide first, then change.",
)
def _(failure):
    got, right = failure.got, failure.expected
    return right["table"] is None and got["table"] is None and got != right


@take.symptom(
    "not-none",
    "With too few blocks the answer is None: an empty list would mean that a request without blocks may run.",
)
def _(failure):
    return failure.expected["table"] is None and failure.got["table"] in ([], False, ())


@take.symptom(
    "two-holders-at-once",
    "The new blocks get two holders: allocate has given each of them one already. Share the found ones only.",
)
def _(failure):
    got, right = failure.got, failure.expected
    new = right["table"][len(failure.args[2]) :]
    return got["table"] == right["table"] and any(got["holders"][block_id] == 2 for block_id in new)


def _make_take(*, reserve="free", share="before", order="hit first", returns="all", needed_is="new", compare="more"):
    """The solution with its joints exposed."""

    def take_over(pool, hit, needed):
        reserved = {"free": sum(map(pool.is_free, hit)), "all": len(hit), "none": 0}[reserve]
        if needed_is == "total":
            needed = max(0, needed - len(hit))
        left = pool.num_free - reserved
        if needed > left or (compare == "as many" and needed == left):
            return None
        if share == "before":
            pool.share(hit)
        if share == "free ones":
            pool.share([one for one in hit if pool.is_free(one)])
        new = pool.allocate(needed)
        if share == "after":
            pool.share(hit)
        return new if returns == "new" else (hit + new if order == "hit first" else new + hit)

    return take_over


take.mistake(
    "not-shared",
    "The found blocks have no new holder. They stay in the free queue, and whoever comes next is given them while this "
    "request reads them: pool.share(hit).",
)(_make_take(share="never"))
take.mistake(
    "shares-the-free-only",
    "You share only the found blocks that were free. One that another request holds needs a second holder too, or it is "
    "free as soon as that request ends.",
)(_make_take(share="free ones"))
take.mistake(
    "reserves-held-ones",
    "You subtract all found blocks from num_free. Those that another request holds are not in it, so you refuse requests "
    "for which there is room: subtract only those for which pool.is_free says yes.",
)(_make_take(reserve="all"))
take.mistake(
    "one-too-careful",
    "You refuse when exactly as many blocks are left as are needed. That is enough.",
)(_make_take(compare="as many"))
take.mistake(
    "new-ones-first",
    "The new blocks stand before the found ones. A table is in the order of the text, and what was found is its beginning.",
)(_make_take(order="new first"))
take.mistake(
    "only-the-new-ones",
    "You return the new blocks only. The table begins with the blocks that were found: hit + the new ones.",
)(_make_take(returns="new"))
take.mistake(
    "found-ones-counted-in",
    "`needed` is the number of new blocks. You have subtracted the found ones from it, and the request gets too few.",
)(_make_take(needed_is="total"))


take.wrong("found-too-late")(_make_take(reserve="none"))
take.wrong("handed-out-twice")(_make_take(share="after"))
take.wrong("handed-out-twice")(_make_take(share="after", reserve="none"))


@take.wrong("changed-before-refusing")
def _(pool, hit, needed):
    pool.share(hit)
    if needed > pool.num_free:
        return None
    return hit + pool.allocate(needed)


@take.wrong("changed-before-refusing")
def _(pool, hit, needed):
    pool.share(hit)
    if needed > pool.num_free:
        pool.release(hit)
        return None
    return hit + pool.allocate(needed)


@take.wrong("two-holders-at-once")
def _(pool, hit, needed):
    if needed > pool.num_free - sum(map(pool.is_free, hit)):
        return None
    pool.share(hit)
    new = pool.allocate(needed)
    pool.share(new)
    return hit + new


@take.wrong("not-none")
def _(pool, hit, needed):
    return _make_take()(pool, hit, needed) or []


@take.wrong("nothing-returned")
def _(pool, hit, needed):
    _make_take()(pool, hit, needed)


take.accepts(_make_take())


@take.accepts
def _(pool, hit, needed):
    """By the pool's blocks, one after the other."""
    free_hits = [block_id for block_id in hit if pool.blocks[block_id].ref_count == 0]
    if len(free_hits) + needed > pool.num_free:
        return None
    table = []
    for block_id in hit:
        pool.share([block_id])
        table.append(block_id)
    for _ in range(needed):
        table += pool.allocate(1)
    return table


@take.adapt
def _(answer, original):
    def allocate_slots(self, request, num_new_tokens, computed_blocks=None):
        if not computed_blocks:
            return original(self, request, num_new_tokens)
        tokens = request.num_computed_tokens + len(computed_blocks) * self.block_size
        needed = -(-(tokens + num_new_tokens) // self.block_size) - len(computed_blocks)
        table = answer(self.pool, list(computed_blocks), needed)
        if table is None:
            return None
        request.block_ids.extend(table)
        request.num_computed_tokens = tokens
        request.num_registered_blocks = len(computed_blocks)
        original(self, request, num_new_tokens)  # needs no blocks any more; offers the full ones to others
        return table[len(computed_blocks) :]

    return allocate_slots


@take.look
def _(answer):
    from course_lib.teaching.recording.replay import replay
    from course_lib.teaching.learner.patching import patched

    pages = [list(range(1000 * i, 1000 * i + 160)) for i in range(4)]
    rng = random.Random(0)
    prompts = [rng.choice(pages) + [5000 + i] for i in range(200)]
    with patched(take, answer):
        tight, roomy = replay(prompts, 24), replay(prompts, 60)
    print(f"In the engine's cache: 200 questions about 4 pages find {100 * tight.hit_rate:.0f} % of their tokens in 24 blocks")
    print(f"and {100 * roomy.hit_rate:.0f} % in 60.")


# ---- 07.4 a forged block ------------------------------------------------------------------------------

forge = Exercise(
    "07.4",
    "Forge a block",
    target=None,
    stars=2,
    minutes=10,
    importance="useful",
    hints=(
        "You cannot work back from a name to tokens, but you can try. How many blocks do you have to name until one of them "
        "happens to be called like the target, if names have 16 bits?",
        "About as many as there are names, 65,536. One token alone has only vocab_size values, which may be fewer than that: "
        "let all tokens of the block vary.",
        "In an endless loop: draw block_size numbers with random.randrange(vocab_size); if name(parent, tokens) == target, "
        "return tokens.",
    ),
)


class ShortName:
    """Names blocks by the first bits of a SHA-256."""

    def __init__(self, bits):
        self.bits = bits

    def __call__(self, parent, tokens):
        text = f"{parent} {' '.join(map(str, tokens))}"
        return int.from_bytes(sha256(text.encode()).digest()[:4], "big") >> (32 - self.bits)

    def __repr__(self):
        return f"a function that gives names of {self.bits} bits"


@forge.cases
def _(rng: random.Random) -> Iterator[Case]:
    for bits, size, vocab in ((6, 4, 50), (8, 4, 100), (10, 16, 49152), (12, 16, 49152), (12, 4, 60), (6, 16, 2)):
        name = ShortName(bits)
        parent = rng.randrange(2**bits)
        target = name(parent, [rng.randrange(vocab) for _ in range(size)])
        yield Case(f"names of {bits} bits, blocks of {size}, {vocab:,} tokens", target, parent, size, vocab, name)


class _Counted:
    """A ShortName that counts, and ends a search that nothing else would. One is in use at a time."""

    most = 100_000  # 2**12 are expected
    calls = 0

    def __init__(self, name):
        self.name, _Counted.calls = name, 0

    def __call__(self, parent, tokens):
        _Counted.calls += 1
        if _Counted.calls > self.most:
            raise _NoEnd
        return self.name(parent, tokens)


class _NoEnd(BaseException):
    """Ends a search that catches every Exception, too."""


NO_END = f"no result after {_Counted.most:,} tries"


@forge.run
def _(answer, target, parent, block_size, vocab_size, name):
    try:
        return answer(target, parent, block_size, vocab_size, _Counted(name))
    except _NoEnd:
        return NO_END


@forge.expected
def _(target, parent, block_size, vocab_size, name):
    for ids in itertools.product(range(vocab_size), repeat=block_size):
        if name(parent, ids) == target:
            return list(ids)


@forge.same
def _(got, expected, case):
    target, parent, block_size, vocab_size, name = case.args
    ids = _plain(got)
    return len(ids) == block_size and all(0 <= one < vocab_size for one in ids) and name(parent, ids) == target


def _plain(got):
    """The ids as ints; raises for what is no sequence of ids."""
    ids = [int(one) for one in got]
    if isinstance(got, str) or ids != list(got):
        raise TypeError
    return ids


def _stopped(failure):
    return type(failure.error).__name__ == "TookTooLong"


@forge.symptom(
    "tries-none",
    "You had not asked for a single name when the time was up. If you were still making candidates: there are too many to make "
    "them all first. Try each as you make it.",
)
def _(failure):
    return _stopped(failure) and not _Counted.calls


@forge.symptom(
    "never-changes",
    "Your search goes on and on; about 2**bits tries should do. Does every try take other tokens, and do so many of them vary "
    "that there are more than 2**bits blocks to try?",
)
def _(failure):
    return _stopped(failure) or failure.got == NO_END


@forge.symptom(
    "gave-up",
    "Nothing was found: your search ends too early. With names of b bits, about 2**b blocks have to be tried, sometimes "
    "several times as many; one token alone cannot take that many values. Let all tokens vary, and search until one fits.",
)
def _(failure):
    return (failure.got is None and failure.error is None) or isinstance(failure.error, (StopIteration, IndexError, ValueError))


@forge.symptom(
    "a-name",
    "You return a name. What is looked for is the block: block_size token ids for which name(parent, ids) is the target.",
)
def _(failure):
    return isinstance(failure.got, (int, bytes))


@forge.symptom(
    "not-a-block",
    "A block has exactly block_size tokens. Only full blocks have names.",
)
def _(failure):
    return len(failure.got) != failure.args[2]


@forge.symptom(
    "one-too-far",
    "Some of your ids are vocab_size itself, which is no token: the last one is vocab_size - 1. (random.randint(a, b) draws b "
    "as well, random.randrange(b) does not.)",
)
def _(failure):
    return max(failure.got) == failure.args[3] and min(failure.got) >= 0


@forge.symptom(
    "no-such-token",
    "Some of your ids are no tokens: they must be whole numbers from 0 to vocab_size - 1, or the engine refuses the prompt.",
)
def _(failure):
    return not all(0 <= one < failure.args[3] and one == int(one) for one in failure.got)


@forge.symptom(
    "other-parent",
    "The block has the right name after another parent. In the chain, the parent enters the name: try name(parent, ids) with "
    "the parent that you are given.",
)
def _(failure):
    target, _, _, _, name = failure.args
    return any(name(other, _plain(failure.got)) == target for other in (0, None, b"", "", "root", target))


@forge.symptom(
    "any-collision",
    "The block has another name than the target. Two blocks of your own with equal names would be found sooner, but the "
    "victim's block has this one.",
)
def _(failure):
    target, parent, _, _, name = failure.args
    return name(parent, _plain(failure.got)) != target


def _search(*, tries=None, vary=None, size=0, vocab=1, parent_is="given", fresh=True, gives="tokens"):
    """The solution with its joints exposed."""

    def find(target, parent, block_size, vocab_size, name):
        rng = random.Random(3)
        parent = parent if parent_is == "given" else 0
        tokens = [rng.randrange(vocab_size * vocab) for _ in range(block_size + size)]
        for _ in itertools.count() if tries is None else range(tries):
            if name(parent, tokens) == target:
                return tokens if gives == "tokens" else target
            if fresh:
                changed = range(len(tokens)) if vary is None else [vary]
                for i in changed:
                    tokens[i] = rng.randrange(vocab_size * vocab)

    return find


forge.wrong("gave-up")(_search(tries=40))
forge.wrong("a-name")(_search(gives="name"))
forge.wrong("not-a-block")(_search(size=1))
forge.wrong("not-a-block")(_search(size=-1))
forge.wrong("no-such-token")(_search(vocab=1000))
forge.wrong("other-parent")(_search(parent_is="zero"))
forge.wrong("never-changes")(_search(fresh=False))
forge.wrong("never-changes")(_search(vary=0))


@forge.wrong("one-too-far")
def _(target, parent, block_size, vocab_size, name):
    while True:
        ids = [random.randint(0, vocab_size) for _ in range(block_size)]
        if name(parent, ids) == target:
            return ids


@forge.wrong("tries-none")
def _(target, parent, block_size, vocab_size, name):
    candidates = 0
    while candidates < vocab_size**block_size:  # as if all were made first, without the memory that it takes
        candidates += block_size > 4


@forge.wrong("gave-up")
def _(target, parent, block_size, vocab_size, name):
    for last in range(vocab_size):
        tokens = [0] * (block_size - 1) + [last]
        if name(parent, tokens) == target:
            return tokens


@forge.wrong("gave-up")
def _(target, parent, block_size, vocab_size, name):
    return next(ids for ids in ([last] * block_size for last in range(vocab_size)) if name(parent, ids) == target)


@forge.wrong("any-collision")
def _(target, parent, block_size, vocab_size, name):
    seen = {}
    while True:
        tokens = [random.randrange(vocab_size) for _ in range(block_size)]
        if name(parent, tokens) in seen:
            return tokens
        seen[name(parent, tokens)] = tokens


forge.accepts(_search())


@forge.accepts
def _(target, parent, block_size, vocab_size, name):
    """Counting instead of drawing."""
    for number in itertools.count():
        tokens = []
        for _ in range(block_size):
            number, digit = divmod(number, vocab_size)
            tokens.append(digit)
        if name(parent, tokens) == target:
            return tuple(tokens)


@forge.accepts
def _(target, parent, block_size, vocab_size, name):
    import numpy as np

    rng = np.random.default_rng(0)
    while name(parent, (ids := rng.integers(vocab_size, size=block_size)).tolist()) != target:
        pass
    return ids


@forge.look
def _(answer):
    from course_lib.core.prefix_hash import ROOT, hash_block

    def name(parent, tokens):
        return hash_block(parent, list(tokens))[:2]

    victim = list(range(100, 116))
    forged = [int(one) for one in answer(name(ROOT, victim), ROOT, 16, 49152, name)]
    print("With names of 16 bits, your block passes for another:", name(ROOT, forged) == name(ROOT, victim))
    print("With the engine's 256 bits:", hash_block(ROOT, forged) == hash_block(ROOT, victim))


# ---- 07.5 order ---------------------------------------------------------------------------------------

order = Exercise(
    "07.5",
    "Put together what begins alike",
    target=None,
    stars=3,
    minutes=20,
    importance="core",
    hints=(
        "A name stands for a whole beginning, so two requests that begin alike share names. For each name, which request "
        "came with it first?",
        "Replace each name in a chain by the number of the request that came with it first. Requests that begin alike now "
        "begin with the same numbers, and smaller numbers came earlier: compare lists of numbers. Where a chain ends, its own "
        "number goes on.",
        "first = {}; for i, names in enumerate(chains): for name in names: first.setdefault(name, i). Then "
        "sorted(range(len(chains)), key=lambda i: [first[name] for name in chains[i]] + [i]).",
    ),
)


def _chains(*texts):
    """Chains of readable names: "abc" has blocks a, b, c, named "a", "ab", "abc"."""
    return [[text[: i + 1] for i in range(len(text))] for text in texts]


@order.cases
def _(rng: random.Random) -> Iterator[Case]:
    yield Case("two pages, asked in turn", _chains("ax", "by", "az", "bw"))
    yield Case("the page that came first is first, whatever its name", _chains("bx", "ay", "bz", "aw"))
    yield Case("the same system prompt s before every page", _chains("sax", "sby", "saz", "sbw"))
    yield Case("branches inside a branch", _chains("abx", "c", "acy", "abz", "acw", "cd"))
    yield Case("three levels deep", _chains("spcx", "spdy", "spcz", "spdw"))
    yield Case("one prompt is the beginning of another that came first", _chains("abc", "x", "ab", "abd"))
    yield Case("the same prompt twice", _chains("ab", "cd", "ab", "ce"))
    yield Case("the same prompt twice, and a longer one between", _chains("s", "sa", "s"))
    yield Case("prompts shorter than a block have no name", _chains("", "ab", "", "ac"))
    yield Case("three of b, two of a", _chains("ax", "bx", "by", "az", "bz"))
    for _ in range(5):
        texts = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(4, 9))]
        yield Case("at random", _chains(*texts))


@order.expected
def _(chains):
    """As it is said: walk the tree of prefixes; branches, and those that end here, in the order of their first."""

    return _walk(chains)


def _walk(chains, one_end=False):
    """one_end: the requests that end at the same place are one branch, not one each."""

    def walk(members, depth):
        branches: dict[object, list[int]] = {}
        for i in members:  # in order of arrival, so the branches are too
            ends = len(chains[i]) == depth
            branches.setdefault(("ends", 0 if one_end else i) if ends else chains[i][depth], []).append(i)
        for key, group in branches.items():
            yield from group if isinstance(key, tuple) else walk(group, depth + 1)

    return list(walk(range(len(chains)), 0))


@order.same
def _(got, expected, case):
    """Either reading of a branch of its own: the hits are the same."""
    readings = [_walk(*case.args), _walk(*case.args, one_end=True)]
    return any(difference(got, one) is None for one in (readings if expected in readings else [expected]))


@order.symptom(
    "no-list",
    "Return a list: the requests' numbers, in the order in which they should be asked.",
)
def _(failure):
    return failure.got is not None and not isinstance(failure.got, list | tuple)


@order.symptom(
    "chains-themselves",
    "Return the requests' numbers, in the order in which they should be asked: 0 for the one that came first.",
)
def _(failure):
    return failure.error is None and not all(isinstance(one, int) for one in failure.got)


@order.symptom(
    "someone-is-missing",
    "Every request must be in the order exactly once. Requests with equal prompts are still two requests.",
)
def _(failure):
    return failure.error is None and sorted(failure.got) != sorted(failure.expected)


def _first(chains):
    first: dict[str, int] = {}
    for i, names in enumerate(chains):
        for name in names:
            first.setdefault(name, i)
    return first


def _sorted_by(key):
    return lambda chains: sorted(range(len(chains)), key=lambda i: key(chains, i))


order.mistake(
    "by-name",
    "What begins alike stands together, but in the order of the names, which are as good as random. The request that has "
    "waited longest may come last: order the branches by who came first.",
)(_sorted_by(lambda chains, i: chains[i]))
order.mistake(
    "ranks",
    "You return the place of each request. What is asked for is the other way round: which request comes first, which "
    "second, and so on.",
)(lambda chains: [order.expected_function(chains).index(i) for i in range(len(chains))])
order.mistake(
    "first-block-only",
    "You put together requests with the same first block. With a system prompt in front that is everybody: what comes "
    "after it must count as well, at every depth.",
)(_sorted_by(lambda chains, i: (_first(chains)[chains[i][0]] if chains[i] else i)))
order.mistake(
    "whole-prompts-only",
    "You put together requests with the same chain from beginning to end. Two questions about one page have different "
    "ends: what they share is the beginning.",
)(lambda chains: sorted(range(len(chains)), key=lambda i: chains.index(chains[i])))
order.mistake(
    "short-ones-first",
    "A request whose chain ends comes before those that go on, even if they came earlier. (Lists compare so: the shorter is "
    "smaller.) Where a chain ends, let its own number go on.",
)(_sorted_by(lambda chains, i: [_first(chains)[name] for name in chains[i]]))
order.mistake(
    "popular-first",
    "You begin with the page that most requests ask for. Then a page that nobody else wants waits for ever if popular "
    "requests keep coming: the branch that came first goes first.",
)(_sorted_by(lambda chains, i: [(-sum(name in other for other in chains), _first(chains)[name]) for name in chains[i]] + [(0, i)]))
order.mistake(
    "longest-first",
    "You sort by length. Long prompts need not have anything in common.",
)(_sorted_by(lambda chains, i: -len(chains[i])))
order.mistake(
    "as-they-came",
    "That is the order in which they came. Requests that begin alike should follow each other.",
)(lambda chains: list(range(len(chains))))
order.mistake(
    "last-name",
    "You look at the last name of each chain. That stands for the whole prompt, question and all, and is nobody else's; "
    "what is shared are the names before it.",
)(_sorted_by(lambda chains, i: _first(chains)[chains[i][-1]] if chains[i] else i))


@order.mistake(
    "parent-only",
    "You put together requests that share all but their last block. Others may share less, and still more than nothing: "
    "compare the chains block by block.",
)
def _(chains):
    return _sorted_by(lambda chains, i: _first(chains)[chains[i][-2]] if len(chains[i]) > 1 else i)(chains)


@order.symptom(
    "torn-apart",
    "Requests that begin alike do not stand together: between them is one that begins otherwise. Compare the chains name by "
    "name, from the front.",
)
def _(failure):
    [chains] = failure.args
    for name in _first(chains):
        places = [place for place, i in enumerate(failure.got) if name in chains[i]]
        if places[-1] - places[0] >= len(places):
            return True


@order.symptom(
    "late-branch-first",
    "What begins alike stands together, but somewhere a branch is before another that came earlier. At every depth, the "
    "branch whose first request came first goes first.",
)
def _(failure):
    return isinstance(failure.got, list | tuple) and not order.same_function(failure.got, failure.expected, failure.case)


@order.wrong("no-list")
def _(chains):
    yield from _walk(chains)


@order.wrong("chains-themselves")
def _(chains):
    return sorted(chains)


@order.wrong("someone-is-missing")
def _(chains):
    first = _first(chains)
    unique = {tuple(names): i for i, names in enumerate(chains)}
    return sorted(unique.values(), key=lambda i: [first[name] for name in chains[i]] + [i])


@order.wrong("torn-apart")
def _(chains):
    """The first two names only."""
    first = _first(chains)
    return sorted(range(len(chains)), key=lambda i: [first[name] for name in chains[i][:2]] + [i])


@order.wrong("late-branch-first")
def _(chains):
    """In a dict by last appearance."""
    last = {name: i for i, names in enumerate(chains) for name in names}
    return sorted(range(len(chains)), key=lambda i: [last[name] for name in chains[i]] + [i])


@order.accepts
def _(chains):
    first = _first(chains)
    return sorted(range(len(chains)), key=lambda i: [*(first[name] for name in chains[i]), i])


@order.accepts
def _(chains):
    """What ends at the same place is one branch."""

    def walk(members, depth):
        groups: dict = {}
        for i in members:
            groups.setdefault(chains[i][depth] if depth < len(chains[i]) else None, []).append(i)
        return [i for key, group in groups.items() for i in (group if key is None else walk(group, depth + 1))]

    return walk(range(len(chains)), 0)


@order.accepts
def _(chains):
    """Greedy: next is whoever shares most with the last one; of equals, the one that came first."""
    left, asked = list(range(len(chains))), []
    while left:
        last = set(chains[asked[-1]]) if asked else set()
        best = max(left, key=lambda i: (sum(name in last for name in chains[i]), -i))
        left.remove(best)
        asked.append(best)
    return asked


@order.accepts
def _(chains):
    """A tree of dicts, and a walk through it."""
    tree: dict = {}
    for i, names in enumerate(chains):
        node = tree
        for name in names:
            node = node.setdefault(name, {})
        node[i] = i

    def walk(node):
        for child in node.values():
            if isinstance(child, int):
                yield child
            else:
                yield from walk(child)

    return list(walk(tree))


@order.look
def _(answer):
    from course_lib.core.prefix_hash import extend_block_hashes
    from course_lib.core.request import Request
    from course_lib.sampling_params import SamplingParams
    from course_lib.teaching.recording.replay import replay

    system = list(range(500, 548))
    pages = [system + list(range(1000 * i, 1000 * i + 160)) for i in range(1, 6)]
    rng = random.Random(1)
    prompts = [rng.choice(pages) + [50 + i] for i in range(60)]
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=1)) for i, prompt in enumerate(prompts)]
    for request in requests:
        extend_block_hashes(request, 16)
    yours = [prompts[i] for i in answer([request.block_hashes for request in requests])]
    came, put = replay(prompts, 16), replay(yours, 16)
    print("60 questions about 5 pages of 13 blocks, three of them a system prompt, in a cache of 16 blocks:")
    print(f"{came.computed_tokens:,} tokens computed as they came, {put.computed_tokens:,} in your order.")
