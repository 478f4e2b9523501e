"""The README.md of an exported model, written from its run: data, recipe, curves, scores, where it came from.

Nothing in it is made up and nothing local gets out: what the run does not say is left out, of paths the last part is
shown, and no passwords.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from pipeline.checkpoints import reader as checkpoint_reader
from pipeline.checkpoints.metadata import CheckpointInfo
from pipeline.dataset.manifest import Manifest
from pipeline.errors import UserError
from pipeline.paths import resolve_output, without_password, working_folder
from pipeline.pretrained import huggingface
from pipeline.storage.folders import Folder, open_folder
from pipeline.tracking.mlflow_run import MLflowRun, find_run, read_history

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
CURVES_FILE = "curves.png"
_TABLE_ROWS = 12  # of the loss curve
_SHOWN_INPUTS = 5
_RECIPE = (
    ("train_steps", "steps"),
    ("tokens_per_step", "tokens per step"),
    ("lr", "highest learning rate"),
    ("min_lr_fraction", "last learning rate, share of the highest"),
    ("warmup_fraction", "warm-up, share of the steps"),
    ("beta1", "AdamW beta1"),
    ("beta2", "AdamW beta2"),
    ("eps", "AdamW eps"),
    ("weight_decay", "weight decay"),
    ("grad_clip", "gradient clipping"),
    ("precision", "precision"),
    ("seed", "seed"),
)

Points = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of the run behind a model; of a folder that others made, nothing."""

    info: CheckpointInfo | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version at training, and the project's commit where the checkpoint has it."""
    manifest: Manifest | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    """evaluation.json, where it is of this checkpoint."""
    curves: dict[str, Points] = field(default_factory=dict)
    """Metric -> (step, value), from MLflow."""
    mlflow_run: MLflowRun | None = None
    old_card: str | None = None
    """Of an exported folder that is exported again."""


def read_run(source: Path, *, tracking_uri: str | None) -> Run:
    """Everything that lies beside the checkpoint ``source``, in its run folder and in MLflow."""
    if huggingface.is_exported(source):
        card = source / CARD_FILE
        return Run(old_card=card.read_text(encoding="utf-8") if card.is_file() else None)
    info = checkpoint_reader.read_info(source)
    run_folder = source.parent.parent if source.parent.name == "checkpoints" else source
    mlflow_run = None
    if (run_folder / "mlflow_run.json").is_file():
        mlflow_run = find_run(
            tracking_uri=tracking_uri, folder=open_folder(run_folder), working_folder=working_folder()
        )
    curves = read_history(mlflow_run, ("train/loss", "val/loss")) if mlflow_run else {}
    return Run(
        info=info,
        versions=checkpoint_reader.read_versions(source),
        manifest=_read_manifest(resolve_output(info.data), info),
        scores=_read_scores(run_folder / "evaluation.json", source),
        curves={name: [point for point in points if point[0] <= info.step] for name, points in curves.items()},
        mlflow_run=mlflow_run,
    )


