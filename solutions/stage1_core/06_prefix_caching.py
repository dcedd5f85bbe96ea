# ---
# jupyter:
#   course:
#     lesson: "06"
#     objectives:
#       - Say which keys and values a new request may take over from an old one, and which it may not
#       - Let block tables share blocks, and say why only full ones and why a token is always left
#       - Write attention for a prompt that starts in the middle, over keys that somebody else computed
#       - Tell from a picture of wrong keys which rule of sharing was broken
#       - Measure what a cached prefix saves, and know when it saves nothing
#     difficulty: 3
#     needs: ["01", "02", "03"]
#     opens:
#       - course_lib/core/kv_cache_manager.py
#       - course_lib/core/block_pool.py
#       - course_lib/attention/torch_paged.py
#     terms:
#       prefix caching: Keeping the keys and values of a text's beginning for later requests that begin with the same tokens.
#       prefix hit: The leading tokens of a new request whose blocks are in the cache already; they are not computed again.
#       common prefix: The tokens that two texts share from the first token on, up to the first that differs.
#       copy-on-write: Sharing a block until somebody wants to write to it, who then gets a copy; not needed where only full blocks are shared.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## The same letter, four times
#
# Little of what a server reads is a question. In front of it stand the instructions, the manual, the documents found by a
# search, the conversation up to here, and most of that was there the last time, too. In vLLM's example for this lesson a
# school principal has to choose staff, and four prompts of a few words stand behind the same long letter. Here is one of
# that kind.

# %%
import torch

from course_lib import SamplingParams
from course_lib.teaching import check, course_llm, exercise, explore_blocks, hint
from course_lib.teaching import my_code, predict, record, reveal, show, solution
from course_lib.teaching.explorers import prefixes
from course_lib.teaching.recording.scheduling import limited, serve, total_tokens

llm = course_llm()
tokenizer = llm.get_tokenizer()

# %%
LETTER = """You are the principal of Harbour School, a small school by the sea with 340 pupils and 29
teachers, and you are looking for a new head of mathematics. The board meets on Thursday. What the
school needs is known: somebody who can teach the youngest pupils and the oldest, who will stay for
longer than two years, and who can lead a department of five without a quarrel. There are three
candidates. Ana Ferreira has taught for twelve years, eight of them at a large school in the city; her
pupils do well, and she asks for fewer lessons. Tom Okafor is here already, is liked by everybody, and
has never led anything larger than the chess club. Ingrid Solberg has a doctorate, three years of
experience, and many ideas about how examinations could be abolished. Two rules are to be kept. Every
pupil is taught by at least two teachers in the course of a year, so that nobody depends on one
person's way of explaining. And no test is given back later than a week after it was written. Write as
you would speak to the board, in full sentences. Say what speaks against a candidate as clearly as
what speaks for them. Do not invent facts that are not in this letter; where something is not known,
say so. """.replace("\n", " ")

# %% [markdown]
# The four prompts go in one after the other, and `enable_prefix_caching=False` makes the engine do what lessons 01 to 03
# know: a request computes its prompt. How long does each wait for its first token?

# %%
questions = ["Hello, my name is", "The president of the United States is",
             "The capital of France is", "The future of AI is"]
prompts = [tokenizer.encode(LETTER + question) for question in questions]


# %%
def ask(prompts, **limits):
    """Each prompt when the one before is done, one token of an answer for each: the trace."""
    params = SamplingParams(temperature=0, max_tokens=1)
    with limited(llm, **limits), record(llm) as trace:
        for prompt in prompts:
            llm.generate([prompt], params, use_tqdm=False)
    return trace


# %%
trace = ask(prompts, enable_prefix_caching=False)
for question, request in zip(questions, trace.requests.values()):
    print(f"{request.ttft:.2f} s for {request.num_prompt_tokens} tokens: …{question}")
print(f"{total_tokens(trace)} tokens computed")

# %% [markdown]
# A question has five to seven tokens, and whoever asked it waits for the 264 of the letter in front, which the engine read a
# moment ago. When it had read them, their keys and values were in the cache. Then the request ended, and its blocks went
# back to the pool with everything in them.
#
# May the next request have them? That the *text* is the same is not enough. The *numbers* must be: when are they?
#
# ## What a key knows
#
# Here are twelve tokens. Their keys are computed thirteen times: as they are, and with one token after the other replaced by
# *seven*. `prefixes.keys_of` reads the keys where the engine keeps them, in the blocks of all 30 layers. (Values behave the
# same way; both are made of the same vector.)

