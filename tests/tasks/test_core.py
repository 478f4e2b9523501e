"""CORE's tasks: scores equal those of transformers, one sequence at a time, on prompts that the test writes itself.

The reference knows of CORE what its paper and nanochat say, and shares no code with the pipeline: its prompts come from
templates as the tasks' authors write them, its ids from transformers' tokenizer, its losses from transformers' model.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import zipfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.transformer import Transformer, init_weights
from pipeline.config.inference import EvaluateConfig, ExportConfig
from pipeline.config.tasks import TaskSettings
from pipeline.errors import UserError
from pipeline.evaluation import evaluate_job
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.storage.folders import open_folder
from pipeline.tasks.catalog import read_tasks, task_names
from pipeline.tasks.results import TaskResult, core_mean
from pipeline.tasks.rows import EncodedRows, score_rows
from pipeline.tasks.scoring import score_tasks
from pipeline.tracking.mlflow_run import mlflow_client, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from tests.support.file_server import running_files
from tests.support.models import ALONE, train
from tests.support.s3_server import S3
from tests.support.task_files import BASELINES, harness_rows, write_bundle, write_harness, write_lines

CONTEXT = 128


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "folder"
    export(ExportConfig(checkpoint=str(checkpoint), output=str(output)))
    return output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "eval_bundle")


@pytest.fixture(scope="module")
def ours(folder: Path) -> resolve.Pretrained:
    return resolve.open_model(folder, torch.device("cpu"))


def scores(ours: resolve.Pretrained, tokens_per_batch: int = 2000, **settings: Any) -> dict[str, TaskResult]:
    tasks = read_tasks(TaskSettings(**settings))
    return score_tasks(ours.model, ours.tokenizer, tasks, ALONE, tokens_per_batch=tokens_per_batch)


# ---- the reference ---------------------------------------------------------------------------------------------------

TEMPLATES = {
    "choices": "{% for e in shown %}{{ e.query }}\nAnswer: {{ e.choices[e.gold] }}\n\n{% endfor %}"
    "{{ item.query }}\nAnswer: ",
    "words": "{% for e in shown %}{{ e.context|trim }} {{ e.continuation }}\n\n{% endfor %}{{ item.context|trim }} ",
}
NUM_SHOWN = {"choices": 2, "words": 1, "blanks": 0}


class Reference:
    """A model of transformers, asked for one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids("<|endoftext|>"), *self.tokenizer(text)["input_ids"]]

    @torch.no_grad()
    def log_probabilities(self, ids: list[int], start: int) -> tuple[list[float], bool]:
        """Log p of ids[start:], of which those before the last CONTEXT have been cut, and whether all are likeliest."""
        cut = max(0, len(ids) - CONTEXT)
        logits = self.model(torch.tensor([ids[cut:]])).logits[0].log_softmax(dim=-1)
        places = [place for place in range(start - cut, len(ids) - cut) if place > 0]
        found = [logits[place - 1, ids[cut + place]].item() for place in places]
        return found, all(int(logits[place - 1].argmax()) == ids[cut + place] for place in places)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def items_of(bundle: Path, label: str) -> list[dict[str, Any]]:
    lines = (bundle / "eval_data" / "some" / f"{label}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(items)
    return items


def prompt_of(label: str, items: list[dict[str, Any]], number: int) -> str:
    others = [other for other in range(len(items)) if other != number]
    shown = [items[other] for other in random.Random(1234 + number).sample(others, NUM_SHOWN[label])]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATES[label])
    return template.render(shown=shown, item=items[number])


def first_difference(rows: list[list[int]]) -> int:
    return next(place for place in range(min(map(len, rows))) if len({row[place] for row in rows}) > 1)


def expected(reference: Reference, bundle: Path, label: str) -> tuple[list[bool], list[float]]:
    """For each question whether it is answered right, and the bits per byte of its right answer."""
    items, hits, bits = items_of(bundle, label), [], []
    for number, item in enumerate(items):
        if label == "blanks":
            rows = [reference.ids(f"{option} {item['continuation']}") for option in item["context_options"]]
            same = first_difference([row[::-1] for row in rows])
            starts = [len(row) - same for row in rows]
        else:
            prompt = prompt_of(label, items, number)
            answers = item["choices"] if label == "choices" else [item["continuation"]]
            rows = [reference.ids(prompt + answer) for answer in answers]
            before = len(reference.ids(prompt.rstrip()))
            starts = [first_difference(rows) if label == "choices" else before] * len(rows)
        found = [reference.log_probabilities(row, start) for row, start in zip(rows, starts, strict=True)]
        if label == "words":
            hits.append(found[0][1])
        else:
            losses = [-mean(values) for values, _ in found]
            hits.append(losses.index(min(losses)) == item["gold"])
        right = item.get("gold", 0)
        text = reference.text(rows[right][-len(found[right][0]) :])
        bits.append(-sum(found[right][0]) / math.log(2) / len(text.encode()))
    return hits, bits


