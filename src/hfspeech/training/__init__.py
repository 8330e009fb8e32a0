"""The trainers: transformers' own Seq2SeqTrainer, fast, with the loss, the evaluation and the resuming put right."""
