"""Scripts as people write them for vLLM, with only the import and the model changed."""

from __future__ import annotations

from pathlib import Path

from course_lib import LLM, EngineArgs, FlexibleArgumentParser, LLMEngine, RequestOutput, SamplingParams
from course_lib.outputs import CompletionOutput, Logprob


def test_offline_generate(llm: LLM) -> None:
    prompts = ["Hello, my name is", "The president of the United States is", "The capital of France is"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95))
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        assert isinstance(output, RequestOutput) and isinstance(output.outputs[0], CompletionOutput)
        assert output.finished and 1 <= len(output.outputs[0].token_ids) <= 16
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt)
        text = llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert output.outputs[0].text == text


def test_the_course_model_knows_the_capital_of_france(llm: LLM) -> None:
    (output,) = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=20)
    )
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_chat_with_default_params_and_a_batch_of_conversations(llm: LLM) -> None:
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 8
    sampling_params.temperature = 0
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": [{"type": "text", "text": "Write an essay about higher education."}]},
    ]
    (single,) = llm.chat(conversation, sampling_params, use_tqdm=False)
    batch = llm.chat([conversation] * 10, sampling_params, use_tqdm=True)
    assert [output.outputs[0].token_ids for output in batch] == [single.outputs[0].token_ids] * 10
    assert "higher education.<|im_end|>\n<|im_start|>assistant\n" in single.prompt


def test_one_params_object_per_prompt_and_all_prompt_forms(llm: LLM) -> None:
    text = "The future of AI is"
    ids = llm.get_tokenizer().encode(text)
    prompts = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 4, 5, 6)]
    outputs = llm.generate(prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 4, 5, 6]
    longest = outputs[-1].outputs[0].token_ids
    assert all(output.outputs[0].token_ids == longest[: i + 3] for i, output in enumerate(outputs))
    assert llm.generate(ids, params[0])[0].outputs[0].token_ids == longest[:3]  # one flat list is one prompt


def test_llm_engine_loop_with_requests_joining(course_model_path: Path) -> None:
    parser = FlexibleArgumentParser(description="demo")
    parser = EngineArgs.add_cli_args(parser)
    argv = ["--model", str(course_model_path), "--max_model_len", "256", "--device=cpu", "--enforce-eager"]
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(argv)))
    pending = [
        ("A robot may not injure a human being", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)),
        ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2)),
        ("What is the meaning of life?", SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1)),
    ]
    request_id, finished, unfinished_seen = 0, {}, 0
    while pending or engine.has_unfinished_requests():
        if pending:
            prompt, params = pending.pop(0)
            engine.add_request(str(request_id), prompt, params)
            request_id += 1
        unfinished_seen = max(unfinished_seen, engine.get_num_unfinished_requests())
        for output in engine.step():
            if output.finished:
                assert output.request_id not in finished, "finished twice"
                finished[output.request_id] = output
    assert unfinished_seen == 3 and sorted(finished) == ["0", "1", "2"]
    first = finished["0"]
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == len(first.prompt_token_ids)
    for token_id, position in zip(first.prompt_token_ids[1:], first.prompt_logprobs[1:], strict=True):
        assert isinstance(position[token_id], Logprob)
    assert len(first.outputs[0].logprobs) == len(first.outputs[0].token_ids) == 16
    assert all(position[t].rank == 1 for t, position in zip(first.outputs[0].token_ids, first.outputs[0].logprobs))
    assert [one.index for one in finished["2"].outputs] == [0, 1]
    for one in finished["2"].outputs:
        assert one.finish_reason == "stop" or len(one.token_ids) == 16, one
    assert finished["0"].metrics.first_token_time >= finished["0"].metrics.arrival_time


def test_rpc_and_apply_model(llm: LLM) -> None:
    assert llm.apply_model(lambda model: type(model).__name__) == ["LlamaForCausalLM"]
    assert llm.collective_rpc(lambda runner, add: runner.block_size + add, args=(1,)) == [17]
