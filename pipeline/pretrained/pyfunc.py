"""The MLflow flavour of a model: log an exported folder, answer prompts (mlflow.pyfunc, mlflow models serve).

The exported folder, this project's code and pyfunc_model.py are logged. MLflow runs pyfunc_model.py to get a TextModel
("models from code"), so nothing is pickled or unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mlflow.pyfunc import PythonModel

from model.batching import Batch, Request
from model.decoding import Decoder
from pipeline.errors import UserError
from pipeline.generation.sampling import encode_prompt
from pipeline.pretrained.mlflow_registry import tracking_store
from pipeline.pretrained.resolve import open_model
from pipeline.tracking.mlflow_run import mlflow_errors

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_ARTIFACT = "model"
_MODEL_NAME = "text"
_MAX_TEXTS = 16
_REQUIREMENTS = ("torch", "numpy", "numba", "pyarrow", "safetensors", "pyyaml", "psutil", "mlflow")
PARAMETERS: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 0.9, "seed": 1337}
"""Parameters that a caller may set, and their defaults; top_k 0 means no limit."""


class TextModel(PythonModel):
    """Returns prompts with their continuations; the same prompt, parameters and seed give the same text."""

    def load_context(self, context: Any) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pretrained = open_model(Path(context.artifacts[_ARTIFACT]), device)
        self._tokenizer, self._config = pretrained.tokenizer, pretrained.config
        self._decoder = Decoder(pretrained.model)

    def predict(self, context, model_input, params=None) -> list[str]:  # type: ignore[no-untyped-def]  # see below
        """One text for each prompt.

        Args:
            model_input: a list of strings, or a table whose column ``prompt`` (or only column) has them.
            params: a dictionary, see PARAMETERS.

        There are no annotations, which MLflow would turn into a schema; the logged signature describes the input.

        Raises:
            UserError: no text, a prompt longer than the context.
        """
        settings = PARAMETERS | (params or {})
        prompts = _prompts(model_input)
        batch = Batch(self._decoder, max_texts=_MAX_TEXTS)
        for number, prompt in enumerate(prompts):
            batch.add(number, self._request(prompt, settings))
        new: list[list[int]] = [[] for _ in prompts]
        while len(batch):
            for step in batch.step():
                if step.token is not None:
                    new[int(str(step.key))].append(step.token)
        return [prompt + self._tokenizer.decode(tokens) for prompt, tokens in zip(prompts, new, strict=True)]

    def _request(self, prompt: str, settings: dict[str, Any]) -> Request:
        try:
            return Request(
                tokens=encode_prompt(self._tokenizer, prompt, self._config.context_length),
                max_new_tokens=int(settings["max_new_tokens"]),
                temperature=float(settings["temperature"]),
                top_k=int(settings["top_k"]) or None,
                top_p=float(settings["top_p"]),
                seed=int(settings["seed"]),
                stop_id=self._tokenizer.eot_id,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


def _prompts(model_input: Any) -> list[str]:
    if hasattr(model_input, "columns"):
        names = list(model_input.columns)
        values = list(model_input["prompt" if "prompt" in names else names[0]])
    else:
        values = [model_input] if isinstance(model_input, str) else list(model_input)
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"a prompt is {value!r}; give texts, in a column named prompt or as a list")
    return values


def log_model(folder: Path, *, tracking_uri: str, run_id: str | None) -> str:
    """Log the exported ``folder`` as a model of the run ``run_id``, or of no run; returns its models:/... address."""
    import mlflow

    try:
        with tracking_store(tracking_uri), _inside(run_id), warnings.catch_warnings():
            # MLflow advises type annotations and an example: the signature holds the same information.
            warnings.filterwarnings("ignore", category=UserWarning, module="mlflow")
            logged = mlflow.pyfunc.log_model(name=_MODEL_NAME, **model_contents(folder))
    except mlflow_errors() as error:
        raise UserError(f"MLflow did not take the model: {' '.join(str(error).split())}") from error
    return str(logged.model_uri)


@contextlib.contextmanager
def _inside(run_id: str | None) -> Iterator[None]:
    """Log to the run ``run_id`` and leave its status unchanged."""
    import mlflow

    if run_id is None:
        yield
        return
    status = mlflow.MlflowClient().get_run(run_id).info.status
    with mlflow.start_run(run_id=run_id):
        yield
    mlflow.MlflowClient().update_run(run_id, status=status)


def model_contents(folder: Path) -> dict[str, Any]:
    """What mlflow.pyfunc.log_model or save_model is given for the exported ``folder``."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    types = {int: DataType.long, float: DataType.double}
    parameters = [ParamSpec(name, types[type(value)], value) for name, value in PARAMETERS.items()]
    return {
        "python_model": str(_ROOT / "pipeline" / "pretrained" / "pyfunc_model.py"),
        "artifacts": {_ARTIFACT: str(folder)},
        "code_paths": [str(_ROOT / "model"), str(_ROOT / "pipeline")],
        "pip_requirements": list(_REQUIREMENTS),  # given, because MLflow would load the model to find them out
        "signature": ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "prompt")]),
            outputs=Schema([ColSpec(DataType.string)]),
            params=ParamSchema(parameters),
        ),
    }
