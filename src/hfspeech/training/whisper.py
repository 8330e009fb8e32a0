"""`WhisperTrainer`: fine-tunes a Whisper, on the seconds that were spoken."""

import psutil
import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import has_length

from hfspeech.batching import (
    COMPILED_LABELS,
    COMPILED_LENGTHS,
    LENGTH_MULTIPLE_S,
    TRAIN_TAIL_S,
    LongestFirstSampler,
    StreamLength,
)
from hfspeech.errors import UserError
from hfspeech.modeling.whisper import EncoderOutputs, cut_at_bounds, decoder_input_ids, token_bounds, token_losses
from hfspeech.models.loading import base_of
from hfspeech.training import sharding
from hfspeech.training.trainer import SpeechTrainer

CACHED_LENGTHS = 32  # rows of a frozen encoder are rounded up to one of so many lengths, and meet only their like
CACHE_SHARE_OF_MEMORY = 0.5  # of the memory that is free when training begins


class WhisperTrainer(SpeechTrainer):
    """Fine-tunes a Whisper; see `SpeechTrainer`, to which it adds:

    - batches are padded no further than they need (`encoder_window`);
    - the loss makes logits of target tokens only; what a frozen encoder says of a row is remembered;
    - evaluation encodes once, for the loss and for `generate`.

    Args:
        model: `WhisperForConditionalGeneration`, or a `PeftModel` of one.
        args: `WhisperTrainingArguments`.
        train_dataset, eval_dataset: as `load_speech` returns them.
        data_collator: `WhisperCollator`.
        compute_metrics: `TranscriptScore`, or another callable from rows with `text` and `prediction`.
        processing_class: `WhisperProcessor`.
    """

    def __init__(self, model, args, train_dataset, eval_dataset, data_collator, compute_metrics, processing_class):
        if train_dataset is not None and not has_length(train_dataset) and args.encoder_window == "auto":
            window_s, share = processing_class.feature_extractor.chunk_length, args.full_window_share
            length = StreamLength(window_s, args.per_device_train_batch_size, share, args.seed)
            train_dataset.transforms.append(length)
        if args.encoder_window == "auto" and base_of(model).config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                "--encoder_window auto weighs silence, which of transformers' attention kernels only sdpa and eager can: "
                "choose one of these with --attn_implementation, or --encoder_window full."
            )
        self.encoder_outputs = self._plan_encoder_outputs(model, args, train_dataset)
        base_of(model).generation_config.encoder_window = args.encoder_window  # for whoever transcribes with it
        if args.torch_compile:
            data_collator.pad_labels_to_multiple_of = COMPILED_LABELS
        self.measured_window = "full"
        super().__init__(model, args, train_dataset, eval_dataset, data_collator, compute_metrics, processing_class)
        self.window_s = processing_class.feature_extractor.chunk_length

    def summed_loss(self, model, inputs):
        """Returns the cross-entropy summed over a batch's target tokens."""
        return model(
            **self._encoder_inputs(inputs), labels=inputs["labels"], label_smoothing=self.args.label_smoothing_factor
        ).loss

    def _encoder_inputs(self, batch):
        """Returns the features, or what the frozen encoder makes of them, or made of them in an earlier pass."""
        features, index = batch.get("input_features"), batch["index"]
        if self.encoder_outputs is None or not index:
            return {"input_features": features}
        with torch.no_grad(), self.accelerator.autocast():
            encoder = base_of(self.accelerator.unwrap_model(self.model)).model.encoder
            new = None if features is None else encoder(features).last_hidden_state
        if self.accelerator.mixed_precision == "bf16" and new is not None:
            new = new.bfloat16()  # the decoder's projections round it in any case
        keys = [(row, batch["padded_s"]) for row in index]
        outputs = self.encoder_outputs.batch(keys, batch["is_encoded"], new, self.args.device)
        return {"encoder_outputs": BaseModelOutput(outputs)}

    @staticmethod
    def _plan_encoder_outputs(model, args, train_dataset):
        """Returns an empty `EncoderOutputs`, or None where the encoder's output of a row may change."""
        config = base_of(model).config
        may_change = (
            any(p.requires_grad for p in base_of(model).model.encoder.parameters())
            or not has_length(train_dataset)  # of a stream, few rows come twice
            or train_dataset.transforms
            or config.apply_spec_augment
            or sharding.is_sharded(args)  # a layer is put together by all processes at once, or by none
            or max(config.dropout, config.attention_dropout, config.activation_dropout, config.encoder_layerdrop) > 0
        )
        if not args.cache_encoder_outputs or may_change:
            return None
        num_bytes = psutil.virtual_memory().available * CACHE_SHARE_OF_MEMORY / max(1, args.world_size)
        args.choices.append(
            f"the encoder runs once for each row: it is frozen (up to {num_bytes / 2**30:.1f} GB of memory)"
        )
        return EncoderOutputs(num_bytes)

    # Batches

    def train_batch_sampler(self, dataset):
        is_cached = self.encoder_outputs is not None
        num_lengths = CACHED_LENGTHS if is_cached else COMPILED_LENGTHS if self.args.torch_compile else None
        return super().train_batch_sampler(
            dataset,
            window_s=self.window_s,
            encoder_window=self.args.encoder_window,
            full_window_share=self.args.full_window_share,
            length_multiple_s=self.window_s / num_lengths if num_lengths else LENGTH_MULTIPLE_S,
            same_length=is_cached,
        )

    def eval_batch_sampler(self, dataset):
        # Before its first step a model may know nothing but the full window.
        is_tuned = self.is_in_train and self.state.global_step > 0
        encoder_window = self.args.encoder_window if is_tuned else self.measured_window
        return LongestFirstSampler(
            dataset.column("duration_s"), self.window_s, self.args.eval_batch_size, encoder_window
        )

    def keys_to_try(self, longest, median):
        median_s = self.train_dataset.column("duration_s")[median]
        return [(longest, self.window_s), (median, min(median_s + TRAIN_TAIL_S[1], self.window_s))]

    def begin_pass(self):
        if self.encoder_outputs is not None:
            self.train_dataset.skip_audio_of(self.encoder_outputs.keys())

    # Evaluation

    def measure_batch(self, model, batch):
        whisper, tokenizer = base_of(model), self.processing_class.tokenizer
        options = {"cache_implementation": self.args.generation_cache_implementation}
        if self.args.generation_num_beams:
            options["num_beams"] = self.args.generation_num_beams
        features = batch["input_features"].to(self.args.device, whisper.dtype)
        labels = batch["labels"].to(self.args.device)
        bounds = token_bounds(batch["duration_s"], whisper.config)
        if self.args.generation_max_length:
            bounds = [self.args.generation_max_length] * len(bounds)
        encoded = BaseModelOutput(whisper.model.encoder(features).last_hidden_state)
        read = decoder_input_ids(whisper.config, labels)
        hidden = whisper.model(encoder_outputs=encoded, decoder_input_ids=read, use_cache=False).last_hidden_state
        losses_of_tokens = token_losses(whisper.proj_out, hidden, labels)
        tokens = whisper.generate(encoder_outputs=encoded, max_new_tokens=max(bounds), **options)
        tokens, is_cut = cut_at_bounds(tokens, bounds, tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rows_of_tokens = labels.ne(-100).nonzero()[:, 0]
        losses = torch.zeros(len(labels), device=labels.device).index_add(0, rows_of_tokens, losses_of_tokens)
        return (
            [{"prediction": text.strip(), "is_unfinished": cut} for text, cut in zip(texts, is_cut)],
            [{"loss": loss} for loss in losses.tolist()],
            labels.ne(-100).sum(dim=1).tolist(),
        )

    def measure_further(self, when, split, dataset, score):
        """Scores a model trained with `encoder_window` auto unpadded, too, as `hfspeech transcribe` does it."""
        if when == "after" and self.args.encoder_window == "auto":
            self.measured_window = "auto"
            self.evaluate(dataset, metric_key_prefix=f"{when}_{split}_unpadded")
            self.measured_window = "full"
            score["unpadded"] = self.last_evaluation[0]
