"""hfspeech: fine-tune speech models with the Hugging Face Trainer."""

__version__ = "0.1.0"