def write(folder: Path, run: Run, config: ModelConfig, *, name: str, dtype: str) -> None:
    """README.md, and curves.png where the run's curves are known."""
    if run.old_card is not None:
        (folder / CARD_FILE).write_text(run.old_card, encoding="utf-8")
        return
    if run.curves.get("train/loss"):
        _draw_curves(folder / CURVES_FILE, run.curves)
    sections = [
        _front_matter(run),
        _introduction(name, run, config, dtype),
        _usage(name),
        _network(config),
        _data(run),
        _recipe(run),
        _results(run),
        _origin(run),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _front_matter(run: Run) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt-2.5", "- llama"]
    datasets = sorted({name for name in (_hub_data_set(entry) for entry in _inputs(run)) if name})
    if datasets:
        lines += ["datasets:", *(f"- {name}" for name in datasets)]
    return "\n".join([*lines, "---"])


def _introduction(name: str, run: Run, config: ModelConfig, dtype: str) -> str:
    trained = f", trained on {run.info.tokens_seen:,} tokens" if run.info else ""
    return (
        f"# {name.rpartition('/')[2]}\n\nA language model of {config.num_parameters:,} parameters{trained}, written by "
        f"the GPT-2.5 pipeline. It continues text; it was not taught to answer or to follow instructions. The weights "
        f"are {dtype}, in Llama's layout."
    )


def _usage(name: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time, ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

With the pipeline itself: `python jobs/generate.py --checkpoint hf://OWNER/NAME --prompt "Once upon a time, "`."""


def _network(config: ModelConfig) -> str:
    rows = [
        ("layers", config.num_layers),
        ("heads", config.num_heads),
        ("d_model", config.d_model),
        ("d_ff", config.d_ff),
        ("context length", f"{config.context_length:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} ids, byte-level BPE"),
        ("rotary theta", f"{config.theta:,.0f}"),
        ("output matrix", "the embedding's" if config.tie_embeddings else "its own"),
    ]
    return f"## Network\n\nPre-RMSNorm, rotary positions, SwiGLU, no biases.\n\n{_table(('', ''), rows)}"


def _data(run: Run) -> str:
    if run.manifest is None:
        return ""
    manifest = run.manifest
    rows = [
        (split, f"{manifest.documents(split):,}", f"{manifest.tokens(split):,}", f"{manifest.text_bytes(split):,}")
        for split in ("train", "val")
    ]
    names = [_public_name(entry) for entry in _inputs(run)]
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_INPUTS])
    more = f" and {len(names) - _SHOWN_INPUTS:,} more" if len(names) > _SHOWN_INPUTS else ""
    table = _table(("split", "documents", "tokens", "bytes of text"), rows)
    return f"## Data\n\n{table}\n\nRead from {shown}{more}. The val split is chosen by a hash of each text."


def _recipe(run: Run) -> str:
    if run.info is None:
        return ""
    config = run.info.config
    rows = [(label, _show(config[key])) for key, label in _RECIPE if key in config]
    rows.append(("workers", str(run.info.world_size)))
    return f"## Recipe\n\n{_table(('setting', 'value'), rows)}"


def _results(run: Run) -> str:
    if run.info is None:
        return ""
    info, scores = run.info, run.scores
    rows = [("train loss, first step", f"{info.first_loss:.4f}"), ("train loss, last", f"{info.last_loss:.4f}")]
    labels = {
        "val_loss": "val loss, whole val set",
        "perplexity": "val perplexity",
        "bits_per_byte": "val bits per byte",
        "unigram_entropy": "unigram entropy of the val set",
        "hellaswag_acc_norm": "HellaSwag, acc_norm",
        "hellaswag_acc": "HellaSwag, acc",
        "hellaswag_questions": "HellaSwag, questions",
    }
    rows += [(label, _show(scores[key])) for key, label in labels.items() if scores.get(key) is not None]
    parts = [f"## Results\n\nLosses in nats per token.\n\n{_table(('', ''), rows)}"]
    if run.curves.get("train/loss"):
        parts.append(f"![loss over steps]({CURVES_FILE})")
        parts.append(_curve_table(run.curves))
    return "\n\n".join(parts)


def _curve_table(curves: dict[str, Points]) -> str:
    train, val = curves["train/loss"], dict(curves.get("val/loss", []))
    stride = max(1, math.ceil(len(train) / _TABLE_ROWS))
    steps = {step for step, _ in [*train[::stride], train[-1]]} | (set(val) & {step for step, _ in train[::stride]})
    losses = dict(train)
    rows = [(f"{step:,}", f"{losses[step]:.4f}", f"{val[step]:.4f}" if step in val else "") for step in sorted(steps)]
    return _table(("step", "train loss", "val loss"), rows)


def _origin(run: Run) -> str:
    if run.info is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "commit")
    rows = [
        ("step", f"{run.info.step:,}"),
        *([("commit of the pipeline", f"`{run.versions['commit']}`")] if run.versions.get("commit") else []),
        ("trained with", versions),
        ("data (sha256 of the manifest)", f"`{run.info.manifest_fingerprint}`"),
        ("tokenizer (sha256)", f"`{run.info.tokenizer_fingerprint}`"),
        *([("MLflow run", f"`{run.mlflow_run.run_id}`")] if run.mlflow_run else []),
    ]
    return f"## Origin\n\n{_table(('', ''), rows)}"


def _draw_curves(path: Path, curves: dict[str, Points]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    for name, points in curves.items():
        if points:
            axis.plot([step for step, _ in points], [value for _, value in points], label=name)
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.legend()
    figure.savefig(path, dpi=120)


def _read_manifest(data: Folder, info: CheckpointInfo) -> Manifest | None:
    """The manifest that the run was trained on, where it is still there and still the same."""
    try:
        manifest = Manifest.load(data)
    except UserError as error:
        logger.warning("the model card says nothing of the data: %s", error)
        return None
    return manifest if manifest.fingerprint == info.manifest_fingerprint else None


def _read_scores(path: Path, source: Path) -> dict[str, Any]:
    if not path.is_file():
        logger.info("no scores in the model card; jobs/evaluate.py before the export puts them there")
        return {}
    scores = json.loads(path.read_text(encoding="utf-8"))
    return dict(scores) if scores.get("checkpoint") == str(source) else {}


def _inputs(run: Run) -> Sequence[dict[str, Any]]:
    return run.manifest.inputs if run.manifest else ()


def _public_name(entry: dict[str, Any]) -> str:
    """An address as it is, without a password; of a local path the last part."""
    name = str(entry.get("name") or entry.get("path") or entry.get("source") or "unnamed")
    return without_password(name) if "://" in name else name.rstrip("/").rpartition("/")[2]


def _hub_data_set(entry: dict[str, Any]) -> str | None:
    name = str(entry.get("name", ""))
    if not name.startswith("hf://datasets/"):
        return None
    owner, title = name.removeprefix("hf://datasets/").split("/")[:2]
    return f"{owner}/{title.partition('@')[0]}"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 and value != round(value) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])
