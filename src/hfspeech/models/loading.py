"""What loading any model has in common: where it lies, what can go wrong, and on what it runs."""

import contextlib
import hashlib
import json
import shlex
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hfspeech.errors import UserError
from hfspeech.hub import license_in

ADAPTER_CONFIG = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# peft asks transformers for a property by its old name, and nobody who fine-tunes can do anything about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def resolve(name_or_path):
    """Returns an absolute path for a local folder, and a Hub id as it is.

    peft writes the base model's name into the adapter as it was given, and a relative path would stick there.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return str(path.resolve())
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(
            f"There is no model at {name_or_path}: give a folder that exists (from here, {Path.cwd()}) or a Hub id "
            "such as openai/whisper-small or microsoft/speecht5_tts."
        )
    return str(name_or_path)


@contextlib.contextmanager
def loading(source, revision="main", kind="Whisper"):
    """Turns every way in which loading a model fails into one sentence."""
    import safetensors
    from huggingface_hub import errors as hub

    transformers.utils.logging.disable_progress_bar()  # a bar for reading a local file; downloads have their own
    try:
        yield
    except UserError:
        raise
    except (safetensors.SafetensorError, EOFError, json.JSONDecodeError) as error:
        raise UserError(
            f"{source} is half-written or damaged ({_first_line(error)}): copy or download it again."
        ) from None
    except ImportError as error:
        raise UserError(f"{source} needs a package that is not there: {_first_line(error)}.") from None
    except (OSError, ValueError, RuntimeError, KeyError, hub.HfHubHTTPError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"{source} does not fit on the GPU: choose a smaller {kind}, or LoRA with --load_in_8bit true."
            ) from None
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        names = {type(cause).__name__ for cause in causes}
        is_about_weights = "safetensors" in str(error) or WEIGHTS_NAME in str(error)
        if is_about_weights and (pickled := _pickled_weights(source, revision)):
            name = {"Whisper": "WhisperForConditionalGeneration", "SpeechT5": "SpeechT5ForTextToSpeech"}.get(
                kind, kind
            )
            code = f"import sys, transformers as t; t.{name}.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"
            problem = _only_pickled(source, pickled, f'python -c "{code}" {shlex.quote(source)}')
        elif "trust_remote_code" in str(error):
            problem = (
                f"{source} is no {kind} that transformers knows, but brings a program of its own, and none is run"
            )
        elif "GatedRepoError" in names:
            problem = f"{source} is gated: accept its terms on its page, then `hf auth login`"
        elif "RevisionNotFoundError" in names:
            problem = f"{source} has no revision {revision}: check --model_revision"
        elif "RepositoryNotFoundError" in names:
            problem = f"The Hub has no model {source}, or it is private: check the name, or `hf auth login`"
        elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
            problem = f"Cannot reach the Hub for {source}, and no copy is in the cache: check the network"
        elif Path(source).exists():
            problem = (
                f"{source} is not a complete {kind} ({_first_line(error)}): give a folder that holds a whole model"
            )
        else:
            problem = f"Cannot load {source} ({_first_line(error)}): check the name and the access"
        raise UserError(problem + ".") from None


def _pickled_weights(source, revision):
    """Returns the name of the pickle that a model without safetensors has its weights in, or None."""
    with contextlib.suppress(OSError):  # no network
        if has_file(source, SAFE_WEIGHTS_NAME, revision):
            return None
        for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            if has_file(source, name, revision):
                return name
    files = sorted(Path(source).iterdir()) if Path(source).is_dir() else []
    return next((path.name for path in files if path.suffix in PICKLE_SUFFIXES), None)


def _only_pickled(source, pickled, command):
    if pickled not in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS_NAME):
        remedy = "convert it to safetensors with the program that wrote it"
    elif Path(source).is_dir():
        remedy = f"make a copy in safetensors, which runs nothing, with `{command}`"
    else:
        remedy = (
            f"choose a model or revision in safetensors, or type `hf download {source} --local-dir {Path(source).name}` "
            "and give that folder, to be told how to convert it"
        )
    why = "a pickle, which could run any program when it is read"
    return f"{source} has its weights only in {pickled}, {why}: {remedy}"


def merge_adapter(model, source, revision):
    """Returns a model with the LoRA adapter of a folder or Hub repository merged into its weights.

    Raises:
        UserError: the adapter is there only as a pickle.
    """
    from peft import PeftModel

    if not has_file(source, ADAPTER_SAFE_WEIGHTS_NAME, revision) and has_file(source, ADAPTER_WEIGHTS_NAME, revision):
        code = (
            "import sys, torch, safetensors.torch as s; "
            "s.save_file({k: v.clone() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
        )
        files = [shlex.quote(str(Path(source) / name)) for name in (ADAPTER_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME)]
        raise UserError(_only_pickled(source, ADAPTER_WEIGHTS_NAME, f'python -c "{code}" {" ".join(files)}') + ".")
    return PeftModel.from_pretrained(model, source, revision=revision).merge_and_unload()


def quiet_transformers():
    """Leaves stderr to what the user has to know."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def enough_memory(advice="halve --batch_size"):
    """Turns a GPU that is too small into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"The GPU ran out of memory: {advice}.") from None


def best_device():
    """Returns the `torch.device` to run inference on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_of(model):
    """Returns the transformers model inside one that peft may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_quantized(model):
    """Tells whether a model's weights are held in 8 or 4 bits."""
    return getattr(base_of(model), "quantization_method", None) is not None


