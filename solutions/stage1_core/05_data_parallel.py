# ---
# jupyter:
#   course:
#     lesson: "05"
#     objectives:
#       - Measure what a second copy of a model costs and brings, and say when it brings nothing
#       - Cut work beforehand, hand it out in turn or by load, and count what each rule leaves idle
#       - Kill a replica under load and keep every answer whole, with nothing told twice
#       - Share a layer's experts out over replicas, and say why from then on nobody may miss a forward pass
#       - Write the waves that let such replicas sleep, and find the message that comes too late
#     difficulty: 3
#     needs: ["02", "03", "04"]
#     opens:
#       - course_lib/engine/replicated_core.py
#       - course_lib/engine/balancer.py
#       - course_lib/engine/coordinator.py
#       - course_lib/engine/joint_passes.py
#       - course_lib/layers/moe.py
#       - course_lib/layers/expert_exchange.py
#     terms:
#       replica: A whole engine, with weights, cache and scheduler of its own, that serves some of the requests.
#       data parallelism: Several replicas of one model, each with other requests.
#       straggler: The one that all others wait for.
#       least loaded: Giving each request to the replica with the fewest requests in flight.
#       mixture of experts: A layer of several MLPs of which each token goes through a few, chosen by a router.
#       expert parallelism: Dealing a layer's experts out over ranks, so that tokens travel to the weights.
#       dummy pass: A forward pass without tokens of one's own, run because others need one's experts.
#       wave: The time between two sleeps of replicas in lock step; its number tells late messages from new ones.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## One more of the same
#
# One engine answers too slowly, so you start a second one. Nothing is cut, as it was in lesson 04; each **replica** has
# all of the weights, a cache, a scheduler, and its own share of the readers. It is the oldest way to scale anything.
# What does it bring here? (The next cell starts two processes that load the model; give them 5 to 20 seconds.)

# %%
from collections import Counter
from time import perf_counter

import numpy as np

from course_lib import LLM
from course_lib.teaching import check, course_llm, exercise, hint, my_code, predict, reveal
from course_lib.teaching import show, solution
from course_lib.teaching.recording import replicas
from course_lib.teaching.recording.replicas import greedy

sizes = dict(num_gpu_blocks_override=64, max_model_len=256)
pair = LLM(data_parallel_size=2, max_num_seqs=4, **sizes)  # two processes, behind this one
for held in pair.collective_rpc(replicas.holding):
    print(f"process {held.process}: {held.weights:,} weights, threads: {held.threads}")

# %%
predict("05.a")

# %%
alone = course_llm(**sizes)  # one engine, in this process, with all cores
prompts = [[1000 + 37 * i + j for j in range(16)] for i in range(8)]
seconds = {alone: [], pair: []}
for each in [alone, pair] * 3:  # in turns, so that other programs disturb both
    start = perf_counter()
    each.generate(prompts, greedy(8), use_tqdm=False)
    seconds[each].append(perf_counter() - start)
fast, faster = (8 * 8 / min(times) for times in seconds.values())
print(f"one engine {fast:.0f} tokens/s, two replicas {faster:.0f}: {faster / fast:.2f} times as many")
reveal("05.a")

