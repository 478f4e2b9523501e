"""Export a checkpoint as a Hugging Face folder or a GGUF, and push it to the hub: what jobs/export.py calls.

The folder is complete or absent. Neither a GPU nor a cluster is needed, nor more memory than the largest tensor takes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from pipeline.checkpoints.metadata import TOKENIZER_FILE
from pipeline.config.inference import ExportConfig
from pipeline.conversations.templates import TEMPLATE_FILE
from pipeline.errors import UserError
from pipeline.gguf_export.modelfile import MODELFILE
from pipeline.paths import resolve_path, working_folder
from pipeline.pretrained import hub_models, huggingface, model_card, weights
from pipeline.pretrained.chat import known_chat, read_chat
from pipeline.pretrained.resolve import ModelSource, read_tokenizer, resolve_model
from pipeline.pretrained.tensor_files import INDEX_FILE, WEIGHTS_FILE
from pipeline.storage.folders import open_folder
from pipeline.tokenizer.bpe import Tokenizer
from pipeline.tracking.mlflow_run import find_run, mlflow_uri

logger = logging.getLogger(__name__)

_NOTE_FORMAT = 1
_WRITTEN = {  # by an export of a format, besides the files of _WEIGHTS
    "huggingface": {
        *(huggingface.CONFIG_FILE, huggingface.NOTE_FILE, huggingface.TOKENIZER_CONFIG_FILE),
        *(huggingface.GENERATION_CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE, WEIGHTS_FILE, INDEX_FILE),
        *(model_card.CARD_FILE, model_card.CURVES_FILE),
    },
    "gguf": {huggingface.NOTE_FILE, MODELFILE, model_card.CARD_FILE, model_card.CURVES_FILE},
}
_WEIGHTS = {
    "huggingface": re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors"),
    "gguf": re.compile(r"model-(f32|bf16|q8_0)\.gguf"),
}
_MOST_NAMED = 5
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and where it is."""

    source: str
    output: str
    parameters: int
    dtype: str
    files: dict[str, int]
    """Name of every file of weights -> its bytes."""
    hub: str | None = None
    """hf://OWNER/NAME@COMMIT if it was pushed."""
    mlflow_model: str | None = None
    """models:/... if it was logged."""

    @property
    def weight_bytes(self) -> int:
        return sum(self.files.values())


