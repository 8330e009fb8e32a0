"""Fast synthesis makes what transformers' own makes, row by row, and the same again for the same seed."""

import pytest
import torch
from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

from hfspeech.errors import UserError
from hfspeech.modeling import speech_generation
from hfspeech.modeling.speech_generation import generate_spectrograms, prenet_masks

NUM_TOKENS = (9, 5, 7)


def tiny_speecht5(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "speech_decoder_prenet_units": 16,
        "speech_decoder_postnet_units": 16, "vocab_size": 40, "speaker_embedding_dim": 24,
    }  # fmt: skip
    model = SpeechT5ForTextToSpeech(SpeechT5Config(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that no frame differs from the next
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_speecht5()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    attention_mask = (torch.arange(max(NUM_TOKENS)) < torch.tensor(NUM_TOKENS)[:, None]).long()
    input_ids = torch.randint(4, 40, attention_mask.shape) * attention_mask + (1 - attention_mask)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "speaker_embeddings": torch.randn(len(NUM_TOKENS), 24),
    }


def row_of(batch, row):
    own = {name: values[row : row + 1] for name, values in batch.items()}
    return {name: values[:, : NUM_TOKENS[row]] if name != "speaker_embeddings" else values for name, values in own.items()}  # fmt: skip


def make_rows_stop(model, batch, seeds, num_steps=40):
    """Sets the stop bias so that each row stops of its own accord, at a step of its own."""
    layer, logits = model.speech_decoder_postnet.prob_out, []
    layer.bias.data.fill_(-100)
    for row, seed in enumerate(seeds):
        seen = []
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output + 100))  # noqa: B023
        bound = 2 * num_steps / NUM_TOKENS[row] + 0.01
        generate_spectrograms(model, **row_of(batch, row), seeds=[seed], maxlenratio=bound, half_precision=False)
        hook.remove()
        logits.append(torch.cat(seen)[:num_steps])
    for bias in torch.arange(-5, 5, 0.1):
        stops = (torch.stack(logits) + bias).sigmoid().sum(-1) >= 0.5
        if stops.any(1).all() and len(set(stops.int().argmax(1).tolist())) == len(seeds):
            layer.bias.data.fill_(bias)
            return
    raise AssertionError("no bias makes the rows stop at different steps")


def as_transformers(model, monkeypatch, seed, **inputs):
    """Runs `generate_speech` with the masks that a row with this seed draws."""
    masks = prenet_masks(model.config, model.config.max_speech_positions, torch.Generator().manual_seed(seed))
    layers = iter(range(10**6))

    def bernoulli(units, p):
        assert p == model.config.speech_decoder_prenet_dropout
        return masks[: len(units), next(layers) % masks.shape[1]].to(units)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "bernoulli", bernoulli)
        return model.generate_speech(**inputs)


