"""What the backend, the model and the tokenizer of a trainer must be like."""

from typing import Any

from torch import nn

from oblr_trl.checks.adaptation import adapt_if_possible


def check_backend(trainer: Any) -> None:
    """Raise a `ValueError` for what the trainer's backend does that OBLR-PO cannot work with."""
    args, state = trainer.args, trainer.accelerator.state
    plain = args.baseline == "group_mean" and not args.needs_scores
    if trainer.accelerator.device.type == "mps" and not plain:
        raise ValueError(
            "Baselines and sketches are summed in float64, which Apple's GPUs lack. Remedy: set use_cpu=True, or "
            "baseline='group_mean' with lr_adaptation='none'."
        )
    devices = {str(device) for device in (getattr(trainer.model, "hf_device_map", None) or {}).values()}
    if args.needs_scores and len(devices) > 1:
        raise ValueError(
            f"The model is split over {sorted(devices)} in one process (`device_map`), and the scoring pass works on one. Remedy: load it "
            "without `device_map` and start one process per GPU by `accelerate launch`, with ZeRO-3 or FSDP 2 for a model that does "
            "not fit into one; or baseline='group_mean' with lr_adaptation='none'."
        )
    adapt_if_possible(args, _check_deepspeed, state.deepspeed_plugin if trainer.is_deepspeed_enabled else None)
    if args.needs_scores and trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "OBLR-PO's scoring pass needs parameters of their own shape, which FSDP 1 flattens. Remedy: set fsdp_version: 2 in "
            "the accelerate configuration, use DeepSpeed ZeRO, or baseline='group_mean' with lr_adaptation='none'."
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise a `ValueError` for a tokenizer that makes token ids of text which the model has no embedding for: the look-up of one is
    an unclear error on a CPU and the end of the process on a GPU. Special tokens, which text need not contain, may be missing."""
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    highest = max(set(tokenizer.get_vocab().values()) - special)
    if highest >= embeddings.num_embeddings:
        raise ValueError(
            f"The tokenizer has token id {highest}, but the model's vocabulary has {embeddings.num_embeddings} entries. Use the "
            "tokenizer the model was trained with, or call `model.resize_token_embeddings(len(tokenizer))`."
        )


def _check_deepspeed(plugin: Any) -> None:
    if plugin is not None and "scheduler" in plugin.deepspeed_config:
        raise ValueError(
            "DeepSpeed steps the scheduler of its file itself, so that the SNR could not multiply its rate. Remedy: remove the "
            "`scheduler` section from the DeepSpeed file and set `lr_scheduler_type`, or set lr_adaptation='none'."
        )
