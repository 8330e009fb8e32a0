"""Fast synthesis with a SpeechT5: what `generate_speech` of transformers makes, without its work for nothing."""

import dataclasses
import weakref

import torch
from torch import nn
from torch.nn import functional

from hfspeech.errors import UserError
from hfspeech.hardware import can_train_in_bf16

# Whether a row has stopped is looked at so often, in decoder steps: each look waits for the GPU, each step past a row's
# stop is wasted. A sentence takes some 200 steps.
STEPS_BETWEEN_LOOKS = 4
# The buffers of keys and values grow by so many steps.
STEPS_PER_BLOCK = 128
# One weight in so many is compared to tell whether a packed copy is still true: training, merging and loading change all.
WEIGHTS_PER_SAMPLE = 509
_packed = weakref.WeakKeyDictionary()  # linear layer → (what it was packed from, its copy)


@dataclasses.dataclass
class Generated:
    """The speech of one row.

    spectrogram: (frames, num_mel_bins) float32, log10 mel, on the model's device.
    is_unfinished: the bound on the length was reached before the model said stop.
    cross_attentions: (layers, heads, steps, tokens) on the model's device, over the row's own tokens, or None.
    """

    spectrogram: torch.Tensor
    is_unfinished: bool
    cross_attentions: torch.Tensor | None = None


@torch.no_grad()
def generate_spectrograms(
    model,
    input_ids,
    attention_mask,
    speaker_embeddings,
    seeds=None,
    threshold=0.5,
    minlenratio=0.0,
    maxlenratio=20.0,
    output_attentions=False,
    half_precision=True,
) -> list:
    """Synthesises the spectrograms of a batch of texts.

    The same computation as `SpeechT5ForTextToSpeech.generate_speech`, arranged so that a decoder step costs the same at
    the end of an utterance as at its beginning. Three things differ from it:

    - The decoder prenet drops units at inference, too, which is where the variety of the speech comes from. Each row
      draws its own masks (see `prenet_masks`); transformers lays one mask over all rows of a batch.
    - A row's shortest and longest speech follow from its own number of tokens, not from that of the longest row.
    - No row is longer than the decoder has positions (`max_speech_positions`), where transformers fails.

    With `seeds`, a row's speech thus depends on nothing but the model, the row and its seed, whatever else is in the
    batch (up to rounding).

    Args:
        model: `SpeechT5ForTextToSpeech` in eval mode, with any floating point type, adapters in it or not.
        input_ids: (rows, tokens) int64, padded on the right.
        attention_mask: (rows, tokens), 1 for a token and 0 for padding.
        speaker_embeddings: (rows, speaker_embedding_dim) float, or one row for all.
        seeds: an int for each row, or None for torch's global generator. A seed stands for the same masks on every
            device.
        threshold: a row stops at the first step whose stop probabilities, one for each of its `reduction_factor`
            frames, sum to this much.
        minlenratio, maxlenratio: shortest and longest speech, in frames for each token.
        output_attentions: also return the weights of the attention to the text.
        half_precision: on a CPU, read the text in bf16 where that is faster, and on an x86 one multiply by copies of the
            decoder's fp32 weights that are rounded to fp16. Everything else stays fp32, for every frame is made of those
            before it. Each such copy takes half its layer's memory for as long as the model lives, and is made anew when
            the layer has changed. bench/synthesize.py says what it gains.

    Returns:
        `Generated` for each row.

    Raises:
        UserError: a row has no tokens, or more than the model has positions for.
    """
    if model.training:
        raise ValueError("The model is in training mode: call model.eval() before it synthesises.")
    if seeds is not None and len(seeds) != len(input_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(input_ids)} rows: give one for each row.")
    config, device = model.config, model.device
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    num_tokens = attention_mask.sum(-1).tolist()
    _check(num_tokens, config.max_text_positions)
    shortest = [int(count * minlenratio / config.reduction_factor) for count in num_tokens]
    longest = [int(count * maxlenratio / config.reduction_factor) for count in num_tokens]
    # As in transformers, a row has at least one step, and a lower bound beyond the upper one wins.
    longest = [min(max(1, *bounds), config.max_speech_positions) for bounds in zip(shortest, longest)]
    generators = [None] * len(input_ids) if seeds is None else [torch.Generator().manual_seed(int(s)) for s in seeds]

    batch = _Batch(model, input_ids, attention_mask, speaker_embeddings, generators, output_attentions, half_precision)
    found, parts = [None] * len(input_ids), [[] for _ in input_ids]
    while batch.rows:
        num_steps = min(STEPS_BETWEEN_LOOKS, max(longest[row] for row in batch.rows) - batch.position)
        first = batch.position + 1  # steps count from 1
        frames, stops, attentions = batch.advance(num_steps)
        stops = (stops >= threshold).tolist()
        running = []
        for slot, row in enumerate(batch.rows):
            parts[row].append((frames[slot], attentions[slot] if output_attentions else None))
            last = min(batch.position, longest[row])
            stop = next(
                (step for step in range(max(first, shortest[row]), last + 1) if stops[slot][step - first]), None
            )
            if stop is None and batch.position < longest[row]:
                running.append(slot)
            else:
                found[row] = _finish(model, parts[row], stop or last, stop is None, attention_mask[row].bool())
                parts[row] = None
        batch.keep(running)
    return found