# %%
words = tokenizer.encode("The capital of France is Paris, the capital of Italy is Rome")[:12]
[seven] = tokenizer.encode(" seven")
variants = [[*words[:i], seven, *words[i + 1 :]] for i in range(len(words))]
own_keys, *others = prefixes.keys_of(llm, [words, *variants])
changes = torch.stack([prefixes.difference(keys, own_keys) for keys in others])
pieces = [tokenizer.decode([token_id]) for token_id in words]
prefixes.explore_change(pieces, changes, block_size=4, start=5)

# %% [markdown]
# Move the slider. Three things hold wherever it stands.
#
# - **To the left nothing changes**, in no layer. Attention looks back, never ahead.
# - **In layer 0 only the replaced token changes.** A key of layer 0 is made of a token and its position.
# - **Above, everything to the right changes.** From layer 1 on, a token's vector contains what attention brought it from
#   the tokens before. On the whole it pales with the distance and deepens with the
#   layers; it never becomes white.
#
# In a formula: for texts $x$ and $y$, every layer $\ell$ and position $p$,
#
# $$ x_0 \dots x_p = y_0 \dots y_p \quad\Longrightarrow\quad k^{(\ell)}_p(x) = k^{(\ell)}_p(y), \;\; v^{(\ell)}_p(x) = v^{(\ell)}_p(y), $$
#
# and you have seen that the left side is needed in full. A key belongs to a token *in its place, with everything before
# it*. The same paragraph in the middle of two texts has two sets of keys. At the beginning of two texts it has one. What can
# be reused is a **common prefix**, and nothing else.
#
# ## Whole blocks, and one token less
#
# The cache hands out blocks, so prefixes are shared in blocks: a second table names the same block, and a reference count
# says that two hold it (lesson 02). Take blocks of four. The six tokens of *The capital of France is Paris* lie in blocks 7 and 2,
# and new prompts come:
#
# | new prompt | tokens in common | taken over | computed |
# |---|---|---|---|
# | `The capital of France is Paris` | 6 | 4, block 7 | `is Paris` |
# | `The capital of France was Lyon` | 4 | 4, block 7 | `was Lyon` |
# | `The capital of Italy is Rome` | 3 | 0 | all six |
#
# Why not block 2 in the first row? It is half empty, and its owner's next token goes into the third slot. So does the new
# request's, and they may well be different tokens. A **full** block is never written to again, by anybody. It can have any
# number of readers, without a lock and without a copy.
#
# There is a third rule. Suppose that all eight tokens of a prompt are cached, two full blocks. Then every key and every value
# is there, and the engine still cannot say what comes next: the next token is read off the *last token's row* after layer 29,
# and a row exists only while somebody computes it. At least one token has to go through the model. Its key must not be
# written to a shared block, so the last block as a whole is computed again, in a block of its own. With $n$ tokens in the
# prompt, $c$ of them in common, and blocks of $S$, the **prefix hit** has
#
# $$ \left\lfloor \frac{\min(c,\; n-1)}{S} \right\rfloor \cdot S \quad\text{tokens.} $$

# %% tags=["exercise"]
@exercise("06.1", target="course_lib.core.kv_cache_manager:KVCacheManager.get_computed_blocks")
def reusable(prompt, cached, block_size):
    """How many tokens of `prompt` need not be computed: an int, a multiple of block_size.

    prompt, cached: lists of token ids; of `cached`, all keys and values are in the cache, from slot 0
    of its first block on. prompt has at least one token, cached may be empty.
    With [1, 2, 3, 4, 5, 6, 7, 8] cached, blocks of 4: the same prompt takes over 4 tokens,
    [1, 2, 3, 4, 5, 6, 7, 8, 9] takes over 8, [1, 2, 9, 4, 5, 6] none.
    """
    #: solution
    same = 0
    for one, other in zip(prompt, cached):
        if one != other:
            break
        same += 1
    return min(same, len(prompt) - 1) // block_size * block_size
    #: end

# %% tags=["check"]
check("06.1")