# %% [markdown]
# The ratio is near one, on either side of it. (Below 0.8 or above 1.25, run it again: something else is using the
# cores.) By theory: the pair runs as many rows through as many cores, and reads two sets of weights, 1.08 GB instead of
# 0.54 per step. In return nobody waits for Python: while one replica plans its next step, the other one multiplies.
#
# So a replica brings what it brings along. With a GPU of its own it has memory bandwidth of its own, and two are twice
# one. Sharing hardware, it helps only as far as that hardware was idle: if Python cannot keep one fast GPU busy, or one
# process cannot use 64 cores. It always costs one more set of weights, and that much less cache. Compare the other way
# to use two GPUs: cutting the model (lesson 04) keeps one set of weights and makes each *single* answer faster, at the
# price of two all-reduces per layer. Copies send nothing, and speed up nobody's answer. If the model fits into one GPU
# and there are enough readers, copy.
#
# What remains is to decide who does what. This lesson is about waiting: first readers for replicas, then replicas for
# each other.
#
# ## Cut beforehand
#
# vLLM's `data_parallel.py` has 400 prompts, all known. It starts one process per rank, and each takes a contiguous part
# of the list. How the process knows who it is stands in its environment, and our engine reads the same names:
#
# ```bash
# VLLM_DP_SIZE=2 VLLM_DP_RANK=1 VLLM_DP_MASTER_IP=127.0.0.1 VLLM_DP_MASTER_PORT=13345 python mine.py
# ```
#
# With $n$ prompts on $k$ ranks let $n = qk + m$, $0 \le m < k$. The first $m$ ranks get $q + 1$ prompts, the others
# $q$, so rank $r$ begins at $rq + \min(r, m)$. A rank that would get none is given a prompt nobody asked for,
# `"Placeholder"`, and its answer means nothing. That looks like superstition. Write it anyway; the reason begins under
# *Now they need each other*. (The example of 0.8.5 cut $q$ for each, and lost the last $m$.)

# %% tags=["exercise"]
@exercise("05.1")
def split(prompts, size):
    """One contiguous share of `prompts` for each of `size` ranks, as a list of lists.

    Lengths differ by at most one, the longer shares first. An empty share becomes
    ["Placeholder"]. Seven prompts a … g on 3 ranks: [[a, b, c], [d, e], [f, g]].
    """
    #: solution
    short, longer = divmod(len(prompts), size)
    starts = [rank * short + min(rank, longer) for rank in range(size + 1)]
    shares = [prompts[starts[rank] : starts[rank + 1]] for rank in range(size)]
    return [share or ["Placeholder"] for share in shares]
    #: end

# %% tags=["check"]
check("05.1")

# %% [markdown]
# Equal shares of prompts are not equal shares of work. Below are twelve requests, one arriving at each step, on two
# replicas with two seats each; a long answer has 12 tokens, a short one 2. The first stream is what a chat application
# sends that asks for an answer and then for a title of the conversation: long, short, long, short. Choose another one
# above the picture (in Jupyter).

# %%
from course_lib.teaching.explorers.replicas import explore_balancing

explore_balancing()

# %% [markdown]
# Taking turns is in tune with that stream: replica 0 gets every long answer, replica 1 every title, and the whole takes
# nearly half as long again as it must. Cutting beforehand gives both the same work, though replica 1's part comes late;
# with a sorted list it does worst of all. Whoever ends last is the **straggler**, and a job is done when its straggler
# is.
#
# The third rule looks at what it can see. It counts the requests that each replica has been given and has not finished,
# and sends the next to the **least loaded**. Long answers stay in the count, so their replica is avoided without
# anybody knowing what "long" is. Two limits. With everything arriving at once nothing has finished yet, and the counts
# say nothing (the last stream). And ties must be broken in turn: always preferring replica 0 would send the first
# request after every pause there.

# %% tags=["exercise"]
@exercise("05.2", target="course_lib.engine.balancer:Balancer.assign")
def choose(loads, turn, size):
    """The number of the replica that is given the next request.

    loads: {replica: requests in flight}, of those that are alive, at least one; turn: the replica
    that comes first among equals, then turn + 1, …, size - 1, 0, …; size: how many there were at
    the start. {0: 2, 1: 1, 2: 1} of 3: replica 2 if turn is 2, replica 1 if turn is 0.
    """
    #: solution
    return min(loads, key=lambda replica: (loads[replica], (replica - turn) % size))
    #: end

# %% tags=["check"]
check("05.2")

# %% [markdown]
# And for a stream without a pattern? Requests arrive evenly, one answer in eight has 100 to 300 tokens and the others at
# most 20. Eight replicas with two seats each are kept 80 % busy.

# %%
predict("05.b")

# %% tags=["exact"]
from course_lib.teaching.recording.balancing import skewed, waits

print("share of requests that wait for a seat, and steps waited on average")
for count in (1, 2, 4, 8):
    print(f"{count} replica(s)", end="")
    for rule in ("round_robin", "least_loaded"):
        steps = [wait for seed in range(5) for wait in waits(skewed(seed, count), rule, count)]
        print(f"   {rule}: {np.mean(np.array(steps) > 0):4.0%}, {np.mean(steps):5.1f}", end="")
    print()