def prenet_masks(config, num_steps, generator=None):
    """Draws which units of the decoder prenet are kept, for so many steps of one row.

    transformers draws them with `torch.bernoulli(p=speech_decoder_prenet_dropout)`: the dropout is the share that is
    *kept*. Drawing twice gives the same as drawing as many steps at once.

    Args:
        config: `SpeechT5Config`.
        num_steps: decoder steps.
        generator: `torch.Generator` on the CPU, or None for torch's global one.

    Returns:
        bool tensor (num_steps, speech_decoder_prenet_layers, speech_decoder_prenet_units) on the CPU.
    """
    shape = num_steps, config.speech_decoder_prenet_layers, config.speech_decoder_prenet_units
    return torch.rand(shape, generator=generator) < config.speech_decoder_prenet_dropout


class _Batch:
    """The rows that are still being spoken.

    rows: list of their numbers, in the order of the slots in which they lie.
    position: decoder steps made.
    """

    def __init__(
        self, model, input_ids, attention_mask, speaker_embeddings, generators, output_attentions, half_precision
    ):
        self.config, self.output_attentions, self.half_precision = model.config, output_attentions, half_precision
        self.rows, self.generators, self.position = list(range(len(input_ids))), generators, 0
        prenet, postnet = model.speecht5.decoder.prenet, model.speech_decoder_postnet
        self.prenet_layers = [self._linear(layer) for layer in (*prenet.layers, prenet.final_layer)]
        self.positions = prenet.encode_positions.alpha * prenet.encode_positions.pe[0]
        self.add_speaker = self._linear(prenet.speaker_embeds_layer)
        self.layers = [_Layer(layer, self._linear) for layer in model.speecht5.decoder.wrapped_decoder.layers]
        self.feat_out, self.prob_out = self._linear(postnet.feat_out), postnet.prob_out

        # Keys and values: (layers, 2, rows, heads, positions, head_dim). All tokens are read at once, as in training:
        # what it costs is multiplying.
        is_open = half_precision and model.device.type == "cpu" and model.dtype == torch.float32
        in_bf16 = is_open and can_train_in_bf16(self.config.hidden_size)[0]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
            outputs = model.speecht5.encoder(input_values=input_ids, attention_mask=attention_mask, return_dict=True)
            encoded = outputs.last_hidden_state
            text = [torch.stack([layer.text_key(encoded), layer.text_value(encoded)]) for layer in self.layers]
        num_rows, num_tokens, size = encoded.shape
        self.heads, self.head_dim = self.config.decoder_attention_heads, size // self.config.decoder_attention_heads
        text = torch.stack(text).to(encoded.dtype).unflatten(-1, (self.heads, self.head_dim))
        self.text = text.transpose(3, 4).contiguous()
        self.past = encoded.new_empty(len(self.layers), 2, num_rows, self.heads, 0, self.head_dim)
        self.frame = encoded.new_zeros(num_rows, self.config.num_mel_bins)
        self.speakers = functional.normalize(speaker_embeddings.to(encoded)).expand(num_rows, -1)
        self.text_mask = None
        if not attention_mask.all():
            self.text_mask = encoded.new_zeros(num_rows, 1, 1, num_tokens)
            self.text_mask.masked_fill_(attention_mask[:, None, None] == 0, -torch.inf)

    def advance(self, num_steps):
        """Makes so many steps.

        Returns:
            frames before the postnet, (rows, steps * reduction_factor, num_mel_bins); the sums of the stop
            probabilities, (rows, steps); attention to the text, (rows, layers, heads, steps, tokens), or None.
        """
        masks = torch.stack([prenet_masks(self.config, num_steps, generator) for generator in self.generators])
        masks = masks.to(self.frame.device)
        frames, stops, attentions = [], [], []
        for step in range(num_steps):
            hidden, weights = self._decode(self._embed(masks[:, step]))
            frames.append(self.feat_out(hidden).view(len(hidden), -1, self.config.num_mel_bins))
            stops.append(torch.sigmoid(self.prob_out(hidden)).sum(-1))
            attentions.append(weights)
            self.frame = frames[-1][:, -1]
            self.position += 1
        attentions = torch.stack(attentions, 3) if self.output_attentions else None
        return torch.cat(frames, 1), torch.stack(stops, 1), attentions

    def keep(self, slots):
        """Lets only the rows in these slots go on, in the first slots."""
        if len(slots) == len(self.rows):
            return
        # The last ones move into the gaps: few keys and values are copied, none anew.
        gaps = [slot for slot in range(len(slots)) if slot not in slots]
        movers = [slot for slot in slots if slot >= len(slots)]
        order = list(range(len(slots)))
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
        self.past, self.text = (self._moved(states, gaps, movers, len(slots)) for states in (self.past, self.text))
        self.rows = [self.rows[slot] for slot in order]
        self.generators = [self.generators[slot] for slot in order]
        self.frame, self.speakers = self.frame[order], self.speakers[order]
        if self.text_mask is not None:
            self.text_mask = self.text_mask[order]

    def _embed(self, masks):
        """The decoder prenet for the newest frame only: returns (rows, hidden_size)."""
        hidden, dropout = self.frame, self.config.speech_decoder_prenet_dropout
        *layers, final_layer = self.prenet_layers
        for layer, mask in zip(layers, masks.unbind(1)):
            hidden = functional.relu(layer(hidden))
            hidden = torch.where(mask, hidden, 0) * 1 / (1 - dropout)  # as in transformers
        hidden = final_layer(hidden) + self.positions[self.position]
        return functional.relu(self.add_speaker(torch.cat([hidden, self.speakers], -1)))

    def _decode(self, hidden):
        """The decoder for one position: returns (rows, hidden_size) and (rows, layers, heads, tokens) or None."""
        if self.position == self.past.shape[4]:
            *before, _, size = self.past.shape
            grown = self.past.new_empty(*before, self.position + STEPS_PER_BLOCK, size)
            grown[..., : self.position, :] = self.past
            self.past = grown
        shape, weights = (len(hidden), self.heads, 1, self.head_dim), []
        for layer, past, text in zip(self.layers, self.past, self.text):
            past = past[:, :, :, : self.position + 1]
            past[0, :, :, -1:] = layer.key(hidden).view(shape)
            past[1, :, :, -1:] = layer.value(hidden).view(shape)
            heard = functional.scaled_dot_product_attention(layer.query(hidden).view(shape), *past)
            hidden = layer.past_norm(hidden + layer.past_out(heard.view(hidden.shape)))

            query = layer.text_query(hidden).view(shape)
            if self.output_attentions:
                scores = (query * self.head_dim**-0.5) @ text[0].transpose(2, 3)
                weights.append((scores if self.text_mask is None else scores + self.text_mask).softmax(-1))
                read = weights[-1] @ text[1]
            else:
                read = functional.scaled_dot_product_attention(query, *text, attn_mask=self.text_mask)
            hidden = layer.text_norm(hidden + layer.text_out(read.view(hidden.shape)))
            hidden = layer.final_norm(hidden + layer.contract(layer.activation(layer.expand(hidden))))
        return hidden, torch.stack(weights, 1)[:, :, :, 0] if weights else None

    def _linear(self, layer):
        return _half(layer) if self.half_precision else layer

    @staticmethod
    def _moved(states, gaps, movers, num_rows):
        states[:, :, gaps] = states[:, :, movers]
        return states[:, :, :num_rows]


