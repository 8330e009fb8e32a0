"""Settings: which source wins, what is refused, and that every shipped arguments file says nothing in vain."""

import dataclasses
import json

import pytest
import yaml
from conftest import ROOT

from hfspeech.arguments import (
    DataArguments,
    LoraArguments,
    SpeechT5Arguments,
    SpeechT5TrainingArguments,
    WhisperArguments,
    WhisperTrainingArguments,
    default_num_workers,
    parse,
)
from hfspeech.errors import UserError

ALL = (DataArguments, WhisperArguments, LoraArguments, WhisperTrainingArguments)
SHIPPED = sorted([*ROOT.glob("recipes/*_*/*.yaml"), *ROOT.glob("assets/*/*.yaml")])
NEEDED = {"output_dir": "out", "model_name_or_path": "somewhere", "use_cpu": True}


@pytest.fixture
def parsed(tmp_path):
    """Parses settings as written in `args.yaml` beside a recipe, then flags; returns the dataclasses."""

    def parse_(settings=None, *flags):
        text = settings if isinstance(settings, str) else yaml.safe_dump({**NEEDED, **(settings or {})})
        (tmp_path / "args.yaml").write_text(text)
        return parse(tmp_path / "run.py", *ALL, argv=list(flags))

    return parse_


def refusal(parsed, *args):
    with pytest.raises(UserError) as error:
        parsed(*args)
    return str(error.value)


# Precedence


def test_flags_win_over_the_file_and_the_file_over_the_defaults(parsed):
    data, model, lora, train = parsed({"learning_rate": "3e-4", "lora_r": 4}, "--learning_rate", "7e-4")
    assert train.learning_rate == 7e-4
    assert lora.lora_r == 4
    assert lora.lora_alpha == LoraArguments().lora_alpha
    assert data.train_split_name == "train" and model.task == "transcribe"


def test_a_named_file_replaces_the_one_beside_the_recipe(parsed, tmp_path):
    other = tmp_path / "other.yml"
    other.write_text("output_dir: elsewhere\nmodel_name_or_path: somewhere\nuse_cpu: true\n")
    *_, train = parsed({"seed": 1}, str(other), "--max_steps=3")
    assert train.output_dir == "elsewhere" and train.max_steps == 3
    assert train.seed == 42  # the file beside the recipe was not read


def test_a_flag_replaces_a_whole_list_of_the_file(parsed):
    data, *_ = parsed({"speed_perturbation": [1, 2], "dataset_weights": [1, 2]}, "--speed_perturbation", "1.5")
    assert data.speed_perturbation == [1.5]
    assert data.dataset_weights == [1.0, 2.0]


def test_another_dataset_leaves_aside_what_the_file_says_of_its_own(parsed):
    file = {"dataset_name": "a", "train_split_name": "train.100", "text_column_name": "said", "max_steps": 3}
    data, *_, train = parsed(file, "--dataset_name", "c", "--text_column_name", "text")
    assert (data.dataset_name, data.train_split_name, data.text_column_name) == (["c"], "train", "text")
    assert train.max_steps == 3
    data, *_ = parsed(file, "--max_steps", "4")
    assert (data.dataset_name, data.train_split_name, data.text_column_name) == (["a"], "train.100", "said")


def test_dashes_in_flags_mean_underscores(parsed):
    assert parsed({}, "--learning-rate", "1e-3")[-1].learning_rate == 1e-3


# Values


@pytest.mark.parametrize("value", [False, "false", "no"])
def test_false_in_the_file_switches_off_what_is_on_by_default(parsed, value):
    *_, train = parsed({"eval_on_start": value, "predict_with_generate": value})
    assert train.eval_on_start is False and train.predict_with_generate is False


@pytest.mark.parametrize("flags", [["--no_eval_on_start"], ["--eval_on_start", "false"], ["--eval_on_start=False"]])
def test_flags_switch_off_what_is_on_by_default(parsed, flags):
    assert parsed({"eval_on_start": True}, *flags)[-1].eval_on_start is False


def test_a_bare_flag_switches_on(parsed):
    data, model, *_ = parsed({}, "--streaming", "--timestamps")
    assert data.streaming is True and model.timestamps is True