# %%
reveal("05.b")

# %% [markdown]
# By turns, eight replicas are eight queues, and bad luck in one is not helped by the empty seat in the next. By load they
# come close to one queue for all sixteen seats, which is why the gain grows with the number of replicas.
#
# The same on the real pair, with four seats each. `streamed` keeps eight requests under way and sends the next when one
# has ended; `log_passes` counts each replica's forward passes. (The balancer lives in this process, so yours can serve;
# `generate --chat --mine` is one engine without experts and calls nothing of this lesson.)

# %%
pair.collective_rpc(replicas.log_passes)
jobs = [(prompts[i % 8], 2 if i % 2 else 16) for i in range(12)]  # (prompt, tokens to write)
with my_code():
    for rule in ("round_robin", "least_loaded"):
        pair.collective_rpc(replicas.forget_passes)
        run = replicas.streamed(pair, jobs, at_once=8, policy=rule)
        passes = [len(log) for log in pair.collective_rpc(replicas.passes_so_far)]
        tokens = [run.tokens_of(replica) for replica in (0, 1)]
        print(f"{rule}: tokens by replica {tokens}, passes {passes}, {run.seconds:.1f} s")

# %% [markdown]
# The counts are the claim: with turns one replica wrote eight times as much as the other; by load the passes of the
# busier one, on which the run's length depends, are little more than half. On a laptop the seconds follow only in part,
# or not at all, for the reason you measured at the start: a replica whose neighbour is idle has the memory to itself,
# and gets through its passes faster. With a device each, seconds are passes.
#
# ## A replica dies
#
# Eight answers are on their way, four on each. Then somebody's kernel runs out of memory and ends replica 1, in the
# middle of a step, without a last word. You can be that kernel. (A replica that hangs ends alike: if it has work and is
# silent for longer than `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`, the front kills it.) The loop below tells every token as
# it comes, as a server would; told tokens cannot be taken back.

# %%
engine = pair.llm_engine
outputs = alone.generate(prompts, greedy(12), use_tqdm=False)
undisturbed = [output.outputs[0].token_ids for output in outputs]
told, ends, killed_at = {str(i): [] for i in range(8)}, Counter(), None
with replicas.watched(pair) as moments:
    start = perf_counter()
    for name, prompt in zip(told, prompts):
        engine.add_request(name, prompt, greedy(12))
    while engine.has_unfinished_requests():
        for output in engine.step():
            told[output.request_id] += output.outputs[0].token_ids
            ends[output.request_id] += output.finished
        if killed_at is None and sum(map(len, told.values())) >= 32:
            killed_at = perf_counter() - start
            replicas.kill(pair, 1)

# %%
from course_lib.teaching.explorers.replicas import draw_survival

same = sum(list(right) == told[str(i)] for i, right in enumerate(undisturbed))
print("tokens told:", [len(tokens) for tokens in told.values()], " ends:", list(ends.values()))
print(f"{same} of 8 answers are what one engine writes undisturbed")
show(draw_survival(moments, killed_at),
     alt="Tokens of eight requests over time. Until the red line rows of circles and of squares "
     "alternate: two replicas write four answers each. After it there are circles only; the rows that "
     "were squares pause until the others have ended, and then go on.")

