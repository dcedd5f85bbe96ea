# ---
# jupyter:
#   course:
#     lesson: "02"
#     objectives:
#       - Measure how much of a KV cache is wasted when every request reserves room for the longest answer
#       - Hand out memory in small blocks, count who holds them, and find a token's slot through a block table
#       - Drive the engine step by step, with requests that join and leave at any step, and stream to several readers
#       - Write attention that reads through a block table, in torch and then as a Triton kernel
#       - Tell a bug in the books from a bug in the arithmetic, and pick the tool that finds it
#     difficulty: 3
#     needs: ["01"]
#     opens:
#       - course_lib/core/block_pool.py
#       - course_lib/core/kv_cache_manager.py
#       - course_lib/runner/input_batch.py
#       - course_lib/engine/llm_engine.py
#       - course_lib/engine/async_llm.py
#       - course_lib/attention/torch_paged.py
#       - kernels/triton/paged_decode.py
#     terms:
#       block: A piece of the KV cache with room for a fixed number of tokens (16 here), given to one request at a time or shared.
#       block table: A request's blocks in the order of its tokens; entry i says where tokens i * 16 to i * 16 + 15 are.
#       slot: Room for one token in the cache; slot number = block id * block size + offset in the block.
#       paged attention: Attention that finds keys and values through a block table instead of in one piece of memory.
#       internal fragmentation: Memory inside a reservation that its owner does not fill.
#       reference count: How many block tables hold a block; at 0 it is free.
#       engine step: One round of schedule, run the model, update; one pass of the model over tokens of many requests.
#       online softmax: A softmax in one pass over pieces, which rescales what it has whenever a larger score comes.
#       Triton: A language in Python's syntax for GPU kernels; one program computes one tile of the result.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## How long will this answer get?
#
# Lesson 01 ended with a price: each token of context occupies 45 KiB of cache. With one request that is arithmetic. With
# nine at once, on one piece of memory, it is a decision that the engine has to take when a request arrives and has
# not written a word: how much of the memory is for this one?

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for the last exercise: Triton looks once, when imported

from course_lib import LLM, AsyncLLM, EngineArgs, SamplingParams
from course_lib.teaching import check, course_llm, exercise, explore_blocks, hint, my_code
from course_lib.teaching import predict, record, reveal, show, solution
from course_lib.teaching.explorers import paging

# %%
questions = [
    "What is the capital of France?",
    "Thank you!",
    "Correct this sentence: he go to school.",
    "Name a fruit.",
    "Tell me a joke.",
    "What is the largest ocean?",
    "What is 2 + 2?",
    "Give one word that means happy.",
    "Summarize in one sentence: The cat sat on the mat and looked at the rain.",
]
predict("02.a")

# %% [markdown]
# Serving systems before 2023 kept a request's keys and values in one piece of memory, and so had to reserve for the
# longest text that it might become. Our engine hands out memory in pieces whose size you choose; make them as long as a
# whole text and you have those systems again. Let 256 tokens be the limit (the model allows 8,192), and let there be room
# for two such slabs: 512 tokens, 22.5 MiB.