@pytest.mark.parametrize("label", ["choices", "blanks", "words"])
def test_equals_transformers_one_sequence_at_a_time(
    folder: Path, ours: resolve.Pretrained, bundle: Path, label: str
) -> None:
    hits, bits = expected(Reference(folder), bundle, label)
    (result,) = scores(ours, tasks=f"core/{label}", task_files=str(bundle)).values()
    assert result.questions == len(hits) == 12 and result.num_fewshot == NUM_SHOWN[label]
    assert result.acc == pytest.approx(mean(hits))
    assert result.acc_stderr == pytest.approx(stdev(map(float, hits)) / math.sqrt(12))
    assert result.bits_per_byte == pytest.approx(mean(bits), rel=1e-4)  # float32 in other shapes of batches
    assert result.bits_per_byte_stderr == pytest.approx(stdev(bits) / math.sqrt(12), rel=1e-3)
    baseline = BASELINES[label] / 100
    assert result.centered == pytest.approx((mean(hits) - baseline) / (1 - baseline))


def test_an_answer_is_right_where_every_token_is_the_likeliest(
    ours: resolve.Pretrained, bundle: Path, tmp_path: Path
) -> None:
    """A model that repeats one letter, once it has seen it, is asked for one, for two, and for another word."""
    model, letter = Transformer(ours.config), ours.tokenizer.encode(" a")[0]
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01 if parameter.ndim > 1 else 1)
        model.embedding.weight[letter] = 1.0  # its own direction, and every other is close to zero
    shutil.copytree(bundle, tmp_path / "letters")
    rows = [{"context": "x a ", "continuation": word} for word in ("a", "a a", "a b", "the")]
    write_lines(tmp_path / "letters" / "eval_data" / "some" / "words.jsonl", rows)
    config = (tmp_path / "letters" / "core.yaml").read_text().replace("num_fewshot: [1]", "num_fewshot: [0]")
    (tmp_path / "letters" / "core.yaml").write_text(config)
    asked = resolve.Pretrained(model=model, tokenizer=ours.tokenizer)
    (result,) = scores(asked, tasks="core/words", task_files=str(tmp_path / "letters")).values()
    assert result.acc == 0.5


def test_core_is_the_mean_by_hand() -> None:
    base: dict[str, Any] = {"questions": 4, "num_fewshot": 0, "bits_per_byte": 1.0, "bits_per_byte_stderr": None}
    one = TaskResult(acc=0.5, acc_stderr=0.3, centered=(0.5 - 0.25) / 0.75, centered_stderr=0.4, **base)
    two = TaskResult(acc=0.4, acc_stderr=0.3, centered=(0.4 - 0.5) / 0.5, centered_stderr=0.6, **base)
    other = TaskResult(acc=1.0, acc_stderr=0.0, **base)
    found = core_mean({"core/one": one, "piqa": other, "core/two": two})
    assert found is not None
    assert found[0] == pytest.approx((1 / 3 - 0.2) / 2)
    assert found[1] == pytest.approx(math.sqrt(0.16 + 0.36) / 2)
    assert core_mean({"piqa": other}) is None