# %% [markdown]
# Twelve tokens each, one end each. The orphans had to wait for seats, since the survivor has four and they were taken:
# half of the replicas is also half of the room. The wide gaps are passes that read prompts, at the start and again where
# orphans get their seats. (An answer may differ from the undisturbed one where two tokens were as
# good as equal: another batch adds up in another order. It is whole all the same.)
#
# There is no checkpoint behind this, and the cache of the dead is lost. What made it work is that the front of the
# engine has kept, for every unfinished request, the prompt and *what was told*. That is all the state a language model
# has: lesson 03 threw a cache away for the same reason, and called it preemption. Prompt and told tokens go to another
# replica, which computes their keys and values in one pass and continues with the next token.
#
# The tempting way is to run the request again from its prompt and drop the first tokens. That computes more, and the
# second run may take the other side of a near-tie: its second half would then not fit the first half you have told.
#
# | event | kept for request `a`: tokens, left | said |
# |---|---|---|
# | `send("a", 0, [5, 6], 4)` | `[5, 6]`, 4 | |
# | `news("a", 0, [10], False)` | `[5, 6, 10]`, 3 | `[10]` |
# | `news("a", 0, [11], False)` | `[5, 6, 10, 11]`, 2 | `[11]` |
# | `died(0, assign)`, assign gives 1 | the same, now on 1 | `[("a", 1, [5, 6, 10, 11], 2)]` |
# | `news("a", 1, [12, 13], True)` | forgotten | `[12, 13]` |

# %% tags=["exercise"]
@exercise("05.3")
class Front:
    """What the front remembers of unfinished requests, and what it says. Replicas are numbers."""

    def __init__(self):
        self.requests = {}

    def send(self, name, replica, prompt, max_tokens):
        """A request for at most `max_tokens` tokens (a list `prompt` of ids) has gone to `replica`."""
        #: solution
        self.requests[name] = [replica, list(prompt), max_tokens]
        #: end

    def abort(self, name):
        """Its reader has left. The replica may not know it yet."""
        #: solution
        self.requests.pop(name, None)
        #: end

    def news(self, name, replica, tokens, finished):
        """`replica` has written these tokens. Returns those that the reader is to be told, a list.

        Nothing for a request that was aborted, or that this replica does not have (any more).
        """
        #: solution
        entry = self.requests.get(name)
        if entry is None or entry[0] != replica:
            return []
        entry[1] += tokens
        entry[2] -= len(tokens)
        if finished:
            del self.requests[name]
        return tokens
        #: end

    def died(self, replica, assign):
        """Give its requests to others; `assign()` names one, to be asked for each request.

        Returns, in the order in which they first came, a list of
        (name, new replica, all tokens to start from, how many are left to write).
        """
        #: solution
        moved = []
        for name, entry in self.requests.items():
            if entry[0] == replica:
                entry[0] = assign()
                moved.append((name, entry[0], list(entry[1]), entry[2]))
        return moved
        #: end

# %% tags=["check"]
check("05.3")

# %% [markdown]
# In the engine these are `_take_news` and `_go_on_without` of `replicated_core.py`. One thing must hold for them to be
# right: when the connection to a replica ends, everything it ever sent has been read. Otherwise tokens that are still
# in the pipe would be told after the same tokens had been written anew. vLLM draws the line elsewhere: unless
# `enable_fault_tolerance` is set, one dead engine core is the end of the whole engine, and a fresh one is somebody
# else's business (Kubernetes, Ray Serve).

# %%
pair.llm_engine.shutdown()

# %% [markdown]
# ## Now they need each other
#
# Here the placeholder's reason begins. In a **mixture of experts** the MLP of a layer is several MLPs. A router scores
# them for each token, the token goes through the best $k$, and the outputs are added up. With $s \in \mathbb{R}^E$ the
# token's scores and $K$ the $k$ largest of them,
#
# $$ y = \sum_{e \in K} w_e \, f_e(x), \qquad w_e = \frac{\exp s_e}{\sum_{j \in K} \exp s_j}, \qquad x, y \in \mathbb{R}^N . $$
#
# Most weights are then in experts of which a token uses a few. A copy of all on each replica would be the worst use of
# memory, so they are dealt out: replica 0 holds experts 0 and 1 of four, replica 1 holds 2 and 3, and attention exists
# twice. This is **expert parallelism**. In each such layer all replicas put their tokens together (an all-gather), each
# computes what *its* experts add to *everybody's* tokens, and the sums travel home (a reduce-scatter).
#
# | token of | scores | goes to | on replica 0 | on replica 1 |
# |---|---|---|---|---|
# | replica 0 | 2, 0, 1, −1 | 0, 2 | $0.73\,f_0$ | $0.27\,f_2$ |
# | replica 0 | 1, 2, 0, 0 | 1, 0 | $0.73\,f_1 + 0.27\,f_0$ | nothing |
# | replica 1 | 0, 1, 1.5, 3 | 3, 2 | nothing | $0.82\,f_3 + 0.18\,f_2$ |
#
# Every rank routes all tokens it sees, with the same router and so with the same result, and does what is its own.

