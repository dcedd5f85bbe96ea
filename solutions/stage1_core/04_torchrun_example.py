# ---
# jupyter:
#   course:
#     lesson: "04"
#     objectives:
#       - Cut a model into three parts, none of which is a model, and let three processes speak as one
#       - Derive which matrices are cut by rows, which by columns, and where exactly two sums per layer remain
#       - Predict the bytes that every token sends between ranks, and count them
#       - Find a wrong cut by comparing with one process, layer by layer
#       - Say why ranks that never talk about schedules must schedule identically, and catch the one that does not
#     difficulty: 3
#     needs: ["01", "02", "03"]
#     opens:
#       - course_lib/layers/linear.py
#       - course_lib/layers/embedding.py
#       - course_lib/parallel/layout.py
#       - course_lib/parallel/group.py
#       - course_lib/executor/external_launcher.py
#       - course_lib/executor/lock_step.py
#     terms:
#       rank: One process of several that work together, and its number, from 0.
#       world size: How many ranks there are in all.
#       SPMD: Single program, multiple data; every rank runs the same program on its own part, and nobody gives orders.
#       tensor parallelism: Every rank holds a share of every matrix and computes a share of every layer.
#       column-parallel: A layer cut by output features (columns of W^T), so that each rank has some outputs, complete.
#       row-parallel: A layer cut by input features, so that each rank has a term of every output; the terms are summed.
#       all-reduce: A meeting of ranks that adds up what they bring and gives the sum to each.
#       all-gather: A meeting of ranks that puts what they bring side by side and gives all of it to each.
#       pipeline parallelism: Every rank holds some of the layers, whole, and hands its result to the next.
#       lock step: Several schedulers that make the same decision at every step without asking each other.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## A model that fits nowhere
#
# Llama-3.1-70B in bfloat16 has 141 GB of weights, and an H100 has 80 GB of memory. That is one reason to spread a model
# over several devices. The other you met in lesson 01: a decode step waits for the trip of the weights from memory, and
# the only way to more memory bandwidth than one memory has is to own several memories.
#
# SmolLM2 fits anywhere, which makes it a good patient. How many ways can it be cut?

# %% tags=["exact"]
from course_lib import LLM, SamplingParams

try:
    LLM(tensor_parallel_size=2, device="cpu")
except ValueError as error:
    print(error)

# %% [markdown]
# Three, then. The next cell starts three processes the way `torchrun --nproc-per-node=3` does, with `RANK` 0, 1 and 2 in
# their environments. `ranks.call(function)` runs a function of this notebook on each of them; what it declares `global`
# stays there for the next call. Start-up is Python and torch, three times: 10 to 20 seconds on two cores. An error or an
# interrupt ends all three, since nobody knows who waits for whom; then run this cell again and go on where you were.

# %%
from course_lib.teaching.recording.ranks import torchrun

ranks = torchrun(3)


def load():
    global llm, SamplingParams
    from course_lib import LLM, SamplingParams

    llm = LLM(
        tensor_parallel_size=world_size,  # `rank` and `world_size` come from torchrun
        distributed_executor_backend="external_launcher",
        seed=0,
        device="cpu",
        num_gpu_blocks_override=64,
        max_model_len=1024,
    )
    model = llm.llm_engine.core.executor.runner.model
    return sum(one.numel() for one in model.parameters())


held = ranks.call(load)
print(f"weights per rank: {held[0]:,} of 134,515,008, a share of {held[0] / 134_515_008:.4f}")


# %% tags=["exact"]
def capital():
    params = SamplingParams(temperature=0, max_tokens=2)
    [answer] = llm.generate("The capital of France is", params, use_tqdm=False)
    return rank, answer.outputs[0].text


print(ranks.call(capital))

# %% [markdown]
# No rank has a model. Rank 1 holds heads 3 to 5 of every layer and the middle third of the dictionary, and alone it could
# not name a single token. Yet all three came to *Paris*, each in its own scheduler, its own block tables, its own sampler.
# Look for the process that gives the orders: there is none. As a script, saved beside `README.md`, it is the same code on
# every rank, and every rank prints:
#
# ```python
# # three.py: torchrun --nproc-per-node=3 three.py
# from course_lib import LLM, SamplingParams
#
# llm = LLM(tensor_parallel_size=3, distributed_executor_backend="external_launcher", seed=0, device="cpu")
# for answer in llm.generate(["The capital of France is"], SamplingParams(temperature=0), use_tqdm=False):
#     print(answer.outputs[0].text)
# ```
#
# That is **SPMD**: one program, three shares of the data. Two questions carry this lesson. How can thirds of matrices add
# up to a model? And what keeps three schedulers together that never speak of schedules?

