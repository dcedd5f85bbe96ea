# ---
# jupyter:
#   course:
#     lesson: "03"
#     objectives:
#       - Measure where a step stops being free, and say why that makes tokens, not requests, the unit of a batch
#       - Show what a static batch wastes, count it exactly, and win it back by deciding anew at every step
#       - Write the scheduler's two passes, and choose their budget for a latency
#       - Take a request's memory away in the middle of its answer without changing a word of it
#       - Run a data set through engines with Ray Data, and know what that buys
#     difficulty: 3
#     needs: ["01", "02"]
#     opens:
#       - course_lib/core/scheduler.py
#       - course_lib/core/request.py
#       - course_lib/core/request_queue.py
#       - course_lib/core/kv_cache_manager.py
#       - course_lib/entrypoints/ray_data.py
#     terms:
#       static batching: A batch whose requests start together and are handed over together, when the longest is done.
#       continuous batching: Deciding at every step who is in the batch, so that requests join and leave while others run.
#       token budget: The most tokens that one step computes, of all requests together; vLLM's max_num_batched_tokens.
#       chunked prefill: Computing a prompt in pieces over several steps, because a step's budget does not hold all of it.
#       inter-token latency: The time between two tokens of one answer, as a reader of the stream feels it.
#       preemption: Taking the cache of a running request away, so that it starts over later with the tokens it has.
#       priority inversion: An urgent request loses, or waits, for the sake of one that is less urgent.
#       back-pressure: A stage that is full makes the stages before it wait, so that work does not pile up in between.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## Where a step stops being free
#
# Lesson 01 ended with a promise: if a decode step is bound by fetching the weights, a step for eight requests costs
# hardly more than a step for one. Before you build on it, find out how far it holds. `serve` drives the engine step by
# step, as in lesson 02, with requests that arrive when you say: (step of arrival, prompt, tokens to write). `limited`
# changes an engine's limits for a while, and `record` writes down what it does.

# %%
import matplotlib.pyplot as plt
import numpy as np

from course_lib import SamplingParams
from course_lib.core.request import RequestStatus
from course_lib.teaching import check, course_llm, exercise, hint, my_code, predict, reveal, solution
from course_lib.teaching import course_style, explore_schedule, record, show
from course_lib.teaching.explorers.batching import draw_seats
from course_lib.teaching.recording.scheduling import limited, serve, static_batches, step_ms
from course_lib.teaching.recording.scheduling import total_tokens

llm = course_llm()
tokenizer = llm.get_tokenizer()


def text(i, length):
    """Some prompt or other: the time does not depend on which tokens it has."""
    return [1000 + 37 * i + j for j in range(length)]


# %%
def time_decode(n):
    return step_ms(serve(llm, [(0, text(i, 1), 3) for i in range(n)])[1], n)


sizes = np.array([1, 8, 16, 32])
decode_ms = np.min([[time_decode(n) for n in sizes] for _ in range(3)], axis=0)
per_token, fixed = np.polyfit(sizes, decode_ms, 1)
for n, ms in zip(sizes, decode_ms):
    print(f"{n:2d} requests: {ms:4.0f} ms a step, {1000 * n / ms:4.0f} tokens/s")
print(f"about {fixed:.0f} ms, and {per_token:.1f} ms more for each request")
print(f"the two are equal at {fixed / per_token:.0f} requests")

# %% [markdown]
# A step pays once for bringing the weights to the cores (270 MB: computed with in float32, they are read as the float16
# numbers of the model's file if the processor has AVX-512), and then a little for each row that is multiplied with them.
# Where the two are equal a step costs double; twice as many requests then take half as long again, and only far beyond
# that nearly twice as long.
# On an H100 in bfloat16 the same two numbers (989 TFLOP/s and 3.35 TB/s, two operations and two bytes a weight) are equal
# at about 300 rows: a chip that decodes for one user spends its time waiting for weights.
#
# So: batch. The obvious way is to collect requests until there are enough, run them together, and hand out the answers.
#
# ## Everybody waits for the dragon
#
# Here are 16 questions, most of them with a short answer, and an engine with eight seats. A **static batch** is a tensor
# with eight rows: it starts when its eight requests are there and ends when the last of them is done. `static_batches` runs
# our engine that way, and is kind to the method, since our engine does not pad prompts.

