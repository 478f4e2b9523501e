"""Settings of the jobs that make data: jobs/tokenize.py, jobs/train_tokenizer.py and jobs/import_shards.py.

The fields are the keys of a preset's section (``configs/*.yaml``) and the flags of the command line. A value that makes
no sense raises a UserError that shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.settings import require, require_plain, require_positive
from pipeline.tokenizer.patterns import MAX_TOKENS, Pattern

GPT2_TOKENIZER = "hf://openai-community/gpt2"
TASKS = "tasks:"
"""Before names of tasks, among names of files."""


def _questions_in_use(preset: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The questions that a preset trains and evaluates with, as ``decontaminate`` has them."""
    found: list[str] = []
    for section in (preset.get(name, {}) for name in ("pretrain", "evaluate")):
        hellaswag, tasks, files = (section.get(key) for key in ("hellaswag", "tasks", "task_files"))
        found += [str(hellaswag)] if hellaswag else []
        found += [f"{TASKS}{tasks}{f'@{files}' if files else ''}"] if tasks else []
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """Settings shared by all jobs that read a source of text."""

    source: str = "installed-docs"
    """The text to read: a file, folder or glob of .parquet, .arrow, .feather, .csv, .tsv, .jsonl or .txt files, all but
    the first three also packed (.gz, .zst, .bz2, .xz); s3://BUCKET/GLOB, gs://BUCKET/GLOB, https://...;
    hf://datasets/OWNER/NAME[@REVISION][/GLOB]; or installed-docs, the docstrings of the packages on this machine. What
    is not read is counted."""
    output: str
    text_column: str = "text"
    """Column of a parquet file, or key of a JSON line, that holds the text; data.text is the text in data, and
    title,text joins the texts of both."""
    column_separator: str = "\\n\\n"
    """Text between the texts of several columns that are joined; \\n stands for the end of a line."""
    document_separator: str | None = None
    """Text between the documents of a .txt file, such as <|endoftext|>, or \\n\\n for blank lines. If not given, a
    file is one document."""
    max_document_bytes: int | None = None
    """Largest document in bytes of UTF-8; larger ones are counted and left out. If not given, there is no limit."""
    vocab_size: int = 50257
    """Number of ids of the trained tokenizer, including the 256 bytes and the special tokens."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text, spread over the whole source, that the tokenizer is trained on."""
    val_fraction: float
    val_split: Literal["documents", "tail"] = "documents"
    """With documents, a hash of its text decides whether a document is held out for validation; with tail, the last
    part of every document is held out, as nanoGPT does it with one long text."""
    skip_bad_files: bool = False
    """Continue without the files that cannot be read, and list them, instead of ending the run; also without the
    records that skip_bad_records leaves out."""
    skip_bad_records: bool = False
    """Continue without the lines and rows that hold no text: broken JSON, no such key, no UTF-8. They are counted by
    reason, and the first of each is named."""
    item_bytes: int = 128_000_000
    """Approximate bytes of text that one work item reads; the memory of a worker grows with it."""
    num_workers: int | None = None
    """Number of tasks that run at a time. If not given, one per CPU of the cluster."""
    download_workers: int | None = None
    """Number of downloads at a time for sources that are not local. If not given, half of num_workers, at least 2."""
    cache_bytes: int = 100_000_000_000
    """Disk space in bytes that each node may use for downloaded files (in GPT25_CACHE, or else ~/.cache/gpt-2.5)."""
    tracking_uri: str | None = None
    """MLflow server or store. If not given, MLFLOW_TRACKING_URI, or else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """Name of the MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self, free=("text_column", "column_separator", "document_separator"))
        require(0 <= self.val_fraction < 1, f"val_fraction is {self.val_fraction}; it must lie in [0, 1)")
        require_positive(self, "item_bytes", "sample_bytes", "cache_bytes", "num_workers", "download_workers")
        require_positive(self, "max_document_bytes")
        require(self.document_separator != "", "document_separator is empty; give the text between documents")
        require(any(self.text_column.split(",")), f"text_column is {self.text_column!r}; name a column")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(ReadingConfig):
    """From a source of raw text to shards and their manifest (jobs/tokenize.py)."""

    output: str = "data/demo"
    """Folder for the shards, their manifest and the tokenizer; it may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."""
    val_fraction: float = 0.005
    """Share of the documents held out for validation, chosen by a hash of their text (but see val_split)."""
    limit_documents: int | None = None
    """Read only this many rows, lines or files, from the start of the source. If not given, all."""
    limit_bytes: int | None = None
    """Read only about this many bytes of text, up to the next row group or range of lines. If not given, all."""
    filters: tuple[Literal["gopher", "c4", "fineweb"], ...] = ()
    """Published rules that leave out bad documents, in the given order: Gopher's for quality and repetition; C4's,
    which also take out lines; FineWeb's own. The manifest counts them by rule. If not given, none."""
    filter_bounds: tuple[str, ...] = ()
    """Changed bounds of these rules, such as gopher.min_words=20 or c4.curly_bracket=off; docs/data.md lists them. If
    not given, the published ones."""
    languages: tuple[str, ...] = ()
    """Languages of the documents that stay, as codes such as en or de: the likeliest language of a document must be
    among them, as fastText's lid.176 tells it. The manifest counts the others by language. If not given, all stay."""
    language_score: float = 0.65
    """Least score of a document's likeliest language, from 0 to 1, for it to stay; FineWeb has 0.65."""
    own_rules: tuple[str, ...] = ()
    """Functions of your own, as PACKAGE.MODULE:FUNCTION, which get a text and return a name for why it is left out, or
    nothing to keep it. If not given, there are none."""
    mask_personal_data: bool = False
    """Replace e-mail addresses and public IP addresses by ones that belong to nobody."""
    filter_report: str | None = None
    """Path of an HTML page to write, about what the rules do to a sample of the source: counts, examples of what goes
    and stays, histograms. It is written again with every call. If not given, none is written."""
    dedup: Literal["off", "exact", "minhash"] = "off"
    """With exact, documents whose text occurred before in the source are left out; with minhash, also those that are
    nearly the same as an earlier one. The source is then read twice."""
    dedup_words: int = 5
    """Words in each of the overlapping runs by which minhash compares documents."""
    dedup_bands: int = 14
    """Bands of minhash: documents are compared if all hashes of one band agree. More bands find less similar ones."""
    dedup_rows: int = 8
    """Hashes in each band of minhash. More of them find only more similar documents."""
    dedup_threshold: float | None = None
    """Smallest share of common runs of words (Jaccard's similarity) at which documents that minhash has found are taken
    for copies. If not given, what minhash has found is not compared again."""
    decontaminate: tuple[str, ...] = field(default=(), metadata={"from_preset": _questions_in_use})
    """Files of evaluation questions (JSON lines or parquet, a question a record; s3://, gs://, https:// and hf:// too),
    or tasks:NAMES[@TASK_FILES] for tasks of jobs/evaluate.py: documents that share 13 words in a row with a question
    are left out and listed. With none there are no such questions. If not given, the HellaSwag questions and the tasks
    that the preset names for training and evaluation."""
    verify: bool = False
    """Write nothing; read the data in --output again and compare it with its manifest."""
    tokenizer: str | None = None
    """A tokenizer.json to encode with. If not given, one is trained on a sample of the source."""
    end_of_text_token: str | None = None
    """Special token of the tokenizer that every document starts with. If not given, <|endoftext|>."""
    train_tokenizer: bool = False
    """Train a tokenizer on a sample of the source, which also happens whenever --tokenizer is not given."""
    nodes: str | None = None
    """Nodes that dry_run counts minutes and dollars for: NUMBERxCPUS, such as 8x16, or a Ray cluster file, whose worker
    types without a GPU count. If not given, cluster.yaml in the current folder, if there is one."""
    price_per_hour: float | None = None
    """Price of one node per hour in dollars, for the cost in dry_run. If not given, dry_run names none."""
    dry_run: bool = False
    """Print the resolved settings, what the source holds, and the minutes and dollars that it takes, from a sample of
    some MB that is read and encoded on this machine; then stop. Nothing is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_vocab_size(self.vocab_size, 257, "256 bytes and <|endoftext|>")
        require_positive(self, "limit_documents", "limit_bytes", "dedup_words", "dedup_bands", "dedup_rows")
        require_positive(self, "price_per_hour")
        if self.decontaminate == ("none",):
            object.__setattr__(self, "decontaminate", ())
        require(all(self.decontaminate), "decontaminate has an empty name; give files of questions, or none")
        require("none" not in self.decontaminate, "decontaminate has none beside files; give either")
        require(
            self.filter_report is None
            or bool(self.filters or self.languages or self.own_rules or self.mask_personal_data),
            "filter_report is a page about rules, but there are none; give --filters, --languages or --own_rules, too",
        )
        require(0 <= self.language_score <= 1, f"language_score is {self.language_score}; it must lie between 0 and 1")
        threshold = self.dedup_threshold
        require(
            threshold is None or 0 < threshold <= 1, f"dedup_threshold is {threshold}; it must lie above 0 and up to 1"
        )
        require(
            not (self.train_tokenizer and self.tokenizer),
            f"train_tokenizer and tokenizer {self.tokenizer} contradict each other; give one of them",
        )


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(ReadingConfig):
    """From a source of raw text to a tokenizer (jobs/train_tokenizer.py)."""

    output: str = "data/tokenizer"
    """Folder for tokenizer.json and summary.json."""
    val_fraction: float = 0.0
    """Share of the documents left out; with the val_fraction of jobs/tokenize.py they are those that it holds out."""
    min_frequency: int = 1
    """Pairs of tokens that occur less often are not merged; above 1 the vocabulary may become smaller."""
    special_tokens: tuple[str, ...] = field(default=("<|endoftext|>",), metadata={"divided_at_commas": True})
    """Names of the special tokens, which get the last ids; jobs/tokenize.py needs <|endoftext|>."""
    pattern: Pattern = "gpt2"
    """Pattern that splits text into pretokens: gpt2, or cl100k as in GPT-4 and Llama 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        num_special = len(self.special_tokens)
        _check_vocab_size(self.vocab_size, 256 + num_special, f"256 bytes and {num_special} special tokens")
        require(self.min_frequency > 0, f"min_frequency is {self.min_frequency}; it must be positive")
        _check_special_tokens(self.special_tokens)