# %%
def ask(llm):
    """Each question as a conversation of its own; what the engine did, and each answer's length."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    params = SamplingParams(temperature=0, max_tokens=200)
    with record(llm) as trace:
        outputs = llm.chat(conversations, params, use_tqdm=False)
    return trace, [len(output.outputs[0].token_ids) for output in outputs]

# %%
slabs = LLM(block_size=256, num_gpu_blocks_override=2, max_model_len=256)
slab_trace, lengths = ask(slabs)
for question, length in zip(questions, lengths):
    print(f"{length:4d} tokens: {question}")
reveal("02.a")

# %%
figure = paging.draw_slots({"Slabs of 256 tokens": slab_trace})
show(figure, alt="Slots of the cache over the steps of the run. Two slabs, all 512 slots, are held "
     "nearly all the time; the filled part wanders around 90.")

# %% [markdown]
# The hatched part is memory that nobody else may use and in which nothing is stored, four fifths of it. Two requests
# run, and seven wait for a seat beside empty chairs. This waste *inside* a reservation is called **internal
# fragmentation**. Measured on the systems of 2023, 20 to 38 % of the KV memory held tokens (Kwon et al., the paper that
# became vLLM); had we reserved for the model's full 8,192, it would be less than one percent here.
#
# Reserving less does not help, since the next answer may be the long one. Nor does moving a request when it outgrows its
# place: that copies every layer's keys and values, and leaves holes of odd sizes behind.
#
# ## Small equal pieces
#
# Operating systems met this problem around 1960 with programs in place of texts. Their way out: cut the memory into
# pieces of one size, hand a piece out when it is needed and not before, take any piece that is free, and write down in a
# table where the pieces are. A piece of KV cache is a **block**. Here is our example for the rest of the lesson, a request
# of six tokens in blocks of four:

# %%
tokenizer = slabs.get_tokenizer()
prompt = "The capital of France is Paris"
tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(prompt)]
figure = paging.draw_table(tokens, table=[7, 2], block_size=4, num_blocks=8)
show(figure, alt="Six tokens in two groups of four places. The block table says 7 and 2: tokens 0 to 3 "
     "are in slots 28 to 31, tokens 4 and 5 in slots 8 and 9 of the cache.")

# %% [markdown]
# The request got blocks 7 and 2 because those were free. Its next two tokens go to slots 10 and 11; the ninth token will
# take a third block, whichever is free by then. At no time are more than three slots held and empty, however long the text
# gets. And every free block fits every request, because all are equal: there are no holes.
#
# With block size $S$, the token at position $p$ of a request with block table $t$ has
#
# $$ \text{slot}(p) \;=\; t\big[\lfloor p / S \rfloor\big] \cdot S \;+\; p \bmod S . $$
#
# The engine needs this once per step for all new tokens of all requests: six from our prompt, one from each request that
# is decoding. It keeps the tables as rows of one array, and every layer uses the same slots, each in a cache of its own.

# %% tags=["exercise"]
import numpy as np


@exercise("02.1", target="course_lib.runner.input_batch:slot_mapping")
def slot_mapping(block_table, token_rows, positions, block_size):
    """The cache slot of every token in a step, int64 [T].

    block_table: int32 [rows, blocks]; token_rows, positions: int64 [T], each token's row of the
    table and its position in its request. With block_table [[7, 2]], token_rows [0, 0, 0],
    positions [3, 4, 5] and block_size 4: [31, 8, 9].
    """
    #: solution
    block_ids = block_table[token_rows, positions // block_size].astype(np.int64)
    return block_ids * block_size + positions % block_size
    #: end

# %% tags=["check"]
check("02.1")

# %% [markdown]
# Now the same nine questions in blocks of 16, on *half* of the memory: 16 blocks, 256 slots.

# %%
# an LLM, made once and used by the checks as well
llm = course_llm(block_size=16, num_gpu_blocks_override=16, max_model_len=256)
paging.start_over(llm)  # as if new: no requests, an empty cache
block_trace, _ = ask(llm)
worst = max(block_trace.steps, key=lambda step: len(step.preempted))
explore_blocks(block_trace, step=worst.index)

# %% [markdown]
# Move the slider to 0 and on from there. Seven requests are in at once, where the slabs held two. Block 0 has seven
# holders: it contains the first sixteen tokens of the chat template, the same in every conversation. As texts grow they
# take whatever block is next, so the tables soon look shuffled. Finished requests give theirs back, and the hatched ones
# keep their contents for whoever begins in the same way. The picture stands where the pool could not give everyone the
# next block: the youngest request lost its own and will start over. That is **preemption**, a matter for lesson 03.
#
# Why sixteen?

# %%
predict("02.b")

# %% [markdown]
# Two measurements. How many of the slots in those texts' blocks would have been empty with blocks of another size? And
# how fast can one core collect the keys of eight requests of 1,024 tokens that lie scattered over 100 MB?

# %%
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
empty = [paging.empty_share(block_trace, size) for size in sizes]
rates = [paging.gather_rate(size) for size in sizes]
figure = paging.draw_block_sizes(sizes, empty, rates)
show(figure, alt="Left: the share of empty slots grows with the block size, from none at 1 over about "
     "a seventh at 16 to most at 256. Right: the rate of collecting is low for the smallest blocks, "
     "about twice as high at 16, and grows less from there. A dotted line marks 16.")
reveal("02.b")

# %% [markdown]
# ## Who holds which block
#
# One prompt, two outputs: `n=2`. The engine makes two requests of it. What do they have in common?

# %% tags=["exact"]
paging.start_over(llm)
counting = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen. Again:"
params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
with record(llm) as trace:
    llm.generate(counting, params, use_tqdm=False)
for name, table in trace.steps[0].block_tables.items():
    computes = trace.steps[0].scheduled[name]
    print(f"output {name[-1]}: blocks {list(table)}; tokens computed in step 0: {computes}")

# %% [markdown]
# The second output holds the first one's full block, which is being filled in this very step, and computes what is left.
# The prompt's last block is not full: each output will write its own words there, so each has one of its own.
#
# Block 0 has two holders, then. It may be given away when *both* have finished, and a **reference count** per block says
# when that is. Free does not mean forgotten, either: until block 0 is handed out for something else, a request that
# begins with the same sixteen tokens can have it with its contents. So free blocks wait in a queue, those that were freed
# longest ago first in line, and a lucky hit pulls one out of the middle. A request gives its last block back first: a
# beginning without its end may still be of use, an end without its beginning is not.
#
# | operation | holders | queue |
# |---|---|---|
# | `allocate(2)` → `[7, 2]` | 7: 1, 2: 1 | both leave, from the front |
# | `share([7])` | 7: 2 | |
# | `release([2, 7])` | 7: 1, 2: 0 | 2 joins at the back |
# | `share([2])` | 2: 1 | 2 leaves, from wherever it stands |

# %% tags=["exercise"]
#: solution
from collections import OrderedDict


#: stub
# import what you need here
#: end
@exercise("02.2", target="course_lib.core.block_pool:BlockPool")
class Pool:
    """Blocks 0 … num_blocks - 1; at first all are free, 0 in front.

    ref_counts: list, the number of holders of each block. num_free: how many have none.
    """

    def __init__(self, num_blocks):
        self.ref_counts = [0] * num_blocks
        #: solution
        self.free = OrderedDict.fromkeys(range(num_blocks))  # block ids, in queueing order
        #: stub
        ...  # the free blocks, in order
        #: end

    @property
    def num_free(self):
        #: solution
        return len(self.free)
        #: end

    def allocate(self, count):
        """Take `count` blocks from the front; return their ids. Too few: None, and nothing changes."""
        #: solution
        if count > len(self.free):
            return None
        ids = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block_id in ids:
            self.ref_counts[block_id] = 1
        return ids
        #: end

    def share(self, block_ids):
        """One more holder for each; a block that was free leaves the queue, without a walk along it."""
        #: solution
        for block_id in block_ids:
            self.free.pop(block_id, None)
            self.ref_counts[block_id] += 1
        #: end

    def release(self, block_ids):
        """One holder less for each, in this order; a block with none left joins at the back."""
        #: solution
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.free[block_id] = None
        #: end

# %% tags=["check"]
check("02.2")

# %% [markdown]
# ## The loop
#
# `llm.generate` hides a loop, and vLLM's `llm_engine_example.py` writes it out: add a request, call `step()`, look at what
# came, repeat. One **engine step** is *schedule* (who computes how many tokens, in which blocks), *execute* (one pass of
# the model over all of them) and *update* (append what was sampled, end what is done).
#
# | state | it has | it ends when |
# |---|---|---|
# | `WAITING` | a place in the queue | a seat is free, and blocks for its first tokens |
# | `RUNNING` | blocks, and tokens in most steps (lesson 03 says when not) | its text ends, its reader leaves, or blocks run out |
# | `PREEMPTED` | its text, no blocks, the front of the queue | there is room again |
# | `FINISHED_STOPPED`, `_LENGTH` (vLLM: `_LENGTH_CAPPED`), `_ABORTED` | nothing: the blocks are back | |
#
# No state is called "prefill". A request knows how many tokens it has and for how many the keys are in the cache, and a
# step closes the gap, whether that is six tokens wide or one. So a newcomer's prompt and the others' single tokens travel
# in one pass, and nobody waits for a batch to finish. As in vLLM's example, one request joins per step:

# %%
def greedy(count):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


sampled = dict(temperature=0.8, top_k=5, seed=0, ignore_eos=True)
arrivals = [
    ("A", prompt, greedy(7)),
    ("B", "To be or not to be, that is the", SamplingParams(max_tokens=2, **sampled)),
    ("C", "What is the meaning of life?", SamplingParams(n=2, max_tokens=3, **sampled)),
]

# %% tags=["exact"]
engine, step, queue = llm.llm_engine, 0, list(arrivals)
while queue or engine.has_unfinished_requests():
    if queue:
        engine.add_request(*queue.pop(0))
    done = [f"{output.request_id} is done" for output in engine.step() if output.finished]
    plan = engine.core.last_scheduled.num_scheduled_tokens  # by the core's ids, such as 0_C#7
    print(f"step {step}:", {name.split("#")[0]: count for name, count in plan.items()}, *done)
    step += 1

# %% [markdown]
# Read it downwards: `B`'s prompt rides along with `A`'s second token, and `C` became two requests, `0_C` and `1_C`.
#
# Write the loop yourself. Each arrival has its step; a reader with `patience` 3 hangs up once three tokens are there, and
# an abandoned request must not go on holding blocks. Whoever joins, everyone's tokens are those of a run alone: that is
# what the check compares.

# %% tags=["exercise"]
@exercise("02.3", target="course_lib.entrypoints.llm:LLM._run_engine")
def serve(engine, arrivals, patience):
    """Serve everybody; return {request_id: its last RequestOutput}.

    arrivals: list of (step, request_id, prompt, params), in order of step: add the request before
    that call of engine.step(), counting from 0. patience: {request_id: n}, for some requests: abort
    it when it has n tokens and is not finished. Use engine.add_request(request_id, prompt, params),
    .step(), .has_unfinished_requests() and .abort_request(request_id). An output has .request_id,
    .finished and .outputs[0].token_ids, all tokens so far. Steps without any request count as well.
    """
    #: solution
    arrivals, last, step = list(arrivals), {}, 0
    while arrivals or engine.has_unfinished_requests():
        while arrivals and arrivals[0][0] == step:
            engine.add_request(*arrivals.pop(0)[1:])
        for output in engine.step():
            last[output.request_id] = output
            enough = patience.get(output.request_id, float("inf"))
            if len(output.outputs[0].token_ids) >= enough and not output.finished:
                engine.abort_request(output.request_id)
        step += 1
    return last
    #: end

# %% tags=["check"]
check("02.3")

# %% [markdown]
# ### Many readers, one loop
#
# A server cannot sit in that loop: its coroutines wait for sockets. So `AsyncLLM` gives the loop a thread of its own.
# Readers put requests into a queue and each waits at a small mailbox; after a step the thread posts the news. A reader
# who is slow finds the pieces that it missed merged into one. A reader who is cancelled takes the request along:

# %%
import asyncio

args = EngineArgs(block_size=16, num_gpu_blocks_override=16, max_model_len=256)


async def read(name, prompt, patience=100):
    async for output in server.generate(prompt, greedy(7), name):
        heard.append(name)
        if len(output.outputs[0].token_ids) == patience:
            asyncio.current_task().cancel()  # as when a browser tab is closed
    return output.outputs[0].text

# %%
server, heard = AsyncLLM.from_engine_args(args), []
readers = [read("A", prompt), read("B", "One two three four", patience=3), read("C", "My name is")]
for name, result in zip("ABC", await asyncio.gather(*readers, return_exceptions=True)):
    print(name, "·", repr(result))
print("pieces in order of arrival:", "".join(heard))
print("every block is back:", await server.reset_prefix_cache())  # refuses while any request holds one
server.shutdown()

# %% [markdown]
# Three streams, interleaved step by step; `B` falls silent after three pieces. Its cancellation went down the queue as an
# abort, and its blocks were back before anybody asked.
#
# ## The same numbers through a table
#
# Attention does not mind where keys lie, as long as it meets them all. First the evidence: the same two requests, four
# steps, in the engine with blocks and in the one with slabs. The cache of a layer is an array of blocks, and reading
# through a table is one index:

# %%
def cached_keys(llm, request_id, layer):
    """The keys of a running request, [tokens, Hkv, D], and its block table."""
    core = llm.llm_engine.core
    [core_id] = llm.llm_engine.frontend.output_processor.core_ids(request_id)
    request = core.scheduler.requests[core_id]
    layers = core.executor.runner.model.attention_layers()
    keys, _ = layers[layer].kv_cache  # [blocks, block size, Hkv, D]; stored head by head in a block
    return keys[request.block_ids].flatten(0, 1)[: request.num_computed_tokens], request.block_ids

# %%
def run_for(llm, num_steps, **prompts):
    """Start over with these requests, and take some steps."""
    paging.start_over(llm)
    for name, one in prompts.items():
        llm.llm_engine.add_request(name, one, greedy(100))
    for _ in range(num_steps):
        llm.llm_engine.step()

# %%
for each in (llm, slabs):
    run_for(each, 4, other=prompt, x=counting)
(paged, table), (whole, slab) = (cached_keys(each, "x", layer=20) for each in (llm, slabs))
difference = (paged - whole).abs().max()
print(f"{len(paged)} keys in blocks {table}, and in slab {slab}: they differ by {difference:.1e}")
paging.start_over(llm)

# %% [markdown]
# The same keys, but for rounding at most, as nothing but addresses has changed. What attention makes of them, for query
# head $h$ of request $b$ and its $n_b$ tokens:
#
# $$ o_{b,h} = \sum_{p<n_b} w_p \, v_{\text{slot}(p),\,g}, \qquad
#    w = \operatorname{softmax}_p\big(\text{scale} \cdot q_{b,h} \cdot k_{\text{slot}(p),\,g}\big), \qquad
#    g = \lfloor h \cdot H_{kv} / H \rfloor . $$
#
# The last part is grouped-query attention: with $H=9$ and $H_{kv}=3$, query heads 0, 1, 2 read KV head 0. In a batch the
# requests differ in length, so the tables are padded, and there are two kinds of slots that you will gather and must not
# count: those behind the end in a last block, and whole blocks that the padding points to.

# %% tags=["exercise"]
@exercise("02.4", target="course_lib.attention.torch_paged:TorchPagedBackend._decode")
def paged_decode(query, key_cache, value_cache, block_table, seq_lens, scale):
    """Attention of each request's newest token over its whole sequence: float32 [B, H, D].

    query: [B, H, D]; key_cache, value_cache: [blocks, BS, Hkv, D]; block_table: int32 [B, M], padded
    with any valid id; seq_lens: int32 [B], tokens in the cache, the newest included. Query head h
    reads KV head h // (H // Hkv).
    """
    #: solution
    batch, num_heads, head_dim = query.shape
    # [B, M, BS, Hkv, D] -> [B, M * BS, Hkv, D]: block after block is position after position
    keys, values = (cache[block_table.long()].flatten(1, 2) for cache in (key_cache, value_cache))
    grouped = query.reshape(batch, key_cache.shape[2], -1, head_dim)
    scores = torch.einsum("bkgd,blkd->bkgl", grouped, keys) * scale
    hidden = torch.arange(keys.shape[1]) >= seq_lens[:, None]
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bkgl,blkd->bkgd", weights, values).reshape(batch, num_heads, head_dim)
    #: end

# %% tags=["check"]
check("02.4")

# %% [markdown]
# ### Without the copy
#
# That function first copies all keys and values together and then reads the copy: each byte is read twice and written
# once, and decoding is bound by bytes. A GPU kernel reads every block where it lies, once. Then it can never see all
# scores together, and a softmax seems to need all of them, for their largest and their sum.
#
# The way around it is the **online softmax**. Keep three things: `best`, the largest score so far; `total`, the sum of
# $e^{s-\text{best}}$; and `acc`, the sum of $e^{s-\text{best}}\,v$. When a block brings a larger score, everything kept so far is
# too large by the same factor $e^{\text{new best} - \text{best}}$, so shrink it and go on. With scores 1 and 3 in the first
# block, 5 in the second, and values 10, 20, 30:
#
# | after block | best | shrink | total | acc |
# |---|---|---|---|---|
# | 1 | 3 | 0 (best starts at $-\infty$) | $e^{-2}+1=1.135$ | $10e^{-2}+20=21.353$ |
# | 2 | 5 | $e^{3-5}=0.135$ | $1.135\cdot0.135+1=1.154$ | $21.353\cdot0.135+30=32.890$ |
#
# `acc / total` is 28.51, what softmax(1, 3, 5) gives. Nothing was approximated.
#
# In Triton you write what one **program** does, and launch a grid of them; here one for each request and query head.
# `tl.load` takes a tensor of addresses and a mask that says which to touch. `tl.sum` and `tl.max` reduce a tensor along an
# axis; `tl.maximum`, `tl.exp` and `tl.where` work element by element, as in torch. Without a GPU, Triton's interpreter runs
# the kernel in NumPy, slowly. It takes any Python, and no compiler does: the check shows your kernel to the compiler, too.

# %%
try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: stand-ins, so that the cell below can be read and run
    from types import SimpleNamespace

    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=int)

# %% tags=["exercise"]
@triton.jit
def paged_decode_kernel(query, key_cache, value_cache, block_table, seq_lens, out, scale, width,
                        H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BS: tl.constexpr):
    """One program: one request, one query head. Arrays are contiguous; BS and D are powers of two."""
    request, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (H // HKV)
    seq_len = tl.load(seq_lens + request)
    offsets, dims = tl.arange(0, BS), tl.arange(0, D)
    q = tl.load(query + (request * H + head) * D + dims)  # [D]
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([D], dtype=tl.float32)
    for first in range(0, seq_len, BS):
        block = tl.load(block_table + request * width + first // BS).to(tl.int64)
        rows = (block * BS + offsets) * HKV + kv_head  # slot * HKV + head: which D numbers of the cache
        inside = first + offsets < seq_len  # [BS]; False for the empty slots of the last block
        #: solution
        k = tl.load(key_cache + rows[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(value_cache + rows[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0)
        scores = tl.where(inside, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=0))
        shrink = tl.exp(best - new_best)
        weights = tl.exp(scores - new_best)
        acc = acc * shrink + tl.sum(weights[:, None] * v, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        best = new_best
        #: stub
        # Load k and v, [BS, D], from key_cache + rows[:, None] * D + dims[None, :], where inside.
        # Score them. Then merge them into best, total and acc.
        ...
        #: end
    tl.store(out + (request * H + head) * D + dims, acc / total)


@exercise("02.5", target="kernels.triton.paged_decode:paged_attention_decode")
def launch_paged_decode(query, key_cache, value_cache, block_table, seq_lens, scale):
    """What paged_decode computes, by the kernel; nothing is to be done here."""
    out = torch.empty_like(query)
    (batch, H, D), (_, BS, HKV, _) = query.shape, key_cache.shape
    paged_decode_kernel[batch, H](query, key_cache, value_cache, block_table, seq_lens, out,
                                  scale, block_table.shape[1], H, HKV, D, BS)  # fmt: skip
    return out

# %% tags=["check"]
check("02.5")

# %% [markdown]
# Look at `rows` again: the slot of your first exercise is in it, and finds one row per KV head. The engine's own kernel,
# `kernels/triton/paged_decode.py`, differs in two ways. A program takes all query heads of one KV head, so that each key is
# read once and not three times; and long sequences are cut into parts for several programs, whose results merge by the
# same rule as two blocks do.
#
# ## Break it: two bugs, two tools
#
# Two suspects. The first forgets to multiply by the block size, so that everybody's keys land in the first few slots
# and overwrite each other. The second is a pool whose `release` does not count. Here is what the first one says:

# %%
from course_lib.runner.input_batch import slot_mapping as right_slots


def wrong_slots(table, rows, positions, size):
    slots = right_slots(table, rows, positions, size)
    return slots // size + slots % size  # block id + offset


def careless_release(pool, block_ids):
    for block_id in block_ids:
        pool.blocks[block_id].ref_count = 0
        pool.free_queue.append(pool.blocks[block_id])

# %%
from unittest.mock import patch

SLOTS = "course_lib.runner.model_runner.slot_mapping"
paging.start_over(llm)
texts = ("Who wrote Hamlet?", "What does CPU stand for?")
pair = [[{"role": "user", "content": text}] for text in texts]
with patch(SLOTS, wrong_slots):
    for output in llm.chat(pair, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False):
        print(repr(output.outputs[0].text))

# %% [markdown]
# The first question was who wrote Hamlet. Both requests have written into the same few slots, so the first reader is
# answered what the *second* one asked, in decent English: on a server, a stranger's conversation. There was no exception
# and no NaN, and anyone who saw only the second answer would blame the model. Which tool would have told you?

# %%
predict("02.c")

# %%
def audit(target, broken):
    """What check_invariants says after some steps with something broken in the engine."""
    with patch(target, broken):
        run_for(llm, 3, one=counting + " one", two=counting + " two")
        engine.abort_request("two")
    try:
        engine.core.scheduler.check_invariants()
        return "the books are in order"
    except AssertionError as error:
        return str(error)

# %%
print("wrong slots:     ", audit(SLOTS, wrong_slots))
print("careless release:", audit("course_lib.core.block_pool.BlockPool.release", careless_release))
reveal("02.c")

# %% [markdown]
# For the first suspect you need the other tool: the truth, computed in an obvious way, to compare with. Layer 0 makes it
# sharp, because its keys depend on nothing but the token and its position. Run a prompt alone with the right slots, then
# beside another one with the suspect's, and compare key by key. (`start_over` has zeroed the cache: what an earlier
# request left there could be right by accident and hide the bug.) A third bug joins them, which looks up one position too
# far, `(p + 1) // block_size`.

# %%
def one_too_far(table, rows, positions, size):
    return right_slots(table, rows, positions + 1, size) // size * size + positions % size


def keys_with(slots, **others):
    """The keys in layer 0 of one request, which shares its step with others."""
    with patch(SLOTS, slots):
        run_for(llm, 1, one=counting * 3, **others)
    return cached_keys(llm, "one", layer=0)[0]

# %%
suspects = {"right slots": right_slots, "id + offset": wrong_slots, "one too far": one_too_far}
truth, wrong = keys_with(right_slots), {}
for name, slots in suspects.items():
    keys = keys_with(slots, two="Two. " + counting * 3)
    wrong[name] = ((keys - truth).abs().amax(dim=(1, 2)) > 1e-4).tolist()
figure = paging.draw_wrong(wrong)
show(figure, alt="Three rows of positions. With right slots no key is wrong; with block id plus offset "
     "nearly all are; with one too far every sixteenth is wrong, at positions 15, 31 and so on.")

# %% [markdown]
# The third row is a signature that you will meet again: *every sixteenth* position is wrong, so the bug lives at block
# borders. The engine's tests do this with whole requests, on random schedules (`tests/engine/test_schedules.py` against
# `tests/oracle.py`).
#
# ## Measure it
#
# You have two traces of the same nine questions.

# %%
def facts(trace):
    requests = trace.requests.values()
    busy = [len(step.block_tables) for step in trace.steps if step.waiting]
    at_once, slots = sum(busy) / len(busy), trace.num_blocks * trace.block_size
    return {
        "slots in the cache": slots,
        "requests at once, while others wait": at_once,
        "slots for each of them": slots / at_once,
        "steps": len(trace.steps),
        "seconds to a first token, mean": sum(request.ttft for request in requests) / len(requests),
    }

# %%
before, after = facts(slab_trace), facts(block_trace)
for what in before:
    print(f"{what:36} slabs {before[what]:6.1f}   blocks {after[what]:6.1f}")
figure = paging.draw_slots({"Slabs of 256": slab_trace, "Blocks of 16": block_trace})
show(figure, alt="Slots held and filled over the steps, for slabs and for blocks. With blocks most of "
     "what is held is filled, and the run ends after less than half as many steps.")

# %% [markdown]
# Theory: a young conversation here has about 37 tokens, three blocks, of which the first is everybody's. So it costs two
# blocks of its own and later three, 32 to 48 slots where a slab is 256; measured, 39. First tokens gain most, since nobody
# stands in line behind a stranger's long answer. There are still nearly half as many steps because at the end a single long
# answer runs alone. And is a step for seven as quick as one for two? Measure them in turns, so that whatever else your
# machine does meets both:

# %%
from time import perf_counter

crowds = {slabs: 2, llm: 7}
for each, count in crowds.items():
    run_for(each, 1, **{f"q{i}": questions[i] for i in range(count)})
times = {each: [] for each in crowds}
for each in [slabs, llm] * 5:
    start = perf_counter()
    each.llm_engine.step()
    times[each].append(perf_counter() - start)
two, seven = (1000 * sorted(seconds)[2] for seconds in times.values())
print(f"a step for two: {two:.0f} ms, for seven: {seven:.0f} ms, {seven / two:.1f} times as long")

# %% [markdown]
# Three and a half times the tokens, in much less than that time: both steps wait for the same weights. Less than half the
# steps, each of them longer: together that is the gain in seconds.
#
# And the kernel of 02.5, in earnest? Your machine has only its interpreter, so here is the engine on one H100, from a
# ledger that `python3 -m course_lib bench ladder` wrote there. Each row keeps what the rows above it have:

# %%
from course_lib.bench.ledger import read_ledger
from course_lib.bootstrap.places import REPO_ROOT

ladder = read_ledger(REPO_ROOT / "course_lib/bench/ledgers/h100_ladder.json")
print(f"{ladder.machine['gpu']}, tokens/s{'one request':>32}{'256 long ones':>16}")
few, many = ([row for row in ladder.rows if row.group == group] for group in ("single", "nanovllm"))
for one, crowd in list(zip(few, many))[:5]:  # the same rung
    print(f"{one.name:44}{one.median:16,.0f}{crowd.median:16,.0f}")

# %% [markdown]
# With 256 long requests there is much to copy, and not copying it nearly triples the speed. One request has little to
# copy; there the kernel even costs, because the GPU spends the step waiting for Python to launch the next operation, and
# launching this one takes Python longer.
# That wait is what the last two rungs remove: a **CUDA graph** replays a whole recorded step with one launch, and with
# **asynchronous scheduling** the loop plans and launches the next step before it has read this one's tokens.
#
# Now with your own code in it. Starting over makes the engine build a new pool, which is yours if you have passed:

# %%
with my_code():
    paging.start_over(llm)
    [output] = llm.chat(pair[1], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
print(output.outputs[0].text)

# %% [markdown]
# ## How vLLM does it
#
# | here | in vLLM | what differs there |
# |---|---|---|
# | `core/block_pool.py` | `vllm/v1/core/block_pool.py`, `kv_cache_utils.py` | block 0 is never handed out: it stands for "no block" |
# | `core/kv_cache_manager.py` | `vllm/v1/core/kv_cache_manager.py` | several groups of layers with tables of their own |
# | `runner/input_batch.py`, `slot_mapping` | `vllm/v1/worker/block_table.py` | also as a kernel, on the GPU |
# | `attention/torch_paged.py` | `vllm/v1/attention/backends/cpu_attn.py` | C++ |
# | `kernels/triton/paged_decode.py` | `vllm/v1/attention/ops/triton_unified_attention.py` | prompts and decodes in one kernel |
# | `engine/llm_engine.py`, `engine/core.py` | `vllm/v1/engine/llm_engine.py`, `core.py` | by default the core in a process of its own, behind ZeroMQ sockets |
# | `engine/async_llm.py` | `vllm/v1/engine/async_llm.py`, `core_client.py` | the same mailboxes; `vllm/engine/async_llm_engine.py` is an alias |
#
# Why a process, where ours has a thread? Python runs one thread at a time, and turning tokens into text for hundreds of
# streams would steal time from the loop that keeps the GPU busy. And why do both engines link their free blocks by hand,
# where an `OrderedDict` does? A list threaded through the block objects themselves hashes nothing and allocates nothing.
#
# vLLM's first engine shared the last, half-filled block of an `n=2` prompt too, and copied it when one of the two wrote
# (copy-on-write). The second one shares full blocks, through its prefix cache, and recomputes the few tokens that are left:
# less code, no copying kernel.
#
# ## Recap
#
# - Nobody knows how long a text gets. Reserving for the longest leaves most of the memory empty.
# - Equal blocks, handed out when needed, waste less than one block per request and leave no holes.
# - A table turns positions into slots. Writing goes through the slot mapping, reading through the block table.
# - Blocks have holders. The count makes sharing safe, the queue's order keeps useful contents longest.
# - A softmax can be taken block by block: rescale what you have whenever the maximum grows. The numbers stay the same.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *Blocks of 16, a request with 33 tokens: how many slots are held and empty?* 15: three blocks, 48 slots.
# 2. *Why must the free queue give up blocks from its middle?* A prefix hit revives a block wherever it stands in line.
# 3. *Request B's prompt has 40 tokens and A is decoding. How many tokens does their common step compute?* 41.
# 4. *What breaks if the online softmax rescales `acc` and not `total`?* The weights no longer add up to 1, as soon as a
#    later block has a larger score.
# 5. *All invariants hold and the text is odd from the 17th token on. Where do you look?* At what happens when a second
#    block begins: slots, tables, masks at a block border.
#
# </details>
#
# To read: Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (SOSP 2023),
# sections 3 and 4; Milakov and Gimelshein, *Online normalizer calculation for softmax* (2018), which FlashAttention builds on.
#
# **Next: 03, batch inference.** With memory in small pieces many requests can run at once. Who goes first, who waits, and
# who has to give blocks back?
