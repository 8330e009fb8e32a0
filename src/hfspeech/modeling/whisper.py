"""What is changed inside a Whisper to make it fast; its class, its weights and their names stay transformers' own."""

import inspect
import math
import types

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperEncoder,
    WhisperForConditionalGeneration,
    shift_tokens_right,
)

# Target tokens whose logits are held at once: 1,024 of them are 212 MB at Whisper's vocabulary of 51,865.
CHUNK_TOKENS = 1024
# They are filled up to a multiple of so many, as batches are: products of few shapes.
TOKENS_MULTIPLE = 64
# More tokens than speech of this length has in any script: a text that has more is a loop.
BOUND_TOKENS_PER_SECOND, BOUND_TOKENS = 25, 20
PROMPT_TOKENS = 4  # start, language, task, no timestamps
# What stands for the silence behind a short input: blocks of so many positions, because attention also looks at the next
# neighbours, and one block for each so many positions of the window; 44 of Whisper's 1,500 positions in all.
SILENT_BLOCK, WINDOW_PER_BLOCK = 4, 128
SILENT_FRAMES = 8  # at the end of a short input, that silence is taken from


class VariableLengthEncoder(WhisperEncoder):
    """Whisper's encoder for any even number of frames up to its window, at the cost of what it is given.

    transformers' own insists on the full window. What fills it is silence, whose positions differ by their embedding
    alone. So a few of them, evenly spread, stand for all, and each counts in every attention as often as there are
    positions that it stands for (`WindowAttention`). Without that weight of silence a model hears, and learns,
    something else than at the full window. There, this is transformers' own forward.

    forward takes `input_features`, (batch, num_mel_bins, frames) float, which end with 0.2 s of silence or more, or
    with the window, and returns a `BaseModelOutput` whose `last_hidden_state` is
    (batch, min(frames / 2 + `num_silent`, the window's), d_model).
    """

    def forward(self, input_features, attention_mask=None, **kwargs):
        positions, window = input_features.shape[-1] // 2, self.config.max_source_positions
        if positions == window:
            return super().forward(input_features, attention_mask, **kwargs)
        hidden = functional.gelu(self.conv1(input_features))
        hidden = functional.gelu(self.conv2(hidden)).permute(0, 2, 1)
        # The last position sees the edge, unlike the silence before it, and is the last one of the window, too.
        silent = silent_positions(positions - 1, window)
        hidden = torch.cat([hidden[:, :-1], hidden[:, -2:-1].expand(-1, len(silent), -1), hidden[:, -1:]], dim=1)
        places = torch.tensor([*range(positions - 1), *silent, window - 1], device=hidden.device)
        hidden = hidden + self.embed_positions(places)
        hidden = functional.dropout(hidden, p=self.dropout, training=self.training)
        for layer in self.layers:
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                hidden = layer(hidden, None, **kwargs)
        return BaseModelOutput(self.layer_norm(hidden))


class WindowAttention(WhisperAttention):
    """Attention to what a `VariableLengthEncoder` makes of a short input as if all of the window's silence were there.

    Keys fewer than the window's positions are those of a short input. The `num_silent` before the last one stand
    for those that are missing, too: a key counts w times if log w is added to its logits.
    """

    def forward(self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **kwargs):
        keys = hidden_states if key_value_states is None else key_value_states
        window = self.config.max_source_positions
        missing, silent = window - keys.shape[1], num_silent(window)
        if missing > 0:
            attention_mask = keys.new_zeros(1, 1, 1, keys.shape[1])
            attention_mask[..., -1 - silent : -1] = math.log(1 + missing / silent)
            attention_mask = attention_mask.expand(len(hidden_states), 1, hidden_states.shape[1], -1)
        return super().forward(hidden_states, key_value_states, past_key_values, attention_mask, **kwargs)


def num_silent(window):
    """Returns how many positions stand for the silence behind a short input, by the number of the window's."""
    return SILENT_BLOCK * max(1, window // WINDOW_PER_BLOCK)


def silent_positions(start, window):
    """Returns the positions that stand for those from `start` to the window's last but one: all, if they are few."""
    count, num_blocks = window - 1 - start, num_silent(window) // SILENT_BLOCK
    if count <= num_blocks * SILENT_BLOCK:
        return list(range(start, window - 1))
    firsts = [int(start + (block + 0.5) * count / num_blocks - SILENT_BLOCK / 2) for block in range(num_blocks)]
    return [first + i for first in firsts for i in range(SILENT_BLOCK)]


def make_fast(model):
    """Gives one `WhisperForConditionalGeneration` the encoder for any length, and a loss that skips the padding.

    Called with `labels`, the model then returns a `Seq2SeqLMOutput` without logits whose `loss` is the cross-entropy
    *summed* over the target tokens; `label_smoothing` is accepted beside. Without `labels` nothing is changed. Both
    hold for this instance only, so that what it saves is stock.

    Args:
        model: `WhisperForConditionalGeneration`.

    Returns:
        The model.
    """
    model.forward = types.MethodType(_forward, model)
    model.model.encoder.__class__ = VariableLengthEncoder
    for attention in [
        *(layer.self_attn for layer in model.model.encoder.layers),
        *(layer.encoder_attn for layer in model.model.decoder.layers),
    ]:
        attention.__class__ = WindowAttention
    return model


def _forward(self, *args, labels=None, label_smoothing=0.0, **kwargs):
    if labels is None:
        return WhisperForConditionalGeneration.forward(self, *args, **kwargs)
    if self.training and self.config.apply_spec_augment and "input_features" in kwargs:
        batch, _, frames = kwargs["input_features"].shape
        may_be_masked = torch.arange(frames, device=labels.device) < frames - SILENT_FRAMES
        kwargs["attention_mask"] = may_be_masked.expand(batch, -1).long()  # its use is to say where SpecAugment may mask
    read = decoder_input_ids(self.config, labels)
    hidden = self.model(*args, decoder_input_ids=read, use_cache=False, **kwargs).last_hidden_state
    return Seq2SeqLMOutput(loss=token_losses(self.proj_out, hidden, labels, label_smoothing).sum())


# generate looks at the names of the arguments.
_forward.__signature__ = inspect.signature(WhisperForConditionalGeneration.forward)


def decoder_input_ids(config, labels):
    """Returns what the decoder reads to write `labels`: (batch, tokens) int64, shifted right behind the start token."""
    return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)