# %% [markdown]
# The rule has a consequence that costs somebody money every day:

# %%
predict("06.a")

# %% [markdown]
# The scheduler needs no model to answer that (`run_model=False`), and no seconds:

# %% tags=["exact"]
clocks = [f"It is 14:0{minute}. " for minute in range(4)]
for place, text in (("in front of", "{clock}{letter}{end}"), ("behind", "{letter}{clock}{end}")):
    texts = [text.format(clock=clock, letter=LETTER, end=questions[0]) for clock in clocks]
    rehearsal = ask(map(tokenizer.encode, texts), enable_prefix_caching=True, run_model=False)
    found = [request.num_cached_tokens for request in rehearsal.requests.values()]
    print(f"the time {place} the letter: {found} tokens found")

# %%
reveal("06.a")

# %% [markdown]
# A user's name in the greeting, a request id, a list of tools in the order of a hash map: any of these at the top of a
# prompt turns the cache off, and nothing says so but the bill. What varies goes last.
#
# ## One block in many tables
#
# Now all tables at once. Prompts come one by one, nobody leaves, and blocks are numbered in the order in which they are
# taken. Paris, Lyon and Rome from above make `[[0, 1], [0, 2], [3, 4]]`. To find a block to share, you have to decide when two
# blocks hold the same keys, and that is the question of the last section again: not when their *own* tokens are equal.

# %% tags=["exercise"]
@exercise("06.2")
def block_tables(prompts, block_size):
    """The block table of each prompt: a list of lists of block numbers.

    prompts: lists of token ids, at least one each. They come in this order, and each shares all it may
    with those before it (of equal blocks, the oldest); its other blocks get the next free numbers,
    from 0 on. At least one token of a prompt is in a block of its own.
    Blocks of 4: [[1,2,3,4,5,6,7,8], [1,2,3,4,5,6,7,8], [1,2,3,4,5,6,7,8,9]] -> [[0,1], [0,2], [0,1,3]].
    """
    #: solution
    tables, known, taken = [], {}, 0
    for tokens in prompts:
        table = []
        for end in range(block_size, len(tokens) + block_size, block_size):
            text = tuple(tokens[:end])  # a block is known by all that stands up to its end
            if end < len(tokens) and text in known:
                table.append(known[text])
                continue
            if end <= len(tokens):
                known.setdefault(text, taken)
            table.append(taken)
            taken += 1
        tables.append(table)
    return tables
    #: end

# %% tags=["check"]
check("06.2")

# %% [markdown]
# If you used the whole text up to a block's end as the key of a dict, you are right, and slow: a prompt of 8,000 tokens
# builds 500 such keys, 2 million tokens to compare. Lesson 07 gets that down to 16 tokens a block.
#
# The engine's tables for the four letters, all in one step:

# %%
def together(**limits):
    """All four prompts in one call, as in vLLM's example, without the model: the trace."""
    with limited(llm, run_model=False, **limits), record(llm) as trace:
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    return trace


# %%
apart = together(num_blocks=96, enable_prefix_caching=False)
shared = together(num_blocks=32, enable_prefix_caching=True)
for name, one in (("without", apart), ("with", shared)):
    blocks = {block for table in one.steps[0].block_tables.values() for block in table}
    mib = len(blocks) * 16 * 46080 / 2**20  # 46,080 bytes a token: lesson 01
    print(f"{name} sharing: {len(blocks)} blocks, {mib:.0f} MiB")
explore_blocks(shared)

# %% [markdown]
# Sixteen blocks have four holders, and each request adds one for its last tokens. That is the second gain, apart from the
# time: the letter is in memory *once*, so more requests fit in the cache at the same time.
#
# Look at what happened there, though. All four requests are in step 0. The second, third and fourth hold blocks that the
# first is going to fill *in the same step*. And that spoils an experiment:

# %%
predict("06.b")

# %% tags=["exact"]
print("the baseline, as the example builds it:", total_tokens(together()), "tokens")
print("enable_prefix_caching=True:            ", total_tokens(together(enable_prefix_caching=True)))
print("enable_prefix_caching=False:           ", total_tokens(together(enable_prefix_caching=False)))

# %%
reveal("06.b")