# %%
QUESTIONS = """What is the capital of France?
Is the sun a star? Answer yes or no.
Write a story about a dragon who is afraid of fire.
Translate to French: good morning
Is 10 larger than 9?
Give one word that means happy.
What is the opposite of hot?
How many legs has a spider?
Say hello in Spanish.
What is the capital of Japan?
What is the chemical symbol for gold?
Explain how a bicycle stays upright.
In which year did the Second World War end?
Finish the sentence: The cat sat on the
Tell me a joke.
Who wrote Hamlet?""".splitlines()

# %%
SYSTEM = {"role": "system", "content": "Answer in a few words."}


def chat(question):
    talk = [SYSTEM, {"role": "user", "content": question}]
    return tokenizer.encode(
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    )


prompts = [chat(question) for question in QUESTIONS]

# %%
predict("03.a")

# %%
static_answers, static_s, static_trace = static_batches(llm, prompts, seats=8, most=32)
lengths = [len(answer) for answer in static_answers]
print("France:", tokenizer.decode(static_answers[0], skip_special_tokens=True))
print("dragon:", tokenizer.decode(static_answers[2]), "…")
print(f"tokens per answer: {lengths}")
reveal("03.a")

# %%
show(draw_seats(static_trace, lengths),
     alt="Eight seats over 64 steps, in two groups. Most seats show a short answer and then a long "
     "hatched stretch in which the seat is held for nothing, until the longest answer of the group "
     "ends at step 32 and 64.")

# %% [markdown]
# *Paris* was known at step 8 and was handed over at step 32, because somebody else wanted a story about a dragon. In the
# hatched stretch the row was computed all the same: a tensor has no ragged edge. And the ninth question waited, while
# seven of eight seats did nothing for anybody.
#
# How much is wasted? It follows from the lengths alone. Let request $i$ have a prompt of $p_i$ tokens and an answer of
# $a_i$. A group $G$ is one rectangle: prompts padded to the longest, then answers to the longest,
#
# $$ \text{computed} = \sum_G |G| \cdot \bigl(\max_{i \in G} p_i + \max_{i \in G} a_i - 1\bigr), \qquad
# \text{needed} = \sum_i (p_i + a_i - 1). $$
#
# The $-1$ is there because the pass over the prompt gives the first token of the answer. Three requests in three seats:
#
# | request | prompt, padded to 5 | further passes, up to the longest answer |
# |---|---|---|
# | (5, 2) | `ppppp` | `a····` |
# | (3, 6) | `··ppp` | `aaaaa` |
# | (4, 1) | `·pppp` | `·····` |
#
# 30 positions are computed; 18 of them, the letters, were needed.

# %% tags=["exercise"]
@exercise("03.1")
def static_cost(requests, seats):
    """(computed, needed): positions that static batching computes, and those that anybody needed.

    requests: list of (prompt tokens, answer tokens), served in this order in groups of `seats`;
    the last group may be smaller. [(5, 2), (3, 6), (4, 1)] with 3 seats: (30, 18).
    """
    #: solution
    computed = needed = 0
    for first in range(0, len(requests), seats):
        group = requests[first : first + seats]
        longest_prompt = max(prompt for prompt, _ in group)
        longest_answer = max(answer for _, answer in group)
        computed += len(group) * (longest_prompt + longest_answer - 1)
        needed += sum(prompt + answer - 1 for prompt, answer in group)
    return computed, needed
    #: end

# %% tags=["check"]
check("03.1")

# %% [markdown]
# ## Decide again at every step
#
# The group was a decision made once, with the lengths unknown. But every decode step ends with a moment in which nothing
# is under way: all tokens are out, all keys and values are in the cache. In that moment the batch may be anything. Let
# those who are done leave, let the next in the queue take their seats, and go on. That is **continuous batching**, from
# Orca (Yu et al., OSDI 2022). It is what `generate` has been doing all along:

# %%
with limited(llm, max_num_seqs=8, enable_prefix_caching=False), record(llm) as trace:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
answers = [list(output.outputs[0].token_ids) for output in outputs]
print("the same answers as before:", answers == static_answers)
needed = sum(map(len, prompts)) + sum(lengths) - len(prompts)
print(f"{total_tokens(trace)} positions computed, {needed} needed")

# %%
show(draw_seats(trace, lengths, num_steps=len(static_trace.steps)),
     alt="The same eight seats with continuous batching, on the same axis: a seat whose answer ends "
     "is taken by the next request in the following step, nothing is hatched, and the run ends after "
     "about 40 instead of 64 steps.")

