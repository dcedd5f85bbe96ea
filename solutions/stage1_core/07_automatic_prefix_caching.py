# ---
# jupyter:
#   course:
#     lesson: "07"
#     objectives:
#       - Watch a cache with a quarter less room find nothing at all, and say which rule did it
#       - Name blocks by a hash chain, so that one dictionary answers what a whole prefix was
#       - Keep free blocks in a queue that any of them can leave at once, and free them in the order that keeps beginnings
#       - Take over found blocks safely, and tell a cache that is wrong from one that is only bad
#       - Keep tenants apart with a salt, forge a block under a short hash, and order requests for a small cache
#     difficulty: 3
#     needs: ["02", "03", "06"]
#     opens:
#       - course_lib/core/prefix_hash.py
#       - course_lib/core/block_pool.py
#       - course_lib/core/kv_cache_manager.py
#       - course_lib/core/prefix_cache_stats.py
#       - course_lib/core/kv_events.py
#     terms:
#       hash chain: Each block is named by a hash of its parent's name and its own tokens, so a name stands for a whole prefix.
#       eviction: Giving a free block away for other content, after which the old content cannot be found.
#       LRU: Least recently used; what nobody has used for the longest time is forgotten first.
#       thrashing: A cache that throws away what will be asked for next, so that being a little too small costs nearly everything.
#       cache salt: A text that a request brings, mixed into the name of its first block; other salts, other names.
#       cache-aware ordering: Serving requests that begin alike one after the other, so that a small cache is enough.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## A quarter less memory
#
# vLLM's example for this lesson asks two questions about one table of people. The second answer comes sooner: the engine
# noticed that the prompts begin alike, and nobody had told it. Lesson 06 was about why that is allowed. This one is about how
# the engine notices, and about what the example does not show: how it forgets.
#
# So take four pages, of a pilot's list of lighthouses, and four readers.

# %%
import random
import time
from unittest.mock import patch

import matplotlib.pyplot as plt

from course_lib import SamplingParams
from course_lib.core.block_pool import BlockPool, KVBlock
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.prefix_hash import ROOT, extend_block_hashes, hash_block
from course_lib.core.request import Request
from course_lib.teaching import COURSE_STYLE, check, course_llm, exercise, explore_hits, hint
from course_lib.teaching import my_code, predict, reveal, show, solution
from course_lib.teaching.explorers.hit_rate import draw_hit_rates, draw_queues
from course_lib.teaching.recording.replay import find_forgery, replay, sweep, watch_queue
from course_lib.teaching.recording.scheduling import limited

plt.style.use(COURSE_STYLE)
llm = course_llm()
tokenizer = llm.get_tokenizer()

# %%
COASTS = {
    "north": "Skerry Gannet Frost Whitby Ness Tarn".split(),
    "east": "Alder Birk Cairn Dunmore Elk Farne".split(),
    "south": "Iona Jarl Kelp Lund Mull Norrby".split(),
    "west": "Quern Rona Sula Troup Ulva Vaila".split(),
}
KEEPERS = "Ada Bo Cleo Dag Eva Finn Gro".split()


def light(name):
    number = sum(map(ord, name))  # some number that depends on the name
    height, year, keeper = 12 + number % 41, 1790 + number % 170, KEEPERS[number % 7]
    return f"- {name} is {height} m high, was lit in {year}, and is kept by {keeper}.\n"


pages = {
    coast: f"Lighthouses of the {coast} coast:\n" + "".join(map(light, names))
    for coast, names in COASTS.items()
}
print(pages["north"])

# %%
prompts = {
    name: tokenizer.encode(pages[coast] + f"Pilot, how high is the tower of {name}? {name} is")
    for coast, names in COASTS.items()
    for name in names
}
in_turn = [prompts[names[i]] for i in (0, 1) for names in COASTS.values()]
print(f"prompts of {min(map(len, in_turn))} to {max(map(len, in_turn))} tokens")

