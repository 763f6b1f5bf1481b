"""Which layers the scoring pass can score, and why not the others.

The baseline is unbiased whatever its weights are, so that a layer without a score is no reason not to train it: the scope
`"auto"` leaves it out, and `"all"` refuses it with the reason that is given here.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from oblr_trl.scores.experts import holds_experts
from oblr_trl.scores.logits import qualified_name
from oblr_trl.scores.rules import find_score_rule

# PEFT's classes whose trainable layers are called like any other, with one row per sequence: all that a tap can see. Other
# methods multiply with `weight` themselves, or use the same layers otherwise (DoRA), and their scores would be wrong without notice.
# Of the quantized layers only the forward code was read.
_PEFT_CLASSES = (
    "peft.peft_model.PeftModel*",
    "peft.tuners.ln_tuning.*",
    "peft.tuners.lora.*LoraLinear",
    "peft.tuners.lora.bnb.Linear*",
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.model.LoraModel",
    "peft.utils.other.ModulesToSaveWrapper",
)


class Coverage:
    """
    What the pass can score of a model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        modules (`Mapping[str, torch.nn.Module]`): Its modules by name.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._inside_experts = tuple(f"{name}." for name, module in modules.items() if name and holds_experts(module))
        self._is_adapted = any(qualified_name(module).startswith("peft.") for module in modules.values())
        has_towers = model.config.get_text_config() is not model.config
        self._language_model = set(model.get_decoder().modules()) if has_towers else None

    def obstacle(self, module_name: str, parameter_name: str, *, is_head: bool) -> str | None:
        """Why the pass cannot score a trainable parameter of a module, or `None` where it can."""
        module = self._modules[module_name]
        full_name = f"{module_name}.{parameter_name}"
        remedy = "use `scope='auto'`, which leaves them out of the scores and trains everything, or `scope='lm_head'`"
        if method := self._unknown_adapter(module_name):
            return (
                f"The scoring pass does not support PEFT's `{method}`, which trains `{full_name}`. Use plain LoRA or rsLoRA on "
                f"linear layers and `modules_to_save`, or {remedy} (`score_scope` in `OBLRPOConfig`)."
            )
        # Their first axis counts images or patches, not sequences, and where the two numbers agree it is by chance.
        if self._language_model is not None and not is_head and module not in self._language_model:
            return (
                f"The trainable parameter `{full_name}` lies outside the language model: it sees images or patches, so its "
                "gradient cannot be told apart by sequence. Freeze the vision tower and the projector (for adapters, limit "
                f"`target_modules` to the language model), or {remedy} (`score_scope` in `OBLRPOConfig`)."
            )
        # What experts call inside gets tokens in the order of the experts.
        of_experts = module_name.startswith(self._inside_experts)
        if not is_head and (of_experts or find_score_rule(module) is None):
            return (
                f"No score rule covers the trainable parameter `{full_name}` of a {type(module).__name__}. Freeze it, {remedy}, "
                "or teach the pass this layer with `oblr_trl.scores.register_score_rule`."
            )
        return None

    def _unknown_adapter(self, module_name: str) -> str | None:
        """The PEFT method that a layer belongs to, if it does not call it. The innermost class of PEFT decides."""
        if not self._is_adapted:
            return None
        path = module_name
        while not (owner := qualified_name(self._modules[path])).startswith("peft."):
            if not path:
                return None
            path = path.rpartition(".")[0]
        layer: Any = self._modules[path]
        variants = vars(layer).get("lora_variant", {})  # DoRA and others
        active = [type(variants[name]).__name__ for name in variants if name in layer.active_adapters]
        if active:
            return active[0]
        return None if any(fnmatchcase(owner, pattern) for pattern in _PEFT_CLASSES) else owner