@dataclass(frozen=True, kw_only=True)
class ImportShardsConfig:
    """From files of tokens that others made to a folder of data (jobs/import_shards.py)."""

    train: str = ""
    """Files of tokens to train on, which must be given: a file, folder or glob of .bin files; s3://BUCKET/GLOB,
    gs://BUCKET/GLOB; https://HOST/FILE; or hf://datasets/OWNER/NAME[@REVISION]/GLOB."""
    val: str = ""
    """Files of tokens held out for validation, which must be given too, in the same way; no file may be in both."""
    output: str = "data/imported"
    """Folder for the shards, their manifest and the tokenizer; it may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."""
    headerless: bool = False
    """The files are bare little-endian uint16 tokens without a header, as nanoGPT writes them."""
    tokenizer: str = GPT2_TOKENIZER
    """The tokenizer that made the files: a tokenizer.json, or hf://OWNER/NAME[@REVISION] of the hub. The default is
    GPT-2's, which is fetched from the hub once."""
    eot_id: int | None = None
    """Id of the token between documents. If not given, that of <|endoftext|> in the tokenizer."""
    tracking_uri: str | None = None
    """MLflow server or store. If not given, MLFLOW_TRACKING_URI, or else sqlite in the working folder."""
    experiment: str = "gpt-2.5"
    """Name of the MLflow experiment."""
    dry_run: bool = False
    """Print the resolved settings, then stop."""

    def __post_init__(self) -> None:
        require_plain(self, free=("train", "val"))
        require(self.train != "", "--train is missing; name the files of tokens to train on")
        require(self.val != "", "--val is missing; name the files of tokens to validate on")
        require(self.eot_id is None or self.eot_id >= 0, f"eot_id is {self.eot_id}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The text that jobs/demo.py makes before the other jobs; their settings are the sections of the same preset."""

    stories: str | None = None
    """JSON lines file that is filled with short stories made by rules, unless it is there. If not given, none is made,
    and the source of the section tokenize is read as it is."""
    story_bytes: int = 12_000_000
    """Bytes of text to make."""
    story_seed: int = 1
    """Random seed of the stories; the same seed gives the same stories on every machine."""
    conversations: str | None = None
    """JSON lines file that is filled with conversations about such stories, unless it is there, for --chat. If not
    given, none is made, and the source of the section finetune is read as it is."""
    num_conversations: int = 3000
    """Number of conversations to make."""

    def __post_init__(self) -> None:
        require_plain(self, seeds=("story_seed",))
        require_positive(self, "story_bytes", "num_conversations")


def _check_vocab_size(vocab_size: int, lowest: int, needed: str) -> None:
    require(vocab_size >= lowest, f"vocab_size is {vocab_size}; it must be at least {lowest}: {needed}")
    require(vocab_size <= MAX_TOKENS, f"vocab_size is {vocab_size}; it must be at most {MAX_TOKENS}")


def _check_special_tokens(names: tuple[str, ...]) -> None:
    """What can be known before any text is counted; a name that the merges make too is found afterwards."""
    require(len(set(names)) == len(names), f"special_tokens are {list(names)}; they must differ")
    for name in names:
        require(name != "", f"special_tokens are {list(names)}; none may be empty")
        require(
            len(name) > 1 or not name.isascii(),
            f"special token {name!r} is a single byte, which is a token already; choose a longer name",
        )
        require(_is_utf8(name), f"special token {name!r} is not UTF-8 text; choose another name")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as Python reads bytes of the command line that are not UTF-8
        return False
    return True