def test_nested_settings_arrive_as_they_were_written(parsed):
    *_, train = parsed(
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-6},
            "accelerator_config": {"even_batches": False, "split_batches": True},
            "report_to": ["none"],
        }
    )
    assert train.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert train.accelerator_config.even_batches is False and train.accelerator_config.split_batches is True
    assert train.report_to == []


def test_one_value_fills_a_list(parsed):
    data, _, lora, _ = parsed({"dataset_name": "one", "lora_target_modules": "q_proj", "speed_perturbation": 0.9})
    assert data.dataset_name == ["one"] and lora.lora_target_modules == ["q_proj"]
    assert data.speed_perturbation == [0.9]


def test_null_means_none_where_none_has_a_meaning(parsed):
    data, model, _, train = parsed({"language": None, "save_total_limit": None, "max_train_samples": None})
    assert model.language is None and data.max_train_samples is None
    assert train.save_total_limit is None  # keep every checkpoint, although the default keeps two


def test_null_is_refused_where_a_value_is_needed(parsed):
    message = refusal(parsed, {"lora_r": None})
    assert "lora_r" in message and "null" in message and "32" in message


def test_negative_numbers_are_values_and_not_flags(parsed):
    assert parsed({"max_steps": -1}, "--seed", "-3")[-1].seed == -3
    assert parsed({"label_smoothing_factor": -1e-3})[-1].label_smoothing_factor == -1e-3


# Strictness


def test_all_faults_are_listed_at_once(parsed):
    message = refusal(
        parsed, {"learning_rte": 1, "max_steps": "many", "task": "sing"},
        "--lora_rank", "8", "--num_beams", "--eval_steps", "often", "--no_learning_rate",
    )  # fmt: skip
    lines = message.splitlines()
    assert len(lines) == 7, message
    for name in ("learning_rte", "max_steps", "task", "--lora_rank", "--num_beams", "eval_steps", "no_learning_rate"):
        assert name in message
    assert "Did you mean learning_rate?" in message
    assert sum("args.yaml" in line for line in lines) == 3


def test_abbreviations_are_refused(parsed):
    assert "--learning_rat." in refusal(parsed, {}, "--learning_rat", "1e-3")


@pytest.mark.parametrize("flags", [["stray"], ["--max_steps", "5", "6"], ["--seed", "1", "-x"], ["-x", "1"]])
def test_a_stray_word_is_named(parsed, flags):
    message = refusal(parsed, {}, *flags)
    assert len(message.splitlines()) == 1
    assert next(f for f in flags if f in ("stray", "6", "-x")) in message
    assert "HfArgumentParser" not in message


@pytest.mark.parametrize(
    "text, said", [("- a\n- b\n", "name: value"), ("a: [1,\nb: 2\n", "not valid YAML"), ("just words", "name: value")]
)
def test_a_file_that_is_no_list_of_settings(parsed, tmp_path, text, said):
    message = refusal(parsed, text)
    assert str(tmp_path / "args.yaml") in message and said in message


def test_a_missing_file_is_named(parsed):
    assert "nowhere.yaml" in refusal(parsed, {}, "nowhere.yaml")


def test_a_model_must_be_named_once(parsed):
    assert "--model_name_or_path" in refusal(parsed, {"config_name": "a"})
    assert "exclude" in refusal(parsed, {"load_in_8bit": True, "load_in_4bit": True})


def test_an_output_folder_must_be_named(parsed):
    assert "--output_dir" in refusal(parsed, "model_name_or_path: x\nuse_cpu: true\n")


def test_a_contradiction_that_transformers_finds_is_one_sentence(parsed):
    message = refusal(parsed, {"save_strategy": "no"})
    assert "load_best_model_at_end" in message.replace("--", "") and "\n" not in message


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_lies_between_0_and_1(parsed, share):
    message = refusal(parsed, {"full_window_share": share})
    assert message.startswith("--full_window_share has to lie between 0 and 1") and "\n" not in message


@pytest.mark.parametrize("seconds", [0, -20, "many", "nan", "inf", "80 s"])
def test_seconds_of_a_batch_are_a_number_above_0_or_auto(parsed, seconds):
    message = refusal(parsed, {"max_batch_seconds": seconds})
    assert "--max_batch_seconds has to be a number above 0 or auto" in message and str(seconds) in message
    assert "\n" not in message


