# ---
# jupyter:
#   course:
#     lesson: "01"
#     objectives:
#       - Follow one request from text to tokens, through the model, and back to text
#       - Measure what a KV cache saves, and say why it saves less time than arithmetic
#       - Work out how many bytes of cache a request needs, for any model
#       - Truncate with one sort and draw with one argmax, and see both serve real requests
#       - Turn tokens into text that never has to be taken back
#     difficulty: 2
#     needs: []
#     opens:
#       - course_lib/entrypoints/llm.py
#       - course_lib/engine/core.py
#       - course_lib/sampling/sampler.py
#       - course_lib/engine/detokenizer.py
#     terms:
#       logits: One number per vocabulary entry, larger for likelier next tokens; softmax turns them into probabilities.
#       KV cache: The keys and values that attention computed for earlier tokens, kept because they never change.
#       prefill: Computing the tokens of a prompt, many positions in one pass.
#       decode: Computing one new token per pass, reading the keys and values of all earlier ones from the cache.
#       grouped-query attention: Several query heads share one pair of key and value heads, so the cache is smaller.
#       top-k: Only the k most likely tokens may be drawn.
#       top-p: Only the shortest run of most likely tokens whose probability reaches p may be drawn.
#       detokenization: Turning token ids back into text; incremental when it happens while tokens are still coming.
#       stop string: A piece of text that ends the output, wherever token borders fall in it.
#       TTFT: Time to first token, from the arrival of a request to its first token.
#       TPOT: Time per output token, after the first.
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## What does the next word cost?
#
# Ask a language model something and the answer trickles out, word after word. Each word is one run of the model. This
# lesson follows a single request all the way through, and starts with what every serving engine was built to avoid.
#
# Below, `llm` is the course's engine with SmolLM2-135M-Instruct in it. `model` is the same checkpoint in plain
# `transformers`, so that you can take the engine's work apart without the engine.

# %%
import time

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM

from course_lib import SamplingParams
from course_lib.teaching import check, course_llm, exercise, hint, my_code, predict, reveal, solution
from course_lib.teaching import COURSE_STYLE, explore_next_token, explore_requests, record, show

plt.style.use(COURSE_STYLE)
llm = course_llm()
tokenizer = llm.get_tokenizer()
checkpoint = llm.llm_engine.config.model.path
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

# %% [markdown]
# The obvious way to write text with a model: run it on everything so far, take the best next token, append it, repeat.

# %%
@torch.inference_mode()
def generate_naively(prompt_ids, num_new):
    ids = list(prompt_ids)
    for _ in range(num_new):
        logits = model(torch.tensor([ids]), use_cache=False).logits  # [1, n, 49152]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


prompt_ids = tokenizer.encode("The capital of France is")
print(repr(tokenizer.decode(generate_naively(prompt_ids, 3))))

# %% [markdown]
# It works. Look at the shape in the comment, though: the model returned logits for *all* n positions, and the loop used
# the last row. How much of what it computed was new?

# %%
predict("01.a")

# %% [markdown]
# Answer first, then run the next cell. It measures one pass of the model at several lengths: what the naive loop pays
# for the next token when there are already n.