# %%
from course_lib.teaching import check, course_llm, exercise, hint, my_code, predict, reveal, solution

predict("04.a")

# %% [markdown]
# ## Rows, then columns
#
# Take the smallest MLP: $y = B\,\mathrm{relu}(A\,x)$, with two inputs, six inner features and two outputs. $A$ is
# $[6, 2]$: each *row* makes one inner feature. Give every rank two rows of $A$, and it has two inner features, complete,
# without having asked anybody. relu works on one feature at a time, so each rank can apply it to its own.
#
# Now $B$, $[2, 6]$. Column $j$ says what inner feature $j$ adds to each output:
#
# $$ y = \sum_{j=0}^{5} B_{:,j}\, h_j = \underbrace{\sum_{j=0,1}}_{\text{rank 0}} + \underbrace{\sum_{j=2,3}}_{\text{rank 1}}
# + \underbrace{\sum_{j=4,5}}_{\text{rank 2}} . $$
#
# So give every rank the two *columns* of $B$ that meet its own features. Move the slider:

# %%
from course_lib.teaching.explorers.sharded_mlp import explore_sharded_mlp

explore_sharded_mlp()

# %% [markdown]
# Two products and an activation, and the ranks met once. The first cut is called **column-parallel** and the second
# **row-parallel**, to everybody's confusion: code computes $x A^T$, and rows of $A$ are columns of $A^T$. What matters
# is the pair: the first leaves features in shares, the second takes them in shares.
#
# The other way round would not work. Cut $A$ by columns instead, one input each for two of the ranks: inner feature 3
# is then $1\cdot 1$ on one and $-1\cdot 2$ on the other. Added up it is $-1$, and relu makes 0 of it. relu *before* the
# sum makes $1 + 0 = 1$. A nonlinear function does not work on terms, so that cut would need a second meeting, before
# the relu.
#
# SmolLM2's MLP has two matrices in the first place, gate and up, stacked into one so that one product serves both:
# `silu(gate) * up`. A rank's share of the stack is *its rows of gate, and below them the same rows of up*. With a bias on
# the output, there is one more trap.

# %% tags=["exercise"]
import torch
from torch.nn.functional import silu


@exercise("04.1", target="course_lib.models.llama:LlamaMLP.forward")
def mlp_of_rank(x, gate_up, down, bias, group):
    """The MLP's output [T, H], the same on every rank.

    x: [T, H], the same on every rank; gate_up: [2 * s, H], this rank's s rows of gate, then the same
    rows of up; down: [H, s], this rank's columns; bias: [H] or None, the same on every rank.
    Without ranks it is (silu(x gate^T) * (x up^T)) down^T + bias.
    group.rank, group.size; group.all_reduce(tensor) returns the sum over all ranks, on every rank.
    """
    #: solution
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    y = (silu(gate) * up) @ down.T
    if bias is not None and group.rank == 0:
        y = y + bias
    return group.all_reduce(y)
    #: end

# %% tags=["check"]
check("04.1")

# %% [markdown]
# ## Whose heads
#
# Attention is cut by heads. A head's queries, keys and values are rows of three matrices, and the heads know nothing of each
# other until `o_proj` mixes them: rows, then columns once more, with attention where the relu was. Each rank's KV cache
# holds its own heads only, so the cache is cut along with the weights.
#
# SmolLM2 has 9 query heads and 3 KV heads. Query heads 0 to 2 read KV head 0, and so on. Three ranks: one KV head
# each. Nine ranks: one query head each, and a third of a KV head would be left for a rank. But attention needs whole
# heads, so three neighbours hold the *same* one:

# %%
from course_lib.teaching import show
from course_lib.teaching.explorers.sharding import draw_groups, draw_heads, draw_layer

show(draw_heads(9, 3, (3, 9)), alt="Two tables of ranks against heads. With 3 ranks "
     "each holds three query heads and one head of keys and of values. With 9 ranks "
     "each holds one query head, and ranks 0 to 2 all hold KV head 0, ranks 3 to 5 "
     "head 1, ranks 6 to 8 head 2.")