def assert_same(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dropout", [0.5, 0.3])
@pytest.mark.parametrize("reduction_factor", [1, 2])
def test_a_row_is_what_transformers_makes(batch, monkeypatch, dropout, reduction_factor):
    model = tiny_speecht5(reduction_factor=reduction_factor, speech_decoder_prenet_dropout=dropout)
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    # More steps than a block of keys holds.
    row, options = row_of(batch, 0), {"maxlenratio": 130 * reduction_factor / NUM_TOKENS[0] + 0.01}
    expected, attentions = as_transformers(model, monkeypatch, 7, **row, **options, output_cross_attentions=True)
    [found] = generate_spectrograms(model, **row, **options, seeds=[7], output_attentions=True, half_precision=False)
    assert len(expected) == 130 * reduction_factor
    assert_same(found.spectrogram, expected)
    assert_same(found.cross_attentions.flatten(0, 1), attentions.flatten(0, 1))
    assert expected.std(0).max() > 0.1  # frames that do not differ would prove nothing


def test_a_batch_is_what_transformers_makes(batch, monkeypatch):
    model = tiny_speecht5()
    make_rows_stop(model, batch, [3] * 3)
    expected, lengths = as_transformers(model, monkeypatch, 3, **batch, return_output_lengths=True)
    found = generate_spectrograms(model, **batch, seeds=[3] * 3, half_precision=False)
    assert len(set(lengths)) == 3 and max(lengths) <= 80  # each row stops by itself
    for one, spectrogram, length in zip(found, expected, lengths, strict=True):
        assert not one.is_unfinished
        assert_same(one.spectrogram, spectrogram[:length])


def test_shortest_and_longest_speech_are_those_of_transformers(batch, monkeypatch):
    model = tiny_speecht5()
    row = row_of(batch, 0)
    for bias, options in ((100, {"minlenratio": 3.0}), (-100, {"maxlenratio": 3.0}), (-100, {"maxlenratio": 0.1})):
        model.speech_decoder_postnet.prob_out.bias.data.fill_(bias)
        expected = as_transformers(model, monkeypatch, 3, **row, **options)
        [found] = generate_spectrograms(model, **row, **options, seeds=[3], half_precision=False)
        assert_same(found.spectrogram, expected)
        assert found.is_unfinished == (bias < 0)


def test_a_row_does_not_depend_on_its_neighbours(batch):
    model = tiny_speecht5()
    make_rows_stop(model, batch, [3, 4, 5])
    options = {"output_attentions": True, "half_precision": False}
    together = generate_spectrograms(model, **batch, seeds=[3, 4, 5], **options)
    for row, seed in enumerate((3, 4, 5)):
        [alone] = generate_spectrograms(model, **row_of(batch, row), seeds=[seed], **options)
        assert_same(together[row].spectrogram, alone.spectrogram)
        assert_same(together[row].cross_attentions, alone.cross_attentions)
        layers, heads, steps, tokens = alone.cross_attentions.shape
        assert (layers, heads, 2 * steps, tokens) == (2, 2, len(alone.spectrogram), NUM_TOKENS[row])
        assert together[row].is_unfinished == alone.is_unfinished


def test_a_seed_repeats_and_another_differs(model, batch):
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    row = row_of(batch, 1)
    one, again, other = (generate_spectrograms(model, **row, seeds=[s])[0].spectrogram for s in (3, 3, 4))
    assert torch.equal(one, again) and (one - other).abs().max() > 0.01
    torch.manual_seed(3)
    unseeded, further = (generate_spectrograms(model, **row)[0].spectrogram for _ in range(2))
    assert (unseeded - further).abs().max() > 0.01
    torch.manual_seed(3)
    assert torch.equal(generate_spectrograms(model, **row)[0].spectrogram, unseeded)


def test_each_row_has_a_bound_of_its_own(model, batch):
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    found = generate_spectrograms(model, **batch, maxlenratio=4.0)
    assert [len(one.spectrogram) for one in found] == [2 * int(4 * count / 2) for count in NUM_TOKENS]
    assert all(one.is_unfinished for one in found)


def test_no_row_is_longer_than_the_decoder_has_positions(batch):
    model = tiny_speecht5(max_speech_positions=10)
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    assert [len(one.spectrogram) for one in generate_spectrograms(model, **batch)] == [20] * 3


@pytest.mark.parametrize("reads_in_bf16", [False, True])
def test_half_precision_is_nearly_the_same_and_follows_the_weights(batch, monkeypatch, reads_in_bf16):
    monkeypatch.setattr(speech_generation, "can_train_in_bf16", lambda width: (reads_in_bf16, "as the test has it"))
    model = tiny_speecht5()
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)

    def spectrograms(**options):
        found = generate_spectrograms(model, **batch, seeds=[3] * 3, maxlenratio=4.0, **options)
        return torch.cat([one.spectrogram for one in found])

    before = spectrograms()
    exact = spectrograms(half_precision=False)
    assert_same(before, exact, tolerance=2e-2)
    if reads_in_bf16 or torch.backends.quantized.engine in ("x86", "fbgemm"):
        assert not torch.equal(before, exact)
    for name, parameter in model.named_parameters():
        if "decoder" in name:
            parameter.data.mul_(1.1)  # as adapters are merged: the version of the tensor does not count it
    assert_same(spectrograms(), spectrograms(half_precision=False), tolerance=2e-2)
    assert (spectrograms() - before).abs().max() > 0.1


def test_adapters_are_heard(batch):
    peft = pytest.importorskip("peft")
    model = tiny_speecht5()
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    options = {"seeds": [3] * 3, "maxlenratio": 4.0, "half_precision": False}
    plain = generate_spectrograms(model, **batch, **options)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    found = generate_spectrograms(adapted.base_model.model, **batch, **options)
    merged = generate_spectrograms(adapted.merge_and_unload(), **batch, **options)
    for one, same, other in zip(found, merged, plain):
        assert_same(one.spectrogram, same.spectrogram)
        assert (one.spectrogram - other.spectrogram).abs().max() > 0.01


def test_bf16(batch):
    model = tiny_speecht5().bfloat16()
    model.speech_decoder_postnet.prob_out.bias.data.fill_(-100)
    for one, count in zip(generate_spectrograms(model, **batch, maxlenratio=4.0), NUM_TOKENS):
        assert one.spectrogram.dtype == torch.float32 and one.spectrogram.isfinite().all()
        assert len(one.spectrogram) == 2 * int(4 * count / 2)


def test_bad_input(model, batch):
    with pytest.raises(UserError, match="Row 1: there is no token"):
        generate_spectrograms(
            model, **batch | {"attention_mask": batch["attention_mask"] * torch.tensor([[1], [0], [1]])}
        )
    small = tiny_speecht5(max_text_positions=8)
    with pytest.raises(UserError, match="Row 0: the text has 9 tokens, .* at most 8"):
        generate_spectrograms(small, **batch)
    with pytest.raises(ValueError, match="eval"):
        generate_spectrograms(tiny_speecht5().train(), **batch)
