"""From the prompts of a data set to those of a model: a template around text, a conversation around that."""

from typing import Any

DEFAULT_TEMPLATE = "{prompt}"


def check_template(template: str | None) -> None:
    """Refuse a template that drops the prompt."""
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"`prompt_template` is {template!r}, which would drop the prompt: put `{{prompt}}` in it.")


def format_prompts(
    prompts: list[Any],
    *,
    source: str,
    template: str | None = None,
    conversational: bool = False,
    system_prompt: str | None = None,
) -> list[Any]:
    """
    Put every prompt, which is text or a list of messages, into the form that the model is to see.

    Args:
        prompts (`list`):
            Prompts, all texts or all conversations.
        source (`str`):
            Where they come from, for errors.
        template (`str`, *optional*):
            Text around every prompt, with `{prompt}` in it.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to turn texts into conversations of one user message.
        system_prompt (`str`, *optional*):
            System message put before every conversation.

    Raises:
        `ValueError`: a row without a prompt, a template for conversations, a system prompt for texts.
    """
    for index, prompt in enumerate(prompts):
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(
                f"Row {index} of {source} has the prompt {prompt!r}, which is neither text nor a list of messages: correct "
                "or remove the row, or set `prompt_column` to another column."
            )
    is_text = isinstance(prompts[0], str)
    if is_text and system_prompt is not None and not conversational:
        raise ValueError(
            "`system_prompt` needs a conversation, but the prompts are strings: set `conversational: true`, or put the "
            "text into `prompt_template`."
        )
    if not is_text and template is not None:
        raise ValueError("`prompt_template` is for string prompts, but the prompts are conversations: remove it.")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def format_prompt(prompt: Any) -> Any:
        if isinstance(prompt, str):
            prompt = (template or DEFAULT_TEMPLATE).replace("{prompt}", prompt)
            if not conversational:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        return system + prompt

    return [format_prompt(prompt) for prompt in prompts]