# %% [markdown]
# Not a position too many. What is left at the end is the tail: the last long answer runs alone, and nobody is waiting to
# keep it company. Now the clock, beside a forecast from nothing but the two numbers of the first measurement. (If they
# differ much, another program has taken its turns.)

# %%
forecast, measured = [], []
for run in (static_trace, trace):
    forecast.append((fixed * len(run.steps) + per_token * total_tokens(run)) / 1000)
    measured.append(run.steps[-1].start + run.steps[-1].execute_s - run.steps[0].start)
for name, (static, continuous) in (("forecast", forecast), ("measured", measured)):
    print(f"{name}: {static:.1f} s and {continuous:.1f} s, {static / continuous:.1f} times faster")
finished = [request.finished for request in trace.requests.values()]
print(f"on average an answer is there {np.mean(static_s) / np.mean(finished):.1f} times sooner")

# %%
with course_style():
    fig, axis = plt.subplots(figsize=(8, 2.8))
    axis.plot(range(1, 17), static_s, marker="s", linestyle="none", label="static")
    axis.plot(range(1, 17), finished, marker="o", linestyle="none", label="continuous")
    axis.set(xlabel="request, in order of arrival", ylabel="s until its answer", ylim=(0, None))
    axis.legend()
show(fig, alt="Seconds until each of 16 requests has its answer. Static batching: two flat steps, one "
     "for each group. Continuous batching: points well below, most at a fraction of the time.")

# %% [markdown]
# Fewer steps save the fixed part, fewer tokens the rest. The gain is larger the more the lengths differ, the larger the
# batch, and the cheaper a row (on a GPU far below its 300 rows, only the steps count). With equal lengths it is zero.
#
# One request gains nothing: the dragon takes its 32 steps either way, and now they also carry the prompts of newcomers. (On
# a quiet machine its circle lies above its square.)
#
# How cheap a row is on a GPU can be read from the ledger that the engine's benchmark left behind on an H100, for one
# request, for 64, and for 256 that keep arriving and leaving:

# %%
from course_lib.bench.ledger import read_ledger
from course_lib.bench.workloads import WORKLOADS, output_tokens
from course_lib.bootstrap.places import REPO_ROOT

ladder = read_ledger(REPO_ROOT / "course_lib/bench/ledgers/h100_ladder.json")
for row in ladder.rows:
    if row.name == "+ asynchronous scheduling":  # its last rung: the engine as it is
        tokens, steps = output_tokens(WORKLOADS[row.group](49152)), row.details["steps"]
        print(f"{tokens / steps:4.0f} decodes a step: {1000 * tokens / row.median / steps:.2f} ms, "
              f"{row.median:6,.0f} tokens/s")

# %% [markdown]
# Sixty-four rows, for twice the time of one. In the last line the prompts, and long texts whose keys and values must be
# read, are in the milliseconds too.
#
# ## Whose token is it?
#
# One thing in that run should bother you. When a request joined, its prompt of 30 tokens was computed *in the same step*
# in which the others decoded. Static batching keeps the two apart. How can one step do both?

# %%
predict("03.b")

# %%
jobs = {
    "32 decodes": [(0, text(i, 1), 3) for i in range(32)],
    "a prompt of 32": [(i, text(i, 32), 1) for i in range(3)],
    "16 decodes, 16 of a prompt": [(0, text(i, 1), 4) for i in range(16)]
    + [(i, text(i, 16), 1) for i in range(1, 4)],
}
times = [[step_ms(serve(llm, mix)[1], 32) for mix in jobs.values()] for _ in range(2)]
for name, ms in zip(jobs, np.min(times, axis=0)):
    print(f"{name:28s} {ms:4.0f} ms")
reveal("03.b")

