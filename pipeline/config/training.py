"""What a run is told: one frozen dataclass per job. command_line.py fills them from a YAML preset and then from flags.

The fields are the keys of a preset's section (``configs/*.yaml``) and the flags of the command line. A value that makes
no sense is a UserError that shows it. Dimensions and recipe: docs/design.md.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ModelConfig
from pipeline.errors import UserError
from pipeline.tokenizer.files import Pattern

_POSITIVE = (
    "train_steps",
    "tokens_per_step",
    "batch_size",
    "log_every",
    "val_every",
    "val_tokens",
    "sample_every",
    "sample_tokens",
    "hellaswag_every",
    "checkpoint_every",
    "keep_checkpoints",
    "collective_timeout",
)


MAX_VOCAB_SIZE = (1 << 20) - 1  # bpe.MAX_TOKENS; bpe takes numba, and a trainer reads this file too


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """From a source of raw text to shards and their manifest (jobs/tokenize.py)."""

    source: str = "installed-docs"
    """What to read: a file, folder or glob of .parquet, .jsonl, .txt (plain, .gz, .zst);
    s3://BUCKET/GLOB, gs://BUCKET/GLOB, https://...; hf://datasets/OWNER/NAME[@REVISION][/GLOB]; or installed-docs, the
    docstrings of this machine's packages."""
    output: str = "data/demo"
    """Folder for the shards, their manifest and the tokenizer; s3://BUCKET/FOLDER or gs://BUCKET/FOLDER too."""
    text_column: str = "text"
    """Column of a parquet file, or key of a JSON line, that holds the text."""
    limit_documents: int | None = None
    """Read the first so many rows, lines or files only."""
    limit_bytes: int | None = None
    """Read about so many bytes of text only, to the next row group or range of lines."""
    dedup: Literal["off", "exact"] = "off"
    """exact leaves out documents whose text occurred before in the source; the source is then read twice."""
    skip_bad_files: bool = False
    """Go on where a file cannot be read; the manifest lists what was left out. Otherwise that ends the run."""
    verify: bool = False
    """Make nothing: read the data in --output again and compare them with their manifest."""
    tokenizer: str | None = None
    """A tokenizer.json to encode with. Not given: one is trained on a sample of the source, into the output folder."""
    train_tokenizer: bool = False
    """Train a tokenizer on a sample of the source: what happens anyway where --tokenizer is not given."""
    vocab_size: int = 50257
    """Ids of a tokenizer trained here, bytes and special tokens included."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text, spread over the whole source, that a tokenizer is trained on."""
    val_fraction: float = 0.005
    """Share of documents held out for validation, chosen by a hash of their text."""
    item_bytes: int = 128_000_000
    """Bytes of text that one work item reads, about: memory of a worker grows with it."""
    num_workers: int | None = None
    """Tokenization tasks at a time. Not given: one per CPU of the cluster."""
    download_workers: int | None = None
    """Downloads at a time, of sources that are not local. Not given: half as many as num_workers, at least 2."""
    cache_bytes: int = 100_000_000_000
    """Disk that each node may use for files while they are fetched (in GPT25_CACHE, else ~/.cache/gpt-2.5)."""
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        _check_vocab_size(self.vocab_size, 257, "256 bytes and <|endoftext|>")
        _check_reading(self)
        for name in ("limit_documents", "limit_bytes"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}; it must be positive")
        _require(
            not (self.train_tokenizer and self.tokenizer),
            f"train_tokenizer and tokenizer {self.tokenizer} contradict each other; give one of them",
        )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """From a source of raw text to a tokenizer (jobs/train_tokenizer.py)."""

    source: str = "installed-docs"
    """What to read: a file, folder or glob of .parquet, .jsonl, .txt (plain, .gz, .zst);
    s3://BUCKET/GLOB, gs://BUCKET/GLOB, https://...; hf://datasets/OWNER/NAME[@REVISION][/GLOB]; or installed-docs, the
    docstrings of this machine's packages."""
    output: str = "data/tokenizer"
    """Folder for tokenizer.json and summary.json."""
    text_column: str = "text"
    """Column of a parquet file, or key of a JSON line, that holds the text."""
    vocab_size: int = 50257
    """Ids, the 256 bytes and the special tokens included."""
    min_frequency: int = 1
    """A pair of tokens that occurs less often is not merged; above 1 the vocabulary may get smaller than asked."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Names of the last ids; jobs/tokenize.py needs <|endoftext|>."""
    pattern: Pattern = "gpt2"
    """What cuts text into pieces before merging: GPT-2's pattern, or cl100k, which GPT-4 and Llama 3 have."""
    skip_bad_files: bool = False
    """Go on where a file cannot be read, without it. Otherwise that ends the run."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text, spread over the whole source, that are counted."""
    val_fraction: float = 0.0
    """Share of documents left out: with the val_fraction of jobs/tokenize.py, exactly those it holds out."""
    item_bytes: int = 128_000_000
    """Bytes of text that one work item reads, about: memory of a worker grows with it."""
    num_workers: int | None = None
    """Counting tasks at a time. Not given: one per CPU of the cluster."""
    download_workers: int | None = None
    """Downloads at a time, of sources that are not local. Not given: half as many as num_workers, at least 2."""
    cache_bytes: int = 100_000_000_000
    """Disk that each node may use for files while they are fetched (in GPT25_CACHE, else ~/.cache/gpt-2.5)."""
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        num_special = len(self.special_tokens)
        _check_vocab_size(self.vocab_size, 256 + num_special, f"256 bytes and {num_special} special tokens")
        _require(self.min_frequency > 0, f"min_frequency is {self.min_frequency}; it must be positive")
        _check_special_tokens(self.special_tokens)
        _check_reading(self)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """From shards to a trained model (jobs/pretrain.py). Defaults: the GPT-2.5 recipe, 124M parameters."""

    data: str = "data/gpt2.5"
    """Folder that jobs/tokenize.py wrote."""
    output: str = "runs/gpt2.5"
    """Folder of this run: checkpoints, settings, summary; s3://BUCKET/FOLDER or gs://BUCKET/FOLDER too. The same folder
    again goes on where it stopped."""
    checkpoint: str | None = None
    """Start from the weights of this checkpoint, or another run's newest, instead of random ones."""

    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads per block."""
    d_model: int = 768
    """Width of the residual stream."""
    d_ff: int = 2048
    """Width of the SwiGLU layer."""
    context_length: int = 1024
    """Tokens that the model sees at once."""
    theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output projection too."""

    train_steps: int = 80_000
    """Optimizer steps."""
    tokens_per_step: int = 524_288
    """Tokens of one optimizer step over all workers; gradient accumulation follows from it."""
    batch_size: int = 32
    """Windows of one micro-batch on one worker."""
    grad_accum_steps: int | None = None
    """Micro-batches per step and worker. Not given: as many as tokens_per_step takes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the blocks; embeddings, output and vectors keep AdamW."""
    lr: float = 18e-4
    """Highest learning rate."""
    min_lr_fraction: float = 0.1
    """Last learning rate as a share of the highest."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises to its highest."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's denominator guard."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices, per unit of learning rate; vectors have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    seed: int = 1337
    """Of the weights and of the data order."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU where every worker can have one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matrix products; auto is bf16 on a GPU that has it, else fp32. Weights and reductions are fp32 always."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the blocks; auto compiles on a GPU."""

    log_every: int = 10
    """Steps between two progress lines and metric points."""
    val_every: int = 250
    """Steps between two validation losses."""
    val_tokens: int = 10_485_760
    """Tokens of the val set looked at during training; jobs/evaluate.py looks at all."""
    sample_every: int = 1000
    """Steps between two samples of text."""
    sample_prompt: str = "Once upon a time, "
    """What the samples begin with."""
    sample_tokens: int = 64
    """Tokens per sample."""
    hellaswag: str | None = None
    """HellaSwag's questions: a hellaswag_val.jsonl or .parquet, or hf://datasets/OWNER/NAME[@REVISION]/FILE. Not given:
    none are asked."""
    hellaswag_every: int = 2000
    """Steps between two HellaSwag scores, each of all questions; the last step has one too."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest; the one with the lowest val loss stays too."""
    keep_every: int | None = None
    """Steps between checkpoints that stay for good. Not given: none does."""

    num_workers: int | str = 4
    """Training workers: one GPU each, or one CPU each. 2:8 is elastic: as many as the cluster has, from 2 to 8."""
    resize_seconds: float = 300.0
    """Elastic: seconds between two looks for room for more workers, which go on from the newest checkpoint."""
    skip_nonfinite: int = 0
    """Steps whose loss or gradient is not finite that are left out; one more ends the run."""
    collective_timeout: int = 600
    """Seconds without progress after which a worker is taken to hang and its group is started again."""
    max_failures: int = 3
    """Lost workers that a run survives before it gives up; -1 for any number."""
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    registered_model: str | None = None
    """Name in MLflow's model registry whose alias best the best checkpoint gets. Not given: the experiment's; none: it
    is not registered."""
    price_per_hour: float | None = None
    """Dollars for a worker and hour, for the cost in the report."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be positive")
        for name in ("min_lr_fraction", "warmup_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        _require(self.resize_seconds > 0, f"resize_seconds is {self.resize_seconds:g}; it must be positive")
        every = self.keep_every
        _require(
            every is None or (every > 0 and every % self.checkpoint_every == 0),
            f"keep_every is {every}; it must be a multiple of checkpoint_every {self.checkpoint_every}",
        )
        price = self.price_per_hour
        _require(price is None or price >= 0, f"price_per_hour is {price}; it must not be negative")
        _require(self.skip_nonfinite >= 0, f"skip_nonfinite is {self.skip_nonfinite}; it must not be negative")
        self.model_config(vocab_size=257)  # the shape is checked before any data is opened
        self._check_batch()

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The network's own config; raises UserError for shapes that do not fit together."""
        try:
            return ModelConfig(
                vocab_size=vocab_size,
                context_length=self.context_length,
                num_layers=self.num_layers,
                num_heads=self.num_heads,
                d_model=self.d_model,
                d_ff=self.d_ff,
                theta=self.theta,
                norm_eps=self.norm_eps,
                tie_embeddings=self.tie_embeddings,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def registry_name(self) -> str | None:
        """The registered model's name, or None; MLflow takes neither slash nor colon in one."""
        name = self.experiment if self.registered_model is None else self.registered_model
        return None if name == "none" else re.sub("[/:]", "-", name)

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step over all workers (the global batch)."""
        return self.tokens_per_step // self.context_length

    def _check_batch(self) -> None:
        tokens, length = self.tokens_per_step, self.context_length
        fewest, most = worker_range(self.num_workers)
        _require(
            tokens % length == 0,
            f"tokens_per_step {tokens:,} is no multiple of context_length {length:,}; "
            f"the nearest that is: {max(1, round(tokens / length)) * length:,}",
        )
        _require(
            self.windows_per_step >= most,
            f"tokens_per_step {tokens:,} gives {self.windows_per_step} windows of {length:,} tokens, fewer than the "
            f"{most} workers; raise tokens_per_step or lower num_workers",
        )
        if self.grad_accum_steps is None:
            return
        _require(
            fewest == most,
            f"grad_accum_steps {self.grad_accum_steps} cannot hold on {fewest} to {most} workers alike; "
            "leave it out: it follows from tokens_per_step",
        )
        product = self.batch_size * self.grad_accum_steps * length * most
        _require(
            product == tokens,
            f"batch_size {self.batch_size} x grad_accum_steps {self.grad_accum_steps} x context_length {length} x "
            f"num_workers {most} is {product:,} tokens, but tokens_per_step is {tokens:,}; "
            "leave grad_accum_steps out, or change tokens_per_step",
        )


def worker_range(num_workers: int | str) -> tuple[int, int]:
    """The fewest and the most workers that ``4`` or ``2:8`` allows."""
    match = re.fullmatch(r"(-?\d+)(?::(-?\d+))?", str(num_workers))
    if match is None:
        raise UserError(f"num_workers is {num_workers}; give a number, or the fewest and the most, for instance 2:8")
    fewest, most = int(match[1]), int(match[2] or match[1])
    _require(fewest > 0, f"num_workers is {num_workers}; it must be positive")
    _require(fewest <= most, f"num_workers is {num_workers}; the fewest come first: {most}:{fewest}")
    return fewest, most


def _check_vocab_size(vocab_size: int, lowest: int, needed: str) -> None:
    _require(vocab_size >= lowest, f"vocab_size is {vocab_size}; it must be at least {lowest}: {needed}")
    _require(vocab_size <= MAX_VOCAB_SIZE, f"vocab_size is {vocab_size}; it must be at most {MAX_VOCAB_SIZE}")


def _check_special_tokens(names: tuple[str, ...]) -> None:
    """What can be known before any text is counted; a name that the merges make too is found afterwards."""
    _require(len(set(names)) == len(names), f"special_tokens are {list(names)}; they must differ")
    for name in names:
        _require(name != "", f"special_tokens are {list(names)}; none may be empty")
        _require(
            len(name) > 1 or not name.isascii(),
            f"special token {name!r} is a single byte, which is a token already; choose a longer name",
        )
        _require(_is_utf8(name), f"special token {name!r} is not UTF-8 text; choose another name")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as Python reads bytes of the command line that are not UTF-8
        return False
    return True


def _check_reading(config: TokenizeConfig | TrainTokenizerConfig) -> None:
    _require(0 <= config.val_fraction < 1, f"val_fraction is {config.val_fraction}; it must lie in [0, 1)")
    for name in ("item_bytes", "sample_bytes", "cache_bytes", "num_workers", "download_workers"):
        value = getattr(config, name)
        _require(value is None or value > 0, f"{name} is {value}; it must be positive")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain values: what MLflow, a checkpoint and --dry_run show; no passwords."""
    values = dataclasses.asdict(config)
    if values.get("tracking_uri"):
        values["tracking_uri"] = without_password(values["tracking_uri"])
    return values


def without_password(text: str) -> str:
    """``text`` without the user and password of any scheme://user:password@host in it."""
    return re.sub(r"([a-z][a-z0-9+.-]*://)[^/@\s]*@", r"\1", text)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
