"""The fast model: an encoder for any length and a loss without padding, on weights and files that stay stock."""

import json

import pytest
import torch
from conftest import DIGITS, NANO
from peft import PeftModel
from torch.nn import functional
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_pt_utils import LabelSmoother

from hfspeech.arguments import LoraArguments, WhisperArguments
from hfspeech.audio import decode
from hfspeech.batching import WhisperCollator
from hfspeech.modeling import whisper as modeling
from hfspeech.modeling.whisper import (
    EncoderOutputs,
    cut_at_bounds,
    decoder_input_ids,
    make_fast,
    num_silent,
    silent_positions,
    token_bounds,
    token_losses,
)
from hfspeech.models.lora import add_lora
from hfspeech.models.whisper import load_whisper


def stock():
    return WhisperForConditionalGeneration.from_pretrained(NANO).eval()


def load(**settings):
    return load_whisper(WhisperArguments(model_name_or_path=str(NANO), language="english", **settings))[0].eval()


@pytest.fixture(scope="module")
def batch():
    """(features of three recordings at the full window, the same unpadded, their labels)."""
    processor = WhisperProcessor.from_pretrained(NANO)
    collator = WhisperCollator(processor)
    waveforms = [decode(path) for path in sorted((DIGITS / "test").glob("*.ogg"))[:3]]
    full = collator.features(waveforms)
    short = collator.features(waveforms, max(map(len, waveforms)) / 16000 + 0.2)
    labels = collator.labels(["four two", "nine", "six six zero one"], [1.0] * 3)
    assert short.shape[-1] < full.shape[-1] and (labels == -100).any()
    return full, short, labels


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# The encoder


def test_at_the_full_window_the_encoder_is_stock(batch):
    full, _, _ = batch
    with torch.no_grad():
        ours = make_fast(stock()).model.encoder(full).last_hidden_state
        theirs = stock().model.encoder(full).last_hidden_state
    assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def tuned_length(batch):
    """(the encoder's output of the short input, the stock model's of the full window)."""
    full, short, _ = batch
    with torch.no_grad():
        return make_fast(stock()).model.encoder(short).last_hidden_state, stock().model.encoder(full).last_hidden_state


def losses(model, states, labels):
    with torch.no_grad():
        logits = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=decoder_input_ids(model.config, labels))
    return functional.cross_entropy(logits.logits.transpose(1, 2), labels, reduction="none")


def test_a_short_input_is_heard_as_at_the_full_window(batch, tuned_length):
    """Its own positions, and what the decoder makes of all of them, are nearly those of the padded recording."""
    short, full = tuned_length
    own = batch[1].shape[-1] // 2 - 1
    assert short.shape[1] == own + 4 + 1 < full.shape[1]  # 4 positions stand for the rest of 125
    assert (short[:, :own] - full[:, :own]).norm() < 0.01 * full[:, :own].norm()
    found, wanted = losses(make_fast(stock()), short, batch[2]), losses(stock(), full, batch[2])
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    unweighted = losses(stock(), short, batch[2])
    assert (unweighted - wanted).abs().max() > 3 * (found - wanted).abs().max()


@pytest.mark.parametrize("missing", [1, 4])
def test_silence_that_is_not_longer_than_what_stands_for_it_is_stock(batch, missing):
    full = batch[0]
    with torch.no_grad():
        almost = make_fast(stock()).model.encoder(full[..., : full.shape[-1] - 2 * missing]).last_hidden_state
        torch.testing.assert_close(almost, stock().model.encoder(full).last_hidden_state)


@pytest.mark.parametrize("window", [125, 1500])
def test_what_stands_for_silence_is_spread_evenly_and_inside(window):
    for start in range(1, window):
        found = silent_positions(start, window)
        assert len(found) == min(num_silent(window), window - 1 - start)
        assert found == sorted(set(found)) and all(start <= position < window - 1 for position in found)
        if len(found) == num_silent(window):
            assert sum(found) / len(found) == pytest.approx((start + window - 2) / 2, abs=1)


