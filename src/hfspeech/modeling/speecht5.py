"""What is changed inside a SpeechT5 in training; its class, its weights and their names stay transformers' own."""

import dataclasses
import inspect
import types

import torch
from torch.nn import functional
from transformers import SpeechT5ForTextToSpeech
from transformers.modeling_outputs import Seq2SeqSpectrogramOutput
from transformers.models.speecht5.modeling_speecht5 import SpeechT5Attention, shift_spectrograms_right

STOP_WEIGHT = 5.0  # of the one frame in a hundred that ends an utterance; SpeechT5SpectrogramLoss has the same


@dataclasses.dataclass
class SpectrogramOutput(Seq2SeqSpectrogramOutput):
    """transformers' output, and the parts of its loss; a field, so that it outlives mixed precision's wrapping."""

    loss_parts: dict | None = None


class FusedSelfAttention(SpeechT5Attention):
    """SpeechT5's self-attention by PyTorch's fused kernels; transformers' own makes every weight by hand.

    It gives no attention weights: of these, only the cross-attention's are asked for in training.
    """

    def forward(
        self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, position_bias=None,
        output_attentions=False, **kwargs,
    ):  # fmt: skip
        if past_key_values is not None or not self.training:
            return super().forward(
                hidden_states, key_value_states, past_key_values, attention_mask, position_bias, output_attentions,
                **kwargs,
            )  # fmt: skip
        batch, length, _ = hidden_states.shape

        def heads(projection):
            return projection(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if position_bias is not None:  # (length, length, head_dim): a bias that depends on the query, too
            bias = torch.einsum("bhqd,qkd->bhqk", query * self.scaling, position_bias.to(query.dtype))
            attention_mask = bias if attention_mask is None else bias + attention_mask
        attended = functional.scaled_dot_product_attention(
            query, key, value,
            attn_mask=None if self.is_decoder else attention_mask,  # what is padded lies behind every frame that counts
            is_causal=self.is_decoder,
            dropout_p=self.dropout,
            scale=self.scaling,
        )  # fmt: skip
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, self.embed_dim)), None


def make_trainable(model):
    """Gives one `SpeechT5ForTextToSpeech` a loss that adds up over batches, and faster self-attention in training.

    Called with `labels`, the model then returns a `SpectrogramOutput` whose `loss` is *summed* over the frames of
    the batch, and whose `loss_parts` has its parts for each row (see `spectrogram_losses`). Without `labels` nothing is
    changed. All of it holds for this instance only, so that what it saves is stock.

    Args:
        model: `SpeechT5ForTextToSpeech`.

    Returns:
        The model.
    """
    model.forward = types.MethodType(_forward, model)
    stacks = model.speecht5.encoder.wrapped_encoder.layers, model.speecht5.decoder.wrapped_decoder.layers
    for attention in [layer.attention for layer in stacks[0]] + [layer.self_attn for layer in stacks[1]]:
        attention.__class__ = FusedSelfAttention
    return model


def _forward(self, input_ids=None, attention_mask=None, speaker_embeddings=None, labels=None, **kwargs):
    if labels is None:
        return SpeechT5ForTextToSpeech.forward(
            self, input_ids, attention_mask, speaker_embeddings=speaker_embeddings, **kwargs
        )
    is_frame = labels[..., 0] != -100
    learns = self.training and bool(is_frame.any())  # a batch without a good row has no statistics
    for layer in self.speech_decoder_postnet.layers:
        # Where its weights are frozen, as under LoRA, its statistics must be, too: the adapter does not hold them.
        layer.batch_norm.train(learns and layer.batch_norm.weight.requires_grad)
    read, _ = shift_spectrograms_right(labels, self.config.reduction_factor)
    outputs = self.speecht5(
        input_values=input_ids,
        attention_mask=attention_mask,
        decoder_input_values=read,
        speaker_embeddings=speaker_embeddings,
        use_cache=False,
        output_attentions=self.config.use_guided_attention_loss,
        return_dict=True,
    )
    before, after, stop_logits = _to_spectrogram(self.speech_decoder_postnet, outputs.last_hidden_state, is_frame)
    parts = spectrogram_losses(
        self.config, before, after, stop_logits, labels, outputs.cross_attentions, attention_mask
    )
    loss_parts = {name: part.detach() for name, part in parts.items()}
    return SpectrogramOutput(loss=sum(parts.values()).sum(), spectrogram=after, loss_parts=loss_parts)


