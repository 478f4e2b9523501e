"""HellaSwag's accuracy equals that of transformers by hand and that of lm-evaluation-harness on the exported folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.transformer import Transformer, init_weights
from pipeline.config.inference import ExportConfig
from pipeline.errors import UserError
from pipeline.evaluation import hellaswag
from pipeline.evaluation.hellaswag import Question
from pipeline.pretrained import resolve
from pipeline.pretrained.export_job import export
from pipeline.tokenizer.bpe import Tokenizer
from tests.support.hellaswag_questions import write_questions
from tests.support.models import ALONE, train

NUM_QUESTIONS = 60


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    output = run / "export"
    export(ExportConfig(checkpoint=str(train(tiny_data, run / "run")), output=str(output)))
    return output


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "hellaswag_val.jsonl", NUM_QUESTIONS)


@pytest.fixture(scope="module")
def ours(folder: Path) -> resolve.Pretrained:
    return resolve.open_model(folder, torch.device("cpu"))


def our_result(ours: resolve.Pretrained, file: Path, tokens_per_batch: int = 2000) -> hellaswag.HellaSwagResult:
    questions = hellaswag.encode_all(hellaswag.read_questions(file), ours.tokenizer)
    return hellaswag.score(ours.model, questions, ALONE, tokens_per_batch=tokens_per_batch)


@torch.no_grad()
def test_equals_scoring_with_transformers_one_ending_at_a_time(
    folder: Path, questions_file: Path, ours: resolve.Pretrained
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    hits = hits_norm = 0
    for line in questions_file.read_text().splitlines():
        values = json.loads(line)
        context = values["activity_label"] + ": " + values["ctx_a"] + " " + values["ctx_b"].capitalize()
        texts = [by_hand(text) for text in (context, *values["endings"])]
        sums = []
        for ending in texts[1:]:
            start = len(tokenizer(texts[0].rstrip())["input_ids"])
            ids = torch.tensor([tokenizer(texts[0] + " " + ending)["input_ids"]])
            cut = max(0, ids.shape[1] - 129)
            logits = model(ids[:, cut:-1]).logits[0].log_softmax(dim=-1)
            targets = ids[0, cut + 1 :]
            sums.append(logits.gather(1, targets[:, None])[max(0, start - cut - 1) :].sum().item())
        hits += max(range(4), key=sums.__getitem__) == values["label"]
        norms = [value / len(ending) for value, ending in zip(sums, texts[1:], strict=True)]
        hits_norm += max(range(4), key=norms.__getitem__) == values["label"]
    result = our_result(ours, questions_file)
    assert (result.acc, result.acc_norm) == (hits / NUM_QUESTIONS, hits_norm / NUM_QUESTIONS)
    assert result.questions == NUM_QUESTIONS


def by_hand(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]]*\]", "", text).replace("  ", " ")


TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function {utils}.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"qk_norm": True}, {"tie_embeddings": False, "qk_norm": True}],
    ids=["tied", "untied", "qk_norm", "untied_qk_norm"],
)
def test_equals_lm_evaluation_harness(
    tiny_data: Path, questions_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "export"
    export(ExportConfig(checkpoint=str(train(tiny_data, tmp_path / "run", **changes)), output=str(folder)))
    ours = resolve.open_model(folder, torch.device("cpu"))
    harness = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
    pytest.importorskip("accelerate", reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
    utils = Path(harness.__file__).parent / "tasks" / "hellaswag" / "utils.py"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(utils.read_text())
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=questions_file, utils="utils"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    command += ["--tasks", "local_hellaswag", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "8", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["local_hellaswag"]
    found = our_result(ours, questions_file)
    assert (found.acc, found.acc_norm) == (theirs["acc,none"], theirs["acc_norm,none"])


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_the_size_of_batches_changes_nothing(
    ours: resolve.Pretrained, questions_file: Path, tokens_per_batch: int
) -> None:
    assert our_result(ours, questions_file, tokens_per_batch) == our_result(ours, questions_file)


def test_the_true_ending_wins_where_it_is_the_likeliest(ours: resolve.Pretrained) -> None:
    """A model that always repeats one letter, asked for it: accuracy is one; whatever the length of the others."""
    config = ours.config
    model = Transformer(config)
    init_weights(model, 0)
    letter = ours.tokenizer.encode(" a")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01 if parameter.ndim > 1 else 1)
        model.embedding.weight[letter] = 1.0  # its own direction, and every other is close to zero
    questions = [Question(context="x a", endings=("the", "a", "of", "zz"), answer=1) for _ in range(3)]
    encoded = hellaswag.encode_all(questions, ours.tokenizer)
    result = hellaswag.score(model, encoded, ALONE, tokens_per_batch=100)
    assert result.acc == 1.0


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        hellaswag.read_questions(tmp_path / "absent.jsonl")
    file = tmp_path / "q.jsonl"
    for text, words in (
        ("", "has no question"),
        ("{", "line 1 is no HellaSwag question"),
        ('{"label": 1}', "line 1 has no activity_label"),
        (json.dumps(question() | {"label": ""}), "with an answer"),
        (json.dumps(question() | {"label": 4}), "label is 4"),
        (json.dumps(question() | {"label": float("inf")}), "with an answer"),
        (json.dumps(question() | {"endings": 7}), "line 1 is no"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            hellaswag.read_questions(file)
    file.write_text("\n".join([json.dumps(question())] * 3))
    assert len(hellaswag.read_questions(file, limit=2)) == 2


def question() -> dict[str, Any]:
    return {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": "3"}


def test_ids_are_split_where_the_context_ends(ours: resolve.Pretrained) -> None:
    tokenizer: Tokenizer = ours.tokenizer
    first = Question(context="def f", endings=("x",), answer=0)
    second = Question(context="import os ", endings=("a b", "c"), answer=0)
    encoded = hellaswag.encode_all([first, second], tokenizer)
    for row, ending in ((1, "a b"), (2, "c")):
        ids, count = encoded.row(row)
        assert tokenizer.decode(ids) == f"import os  {ending}"
        assert tokenizer.decode(ids[-count:]).endswith(ending)