def test_spec_augment_leaves_the_silence_alone_that_stands_for_the_rest(batch):
    masks = {"mask_time_prob": 0.9, "mask_time_length": 4, "mask_feature_prob": 0.0}
    model, heard = load(apply_spec_augment=True, **masks).train(), []
    model.model.encoder.register_forward_pre_hook(lambda m, inputs: heard.append(inputs[0]))
    model(input_features=batch[1].clone(), labels=batch[2])  # masked in place
    same = (heard[0] == batch[1]).all(dim=1)
    assert same[:, -8:].all() and not same[:, :-8].all(dim=1).any()


def test_the_transcripts_at_the_full_window_are_stock(batch):
    found = [
        model.generate(batch[0], language="en", task="transcribe", max_new_tokens=20)
        for model in (make_fast(stock()), stock())
    ]
    assert torch.equal(*found)


def test_what_is_saved_is_stock(batch, tmp_path):
    model = load()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"] and "auto_map" not in config
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(again.model.encoder).__name__ == "WhisperEncoder"
    with torch.no_grad():
        assert torch.equal(again.model.encoder(batch[0])[0], model.model.encoder(batch[0])[0])


def test_a_saved_adapter_names_the_stock_class(batch, tmp_path):
    torch.manual_seed(0)
    model = add_lora(load(), LoraArguments(lora_r=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "WhisperForConditionalGeneration"
    assert mapping["parent_library"] == "transformers.models.whisper.modeling_whisper"
    again = PeftModel.from_pretrained(stock(), tmp_path).eval()
    with torch.no_grad():
        ours = model.get_base_model().model.encoder(batch[0])[0]
        assert torch.equal(again.get_base_model().model.encoder(batch[0])[0], ours)
        assert not torch.allclose(stock().model.encoder(batch[0])[0], ours, atol=1e-2)


# The loss


def test_the_loss_and_its_gradients_are_stock_times_the_tokens(batch):
    full, _, labels = batch
    ours, theirs = make_fast(stock()), stock()
    loss = ours(input_features=full, labels=labels).loss
    loss.backward()
    expected = theirs(input_features=full, labels=labels).loss * labels.ne(-100).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_call_without_labels_is_stock(batch):
    read = torch.tensor([[296, 297, 299]] * 3)
    with torch.no_grad():
        found = [m(input_features=batch[0], decoder_input_ids=read).logits for m in (make_fast(stock()), stock())]
    assert torch.equal(*found)


@pytest.mark.parametrize("chunk", [1024, 5, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_are_cross_entropy_in_chunks_or_whole(monkeypatch, chunk, smoothing):
    monkeypatch.setattr(modeling, "CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(8, 30), torch.randint(30, (3, 7))
    labels[0, 4:], labels[2, 1:] = -100, -100
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    weights = torch.arange(1.0, labels.ne(-100).sum() + 1)  # so that each token's own gradient counts
    found = []
    for losses in (
        lambda: token_losses(head, hidden, labels, smoothing),
        lambda: functional.cross_entropy(
            head(hidden).transpose(1, 2), labels, reduction="none", label_smoothing=smoothing
        )[labels != -100],
    ):
        values = losses()
        (values * weights).sum().backward()
        found.append((values.detach(), hidden.grad.clone(), head.weight.grad.clone()))
        hidden.grad = None
        head.zero_grad()
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain)


def test_label_smoothing_is_the_trainer_s_own(batch):
    full, _, labels = batch
    with torch.no_grad():
        ours = make_fast(stock())(input_features=full, labels=labels, label_smoothing=0.2).loss
        logits = stock()(input_features=full, labels=labels).logits
    theirs = LabelSmoother(0.2)({"logits": logits}, labels) * labels.ne(-100).sum()
    torch.testing.assert_close(ours, theirs)


def test_the_head_sees_no_padding_and_only_one_chunk_at_a_time(batch, monkeypatch):
    monkeypatch.setattr(modeling, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(modeling, "TOKENS_MULTIPLE", 2)
    model, seen = make_fast(stock()), []
    model.proj_out.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        model(input_features=batch[1], labels=batch[2])
    targets = int(batch[2].ne(-100).sum())
    assert max(seen) <= 4 and sum(seen) == targets + targets % 2 and all(count % 2 == 0 for count in seen)


def test_a_batch_without_a_target_costs_nothing(batch):
    model = make_fast(stock())
    loss = model(input_features=batch[1], labels=torch.full((3, 2), -100)).loss
    loss.backward()
    assert loss.item() == 0


# What is frozen


def test_a_frozen_encoder_runs_without_a_graph_and_gets_no_gradient(batch):
    model, graph = load(freeze_encoder=True).train(), []
    model.model.encoder.register_forward_hook(lambda m, args, out: graph.append(out.last_hidden_state.requires_grad))
    model(input_features=batch[1], labels=batch[2]).loss.backward()
    assert graph == [False]
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got and not any(".encoder." in name for name in got)


def test_lora_keeps_no_gradient_of_frozen_weights(batch):
    model = add_lora(load(), LoraArguments(lora_r=2)).train()
    model(input_features=batch[1], labels=batch[2]).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got and all("lora_" in name for name in got)


# The bound on generated tokens


def test_the_bound_grows_with_the_speech_and_ends_at_what_the_model_can_write():
    config = stock().config
    bounds = token_bounds([0.0, 0.5, 1.0, 1.6, 100.0], config)
    assert bounds[:2] == [20, 33] and bounds == sorted(bounds)
    assert bounds[-1] == config.max_target_positions - 4


def test_each_text_ends_at_its_own_bound():
    end = 0
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, end], [end, end, end, end], [5, 5, 5, 5]])
    cut, is_cut = cut_at_bounds(tokens, [4, 4, 4, 2], end)
    assert is_cut == [True, False, False, True]
    assert cut.tolist() == [[5, 6, 7, 8], [5, 6, 7, end], [end, end, end, end], [5, 5, end, end]]
    assert cut_at_bounds(tokens, [5, 5, 5, 5], end)[1] == [False] * 4


# What a frozen encoder has said already


def test_encoder_outputs_come_back_in_their_rows_order():
    new = torch.randn(4, 6, 8)
    outputs = EncoderOutputs(num_bytes=10_000)
    first = outputs.batch(["a", "b"], [False, False], new[:2], "cpu")
    assert torch.equal(first, new[:2]) and outputs.keys() == {"a", "b"}
    mixed = outputs.batch(["c", "b", "d", "a"], [False, True, False, True], new[2:], "cpu")
    assert torch.equal(mixed, new[[2, 1, 3, 0]])
    known = outputs.batch(["d", "a"], [True, True], None, "cpu")
    assert torch.equal(known, new[[3, 0]])


def test_encoder_outputs_fill_no_more_than_they_may():
    new = torch.randn(5, 6, 8)
    size = 6 * 8 * 4
    outputs = EncoderOutputs(num_bytes=2 * size + size // 2)
    for _ in range(2):
        found = outputs.batch(list(range(5)), [False] * 5, new, "cpu")
        assert torch.equal(found, new)
    assert outputs.keys() == {0, 1}
    # A row's own copy, which keeps no whole batch alive.
    assert sum(output.untyped_storage().nbytes() for output in outputs.outputs.values()) == 2 * size


def test_remembered_outputs_carry_no_graph():
    outputs = EncoderOutputs(10_000)
    outputs.batch(["a"], [False], torch.randn(1, 2, 2, requires_grad=True) * 2, "cpu")
    assert not outputs.batch(["a"], [True], None, "cpu").requires_grad