def test_all_of_core_in_one_evaluation(checkpoint: Path, folder: Path, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    config = EvaluateConfig(
        checkpoint=str(folder), tasks="core", task_files=str(bundle), output=str(output), device="cpu"
    )
    result = evaluate_job.evaluate(config)
    accuracies = {label: mean(expected(Reference(folder), bundle, label)[0]) for label in BASELINES}
    centered = [(accuracies[label] - base / 100) / (1 - base / 100) for label, base in BASELINES.items()]
    assert result.core == pytest.approx(sum(centered) / 3)
    assert list(result.tasks or {}) == ["core/choices", "core/blanks", "core/words"]
    written = json.loads(output.read_text())
    assert written["core"] == result.core and written["tasks"]["core/words"]["acc"] == accuracies["words"]
    assert result.figures()["core_choices_acc"] == accuracies["choices"]
    part = evaluate_job.evaluate(
        EvaluateConfig(checkpoint=str(folder), tasks="core/words", task_files=str(bundle), device="cpu")
    )
    assert part.core is None and part.tasks is not None  # a part of CORE is not CORE


def test_scores_reach_the_report_the_model_card_and_mlflow(tiny_data: Path, bundle: Path, tmp_path: Path) -> None:
    run_folder = open_folder(tmp_path / "run")
    path = train(tiny_data, tmp_path / "run")
    run = open_run(tracking_uri=None, experiment="gpt-2.5", folder=run_folder, working_folder=tmp_path, job="pretrain")
    tracker = MLflowTracker(run, run_folder)
    tracker.log_metrics({"train/loss": 3.0}, 1)
    tracker.finish("FINISHED")
    config = EvaluateConfig(
        checkpoint=str(path), tasks="core", task_files=str(bundle), device="cpu", tracking_uri=run.tracking_uri
    )
    result = evaluate_job.evaluate(config)
    assert result.core is not None and result.core_stderr is not None and result.tasks is not None
    row = f"{result.core:.4f} +- {result.core_stderr:.4f}, the mean of the centered accuracies"
    export(ExportConfig(checkpoint=str(path), output=str(tmp_path / "export"), tracking_uri=run.tracking_uri))
    for page in (run_folder.read("report.html").decode(), (tmp_path / "export" / "README.md").read_text()):
        assert row in page and "core/choices" in page and "on 12 questions, 2 examples each" in page
    tags = mlflow_client(run.tracking_uri).get_run(run.run_id).data.tags
    assert float(tags["eval/core"]) == result.core
    assert float(tags["eval/core_words_acc_stderr"]) == result.tasks["core/words"].acc_stderr


@pytest.mark.parametrize("tokens_per_batch", [1, 100_000])
def test_the_size_of_batches_changes_nothing(ours: resolve.Pretrained, bundle: Path, tokens_per_batch: int) -> None:
    settings: dict[str, Any] = {"tasks": "core", "task_files": str(bundle)}
    one, two = scores(ours, tokens_per_batch, **settings), scores(ours, **settings)
    for name, result in two.items():
        assert one[name].acc == result.acc
        assert one[name].bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-4)


def test_a_prompt_longer_than_the_context_loses_its_beginning(
    folder: Path, ours: resolve.Pretrained, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "long")
    file = tmp_path / "long" / "eval_data" / "some" / "choices.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [row | {"query": " ".join([row["query"]] * 8)} for row in rows])
    reference = Reference(folder)
    items = items_of(tmp_path / "long", "choices")
    assert all(len(reference.ids(prompt_of("choices", items, number))) > CONTEXT for number in range(len(items)))
    hits, bits = expected(reference, tmp_path / "long", "choices")
    (result,) = scores(ours, tasks="core/choices", task_files=str(tmp_path / "long")).values()
    assert result.acc == pytest.approx(mean(hits))
    assert result.bits_per_byte == pytest.approx(mean(bits), rel=1e-4)


# ---- where the files are ---------------------------------------------------------------------------------------------