# %% tags=["exercise"]
import torch


@exercise("05.4", target="course_lib.layers.moe:MoE.contribution")
def contribution(tokens, logits, experts, held, top_k):
    """What this rank's experts add to the outputs of all tokens: [T, N], zeros where they add nothing.

    tokens [T, N]; logits [T, E], the router's scores of all experts; experts: this rank's, as
    functions [n, N] -> [n, N]; held: their numbers, a range, so experts[0] is expert held[0].
    Weights: a softmax over each token's top_k logits. Call each expert once at most, with the rows
    that chose it and no others. In the table above, held is range(0, 2) on replica 0, and the third
    row of its result is zeros.
    """
    #: solution
    best, chosen = logits.topk(top_k, dim=-1)
    weights = best.softmax(dim=-1)
    out = torch.zeros_like(tokens)
    for expert, run in zip(held, experts):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            out[rows] += weights[rows, places, None] * run(tokens[rows])
    return out
    #: end

# %% tags=["check"]
check("05.4")

# %% [markdown]
# SmolLM2 is no mixture, but it can be made into one while it is loaded: `upcycle_experts=4` copies each MLP four times,
# with differences of a percent, and adds a router that has learned nothing. It still speaks, and goes through
# everything a real one goes through. (Replicas are processes of their own, which do not know your code; inside `with
# my_code():` an `LLM(upcycle_experts=4)` in this process runs your `contribution`.)

# %%
shared = LLM(data_parallel_size=2, upcycle_experts=4, enable_expert_parallel=True, **sizes)
mlps = 30 * 3 * 576 * 1536  # layers x (gate, up, down) x hidden x intermediate
routers = 30 * 4 * 576
held = [one.weights for one in shared.collective_rpc(replicas.holding)]
print(f"weights by replica: {held}; in one process: {134_515_008 + 3 * mlps + routers:,}")
print("by theory, dense + one more set of MLPs + routers:", f"{134_515_008 + mlps + routers:,}")

# %%
predict("05.c")

# %% tags=["exact"]
shared.collective_rpc(replicas.log_passes)
[answer] = shared.generate("The capital of France is", greedy(6), use_tqdm=False)
for replica, log in enumerate(replicas.passes_of_wave(shared)):
    print(f"replica {replica}, tokens in each forward pass: {log}")

# %%
print(answer.outputs[0].text)
reveal("05.c")

# %% [markdown]
# Replica 1 had nothing to do and did it sixteen times. A **dummy pass** has no tokens of its own: no attention, no
# logits, only the collectives of every layer, and in them the work for others' tokens. Here is why it cannot be left
# out, with the collective of *one* layer, two threads for ranks, and a barrier that gives up after a second:

# %% tags=["exact"]
from threading import Barrier, BrokenBarrierError, Thread


def rank(name, passes, total, dummies, layer, report):
    for number in range(total if dummies else passes):
        try:
            layer.wait(timeout=1)  # dispatch and combine: nobody gets on without all
        except BrokenBarrierError:
            report.append(f"{name} waited for the others in pass {number}, in vain")
            return
    report.append(f"{name} is through")