# %%
@torch.inference_mode()
def seconds(run, repeats=2):
    """The fastest of some runs: the first one also pays for fresh memory."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


lengths = [16, 64, 128, 256, 512]
tokens = torch.arange(1000, 1512)[None]  # which tokens they are does not matter for the time
full = [seconds(lambda: model(tokens[:, :n], use_cache=False)) for n in lengths]
for length, s in zip(lengths, full):
    print(f"{length:4d} tokens so far: {1000 * s:6.0f} ms for the next one")
reveal("01.a")

# %% [markdown]
# Each token costs more than the one before: a fixed price for any pass, and on top of it one that grows with the text so
# far. For long texts the second wins, so n tokens cost on the order of n². At 512 tokens a two-core laptop writes about one
# token a second this way, and nearly all of that second goes into positions it has computed many times. Which of those
# results could have changed since the last step?
#
# ## From text to tokens
#
# First, what the model reads. A chat model was trained on conversations in one fixed layout, the **chat template**, and
# answers badly without it. The engine's `chat` fills it in:

# %%
conversation = [{"role": "user", "content": "What is the capital of France?"}]
print(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

# %% [markdown]
# Seven tokens of question have become 37 tokens of prompt. The special tokens `<|im_start|>` and `<|im_end|>` are single ids.
# Only the template should write them, but a user who types `<|im_end|>` gets that very id, which is one way to attack a
# chat server. Now the pieces themselves:

# %% tags=["exact"]
def pieces(text):
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


for text in ("The capital of France is", "Paris 2026", "naïve café", "日本", "🚀"):
    print(f"{len(pieces(text))} tokens: {pieces(text)}")

# %% [markdown]
# Words keep their leading space, so decoding is concatenation. This tokenizer splits digits one by one. And the last two
# lines are trouble to come: 日本 has two characters and three tokens, the rocket one character and three tokens, and
# `�` says that a token alone is not text at all. It is a few *bytes*. Remember that when text comes back out.
#
# ## What never changes
#
# The five tokens of *The capital of France is* go in, and every layer computes a query, a key and a value vector for
# each. Attention lets a position look at itself and at earlier positions, never ahead. So add a sixth token: do the keys
# of the first five notice?

# %%
with torch.inference_mode():
    five = model(torch.tensor([prompt_ids]), use_cache=True).past_key_values
    six = model(torch.tensor([prompt_ids + tokenizer.encode(" Paris")]), use_cache=True).past_key_values
print("keys of layer 20:", list(five.layers[20].keys.shape), "and", list(six.layers[20].keys.shape))
difference = (six.layers[20].keys[:, :, :5] - five.layers[20].keys).abs().max()
print(f"largest difference in the first five positions: {difference:.1e}")

# %% [markdown]
# They do not: the difference is 0, or a rounding in the last digits if the two passes add in another order. A position's keys and values
# depend on the tokens up to it and on nothing after. They can be computed once and kept. That store is the **KV cache**,
# and most of the engine exists to manage it.
#
# What about queries? A position's query is needed once, when that position looks back, and never again. So nobody keeps
# those. The picture: each row is one token to write, each coloured cell a position that is computed for it.

# %%
step, position = torch.arange(24)[:, None], torch.arange(28)[None, :]
everything = position <= step + 4  # step 0 sees the prompt's five positions, step 1 six, …
only_new = everything & ((step == 0) | (position == step + 4))
fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axis, cells, title in zip(axes, (everything, only_new), ("no cache", "KV cache")):
    axis.imshow(cells, cmap="Blues", vmax=1.6, aspect="auto")
    axis.set(title=f"{title}: {int(cells.sum())} positions computed", xlabel="position")
axes[0].set_ylabel("step")
show(fig, alt="Two grids of steps against positions. Without a cache each step computes every position "
     "so far, a triangle of 396. With a cache the first step computes the prompt's 5 and every later "
     "step one, a diagonal of 28.")

# %% [markdown]
# The top row of the right grid is the **prefill**: five prompt positions in one pass. Every row after it is a **decode**
# step: one position in, one token out. The same loop with the cache, which `transformers` calls `past_key_values`:

# %%
@torch.inference_mode()
def generate(prompt_ids, num_new):
    ids, cache, written = list(prompt_ids), None, []
    for _ in range(num_new):
        result = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        ids = [int(result.logits[0, -1].argmax())]  # next time, only the new token goes in
        written += ids
    return written


print("same tokens:", generate(prompt_ids, 8) == generate_naively(prompt_ids, 8))

# %% [markdown]
# Before you measure:

# %%
predict("01.b")

# %%
def decode_step(n):
    cache = model(tokens[:, : n - 1], use_cache=True).past_key_values

    def step():
        model(tokens[:, n - 1 : n], past_key_values=cache, use_cache=True)
        cache.crop(-1)  # forget the token again, for the next repetition

    return step


with torch.inference_mode():
    cached = [seconds(decode_step(n)) for n in lengths]
reading = seconds(lambda: [p.sum() for p in model.parameters()])  # touches every weight, no more
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"at 512 tokens: {full[-1] / cached[-1]:.0f} times faster; arithmetic alone promised 512 times")
print(f"one decode step: {1000 * cached[-1]:.0f} ms; reading its {weights / 1e6:.0f} MB of weights, "
      f"and nothing else: {1000 * reading:.0f} ms")
reveal("01.b")

# %%
fig, axis = plt.subplots(figsize=(9, 3))
axis.plot(lengths, [1000 * s for s in full], marker="o", label="no cache")
axis.plot(lengths, [1000 * s for s in cached], marker="s", label="KV cache")
axis.set(xlabel="tokens so far", ylabel="ms for the next token", ylim=(0, None))
axis.legend()
show(fig, alt="Milliseconds for the next token against tokens so far. Without a cache a rising line, "
     "with one a flat line near the bottom.")

# %% [markdown]
# The lower line hardly depends on the length, because arithmetic is no longer what it is made of. A good part of it is the
# trip of 538 MB of weights from memory, which one position needs as much as 512 do; the rest is a fixed cost per layer,
# and more of it in `transformers` than in an engine. Decoding is **memory-bound**. (The cache must be read too: 24 MB at
# 512 tokens, which is little, and 360 MB at 8,192, which is not.)
#
# Hold on to that. If a step mostly waits for weights, then one step for *eight* requests should cost far less than eight
# steps: on a GPU hardly more than one, on two CPU cores two to three times one. Lesson 03 lives off it.
#
# ## What the cache costs
#
# Nothing is free. Each layer keeps one key and one value per token and per KV head. For a model with $L$ layers, $H_{kv}$
# KV heads of size $D$ and $b$ bytes per number, $n$ tokens need
#
# $$ n \cdot 2 \cdot L \cdot H_{kv} \cdot D \cdot b \quad\text{bytes.} $$
#
# The $H_{kv}$ matters. SmolLM2 has 9 query heads but only 3 KV heads: three query heads share one pair of keys and
# values (**grouped-query attention**), so the cache is a third of what the query heads suggest.

# %% tags=["exercise"]
@exercise("01.1", target="course_lib.config:ModelConfig.kv_bytes_per_token")
def kv_cache_bytes(num_tokens, num_layers, num_heads, num_kv_heads, head_dim, bytes_per_number):
    """Bytes of KV cache for `num_tokens` tokens: a whole number.

    One token of SmolLM2-135M (30 layers, 9 heads, 3 KV heads of size 64) in float32, 4 bytes a number,
    takes 46,080.
    """
    #: solution
    per_layer = 2 * num_kv_heads * head_dim  # keys and values
    return num_tokens * num_layers * per_layer * bytes_per_number
    #: end

# %% tags=["check"]
check("01.1")

# %% [markdown]
# 45 KiB for a token whose text has about four bytes. A conversation that fills SmolLM2's 8,192-token context
# holds 360 MiB of cache, two thirds of the model's own size. For a server with a hundred conversations the cache *is* the
# memory problem, and how to cut it up is the subject of lesson 02.
#
# ## From logits to a token
#
# The last row of logits has 49,152 numbers. `argmax` is one way to choose, and a poor one for prose: it repeats itself
# and always says the same. Sampling divides the logits by a **temperature**, drops the long tail (**top-k**, **top-p**)
# and draws from what is left. Move the sliders and watch which tokens survive:

# %%
with torch.inference_mode():
    story = tokenizer.encode("Once upon a time, there was a")
    story_logits = model(torch.tensor([story])).logits[0, -1]  # [49152]
explore_next_token(story_logits, tokenizer, temperature=0.8, top_k=12, top_p=0.85)

# %% [markdown]
# Order matters, and vLLM's is fixed: temperature, (min-p,) top-k, then top-p *of what top-k left*. In numbers, with four
# tokens whose probabilities are 0.5, 0.3, 0.15 and 0.05:
#
# - `k=2` keeps the first two, which renormalise to 0.625 and 0.375;
# - `p=0.6` then keeps only the first, since 0.625 already reaches 0.6. Of the full row, 0.5 would not have.
#
# Both rules keep a prefix of the sorted row, so one sort serves both. That is worth care: sorting 49,152 numbers for each
# of 64 requests costs more than the rest of the sampler together. A batch mixes requests, so `k` and `p` hold one value
# per row; a row that wants no limit has `k = V` and `p = 1`.

# %% tags=["exercise"]
@exercise("01.2", target="course_lib.sampling.topk_topp:apply_top_k_top_p")
def keep_top_k_top_p(logits, k, p):
    """A copy of `logits` in which every token that may not be drawn is -inf.

    logits: [R, V] float32, already divided by the temperature; k: [R] int64, 1 to V;
    p: [R] float32, above 0, at most 1.
    Top-k keeps each row's k largest. Top-p then keeps the shortest run of these, likeliest first, whose
    probability (softmax over what top-k kept) reaches p; at least one token.
    Logits [2, 0.5, 1, -1] with k=3, p=0.8 become [2, -inf, 1, -inf].
    """
    #: solution
    values, ids = logits.sort(dim=-1, descending=True)
    beyond_k = torch.arange(logits.shape[1]) >= k[:, None]
    values = values.masked_fill(beyond_k, float("-inf"))
    probs = values.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    values = values.masked_fill(before >= p[:, None], float("-inf"))
    return torch.empty_like(logits).scatter(-1, ids, values)
    #: end

# %% tags=["check"]
check("01.2")

# %% [markdown]
# ## The draw
#
# Now pick a token with the probabilities that are left. The textbook walks along the cumulative sum until it passes a
# random number. Engines do something odder. Give every token $i$ a random number $e_i$ from the exponential distribution
# with rate 1, and take
#
# $$ \arg\max_i \; p_i / e_i . $$
#
# Why is that a fair draw? $e_i / p_i$ is exponential with rate $p_i$: think of alarm clocks, where clock $i$ rings after
# a random time and rings $p_i$ times a minute on average. The chance that clock $i$ is the *first* to ring is its share of all
# the rates, $p_i / \sum_j p_j$. The first to ring has the smallest $e_i/p_i$, the largest $p_i/e_i$.
#
# It looks like more work than a cumulative sum, and on a GPU it is the fast way: every step is the same for all entries,
# nothing needs to be added up in order, probabilities need not be normalised, and the CPU never has to look at the result
# to decide what comes next. (`torch.multinomial` uses the same rule inside, but first checks its input for errors, and
# for that the CPU must wait for the GPU.)

# %% tags=["exercise"]
@exercise("01.3", target="course_lib.sampling.draw:draw")
def draw(probs, generator):
    """One token id per row, int64 [R], token i with probability probs[r, i] / probs[r].sum().

    probs: [R, V] float32, never negative; all randomness comes from `generator`, a torch.Generator.
    """
    #: solution
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise).argmax(dim=-1)
    #: end

# %% tags=["check"]
check("01.3")

# %% [markdown]
# Does the alarm-clock argument hold? Twenty thousand draws among the story's ten likeliest next tokens, by the engine's own
# function (by yours, once it has passed), beside the probabilities:

# %%
import course_lib.sampling.draw as engine_draw

top, ids = story_logits.topk(10)
probs = top.softmax(dim=-1)
with my_code():
    drawn = engine_draw.draw(probs.repeat(20_000, 1), {}, torch.Generator().manual_seed(0))
fig, axis = plt.subplots(figsize=(9, 3.2))
axis.bar(torch.arange(10) - 0.2, probs, width=0.4, label="probability")
shares = torch.bincount(drawn, minlength=10) / 20_000
axis.bar(torch.arange(10) + 0.2, shares, width=0.4, label="share of 20,000 draws")
axis.set_xticks(range(10), [tokenizer.decode([i]) for i in ids], rotation=30)
axis.set_ylabel("share")
axis.legend()
show(fig, alt="Bars for ten tokens: each share of 20,000 draws is within a percent of the probability.")

# %% [markdown]
# ## Break it: a cache with the wrong clock
#
# The cached loop has a parameter that nobody sees: each token's **position**, which the model mixes into queries and
# keys. `transformers` counts for you. An engine counts for itself, so let us count, and get it wrong on purpose. Three
# loops are fed the same 20 tokens and differ in the positions they give them. Two are broken.

# %%
@torch.inference_mode()
def logits_with_positions(ids, prompt_length, position_of_step):
    """Logits of each decode step, [steps, V], when step t is told it sits at position_of_step(t)."""
    cache = model(torch.tensor([ids[:prompt_length]]), use_cache=True).past_key_values
    rows = []
    for step, token_id in enumerate(ids[prompt_length:]):
        position = torch.tensor([[position_of_step(step)]])
        result = model(torch.tensor([[token_id]]), position_ids=position, past_key_values=cache)
        rows.append(result.logits[0, -1])
    return torch.stack(rows)


text = story + generate(story, 20)
n = len(story)
suspects = {"A": lambda step: n + step, "B": lambda step: n + step + 1, "C": lambda step: step}
with torch.inference_mode():
    truth = model(torch.tensor([text])).logits[0, n:]  # no cache, nothing to get wrong
fig, axis = plt.subplots(figsize=(9, 3))
for (name, position_of_step), marker in zip(suspects.items(), "osd"):
    wrong_by = (logits_with_positions(text, n, position_of_step) - truth).abs().amax(dim=-1)
    axis.semilogy(wrong_by.clamp(min=1e-7), marker=marker, label=name)
axis.set(xlabel="decode step", xticks=range(0, 20, 2), ylabel="largest logit difference")
axis.legend()
show(fig, alt="Largest logit difference to the run without a cache, for 20 steps, on a log scale. A "
     "stays near 1e-4. B and C are wrong from step 0: B by about 1, C by about 10.")

# %% [markdown]
# B is off by one, C restarts at zero after the prompt. Now the dangerous part. Let A and B write for themselves:

# %%
@torch.inference_mode()
def write(position_of_step, num_new=24):
    result, written = model(torch.tensor([story]), use_cache=True), []
    for step in range(num_new):
        written.append(int(result.logits[0, -1].argmax()))
        position, cache = torch.tensor([[position_of_step(step)]]), result.past_key_values
        result = model(torch.tensor([written[-1:]]), position_ids=position, past_key_values=cache)
    return tokenizer.decode(written)


for name in "AB":
    print(f"{name}: Once upon a time, there was a{write(suspects[name])}")

# %% [markdown]
# Both read well. Rotary positions are *relative*: B's new tokens are all off by the same one, so among themselves they
# stand right, and only their distance to the prompt is wrong. No assertion fails, nothing crashes, and the text is another
# one. The only defence is the one you used: compare logits with a slow, obvious computation. The engine's tests do it on
# every schedule they can think of (`tests/oracle.py`).
#
# ## From tokens to text
#
# Tokens come one by one and should be shown as they come. The obvious way, one `decode` per token:

# %% tags=["exact"]
token_ids = tokenizer.encode("Lift-off 🙂🚀 from 日本!")  # as if a model had written it
print("one by one:", "".join(tokenizer.decode([token_id]) for token_id in token_ids))
print("at once:   ", tokenizer.decode(token_ids))

# %% [markdown]
# The rocket is three tokens, and decoding each of them alone prints rubble. Decoding *everything* again for each token
# would be right, and n² once more.
#
# Stop strings have the same shape of problem. You ask for the output to end before `"\n\nUser:"`. The model writes
# `"\n"`, then `"\nUs"`, then `"er:"`: by the time you know, four of its seven characters are on the reader's screen. Shown
# text cannot be taken back, so text that *might* become a stop string must wait.
#
# A token of this tokenizer is a string of bytes, so the exercise works on bytes:
#
# | push | text so far | may be shown now (stop = "END") |
# |---|---|---|
# | `b"see E"` | `see E` | `see`: all but the last 2 characters |
# | `b"N"` | `see EN` | the space |
# | `b"V"` | `see ENV` | `E`: a stop string can no longer begin there |
# | `finish()` | `see ENV` | the rest, `NV` |

# %% tags=["exercise"]
import codecs


@exercise("01.4", target="course_lib.engine.detokenizer:IncrementalDetokenizer")
class TextStream:
    """Text of one output while it grows.

    `stopped` is None until a stop string is found, then that string; the text ends before it, and
    neither push nor finish is called again. Of several stop strings, the one that is completed first
    counts.
    """

    def __init__(self, stop):
        """stop: list of stop strings, possibly empty."""
        self.stop = stop
        self.stopped = None
        #: solution
        self.text = ""
        self.shown = 0
        self.hold = max([len(one) for one in stop], default=1) - 1
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        #: stub
        ...  # what must you remember between two pieces?
        #: end

    def push(self, piece):
        """Add the bytes of one token; return the text (str) that may be shown now and was not before.

        No half characters, no text that could be the beginning of a stop string: hold back one
        character less than the longest stop string has (none if there is no stop string).
        """
        #: solution
        self.text += self.decoder.decode(piece)
        found = [(self.text.find(one) + len(one), one) for one in self.stop if one in self.text]
        limit = len(self.text) - self.hold
        if found:
            end, self.stopped = min(found)
            limit = end - len(self.stopped)
        return self._show(limit)
        #: end

    def finish(self):
        """No more tokens will come: return what was held back. Half a character becomes U+FFFD."""
        #: solution
        self.text += self.decoder.decode(b"", final=True)
        return self._show(len(self.text))

    def _show(self, limit):
        start, self.shown = self.shown, max(self.shown, limit)
        return self.text[start : self.shown]
        #: end

# %% tags=["check"]
check("01.4")

# %% [markdown]
# ## The whole request
#
# Everything you met is one call of `llm.chat`. Record it, and look at where the time goes:

# %%
params = SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=24)
with record(llm) as trace, my_code():
    [answer] = llm.chat(conversation, params, use_tqdm=False)
print(answer.outputs[0].text)
explore_requests(trace)

# %% [markdown]
# `my_code()` put every exercise you have passed in the engine's place for that call; the lines above say whose functions
# ran, and how often. (Yours from 01.1 runs when an engine is built, not per request.) In the waterfall, the triangle marks
# the first token: until there it is the **TTFT**, and what follows, divided by the remaining tokens, is the **TPOT**.
# Tokenizing and detokenizing are slivers here. They stop being slivers when one process does them for a hundred requests,
# which is why vLLM keeps them out of the loop that feeds the GPU.
#
# In a terminal, the same engine with your code: `python3 -m course_lib chat --mine`.
#
# ## How vLLM does it
#
# | step | here | in vLLM | what differs there |
# |---|---|---|---|
# | entry point | `course_lib/entrypoints/llm.py` | `vllm/entrypoints/llm.py` | more tasks than text |
# | text to tokens | `engine/input_processor.py` | `vllm/v1/engine/input_processor.py` (`processor.py` before) | images, adapters |
# | the loop | `engine/core.py` | `vllm/v1/engine/core.py` | in a process of its own, fed through ZeroMQ |
# | forward | `runner/model_runner.py` | `vllm/v1/worker/gpu_model_runner.py` | CUDA graphs, compiled models |
# | top-k, top-p | `sampling/topk_topp.py` | `vllm/v1/sample/ops/topk_topp_sampler.py` | a Triton kernel or FlashInfer; one ascending sort where neither runs |
# | draw | `sampling/draw.py` | the same file, `random_sample` | noise for all 49,152 tokens, in one go |
# | tokens to text | `engine/detokenizer.py` | `vllm/v1/engine/detokenizer.py` | the `tokenizers` library's decode stream |
#
# Two choices you would not guess. On a CPU, our engine does not sort all 49,152 logits: it judges each row on its 64
# largest, and sorts more only if those do not settle it. And `draw` applies your rule twice, first to blocks of 128 tokens and then inside
# the winning block, because random numbers cost more than arithmetic on a CPU. Both are in the files above, and both
# give exactly the distribution that yours gives.
#
# ## Recap
#
# - A model turns n tokens into n rows of logits; only the last row is news.
# - Keys and values of earlier positions never change. Keep them, and a step computes one position.
# - A cached step waits mostly for the weights, so its time hardly depends on the length, until the cache is as large.
# - The cache takes $2 \cdot L \cdot H_{kv} \cdot D \cdot b$ bytes per token. Memory becomes the scarce thing.
# - Around the model stand small loops, each with a trap: truncation order, the draw, positions, half characters, stop
#   strings.
#
# <details><summary>Five questions to check yourself</summary>
#
# 1. *Why are queries not cached?* A position's query is used once, by itself; later positions bring their own.
# 2. *Why does a decode step with 500 cached tokens take about as long as one with 50?* Both read every weight once; the
#    cache they read beside it is small.
# 3. *A model goes from 32 KV heads to 8. What happens to the cache?* It shrinks to a quarter; the query heads do not
#    matter.
# 4. *Why does top-p run after top-k, on renormalised probabilities?* So that p means a share of what can still be drawn.
# 5. *How long can a stop string of 6 characters delay text?* By 5 characters at most, and until the end of the output.
#
# </details>
#
# To read: Pope et al., *Efficiently Scaling Transformer Inference* (2022), for the arithmetic of prefill and decode;
# Kwon et al., *PagedAttention* (SOSP 2023), whose first three pages are the motivation for the next lesson.
#
# **Next: 02, LLM engine.** Several requests at once, and a memory that must be shared between texts whose lengths nobody
# knows.