def test_a_zip_file_and_a_web_server_hold_the_same(bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "eval_bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(bundle.rglob("*")):
            file.write(path, path.relative_to(bundle.parent))
    expected = read_tasks(TaskSettings(tasks="core", task_files=str(bundle)))
    assert read_tasks(TaskSettings(tasks="core", task_files=str(archive))) == expected
    served = {f"all/{path.relative_to(bundle)}": path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with running_files(served | {"core.zip": archive.read_bytes()}) as server:
        for address in (f"{server.url}/all", f"{server.url}/core.zip"):
            assert read_tasks(TaskSettings(tasks="core", task_files=address)) == expected


def test_a_bucket_holds_the_same(bundle: Path, tmp_path: Path, s3: S3) -> None:
    """As a folder and as a zip file; a file of the harness lies beside; what is not there is said in a sentence."""
    for path in sorted(bundle.rglob("*.*")):
        s3.put(f"evals/{path.relative_to(bundle)}", path.read_bytes())
    with zipfile.ZipFile(tmp_path / "core.zip", "w") as archive:
        for path in sorted(bundle.rglob("*.*")):
            archive.write(path, path.relative_to(bundle))
    s3.put("core.zip", (tmp_path / "core.zip").read_bytes())
    rows = harness_rows("piqa", 6)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "piqa.parquet")
    s3.put("evals/piqa.parquet", (tmp_path / "piqa.parquet").read_bytes())
    expected = read_tasks(TaskSettings(tasks="core", task_files=str(bundle)))
    assert read_tasks(TaskSettings(tasks="core", task_files=f"{s3.url}/core.zip")) == expected
    *found, piqa = read_tasks(TaskSettings(tasks="core,piqa", task_files=f"{s3.url}/evals"))
    assert tuple(found) == expected
    assert [question.contexts[0] for question in piqa.questions] == [
        f"Question: {row['goal']}\nAnswer:" for row in rows
    ]
    with pytest.raises(UserError, match=r"evals/nothing has no core.yaml; give the folder or the zip file"):
        read_tasks(TaskSettings(tasks="core", task_files=f"{s3.url}/evals/nothing"))
    with pytest.raises(UserError, match=r"there is no .*none.zip"):
        read_tasks(TaskSettings(tasks="core", task_files=f"{s3.url}/none.zip"))


def test_the_same_first_questions_have_the_same_examples(bundle: Path) -> None:
    (some,) = read_tasks(TaskSettings(tasks="core/choices", task_files=str(bundle), task_questions=5))
    (whole,) = read_tasks(TaskSettings(tasks="core/choices", task_files=str(bundle)))
    assert some.questions == whole.questions[:5] and some.fingerprint != whole.fingerprint


# ---- interruption ----------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_with_the_next_task(
    folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"checkpoint": str(folder), "tasks": "core", "task_files": str(bundle), "device": "cpu"}
    whole = evaluate_job.evaluate(EvaluateConfig(**settings))
    config = EvaluateConfig(**settings, output=str(tmp_path / "scores.json"))
    sizes: list[int] = []

    def counted(model: Any, rows: EncodedRows, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        return score_rows(model, rows, *arguments, **named)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if len(sizes) == 2:
            raise RuntimeError("the machine is gone")
        return counted(*arguments, **named)

    monkeypatch.setattr("pipeline.tasks.scoring.score_rows", interrupted)
    with pytest.raises(RuntimeError, match="gone"):
        evaluate_job.evaluate(config)
    kept = json.loads((tmp_path / "task_scores.json").read_text())
    assert list(kept["results"]) == ["core/choices", "core/blanks"] and sizes == [48, 24]
    assert not (tmp_path / "scores.json").exists()
    monkeypatch.setattr("pipeline.tasks.scoring.score_rows", counted)
    sizes.clear()
    result = evaluate_job.evaluate(config)
    assert sizes == [12] and result.tasks == whole.tasks and result.core == whole.core
    sizes.clear()
    fewer = evaluate_job.evaluate(EvaluateConfig(**settings, output=config.output, task_questions=6))
    assert sizes == [24, 12, 6] and fewer.tasks != whole.tasks  # other questions are another task


@pytest.mark.slow
def test_two_workers_find_the_same(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"checkpoint": str(checkpoint), "tasks": "core", "task_files": str(bundle)}
    alone = evaluate_job.evaluate(EvaluateConfig(**settings, device="cpu", val_tokens=200))
    run = checkpoint.parents[1]
    (run / "task_scores.json").unlink()
    together = evaluate_job.evaluate(EvaluateConfig(**settings, device="cpu", val_tokens=200, num_workers=2))
    assert together.figures().keys() == alone.figures().keys() and "core" in alone.figures()
    for name, value in alone.figures().items():
        assert together.figures()[name] == pytest.approx(value, rel=1e-5), name  # float32 sums in another order
    kept = json.loads((run / "task_scores.json").read_text())
    assert list(kept["results"]) == ["core/choices", "core/blanks", "core/words"]
    assert not list(run.glob("tasks-*.json"))


def test_another_model_begins_anew(tiny_data: Path, folder: Path, bundle: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": "core/blanks", "task_files": str(bundle), "device": "cpu"}
    output = str(tmp_path / "scores.json")
    export(ExportConfig(checkpoint=str(train(tiny_data, tmp_path / "run", seed=9)), output=str(tmp_path / "other")))
    one = evaluate_job.evaluate(EvaluateConfig(checkpoint=str(folder), output=output, **settings))
    two = evaluate_job.evaluate(EvaluateConfig(checkpoint=str(tmp_path / "other"), output=output, **settings))
    assert one.tasks != two.tasks
    (tmp_path / "task_scores.json").write_text("{")
    again = evaluate_job.evaluate(EvaluateConfig(checkpoint=str(tmp_path / "other"), output=output, **settings))
    assert again.tasks == two.tasks


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_names_that_are_unknown(bundle: Path) -> None:
    assert task_names("piqa, core,piqa") == ["piqa", "core"]
    with pytest.raises(UserError, match="there is no task picqa; give of core, core/NAME, arc_challenge, arc_easy"):
        task_names("piqa,picqa")
    with pytest.raises(UserError, match="tasks is ','"):
        task_names(",")
    with pytest.raises(UserError, match=r"has no task piqa; its core\.yaml names choices, blanks, words"):
        read_tasks(TaskSettings(tasks="core/piqa", task_files=str(bundle)))
    with pytest.raises(UserError, match="the files of core are not on the hub; give CORE's folder as --task_files"):
        read_tasks(TaskSettings(tasks="core"))
    with pytest.raises(UserError, match="task_files is x, but no tasks are given"):
        EvaluateConfig(task_files="x")
    with pytest.raises(UserError, match="give one of them"):
        EvaluateConfig(tasks="hellaswag", hellaswag="file.jsonl")


def test_files_of_core_that_are_missing_or_wrong(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*absent of tasks"):
        read_tasks(TaskSettings(tasks="core", task_files=str(tmp_path / "absent")))
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as a zip file"):
        read_tasks(TaskSettings(tasks="core", task_files=str(tmp_path / "no.zip")))
    with zipfile.ZipFile(tmp_path / "no.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("core.yaml", "a: b\n" * 100)
    archived = bytearray((tmp_path / "no.zip").read_bytes())
    archived[39:44] = b"\xff" * 5  # the beginning of what was compressed
    (tmp_path / "no.zip").write_bytes(archived)
    with pytest.raises(UserError, match=r"core\.yaml in .*no\.zip cannot be unpacked"):
        read_tasks(TaskSettings(tasks="core", task_files=str(tmp_path / "no.zip")))
    damaged = tmp_path / "damaged"
    for name, content, words in (
        ("core.yaml", None, r"has no core\.yaml"),
        ("core.yaml", "icl_tasks: 7", r"core\.yaml is no list of CORE's tasks \(icl_tasks"),
        ("core.yaml", "a: [", r"core\.yaml is no list"),
        ("core.yaml", "icl_tasks:\n- label: choices\n  icl_task_type: schema\n", "task choices has no dataset_uri"),
        ("core.yaml", "icl_tasks:\n- label: choices\n  icl_task_type: essay\n", "icl_task_type"),
        ("eval_meta_data.csv", None, r"has no eval_meta_data\.csv"),
        ("eval_meta_data.csv", "Eval Task,Guess\nchoices,1\n", "has no column 'Random baseline'"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nother,1\n", "no random baseline of choices"),
        ("eval_data/some/choices.jsonl", None, r"has no eval_data/some/choices\.jsonl"),
        ("eval_data/some/choices.jsonl", "", "has no question"),
        ("eval_data/some/choices.jsonl", "{", "line 1 is no JSON"),
        ("eval_data/some/choices.jsonl", "[1]", "line 1 is no JSON object"),
        (
            "eval_data/some/choices.jsonl",
            '{"query": "a", "choices": ["b"]}',
            "line 1 is no question of a multiple_choi",
        ),
        ("eval_data/some/choices.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}', "the answer is option 1, but"),
        ("eval_data/some/choices.jsonl", '{"query": "a", "choices": [" "], "gold": 0}', "an answer is empty"),
        ("eval_data/some/choices.jsonl", '{"query": "a", "choices": ["b"], "gold": 0}', "shows 2 examples before each"),
    ):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(bundle, damaged)
        if content is None:
            (damaged / name).unlink()
        else:
            (damaged / name).write_text(content)
        with pytest.raises(UserError, match=words):
            read_tasks(TaskSettings(tasks="core/choices", task_files=str(damaged)))


def test_records_of_the_harness_that_are_wrong(tmp_path: Path) -> None:
    folder = write_harness(tmp_path / "files", ["piqa"], 3)
    settings = TaskSettings(tasks="piqa", task_files=str(folder))
    assert len(read_tasks(settings)[0].questions) == 3
    good = harness_rows("piqa", 1)[0]
    without = {key: value for key, value in good.items() if key != "sol2"}
    for row, words in (
        (without, "line 1 is no question of piqa: it has no 'sol2'"),
        (good | {"label": 2}, "the answer is option 2, but there are 2"),
        (good | {"sol1": "a \ud83d"}, "line 1: half a character, which is no UTF-8, is in a text"),
        (good | {"label": "x"}, "line 1 is no question of piqa"),
        (good | {"sol1": None}, "a text is none"),
    ):
        write_lines(folder / "piqa.jsonl", [row])
        with pytest.raises(UserError, match=words):
            read_tasks(settings)
