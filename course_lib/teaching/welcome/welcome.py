# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Welcome: a language model on this machine
#
# The cells below load SmolLM2-135M-Instruct, a model with 135 million parameters, into an inference engine you can read
# from end to end, and talk to it. Nothing leaves your machine. Run a cell with **Shift+Enter**.
#
# This notebook is your own copy (`work/welcome.ipynb`): change what you like.

# %%
from course_lib import LLM, SamplingParams

llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")

# %% [markdown]
# ## One question
#
# `chat` takes a conversation, a list of messages, and returns a request output. `temperature=0` picks the most likely
# token each time, so you get the same answer whenever you run the cell.

# %%
conversation = [{"role": "user", "content": "What is the capital of France?"}]
[answer] = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)

print(answer.outputs[0].text)
print(f"\n{len(answer.prompt_token_ids)} prompt tokens, {len(answer.outputs[0].token_ids)} generated;"
      f" stopped because: {answer.outputs[0].finish_reason}")

# %% [markdown]
# The prompt is longer than the question. What the model really reads is the conversation in its **chat template**:

# %%
print(answer.prompt or llm.get_tokenizer().decode(answer.prompt_token_ids))

# %% [markdown]
# ## Token by token
#
# `chat` returns when the answer is complete, but the engine works in **steps**, and each step gives every running request
# one more token. Here are the steps, by hand. Every later lesson looks inside `engine.step()`.

# %%
from itertools import count

request_numbers = count()


def stream(conversation, params):
    """Print the answer as it is generated, and return it."""
    engine, request_id = llm.llm_engine, f"welcome-{next(request_numbers)}"
    prompt = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    engine.add_request(request_id, prompt, params)
    text = ""
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                print(output.outputs[0].text[len(text):], end="", flush=True)
                text = output.outputs[0].text
    finally:
        engine.abort_request([request_id])  # if you stop the cell, the engine forgets the request
    print()
    return text


params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=120)
_ = stream([{"role": "user", "content": "Explain in two sentences why the sky is blue."}], params)

# %% [markdown]
# ## Many requests at once
#
# Sixteen requests do not take sixteen times as long as one: each step computes the next token of *all* of them, and reads
# the model's weights once for it. Compare the two rates on your machine.

# %%
import time


def tokens_per_second(prompts):
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)


prompts = [f"{animal} are animals that" for animal in
           "Cats Dogs Owls Bats Bees Ants Bears Crows Deer Ducks Eels Emus Frogs Goats Geese Hares".split()]
one, sixteen = tokens_per_second(prompts[:1]), tokens_per_second(prompts)
print(f"one request: {one:.0f} tokens/s, sixteen together: {sixteen:.0f} tokens/s ({sixteen / one:.1f} times)")

# %% [markdown]
# ## Your turn
#
# Type and press **Enter**. The conversation so far goes into every prompt, which is why the engine keeps what it has already
# computed for it: the KV cache. A model this small is often wrong, and confidently so; the engine around it is the subject.

# %%
import ipywidgets as widgets
from IPython.display import display

history, log = [], widgets.Output()
box = widgets.Text(placeholder="Say something …", continuous_update=False, layout=widgets.Layout(width="100%"))


def reply(change):
    if not change["new"].strip():
        return
    history.append({"role": "user", "content": change["new"]})
    box.value = ""
    with log:
        print(f"you    {history[-1]['content']}\nmodel  ", end="")
        history.append({"role": "assistant", "content": stream(history, params)})


box.observe(reply, names="value")
display(log, box)

# %% [markdown]
# In a terminal, the same: `python3 -m course_lib chat`.
