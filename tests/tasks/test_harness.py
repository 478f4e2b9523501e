"""Tasks of lm-evaluation-harness: equal to the harness itself on files in its formats, and to transformers by hand.

The harness (0.4.13) runs with its own definitions of the tasks, of which only the place of the data is another. It may
be installed in another environment than this one: GPT25_LM_EVAL_PYTHON names the Python that has it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.inference import EvaluateConfig, ExportConfig
from pipeline.config.tasks import TaskSettings
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job, hellaswag
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.tasks import harness
from pipeline.tasks.catalog import read_tasks
from pipeline.tasks.harness import TASKS
from pipeline.tasks.results import TaskResult
from pipeline.tasks.scoring import score_tasks
from tests.support.fake_hub import running_hub
from tests.support.models import ALONE, train
from tests.support.task_files import harness_rows, write_harness

HARNESS_NAMES = {name: "lambada_openai" if name == "lambada" else name for name in TASKS}
COUNT = 24
PLACES = {
    "arc_challenge": "ARC-Challenge/test",
    "arc_easy": "ARC-Easy/test",
    "boolq": "boolq/validation",
    "copa": "copa/validation",
    "hellaswag": "default/validation",
    "lambada": "default/test",
    "openbookqa": "main/test",
    "piqa": "plain_text/validation",
    "winogrande": "winogrande_xl/validation",
}
"""Configuration and split of each task in its data set, as the harness names them."""


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    export(ExportConfig(checkpoint=str(train(tiny_data, run / "run")), output=str(run / "export")))
    return run / "export"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harness(tmp_path_factory.mktemp("files") / "tasks", list(TASKS), COUNT)


@pytest.fixture(scope="module")
def ours(folder: Path) -> resolve.Pretrained:
    return resolve.open_model(folder, torch.device("cpu"))


def scores(ours: resolve.Pretrained, **settings: Any) -> dict[str, TaskResult]:
    return score_tasks(ours.model, ours.tokenizer, read_tasks(TaskSettings(**settings)), ALONE, tokens_per_batch=2000)


# ---- by hand ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_scores(folder: Path, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Sum of log p of each continuation behind its context, and whether it is the likeliest, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for context, continuation in pairs:
        ids = tokenizer(context + continuation)["input_ids"]
        count = len(ids) - len(tokenizer(context.rstrip())["input_ids"])
        ids = ids[-129:]
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)[-count:]
        targets = torch.tensor(ids[-count:])
        is_likeliest = bool((logits.argmax(dim=-1) == targets).all())
        found.append((logits.gather(1, targets[:, None]).sum().item(), is_likeliest))
    return found


def test_multiple_choice_by_hand(folder: Path, ours: resolve.Pretrained, files: Path) -> None:
    rows, hits, hits_norm = harness_rows("arc_easy", COUNT), [], []
    for row in rows:
        texts = row["choices"]["text"]
        pairs = [(f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
        sums = [value for value, _ in answer_scores(folder, pairs)]
        right = row["choices"]["label"].index(row["answerKey"])
        hits.append(sums.index(max(sums)) == right)
        norms = [value / len(text) for value, text in zip(sums, texts, strict=True)]
        hits_norm.append(norms.index(max(norms)) == right)
    (result,) = scores(ours, tasks="arc_easy", task_files=str(files)).values()
    assert (result.acc, result.acc_norm) == (sum(hits) / COUNT, sum(hits_norm) / COUNT)
    assert result.centered is None


def test_exact_continuation_by_hand(folder: Path, ours: resolve.Pretrained, files: Path) -> None:
    texts = [row["text"] for row in harness_rows("lambada", COUNT)]
    pairs = [(text.rpartition(" ")[0], f" {text.rpartition(' ')[2]}") for text in texts]
    found = answer_scores(folder, pairs)
    (result,) = scores(ours, tasks="lambada", task_files=str(files)).values()
    assert result.acc == sum(right for _, right in found) / COUNT
    assert result.perplexity == pytest.approx(math.exp(-sum(value for value, _ in found) / COUNT), rel=1e-4)
    bits = [-value / math.log(2) / len(word.encode()) for (value, _), (_, word) in zip(found, pairs, strict=True)]
    assert result.bits_per_byte == pytest.approx(sum(bits) / COUNT, rel=1e-4)


def test_hellaswag_is_the_same_as_by_its_own_flag(folder: Path, ours: resolve.Pretrained, files: Path) -> None:
    encoded = hellaswag.encode_all(hellaswag.read_questions(files / "hellaswag.jsonl"), ours.tokenizer)
    expected = hellaswag.score(ours.model, encoded, ALONE, tokens_per_batch=2000)
    config = EvaluateConfig(checkpoint=str(folder), tasks="hellaswag", task_files=str(files), device="cpu")
    figures = evaluate_job.evaluate(config).figures()
    for name, value in expected.figures().items():
        assert figures[name] == value, name


def test_brackets_go_as_the_harness_takes_them_out_in_linear_time() -> None:
    """The pattern alone takes minutes on the last of them."""
    choose = random.Random(5)
    texts = ["".join(choose.choices("[]ab \n", k=choose.randrange(14))) for _ in range(5000)]
    for text in [*texts, "[x] y [", "[a\n]b]"]:
        values = {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": [text], "label": "0"}
        cleaned = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
        assert harness.hellaswag(values)[1] == [cleaned]
    long = {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["]" + "[" * 1_000_000 + "\n]"], "label": "0"}
    assert harness.hellaswag(long)[1] == long["endings"]


# ---- where the files are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TASKS))
def test_files_of_the_hub_and_parquet(name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each task the split that the harness asks, in one part or in two, from the place that the catalog has."""
    rows = harness_rows(name, COUNT)
    for part, own in (("whole", rows), ("0000", rows[:10]), ("0001", rows[10:])):
        pq.write_table(pa.Table.from_pylist(own), tmp_path / f"{part}.parquet")
    (tmp_path / "whole.parquet").rename(tmp_path / f"{name}.parquet")
    expected = read_tasks(TaskSettings(tasks=name, task_files=str(files)))
    assert read_tasks(TaskSettings(tasks=name, task_files=str(tmp_path))) == expected
    address, place = re.sub("(?<=hf://datasets/)[^@]+", "someone/texts", TASKS[name].address), PLACES[name]
    assert address.startswith("hf://datasets/someone/texts@~parquet/")
    on_hub = {f"{place}/{part}.parquet": (tmp_path / f"{part}.parquet").read_bytes() for part in ("0000", "0001")}
    others = {f"{place.partition('/')[0]}/train/0000.parquet", "other/validation/train.jsonl", "x.jsonl"}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with running_hub(on_hub | dict.fromkeys(others, b"no questions")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], address=address))
        assert read_tasks(TaskSettings(tasks=name)) == expected
        (tmp_path / "empty").mkdir()
        assert read_tasks(TaskSettings(tasks=name, task_files=str(tmp_path / "empty"))) == expected
        hub.push("b" * 40, {"x.jsonl": b""})
        with pytest.raises(UserError, match=rf"has no .*~parquet.*; give a folder with {name}.jsonl"):
            read_tasks(TaskSettings(tasks=name))