for dummies in (True, False):
    layer, report = Barrier(2), []
    ranks = [Thread(target=rank, args=(f"rank {i}", passes, 5, dummies, layer, report))
             for i, passes in enumerate((5, 2))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    print(f"dummy passes {dummies}:", "; ".join(sorted(report)))

# %% [markdown]
# That is what the placeholder is for: a rank without a prompt would leave the others waiting. Only mixtures need it, and
# in vLLM only they have lock step and waves; 0.32 refuses `VLLM_DP_SIZE=2` for a dense model, whose ranks may as well be
# separate programs (our engine takes both). The example gives its ranks 16 and 20 `max_tokens` in turn (its comment:
# because each may have its own), so with a mixture rank 0 ends with dummy passes.
#
# ## Waves
#
# So replicas in lock step run passes as long as *anybody* has a request. Who knows that? The safe way is to ask before
# each pass, one all-reduce of one bit: vLLM's offline path does it, ours too (`joint_passes.py`). Between two processes
# of one idle machine that takes 0.2 ms, nothing beside a pass of 80 ms like yours; of a GPU's pass of 5 ms, with ranks
# on several machines, it is a few per cent. So a server does it every 16 passes (`AGREE_EVERY`; in vLLM
# `dp_sync_interval`, and also after a wave's first pass). If nobody has work all sleep, until a request wakes them. The
# time from waking to sleeping is a **wave**. Here they agree every four:

# %%
from course_lib.teaching.explorers.waves import explore_waves

explore_waves()

# %% [markdown]
# Slide to 1: fewer dummy passes, more than twice as many meetings. Slide to 8 and it is the other way round. Switch the
# dummy passes off to see the barrier again.
#
# The picture hides one thing: messages take time. The front learns of a wave's end late. If a request comes in between,
# the front believes that all are awake and calls nobody, and the one replica that gets the request wakes up alone. Or a
# call to wake up is delivered when its wave is already over, and rouses a replica for a pass nobody else will join.
# Both are deadlocks, and rare enough to pass every test that you would write by hand.
#
# The cure is a number. Waves are counted; every request and every call carries the number of the wave in which it was
# sent.
#
# - A replica that is asleep and gets a request of a wave that is **over** knows that the others have not been called. It
#   starts, and says so; the front calls them.
# - A call to a wave that is over is not followed.
#
# Before you write it, see the first one break. `interleave` plays a front and some replicas with every message late by a
# random amount; the same seed gives the same run. This member forgets to say that it is alone:

# %% tags=["exact"]
from course_lib.engine.coordinator import WaveMember
from course_lib.teaching.recording.waves import interleave


class Silent(WaveMember):
    def on_request(self, wave):
        super().on_request(wave)
        return False


runs = [interleave(Silent, seed, num_ranks=2, num_requests=2, agree_every=1) for seed in range(1000)]
stuck = [run for run in runs if run.problem]
shortest = min(stuck, key=lambda run: len(run.log))
print(f"{len(stuck)} of 1,000 runs hang. The shortest:")
print("\n".join(f"  {line}" for line in shortest.log), f"\n{shortest.problem}", sep="")

# %% [markdown]
# Read it from the end. The last line of the log is the news that the wave is over; the request had been sent before the
# front heard it. No single participant did anything wrong by what it knew.

# %% tags=["exercise"]
@exercise("05.5", target="course_lib.engine.coordinator:WaveMember")
class Member:
    """One replica in lock step. running: bool, asleep at first; wave: how many waves have ended."""

    def __init__(self, agree_every=16):
        self.running = False
        self.wave = 0
        #: solution
        self.agree_every = agree_every
        self.passes = 0
        #: stub
        ...  # what else you need
        #: end

    def on_request(self, wave):
        """A request has come, sent in `wave` (never later than ours); it must be served.

        Returns True if the front must be told to call the others: it found us asleep, and was
        sent in a wave that is over. (In the present wave the front calls them by itself.)
        """
        #: solution
        alone = not self.running and wave < self.wave
        self.running = True
        return alone
        #: end

    def on_start(self, wave):
        """The front calls to `wave`: to ours, or to one that is over."""
        #: solution
        if wave == self.wave:
            self.running = True
        #: end

    def after_pass(self):
        """A pass has ended, real or dummy. Returns True if all must agree now: every agree_every."""
        #: solution
        self.passes += 1
        return self.passes % self.agree_every == 0
        #: end

    def agreed(self, anybody_unfinished):
        """All have agreed whether anybody has requests left. Returns True if that ends the wave."""
        #: solution
        if anybody_unfinished:
            return False
        self.running = False
        self.wave += 1
        self.passes = 0
        return True
        #: end

# %% tags=["check"]
check("05.5")

# %% [markdown]
# The picture of the waves is played by two members. If you have passed, these are yours:

# %%
from course_lib.teaching.explorers.waves import describe_waves

with my_code():
    print(describe_waves(every=4))

# %% [markdown]
# ## What lock step costs
#
# Three things, and you can now count them. Dummy passes at the end of each wave, 15 at most: nothing for a server that
# is never idle. A pass lasts as long as the slowest replica's, so a prompt of 2,000 tokens on one delays the next token
# of all others; for replicas that share experts balancing is about *each step*, and the straggler is back. And they die
# together: with replica 1 gone, half of every layer is missing.

# %%
from course_lib.errors import EngineDeadError

replicas.kill(shared, 1)
try:
    shared.generate("The capital of France is", greedy(6), use_tqdm=False)
except EngineDeadError as error:
    print(error)
shared.llm_engine.shutdown()

# %% [markdown]
# ## More than one machine
#
# A replica and its front exchange messages only, so `LLM(…, data_parallel_backend="ray")` may place replicas wherever a
# cluster has room (`engine/ray_replica.py`); balancer, `Front` and waves stay. The other way is a front on every
# machine and a load balancer before them; vLLM calls these internal, external and hybrid balancing. One front sees all
# counts, and is a Python process that all tokens pass through: with enough replicas it saturates.
#
# ## How vLLM does it
#
# | here | vLLM 0.32 | what differs there |
# |---|---|---|
# | `engine/replicated_core.py` | `vllm/v1/engine/core_client.py`, `DPLBAsyncMPClient` | a dead engine core ends the whole engine, by default |
# | `engine/balancer.py` | the same class | several fronts share counts that are up to 0.1 s old; waiting for a cache more than half full weighs more |
# | `engine/coordinator.py` | `vllm/v1/engine/coordinator.py` | a process of its own, between several fronts and all cores |
# | `WaveMember` | `DPEngineCoreProc` in `vllm/v1/engine/core.py` | the same numbers, the same two races |
# | `execute_dummy_batch` | the same name, in the worker | with CUDA graphs all ranks pad to the most tokens of any: `vllm/v1/worker/gpu/dp_utils.py` |
# | all-gather, reduce-scatter | one of several | also all-to-all kernels that send a token only where its experts are |
#
# 0.8.5 had no coordinator: rank 0's core reported the end of a wave, and each front kept counts of its own requests.
# For large mixtures such as DeepSeek-V3 the scheme of this lesson is the usual one: attention as replicas, each with
# the cache of its own readers, and 256 experts dealt out over all GPUs, copied where they are popular
# (`vllm/distributed/eplb`).
#
# ## Recap
#
# - A replica multiplies whatever hardware it brings. It costs a set of weights, and speeds up no single answer.
# - The straggler decides. Counting what is in flight makes many queues nearly one; taking turns does not.
# - Prompt and told tokens are all the state there is. Whoever keeps them can lose a replica and no word.
# - Dealing out experts turns copies into parts: everybody runs every pass, with tokens or without.
# - Who may sleep is agreed upon now and then; the wave's number tells a late message from a new one.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *Two replicas share one GPU that is busy all the time. What do you gain?* Nothing, and you lose half of the cache.
# 2. *All 400 prompts arrive at once. Which rule is best?* None can tell: no count has changed yet. Keep a queue in front and
#    hand out as answers end.
# 3. *Why not run a dead replica's requests again and drop what was told?* More work, and the second run may differ.
# 4. *Agreeing every 16 passes, a wave's last token is made in pass 33. How many passes has the wave?* 48.
# 5. *A call to wave 3 reaches a sleeping member whose wave is 4. What happens if it follows?* It waits in a pass that nobody
#    joins.
#
# </details>
#
# To read: Shazeer et al., *Outrageously Large Neural Networks* (1701.06538), for the mixture; Komatsuzaki et al., *Sparse
# Upcycling* (2212.05055); DeepSeek-V3's report (2412.19437), section 3.4, for replicas and experts in production.
#
# **Next: 06, prefix caching.** A replica that has seen the first half of your prompt could answer sooner than an idle one
# that has not.
