"""What makes training fast, one lever at a time: each entry takes one of them away, to see what it was worth."""

# Levers that have a setting: name → the settings that take it away.
SETTINGS = {
    "encoder_window": {"encoder_window": "full"},
    "bf16": {"bf16": False},
    "fused_adamw": {"optim": "adamw_torch"},
    "sdpa": {"attn_implementation": "eager"},
    "workers": {"dataloader_num_workers": 0},
    "kept_activations": {"gradient_checkpointing": True},
}
# The same for LoRA under a frozen encoder.
LORA_SETTINGS = {
    "encoder_outputs": {"cache_encoder_outputs": False},
    "frozen_encoder": {"freeze_encoder": False},
}


def _allocator():
    """The C library hands freed memory back to the system and fetches it anew."""
    import hfspeech.training.trainer

    _require(hfspeech.training.trainer, "keep_freed_memory")
    hfspeech.training.trainer.keep_freed_memory = lambda: None


def _target_tokens():
    """Logits and losses of every position, and all at once."""
    import torch

    import hfspeech.modeling.whisper

    def token_losses(head, hidden, labels, label_smoothing=0.0):
        losses = torch.nn.functional.cross_entropy(
            head(hidden).float().transpose(1, 2), labels, reduction="none", label_smoothing=label_smoothing
        )
        return losses[labels != -100]

    _require(hfspeech.modeling.whisper, "token_losses")
    hfspeech.modeling.whisper.token_losses = token_losses


def _few_shapes():
    """Batches as long as their rows and tails happen to be, as many labels and target tokens as there are."""
    import hfspeech.batching
    import hfspeech.modeling.whisper
    import hfspeech.training.whisper

    for module, name, least in (
        (hfspeech.batching, "LENGTH_MULTIPLE_S", 0.02),  # a position of the encoder
        (hfspeech.training.whisper, "LENGTH_MULTIPLE_S", 0.02),
        (hfspeech.batching, "LABELS_MULTIPLE", 1),
        (hfspeech.modeling.whisper, "TOKENS_MULTIPLE", 1),
    ):
        _require(module, name)
        setattr(module, name, least)


def _require(module, name):
    if not hasattr(module, name):
        raise SystemExit(f"{module.__name__} has no {name} any more: bring bench/levers.py up to date.")


# Levers without a setting: name → what replaces it inside the library, before the recipe starts.
PATCHES = {"allocator": _allocator, "few_shapes": _few_shapes, "target_tokens": _target_tokens}
