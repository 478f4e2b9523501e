"""Settings of the jobs that use a trained model: evaluate, generate, export, serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.settings import require, require_plain, require_positive
from pipeline.config.tasks import TaskSettings, check_tasks

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TaskSettings):
    """Validation loss, perplexity, bits per byte, and scores on tasks, of a model (jobs/evaluate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """Model to use: a checkpoint, run or exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    data: str | None = None
    """Folder of shards. If not given, the one that the checkpoint was trained on."""
    val_tokens: int | None = None
    """Number of tokens to predict, from the start of the val set. If not given, all of it; the val loss that is
    published for FineWeb takes 10485760."""
    document_mask: Literal["auto", "on", "off"] = "auto"
    """With on, no token of the val set sees another document of its window, with off, it sees all of them before it;
    auto is what the checkpoint was trained with."""
    hellaswag: str | None = None
    """HellaSwag questions: a hellaswag_val.jsonl, or hf://datasets/OWNER/NAME[@REVISION]/FILE. Optional."""
    hellaswag_questions: int | None = None
    """Number of questions to use, from the first. If not given, all of them."""
    batch_size: int = 32
    """Sequences of context_length tokens per forward pass on one worker; HellaSwag passes hold as many tokens."""
    num_workers: int = 1
    """Number of workers that share the val set and the questions."""
    device: Device = "auto"
    """Device to compute on; auto takes a GPU where there is one."""
    output: str | None = None
    """Additional JSON file for the result. If not given, it is only in evaluation.json of the run folder."""
    tracking_uri: str | None = None
    """MLflow server or store that holds the training run. If not given, MLFLOW_TRACKING_URI, or else sqlite."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self)
        require_positive(self, "val_tokens", "batch_size", "num_workers", "hellaswag_questions", "task_questions")
        check_tasks(self)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Text from a model (jobs/generate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """Model to use: a checkpoint, run or exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    prompt: str = "Once upon a time, "
    """Text to continue; an empty prompt generates a document from its beginning."""
    prompts: str | None = None
    """File of prompts: a .jsonl file with the key prompt, or a text file with one prompt per line. If not given,
    prompt is the only one."""
    interactive: bool = False
    """Ask for prompts in the terminal, one after another, in place of prompt: Ctrl-C stops a text, Ctrl-D ends."""
    chat: bool = False
    """Chat with a model that jobs/finetune.py made: messages are typed in a terminal, each answered in turn, with all
    that was said before."""
    output: str | None = None
    """JSON lines file for prompts and texts. If not given, they are printed."""
    max_new_tokens: int = 200
    """Largest number of tokens to generate; a text ends earlier at <|endoftext|>."""
    num_samples: int = 1
    """Number of texts per prompt; the first one uses the seed, each further one the next number."""
    batch_size: int = 16
    """Number of sequences decoded at a time; it changes the speed, not the texts."""
    temperature: float = 0.8
    """Softmax temperature: logits are divided by it before sampling. Above 1 texts vary more, below 1 less, and 0
    always takes the likeliest token (greedy decoding)."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from. If not given, all are."""
    top_p: float | None = 0.9
    """Nucleus sampling: only the likeliest tokens are sampled from that together have this probability, between 0 and
    1. 1 samples from all."""
    seed: int = 1337
    """Random seed; the same seed gives the same text."""
    device: Device = "auto"
    """Device to compute on; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Number format of the matrix products; auto is bf16 on a GPU and float32 on the CPU."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self, free=("prompt", "seed"))
        require_positive(self, "max_new_tokens", "num_samples", "batch_size", "top_k")
        most = 2**63 - self.num_samples  # the last text has the seed num_samples - 1 further on
        require(-(2**63) <= self.seed <= most, f"seed is {self.seed}; it must lie between {-(2**63)} and {most}")
        require(not (self.interactive and self.chat), "--interactive and --chat are two ways to type; give one of them")
        require(not self.chat or self.num_samples == 1, f"num_samples is {self.num_samples}, but a chat has one answer")
        mode = "--chat" if self.chat else "--interactive"
        for name in ("prompts", "output") if self.interactive or self.chat else ():
            value = getattr(self, name)
            what = f"{name} is {value}, but {mode} takes prompts from the terminal and prints texts there"
            require(value is None, f"{what}; give one of them")
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A checkpoint as a Hugging Face folder, or as a GGUF for llama.cpp and ollama (jobs/export.py)."""

    checkpoint: str = "runs/gpt2.5"
    """Model to export: a checkpoint or run folder, or anything else that jobs/evaluate.py takes."""
    output: str = "export/gpt2.5"
    """Folder to write; the files of an earlier export in it are replaced, and it may hold nothing else."""
    format: Literal["huggingface", "gguf"] = "huggingface"
    """What to write: a folder for transformers and vLLM, or a GGUF for llama.cpp with a Modelfile for ollama."""
    dtype: Literal["float32", "f32", "bf16", "q8_0"] = "float32"
    """Number format of the exported weights; f32 is float32. q8_0, which takes 8.5 bits a weight, is for --format gguf
    only."""
    max_file_bytes: int = 5_000_000_000
    """Largest size of one weights file, in bytes; larger models are split over several files. A GGUF is always one."""
    push_to_hub: str | None = None
    """Repository OWNER/NAME on the hub that the folder is uploaded to; HF_TOKEN must hold a token for it. If
    not given, nothing is uploaded."""
    mlflow: bool = False
    """Also log the folder as an MLflow model, for mlflow models serve and mlflow.pyfunc.load_model."""
    tracking_uri: str | None = None
    """MLflow server or store that holds the training run. If not given, MLFLOW_TRACKING_URI, or else sqlite."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self)
        require_positive(self, "max_file_bytes")
        is_gguf = self.format == "gguf"
        require(is_gguf or self.dtype != "q8_0", "dtype is q8_0, which only a GGUF can have; add --format gguf")
        require(not (is_gguf and self.mlflow), "--mlflow logs a Hugging Face folder; leave out --format gguf")

    @property
    def number_format(self) -> Literal["float32", "bf16", "q8_0"]:
        """dtype by its one name."""
        return "float32" if self.dtype == "f32" else self.dtype


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A model behind an OpenAI-compatible address (jobs/serve.py). GPT25_SERVE_TOKEN holds the token, if any."""

    checkpoint: str = "runs/gpt2.5"
    """Model to use: a checkpoint, run or exported folder, hf://OWNER/NAME[@REVISION], or models:/... of MLflow."""
    model_name: str | None = None
    """Name of the model in requests. If not given, the last part of --checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs GPT25_SERVE_TOKEN, and a web server with TLS in front:
    texts and token travel as they are."""
    port: int = 8000
    """TCP port to listen on; 0 takes a free one."""
    num_replicas: int = 1
    """Number of copies of the model, each with its own worker."""
    device: Device = "auto"
    """Device to compute on; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Number format of the matrix products; auto is bf16 on a GPU and float32 on the CPU."""
    max_batch_size: int = 16
    """Number of sequences that one replica decodes at a time, and an eighth more for the first tokens of small
    requests."""
    max_waiting: int = 256
    """Number of requests for each replica, running ones included; further ones are answered with 429."""
    max_connections: int = 500
    """Number of connections at a time; one more ends the oldest that has not sent its whole request."""
    head_seconds: float = 10.0
    """Seconds in which a request's head must arrive, and in which a client must read some of its answer."""
    max_prompt_tokens: int | None = None
    """Largest number of tokens in one prompt, or in the messages of a chat. If not given, the context length of the
    model."""
    max_tokens: int = 1024
    """Largest max_tokens that a request may ask for."""
    max_texts: int = 16
    """Largest number of texts per request, which is its prompts times its n."""
    max_body_bytes: int = 1_000_000
    """Largest accepted request body, in bytes."""
    request_seconds: float = 120.0
    """Seconds from the arrival of a request to its last token; its body must arrive within a tenth of that."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self)
        whole = ("num_replicas", "max_batch_size", "max_waiting", "max_prompt_tokens", "max_tokens", "max_texts")
        require_positive(self, *whole, "max_body_bytes", "request_seconds")
        require_positive(self, "max_connections", "head_seconds")
        require(0 <= self.port < 2**16, f"port is {self.port}; it must lie between 0 and 65535")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("127.0.0.1", "localhost", "::1")
