"""Models sharded over the processes by FSDP or DeepSpeed: what they cannot do, and how they become whole again."""

import copy
import os
from pathlib import Path

import torch

from hfspeech.errors import UserError
from hfspeech.models.loading import base_of, is_quantized
from hfspeech.runs import DEEPSPEED_SHARDS, layout

LAUNCH = "recipes/launch"


def is_sharded(args):
    """Tells whether FSDP or DeepSpeed shards what a launch with these `TrainingArguments` trains."""
    return _asks_for_fsdp() or args.deepspeed_plugin is not None


def _asks_for_fsdp():
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def require_support(model, args, may_be_sharded):
    """Raises a `UserError` that names the first setting under which this launch would not work."""
    if not is_sharded(args):
        return
    instead = f"launch with --config_file {LAUNCH}/several_gpus.yaml."
    if not may_be_sharded:
        raise UserError(f"This model fits on every GPU and is not sharded: {instead}")
    if is_quantized(model):
        raise UserError(f"Weights in 8 or 4 bits cannot be sharded: {instead}")
    config = base_of(model).config
    if max(config.encoder_layerdrop, config.decoder_layerdrop) > 0:
        raise UserError(
            "A sharded model cannot leave out layers at random, which this one does: set encoder_layerdrop and "
            f"decoder_layerdrop to 0 in its config.json, or {instead}"
        )
    if args.max_batch_seconds == "auto":
        raise UserError("--max_batch_seconds auto cannot try a sharded model: give a number of seconds, such as 80.")
    if not _asks_for_fsdp():
        return
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


def require_same_layout(checkpoint, args):
    """Raises a `UserError` if a launch cannot go on from a checkpoint because of how that is sharded."""
    here = "fsdp2" if _asks_for_fsdp() else "several_gpus"
    if args.deepspeed_plugin:
        here = "deepspeed_zero3" if args.deepspeed_plugin.zero_stage == 3 else "deepspeed_zero2"
    there = layout(checkpoint)
    if there != here:
        raise UserError(
            f"{checkpoint} was written under {LAUNCH}/{there}.yaml or its like: launch with that, or choose another "
            "--output_dir.",
            of_all=True,
        )
    shards = len(list(Path(checkpoint).glob(f"*/{DEEPSPEED_SHARDS}")))
    if shards not in (0, args.world_size):
        raise UserError(
            f"DeepSpeed goes on from {checkpoint} with as many processes as wrote it: --num_processes {shards}.",
            of_all=True,
        )


def skeleton_of(model):
    """Returns a copy of a model that has no weights; taken before they are sharded."""
    empty = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def filled(skeleton, model):
    """Returns a copy of a skeleton that has all weights of the sharded model, in every process."""
    whole = copy.deepcopy(skeleton)
    weights = _weights_from_fsdp(model) if _asks_for_fsdp() else _weights_from_deepspeed(model, skeleton)
    whole.load_state_dict(weights, assign=True)
    base_of(whole).tie_weights()
    return whole


def _weights_from_fsdp(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def _weights_from_deepspeed(model, skeleton):
    """Those that are trained are the optimizer's: the model's own are rounded to bf16 or fp16 if it trains in that."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights, dtypes = {}, {name: empty.dtype for name, empty in skeleton.state_dict().items()}
    for name, weight in model.state_dict(keep_vars=True).items():
        with GatheredParameters(weight):
            trained = safe_get_full_fp32_param(weight) if weight.requires_grad else None
            weights[name] = (weight if trained is None else trained).detach().to(dtypes[name], copy=True)
    return weights