# %% [markdown]
# Two ranks would need four and a half query heads each, hence the refusal above. A loader that knows the rows
# reads nothing else: each rank takes its slice of the tensor out of the checkpoint's file.

# %% tags=["exercise"]
@exercise("04.2", target="course_lib.layers.linear:QKVLinear.__init__")
def rows_of_rank(num_heads, num_kv_heads, head_dim, rank, ranks):
    """Which rows of q_proj, and which of k_proj (and v_proj), this rank loads: two (start, stop).

    A head is head_dim rows. Query heads are dealt out evenly, in order. Of the KV heads a rank holds
    those that its query heads read, whole; ranks divides num_kv_heads or is a multiple of it.
    The course model (9, 3, 64): rank 1 of 3 has (192, 384), (64, 128);
    rank 1 of 9 has (64, 128), (0, 64).
    """
    #: solution
    queries = num_heads // ranks * head_dim
    copies = max(1, ranks // num_kv_heads)  # neighbours that hold the same head
    held = max(1, num_kv_heads // ranks)
    first = rank // copies * held
    return (rank * queries, (rank + 1) * queries), (first * head_dim, (first + held) * head_dim)
    #: end

# %% tags=["check"]
check("04.2")

# %% [markdown]
# ## The dictionary
#
# A fifth of SmolLM2's weights is one matrix, the embedding, which also serves as the head. Both ends are cut by rows:
# each rank holds a third of the vocabulary, padded so that all thirds are equal. Here with ten tokens, and *x* for
# padding:
#
# | | rank 0 | rank 1 | rank 2 |
# |---|---|---|---|
# | holds tokens | 0 1 2 3 | 4 5 6 7 | 8 9 x x |
# | looks up 0, 4, 9 | row of 0, zeros, zeros | zeros, row of 4, zeros | zeros, zeros, row of 9 |
# | head: makes logits of | 0 1 2 3 | 4 5 6 7 | 8 9 x x |
#
# Going in, one rank has the row and the others bring zeros: an all-reduce, again. Coming out, every rank has different
# logits, so they are put side by side, an **all-gather**. Then the columns of the padding must go: their rows are zero,
# so they have logit 0, and in a row where every real logit is negative, 0 wins. (SmolLM2's 49,152 tokens divide
# evenly. It has no padding at all, and would hide that bug for ever.)

# %% tags=["exercise"]
@exercise("04.3", target="course_lib.layers.embedding:TokenEmbedding.forward")
def look_up(ids, table, group):
    """The rows of all tokens, [T, H], on every rank.

    ids: [T] whole numbers, the same on every rank, not to be changed; table: [n, H], this rank's
    rows, n on every rank: those of tokens group.rank * n to group.rank * n + n - 1.
    """
    #: solution
    rows = ids - group.rank * len(table)
    absent = (rows < 0) | (rows >= len(table))
    found = table[rows.masked_fill(absent, 0)]
    return group.all_reduce(found.masked_fill(absent[:, None], 0))
    #: end

# %% tags=["check"]
check("04.3")

# %% [markdown]
# ## What goes over the wire
#
# Now you know every place where ranks meet:

# %%
show(draw_layer(), alt="Three ranks as lanes. Each has a third of the embedding, then "
     "in each of 30 layers 3 of 9 query heads, one KV head, 192 columns of o, 512 rows "
     "of gate and of up, 512 columns of down, and behind a last norm a third of the "
     "head. All-reduces stand behind the embedding, behind o and behind down; a gather "
     "behind the head.")

# %% [markdown]
# With $L$ layers and hidden size $H$, one token costs $2L + 1$ all-reduces of $4H$ bytes each (float32), and whoever
# samples gathers $4V/3$ bytes of logits from each rank. The engine's groups count what they are given. (What really
# travels depends on the algorithm: a ring of three ranks sends 4/3 of it from each.) A prompt of five tokens and four
# new ones is 8 tokens through the model, because the last one is never fed back:

# %% tags=["exact"]
def traffic_of(max_tokens):
    group = llm.llm_engine.core.executor.runner.parallel.tensor
    before = group.traffic.all_reduce_calls, group.traffic.all_reduce_bytes, group.traffic.gather_bytes
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate("The capital of France is", params, use_tqdm=False)
    after = group.traffic.all_reduce_calls, group.traffic.all_reduce_bytes, group.traffic.gather_bytes
    return [new - old for old, new in zip(before, after)]


calls, summed, gathered = ranks.call(traffic_of, 4)[0]
L, H, V = 30, 576, 49152
print(f"steps: 4; all-reduces per step: {calls / 4:.0f}, by formula {2 * L + 1}")
print(f"bytes all-reduced per token: {summed / 8:,.0f}, by formula {(2 * L + 1) * 4 * H:,}")
print(f"bytes gathered per sampled token: {gathered / 4:,.0f}, by formula {4 * V // 3:,}")
reveal("04.a")

# %% [markdown]
# 201 KiB for a token with its logits, beside 179 MB of weights that each rank reads: bandwidth is no problem at all.
# The number to fear is the other one, 61. Each all-reduce is a *meeting*: it begins when the last rank has come, and
# nothing else can happen meanwhile, since the next layer needs the sum.

# %%
predict("04.b")

# %%
def decode_step(num_steps=4):
    """Milliseconds of a decode step, and how many of them were spent in all-reduces."""
    import time
    from unittest.mock import patch

    group = llm.llm_engine.core.executor.runner.parallel.tensor
    meet, meetings = group.all_reduce, []

    def timed(tensor):
        start = time.perf_counter()
        result = meet(tensor)
        meetings.append(time.perf_counter() - start)
        return result

    def run(max_tokens):
        meetings.clear()
        start = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        llm.generate("The capital of France is", params, use_tqdm=False)
        return time.perf_counter() - start, sum(meetings)

    with patch.object(group, "all_reduce", timed):
        (short, short_met), (long, long_met) = run(1), run(1 + num_steps)
    return [1000 * (long - short) / num_steps, 1000 * (long_met - short_met) / num_steps]


three = ranks.call(decode_step)[0]
llm = course_llm()  # one process, in this notebook
one = decode_step()
print(f"three ranks take {three[0] / one[0]:.1f} times as long as one process;")
print(f"{three[1] / three[0]:.0%} of that they spend in {2 * L + 1} all-reduces, "
      f"{three[1] / (2 * L + 1):.1f} ms each")
reveal("04.b")

# %%
import matplotlib.pyplot as plt

from course_lib.teaching import COURSE_STYLE

plt.style.use(COURSE_STYLE)
fig, axis = plt.subplots(figsize=(9, 2.1))
names = ["3 ranks, 1 thread each", "1 process, all threads"]
computing, meeting = [three[0] - three[1], one[0] - one[1]], [three[1], one[1]]
axis.barh(names, computing, label="computing")
axis.barh(names, meeting, left=computing, hatch="//", label="in all-reduces")
axis.set(xlabel="ms per decode step")
axis.legend()
show(fig, alt="Two bars of milliseconds per decode step. One process computes all the "
     "time. Three ranks take longer, and much of it is spent in all-reduces.")

# %% [markdown]
# On a laptop tensor parallelism is a loss, and has to be. Three ranks share one memory and a few cores. Where this was
# written, a meeting through gloo took 0.3 ms while the machine was idle and ten times that while it was busy (yours is
# printed above), because whoever comes first waits until the last has got a core.
#
# Where each rank has a memory of its own, it looks different. Measured with this engine on two H200 GPUs connected by
# NVLink, a Llama with 16 layers and 11 billion random bfloat16 weights, milliseconds per decode step (the median of three):
#
# | | one GPU | two GPUs |
# |---|---|---|
# | one request | 6.1 | 4.5 |
# | 64 requests | 8.2 | 6.8 |
#
# Each GPU reads 11 GB instead of 22, and 33 meetings take back a part of what that saves. A model with 8 layers of hidden
# size 1,024 was 2.6 times *slower* on two GPUs than on one. So tensor parallelism pays if the model does not fit
# otherwise; if the layers are large, so that each share is still much work; if the link is fast, inside one machine. For a
# small model that fits, several independent replicas (lesson 05) serve more people on the same GPUs.
#
# ## Break it: three suspects
#
# A wrong cut rarely crashes. The shapes are right, after all. Here are three variants of the model, A, B and C; one
# is sound, two have a mistake in a single layer. What do they write?

# %%
def write(suspect):
    from course_lib.teaching.recording.spoiled import spoiled

    params = SamplingParams(temperature=0, max_tokens=3)
    with spoiled(llm.llm_engine.core.executor.runner.model, suspect):
        [answer] = llm.generate("The quick brown fox jumps over the", params, use_tqdm=False)
    return answer.outputs[0].text


for suspect in "ABC":
    print(f"{suspect}: The quick brown fox jumps over the{ranks.call(write, suspect)[0]!r}")

# %% [markdown]
# Whom would you suspect? On the machine where this was written, B completes the proverb and the sound one does not: text
# is no evidence. The residual stream is. After each attention and each MLP, take what rank 0 has of the last token minus
# what one process has, and compare the length of that vector with the length of the stream:

# %%
def stream(suspect):
    """The last token's residual stream behind each attention and each MLP, [60, 576]."""
    from course_lib.teaching.recording.spoiled import residuals, spoiled

    model = llm.llm_engine.core.executor.runner.model
    with spoiled(model, suspect), residuals(model) as seen:
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate("The quick brown fox jumps over the", params, use_tqdm=False)
    return [one[-1].tolist() for one in seen]


truth = torch.tensor(stream("A"))  # in this notebook's process
fig, axis = plt.subplots(figsize=(9, 3.2))
for suspect, marker in zip("ABC", "os^"):
    off = (torch.tensor(ranks.call(stream, suspect)[0]) - truth).norm(dim=1) / truth.norm(dim=1)
    axis.semilogy(torch.arange(60) / 2, off.clamp(min=1e-8), marker=marker, markersize=4, label=suspect)
axis.set(xlabel="layer (its attention at n, its MLP at n + ½)", xticks=range(0, 30, 2))
axis.set_ylabel("relative difference")
axis.legend()
show(fig, alt="Relative difference of the residual stream to that of one process, along "
     "the layers, log scale. A stays at a few millionths. B jumps to 0.2 at layer 12, "
     "at its attention. C jumps to 0.6 at 20.5, the MLP of layer 20.")

# %% [markdown]
# A stays at rounding, a few millionths, because its sums are made in another order. B jumps at 12: the attention of
# layer 12. C jumps at 20½: the MLP of layer 20. With the place known, the cause is one look away, in
# `course_lib/teaching/recording/spoiled.py`: in B the all-reduce behind `o_proj` is missing, and C cuts the stacked
# gate-and-up matrix as *one*, so that rank 0 has rows of gate only, and takes the second half of them for up.
#
# ## Several axes
#
# Tensor ranks meet twice per layer. **Pipeline** ranks hold whole layers and hand on one vector per token from stage to
# stage: little traffic, which a network can bear, but a stage idles unless several batches are under way. Big models use both,
# and several replicas besides. Ranks are numbered so that those who talk most are neighbours. (Exercise 04.4 is a side
# step: if your evening is short, go on at *Nobody gives orders*.)

# %%
from course_lib.parallel.layout import ParallelLayout

layout = ParallelLayout(tensor=2, pipeline=2, data=2)
show(draw_groups(layout), alt="Eight ranks in two replicas. Replica 0: ranks 0 and 1 "
     "in stage 0, 2 and 3 in stage 1; replica 1: 4 and 5, 6 and 7. Neighbours are "
     "joined as tensor groups, and each rank with the one below it as a pipeline "
     "group.")
print("tensor groups:", layout.tensor_groups())

# %% tags=["exercise"]
@exercise("04.4", target="course_lib.parallel.layout:ParallelLayout.pipeline_groups")
def pipeline_groups(tensor, pipeline, data):
    """All pipeline groups, each a list of ranks, first stage first: who hands tensors on to whom.

    Ranks are numbered as in the picture: along tensor groups first, then stages, then replicas.
    One replica on 6 ranks, 3 x 2: [[0, 3], [1, 4], [2, 5]].
    """
    #: solution
    return [
        [(replica * pipeline + stage) * tensor + place for stage in range(pipeline)]
        for replica in range(data)
        for place in range(tensor)
    ]
    #: end

# %% tags=["check"]
check("04.4")

# %% [markdown]
# ## Nobody gives orders
#
# Back to the second question. Under torchrun no rank sends its schedule to another. Each runs its own copy of lesson 03
# and *must* come to the same plan: the same requests, in the same order, as many tokens of each, in the same blocks. And
# each samples for itself, so random numbers must agree as well.
#
# A sum, though, is only a sum of tensors. It does not know whose rows they are.

# %%
predict("04.c")

# %%
def two_prompts(odd_rank):
    from unittest.mock import patch

    from course_lib.executor.lock_step import LockStep

    prompts = ["The capital of France is", "My favourite food is the"]  # five tokens each
    if rank == odd_rank:
        prompts.reverse()
    with patch.multiple(LockStep, agree=lambda *_: None, note=lambda *_: None):  # no comparing
        params = SamplingParams(temperature=0, max_tokens=5)
        answers = llm.generate(prompts, params, use_tqdm=False)
    return [answer.prompt + answer.outputs[0].text for answer in answers]


for odd_rank in (None, 1):
    print(f"odd rank: {odd_rank}")
    for number, answers in enumerate(ranks.call(two_prompts, odd_rank)):
        print(f"  rank {number}: {answers}")
reveal("04.c")

# %% [markdown]
# Compare with the sound run above. No error, no odd shape, and worst of all: it reads well, since two thirds of row 0 are
# the right request. All ranks agree on the wrong answers, and rank 1 files them under the other prompts. The way there is
# short: `list({prompt_1, prompt_2})` is enough, because the order of a set of texts differs from process to process.
#
# Other differences:
#
# - *Another number of tokens* on one rank: the tensors to be summed have different sizes. With gloo, here, a process dies in
#   the middle of the sum; on GPUs ranks may wait until a time limit, as they do everywhere for one that never comes.
# - *Another number of KV blocks*: all is well until the cache is nearly full, and then one rank preempts and the others do not.
#   That is why ranks take the minimum of all before they begin.
# - *Another seed*: rank 1 draws another token, feeds it into the next step, and its terms belong to another text.
#
# The last one, live: first with equal seeds, then with another one on rank 1, then with that and the comparison.

# %%
def other_seed(seed_of_1, compare):
    from unittest.mock import patch

    from course_lib.errors import RankDivergenceError
    from course_lib.executor.lock_step import LockStep

    llm.llm_engine.core.executor.runner.generator.manual_seed(seed_of_1 if rank == 1 else 7)
    params = SamplingParams(temperature=1, top_k=20, max_tokens=5)
    agree, note = (LockStep.agree, LockStep.note) if compare else [lambda *_: None] * 2
    with patch.multiple(LockStep, agree=agree, note=note):
        try:
            return llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0].text
        except RankDivergenceError as error:
            return str(error).split(". ")[0]


for seed_of_1, compare in ((7, False), (8, False), (8, True)):
    print(f"seed of rank 1: {seed_of_1}, comparing: {compare}")
    for number, text in enumerate(ranks.call(other_seed, seed_of_1, compare)):
        print(f"  rank {number}: {text!r}")

# %% [markdown]
# With equal seeds there is one story. With another seed on rank 1 there are two, and all logits are summed from terms
# of both: ranks 0 and 2, two thirds of every sum, may hold out for a while, and rank 1 writes what suits neither. With
# the comparison switched on, all ranks stop before the next step and say who, where and what. (An id such as 7#7 is the
# engine's own for a request; token ids are in brackets.)
#
# ## Who is out of step
#
# That comparison is your last piece. Before each step a rank knows its *plan*: the new prompts, the tokens per request in
# serving order, the blocks, what was sampled in the step before, which requests have ended. Sending all of it around at
# every step would cost more than it protects; a digest of a few bytes will do. Two things make it harder than it sounds.
# Equal plans must give equal digests *in different processes*. And when they differ, somebody must be named: the rank that is alone
# with its plan, not the one that happened to be compared with.

# %% tags=["exercise"]
import hashlib
import json
from collections import Counter


@exercise("04.5", target="course_lib.executor.lock_step:LockStep.agree")
def agree(plan, group):
    """The ranks that are out of step, in order; [] if all plans are equal. The same list on every rank.

    plan: {"new": {id: prompt tokens}, "tokens": {id: how many}, "blocks": {id: new block ids},
    "sampled": {id: tokens}, "ended": set of ids}; ids are texts. The order in "tokens" is part of it.
    group.all_gather_object(value) -> list of every rank's value; every rank must call it equally often.
    Out of step is who differs from what most ranks plan; of equally many, rank 0's plan counts.
    While all is well, a rank may send 200 bytes per step.
    """
    #: solution
    text = json.dumps(plan | {"ended": sorted(plan["ended"])})
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    digests = group.all_gather_object(digest)
    usual = Counter(digests).most_common(1)[0][0]
    return [rank for rank, one in enumerate(digests) if one != usual]
    #: end

# %% tags=["check"]
check("04.5")

# %% [markdown]
# ## Three processes with your code in them
#
# The ranks can read your stored answers as this notebook does. They let go of their engine, make another from whatever you
# have passed (your rows are loaded, your sums are summed), answer, and then rank 1 is given another seed.

# %%
def with_my_code():
    global llm
    import io

    from course_lib import LLM
    from course_lib.errors import RankDivergenceError
    from course_lib.teaching import my_code

    llm, said = None, io.StringIO()
    with my_code(said):
        llm = LLM(tensor_parallel_size=world_size, distributed_executor_backend="external_launcher",
                  seed=0, device="cpu", num_gpu_blocks_override=64, max_model_len=1024)  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=1)
        text = llm.generate("The capital of France is", params, use_tqdm=False)[0].outputs[0].text
        llm.llm_engine.core.executor.runner.generator.manual_seed(7 + (rank == 1))
        params = SamplingParams(temperature=1, max_tokens=10)
        try:
            llm.generate("Once upon a time", params, use_tqdm=False)
        except RankDivergenceError as error:
            found = str(error).split(". ")[0]
    if rank == 0:
        print(said.getvalue())
    return text, found