def _to_spectrogram(postnet, hidden, is_frame):
    """Returns the postnet's outputs, its convolutions blind to what lies behind the end of a row, as in synthesis.

    transformers' own lets the padding leak into a row's last frames, so that they depend on the rows beside it.
    """
    before = postnet.feat_out(hidden).view(len(hidden), -1, postnet.config.num_mel_bins)
    is_frame = is_frame[:, None].to(before.dtype)
    change = before.transpose(1, 2) * is_frame
    for layer in postnet.layers:
        change = layer(change) * is_frame
    return before, before + change.transpose(1, 2), postnet.prob_out(hidden).view(len(hidden), -1)


# peft and accelerate look at the names of the arguments.
_forward.__signature__ = inspect.signature(SpeechT5ForTextToSpeech.forward)


def spectrogram_losses(config, before, after, stop_logits, labels, cross_attentions=None, attention_mask=None):
    """Returns SpeechT5's three losses, each summed over the frames of a row: a dict of `l1`, `stop` and `guided`.

    Divided by the number of frames they are those of `SpeechT5SpectrogramLoss`, which cannot be added up over batches,
    with one difference: its guided attention loss is a mean over (frame, token) pairs of the whole batch, ours the mean
    over the frames of what each frame's row has in the mean. They agree where the rows have as many tokens.

    Args:
        config: `SpeechT5Config`.
        before, after: (batch, frames, num_mel_bins), the spectrograms before and after the postnet.
        stop_logits: (batch, frames).
        labels: (batch, frames, num_mel_bins), -100 behind the end of a row.
        cross_attentions: layers of (batch, heads, frames / reduction_factor, tokens), if the config asks for guidance.
        attention_mask: (batch, tokens), 1 where there is a token.

    Returns:
        dict of name to (batch,) float32.

    Source of the guided attention: Tachibana, Uenoyama and Aihara 2018, "Efficiently trainable text-to-speech system
    based on deep convolutional networks with guided attention".
    """
    is_frame = labels[..., 0] != -100
    frames = is_frame[..., None]
    target = labels.masked_fill(~frames, 0)
    l1 = sum(
        (output.float() - target).abs().mean(dim=-1).masked_fill(~is_frame, 0).sum(dim=1) for output in (before, after)
    )
    lengths = is_frame.sum(dim=1)
    is_last = torch.arange(labels.shape[1], device=labels.device) == lengths[:, None] - 1
    stop = functional.binary_cross_entropy_with_logits(
        stop_logits.float(), is_last.float(), reduction="none", pos_weight=stop_logits.new_tensor(STOP_WEIGHT).float()
    )
    parts = {"l1": l1, "stop": stop.masked_fill(~is_frame, 0).sum(dim=1)}
    if config.use_guided_attention_loss:
        heads = config.guided_attention_loss_num_heads
        attention = torch.cat([layer[:, :heads] for layer in cross_attentions], dim=1).float().mean(dim=1)
        steps, tokens = lengths // config.reduction_factor, attention_mask.sum(dim=1)
        distance = off_diagonal(steps, tokens, attention.shape[1:], config.guided_attention_loss_sigma)
        pairs = steps * tokens
        of_row = (attention * distance).sum(dim=(1, 2)) / pairs.clamp(min=1)
        parts["guided"] = config.guided_attention_loss_scale * of_row * lengths
    return parts


def off_diagonal(output_lengths, input_lengths, shape, sigma):
    """Returns how far each pair of step and token lies off the diagonal, from 0 on it to 1; 0 where a row has ended.

    Args:
        output_lengths, input_lengths: (batch,) int.
        shape: (steps, tokens) of the result.
        sigma: width of the diagonal, as a share of the whole.

    Returns:
        (batch, steps, tokens) float32: 1 - exp(-(token / tokens - step / steps)² / (2 sigma²)).
    """
    device = output_lengths.device
    steps, tokens = torch.arange(shape[0], device=device), torch.arange(shape[1], device=device)
    # A row without a frame, in a batch without a good row, is all behind the end.
    wide, long = input_lengths.clamp(min=1), output_lengths.clamp(min=1)
    gap = tokens / wide[:, None, None] - (steps / long[:, None])[..., None]
    inside = (steps < output_lengths[:, None])[..., None] & (tokens < input_lengths[:, None])[:, None]
    return (1 - torch.exp(-(gap**2) / (2 * sigma**2))) * inside