def test_seconds_of_a_batch_that_make_sense(parsed):
    assert [parsed({"max_batch_seconds": s})[-1].max_batch_seconds for s in (80, "37.5", "auto", None)] == [
        80.0, 37.5, "auto", None,
    ]  # fmt: skip
    assert parsed({}, "--max_batch_seconds", "12")[-1].max_batch_seconds == 12.0


@pytest.mark.parametrize("name", ["encoder_window", "generation_cache_implementation"])
def test_choices_are_named_where_another_is_given(parsed, name):
    message = refusal(parsed, {name: "dynamc"})
    assert name in message and ("auto" if name == "encoder_window" else "dynamic") in message


# What is recorded


def test_the_record_holds_every_setting_and_is_plain_json(parsed):
    instances = parsed({"lr_scheduler_kwargs": {"a": 1}})
    recorded = instances[0].run_arguments
    assert all(instance.run_arguments == recorded for instance in instances)
    assert json.loads(json.dumps(recorded)) == json.loads(json.dumps(recorded, sort_keys=True))
    for dtype in ALL:
        missing = {f.name for f in dataclasses.fields(dtype) if f.init} - recorded.keys() - {"hub_token"}
        assert not {name for name in missing if "token" not in name}, missing


def test_the_record_says_where_each_setting_comes_from(parsed, tmp_path):
    file = {"learning_rate": 0.1, "seed": 3, "save_total_limit": None}
    sources = parsed(file, "--seed", "4", "--no_eval_on_start", "--max-steps=5")[0].run_sources
    assert sources.keys() == parsed(file)[0].run_arguments.keys()
    of_file = {name for name, source in sources.items() if source == str(tmp_path / "args.yaml")}
    assert of_file == {"learning_rate", "save_total_limit", *NEEDED}
    assert [sources[name] for name in ("seed", "eval_on_start", "max_steps")] == ["command line"] * 3
    assert sources["dataloader_num_workers"] == sources["bf16"] == "hardware" and sources["warmup_steps"] == "default"
    assert parsed({"dataloader_num_workers": 0})[0].run_sources["dataloader_num_workers"] == str(tmp_path / "args.yaml")


def test_a_token_is_refused_and_never_repeated(parsed):
    message = refusal(parsed, {}, "--hub_token", "hf_secretsecret")
    assert "hf auth login" in message and "secret" not in message
    recorded = parsed({})[0].run_arguments
    assert "hub_token" not in recorded and "push_to_hub_token" not in recorded


def test_choices_made_for_the_user_give_their_reason(parsed):
    *_, train = parsed({})
    assert train.precision_is_open and not train.bf16  # on a CPU the trainer decides, for it depends on the model
    assert any(c.startswith(f"dataloader workers: {default_num_workers()}, ") for c in train.choices)
    *_, train = parsed({"fp16": False, "bf16": False, "dataloader_num_workers": 0})
    assert train.choices == ["fp32: given"] and not train.precision_is_open
    assert train.dataloader_num_workers == 0


# The shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_shipped_file_parses_and_repeats_no_default(path):
    of_speecht5 = {WhisperArguments: SpeechT5Arguments, WhisperTrainingArguments: SpeechT5TrainingArguments}
    types = [of_speecht5.get(t, t) for t in ALL] if "speecht5" in path.parent.name else list(ALL)
    types = types if "lora" in path.parent.name else [t for t in types if t is not LoraArguments]
    instances = parse(path.parent / "run.py", *types, argv=[str(path), "--use_cpu"])
    settings = yaml.safe_load(path.read_text())
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for dtype in types
        for f in dataclasses.fields(dtype)
    }
    for instance in instances:
        for name in settings.keys() & {f.name for f in dataclasses.fields(instance)}:
            value = getattr(instance, name)
            assert value != defaults[name], f"{path.name}: {name}: {value!r} is the default"
    assert path.read_text().startswith("#"), "an arguments file starts with the command that runs it"
    assert "run.py" in path.read_text()


def test_the_shipped_files_are_found():
    assert {p.parent.name for p in SHIPPED} >= {
        "whisper_lora", "whisper_full", "nano_whisper", "speecht5_lora", "speecht5_full", "nano_speecht5",
    }  # fmt: skip