def _finish(model, parts, steps, is_unfinished, own_tokens):
    """Cuts what was made past a row's end and lays the postnet over the rest."""
    frames, attentions = zip(*parts)
    frames = torch.cat(frames)[: steps * model.config.reduction_factor]
    spectrogram = model.speech_decoder_postnet.postnet(frames[None])[0].float()
    if attentions[0] is not None:
        attentions = torch.cat(attentions, 2)[:, :, :steps, own_tokens]
    return Generated(spectrogram, is_unfinished, attentions if torch.is_tensor(attentions) else None)


class _Layer:
    """What one decoder layer computes with, its linear layers as `linear` gives them."""

    def __init__(self, layer, linear):
        past, text, forward = layer.self_attn, layer.encoder_attn, layer.feed_forward
        self.query, self.key, self.value = linear(past.q_proj), linear(past.k_proj), linear(past.v_proj)
        self.past_out, self.past_norm = linear(past.out_proj), layer.self_attn_layer_norm
        self.text_query, self.text_key, self.text_value = linear(text.q_proj), text.k_proj, text.v_proj
        self.text_out, self.text_norm = linear(text.out_proj), layer.encoder_attn_layer_norm
        self.expand, self.contract = linear(forward.intermediate_dense), linear(forward.output_dense)
        self.activation, self.final_norm = forward.intermediate_act_fn, layer.final_layer_norm


def _half(layer):
    """Returns a function that multiplies by a copy of a linear layer's weights in fp16, or the layer where it cannot.

    A step multiplies few rows by many weights, so reading the weights is what it costs. An adapted or quantised layer
    is left alone: what it does stands in its own forward.
    """
    weight = layer.weight if type(layer) is nn.Linear and layer.bias is not None else None
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return layer
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return layer
    version = None if weight.is_inference() else weight._version
    source = weight.data_ptr(), version, weight.flatten()[::WEIGHTS_PER_SAMPLE].clone(), layer.bias.clone()
    known, packed = _packed.get(layer, (None, None))
    if known is None or known[:2] != source[:2] or not all(map(torch.equal, known[2:], source[2:])):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, layer.bias)
        _packed[layer] = source, packed
    return lambda inputs: torch.ops.quantized.linear_dynamic_fp16(inputs, packed)


def _check(num_tokens, max_text_positions):
    for row, count in enumerate(num_tokens):
        if count == 0:
            raise UserError(f"Row {row}: there is no token to speak; leave the empty text out.")
        if count > max_text_positions:
            raise UserError(
                f"Row {row}: the text has {count} tokens, but this model reads at most {max_text_positions}: split it."
            )
