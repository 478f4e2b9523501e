"""Settings of jobs/finetune.py: what is read, how it is packed, and the few settings of training that matter here.

All others of a training run follow from the model that is fine-tuned, or are those of jobs/pretrain.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ModelConfig
from pipeline.config.settings import require, require_plain, require_positive
from pipeline.config.training import PretrainConfig, worker_range

_POSITIVE = (
    *("epochs", "tokens_per_step", "batch_size", "context_length", "log_every", "val_tokens", "sample_every"),
    *("sample_tokens", "checkpoint_every", "keep_checkpoints", "collective_timeout", "item_bytes", "cache_bytes"),
    *("data_workers", "download_workers", "limit_conversations", "resize_seconds"),
)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """From a trained model and conversations to a model that chats (jobs/finetune.py)."""

    checkpoint: str = "runs/gpt2.5"
    """Model to begin with: a checkpoint, a run folder (its newest checkpoint), an exported folder, hf://OWNER/NAME, or
    models:/... of MLflow. Its shape and its tokenizer are kept; the tokens of the chat are added to both."""
    source: str = ""
    """Conversations, which must be given: a file, folder or glob of .parquet or .jsonl files (lines also packed: .gz,
    .zst, .bz2, .xz); s3://BUCKET/GLOB, gs://BUCKET/GLOB, https://...; or hf://datasets/OWNER/NAME[@REVISION][/GLOB]."""
    data: str = "data/chat"
    """Folder for the packed conversations, which are made unless they are there; it may be s3:// or gs://."""
    output: str = "runs/chat"
    """Folder of the run, with checkpoints and summary; it may be s3:// or gs://. A run whose folder is given again
    resumes from its newest checkpoint."""
    messages_key: str = "messages"
    """Column of a parquet file, or key of a JSON line, that holds the list of messages, each with role and content."""
    chat_template: Literal["chatml", "gpt2.5"] = "chatml"
    """Template that makes text of messages: chatml, or gpt2.5 as the author of GPT-2.5 has it."""
    val_fraction: float = 0.01
    """Share of the conversations held out for validation, chosen by a hash of their messages."""
    limit_conversations: int | None = None
    """Read only this many rows or lines, from the start of the source. If not given, all."""
    skip_bad_files: bool = False
    """Continue without the files that cannot be read, and list them, instead of ending the run."""
    context_length: int | None = None
    """Number of tokens in a window, into which whole conversations are packed; longer ones are left out. If not given,
    the context length of the model."""

    epochs: float = 3.0
    """Number of passes over the conversations; the number of optimizer steps follows from it."""
    tokens_per_step: int | None = None
    """Tokens per optimizer step over all workers, filling included. If not given, batch_size windows on each worker."""
    batch_size: int = 8
    """Windows per micro-batch, which is one forward and backward pass on one worker."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer to use; with muon, AdamW still updates embeddings, output and vectors."""
    lr: float = 1e-5
    """Highest learning rate, which is reached at the end of the warmup."""
    schedule: Literal["cosine", "wsd", "linear"] = "linear"
    """Course of the learning rate after its rise, as of jobs/pretrain.py."""
    warmup_fraction: float = 0.0
    """Fraction of the steps over which the learning rate rises to its highest."""
    min_lr_fraction: float = 0.0
    """Learning rate of the last step, as a fraction of the highest."""
    beta1: float = 0.9
    """Decay rate of AdamW's running mean of the gradient."""
    beta2: float = 0.999
    """Decay rate of AdamW's running mean of the squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, which each step multiplies by its learning rate; vectors have none."""
    grad_clip: float = 1.0
    """Largest L2 norm of the gradient of all parameters together; a larger gradient is scaled down to it. With 0,
    gradients are never scaled."""
    seed: int = 1337
    """Random seed of the data order and of the samples."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes GPUs where every worker can have one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the matrix products; auto is bf16 on a GPU that has it, and otherwise fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto compiles on a GPU."""
    deterministic: Literal["on", "off"] = "on"
    """With on, a resumed run has the same bits as an uninterrupted one, on a GPU too."""
    recompute: Literal["none", "blocks"] = "none"
    """With blocks, activations are computed again in the backward pass instead of being kept, which needs less
    memory."""

    log_every: int = 10
    """Number of steps between two progress lines and metric points."""
    val_every: int = 100
    """Number of steps between two validations (loss, and accuracy of the assistant's tokens); with 0, there are
    none."""
    val_tokens: int = 10_485_760
    """Number of tokens of the conversations held out, filling included, to use during training."""
    sample_every: int = 200
    """Number of steps between two samples of a chat."""
    sample_prompt: str = "Tell me a story."
    """What the user says in the samples."""
    sample_tokens: int = 64
    """Number of tokens to generate per sample."""
    checkpoint_every: int = 200
    """Number of steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the one with the lowest val loss is kept too."""

    num_workers: int | str = 1
    """Number of training workers, each with one GPU or one CPU; 2:8 is elastic, from 2 to 8 as the cluster has room.
    One worker on a CPU of this machine trains in the process of the job, without Ray."""
    resize_seconds: float = 300.0
    """Seconds between two attempts to add workers to an elastic run, which resumes from its newest checkpoint."""
    collective_timeout: int = 600
    """Seconds without progress after which a worker counts as hanging and its group is restarted."""
    max_failures: int = 3
    """Number of times that workers may be lost before the run gives up; -1 means any number."""
    item_bytes: int = 128_000_000
    """Approximate bytes of conversations that one work item reads; the memory of a worker grows with it."""
    data_workers: int | None = None
    """Number of tasks that pack conversations at a time. If not given, one per CPU of the cluster."""
    download_workers: int | None = None
    """Number of downloads at a time for sources that are not local. If not given, half of data_workers, at least 2."""
    cache_bytes: int = 100_000_000_000
    """Disk space in bytes that each node may use for downloaded files (in GPT25_CACHE, or else ~/.cache/gpt-2.5)."""
    tracking_uri: str | None = None
    """MLflow server or store. If not given, MLFLOW_TRACKING_URI, or else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """Name of the MLflow experiment."""
    registered_model: str | None = None
    """Name in the model registry of MLflow under which the best checkpoint gets the alias best. If not given, the name
    of the experiment; with none, no model is registered."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self, seeds=("seed",), free=("source", "sample_prompt"))
        require_positive(self, *_POSITIVE)
        require(self.source != "", "--source is missing; name the files of conversations")
        require(self.sample_prompt.strip() != "", "sample_prompt is empty; give what the user says")
        require(0 <= self.val_fraction < 1, f"val_fraction is {self.val_fraction}; it must lie in [0, 1)")
        require("[" not in self.messages_key, f"messages_key is {self.messages_key}; name a column")
        worker_range(self.num_workers)

    @property
    def windows_per_step(self) -> int | None:
        """Windows of one optimizer step, where tokens_per_step does not say it."""
        return self.batch_size * worker_range(self.num_workers)[1] if self.tokens_per_step is None else None

    def training(self, model: ModelConfig, *, num_windows: int) -> PretrainConfig:
        """The settings of the training run, of a model of this shape (but for its vocabulary) on so many windows.

        Raises:
            UserError: settings that do not fit together.
        """
        length = self.context_length or model.context_length
        tokens_per_step = self.tokens_per_step or (self.windows_per_step or 1) * length
        own = {field.name for field in dataclasses.fields(PretrainConfig)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in own}
        shape = {name: value for name, value in model.to_dict().items() if name in own and name != "vocab_size"}
        values: dict[str, Any] = shared | shape | {"context_length": length, "tokens_per_step": tokens_per_step}
        steps = math.ceil(self.epochs * num_windows / max(1, tokens_per_step // length))
        return PretrainConfig(**values, train_steps=max(1, steps))