def _first_line(error):
    return str(error).strip().split("\n")[0].rstrip(".")[:160] or type(error).__name__


def has_file(source, filename, revision):
    from transformers.utils import cached_file

    return cached_file(source, filename, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def hub_commit(source, revision, filename="config.json"):
    """Returns the commit that a revision stands for on the Hub, or None for a local folder."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(cached_file(source, filename, revision=revision), None)


def identify(name_or_path, revision="main", commit=None):
    """Returns what a record says of a model: its name, and what exactly that name stood for.

    Returns:
        dict: `name_or_path`, `revision`, `commit` (on the Hub; None for a local folder) and `fingerprint` (of a local
        folder: what `cat *.safetensors | sha256sum` says, after `sha256:`; None on the Hub, or without weights).
    """
    return {
        "name_or_path": name_or_path,
        "revision": revision,
        "commit": commit,
        "fingerprint": name_or_path and _weights_hash(Path(name_or_path).expanduser()),
    }


def _weights_hash(folder):
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("*.safetensors"))
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                total.update(block)
    return f"sha256:{total.hexdigest()}" if files else None


def read_any_config(source, revision):
    """Returns the configuration of a model, without what it says of attention: that may name a program on the Hub."""
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    config._attn_implementation = None
    return config


def license_of(source, revision):
    """Returns the license that a model's card states, in a folder or on the Hub, or None."""
    from transformers.utils import cached_file

    try:
        card = cached_file(source, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no way to the Hub
        return None
    return license_in(card) if card else None


def read_config(source, revision, model_type, kind, example):
    """Returns the configuration of a model, or says in one sentence that it is none, or of another kind.

    Args:
        source, revision: as for `loading`.
        model_type: as transformers names it.
        kind: the same for people.
        example: a Hub id of one.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise UserError(
            f"{source} holds no config.json, so it is not a model: give a folder that holds a whole model."
        )
    config = read_any_config(source, revision)
    if config.model_type != model_type:
        raise UserError(f"{source} is a {config.model_type} model, not a {kind}: give one such as {example}.")
    return config


def read_adapter_config(source, revision):
    """Returns the adapter_config.json of a folder or Hub repository as a dict, or None if it holds a whole model."""
    from transformers.utils import cached_file

    found = cached_file(source, ADAPTER_CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text()) if found else None


def quantization_config(model_args):
    if not (model_args.load_in_8bit or model_args.load_in_4bit):
        return None
    flag = "--load_in_8bit" if model_args.load_in_8bit else "--load_in_4bit"
    if not torch.cuda.is_available():
        raise UserError(f"{flag} needs a CUDA GPU, and this machine has none: leave it out.")
    if not transformers.utils.is_bitsandbytes_available():
        raise UserError(f"{flag} needs bitsandbytes: pip install bitsandbytes.")
    return transformers.BitsAndBytesConfig(
        load_in_8bit=model_args.load_in_8bit,
        load_in_4bit=model_args.load_in_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