def token_losses(head, hidden, labels, label_smoothing=0.0):
    """Returns the cross-entropy of every target token, without making logits of the padding.

    The logits of `CHUNK_TOKENS` tokens are held at once: of more tokens, each chunk's are made again for its gradient.

    Args:
        head: module from d_model to the vocabulary.
        hidden: (batch, tokens, d_model), the decoder's output.
        labels: (batch, tokens) int64, -100 where nothing is to be learnt.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Returns:
        float32 of shape (target tokens,), row by row.
    """

    def losses(hidden, labels):
        return functional.cross_entropy(
            head(hidden).float(), labels, reduction="none", label_smoothing=label_smoothing
        )

    is_target = labels != -100
    hidden, labels = hidden[is_target], labels[is_target]
    num_targets, missing = len(labels), -len(labels) % TOKENS_MULTIPLE
    hidden = functional.pad(hidden, (0, 0, 0, missing))
    labels = functional.pad(labels, (0, missing), value=-100)
    # DeepSpeed shards a module's weights on condition that all processes call it alike, however many tokens they have.
    if len(labels) <= CHUNK_TOKENS or hasattr(next(head.parameters()), "ds_id"):
        return losses(hidden, labels)[:num_targets]
    chunks = zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS))
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])[:num_targets]


def token_bounds(durations_s, config):
    """Returns how many tokens the texts of recordings may have, their prompts not counted.

    That is 25 a second and 20, and at most what the model can write.

    Args:
        durations_s: list of float.
        config: the model's `WhisperConfig`.

    Returns:
        list of int.
    """
    most = config.max_target_positions - PROMPT_TOKENS
    return [min(BOUND_TOKENS + math.ceil(BOUND_TOKENS_PER_SECOND * seconds), most) for seconds in durations_s]


def cut_at_bounds(tokens, bounds, eos_token_id):
    """Ends each generated text at its own bound, so that it does not depend on the length of its neighbours.

    Args:
        tokens: (batch, tokens) int64 without the prompt.
        bounds: list of int, one for each row.
        eos_token_id: int, which fills the rest of a row.

    Returns:
        (the tokens, a list of bool that says which rows have reached their bound).
    """
    bounds = torch.tensor(bounds, device=tokens.device)
    is_behind = torch.arange(tokens.shape[1], device=tokens.device) >= bounds[:, None]
    tokens = tokens.masked_fill(is_behind, eos_token_id)
    return tokens, (tokens != eos_token_id).sum(dim=1).ge(bounds).tolist()


class EncoderOutputs:
    """Remembers what a frozen encoder made of each row, in main memory, so that later passes need not run it.

    Args:
        num_bytes: memory to fill at most; rows that find no room are encoded each time.
    """

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes
        self.outputs = {}

    def keys(self):
        return frozenset(self.outputs)

    def keep(self, key, output):
        """Remembers one row's output, (positions, d_model), if there is room."""
        size = output.numel() * output.element_size()
        if key not in self.outputs and size <= self.num_bytes:
            self.num_bytes -= size
            self.outputs[key] = output.to("cpu", copy=True)

    def batch(self, keys, is_known, new, device):
        """Returns the outputs of a batch, (batch, positions, d_model), and remembers those that are new.

        Args:
            keys: list, one for each row.
            is_known: list of bool; the others are the rows of `new`.
            new: (rows, positions, d_model), or None if all rows are known.
            device: where the result is wanted.
        """
        fresh = iter(() if new is None else new.detach())
        rows = []
        for key, known in zip(keys, is_known):
            if known:
                rows.append(self.outputs[key].to(device, non_blocking=True))
            else:
                rows.append(next(fresh))
                self.keep(key, rows[-1])
        longest = max(map(len, rows))  # a recording that outlasts what is said of it has a longer output than planned
        return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row), -1)]) for row in rows])
