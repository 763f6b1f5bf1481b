"""The real training script, with what it computed written down: `torchrun tests/backends/launch.py --config ...`.

Three things differ from `python -m oblr_trl.scripts.train`, none of them in the code under test:

- every process appends to a record (`BACKENDS_RECORD`) what each step used: advantages, weights, SNR, learning rates;
- with `BACKENDS_SAMPLING=rows` a completion's random numbers belong to its row of the global batch, not to the process, and
  the rows of a batch are dealt to optimizer steps in a fixed order: the same rollouts come out on any number of processes;
- DeepSpeed and FSDP get the CPU process group that accelerate prepares for CUDA only (`BACKENDS_ENGINE`).

`BACKENDS_PAUSE` lets it wait indefinitely in the middle of a step: to be killed there. `BACKENDS_BREAK` breaks the code under test
on purpose, so that the suite can be seen to fail; `BACKENDS_WEIGHTS` says which weights of the baseline are chosen; `BACKENDS_FAULT` lets something go wrong on the second process only.
"""

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import gather_object
from torch.optim.optimizer import register_optimizer_step_pre_hook

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def give_engines_a_cpu_process_group():
    """accelerate prepares no process group on a CPU unless told `cpu=True`, which DeepSpeed and FSDP refuse."""
    prepare = PartialState._prepare_backend

    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        found, distributed_type = prepare(self, cpu, sagemaker_dp, backend)
        return (found, distributed_type) if found is not None else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = prepare_backend


def give_fsdp_to_cpu_processes():
    """accelerate looks for an FSDP plugin only where it found several GPUs."""
    initialise = AcceleratorState.__init__

    def initialise_with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = initialise_with_plugin


def sample_by_row():
    """Replace the random numbers of `generate` by a function of call, position and row of the global batch."""
    state = {"call": int(os.environ.get("BACKENDS_FIRST_CALL", "0")), "position": 0}
    generate = transformers.GenerationMixin.generate
    multinomial = torch.multinomial

    def counted_generate(self, *args, **kwargs):
        state["call"] += 1
        state["position"] = 0
        return generate(self, *args, **kwargs)

    def by_row(probs, num_samples, *args, **kwargs):
        if num_samples != 1 or probs.dim() != 2:
            return multinomial(probs, num_samples, *args, **kwargs)
        generator = torch.Generator().manual_seed(state["call"] * 1009 + state["position"])
        state["position"] += 1
        uniform = torch.rand(WORLD_SIZE * probs.size(0), generator=generator, dtype=torch.float64)
        uniform = uniform[RANK * probs.size(0) :][: probs.size(0)]
        cumulative = probs.double().cumsum(dim=1)
        return (cumulative < uniform.unsqueeze(1) * cumulative[:, -1:]).sum(dim=1, keepdim=True)

    transformers.GenerationMixin.generate = counted_generate
    torch.multinomial = by_row


def deal_rows_in_turn():
    """Replace the shuffling of a batch: optimizer step s of S takes rows s, s + S, ..., however many processes hold them."""
    from trl.trainer import grpo_trainer

    def deal(batch):
        size = batch["advantages"].size(0)
        steps = int(os.environ.get("BACKENDS_STEPS_PER_BATCH", "1"))
        order = torch.arange(size).view(-1, steps).T.flatten()
        return {key: value[order] if torch.is_tensor(value) and value.dim() else value for key, value in batch.items()}

    grpo_trainer.shuffle_sequence_dict = deal


