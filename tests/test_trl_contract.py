"""The private seams of TRL that the trainer stands on. If one of these fails, a new TRL needs a look before anything else."""

import inspect
import re
import subprocess
import sys

import trl
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from oblr_trl.scores.completion_scorer import FORWARD_KEYS


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return inspect.getsource(inspect.unwrap(function))


def test_the_tested_release_is_installed():
    assert trl.__version__.startswith("1.16.")


def test_signatures_of_the_overridden_methods():
    assert parameters(GRPOTrainer._calculate_rewards) == [
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(GRPOTrainer._get_train_sampler) == ["self", "dataset"]
    assert parameters(GRPOTrainer.create_scheduler) == ["self", "num_training_steps", "optimizer"]
    assert parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(GRPOTrainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameters(GRPOTrainer.__init__)[:4] == ["self", "model", "reward_funcs", "args"]


def test_the_forward_takes_what_the_scoring_pass_hands_it():
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert set(names) == {*names[:6], "compute_entropy", "compute_aux_loss", *FORWARD_KEYS}
    body = source(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in body
    assert "outputs.log_probs[:, -logits_to_keep:]" in body


def test_keys_of_the_scored_batch():
    body = source(GRPOTrainer._generate_and_score_completions)
    keys = set(re.findall(r'output\["(\w+)"\] =', body)) | set(re.findall(r'^            "(\w+)": \w+,$', body, re.M))
    assert keys == {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
        "importance_sampling_ratio",
        "sampling_per_token_logps",
        "ref_per_token_logps",
        "tool_mask",
        *FORWARD_KEYS,
    }


def test_rows_are_shuffled_after_scoring_and_advantages_are_logged_before_it_ends():
    assert source(GRPOTrainer._prepare_inputs).index("_generate_and_score_completions") < source(
        GRPOTrainer._prepare_inputs
    ).index("shuffle_sequence_dict")
    assert '_logs["advantages"].extend(all_process_advantages.tolist())' in source(
        GRPOTrainer._generate_and_score_completions
    )


def test_rewards_are_summed_and_scaled_as_ours():
    body = source(GRPOTrainer._generate_and_score_completions)
    assert "rewards_per_func.isnan().all(dim=1)" in body or "torch.isnan(rewards_per_func).all(dim=1)" in body
    assert "(rewards_per_func * self.reward_weights.to(device).unsqueeze(0)).nansum(dim=1)" in body
    assert "advantages / (std_rewards + 1e-4)" in body
    assert callable(grpo_trainer.nanstd)


def test_the_mathematics_needs_neither_trl_nor_transformers():
    code = (
        "import sys, oblr_trl, oblr_trl.metrics; "
        "assert not {'trl', 'transformers', 'accelerate'} & set(sys.modules); oblr_trl.OBLRPOTrainer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
