"""What a run is told: one frozen dataclass per job, filled from a YAML preset and then from flags.

A preset (``configs/*.yaml``) has one section per job; its keys, the fields below and the command line's flags are the
same names. Everything wrong with a setting is a UserError that shows the offending values; an unknown key or flag is
answered with the nearest known one. Dimensions and recipe: docs/design.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from model.config import ModelConfig
from pipeline.bpe_files import Pattern
from pipeline.errors import UserError

ConfigT = TypeVar("ConfigT")

_POSITIVE = (
    "train_steps",
    "tokens_per_step",
    "batch_size",
    "log_every",
    "val_every",
    "val_tokens",
    "sample_every",
    "sample_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "num_workers",
)
SECTIONS = ("tokenize", "train_tokenizer", "pretrain", "evaluate", "generate")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """From a source of raw text to shards and their manifest (jobs/tokenize.py)."""

    source: str = "installed-docs"
    """What to read: a file, folder or glob of .parquet, .jsonl, .txt (plain, .gz, .zst);
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]; or installed-docs, the docstrings of this machine's packages."""
    output: str = "data/demo"
    """Folder for the shards, their manifest and the tokenizer."""
    text_column: str = "text"
    """Column of a parquet file, or key of a JSON line, that holds the text."""
    tokenizer: str | None = None
    """A tokenizer.json to encode with. Not given: one is trained on a sample of the source, into the output folder."""
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
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        _require(
            257 <= self.vocab_size <= 2**31,
            f"vocab_size is {self.vocab_size}; it must be at least 257: 256 bytes and <|endoftext|>",
        )
        _check_reading(self)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """From a source of raw text to a tokenizer (jobs/train_tokenizer.py)."""

    source: str = "installed-docs"
    """What to read: a file, folder or glob of .parquet, .jsonl, .txt (plain, .gz, .zst);
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]; or installed-docs, the docstrings of this machine's packages."""
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
    sample_bytes: int = 1_000_000_000
    """Bytes of text, spread over the whole source, that are counted."""
    val_fraction: float = 0.0
    """Share of documents left out: with the val_fraction of jobs/tokenize.py, exactly those it holds out."""
    item_bytes: int = 128_000_000
    """Bytes of text that one work item reads, about: memory of a worker grows with it."""
    num_workers: int | None = None
    """Counting tasks at a time. Not given: one per CPU of the cluster."""
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        num_fixed = 256 + len(self.special_tokens)
        _require(
            num_fixed <= self.vocab_size <= 2**31,
            f"vocab_size is {self.vocab_size}; it must be at least {num_fixed}: 256 bytes and "
            f"{len(self.special_tokens)} special tokens",
        )
        _require(self.min_frequency > 0, f"min_frequency is {self.min_frequency}; it must be positive")
        _require(
            len(set(self.special_tokens)) == len(self.special_tokens) and "" not in self.special_tokens,
            f"special_tokens are {list(self.special_tokens)}; they must differ, and none may be empty",
        )
        _check_reading(self)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """From shards to a trained model (jobs/pretrain.py). Defaults: the GPT-2.5 recipe, 124M parameters."""

    data: str = "data/gpt2.5"
    """Folder that jobs/tokenize.py wrote."""
    output: str = "runs/gpt2.5"
    """Folder of this run: checkpoints, settings, summary. The same folder again goes on where it stopped."""
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
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""

    num_workers: int = 4
    """Training workers: one GPU each, or one CPU each."""
    max_failures: int = 3
    """Lost workers that a run survives before it gives up; -1 for any number."""
    tracking_uri: str | None = None
    """MLflow server or store. Not given: MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be positive")
        for name in ("min_lr_fraction", "warmup_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
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
    def windows_per_step(self) -> int:
        """Windows of one optimizer step over all workers (the global batch)."""
        return self.tokens_per_step // self.context_length

    def _check_batch(self) -> None:
        tokens, length = self.tokens_per_step, self.context_length
        _require(
            tokens % length == 0,
            f"tokens_per_step {tokens:,} is no multiple of context_length {length:,}; "
            f"the nearest that is: {max(1, round(tokens / length)) * length:,}",
        )
        _require(
            self.windows_per_step >= self.num_workers,
            f"tokens_per_step {tokens:,} gives {self.windows_per_step} windows of {length:,} tokens, fewer than the "
            f"{self.num_workers} workers; raise tokens_per_step or lower num_workers",
        )
        if self.grad_accum_steps is None:
            return
        product = self.batch_size * self.grad_accum_steps * length * self.num_workers
        _require(
            product == tokens,
            f"batch_size {self.batch_size} x grad_accum_steps {self.grad_accum_steps} x context_length {length} x "
            f"num_workers {self.num_workers} is {product:,} tokens, but tokens_per_step is {tokens:,}; "
            "leave grad_accum_steps out, or change tokens_per_step",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation loss and perplexity of a checkpoint over the whole val set (jobs/evaluate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint folder, or a run folder: its newest checkpoint."""
    data: str | None = None
    """Folder of shards. Not given: the one that the checkpoint was trained on."""
    batch_size: int = 32
    """Windows of one forward pass on one worker."""
    num_workers: int = 1
    """Workers that share the val set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    tracking_uri: str | None = None
    """MLflow server or store whose training run gets the result. Not given: MLFLOW_TRACKING_URI, else sqlite."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, f"batch_size is {self.batch_size}; it must be positive")
        _require(self.num_workers > 0, f"num_workers is {self.num_workers}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Text from a checkpoint (jobs/generate.py)."""

    checkpoint: str = "runs/gpt2.5"
    """A checkpoint folder, or a run folder: its newest checkpoint."""
    prompt: str = "Once upon a time, "
    """What the text begins with."""
    max_new_tokens: int = 200
    """Tokens to add at most; the text ends sooner at <|endoftext|>."""
    num_samples: int = 1
    """Texts from the same prompt."""
    temperature: float = 0.8
    """Below 1: bolder, above: more varied; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the likeliest k tokens only."""
    top_p: float | None = 0.9
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 1337
    """Same seed, same text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}; it must be positive")
        _require(self.num_samples > 0, f"num_samples is {self.num_samples}; it must be positive")
        _require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        _require(self.top_k is None or self.top_k > 0, f"top_k is {self.top_k}; it must be positive")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")


def _check_reading(config: TokenizeConfig | TrainTokenizerConfig) -> None:
    _require(0 <= config.val_fraction < 1, f"val_fraction is {config.val_fraction}; it must lie in [0, 1)")
    for name in ("item_bytes", "sample_bytes"):
        _require(getattr(config, name) > 0, f"{name} is {getattr(config, name)}; it must be positive")
    _require(
        config.num_workers is None or config.num_workers > 0,
        f"num_workers is {config.num_workers}; it must be positive",
    )


def resolve(config_class: type[ConfigT], section: str, arguments: Sequence[str], *, program: str) -> ConfigT:
    """Fill ``config_class`` from its defaults, then the preset's ``section`` (--config FILE), then the flags.

    A preset's values take the same way as flags, so both are checked by the same parser. Prints the help and exits
    with code 0 on --help; every mistake is a UserError of one sentence.
    """
    path, flags = _split_config_flag(list(arguments))
    preset = load_preset(path, section, config_class) if path else {}
    if preset and not flags:
        try:
            return _parse_flags(config_class, _as_flags(preset), program)
        except UserError as error:
            raise UserError(f"{path}, section {section}: {error}") from error
    return _parse_flags(config_class, [*_as_flags(preset), *flags], program)


def _split_config_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    path, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        path = value if equals else next(remaining, "")
        if not path:
            raise UserError("--config needs the path of a YAML preset, for example configs/demo.yaml")
    return (Path(path) if path else None), rest


def load_preset(path: Path, section: str, config_class: type[Any]) -> dict[str, Any]:
    """One section of a YAML preset, its keys checked against the fields of ``config_class``."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no preset {path}; the project's own lie in configs/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"preset {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not all(isinstance(value, dict) for value in document.values()):
        raise UserError(f"preset {path} must have one section per job ({', '.join(SECTIONS)}), each of keys and values")
    for name in document:
        if name not in SECTIONS:
            raise UserError(f"preset {path}: unknown section {name!r}{_nearest(name, SECTIONS)}")
    values: dict[str, Any] = document.get(section, {})
    names = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in names:
            raise UserError(f"preset {path}, section {section}: unknown key {name!r}{_nearest(str(name), names)}")
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain values: what MLflow, a checkpoint and --dry_run show; no passwords."""
    values = dataclasses.asdict(config)
    if values.get("tracking_uri"):
        values["tracking_uri"] = without_password(values["tracking_uri"])
    return values


def without_password(text: str) -> str:
    """``text`` without the user and password of any scheme://user:password@host in it."""
    return re.sub(r"([a-z][a-z0-9+.-]*://)[^/@\s]*@", r"\1", text)


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _parse_flags(config_class: type[ConfigT], flags: list[str], program: str) -> ConfigT:
    import tyro  # heavy for the workers, which never parse

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config, unknown = tyro.cli(
                config_class, args=flags, prog=program, return_unknown_args=True, use_underscores=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_sentence(messages.getvalue())}; {program} --help lists the flags") from None
    if unknown:
        names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        kind = "flag" if unknown[0].startswith("-") else "argument"
        raise UserError(
            f"unknown {kind} {unknown[0]}{_nearest(name, [*names, 'config'])}; {program} --help lists the flags"
        )
    return config


def _first_sentence(box: str) -> str:
    """The words of the first paragraph in the parser's framed message."""
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in box.splitlines()]
    paragraph = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return " ".join(paragraph).rstrip(".") or "the flags cannot be parsed"


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if matches:
        return f", did you mean {matches[0]!r}?"
    return f" (known: {', '.join(known)})" if len(known) < 10 else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
