"""From a conversation to a prompt, by the model's own chat template.

vLLM: `vllm/entrypoints/chat_utils.py`.
"""

from __future__ import annotations

from typing import Any

from course_lib.prompts import TokensPrompt
from course_lib.sampling_checks import unicode_text


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    chat_template: str | None = None,
    content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> TokensPrompt:
    """Render `messages` to text and tokens.

    Args:
        tools: function descriptions for the template; refused if the template does not use them.
        content_format: "string" or "auto"; lists of text parts are joined to one string.

    Raises:
        TypeError, ValueError: a message is malformed, the tokenizer has no template, or the template
            itself refuses the conversation.
    """
    if content_format not in ("auto", "string"):
        raise ValueError(f'chat_template_content_format={content_format!r}: use "auto" or "string"')
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message=True continues the last message: set add_generation_prompt=False")
    conversation = [_check_message(index, message) for index, message in enumerate(messages)]
    if not conversation:
        raise ValueError("messages is empty: give at least one message")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: pass chat_template=, or use generate with plain text")

    def render(tools: list[dict[str, Any]] | None) -> str:
        try:
            return tokenizer.apply_chat_template(
                conversation,
                chat_template=chat_template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except Exception as error:  # Jinja errors, and what templates raise themselves
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    text = unicode_text("the rendered chat prompt", render(tools))
    if tools and text == render(None):
        raise ValueError(
            "tools: this model's chat template does not use them, so the model would never see them; leave "
            "tools out, describe them in a message, or pass a chat_template that writes them"
        )
    # The template has written the special tokens itself.
    return TokensPrompt(prompt=text, prompt_token_ids=tokenizer.encode(text, add_special_tokens=False))


def _check_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TypeError(f"messages[{index}] must be a dict with a 'role' and a 'content', not {message!r:.80}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of(index, part) for part in content)
    elif content is None and "tool_calls" in message:
        content = ""
    elif not isinstance(content, str):
        raise TypeError(f"messages[{index}]['content'] must be text or a list of text parts, not {content!r:.80}")
    return {**message, "content": unicode_text(f"messages[{index}]['content']", content)}


def _text_of(index: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"messages[{index}]: content parts must be {{'type': 'text', 'text': …}}, not {part!r:.80}")
