"""Settings of the jobs that use a trained model: evaluate, generate, export, serve. See config.py for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.settings import require, require_positive

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation loss, perplexity, bits per byte and HellaSwag of a model (jobs/evaluate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint or run folder, an exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    data: str | None = None
    """Folder of shards. Not given: the one that the checkpoint was trained on."""
    hellaswag: str | None = None
    """Questions: a hellaswag_val.jsonl, or hf://datasets/OWNER/NAME[@REVISION]/FILE. Not given: none are asked."""
    hellaswag_questions: int | None = None
    """Ask the first so many only."""
    batch_size: int = 32
    """Windows of one forward pass on one worker; of HellaSwag as many tokens."""
    num_workers: int = 1
    """Workers that share the val set and the questions."""
    device: Device = "auto"
    """Where to compute."""
    output: str | None = None
    """JSON file for the result too; evaluation.json of the run folder gets it anyway."""
    tracking_uri: str | None = None
    """MLflow server or store whose training run gets the result. Not given: MLFLOW_TRACKING_URI, else sqlite."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "num_workers", "hellaswag_questions")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Text from a model (jobs/generate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint or run folder, an exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    prompt: str = "Once upon a time, "
    """What the text begins with; empty: the beginning of a document."""
    prompts: str | None = None
    """A file of prompts in place of one: .jsonl with the key prompt, or text, a line each."""
    output: str | None = None
    """JSON lines file for prompts and texts, in place of the terminal."""
    max_new_tokens: int = 200
    """Tokens to add at most; the text ends sooner at <|endoftext|>."""
    num_samples: int = 1
    """Texts from the same prompt; the first has the seed, the next the number after it."""
    batch_size: int = 16
    """Texts that grow at a time; it changes the speed, not the texts."""
    temperature: float = 0.8
    """Below 1: bolder, above: more varied; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the likeliest k tokens only."""
    top_p: float | None = 0.9
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 1337
    """Same seed, same text."""
    device: Device = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Of matrix products; auto is bf16 on a GPU, float32 on the CPU."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_positive(self, "max_new_tokens", "num_samples", "batch_size", "top_k")
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder (jobs/export.py)."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint or run folder, or whatever else jobs/evaluate.py takes."""
    output: str = "export/gpt2.5"
    """Folder to write; an earlier export there is replaced."""
    dtype: Literal["float32", "bf16"] = "float32"
    """Of the weights."""
    max_file_bytes: int = 5_000_000_000
    """Weights beyond this go into a further file."""
    push_to_hub: str | None = None
    """OWNER/NAME to commit the folder to; HF_TOKEN must hold a token that may write there."""
    mlflow: bool = False
    """Log the folder as an MLflow model too, for mlflow models serve and mlflow.pyfunc.load_model."""
    tracking_uri: str | None = None
    """MLflow server or store with the training run. Not given: MLFLOW_TRACKING_URI, else sqlite."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_positive(self, "max_file_bytes")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A model behind an OpenAI-compatible address (jobs/serve.py). GPT25_SERVE_TOKEN holds the token, if any."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint or run folder, an exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    model_name: str | None = None
    """What clients call it. Not given: the last part of --checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs GPT25_SERVE_TOKEN."""
    port: int = 8000
    num_replicas: int = 1
    """Copies of the model, each with its own worker."""
    device: Device = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Of matrix products; auto is bf16 on a GPU, float32 on the CPU."""
    max_batch_size: int = 16
    """Texts that grow at a time in a replica."""
    max_waiting: int = 256
    """Requests that a replica keeps, those that run included; beyond that it answers 429."""
    max_prompt_tokens: int | None = None
    """Of one prompt. Not given: the model's context length."""
    max_tokens: int = 1024
    """Highest max_tokens that a request may ask for."""
    max_texts: int = 16
    """Prompts times n of one request."""
    max_body_bytes: int = 1_000_000
    """Of one request."""
    request_seconds: float = 120.0
    """From arrival to the last token; a body has to arrive within a tenth of it."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        whole = ("num_replicas", "max_batch_size", "max_waiting", "max_prompt_tokens", "max_tokens", "max_texts")
        require_positive(self, *whole, "max_body_bytes", "request_seconds")
        require(0 <= self.port < 2**16, f"port is {self.port}; it must lie between 0 and 65535")