# %% [markdown]
# A prompt takes twelve blocks, and the first ten or eleven are the same for every question about a page. The readers ask in
# turn (north, east, south, west, and round again), each for one token. Four times twelve is 48 blocks. First with those, then
# with a quarter less:

# %%
predict("07.a")

# %%
def ask(prompts, num_blocks):
    """Each prompt alone, one after the other: tokens found in the cache, seconds to the first token."""
    answers = []
    with limited(llm, num_blocks=num_blocks):
        for prompt in prompts:
            start = time.perf_counter()
            [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            answers.append((output.num_cached_tokens, time.perf_counter() - start))
    return answers


roomy, tight = ask(in_turn, 48), ask(in_turn, 36)
for blocks, run in ((48, roomy), (36, tight)):
    mean = sum(seconds for _, seconds in run[4:]) / 4
    print(f"{blocks} blocks: round 2 finds {[found for found, _ in run[4:]]} tokens, {mean:.2f} s each")
reveal("07.a")

# %%
figure, axis = plt.subplots(figsize=(9, 2.8))
for shift, run, label, hatch in ((0, roomy, "48 blocks", ""), (0.4, tight, "36 blocks", "///")):
    places = [i + shift for i in range(8)]
    axis.bar(places, [seconds for _, seconds in run], width=0.36, label=label, hatch=hatch)
axis.axvline(3.7, color="#5c6066", linestyle=":")
axis.set_xticks([i + 0.2 for i in range(8)], [*COASTS] * 2)
axis.set(xlabel="reader, first and second round", ylabel="s to the first token")
axis.legend()
show(figure, alt="Seconds to the first token of eight requests. With 48 blocks the four of the second "
     "round take a fraction of those of the first; with 36 blocks all eight are equally slow.")

# %% [markdown]
# 36 blocks hold three pages at any time, and are worth nothing. This is **thrashing**, and no gauge of memory shows it: both
# caches are full. To see why, you have to know how content is found, and in which order it is forgotten.
#
# ## A name for all that came before
#
# To find a page, the engine must ask of each block of a new prompt: is there one with these keys and values? They depend on
# the block's tokens *and on all before it*. So the block's name has to cover all of that, without reading it all again for
# every block. A **hash chain** does:
#
# $$ H_i \;=\; \text{hash}\bigl(H_{i-1},\; t_{iS}, \ldots, t_{iS+S-1}\bigr), \qquad H_{-1} = \text{root}, $$
#
# with $S$ tokens $t$ to a block; a name $H$ has 32 bytes (SHA-256). Each hash reads $S$ tokens and one parent, and stands for
# everything up to there: equal names, equal prefixes. Lesson 02's six tokens, in blocks of *two*, so that there are three:
#
# | block | tokens | name |
# |---|---|---|
# | 0 | The capital | $a$ = hash(root, The capital) |
# | 1 | of France | $b$ = hash($a$, of France) |
# | 2 | is Paris | $c$ = hash($b$, is Paris) |
#
# A text grows token by token, so the engine calls you again and again. Only the blocks that became full since the last time
# get a name, and the check wants no other hashed.

# %% tags=["exercise"]
@exercise("07.1", target="course_lib.core.prefix_hash:extend_block_hashes")
def extend_hashes(hashes, tokens, block_size, root, name):
    """Append to the list `hashes` the names of blocks that are full and have none yet.

    hashes: names of the first blocks of `tokens`, possibly of none; tokens: list of int;
    name(parent, tokens of a block) gives a block's name; the parent of block 0 is `root`.
    hashes [a], tokens 4 7 1 1 8 3 5, blocks of two: becomes [a, b, c], with
    b = name(a, [1, 1]) and c = name(b, [8, 3]); the 5 is in no full block.
    """
    #: solution
    for i in range(len(hashes), len(tokens) // block_size):
        parent = hashes[-1] if hashes else root
        hashes.append(name(parent, tokens[i * block_size : (i + 1) * block_size]))
    #: end

# %% tags=["check"]
check("07.1")

# %% [markdown]
# Now change one token of the six, each in turn, and see whose names stay:

# %% tags=["exact"]
def names_of(tokens, block_size):
    request = Request("demo", tokens, SamplingParams())
    extend_block_hashes(request, block_size)
    return request.block_hashes


six = tokenizer.encode("The capital of France is Paris")
for changed in range(6):
    others = [*six[:changed], 0, *six[changed + 1 :]]
    kept = [one == two for one, two in zip(names_of(six, 2), names_of(others, 2))]
    print(f"token {changed} changed:", ["same" if same else "other" for same in kept])

# %% [markdown]
# Token 3 changes block 1 and everything behind it, as it must: those keys and values are other ones. Looking up a prompt is
# then a walk along its names until the dictionary `cached` (name → block) has none. A name enters `cached` with the step that
# fills its block: others may share the block while its owner still runs. It needs no tree of prefixes (SGLang keeps one): the
# parent in each hash is the tree. Tokens do not always say it all, so vLLM hashes **extra keys** as well: which LoRA adapter,
# which image behind the placeholder tokens, and a salt, to which we will come.
#
# ## The free queue is the cache
#
# A request ends and its blocks have no holder. They are free; nobody has erased them. They stay in `cached` until they are
# handed out for something else, which is **eviction**. So there is no separate memory for the cache: it is whatever free
# blocks still contain (and those in use, which are safe), and it shrinks as requests take blocks.
#
# Which free block goes first? The one that has not been used for the longest time (**LRU**): freed blocks join a queue at the
# back and are taken from the front. And a hit takes its blocks out of the middle. Lesson 02 let you do that with an
# `OrderedDict`. The engine threads the queue through the blocks themselves, and so hashes nothing and allocates nothing:
#
# ```
#           next →                            remove(7):  3.next = 1, 1.prev = 3
#   head ⇄ 3 ⇄ 7 ⇄ 1 ⇄ tail
#           ← prev                            append(7):  between 1 and tail, four arrows
# ```
#
# `head` and `tail` are two blocks that are never handed out. Thanks to them, every block in the queue has two neighbours.

# %% tags=["exercise"]
@exercise("07.2", target="course_lib.core.block_pool:FreeBlockQueue")
class FreeQueue:
    """Free blocks, linked by their own attributes `prev` and `next`, which are None outside.

    num_blocks: how many are in it. Every operation takes the same time, however many that are.
    """

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
        """Put `block` at the back, before the tail."""
        #: solution
        last = self.tail.prev
        block.prev, block.next = last, self.tail
        last.next = self.tail.prev = block
        self.num_blocks += 1
        #: end

    def remove(self, block):
        """Take `block` out, wherever it is."""
        #: solution
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self.num_blocks -= 1
        #: end

    def popleft(self):
        """Take the block behind the head out, and return it. There is one."""
        #: solution
        first = self.head.next
        self.remove(first)
        return first
        #: end

# %% tags=["check"]
check("07.2")

# %% [markdown]
# ## Which end first?
#
# A request gives back all of its blocks at once. They join the queue one after the other: in what order?

# %%
predict("07.b")

# %% [markdown]
# Look at a cache of six blocks. A is *The capital of France is Paris*, B *The capital of Italy is Rome*, C has eight other tokens, and D is
# *The capital of Italy is Milan*. On the left a request gives back its last block first, on the right its first. To get the
# right side, one function is replaced:

# %%
honest_release = BlockPool.release


def release_from_the_front(pool, block_ids):
    honest_release(pool, reversed(list(block_ids)))


parts = {
    "A": ["The capital", " of France", " is Paris"],
    "B": ["The capital", " of Italy", " is Rome"],
    "C": ["Once upon", " a time", " there was", " a ship"],
    "D": ["The capital", " of Italy", " is Milan"],
}

# %%
left = watch_queue(parts, 6, tokenizer.encode)
with patch.object(BlockPool, "release", release_from_the_front):
    right = watch_queue(parts, 6, tokenizer.encode)
figure = draw_queues({"last block first": left[:-1], "first block first": right[:-1]})
show(figure, alt="The free queue after each event, in two columns. When C needs four of six "
     "blocks, what is left on the left is 'of Italy' and 'The capital', and D finds both. On the "
     "right 'of Italy' and 'is Rome' are left, and D finds nothing.")

# %% [markdown]
# When B begins, block 0 leaves the queue, on the left from its far end: *The capital* is found. When B ends, the block joins
# once more, on the left at the back. So what many requests share is renewed by each of them. Then C takes four of the six. Both columns keep two blocks
# of B. On the left it is a beginning, and D finds it. On the right they are *of Italy* and *is Rome*, whose parent is gone: a
# walk along the names ends before it starts, and the two lie there for nothing.
#
# Six blocks make a neat story. Now the pages: all 24 questions, in an order drawn once, at every size of the cache.
# (`replay` sends them through the engine's `KVCacheManager` without a model: what is found depends on tokens alone.)

# %%
mixed = [prompts[name] for name in random.Random(0).sample(list(prompts), 24)]
sizes = range(12, 64, 2)
kept_beginnings = [replay(mixed, size) for size in sizes]
with patch.object(BlockPool, "release", release_from_the_front):
    kept_ends = [replay(mixed, size) for size in sizes]
curves = {"last block first": kept_beginnings, "first block first": kept_ends}
show(draw_hit_rates(curves), alt="Share of tokens found over the size of the cache. Last block "
     "first: a line that rises with every block, to three quarters. First block first: never above "
     "it, in stairs about as wide as a page.")
for name, runs in curves.items():
    print(f"{name}: in 20 blocks {100 * runs[4].hit_rate:.0f} % found, {runs[4].num_evictions} evicted")
reveal("07.b")

# %% [markdown]
# The stairs are a page wide: without its first block, a page is lost as a whole. Freed from the end, it shrinks block by block
# and is of use until the last block is gone. One `reversed` decides it, in `KVCacheManager.free`, and in vLLM's.
#
# It does not save the readers of the beginning. They ask in turn, so LRU gives up exactly the page that comes next, and
# with 36 blocks all of it. For traffic that goes round in a circle LRU is the worst rule there is. For most other traffic it is
# hard to beat.
#
# ## Take it before somebody else does
#
# Finding a block and having it are two things. Between them the queue can give it away, as it lies there like any other.
# Say a new request finds blocks 0 and 1, and needs three more:
#
# | free queue | held | `num_free` | can it start? |
# |---|---|---|---|
# | `2 3 4` | 0, 1 by another request | 3 | yes: `[0, 1, 2, 3, 4]` |
# | `1 0 2 3 4` | – | 5 | yes: the two leave the queue, three are left |
# | `1 0 2 3` | – | 4 | **no**: four are free, but two of them are the ones it found |
#
# In the second row the order of doing matters as well. Who takes three blocks before the found ones have left the queue is
# handed 1, 0 and 2.

# %% tags=["exercise"]
@exercise("07.3", target="course_lib.core.kv_cache_manager:KVCacheManager.allocate_slots")
def take_over(pool, hit, needed):
    """A request's block table: the found blocks `hit`, then `needed` new ones. A list of ids.

    None if there are not enough blocks; then the pool must be as before. You may change the list `hit`.
    pool.num_free: blocks in the free queue; pool.is_free(id): nobody holds it, so it lies there;
    pool.share(ids): one more holder for each, and out of the queue; pool.allocate(n): the ids of n
    blocks from the front, whose contents are forgotten. It does not ask whether there are as many.
    """
    #: solution
    reserved = sum(pool.is_free(block_id) for block_id in hit)
    if needed > pool.num_free - reserved:
        return None
    pool.share(hit)
    return hit + pool.allocate(needed)
    #: end

# %% tags=["check"]
check("07.3")

# %% [markdown]
# ## Break it: wrong, or only bad
#
# You have seen one broken variant, the wrong end first. Here is another, by somebody in a hurry: it allocates before it
# shares, and counts found blocks as free.

# %%
honest_allocate = KVCacheManager.allocate_slots


def hasty_allocate(cache, request, num_new, hit=None):
    if not hit:
        return honest_allocate(cache, request, num_new)
    num_blocks = -(-request.num_tokens // 16)  # rounded up
    new = cache.pool.allocate(num_blocks - len(hit))  # first the new ones …
    cache.pool.share(hit)  # … then those that were found
    request.block_ids = [*hit, *new]
    request.num_computed_tokens = 16 * len(hit)
    request.num_registered_blocks = len(hit)  # blocks whose names are in `cached` already
    honest_allocate(cache, request, num_new)  # takes no more blocks; enters the others in `cached`
    return new


# %%
fog = (
    "A ship comes in from the open sea, in thick fog and at night. Her captain asks the pilot, "
    "who has the list above on his knees: how high is Tarn? Tarn is"
)
voyage = [prompts["Skerry"], prompts["Alder"], tokenizer.encode(pages["north"] + fog)]

# %%
predict("07.c")

# %%
with patch.object(KVCacheManager, "allocate_slots", hasty_allocate), limited(llm, num_blocks=22):
    for prompt in voyage:
        [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
print("the page:  ", light("Tarn").strip())
print("the answer:", output.outputs[0].text.strip())

# %% [markdown]
# The pilot reads a height off a page of which a part was overwritten with the question, and names another tower's. Nothing
# crashed. Both bugs, with the engine's own audit after every step:

# %%
def audit(owner, name, broken):
    try:
        with patch.object(owner, name, broken):
            with limited(llm, num_blocks=22, run_model=False, check_invariants=True):
                for prompt in voyage:
                    llm.generate(prompt, SamplingParams(max_tokens=3), use_tqdm=False)
        return "the books are in order"
    except AssertionError as error:
        return str(error).partition(": ")[2]

# %% tags=["exact"]
print("hasty:    ", audit(KVCacheManager, "allocate_slots", hasty_allocate))
print("wrong end:", audit(BlockPool, "release", release_from_the_front))
reveal("07.c")

# %% [markdown]
# Block 8 of the request's table bears the name of another place in the text. The wrong end breaks no rule: it costs hits, and
# only a count of hits finds it. The engine keeps such counts, as vLLM does, for all requests and for the last 1,000. For the
# readers of the beginning:

# %% tags=["exact"]
for blocks in (48, 36):
    with limited(llm, num_blocks=blocks, run_model=False):
        for prompt in in_turn:
            llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
        cache = llm.llm_engine.core.scheduler.kv_cache
        counts = f"{cache.stats.queried_tokens} tokens looked up, {cache.stats.hit_tokens} found"
        print(f"{blocks} blocks: {counts}, {cache.pool.num_evictions} blocks evicted")

# %% [markdown]
# Few hits with many evictions: that is what thrashing looks like on a dashboard.
#
# ## Twenty turns
#
# The other kind of traffic is a chat. Every turn sends the whole conversation again, so turn $t$ of $n_t$ tokens computes
# $n_t$ without a cache, and with one
#
# $$ n_t - S\left\lfloor n_{t-1} / S \right\rfloor $$
#
# tokens: the new ones, and at most $S - 1$ of a block that was not full. The sum over the turns is linear instead of
# quadratic.

# %%
def chat(names):
    """The prompts of a conversation about these lights, one for each turn."""
    turns, said = [], []
    for name in names:
        said = said + tokenizer.encode(f"Captain: how high is {name}?\nPilot:")
        turns.append(said)
        said = said + tokenizer.encode(f" {light(name)[2:].partition(',')[0]}.\n")
    return turns


lights = list(prompts)
turns = chat(lights[:20])
with_cache = ask(turns, 64)
alone = {t + 1: ask([turns[t]], 64)[0][1] for t in (0, 6, 13, 19)}

# %%
figure, axis = plt.subplots(figsize=(9, 2.8))
axis.plot(alone.keys(), alone.values(), "s", label="no cache")
axis.plot(range(1, 21), [seconds for _, seconds in with_cache], "o-", label="prefix caching")
axis.set(xlabel="turn of the chat", ylabel="s to the first token", xticks=[*alone])
axis.set_ylim(0, None)
axis.legend()
show(figure, alt="Seconds to the first token over twenty turns. Without a cache rising points, with "
     "one a flat line near the bottom.")

# %% tags=["exact"]
sent = [len(turn) for turn in turns]
theory = [n - 16 * (before // 16) for n, before in zip(sent, [0, *sent])]
computed = [n - found for n, (found, _) in zip(sent, with_cache)]
print(f"tokens sent: {sum(sent)}; computed: {sum(computed)}; as the formula says: {computed == theory}")

# %% [markdown]
# (The answers are written down here, to spare you the wait. Those that the engine generates are in the cache as well, provided
# the next prompt contains them *token for token*: tokenize the text anew, or drop the model's reasoning from the history, and
# the chain ends where they differ.)
#
# One chat needs its own length in blocks. Several that take turns need the sum of theirs, or thrash like the four readers;
# you will see four of them do it below.
#
# ## Who may share with whom
#
# The cache knows no users. Alice has sent a letter; Mallory has not seen it, but she can time her own first tokens, or read
# `num_cached_tokens`, and guess:

# %% tags=["exact"]
letter = "I am Alice. The PIN of my card is {}. Please block the card, for I have lost it."
alice = tokenizer.encode(letter.format("4711"))
for salts in (None, ["alice", "mallory"]):
    found = {}
    for pin in ("4709", "4710", "4711", "4712"):
        guess = tokenizer.encode(letter.format(pin))
        found[pin] = replay([alice, guess], 16, salts=salts).found_tokens[1]
    print(f"salts {salts}: tokens found by Mallory {found}")

# %% [markdown]
# A hit says: somebody wrote this. Gu et al. (2502.07776) found such sharing between users at seven providers. The remedy is
# one extra key: a **cache salt** in the first block's hash. Through the chain it is in every name that follows, so different
# salts never meet, on the same memory and with the same code:
# `llm.generate({"prompt": …, "cache_salt": "alice"})`. The name of a LoRA adapter enters in the same way.
#
# A hit must not lie, either. The engine compares names and never tokens, so two texts with one name would be served each
# other's keys and values. How hard is it to make such a text? You have a victim's name, its parent and the tokens of the
# vocabulary; names are short here.

# %% tags=["exercise"]
@exercise("07.4")
def forge(target, parent, block_size, vocab_size, name):
    """A block of `block_size` token ids, from 0 to vocab_size - 1, whose name is `target`: a list.

    name(parent, ids) gives a block's name, of few bits; which ids the victim had does not matter.
    """
    #: solution
    while True:
        ids = [random.randrange(vocab_size) for _ in range(block_size)]
        if name(parent, ids) == target:
            return ids
    #: end

# %% tags=["check"]
check("07.4")

# %% [markdown]
# What is it good for? A victim has sent a note to an engine that keeps two bytes of each hash, 16 bits. The attacker sends a
# block of nonsense with the name of the note's first block, and a question:

# %%
def short_hash(parent, tokens, extra_keys=()):
    return hash_block(parent, tokens, extra_keys)[:2]


note = tokenizer.encode("Note to self: the password for the lighthouse is swordfish. Do not lose it.")
nonsense, tries = find_forgery(note[:16], short_hash)
attack = nonsense + tokenizer.encode(" What is the password for the lighthouse? The password is")
print(f"{tries:,} blocks tried; there are {2**16:,} names. The forgery of the note's first block:")
print(repr(tokenizer.decode(nonsense)))

# %%
def answer_to_attack():
    with limited(llm):
        llm.generate(note, SamplingParams(max_tokens=1), use_tqdm=False)
        [output] = llm.generate(attack, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    return f"{output.num_cached_tokens} tokens found, answer {output.outputs[0].text!r}"


with patch("course_lib.core.prefix_hash.hash_block", short_hash):
    print("16 bits: ", answer_to_attack())
print("256 bits:", answer_to_attack())

# %% [markdown]
# No word of the attack contains the password. The model read it out of the victim's keys and values.
#
# Each bit doubles the work. vLLM used Python's own `hash` at first: 64 bits, not made to resist anybody, in a chain that began with
# `hash(None)`, a constant from Python 3.12 on (CVE-2025-25183). It offered SHA-256 from 0.8.3 on; its documents call that the
# default "as of v0.11". Somebody who tries a billion blocks a second since the beginning of the universe has not covered $2^{90}$ of $2^{256}$
# names. vLLM then put the price at 100 to 200 ns a token, a small fraction of what it takes to compute one.
#
# ## The order is yours
#
# Back to the four readers. In an offline batch nobody waits for one answer in particular, so you may choose who goes first.
# Ask both questions about a page one after the other, and the cache has to remember a single page. That is **cache-aware
# ordering**.
#
# What begins alike has the same names at the front of its chain. So the requests form a tree, and the best order walks it
# depth first: finish a branch before you begin the next. (SGLang's paper proves that no order has more hits, if the
# longest request fits.) Of two branches, the one that somebody asked for first goes first. With chains written as letters:
#
# | request | chain: system prompt, page, question | order |
# |---|---|---|
# | 0 | `s`, `sa`, `sax` | first |
# | 1 | `s`, `sb`, `sby` | third |
# | 2 | `s`, `sa`, `saz` | second, with 0 |

# %% tags=["exercise"]
@exercise("07.5")
def group(chains):
    """The order in which to serve requests: a list of their numbers, 0 for the one that came first.

    chains: of each request, in the order of arrival, the list of its blocks' names (possibly empty).
    Equal names stand for equal beginnings. At every depth, requests that begin alike stay together,
    and of two branches the one whose first request came first goes first; a request whose chain
    ends is a branch of its own. [[s, sa, sax], [s, sb, sby], [s, sa, saz]]: [0, 2, 1].
    """
    #: solution
    first = {}
    for i, names in enumerate(chains):
        for name in names:
            first.setdefault(name, i)
    return sorted(range(len(chains)), key=lambda i: [first[name] for name in chains[i]] + [i])
    #: end

# %% tags=["check"]
check("07.5")

# %% [markdown]
# There is a shortcut if you do not care who came first: `sorted(prompts)`. Lists of tokens in dictionary order are such a walk.
# The eight requests from the beginning, in a cache with room for one prompt and not much more:

# %%
together = ask(sorted(in_turn), 13)
runs = {"in turn, 48 blocks": roomy, "in turn, 36 blocks": tight, "together, 13 blocks": together}
total = sum(map(len, in_turn))
for name, run in runs.items():
    tokens = total - sum(found for found, _ in run)
    print(f"{name:20} {tokens:5} tokens computed, {sum(seconds for _, seconds in run):5.1f} s")

# %% [markdown]
# Thirteen blocks do what 48 did. (The tokens are exact. The seconds are those of your machine, and should follow, a little
# less steeply: each step has a fixed part besides what its tokens cost.)
#
# A server has no batch to sort. It can pick, from those who wait, the one with the longest prefix in the cache; that is
# nearly the same walk, and unfair: a page that only one reader wants may wait for ever. It pays more to choose the *machine*.
# With eight engines behind a balancer, the balancer decides which of them gets to see a page. So engines report what they
# store and evict (`kv_events.py`), and a router sends a request where its beginning is.
#
# ## All of it in one picture
#
# Four chats of twenty turns, which take turns, or the 24 questions; as they come, or put together; without salts, with a
# salt for each of two companies (the even and the odd numbers of those who ask), or for each who asks. On the right, one bar for each request.

# %%
chats = [chat(lights[6 * i :] + lights[: 6 * i])[:20] for i in range(4)]
traffic = {  # (prompt, who asks), in the order in which they come
    "4 chats": [(chats[i][t], i) for t in range(20) for i in range(4)],
    "24 questions": [(prompt, i) for i, prompt in enumerate(mixed)],
}
explore_hits(sweep(traffic, range(28, 120, 4)), ("requests", "order", "salts"), start=60)

# %% [markdown]
# This is the picture to remember. For eleven turns all is well in 60 blocks. Then the four chats together outgrow them, and
# four turns later nothing is found any more: every token of every turn is computed, for the same users on the same machine.
#
# Two things to try. *4 chats, a salt each*: nothing is lost, since strangers' chats have nothing in common. *24 questions, a
# salt each*: nothing is found. Isolation costs exactly what sharing brought.
#
# With your code in the engine:

# %%
with my_code():
    yours = replay(mixed, 20)
print(f"{100 * yours.hit_rate:.0f} % found in 20 blocks")

# %% [markdown]
# ## How vLLM does it
#
# One word first. Two requests that compute the same block at the same time leave *twins*, two blocks of equal content: a block
# table is append-only, and merging would change one under a running step.
#
# | here | in vLLM 0.32 | what differs there |
# |---|---|---|
# | `prefix_hash.py`, `extend_block_hashes` | `vllm/v1/core/kv_cache_utils.py`, `hash_block_tokens` | hashes a pickle, or CBOR to agree across languages; also xxHash; in 0.32 that alone has a secret random root |
# | `FreeBlockQueue` | the same file, `FreeKVCacheBlockQueue` | takes and appends several at a time |
# | `cached`: first twin wins | `vllm/v1/core/block_pool.py`, `BlockHashToBlockMap` | keeps every twin, so one may be evicted and the other found |
# | `release` | the same, `free_blocks` | a block without a name goes to the *front*: nobody can ever find it |
# | reserved hits | `single_type_kv_cache_manager.py`, `_get_num_evictable_blocks` | one manager per kind of layer |
# | `get_computed_blocks` | `kv_cache_coordinator.py`, `find_longest_cache_hit` | a sliding window needs only its last blocks; the kinds must agree |
# | `prefix_cache_stats.py` | `vllm/v1/metrics/stats.py`, `PrefixCacheStats` | Prometheus counters `vllm:prefix_cache_queries`, `vllm:prefix_cache_hits` |
#
# vLLM serves in order of arrival or priority; it leaves ordering by prefix to you and to
# routers. The old engine kept an evictor of its own with times of access (`vllm/core/evictor.py` in 0.8.5). The queue needs no
# clock: position is time.
#
# ## Recap
#
# - A chain of hashes gives each full block a name for all that came before; one dictionary finds any prefix.
# - The cache is what free blocks still contain. Its policy is the order of a queue.
# - Blocks are given back from the end, so that what is left of a text is its beginning.
# - A found block must be reserved and taken out of the queue before anything is allocated.
# - LRU fails all at once when a working set that is asked for in turn does not fit. Order, salts and routing decide what
#   the working set is.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *A prompt has 40 tokens, blocks of 16, and token 20 changes. What is found?* Block 0: 16 tokens.
# 2. *Why is the free queue not a `deque`?* A hit takes blocks out of the middle, which a deque can do only by walking.
# 3. *`num_free` is 10, a request finds 6 blocks, 4 of them free, and needs 7 more. Can it start?* No: six are left for it.
# 4. *A system prompt is shared by everybody. Can it be evicted?* Not while anybody holds it. After that it waits behind all that
#    was freed before, and each request that uses it sends it to the back again.
# 5. *Hit rate 4 %, and the cache always full. Which two numbers do you look at next?* Evictions, and the size of the working set:
#    what is asked for between two uses of the same prefix.
#
# </details>
#
# To read: vLLM's design document *Automatic Prefix Caching* (`docs/design/prefix_caching.md`); Zheng et al., *SGLang*
# (2312.07104), section 3, for RadixAttention and its order; Gu et al. (2502.07776) on what a cache's timing gives away.
#
# **Next: 08, EAGLE.** A prompt that is in the cache costs nearly nothing. What is left is decoding, a token per step. Can a step
# give more than one?
