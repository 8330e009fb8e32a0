"""LoRA adapters, on any of the models."""

import torch

from hfspeech.errors import UserError
from hfspeech.models.loading import is_quantized


def add_lora(model, lora_args):
    """Freezes a model and puts a LoRA adapter on it.

    `all-linear` adapts every linear layer of encoder and decoder (peft itself passes over Whisper's output projection, and
    convolutions are not linear layers). If the encoder is frozen it gets no adapter.

    Args:
        model: `WhisperForConditionalGeneration` or `SpeechT5ForTextToSpeech`.
        lora_args: `LoraArguments`.

    Returns:
        `peft.PeftModel`; only the adapter's weights require a gradient.

    Raises:
        UserError: `lora_target_modules` names no layer of the model.
    """
    import peft

    if getattr(model, "has_new_characters", False):
        raise UserError(
            "--add_characters changes the model itself, which an adapter leaves alone: use the recipe speecht5_full."
        )
    targets = lora_args.lora_target_modules
    if {"conv1", "conv2"} & set(targets):  # Whisper's forward asks them for their stride, which peft's layer hides
        raise UserError(
            "--lora_target_modules: conv1 and conv2 cannot be adapted; leave them out, or take all-linear."
        )
    # No task_type: SEQ_2_SEQ_LM would pass input_ids, which Whisper's forward does not take.
    config = peft.LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=r".*model\.encoder\..*" if model.encoder_stays_frozen else None,
        use_dora=lora_args.use_dora,
    )
    if is_quantized(model):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        # The commit, so that whoever loads the adapter gets the very base that it was trained on.
        return peft.get_peft_model(model, config, revision=model.hub_commit)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UserError(
            f"--lora_target_modules {' '.join(targets)} names no layer of this model: "
            f"choose from {', '.join(sorted(linear))}, or all-linear."
        ) from None
