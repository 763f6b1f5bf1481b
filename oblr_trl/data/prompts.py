"""From the prompts of a dataset to those of a model: a template around text, a conversation around that."""

from dataclasses import dataclass
from typing import Any

from oblr_trl.data.recipe_files import option


@dataclass
class PromptArguments:
    """How prompts are shaped, in training and in evaluation. Fields are documented by their `help`."""

    prompt_template: str | None = option(None, "Text around every string prompt, which replaces `{prompt}` in it.")
    conversational: bool = option(
        False,
        "Whether to turn every string prompt into a conversation of one user message, for models with a chat template.",
    )
    system_prompt: str | None = option(None, "System message put before every conversation.")

    def __post_init__(self):
        check_template(self.prompt_template)


def check_template(template: str | None, *, field_name: str = "prompt_template") -> None:
    """Refuse a template that drops what it is put around, the prompt or the answer."""
    name = field_name.removesuffix("_template")
    if template is not None and f"{{{name}}}" not in template:
        raise ValueError(f"`{field_name}` is {template!r}, which would drop the {name}: put `{{{name}}}` in it.")


def format_prompts(prompts: list[Any], args: PromptArguments, *, source: str) -> list[Any]:
    """
    Put prompts, all texts or all lists of messages, into the form that the model is to see. A row without a prompt is refused,
    with `source` saying where it is.
    """
    template, system_prompt = args.prompt_template, args.system_prompt
    for index, prompt in enumerate(prompts):
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(
                f"Row {index} of {source} has the prompt {prompt!r}, which is neither text nor a list of messages: correct "
                "or remove the row, or set `prompt_column` to another column."
            )
    if isinstance(prompts[0], str):
        prompts = [(template or "{prompt}").replace("{prompt}", prompt) for prompt in prompts]
        if not args.conversational:
            if system_prompt is not None:
                raise ValueError(
                    "`system_prompt` needs a conversation, but the prompts are strings: set `conversational: true`, or put "
                    "the text into `prompt_template`."
                )
            return prompts
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    elif template is not None:
        raise ValueError("`prompt_template` is for string prompts, but the prompts are conversations: remove it.")
    return prompts if system_prompt is None else [[{"role": "system", "content": system_prompt}, *p] for p in prompts]
