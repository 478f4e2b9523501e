"""The data of a run: one folder of shards, or several that are mixed, with one tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pipeline.dataset.batches import BatchOrder
from pipeline.dataset.dataset import open_data
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.mixed_order import MixedOrder, MixedStream, Phases
from pipeline.dataset.packed_documents import packed_stream
from pipeline.dataset.shards import TokenStream, open_split
from pipeline.errors import UserError
from pipeline.storage.folders import Folder, as_folder
from pipeline.tokenizer.bpe import Tokenizer

Folders: TypeAlias = Path | Folder | Sequence[Path | Folder]
"""One folder of shards, or those of a mixture."""
ONE_SOURCE: Phases = ((0, (1,)),)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of shards."""

    name: str
    """What it is called in metrics."""
    folder: Folder
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class ValSource:
    """The val set of one source."""

    name: str
    """What it is called in metrics, where there are several."""
    weight: float
    """Its share in the val loss; all sum up to 1."""
    stream: TokenStream


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run is trained and validated on."""

    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    phases: Phases = ONE_SOURCE

    @property
    def manifest(self) -> Manifest:
        """That of the first source; all have the same tokenizer."""
        return self.sources[0].manifest

    @property
    def is_mixture(self) -> bool:
        return len(self.sources) > 1

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, or of those of all sources, hexadecimal."""
        return joint_fingerprint([source.manifest.fingerprint for source in self.sources])

    @property
    def address(self) -> str:
        """The folder, or the mixture as --data takes it."""
        if not self.is_mixture:
            return str(self.sources[0].folder)
        return mixture_text([str(source.folder) for source in self.sources], self.phases[:1])

    @property
    def mixture_text(self) -> str:
        """The folders, weights and phases as a person writes them."""
        return mixture_text([str(source.folder) for source in self.sources], self.phases)

    @property
    def weights(self) -> list[float]:
        """Shares of the sources in the first phase's tokens, which are their weights in the val loss."""
        parts = self.phases[0][1]
        return [part / sum(parts) for part in parts]

    def open_train(self, *, window_length: int, packing: str = "sequential") -> tuple[TokenStream, list[TokenStream]]:
        """The training tokens in windows of ``window_length``, and the streams of the sources behind them.

        With ``packing`` best_fit, the windows hold whole documents (packed_documents.py).
        """
        streams = self._open("train")
        windows = streams
        if packing == "best_fit":
            windows = [
                packed_stream(source.manifest, stream, window_length=window_length)
                for source, stream in zip(self.sources, streams, strict=True)
            ]
        return (MixedStream(windows, window_length=window_length) if self.is_mixture else windows[0]), streams

    def open_val(self) -> list[ValSource]:
        """The val set of each source."""
        return [
            ValSource(name=source.name, weight=weight, stream=stream)
            for source, weight, stream in zip(self.sources, self.weights, self._open("val"), strict=True)
        ]

    def order(
        self, stream: TokenStream, *, window_length: int, windows_per_step: int, batch_size: int, seed: int
    ) -> BatchOrder:
        """The windows of every step of ``stream``, which open_train returned."""
        num_windows = len(stream) // window_length
        if not isinstance(stream, MixedStream):
            return BatchOrder(
                num_windows=num_windows, windows_per_step=windows_per_step, batch_size=batch_size, seed=seed
            )
        return MixedOrder(
            num_windows=num_windows,
            source_windows=stream.source_windows,
            phases=self.phases,
            windows_per_step=windows_per_step,
            batch_size=batch_size,
            seed=seed,
        )

    def _open(self, split: str) -> list[TokenStream]:
        return [open_split(source.folder, split, num_folders=len(self.sources)) for source in self.sources]


def open_sources(folders: Sequence[Folder], names: Sequence[str], phases: Phases) -> TrainingData:
    """The manifests and the tokenizer of all folders.

    Raises:
        UserError: no such data, folders with different tokenizers, or two with the same shards.
    """
    opened = [open_data(folder) for folder in folders]
    sources = tuple(
        Source(name=name, folder=folder, manifest=manifest)
        for name, folder, (_, manifest) in zip(names, folders, opened, strict=True)
    )
    require_mixable(folders, [manifest for _, manifest in opened])
    return TrainingData(tokenizer=opened[0][0], sources=sources, phases=phases)


def require_mixable(folders: Sequence[Folder], manifests: Sequence[Manifest]) -> None:
    """UserError unless all folders have the same tokenizer, and no two the same shards."""
    if len(manifests) > 1 and any(manifest.chat_template for manifest in manifests):
        raise UserError("a folder of packed conversations cannot be mixed with others; fine-tune on it alone")
    for (one, first), (other, second) in itertools.combinations(zip(folders, manifests, strict=True), 2):
        if (first.tokenizer_fingerprint, first.eot_id) != (second.tokenizer_fingerprint, second.eot_id):
            raise UserError(
                f"data folders {one} and {other} have different tokenizers (fingerprint "
                f"{first.tokenizer_fingerprint[:12]}, documents divided by id {first.eot_id}, against "
                f"{second.tokenizer_fingerprint[:12]} and {second.eot_id}); tokenize the texts of one again, into "
                f"another folder, with the --tokenizer and --end_of_text_token of the other"
            )
        if first.fingerprint == second.fingerprint:
            raise UserError(
                f"data folders {one} and {other} hold the same shards; give one of them, with the sum of their weights"
            )


def as_folders(data: Folders) -> list[Folder]:
    """One folder or several as a list."""
    return [as_folder(each) for each in (data if isinstance(data, Sequence) else [data])]


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """The fingerprint of one folder as it is; of several the sha256 of all, hexadecimal."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(json.dumps(list(fingerprints)).encode()).hexdigest()


def mixture_text(names: Sequence[str], phases: Phases) -> str:
    """The weights as a person writes them: data/web:0.7 data/books:0.3, from step 6000 data/web:0.2 data/books:0.8."""

    def weights(parts: Sequence[int]) -> str:
        shares = ((name, part / sum(parts)) for name, part in zip(names, parts, strict=False) if part)
        return " ".join(f"{name}:{share:.4g}" for name, share in shares)

    return "".join(f"{f', from step {step} ' if step else ''}{weights(parts)}" for step, parts in phases)