# %% [markdown]
# The layers multiply *rows* by weights. There is no dimension for requests: the runner lays all new tokens of all requests
# one after the other in a flat batch, and only attention looks up, row by row, which request a row is from and where that
# request's keys lie (lesson 02's block tables). To a weight matrix, 32 tokens are 32 tokens.
#
# So a step has no room for "8 requests". It has room for a number of **tokens**, the **token budget**, whoever they
# belong to. And a request is not in a phase. It has two numbers:
#
# - `num_tokens`: what is known of its text, prompt and answer so far;
# - `num_computed_tokens`: how many of these have their keys and values in the cache.
#
# The scheduler has one rule: **hand out the budget so that the second catches up with the first.** A new prompt is 30
# behind, a decoding request 1 behind. When a request has caught up, the model's last row is the next token, `num_tokens`
# grows, and it is 1 behind again. Three prompts of 100, 30 and 10 tokens under a budget of 64, before each step:
#
# | step | A: computed / known | B | C | tokens given |
# |---|---|---|---|---|
# | 0 | 0 / 100 | 0 / 30 | 0 / 10 | 64 · 0 · 0 |
# | 1 | 64 / 100 | 0 / 30 | 0 / 10 | 36 · 28 · 0 |
# | 2 | 100 / 101 | 28 / 30 | 0 / 10 | 1 · 2 · 10 |
# | 3 | 101 / 102 | 30 / 31 | 10 / 11 | 1 · 1 · 1 |
#
# Nobody decided to cut A's prompt in two. It was behind by more than there was. A second limit, the threshold
# (`long_prefill_token_threshold`), keeps one long prompt from taking a whole step: no request gets more than that at once.

# %% tags=["exercise"]
@exercise("03.2", target="course_lib.core.scheduler:Scheduler._chunk")
def tokens_of_step(requests, budget, threshold):
    """How many tokens each request gets in one step: a list with one number, possibly 0, for each.

    requests: list of (num_computed, num_tokens), in order of service; budget: tokens for all
    together, at least 1; threshold: the most for any one request, 0 if there is no such limit.
    [(64, 100), (0, 30), (0, 10)], budget 64: [36, 28, 0]; with a threshold of 16: [16, 16, 10].
    """
    #: solution
    counts = []
    for num_computed, num_tokens in requests:
        count = min(num_tokens - num_computed, threshold or num_tokens, budget)
        budget -= count
        counts.append(count)
    return counts
    #: end

# %% tags=["check"]
check("03.2")

# %% [markdown]
# The scheduler sees counts and never a tensor, so it can rehearse a step without the model. Its answer to the table above:

# %% tags=["exact"]
jobs = [(0, text(i, length), 3) for i, length in enumerate((100, 30, 10))]
_, rehearsal = serve(llm, jobs, max_num_batched_tokens=64, run_model=False)
for step in rehearsal.steps:
    print(step.index, step.scheduled)

# %% [markdown]
# ## Who may join
#
# The order of service is: running requests first, oldest first; what they leave of the budget goes to the queue. To join,
# a request needs three things: at least one token of the budget, one of the `max_num_seqs` seats, and blocks for the
# tokens it gets *in this step*. With 9 free blocks of 16, three seats and a budget of 64:
#
# | waiting | gets | blocks | left: budget, seats, blocks |
# |---|---|---|---|
# | 30 | 30 | 2 | 34, 2, 7 |
# | 60 | 34, the rest later | 3 | 0, 1, 4 |
# | 20 | the budget is used up | | |
#
# If the one in front does not fit, those behind it wait too, even if they would. That looks wasteful, and it is what makes
# the queue fair: with overtaking, a stream of small requests can keep a large one out for ever.

