"""One output folder, one run: its record, its checkpoints, and files that are written whole or not at all."""

from hfspeech.runs.checkpoints import (
    DEEPSPEED_SHARDS,
    PART_FOLDER,
    PROGRESS_FILE,
    clear_half_written,
    finish_checkpoint,
    is_whole_checkpoint,
    last_checkpoint,
    layout,
)
from hfspeech.runs.files import (
    claim_folder,
    read_json,
    read_jsonl,
    replacing_files,
    require_space,
    write_json,
    write_jsonl,
    writing,
)
from hfspeech.runs.records import (
    CHECKOUT,
    RUN_FILE,
    command,
    commit_of,
    default_repo_name,
    environment,
    find_record,
    open_run,
    peak_rss_bytes,
    read_record,
    require_push_allowed,
    what_is_run,
)

PREDICTIONS_FILE = "predictions.jsonl"  # what was said of each row, before and after
SAMPLES_FOLDER = "samples"  # speech to listen to, before and after

__all__ = [
    "CHECKOUT", "DEEPSPEED_SHARDS", "PART_FOLDER", "PREDICTIONS_FILE", "PROGRESS_FILE", "RUN_FILE", "SAMPLES_FOLDER",
    "claim_folder", "clear_half_written", "command", "commit_of", "default_repo_name", "environment", "find_record",
    "finish_checkpoint", "is_whole_checkpoint", "last_checkpoint", "layout", "open_run", "peak_rss_bytes", "read_json",
    "read_jsonl", "read_record", "replacing_files", "require_push_allowed", "require_space", "what_is_run",
    "write_json", "write_jsonl", "writing",
]  # fmt: skip