for number, (text, found) in enumerate(ranks.call(with_my_code)):
    print(f"rank {number}: {text!r}; then: {found}")
ranks.close()

# %% [markdown]
# ## How vLLM does it
#
# | | here | vLLM |
# |---|---|---|
# | executor under torchrun | `executor/external_launcher.py` | `ExecutorWithExternalLauncher` in `vllm/v1/executor/uniproc_executor.py` |
# | groups | `parallel/layout.py`, `parallel/torch_group.py` | `vllm/distributed/parallel_state.py`: reshape and transpose `arange(world)` |
# | sharded layers | `layers/linear.py` | `vllm/model_executor/layers/linear.py`; each layer's `weight_loader` cuts |
# | vocabulary | padded to 16 rows per rank | padded to a multiple of 64 (`vocab_parallel_embedding.py`) |
# | ranks out of step | compared before every step | not compared: equal inputs and seeds are relied upon |
#
# vLLM's conditions follow from what you have seen: equal seeds, and no engine in a process of its own (the backend sets
# `VLLM_ENABLE_V1_MULTIPROCESSING=0` by itself). In 0.8.5 pipeline parallelism was refused; in 0.32 the example runs
# 2×2, and the last stage's output is broadcast to the others. The ranks agree on the least memory that any has for KV
# blocks (in 0.8.5 on the least number of blocks), and `tests/distributed/test_torchrun_example.py` gives every rank
# another limit on purpose. The example samples, at temperature 0.8: with equal seeds, logits and order that is as
# repeatable as argmax.
#
# Why would anybody want SPMD, if a front process could tell workers what to do? vLLM's ordinary executor does that.
# But a training job under torchrun (reinforcement learning, say, which trains and generates in turns) is already SPMD: its
# ranks hold the weights, and want an engine inside each of them, not another set of processes beside.
#
# ## Recap
#
# - Rows of the first matrix, columns of the second: features stay in shares between, and one sum is left. Twice per layer.
# - A sum is $4H$ bytes per token. What costs is the meeting, $2L + 1$ of them per step, one after the other.
# - Heads are dealt out whole; with more ranks than KV heads, neighbours hold the same ones, and the cache shrinks no further.
# - A wrong cut has the right shapes. Compare with one process, layer by layer.
# - Under SPMD nobody sends schedules: equal inputs, order, seeds, limits and block counts are the protocol.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *Why is gate-up cut by rows and down by columns, and not both by rows?* Then down would need all inner features on
#    every rank: an all-gather between the two, of 1,536 numbers instead of a sum of 576.
# 2. *How many all-reduces does a step of 64 requests make?* 61, like any other; each is 64 times as large.
# 3. *8 KV heads, 16 ranks. What happens to the cache per rank compared to 8 ranks?* Nothing: one head per rank either way.
# 4. *Rank 2 has one KV block less, and no minimum is taken. When do you notice?* When the cache is nearly full, perhaps
#    never in a test.
# 5. *Why must a digest not use Python's `hash`?* It is salted per process, so equal texts differ.
#
# </details>
#
# To read: Shoeybi et al., *Megatron-LM* (arXiv 1909.08053), section 3: four pages from which every sharded layer descends.
#
# **Next: 05, data parallel.** Whole engines side by side, who gets the next request, and the one reason why even they must
# sometimes keep step.
