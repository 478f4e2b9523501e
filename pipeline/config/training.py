"""Settings of jobs/pretrain.py. command_line.py fills them from a YAML preset and then from flags.

The fields are the keys of a preset's section (``configs/*.yaml``) and the flags of the command line. A value that makes
no sense is a UserError that shows it. Dimensions and recipe: docs/design.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig
from pipeline.config.settings import require
from pipeline.errors import UserError

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
    batch_size: int | Literal["auto"] = 32
    """Windows of one micro-batch on one worker; auto finds the largest number that fits into the GPU's memory."""
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
    deterministic: Literal["on", "off"] = "on"
    """With on, a resumed run repeats the bits of an uninterrupted one on a GPU too. With off, faster kernels whose last
    bits differ from run to run are allowed there."""
    recompute: Literal["none", "blocks"] = "none"
    """With blocks, what the blocks compute is computed a second time instead of kept: the same losses with far less
    memory, and steps that take about a quarter longer."""

    profile_steps: str | None = None
    """Steps to look at with torch's profiler, the first and the last, for instance 20:25; they are slower than others.
    The folder profile of the run, and MLflow, get a trace and a table of what took the time. Not given: none."""
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
            require(value == "auto" or value > 0, f"{name} is {value}; it must be positive")
        for name in ("min_lr_fraction", "warmup_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        require(self.resize_seconds > 0, f"resize_seconds is {self.resize_seconds:g}; it must be positive")
        every = self.keep_every
        require(
            every is None or (every > 0 and every % self.checkpoint_every == 0),
            f"keep_every is {every}; it must be a multiple of checkpoint_every {self.checkpoint_every}",
        )
        price = self.price_per_hour
        require(price is None or price >= 0, f"price_per_hour is {price}; it must not be negative")
        require(self.skip_nonfinite >= 0, f"skip_nonfinite is {self.skip_nonfinite}; it must not be negative")
        self.model_config(vocab_size=257)  # the shape is checked before any data is opened
        self._check_batch()
        self._check_profile()

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

    @property
    def micro_batch(self) -> int:
        """batch_size as a number, which a run has from its start on (training/largest_batch.py)."""
        assert self.batch_size != "auto"
        return self.batch_size

    def _check_batch(self) -> None:
        tokens, length = self.tokens_per_step, self.context_length
        fewest, most = worker_range(self.num_workers)
        require(
            tokens % length == 0,
            f"tokens_per_step {tokens:,} is no multiple of context_length {length:,}; "
            f"the nearest that is: {max(1, round(tokens / length)) * length:,}",
        )
        require(
            self.windows_per_step >= most,
            f"tokens_per_step {tokens:,} gives {self.windows_per_step} windows of {length:,} tokens, fewer than the "
            f"{most} workers; raise tokens_per_step or lower num_workers",
        )
        if self.grad_accum_steps is None:
            return
        require(
            fewest == most,
            f"grad_accum_steps {self.grad_accum_steps} cannot hold on {fewest} to {most} workers alike; "
            "leave it out: it follows from tokens_per_step",
        )
        require(
            self.batch_size != "auto",
            f"grad_accum_steps {self.grad_accum_steps} says what batch_size auto is to find out; give one of them",
        )
        product = self.micro_batch * self.grad_accum_steps * length * most
        require(
            product == tokens,
            f"batch_size {self.batch_size} x grad_accum_steps {self.grad_accum_steps} x context_length {length} x "
            f"num_workers {most} is {product:,} tokens, but tokens_per_step is {tokens:,}; "
            "leave grad_accum_steps out, or change tokens_per_step",
        )

    def _check_profile(self) -> None:
        if self.profile_steps is None:
            return
        first, last = step_range(self.profile_steps)
        require(
            1 <= first <= last <= self.train_steps,
            f"profile_steps is {self.profile_steps}; the first step must not come after the last, and both must lie "
            f"between 1 and train_steps {self.train_steps}",
        )


def step_range(profile_steps: str) -> tuple[int, int]:
    """The first and the last step that ``20:25`` names, counted from 1."""
    match = re.fullmatch(r"(\d+):(\d+)", profile_steps)
    if match is None:
        raise UserError(f"profile_steps is {profile_steps}; give the first and the last step, for instance 20:25")
    return int(match[1]), int(match[2])


def worker_range(num_workers: int | str) -> tuple[int, int]:
    """The fewest and the most workers that ``4`` or ``2:8`` allows."""
    match = re.fullmatch(r"(-?\d+)(?::(-?\d+))?", str(num_workers))
    if match is None:
        raise UserError(f"num_workers is {num_workers}; give a number, or the fewest and the most, for instance 2:8")
    fewest, most = int(match[1]), int(match[2] or match[1])
    require(fewest > 0, f"num_workers is {num_workers}; it must be positive")
    require(fewest <= most, f"num_workers is {num_workers}; the fewest come first: {most}:{fewest}")
    return fewest, most