# %% [markdown]
# ## Attention that starts in the middle
#
# A table begins with blocks that others have filled, then, and the request computes the rest of its prompt. To most of a
# layer that is nothing new: a token's row is multiplied by weights, whatever stands before it. Attention is the exception,
# with few queries now and many keys.

# %%
figure = prefixes.draw_triangle(pieces[:6], start=4, block_size=4)
show(figure, alt="Two triangles of queries against keys for six tokens. Left all 21 cells, right, from "
     "token 4 on, only the two bottom rows; the rows above are dotted.")

# %% [markdown]
# It is the same triangle, without its upper rows. Nobody needs their results again: what *later* tokens want of those
# tokens are keys and values, the columns. So a prefill has its `num_tokens - start` rows to send through the weights, and in
# each layer and head a number of pairs, query and key, to look at. How many?

# %% tags=["exercise"]
@exercise("06.3")
def prefill_work(num_tokens, start):
    """(rows, looks) of a prompt of `num_tokens` tokens of which the first `start` are in the cache.

    rows: tokens that are computed; looks: pairs (query, key) in which the key is not behind the query.
    Both ints. prefill_work(6, 0) is (6, 21), prefill_work(6, 4) is (2, 11).
    """
    #: solution
    rows = num_tokens - start
    looks = num_tokens * (num_tokens + 1) // 2 - start * (start + 1) // 2
    return rows, looks
    #: end

# %% tags=["check"]
check("06.3")

# %% [markdown]
# A hit of 90 % leaves a tenth of the rows and nearly a fifth of the looks, since the triangle is thinnest at the top. Which of
# the two matters depends on the length. For this model a row costs 212 million operations (two for each weight of the
# layers; the vocabulary's matrix is used for the last row only), a look 69,120 in all heads and layers. At 269 tokens the
# looks are 4 % of the work. At 8,192 they are 57 % of it, and a hit of 90 % leaves 15 % of the work, not 10.
#
# Now write it. One layer's cache is an array `[blocks, BS, Hkv, D]` for keys and one for values. The chunk's own keys and
# values go in first, and then its queries look at all that the table points to, up to their own positions. (Write, then
# read: that is why a request may share blocks which the same step is filling. In each layer all new keys are in place
# before any query looks.) For query head $h$ of the token at position $p$, with $g = \lfloor h \cdot H_{kv} / H \rfloor$:
#
# $$ o_{p,h} = \sum_{j \le p} w_j \, v_{\text{slot}(j),\,g}, \qquad w = \operatorname{softmax}_{j \le p}\big(\text{scale} \cdot q_{p,h} \cdot k_{\text{slot}(j),\,g}\big),
#    \qquad p = \text{start}, \dots, \text{start} + n - 1 . $$

