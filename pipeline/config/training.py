"""Settings of jobs/pretrain.py.

The fields are the keys of a preset's section (``configs/*.yaml``) and the flags of the command line. A value that makes
no sense raises a UserError that shows it. Dimensions and recipe: docs/design.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from model.config import Init, ModelConfig
from pipeline.config import size_rules
from pipeline.config.mixtures import Mixture, check_phases, read_mixture
from pipeline.config.settings import require, require_plain, require_positive
from pipeline.config.tasks import PeriodicTaskSettings
from pipeline.config.training_checks import check_loop, check_recipe
from pipeline.errors import UserError

if TYPE_CHECKING:
    WholeNumber: TypeAlias = int
    Number: TypeAlias = float
else:  # None may be given, and is the default; whoever reads a config finds a number
    WholeNumber, Number = int | None, float | None
_BY_DEPTH: Any = None

_POSITIVE = (
    *("train_steps", "tokens_per_step", "log_every", "val_tokens", "sample_every", "sample_tokens"),
    *("hellaswag_every", "checkpoint_every", "keep_checkpoints", "collective_timeout", "tokens_per_second"),
    *("tasks_every", "task_questions"),
    *("depth", "tokens_per_parameter", "vocab_size", "context_length", "grad_accum_steps", "muon_iterations"),
)
_FRACTIONS = {"warmup_fraction": 0.05, "decay_fraction": 0.2}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(PeriodicTaskSettings):
    """From shards to a trained model (jobs/pretrain.py). The defaults are the GPT-2.5 recipe with 124M parameters."""

    data: str | tuple[str, ...] = field(default="data/gpt2.5", metadata={"gathered": True})
    """Folder of shards that jobs/tokenize.py wrote. To mix several by shares of the tokens, the flag is given once for
    each as FOLDER:WEIGHT, for instance --data data/web:0.7 --data data/books:0.3."""
    phase: tuple[str, ...] = field(default=(), metadata={"gathered": True})
    """Number of steps from which on the data are mixed with other weights, and these, for instance 6000 data/web:0.2
    data/books:0.8; it may be given several times. A folder that is not in it is not read in it. If not given, the
    weights of data hold for all steps."""
    output: str = "runs/gpt2.5"
    """Folder of the run, with checkpoints and summary; it may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. A run whose
    folder is given again resumes from its newest checkpoint."""
    checkpoint: str | None = None
    """Weights to start from: a checkpoint, a run folder (its newest checkpoint), a folder in Hugging Face's format, or
    hf://OWNER/NAME[@REVISION]. context_length and theta may be other than they were there. If not given, the weights
    are random."""

    branch_from: str | None = None
    """Begin as a branch of another run: its folder, or s3:// or gs://. The checkpoint of that run which step names is
    copied into output, and training goes on from there, with the optimizer's state and the same data order. If not
    given, a run is no branch."""
    step: int | None = None
    """Number of optimizer steps after which a branch leaves the run of branch_from, which must have a checkpoint
    there. It must be given with branch_from."""

    depth: int | None = None
    """Number of transformer blocks from which the shape of the network, tokens, batch, learning rate and weight decay
    follow, where they are not given (pipeline/config/size_rules.py). If not given, they are those of the recipe."""
    tokens_per_parameter: float = 12.0
    """With depth, tokens to train on per parameter of the blocks' matrices and the output projection."""
    vocab_size: int | None = None
    """Number of token ids in the data, which depth and dry_run need before any data is there. If not given, 50257."""
    num_layers: WholeNumber = _BY_DEPTH
    """Number of transformer blocks. If not given, depth, or else 12."""
    num_heads: WholeNumber = _BY_DEPTH
    """Number of attention heads per block. If not given, heads are 128 wide with depth; without it, there are 12."""
    d_model: WholeNumber = _BY_DEPTH
    """Width of the residual stream (hidden size). If not given, 64 x depth in multiples of 128, or else 768."""
    d_ff: WholeNumber = _BY_DEPTH
    """Width of the hidden layer in each SwiGLU. If not given, 8/3 of the width with depth, or else 2048."""
    context_length: int = 1024
    """Number of tokens that the model sees at once, which is the length of a training sequence."""
    theta: float = 10_000.0
    """Base of the RoPE frequencies, rope_theta in Hugging Face's config.json; a larger one suits a longer context."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm, which is added to the mean square before its root is taken."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output projection too."""
    qk_norm: bool = False
    """Apply RMSNorm to the query and the key of each head before the attention, as Qwen3 does."""
    init_std: float | Literal["fan_in"] = 0.02
    """Standard deviation of the matrices of the blocks, and of an output matrix of its own, at the start. With fan_in,
    0.577 over the square root of the number of the matrix's columns."""
    embedding_init_std: float = 0.02
    """Standard deviation of the embedding matrix at the start."""
    zero_init_projections: bool = False
    """Start the two projections of each block onto the residual stream at zero."""
    zero_init_output: bool = False
    """Start the output matrix at zero; it must be one of its own (--no_tie_embeddings)."""

    train_steps: WholeNumber = _BY_DEPTH
    """Number of optimizer steps of the run. If not given, it follows from tokens_per_parameter with depth; without it,
    80000."""
    tokens_per_step: WholeNumber = _BY_DEPTH
    """Tokens per optimizer step over all workers; the number of micro-batches follows from it. If not given, it grows
    with depth, or else is 524288."""
    batch_size: WholeNumber | Literal["auto"] = _BY_DEPTH
    """Sequences of context_length tokens per micro-batch, which is one forward and backward pass on one worker; the
    batch of a step is tokens_per_step. With auto, as many as the memory of the GPU holds. If not given, 32, or fewer
    with depth where the network is larger than the recipe's."""
    grad_accum_steps: int | None = None
    """Micro-batches per step on each worker (gradient accumulation). If not given, it follows from tokens_per_step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer to use; with muon, AdamW still updates embeddings, output and vectors."""
    lr: Number = _BY_DEPTH
    """Highest learning rate, which is reached at the end of the warmup. If not given, 18e-4; with depth, that times the
    square root of tokens_per_step / 524288."""
    embedding_lr: float | None = None
    """Highest learning rate of the embedding matrix, which follows the same schedule. If not given, lr."""
    output_lr: float | None = None
    """Highest learning rate of an output matrix of its own. If not given, lr."""
    vector_lr: float | None = None
    """Highest learning rate of the vectors, which are the weights of the norms. If not given, lr."""
    min_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    warmup_fraction: float | None = None
    """Fraction of the steps over which the learning rate rises to its highest. If neither this nor warmup_steps is
    given, 0.05."""
    warmup_steps: int | None = None
    """Number of steps over which the learning rate rises to its highest, in place of warmup_fraction."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """Course of the learning rate after its rise. With cosine, it falls over all other steps as half a cosine, with
    linear, as a straight line. With wsd, it stays at its highest, then falls as a straight line over the last steps."""
    decay_fraction: float | None = None
    """With wsd, the fraction of the steps, at the end of the run, over which the learning rate falls; with 0, it never
    does. If neither this nor decay_from is given, 0.2."""
    decay_from: int | None = None
    """With wsd, the number of steps after which the learning rate begins to fall, in place of decay_fraction."""
    beta1: float = 0.9
    """Decay rate of AdamW's running mean of the gradient."""
    beta2: float = 0.95
    """Decay rate of AdamW's running mean of the squared gradient."""
    eps: float = 1e-8
    """Epsilon of AdamW, which is added to the denominator of its update."""
    weight_decay: Number = _BY_DEPTH
    """Decoupled weight decay of matrices, which each step multiplies by its learning rate; vectors have none. If not
    given, 0.1; with depth, less for a network that is larger than the recipe's, and more for a smaller one."""
    embedding_weight_decay: float | None = None
    """Weight decay of the embedding matrix and of the output matrix. If not given, weight_decay."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon: the decay rate of its running mean of the gradient."""
    muon_iterations: int = 5
    """Number of Newton-Schulz iterations by which Muon makes a step orthogonal."""
    muon_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Coefficients a, b, c of the polynomial a x + b x^3 + c x^5 of a Newton-Schulz iteration."""
    grad_clip: float = 1.0
    """Largest L2 norm of the gradient of all parameters together; a larger gradient is scaled down to it. With 0,
    gradients are never scaled."""
    seed: int = 1337
    """Random seed for weight initialization and data order."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes GPUs where every worker can have one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the matrix products; auto is bf16 on a GPU that has it, and otherwise fp32. Weights and
    reductions are always fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; auto compiles on a GPU."""
    deterministic: Literal["on", "off"] = "on"
    """With on, a resumed run has the same bits as an uninterrupted one, on a GPU too. With off, a GPU may use faster
    kernels whose last bits differ from run to run."""
    recompute: Literal["none", "blocks"] = "none"
    """With blocks, activations are computed again in the backward pass instead of being kept: the losses are the same,
    far less memory is needed, and steps take about a quarter longer."""

    packing: Literal["sequential", "best_fit"] = "sequential"
    """How documents are put into windows. With sequential, they follow one another and are cut wherever a window ends.
    With best_fit, only documents that are longer than a window are cut; the share of tokens that fill windows up, and
    are read twice for it, is told at the start and by dry_run."""
    document_mask: bool = False
    """Let no token see another document of its window. The validation loss is measured in the same way, so it does not
    compare with losses measured without."""

    profile_steps: str | None = None
    """First and last step to profile with torch's profiler, for instance 20:25; profiled steps are slower. A trace and
    a table of the slowest operations go to the folder profile of the run and to MLflow. If not given, no step is
    profiled."""
    log_every: int = 10
    """Number of steps between two progress lines and metric points."""
    val_every: int = 250
    """Number of steps between two computations of the validation loss; with 0, there are none, and no val set is
    needed."""
    val_tokens: int = 10_485_760
    """Number of tokens of the val set to use during training; jobs/evaluate.py uses all."""
    sample_every: int = 1000
    """Number of steps between two text samples."""
    sample_prompt: str = "Once upon a time, "
    """Prompt that the text samples continue."""
    sample_tokens: int = 64
    """Number of tokens to generate per sample."""
    hellaswag: str | None = None
    """HellaSwag questions: a hellaswag_val.jsonl or .parquet, or hf://datasets/OWNER/NAME[@REVISION]/FILE. If not
    given, HellaSwag is not evaluated."""
    hellaswag_every: int = 2000
    """Number of steps between two HellaSwag evaluations on all questions; the last step has one too."""
    checkpoint_every: int = 1000
    """Number of steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; the one with the lowest val loss is kept too."""
    keep_every: int | None = None
    """Number of steps between checkpoints that are never deleted. If not given, there are none."""

    num_workers: int | str = 4
    """Number of training workers, each with one GPU or one CPU; 2:8 is elastic, from 2 to 8 as the cluster has room.
    One worker on a CPU of this machine trains in the process of the job, without Ray."""
    resize_seconds: float = 300.0
    """Seconds between two attempts to add workers to an elastic run, which resumes from its newest checkpoint."""
    skip_nonfinite: int = 0
    """Number of steps with a non-finite loss or gradient that may be skipped; one more ends the run."""
    collective_timeout: int = 600
    """Seconds without progress after which a worker counts as hanging and its group is restarted."""
    max_failures: int = 3
    """Number of times that workers may be lost before the run gives up; -1 means any number."""
    tracking_uri: str | None = None
    """MLflow server or store. If not given, MLFLOW_TRACKING_URI, or else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """Name of the MLflow experiment."""
    registered_model: str | None = None
    """Name in the model registry of MLflow under which the best checkpoint gets the alias best. If not given, the name
    of the experiment; with none, no model is registered."""
    price_per_hour: float | None = None
    """Price of one worker per hour in dollars, for the cost in the report and in dry_run. If not given, they name
    none."""
    tokens_per_second: float | None = None
    """Measured tokens per second of one worker, for the hours in dry_run. If not given, an estimate for one H100."""
    dry_run: bool = False
    """Print the resolved settings, the size of the run, its hours and its cost, then stop."""

    def __post_init__(self) -> None:
        require_plain(self, seeds=("seed",), free=("grad_clip", "sample_prompt"))
        require_positive(self, *_POSITIVE, *(() if self.batch_size == "auto" else ("batch_size",)))
        most_workers = worker_range(self.num_workers)[1]
        for name, value in size_rules.fill_in(vars(self), num_workers=most_workers).items():
            object.__setattr__(self, name, value)  # frozen for its users; the record of a run has to say what it was
        self._check_schedule()
        self._check_branch()
        check_phases(self.mixture, self.train_steps)
        check_recipe(self)
        check_loop(self)
        self.model_config(vocab_size=257)  # the shape is checked before any data is opened
        self._check_batch()
        self._check_profile()

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The config of the network; UserError where its dimensions do not fit together."""
        try:
            names = {field.name for field in fields(ModelConfig)} - {"vocab_size"}
            return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise UserError(str(error)) from error

    def check_vocab_size(self, vocab_size: int) -> None:
        """Check that the data have as many token ids as the settings say, or as --depth counted on.

        Raises:
            UserError: they have another number of them.
        """
        require(
            self.vocab_size in (None, vocab_size),
            f"the data have {vocab_size:,} token ids, but the settings count on {self.vocab_size}; give --vocab_size "
            f"{vocab_size}",
        )

    @property
    def mixture(self) -> Mixture:
        """The folders of data and phase, and their weights."""
        return read_mixture(self.data, self.phase)

    @property
    def init(self) -> Init:
        """How the weights are drawn."""
        return Init(
            std=None if self.init_std == "fan_in" else self.init_std,
            embedding_std=self.embedding_init_std,
            zero_projections=self.zero_init_projections,
            zero_output=self.zero_init_output,
        )

    @property
    def registry_name(self) -> str | None:
        """Name of the registered model, or None. MLflow allows neither slash nor colon in it."""
        name = self.experiment if self.registered_model is None else self.registered_model
        return None if name == "none" else re.sub("[/:]", "-", name)

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step over all workers (the global batch)."""
        return self.tokens_per_step // self.context_length

    @property
    def micro_batch(self) -> int:
        """batch_size as a number; a run replaces auto at its start (training/largest_batch.py)."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def num_warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_fraction is not None
        return round(self.train_steps * self.warmup_fraction)

    @property
    def first_decay_step(self) -> int:
        """The first step, counted from 0, whose learning rate is below the highest; without any, train_steps."""
        if self.schedule != "wsd":
            return min(max(self.num_warmup_steps, 1), self.train_steps)
        if self.decay_from is not None:
            return self.decay_from
        assert self.decay_fraction is not None
        return self.train_steps - round(self.train_steps * self.decay_fraction)

    def _check_branch(self) -> None:
        step, source = self.step, self.branch_from
        require(
            (step is None) == (source is None),
            f"branch_from is {source} and step is {step}; a branch needs both: --branch_from RUN --step N",
        )
        require(
            step is None or 0 < step < self.train_steps,
            f"step is {step}; a branch must begin between 1 and the last step, train_steps {self.train_steps}",
        )
        require(
            source is None or self.checkpoint is None,
            f"checkpoint is {self.checkpoint} and branch_from is {source}; a run begins from one of them",
        )

    def _check_schedule(self) -> None:
        self._resolve_fraction("warmup_fraction", "warmup_steps", is_used=True)
        self._resolve_fraction("decay_fraction", "decay_from", is_used=self.schedule == "wsd")
        for name in ("min_lr_fraction", "warmup_fraction", "decay_fraction"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        warmup, decay, steps = self.num_warmup_steps, self.first_decay_step, self.train_steps
        require(0 <= warmup <= steps, f"warmup_steps is {warmup}; it must lie between 0 and train_steps {steps}")
        require(
            warmup <= decay <= steps,
            f"the learning rate would rise until step {warmup} and fall from step {decay} on, but the fall must begin "
            f"between the end of the rise and train_steps {steps}; change the warm-up, decay_fraction or decay_from",
        )

    def _resolve_fraction(self, fraction: str, steps: str, *, is_used: bool) -> None:
        """Check that one of the two ways to say the same is given; if none is, fill in the fraction's default."""
        given = {name: getattr(self, name) for name in (steps, fraction) if getattr(self, name) is not None}
        require(
            len(given) < 2,
            f"{' and '.join(f'{name} {value}' for name, value in given.items())} are two ways to say the same; give "
            f"one of them (--{fraction} None takes back what a preset gives)",
        )
        for name, value in given.items():
            require(
                is_used,
                f"{name} is {value}, but only with schedule wsd it has a meaning; leave it out, or give --schedule wsd",
            )
        if is_used and not given:
            # The class is frozen for its users; what is recorded of a run has to say which fraction it was.
            object.__setattr__(self, fraction, _FRACTIONS[fraction])

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
    """The first and the last step in a range such as ``20:25``, counted from 1."""
    match = re.fullmatch(r"(\d+):(\d+)", profile_steps)
    if match is None:
        raise UserError(f"profile_steps is {profile_steps}; give the first and the last step, for instance 20:25")
    return int(match[1]), int(match[2])


def worker_range(num_workers: int | str) -> tuple[int, int]:
    """The smallest and the largest number of workers in ``4`` or ``2:8``."""
    match = re.fullmatch(r"(-?\d+)(?::(-?\d+))?", str(num_workers))
    if match is None:
        raise UserError(f"num_workers is {num_workers}; give a number, or the fewest and the most, for instance 2:8")
    fewest, most = int(match[1]), int(match[2] or match[1])
    require(fewest > 0, f"num_workers is {num_workers}; it must be positive")
    require(fewest <= most, f"num_workers is {num_workers}; the fewest come first: {most}:{fewest}")
    return fewest, most
