"""What a run's record says of its model, under the names that the Hub knows."""

from hfspeech.publish.tables import SPEECH_MEASURES, shown_groups

# Board power of GPUs in watts, typed from memory and not from their makers' sheets; the largest of a name's variants.
# The first that fits counts.
GPU_WATTS = {
    "H200": 700, "H100": 700, "A100": 400, "V100": 300, "L40": 350, "A40": 300, "A10": 150, "L4": 72, "T4": 70,
    "4090": 450, "3090": 350,
}  # fmt: skip
OTHER_GPU_WATTS = 300
CORE_WATTS = 10  # an assumption, like those above

TASKS = {
    "automatic-speech-recognition": "Automatic Speech Recognition",
    "text-to-speech": "Text to Speech",
}


def last_name(path):
    """Returns what stands after the last slash of a path or an id."""
    return path.rstrip("/").rsplit("/", 1)[-1]


class Facts:
    """A record, with what follows from it.

    Args:
        record: the run's record, as `public_record` returns it.
        repo_id: the repository on the Hub, `owner/name`, or None.
        is_merged: whether an adapter has been merged into the weights.

    Attributes:
        settings, splits, datasets: parts of the record; `retention`: the scores on the old condition, or None.
        gpu: the name of the GPU that each process had, or None; where there are more machines than the record's, theirs
            are taken to be alike.
        speaks: SpeechT5, which speaks, and not Whisper, which writes; `family`: its name.
        is_lora, is_adapter: trained as an adapter; and still one.
        base: the model that it came from, as it was given, or None; `base_id`: its Hub id, or None for a folder.
        name, where: of the model; what to give `from_pretrained`.
        language, language_code: such as `English` and `en`; `Speech` and None where the record does not say.
    """

    def __init__(self, record, repo_id=None, is_merged=False):
        from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

        self.record, self.repo_id = record, repo_id
        self.settings, account = record["arguments"], record["rows"]["account"]
        self.splits, self.datasets = account["splits"], account["datasets"]
        gpus = record["environment"]["hardware"]["gpus"]
        self.gpu = gpus[0] if gpus and not self.settings.get("use_cpu") else None
        retention = record.get("retention") or {}
        self.retention = retention if retention.get("after") else None
        self.speaks = "vocoder" in self.settings
        self.family = "SpeechT5" if self.speaks else "Whisper"
        self.task = "text-to-speech" if self.speaks else "automatic-speech-recognition"
        self.is_lora = "lora_r" in self.settings
        self.is_adapter = self.is_lora and not is_merged
        model = record["model"]
        self.base = None if self.settings.get("config_name") else model["name_or_path"]
        self.base_id = self.base if model["commit"] else None
        self.commit = model["commit"]
        self.where = repo_id or self.settings["output_dir"]
        self.name = last_name(self.where)
        given = (self.settings["language"] or "").lower()
        code = TO_LANGUAGE_CODE.get(given, given.replace("_", "-").split("-")[0])
        self.language = LANGUAGES.get(code, given or "its").title() if code else "recorded"
        self.language_code = {"jw": "jv"}.get(code, code) or None  # Whisper's code of Javanese is its own

    @property
    def base_link(self):
        """The base model in Markdown."""
        if self.base_id:
            return f"[{self.base_id}](https://huggingface.co/{self.base_id})"
        return f"`{last_name(self.base)}`, a model that is not on the Hub,"

    @property
    def base_call(self):
        """What to give `from_pretrained` for the very base that an adapter was trained on."""
        return f'"{self.base}"' + (f', revision="{self.commit}"' if self.commit else "")

    @property
    def dataset_names(self):
        """The names of the datasets that it was trained and tested on."""
        return ", ".join(map(last_name, self.settings["dataset_name"]))

    def url(self, path):
        """Returns where a file of the repository is found."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, path) if self.repo_id else path

    def energy(self):
        """Returns an estimate of what training took, in kWh, and the power that it assumes in words."""
        made = self.record["environment"]
        if self.gpu:
            watts = next((w for name, w in GPU_WATTS.items() if name in self.gpu), OTHER_GPU_WATTS)
            count, what = made["processes"], self.gpu
        else:
            count, what, watts = made["hardware"]["cores"], "CPU core", CORE_WATTS
        assumed = f"{count} × {watts} W, an assumption for each {what}"
        return self.record["train"]["seconds"] / 3600 * count * watts / 1000, assumed

    def metadata(self):
        """Returns the `ModelCardData` that stands at the head of the card."""
        from huggingface_hub import ModelCardData

        relation = {"base_model_relation": "adapter" if self.is_adapter else "finetune"} if self.base_id else {}
        return ModelCardData(
            language=self.language_code,
            license=self.record["model"].get("license"),
            library_name="peft" if self.is_adapter else "transformers",
            pipeline_tag=self.task,
            base_model=self.base_id,
            datasets=list(dict.fromkeys(of["name"] for of in self.datasets if "commit" in of)) or None,
            metrics=["wer", "cer"],
            tags=["hfspeech", self.family.lower(), *["lora"] * self.is_lora],
            model_name=self.name,
            eval_results=self._eval_results(),
            **relation,
        )

    def _eval_results(self):
        settings = self.settings
        results = self._of_set(
            self._dataset_of(self.datasets[0], self.dataset_names, ", ".join(settings["test_split_name"])),
            self.record["after"],
        )
        if self.retention:  # the retention dataset was opened last
            name = f"{last_name(settings['retention_dataset_name'])} (old condition)"
            old = self._dataset_of(self.datasets[-1], name, settings["retention_test_split_name"])
            results += self._of_set(old, self.retention["after"], has_groups=False)
        return results

    @staticmethod
    def _dataset_of(dataset, name, split):
        return {
            "dataset_name": name,
            "dataset_type": dataset["name"] if "commit" in dataset else last_name(dataset["name"]),
            "dataset_config": dataset.get("config"),
            "dataset_split": split,
            "dataset_revision": dataset.get("commit"),
        }

    def _of_set(self, dataset, score, has_groups=True):
        """Returns the `EvalResult` of each figure of a score: overall, unpadded, and of each group."""
        from huggingface_hub import EvalResult

        found = self._figures(score)
        if score.get("unpadded"):
            found += [(f"{name}, unpadded", kind, value) for name, kind, value in self._figures(score["unpadded"])]
        for column, values in score["groups"].items() if has_groups else ():
            for value, of in shown_groups(values):
                found += [(f"{name}, {column}: {value}", kind, figure) for name, kind, figure in self._rates(of)]
        return [
            EvalResult(
                self.task,
                metric_type=kind,
                metric_value=value,
                metric_name=name,
                task_name=TASKS[self.task],
                **dataset,
            )
            for name, kind, value in found
        ]

    def _figures(self, score):
        """Returns (name, kind, value) of each figure of a score; rates in percent."""
        if self.speaks:
            found = [
                (f"{title},{unit}" if unit else title, name, score.get(name), factor)
                for title, name, unit, factor, _ in SPEECH_MEASURES
            ]
            found += [("stops where it should, %", "stop", score["stop"]["ok"], 100)]
        else:
            found = [
                ("WER, %", "wer", score["wer"], 100),
                ("CER, %", "cer", score["cer"], 100),
                ("WER as written, %", "wer", score["raw_wer"], 100),
                ("CER as written, %", "cer", score["raw_cer"], 100),
            ]
        return [(name, kind, round(factor * value, 4)) for name, kind, value, factor in found if value is not None]

    def _rates(self, score):
        rates = ((name.upper() + ", %", name, score[name]) for name in ("wer", "cer"))
        return [(name, kind, round(100 * value, 4)) for name, kind, value in rates if value is not None]