# ---- the harness itself ----------------------------------------------------------------------------------------------

RUN = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager

settings = json.load(open(sys.argv[1]))
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": settings["folder"], "dtype": "float32"}, device="cpu", batch_size=8,
    tasks=settings["tasks"], task_manager=TaskManager(include_path=settings["include"], include_defaults=False),
)
json.dump(found["results"], open(sys.argv[2], "w"))
"""
DEFINITIONS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
LOCAL = """include: {definition}
task: local_{name}
tag: null
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {file}, validation: {file}, test: {file}}}}}
"""


def definitions_of(python: str) -> Path:
    command = [python, "-c", "import lm_eval, accelerate; print(lm_eval.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip("needs lm-evaluation-harness: pip install 'lm_eval[hf]', or GPT25_LM_EVAL_PYTHON")
    return Path(done.stdout.strip()).parent / "tasks"


@pytest.mark.slow
def test_equals_lm_evaluation_harness_on_every_task(
    folder: Path, ours: resolve.Pretrained, files: Path, tmp_path: Path
) -> None:
    python = os.environ.get("GPT25_LM_EVAL_PYTHON", sys.executable)
    definitions = definitions_of(python)
    include = tmp_path / "tasks"
    include.mkdir()
    for name, definition in DEFINITIONS.items():
        file = files / f"{name}.jsonl"
        text = LOCAL.format(definition=definitions / definition, name=name, file=file)
        (include / f"{name}.yaml").write_text(text)
    tasks = [f"local_{name}" for name in DEFINITIONS]
    settings = {"folder": str(folder), "tasks": tasks, "include": str(include)}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [python, "-c", RUN, str(tmp_path / "settings.json"), str(tmp_path / "results.json")],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    theirs = json.loads((tmp_path / "results.json").read_text())
    found = scores(ours, tasks=",".join(DEFINITIONS), task_files=str(files))
    compared = []
    for name, result in found.items():
        values = theirs[f"local_{name}"]
        assert result.acc == pytest.approx(values["acc,none"], abs=1e-12), name
        assert result.acc_stderr == pytest.approx(values["acc_stderr,none"], abs=1e-12), name
        if "acc_norm,none" in values:
            assert result.acc_norm == pytest.approx(values["acc_norm,none"], abs=1e-12), name
            assert result.acc_norm_stderr == pytest.approx(values["acc_norm_stderr,none"], abs=1e-12), name
        if "perplexity,none" in values:
            assert result.perplexity == pytest.approx(values["perplexity,none"], rel=1e-4), name
        compared.append(name)
    assert compared == list(DEFINITIONS)
    assert 0 < sum(result.acc for result in found.values()) < len(found)
