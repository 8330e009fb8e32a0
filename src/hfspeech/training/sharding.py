"""Models whose weights are sharded over the processes by FSDP: what they cannot do, and how they become whole again."""

import copy
import os
from pathlib import Path

import torch

from hfspeech.errors import UserError
from hfspeech.models.loading import base_of, is_quantized
from hfspeech.runs import DEEPSPEED_SHARDS, layout

LAUNCH = "recipes/launch"
CONFIGS = {"fsdp": "fsdp2.yaml", "deepspeed": "deepspeed_zero2.yaml", "whole": "several_gpus.yaml"}


def asks_for(what):
    """Tells whether `accelerate launch` was told to use `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def require_support(model, args, may_be_sharded):
    """Raises a `UserError` that names the first setting under which this launch would not work."""
    if asks_for("DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise UserError(f"Weights are sharded by FSDP, not by ZeRO-3: launch with --config_file {LAUNCH}/fsdp2.yaml.")
    if not asks_for("FSDP"):
        return
    instead = f"launch with --config_file {LAUNCH}/several_gpus.yaml."
    if not may_be_sharded:
        raise UserError(f"This model fits on every GPU and is not sharded: {instead}")
    if is_quantized(model):
        raise UserError(f"Weights in 8 or 4 bits cannot be sharded: {instead}")
    if args.max_batch_seconds == "auto":
        raise UserError("--max_batch_seconds auto cannot try a sharded model: give a number of seconds, such as 80.")
    needed = {
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",  # every process measures the model before it is sharded
    }
    for name, value in needed.items():
        if os.environ.get(name) != value:
            raise UserError(
                f"A model is sharded with {name.lower()}: {value} in the launch configuration: take {LAUNCH}/fsdp2.yaml."
            )


def require_same_layout(checkpoint, trainer):
    """Raises a `UserError` if a trainer cannot go on from a checkpoint because of how that is sharded."""
    here = "fsdp" if trainer.is_fsdp_enabled else "deepspeed" if trainer.is_deepspeed_enabled else "whole"
    there = layout(checkpoint)
    if there != here:
        raise UserError(
            f"{checkpoint} was written under {LAUNCH}/{CONFIGS[there]} or its like: launch with that, or choose another "
            "--output_dir.",
            of_all=True,
        )
    shards = len(list(Path(checkpoint).glob(f"*/{DEEPSPEED_SHARDS}")))
    if shards not in (0, trainer.args.world_size):
        raise UserError(
            f"DeepSpeed goes on from {checkpoint} with as many processes as wrote it: --num_processes {shards}.", of_all=True
        )


def skeleton_of(model):
    """Returns a copy of a model that has no weights; taken before they are sharded."""
    empty = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def filled(skeleton, model):
    """Returns a copy of a skeleton that has all weights of the sharded model, in every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = copy.deepcopy(skeleton)
    whole.load_state_dict(weights, assign=True)
    base_of(whole).tie_weights()
    return whole