# %% tags=["exercise"]
@exercise("06.4", target="course_lib.attention.torch_paged:TorchPagedBackend._prefill")
def attend_chunk(query, key, value, key_cache, value_cache, table, start, scale):
    """Attention of the tokens at positions start … start + n - 1 of one request: float32 [n, H, D].

    query: [n, H, D]; key, value: [n, Hkv, D], the chunk's own, to be written to the caches in place;
    key_cache, value_cache: [blocks, BS, Hkv, D], not contiguous: index them [blocks, offsets];
    table: int64 [M], the request's blocks, enough for all its tokens; those before `start` are in the
    cache. Query head h reads KV head h // (H // Hkv). start 4, n 2: two rows, with 5 and 6 keys.
    """
    #: solution
    num_new, (block_size, kv_heads) = len(query), key_cache.shape[1:3]
    positions = torch.arange(start, start + num_new)
    place = table[positions // block_size], positions % block_size
    key_cache[place], value_cache[place] = key, value
    keys, values = (cache[table].flatten(0, 1)[: start + num_new] for cache in (key_cache, value_cache))
    grouped = query.unflatten(1, (kv_heads, -1))  # [n, Hkv, G, D]
    scores = torch.einsum("nkgd,lkd->kgnl", grouped, keys) * scale
    hidden = torch.arange(len(keys)) > positions[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgnl,lkd->nkgd", weights, values).flatten(1, 2)
    #: end

# %% tags=["check"]
check("06.4")

# %% [markdown]
# The function does not know why the tokens before `start` are in the cache. Somebody else may have computed them, or the same
# request a step ago: this is also how a prompt that is cut in pieces continues, and with `n` = 1 it is a decode step.
#
# ## Break it: two suspects
#
# Each suspect is somebody's improvement. **Suspect 1** also shares a last block that is not full yet, if its first token
# fits: why compute those few again?

# %%
from course_lib.core.kv_cache_manager import KVCacheManager

honest_slots, guests = KVCacheManager.allocate_slots, []


def half_filled_too(kv_cache, request, num_new, hit=None):
    new_blocks = honest_slots(kv_cache, request, num_new, hit)
    last, text = len(request.block_ids) - 1, request.token_ids
    for other in guests:
        if request not in guests and other.token_ids[: 16 * last + 1] == text[: 16 * last + 1]:
            kv_cache.pool.release(request.block_ids[last:])
            kv_cache.pool.share(other.block_ids[last : last + 1])
            request.block_ids[last:] = other.block_ids[last : last + 1]
    guests.append(request)
    return new_blocks


# %% [markdown]
# Two people write home, one from Paris and, a step later, one from Moscow. `examine` serves them, compares the keys that
# one of them reads with the keys of the same text alone, and asks `check_invariants` after every step.

# %%
from contextlib import nullcontext
from unittest.mock import patch

START = "A traveller writes a long letter to a friend at home. She has been in {}"


def letters(text, *cities):
    """One letter from each city, a step after the one before, 8 tokens to write."""
    return [(i, tokenizer.encode((START + text).format(city)), 8) for i, city in enumerate(cities)]


# %%
jobs = letters(", where she went first of all to the", "Paris", "Moscow")
honest = prefixes.examine(llm, jobs, which=0, bug=nullcontext())
suspect = patch.object(KVCacheManager, "allocate_slots", half_filled_too)
first = prefixes.examine(llm, jobs, which=0, bug=suspect)
for name, one in (("honest", honest), ("suspect 1", first)):
    print(f"{name}: in Paris, where she went first of all to the{one.texts[0]}")
print("check_invariants:", first.books)

# %% [markdown]
# She left for Russia in the middle of a sentence, because somebody else's words are in her block. The generation ended as
# if all were well. The books, the engine's own lists of its blocks, noticed in the end: when block 1 was full, both requests
# entered it in the index of what is cached, so one entry names other tokens than the block is known by. A shorter answer
# would have got away with it.
#
# **Suspect 2** is finer. The engine knows a full block by a hash of two things: the hash of the block before it (32 bytes)
# and its own tokens. The suspect leaves out the first part, so that more blocks are found. Three letters: Paris, Moscow,
# and the very same prompt from Moscow once more.

# %%
from hashlib import sha256

own_tokens_only = patch("course_lib.core.prefix_hash.sha256", lambda content: sha256(content[32:]))
jobs = letters(
    " for three weeks, and she tells of the people whom she met there, of the houses and streets, of "
    "the food in the evening and of the language which she cannot speak yet. On the first day she went "
    "to see the famous", "Paris", "Moscow", "Moscow")  # fmt: skip
second = prefixes.examine(llm, jobs, which=2, bug=own_tokens_only)
for city, text in zip(("Paris", "Moscow", "Moscow"), second.texts):
    print(f"from {city}: …to see the famous{text}")
print("check_invariants:", second.books)

# %% [markdown]
# One prompt, temperature 0, two letters, and the second has been to a café that belongs to Paris. The word *Moscow* is
# in block 1. When the second letter came, that block was new and the lookup stopped there. The third letter found it, and
# behind it blocks 2 and 3, whose first owner was in Paris. So the bug needs three requests to show, and the books are in
# order throughout.

# %%
predict("06.c")

# %%
found = {"1: the half-filled block too": first.wrong, "2: by its own tokens": second.wrong}
show(prefixes.draw_wrong_keys(found, block_size=16),
     alt="Layers against positions, coloured where keys are not the request's own. Suspect 1: from "
     "position 17, inside a block, on; also in layer 0, in some columns. Suspect 2: from position 32, "
     "a block border, on; layer 0 is clean.")
reveal("06.c")

# %% [markdown]
# Read such a picture from the bottom. Colour in layer 0: the *tokens* are not yours, somebody wrote where you read. (The
# columns without any are words that the two letters have in common.) A clean layer 0 with colour above: the tokens are yours
# and their *past* is not. (From position 64 on the third letter computed its keys itself. They go wrong one layer later, in
# layer 2, since what they looked at in layer 0 was right.) Where it begins matters as well. At a border, a wrong block was
# taken. Inside a block, somebody wrote to a right one.
#
# ## Measure it
#
# The four letters once more, with and without.

# %%
runs = {"not cached": ask(prompts, enable_prefix_caching=False),
        "cached": ask(prompts, enable_prefix_caching=True)}  # fmt: skip
show(prefixes.draw_waits(runs),
     alt="Bars for four prompts. Not cached: about 270 tokens, and the same wait for each. Cached: the "
     "first prompt as before, the others 13 to 15 tokens and a small part of the wait.")

# %%
def later(trace):
    """Of all prompts but the first: tokens computed, seconds to the first tokens."""
    [_, *steps], [_, *requests] = trace.steps, trace.requests.values()
    return sum(sum(step.scheduled.values()) for step in steps), sum(one.ttft for one in requests)


(rows, seconds), (fewer, sooner) = map(later, runs.values())
print(f"the second to fourth prompt: {rows / fewer:.0f} times fewer tokens, "
      f"the first token {seconds / sooner:.1f} times sooner")

# %% [markdown]
# Why not twenty times sooner? A step pays for a trip of the weights however few tokens it has, so the wait goes down to
# that of a decode step and no further. If a prompt of one token waits $T_0$ and one of $n$ tokens $T$, a hit
# of $h$ should leave about $T_0 + (T - T_0)\,(n-h)/n$. Prompts of 320 tokens, with 0 to 90 % of them in the cache:

# %%
base = list(range(1000, 1320))  # which tokens they are does not matter for the time
hits = [0, 80, 160, 240, 288]
mixed = [[*base[:hit], 2000 + repeat, *base[hit + 1 :]] for repeat in (0, 1) for hit in hits]
trace = ask([base, *mixed[1:], [7], [8]], enable_prefix_caching=True)
found = [request.num_cached_tokens for request in trace.requests.values()]
print("tokens found:", found[:5], found[5:10])

# %%
wait = [request.ttft for request in trace.requests.values()]
measured = [min(pair) for pair in zip(wait[:5], wait[5:10])]
floor = min(wait[-2:])
theory = [floor + (measured[0] - floor) * (320 - hit) / 320 for hit in hits]
show(prefixes.draw_hits([hit / 320 for hit in hits], measured, theory),
     alt="Seconds to the first token against the cached share of a prompt: points that fall from left "
     "to right, close to a straight dashed line.")
print(f"90 % in the cache: the first token comes {measured[0] / measured[-1]:.1f} times sooner")

# %% [markdown]
# What does it cost when nothing hits? Every full block is hashed and looked up. Prompts of 4,096 tokens, all different, and the
# time that the scheduler takes for each:

# %%
strangers = [(i, [i, *range(1000, 5095)], 1) for i in range(5)]
spent = {}
for caching in (False, True):
    _, trace = serve(llm, strangers, enable_prefix_caching=caching, run_model=False,
                     max_num_batched_tokens=4096)
    spent[caching] = min(step.schedule_s for step in trace.steps)
lookup = (spent[True] - spent[False]) / 256
compute = 16 * (measured[0] - floor) / 320
print(f"a block costs {1e6 * lookup:.1f} µs to look up and {1000 * compute:.0f} ms to compute")
print(f"one found for {compute / lookup:,.0f} looked up pays for the search")

# %% [markdown]
# That is where it breaks even, and why nobody asks you before switching it on. On a GPU that prefills 50,000 tokens a second
# a block takes 320 µs, and one hit in a hundred lookups would still pay. vLLM's authors lost less than 1 % of their throughput
# when nothing hit at all (their blog on V1, January 2025).
#
# And what does it not do? It shortens the way to the first token, and not the way from one token to the next. The question about
# France, with an answer of 16 tokens:

# %%
def answer(caching):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
    with limited(llm, enable_prefix_caching=caching), record(llm) as trace:
        if caching:  # there must be something in the cache
            llm.generate([prompts[0]], SamplingParams(max_tokens=1), use_tqdm=False)
        [output] = llm.generate([prompts[2]], params, use_tqdm=False)
    [*_, request] = trace.requests.values()
    return request, output.outputs[0]


# %%
(slow, plain), (quick, cached) = answer(False), answer(True)
print(f"first token {slow.ttft / quick.ttft:.1f} times sooner, "
      f"the whole answer {slow.total / quick.total:.1f} times")
off_by = abs(plain.cumulative_logprob - cached.cumulative_logprob)
print(f"the same tokens: {plain.token_ids == cached.token_ids}")
print(f"their log-probabilities differ by {off_by:.0e}")

# %% [markdown]
# The log-probabilities agree, or differ by a rounding: a library may add up 13 rows in another order than 269, and on a GPU
# it usually does. Where two tokens are that close, a cached and an uncached run can part without anything being wrong. A test of
# caching therefore compares numbers within a tolerance, and not only texts.
#
# With your own parts in the engine:

# %%
with my_code():
    print(total_tokens(ask(prompts, enable_prefix_caching=True)), "tokens computed")

# %% [markdown]
# ## How vLLM does it
#
# | here | in vLLM | what differs there |
# |---|---|---|
# | `core/kv_cache_manager.py`, `get_computed_blocks` | the same name in `vllm/v1/core/kv_cache_manager.py` | asks a coordinator (`kv_cache_coordinator.py`), since layers with a sliding window have rules of their own |
# | the token that is left | there, `max_cache_hit_length` | the same block is computed again; a comment calls it room for improvement |
# | `core/block_pool.py` | `vllm/v1/core/block_pool.py` | the same idea; lesson 07 |
# | `attention/torch_paged.py` | `vllm/v1/attention/backends/flash_attn.py` | FlashAttention reads the table and aligns its triangle at the lower right; torch's `is_causal=True` does at the upper left |
# | a layer's cache: `[blocks, Hkv, BS, D]`, twice | `vllm/v1/worker/gpu/attn_utils.py` | the backend decides; for FlashAttention in 0.8.5 `[2, blocks, BS, Hkv, D]` |
# | block tables | `vllm/v1/worker/gpu/block_table.py` | kept on the GPU |
#
# vLLM's first engine did share half-filled blocks, between the answers to one prompt. The first of them to write got a copy
# (**copy-on-write**), and copying was the work of `vllm/worker/cache_engine.py`, which is gone. In 0.32 both are back for
# models that mix attention with Mamba layers: a part of a block can be found (`cache_partial_block`), and who finds it gets
# a copy. SGLang's RadixAttention keeps a tree of texts instead, and can share up to the very token.
#
# By default one kind of request takes nothing over, there or here: who wants `prompt_logprobs` needs the rows of *all*
# tokens. So does pooling over all tokens in 0.32, where `skip_reading_prefix_cache` overrides the default.
#
# ## Recap
#
# - A key is a function of all tokens up to its own. Texts share keys as far as they share their beginning.
# - Full blocks are never written to again, so any number of tables may name them.
# - One token is always computed, since logits come from a row, and with it its block.
# - Attention from the middle is the lower part of the same triangle: write the new keys, then look back through the table.
# - A hit saves prefill, down to the price of one step; a miss costs microseconds; answers do not come faster.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *Blocks of 16, a prompt of 64 tokens, all cached. How many are computed?* 16: with 64 taken over nothing would be left.
# 2. *Two prompts differ in token 20 and agree in tokens 21 to 2,000. What is shared?* 16 tokens, the first block.
# 3. *Why is layer 0 right even in a block with the wrong past?* Its keys are made of tokens and positions, before any
#    attention.
# 4. *A benchmark sends the same prompt ten times to measure prefill. What does it measure?* One prefill and nine hits.
# 5. *Eight requests with a common prefix of 4,000 tokens run together. What does sharing save, apart from time?* The
#    memory of seven copies, 1.2 GiB here.
#
# </details>
#
# To read: Zheng et al., *SGLang* (2312.07104), section 3, on RadixAttention; Yao et al., *CacheBlend* (2405.16444), on what it takes
# to reuse text that is *not* at the beginning: compute again the tokens whose keys the missing past would change most.
#
# **Next: 07, automatic prefix caching.** How to find a block among thousands by what it holds, which to forget when the
# memory is full, and what a conversation gains from it turn by turn.