# %% tags=["exercise"]
@exercise("03.3", target="course_lib.core.scheduler:Scheduler._admit_waiting")
def admit(waiting, budget, seats, free_blocks, block_size):
    """How many tokens each request that joins gets in this step: a list, one number for each.

    waiting: tokens that each waiting request has to compute, front of the queue first; budget,
    seats, free_blocks: what is left, possibly 0; block_size: tokens per block. Nobody overtakes,
    and a prompt may join with a part of it.
    waiting [30, 60, 20], budget 64, 3 seats, 9 blocks of 16: [30, 34].
    """
    #: solution
    counts = []
    for length in waiting:
        count = min(length, budget)
        needed = -(-count // block_size)
        if count == 0 or seats == 0 or needed > free_blocks:
            break
        counts.append(count)
        budget, seats, free_blocks = budget - count, seats - 1, free_blocks - needed
    return counts
    #: end

# %% tags=["check"]
check("03.3")

# %% [markdown]
# ## What the budget is for
#
# A larger budget finishes prompts in fewer steps, and each step brings the weights once. Why not let it be huge? Ask the
# readers of a stream. Four of them are getting a token at every step when somebody pastes in a page:

# %%
predict("03.c")

# %%
readers = [(0, text(i, 8), 14) for i in range(4)]
page = (4, text(9, 384), 1)
gaps = {}
for budget in (2048, 64):
    _, run = serve(llm, [*readers, page], max_num_batched_tokens=budget)
    gaps[budget] = np.diff([step.start for step in run.steps])
    print(f"budget {budget:4d}: longest gap between two tokens {1000 * gaps[budget].max():5.0f} ms, "
          f"the page's first token after {run.requests['4'].ttft:.2f} s")
reveal("03.c")

# %%
with course_style():
    fig, axis = plt.subplots(figsize=(8, 2.8))
    for (budget, ms), marker in zip(gaps.items(), "os"):
        axis.plot(1000 * ms, marker=marker, markersize=4, label=f"budget {budget}")
    axis.set(xlabel="token of a reader's answer", ylabel="ms since the last", ylim=(0, None))
    axis.legend()
show(fig, alt="Milliseconds between two tokens of a reader, one by one. Budget 2048: one gap far above "
     "all others. Budget 64: a low plateau of seven tokens.")

# %% [markdown]
# One page, and with the large budget all four texts freeze for as long as its prefill takes. **Chunked prefill** turns
# the one long **inter-token latency** into a few slightly longer ones (Sarathi-Serve, 2024, calls it stall-free). The
# newcomer pays with its TTFT, and total throughput with the extra trips of the weights. The budget is the dial. That is
# why vLLM's default on an H100 is 16,384 tokens for offline `LLM`, where nobody watches, and 8,192 for the server.
#
# ## When the cache is full
#
# A request was admitted with blocks for its chunk. Its answer grows, every 16 tokens it needs another block, and the
# scheduler has promised none. Then one day a running request must write a token and there is no block. Waiting does not
# help if everybody waits. Somebody has to give its blocks back: **preemption**.
#
# *Who?* The youngest. It has the least to lose, and the oldest, which nobody can preempt, is sure to finish; then
# the next oldest is.
#
# *What is lost?* The cache, not the text. The victim keeps its prompt and the answer it has written, which the user has
# seen. It goes to the *front* of the queue with `num_computed_tokens = 0`, and a step that preempts admits nobody. Then
# nothing special happens: it is a request that is 40 tokens behind. Prompt and half an answer are computed like one longer
# prompt, and the next token comes out as if nothing had been.
#
# | | running | waiting | free blocks | D: computed / known |
# |---|---|---|---|---|
# | before | A B C D | E | 0 | 39 / 40, 3 blocks |
# | D preempted | A B C | D E | 3 | 0 / 40 |
# | back, some steps later | A B D | E | … | 40 / 41 |

# %% tags=["exercise"]
@exercise("03.4", target="course_lib.core.scheduler:Scheduler._preempt")
def preempt(scheduler, request):
    """Take the cache of a running request away, and let it wait for its next turn.

    scheduler.running: list of requests, to be changed in place; scheduler.kv_cache.free(request):
    returns all blocks of a request, and looks at its num_computed_tokens to see which of them hold
    anything; scheduler.waiting: the queue, with return_preempted(request). On the request:
    num_computed_tokens, status (to be RequestStatus.PREEMPTED), and num_preemptions, a count.
    """
    #: solution
    scheduler.running.remove(request)
    scheduler.kv_cache.free(request)
    request.num_computed_tokens = 0
    request.num_preemptions += 1
    request.status = RequestStatus.PREEMPTED
    scheduler.waiting.return_preempted(request)
    #: end

# %% tags=["check"]
check("03.4")

# %% [markdown]
# Does nobody notice? Four long answers, in a cache where all of them fit, and in one that is far too small. From here on
# the cells run with whatever of yours has passed.

# %%
long_ones = (QUESTIONS[2], QUESTIONS[11], "Why is the sky blue?", "Give me a recipe for pancakes.")
stories = [(0, chat(question), 16) for question in long_ones]
with my_code():
    undisturbed, roomy = serve(llm, stories, num_blocks=16)
    disturbed, crowded = serve(llm, stories, num_blocks=8)
print("preemptions:", [request.num_preemptions for request in crowded.requests.values()])
print("the same answers:", disturbed == undisturbed)
for name, run in (("16 blocks", roomy), ("8 blocks", crowded)):
    print(f"{name}: {len(run.steps)} steps, {total_tokens(run)} tokens computed")

# %%
explore_schedule(crowded)

# %% [markdown]
# Move the slider to a step that preempts. The answers do not change, but a third more tokens are computed than needed.
# Preemption is a way out of a deadlock and no way to run a server; `num_preemptions` above zero on a dashboard means that
# the cache is too small or `max_num_seqs` too large.
#
# ## Break it: take the blocks back
#
# Here is an idea to save all that computing. When a preempted request comes back, its old blocks may still hold its keys
# and values. Remember which they were, and take them back. (To the scheduler that looks like a prefix hit, so
# prefix caching is on in this run; and `check_invariants` runs after every step, as it does under `COURSE_DEBUG=1`.)

# %%
from unittest.mock import patch

from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.scheduler import Scheduler

remembered = {}
honest_preempt = Scheduler._preempt


def preempt_and_remember(scheduler, request):
    full = request.num_computed_tokens // 16
    remembered[request.request_id] = request.block_ids[:full]
    honest_preempt(scheduler, request)


def take_back(kv_cache, request):
    return remembered.get(request.request_id, [])


checked = {"enable_prefix_caching": True, "check_invariants": True}
with patch.object(Scheduler, "_preempt", preempt_and_remember):
    with patch.object(KVCacheManager, "get_computed_blocks", take_back):
        broken, suspect = serve(llm, stories, num_blocks=8, **checked)
print(f"{total_tokens(suspect)} tokens computed, instead of {total_tokens(crowded)}")
for right, wrong in zip(undisturbed, broken):
    print("right: " + tokenizer.decode(right).replace("\n", " "))
    print("here:  " + ("the same" if right == wrong else tokenizer.decode(wrong)))

# %% [markdown]
# It saves most of the work, no invariant breaks, and three answers are right. But the recipe is about bicycles, like an
# answer next to it. Nobody had asked whether a block went to someone else in between. A trace can tell, since it has the
# block tables of every step: a request may only read blocks that it was the last to write.

# %%
def foreign_reads(trace):
    """(step, reader, block, writer) wherever somebody else was the last to write what is read."""
    writer = {}
    for step in trace.steps:
        for name, table in step.block_tables.items():
            first = step.computed[name]
            for position in range(first, first + step.scheduled.get(name, 0)):
                writer[table[position // 16]] = name
        for name, table in step.block_tables.items():
            for block in table[: step.computed[name] // 16]:
                if writer[block] != name:
                    yield step.index, name, block, writer[block]


print("honest run:", next(foreign_reads(crowded), "every request reads its own blocks"))
step, reader, block, author = next(foreign_reads(suspect))
print(f"broken run: in step {step} request {reader} reads block {block}, written by request {author}")

# %% [markdown]
# With strangers in one batch, that is no wrong word but a leak. The invariants could not see it: at every single step the
# books are in order, and what is wrong happened between two of them. Comparing with an undisturbed run shows it, and
# the engine's tests do that on 60 random schedules each time they run (`tests/engine/test_schedules.py`).
#
# The idea itself is sound if it asks for a block's *content* instead of its number. Prefix caching does (lesson 07), and a
# preempted request profits: `free` leaves full blocks findable by content until somebody takes them.
#
# ## Some requests are more urgent
#
# Under the policy `"priority"` each request brings a number, smaller first. The queue becomes a heap; that is the easy
# half. The other is the first pass, the heart of the scheduler: serve everybody who runs, and when blocks run out, take
# them from the least deserving, the one with the largest (priority, arrival time). Now the victim can be anywhere:
#
# - behind the request that asks: it is not served in this step;
# - before it: it *was* served in this step, and what it got must go back to the budget;
# - itself: it gives way and the pass goes on to the next. (Taking a more urgent request's blocks instead would be a
#   **priority inversion**.)
#
# Of the requests that are equal in both, the last in the list goes.

# %% tags=["exercise"]
@exercise("03.5", target="course_lib.core.scheduler:Scheduler._continue_running")
def serve_running(scheduler, budget, plan, preempted):
    """The first pass of a step. Returns the budget that is left.

    scheduler.running: the list of running requests, in order of service; budget: tokens, at least 1.
    plan: empty dict, to be filled: request -> (number of tokens, new block ids);
    preempted: empty set, to be filled with request ids.
    Of use: scheduler._chunk(remaining, budget) -> tokens for one request;
    scheduler.kv_cache.allocate_slots(request, tokens) -> new block ids, or None if there are too
    few; scheduler._preempt(request), which takes it out of scheduler.running;
    request.num_tokens, .num_computed_tokens, .priority, .arrival_time, .request_id.
    """
    #: solution
    for request in list(scheduler.running):
        if budget <= 0:
            break
        if request.request_id in preempted:
            continue
        count = scheduler._chunk(request.num_tokens - request.num_computed_tokens, budget)
        blocks = scheduler.kv_cache.allocate_slots(request, count)
        while blocks is None and request.request_id not in preempted:
            youngest_first = reversed(scheduler.running)
            victim = max(youngest_first, key=lambda one: (one.priority, one.arrival_time))
            if victim in plan:
                budget += plan.pop(victim)[0]
            scheduler._preempt(victim)
            preempted.add(victim.request_id)
            if victim is not request:
                blocks = scheduler.kv_cache.allocate_slots(request, count)
        if blocks is not None:
            plan[request] = (count, blocks)
            budget -= count
    return budget
    #: end

# %% tags=["check"]
check("03.5")

# %% [markdown]
# Twelve requests in a cache for five, every third of them urgent (priority 0), by the engine with your parts in it. Who
# pays?

# %%
params = SamplingParams(max_tokens=40, ignore_eos=True)
texts, urgency = [text(i, 20) for i in range(12)], [0 if i % 3 == 2 else 1 for i in range(12)]
tight = {"policy": "priority", "num_blocks": 20, "enable_prefix_caching": False, "run_model": False}
with my_code(), limited(llm, **tight), record(llm) as run:
    llm.generate(texts, params, priority=urgency, use_tqdm=False)
last_step = {name: step.index for step in run.steps for name in step.finished}
for level in (0, 1):
    names = [name for name, priority in zip(run.requests, urgency) if priority == level]
    lost = sum(run.requests[name].num_preemptions for name in names)
    steps = np.median([last_step[name] for name in names])
    print(f"priority {level}: {lost} preemptions, answers complete after {steps:.0f} steps (median)")

# %% [markdown]
# `tokens_of_step`, `admit`, `preempt`, `serve_running`: with all four passed, every decision of every step is yours. From a
# terminal: `python3 -m course_lib chat --mine`.
#
# One limit, here and in vLLM: an urgent request that *waits* preempts nobody. It goes to the front of the queue and joins
# when there is room.
#
# ## A data set
#
# An engine keeps its seats full as long as its queue is not empty. For ten million rows, then, the questions left are
# where the queue comes from, where the answers go, and what happens on the second machine. vLLM's example for this
# lesson (in 0.32 `examples/ray_serving/batch_llm_inference.py`) hands them to Ray Data, and so does this, with its import
# changed and a model of your size:

# %%
from course_lib.entrypoints.ray_data import build_llm_processor, vLLMEngineProcessorConfig
from course_lib.entrypoints.ray_local import start_local_ray

config = vLLMEngineProcessorConfig(
    model_source="HuggingFaceTB/SmolLM2-135M-Instruct",
    engine_kwargs={
        "enable_chunked_prefill": True, "max_num_batched_tokens": 256, "max_model_len": 512
    },
    concurrency=1,  # engines, each a process with weights and a cache of its own
    batch_size=16,  # rows handed to an engine at once
)
processor = build_llm_processor(
    config,
    preprocess=lambda row: {
        "messages": [SYSTEM, {"role": "user", "content": row["text"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 8},
    },
    postprocess=lambda row: {
        "question": row["text"], "answer": row["generated_text"], "s": row["time_taken_llm"]
    },
)

# %%
import time


def answer_all(questions):
    """The rows, answered by an engine in a Ray of our own, or None where Ray cannot start."""
    start = time.perf_counter()
    print("starting Ray and a second engine: up to half a minute …", flush=True)
    try:
        start_local_ray(num_cpus=2)
        import ray
    except Exception as error:
        print(f"Ray does not start here ({type(error).__name__}). Read on: nothing below needs it.")
        return None
    try:
        print(f"{time.perf_counter() - start:5.1f} s: Ray runs")
        answered = processor(ray.data.from_items([{"text": question} for question in questions]))
        print(f"{time.perf_counter() - start:5.1f} s: the plan is made, no question is answered")
        rows = answered.take_all()
        print(f"{time.perf_counter() - start:5.1f} s: {len(rows)} questions are answered")
        print(f"of which the slowest took {max(row['s'] for row in rows):.1f} s in the engine")
        return rows
    finally:
        ray.shutdown()


rows = answer_all(QUESTIONS)

# %%
for row in sorted(rows or [], key=lambda row: row["question"])[:3]:
    print(row["question"], "→", row["answer"])

# %% [markdown]
# Nothing ran until `take_all` asked for rows. Each then went through `preprocess` and the engine, both in an *actor* (a
# process that lives as long as the run, so that the model is loaded once), and through `postprocess` in a worker; rows come
# back as they are done, in any order. Nearly all of the time above was start-up, and for 16 rows a loop wins. What Ray
# gives begins where a loop ends:
#
# - **Streaming with back-pressure.** Rows flow through in small blocks. When the engine falls behind, reading stops; a
#   data set larger than memory is no problem.
# - **Many engines.** `concurrency=8` is eight actors, on this machine or on others, each pulling the next batch when it
#   has room. They share nothing.
# - **Somebody to restart what dies**, and readers and writers for Parquet, JSON and object stores around it.
#
# One name is a trap: `batch_size` is no batch in the sense of this lesson but a parcel. If an engine got one parcel at a
# time, its seats would empty towards the end of each: a static batch again, one floor up. So several parcels are under way
# at once (`max_concurrent_batches`), and inside, the scheduler mixes them as it likes.
#
# ## How vLLM does it
#
# `vllm/v1/core/sched/scheduler.py` has the same two passes in one method, `schedule`; the comment at its top says that
# there is no prefill phase and no decode phase. Side by side with `course_lib/core/scheduler.py`:
#
# | | here | vLLM 0.32 |
# |---|---|---|
# | what a request is behind | known − computed | the same, plus draft tokens to verify (lesson 08) |
# | a prompt joins when | its chunk's blocks are free | its *whole* prompt would fit (`scheduler_reserve_full_isl`), and a `watermark` of free blocks may be kept |
# | threshold with one request alone | applies | is ignored: there is nobody to protect |
# | victim | last admitted; or largest (priority, arrival) | the same; of equals the first in the list |
# | the request preempts itself | the pass goes on | the pass ends |
# | planning | after the step before; on a GPU one plain decode step ahead | may overlap with it: a token not known yet is a placeholder (`num_output_placeholders`) |
#
# The second line is experience: if chunks may join without room for the rest, a crowd of long prompts gets in and preempts
# itself. The queues are in `request_queue.py` beside it, the limits in `vllm/config/scheduler.py`.
#
# 0.8.5 still had the old scheduler in `vllm/core/scheduler.py` as well: by default it ran prompts *or* decodes in a step,
# prompts first, and could swap a victim's blocks to the CPU's memory. The PagedAttention paper had found recomputing about
# as fast for blocks of 16 to 64 tokens, and the new engine kept only that.
#
# ## Recap
#
# - A step costs a trip of the weights plus a bit per token. Whose tokens they are does not matter.
# - A batch is therefore a budget of tokens, decided anew at every step.
# - One rule: `num_computed_tokens` catches up with `num_tokens`. Joining, chunking, decoding and starting over are the
#   same case.
# - The budget trades the newcomer's TTFT and throughput against everybody's inter-token latency.
# - A full cache preempts the least deserving. It loses its keys and values, keeps its text, and nobody can tell.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *All answers have the same length. What does continuous batching gain?* On arrival together, nothing; it only gains
#    where lengths or arrivals differ.
# 2. *Why is the budget in tokens, and the seats are limited too?* Time goes by tokens; seats bound the rows of logits,
#    the block tables, and how thinly the cache is spread.
# 3. *A prompt of 1,000 tokens, budget 256, eight others decoding: how many steps until its first token?* Each step leaves
#    248: five.
# 4. *Why does a preempted request wait in front?* It was admitted before those in the queue; behind them it could starve.
# 5. *What would happen if it kept num_computed_tokens?* It would attend to whatever its new blocks hold.
#
# </details>
#
# To read: Yu et al., *Orca* (OSDI 2022), for iteration-level scheduling; Agrawal et al., *Sarathi-Serve*
# (2403.02310), for the budget and its dial.
#
# **Next: 04, torchrun.** One model on several processes, and schedulers that must come to the same decision without
# talking to each other.