def record_everything(path):
    """Append one JSON line for every batch and every optimizer step to `path`."""
    from oblr_trl import OBLRPOTrainer

    running = {}

    def write(**line):
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
        if os.environ.get("BACKENDS_PAUSE") == f"{line['kind']} {line.get('step')}":
            time.sleep(3600)

    generate_and_score, group = OBLRPOTrainer._generate_and_score_completions, OBLRPOTrainer._grouped_batch
    train = OBLRPOTrainer.train

    def recorded_group(self, *args):
        batch, running["batch"], prompts = group(self, *args)
        return batch, running["batch"], prompts

    def recorded_batch(self, inputs):
        output = generate_and_score(self, inputs)
        batch = running.pop("batch", None)
        if batch is None:
            return output
        write(
            kind="batch",
            step=self.state.global_step,
            completions=gather_object([row[mask].tolist() for row, mask in rows_of_completions(output)]),
            advantages=self.accelerator.gather(output["advantages"]).tolist(),
            weights=None if batch.sketches is None else batch.sketches.square().sum(dim=2).flatten().tolist(),
            signal=self._gradient_snr.averages.signal,
            noise=self._gradient_snr.averages.noise,
            rho=self._metrics["train"].get("gradient_snr/rho", [None])[-1],
            kl=self._metrics["train"].get("trust_region/kl", [None])[-1],
            prior_strength=self._metrics["train"].get("baseline/prior_strength", [None])[-1],
            remembered=self._metrics["train"].get("baseline/remembered_fraction", [None])[-1],
        )
        return output

    def recorded_train(self, *args, **kwargs):
        running["trainer"] = self
        write(kind="start", num_processes=self.accelerator.num_processes, type=str(self.accelerator.distributed_type))
        result = train(self, *args, **kwargs)
        parameters, state = list(self.model.parameters()), self._algorithm_state()
        tensors = {name: value.tolist() for name, value in state.items() if isinstance(value, torch.Tensor)}
        write(
            kind="end",
            trainable=sum(p.requires_grad for p in parameters),
            partitioned=sum(_local_numel(p) < _full_numel(p) for p in parameters),
            num_parameters=len(parameters),
            state={name: value for name, value in state.items() if name not in tensors},
            tensors=tensors,
        )
        return result

    def recorded_step(optimizer, args, kwargs):
        trainer = running.get("trainer")
        if trainer is not None:
            lrs = [float(group["lr"]) for group in optimizer.param_groups]
            write(kind="step", step=trainer.state.global_step, lrs=lrs, **memory(trainer))

    OBLRPOTrainer._generate_and_score_completions = recorded_batch
    OBLRPOTrainer._grouped_batch = recorded_group
    OBLRPOTrainer.train = recorded_train
    register_optimizer_step_pre_hook(recorded_step)


def rows_of_completions(output):
    return zip(output["completion_ids"], output["completion_mask"].bool(), strict=True)


def memory(trainer):
    """Hooks on modules, and every 25 steps (it takes time), resident bytes and live tensors of this process."""
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in trainer.model.modules()
    )
    found = {"hooks": hooks}
    if trainer.state.global_step % 25 == 0:
        gc.collect()
        # Without what the allocator holds in reserve, which moves by some MiB and is nobody's.
        ctypes.CDLL(None).malloc_trim(0)
        found["resident"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found["tensors"] = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    return found


def _full_numel(parameter):
    return getattr(parameter, "ds_numel", parameter.numel())  # a DTensor's own count is the full one


def _local_numel(parameter):
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def break_on_purpose(what):
    from oblr_trl import OBLRPOTrainer
    from oblr_trl.scores.scoring_model import ScoringModel

    if what == "local_sketches":  # as elsewhere: every process takes its own shard for the whole batch
        result = ScoringModel.result

        def local_result(self, gather, *args):
            return result(self, lambda local: local.repeat(WORLD_SIZE, *[1] * (local.dim() - 1)), *args)

        ScoringModel.result = local_result
    elif what == "dropped_ema":
        load = OBLRPOTrainer._load_algorithm_state

        def forgetful(self, state):
            load(self, state)
            self._gradient_snr.averages.load_state_dict({"signal": 0.0, "noise": 0.0, "weight": 0.0})
            self._trust_region.load_state_dict({"correlation": 0.1, "_num_completions": 100.0})

        OBLRPOTrainer._load_algorithm_state = forgetful
    else:
        raise ValueError(f"Unknown way to break: {what}")


def lose_hidden_states():
    """Let the first row's hidden states be nan from step 3 of the second process on, in scoring and training."""
    from trl import GRPOTrainer

    generate = GRPOTrainer._generate

    def faulty(self, *args, **kwargs):
        result = generate(self, *args, **kwargs)
        if self.state.global_step == 3:
            self.model.get_decoder().norm.register_forward_hook(
                lambda module, inputs, output: output.index_fill(0, torch.tensor([0]), float("nan"))
            )
        return result

    if RANK == WORLD_SIZE - 1:
        GRPOTrainer._generate = faulty


def main():
    if os.environ.get("BACKENDS_ENGINE"):
        give_engines_a_cpu_process_group()
    if os.environ.get("BACKENDS_ENGINE") == "fsdp2":
        give_fsdp_to_cpu_processes()
    if os.environ.get("BACKENDS_SAMPLING") == "rows":
        sample_by_row()
        deal_rows_in_turn()
    if os.environ.get("BACKENDS_RECORD"):
        record_everything(f"{os.environ['BACKENDS_RECORD']}.{RANK}.jsonl")
    if os.environ.get("BACKENDS_BREAK"):
        break_on_purpose(os.environ["BACKENDS_BREAK"])
    if os.environ.get("BACKENDS_FAULT") == "logits":
        lose_hidden_states()
    if weights := os.environ.get("BACKENDS_WEIGHTS"):
        from oblr_trl.baselines import WeightsChoice

        # From the second batch on: the first one is scored whole, as all are before the choice.
        WeightsChoice._cheapest = lambda choice: weights
        WeightsChoice.__init__.__kwdefaults__["warm_up"] = 1
    from oblr_trl.scripts import train

    train.main(*train.parse())


if __name__ == "__main__":
    main()