def export(config: ExportConfig) -> ExportReport:
    """Write the folder, then push it to the hub and log it in MLflow if the settings ask for it.

    Raises:
        UserError: no such checkpoint; an output that holds something else; a hub that refuses; a model that llama.cpp
            cannot run, or no package gguf, where a GGUF is asked for.
    """
    if config.push_to_hub:
        hub_models.check_name(config.push_to_hub)
    if config.format == "gguf":
        _require_gguf()
    source, output = resolve_model(config.checkpoint), resolve_path(config.output)
    _check_output(output, source.path, config.format)
    run = model_card.read_run(source)
    place = output.resolve()  # a link to the folder stays a link
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex}.incomplete")
    open_folder(place.parent).make()
    try:
        partial.mkdir()
        report = _write(config, source, output, partial, run)
        _replace(partial, place, config.format)
    except OSError as error:
        raise UserError(f"the folder {output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _publish(config, report, source, run)


def _write(config: ExportConfig, source: ModelSource, output: Path, partial: Path, run: model_card.Run) -> ExportReport:
    path, name = source.path, config.push_to_hub or output.name
    model_config, tokenizer = weights.read_model_config(path), read_tokenizer(path)
    if config.format == "gguf":
        files = _write_gguf(config, path, partial, model_config, tokenizer, name=name)
        run = replace(run, old_card=None)  # that one speaks of the folder's own files
    else:
        files = _write_huggingface(config, path, partial, model_config, tokenizer)
    huggingface.write_json(partial / huggingface.NOTE_FILE, _note(run, tokenizer, config))
    gguf_file = next(iter(files)) if config.format == "gguf" else None
    model_card.write(partial, run, model_config, name=name, dtype=config.number_format, gguf_file=gguf_file)
    return ExportReport(
        source=source.address,
        output=str(output),
        parameters=model_config.num_parameters,
        dtype=config.number_format,
        files=files,
    )


def _write_huggingface(
    config: ExportConfig, path: Path, partial: Path, model_config: ModelConfig, tokenizer: Tokenizer
) -> dict[str, int]:
    """Write what transformers reads; returns the files of weights and their bytes."""
    dtype, eot_id, chat = _DTYPES[config.number_format], tokenizer.eot_id, known_chat(path, tokenizer)
    tensors = weights.read_weights(path, model_config)
    files = huggingface.write_weights(partial, tensors, model_config, dtype=dtype, max_file_bytes=config.max_file_bytes)
    contents = {
        huggingface.CONFIG_FILE: huggingface.config_values(model_config, dtype=dtype, eot_id=eot_id),
        huggingface.TOKENIZER_CONFIG_FILE: huggingface.tokenizer_config(
            tokenizer.end_of_text, model_config.context_length, chats=chat is not None
        ),
        huggingface.GENERATION_CONFIG_FILE: huggingface.generation_config(
            eot_id, answer_end_id=chat.end_id if chat else None
        ),
    }
    for name, values in contents.items():
        huggingface.write_json(partial / name, values)
    if chat is not None:
        (partial / TEMPLATE_FILE).write_text(chat.template.jinja, encoding="utf-8")
    shutil.copyfile(path / TOKENIZER_FILE, partial / TOKENIZER_FILE)
    return files


def _write_gguf(
    config: ExportConfig, path: Path, partial: Path, model_config: ModelConfig, tokenizer: Tokenizer, *, name: str
) -> dict[str, int]:
    """Write the GGUF and its Modelfile; returns the former's name and bytes."""
    from pipeline.gguf_export.writer import write_gguf

    return write_gguf(
        partial,
        weights.read_weights(path, model_config),
        huggingface.exported_shapes(model_config),
        model_config,
        tokenizer,
        chat=read_chat(path, tokenizer),
        name=name,
        number_format=config.number_format,
    )


def _require_gguf() -> None:
    """Raise a UserError where the package that writes GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{sys.executable} has no package gguf, which --format gguf needs; run `{sys.executable} -m pip install "
            "--constraint constraints.txt gguf` in the project's folder"
        )


def _publish(config: ExportConfig, report: ExportReport, source: ModelSource, run: model_card.Run) -> ExportReport:
    if config.push_to_hub:
        step = f", step {run.info.step:,}" if run.info else ""
        address = hub_models.push(Path(report.output), config.push_to_hub, message=f"GPT-2.5{step}")
        report = replace(report, hub=address)
    if config.mlflow:
        from pipeline.pretrained.pyfunc import log_model

        uri = mlflow_uri(config.tracking_uri, working_folder())
        address = log_model(Path(report.output), tracking_uri=uri, run_id=_known_run_id(source, uri))
        report = replace(report, mlflow_model=address)
    return report


def _known_run_id(source: ModelSource, uri: str) -> str | None:
    """Id of the training run in the store ``uri``; None where the model belongs to no run that the store knows."""
    folder = source.run_folder
    run = find_run(tracking_uri=uri, folder=folder, working_folder=working_folder()) if folder else None
    return run.run_id if run else None


def _note(run: model_card.Run, tokenizer: Tokenizer, config: ExportConfig) -> dict[str, Any]:
    """Content of gpt25.json; without paths, as the folder may become public."""
    values: dict[str, Any] = {"format_version": _NOTE_FORMAT, "dtype": config.number_format}
    if config.format != "huggingface":
        values |= {"format": config.format}
    if info := run.info:
        values |= {"step": info.step, "tokens_seen": info.tokens_seen, "train_loss": info.last_loss}
        values |= {"manifest_fingerprint": info.manifest_fingerprint}
    return values | {"tokenizer_fingerprint": tokenizer.fingerprint}


def _check_output(output: Path, source: Path, file_format: str) -> None:
    """Raise a UserError unless ``output`` is absent, empty or holds nothing but an earlier export in the format."""
    if output == source:
        raise UserError(f"output {output} is the checkpoint itself; choose another --output")
    if not output.is_dir():
        if output.exists() or output.is_symlink():
            raise UserError(f"output {output} is there and is no export of an earlier run; choose another --output")
        return
    names = sorted(path.name for path in output.iterdir())
    if names and huggingface.NOTE_FILE not in names:
        raise UserError(f"output {output} is there and is no export of an earlier run; choose another --output")
    earlier = huggingface.read_note(output).get("format", "huggingface")
    if names and earlier != file_format:
        raise UserError(f"output {output} holds an export in the format {earlier}; choose another --output")
    foreign = [path.name for path in sorted(output.iterdir()) if not _is_written(path, file_format)]
    if foreign:
        more = f" and {len(foreign) - _MOST_NAMED} more" if len(foreign) > _MOST_NAMED else ""
        raise UserError(
            f"output {output} holds what no export wrote: {', '.join(foreign[:_MOST_NAMED])}{more}; move that to "
            "another folder, or choose another --output"
        )


def _is_written(path: Path, file_format: str) -> bool:
    """Whether an export in the format writes a file of this name."""
    is_known = path.name in _WRITTEN[file_format] or _WEIGHTS[file_format].fullmatch(path.name) is not None
    return is_known and path.is_file()


def _replace(partial: Path, output: Path, file_format: str) -> None:
    """Flush all files, then rename the folder; the files of an earlier export go when the new one is complete."""
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if not output.exists():
        partial.rename(output)
        return
    old = partial.with_suffix(".old")
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    for file in list(old.iterdir()):
        if _is_written(file, file_format):
            file.unlink()
        else:  # it came while the new export was written
            file.rename(output / file.name)
    old.rmdir()
