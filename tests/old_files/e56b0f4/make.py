"""Made the files beside this one, with the code of commit e56b0f4: see README.md. Written for that commit's modules."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOME = Path(sys.argv[1])
CHANGED_AT = 1_790_000_000_000_000_000  # time of change of the corpus, nanoseconds since 1970
ITEMS_DONE = 3
NUM_STEPS, STOPPED_AT = 30, 20

TOKENIZER = {"source": "corpus", "vocab_size": 320, "val_fraction": 0.1, "pattern": "cl100k"}
SHARDS = {
    "source": "corpus",
    "tokenizer": "tokenizer/tokenizer.json",
    "item_bytes": 4_000,
    "val_fraction": 0.1,
    "dedup": "exact",
    "num_workers": 1,
}
RUN = {
    "data": "shards",
    "output": "unfinished_run",
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 16,
    "d_ff": 32,
    "context_length": 16,
    "tokens_per_step": 16 * 12,
    "batch_size": 4,
    "train_steps": NUM_STEPS,
    "lr": 1e-3,
    "log_every": 1,
    "val_every": 10,
    "val_tokens": 500,
    "sample_every": 10,
    "sample_tokens": 8,
    "checkpoint_every": 10,
    "keep_checkpoints": 1,
    "num_workers": 1,
    "device": "cpu",
}


def write_corpus() -> None:
    """Some 300 documents in parquet, JSON lines and text; copies among them, other scripts, blank ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    choose = random.Random(56)
    words = ["".join(choose.choices("etaoinshrdlu", k=choose.randrange(1, 9))) for _ in range(80)]
    texts = [" ".join(choose.choices(words, k=choose.randrange(1, 40))) for _ in range(300)]
    texts += ["żółw ½ 日本語 🙂", "<|endoftext|> is no token here", texts[0], texts[150], "It's 1984,\r\n\n  isn't IT?"]
    folder = HOME / "corpus"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts[:150]}), folder / "a.parquet", row_group_size=30, compression="zstd")
    lines = [json.dumps({"text": text}) for text in texts[150:]]
    (folder / "b.jsonl").write_text("\n".join([*lines, '{"text": null}', '{"text": " "}', ""]))
    (folder / "c.txt").write_text("One document\nof two lines.\n")
    for path in folder.iterdir():
        os.utime(path, ns=(CHANGED_AT, CHANGED_AT))


def connect() -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def make_tokenizer() -> None:
    from pipeline.config import TrainTokenizerConfig
    from pipeline.storage import open_folder
    from pipeline.tokenizer_training import train_into

    train_into(TrainTokenizerConfig(**TOKENIZER), open_folder(HOME / "tokenizer"))


def tokenize(output: str) -> int:
    from pipeline import tokenization
    from pipeline.config import TokenizeConfig
    from pipeline.storage import open_folder

    return tokenization.tokenize(TokenizeConfig(**SHARDS), open_folder(HOME / output)).num_items


def tokenize_and_die() -> None:
    """In a process of its own: the driver is killed when ITEMS_DONE items have records and one more has only shards."""
    connect()
    from pipeline import stages

    write = stages.write

    def blocking_write(table: Any, **arguments: Any) -> Iterator[Any]:
        from pipeline import ledger  # the worker's

        if not hasattr(os, "record_blocked"):
            write_item = ledger.write_item

            def blocking_write_item(folder: Any, index: int, part: int, record: Any) -> None:
                if index >= ITEMS_DONE:
                    (HOME / "blocked").touch()
                    time.sleep(600)
                write_item(folder, index, part, record)

            os.record_blocked = True
            ledger.write_item = blocking_write_item
        yield from write(table, **arguments)

    stages.write = blocking_write
    tokenize("unfinished_shards")


def make_unfinished_shards() -> None:
    process = subprocess.Popen([sys.executable, __file__, str(HOME), "tokenize_and_die"])
    while not (HOME / "blocked").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(10)  # Ray's processes notice that their driver is gone
    (HOME / "blocked").unlink()


def make_runs(expected: dict[str, Any]) -> None:
    """unfinished_run ends without a word behind step 24, saved at 20; finished_run goes on from there to the end."""
    import torch

    from pipeline.config import PretrainConfig
    from pipeline.exporting import export
    from pipeline.config_use import ExportConfig
    from pipeline.trainer import Trainer

    torch.set_num_threads(1)
    config = PretrainConfig(**RUN)
    trainer, _ = make_trainer(config)
    step = 0
    while step < STOPPED_AT + 4:
        step = trainer.advance(step)
    trainer.writer.wait()
    trainer.tracker.flush()
    forget_locks()
    shutil.copytree(HOME / "unfinished_run", HOME / "finished_run")
    config = dataclasses.replace(config, output="finished_run")
    trainer, memory = make_trainer(config)
    assert trainer.start_step == STOPPED_AT
    expected["state"] = {str(STOPPED_AT): hashes(trainer)}
    steps = range(STOPPED_AT, NUM_STEPS)
    expected["windows"] = {str(step): trainer.order.step_windows(step).tolist() for step in steps}
    expected["batches"] = {str(step): hash_of_batches(trainer, step) for step in steps}
    summary = trainer.run()
    expected["state"][str(NUM_STEPS)] = hashes(trainer)
    expected["summary"] = dataclasses.asdict(summary)
    expected["losses"] = {str(step): loss.hex() for step, loss in memory.metrics["train/loss"]}
    expected["val_losses"] = {str(step): loss.hex() for step, loss in memory.metrics["val/loss"]}
    export(ExportConfig(checkpoint=str(HOME / "unfinished_run"), output=str(HOME / "export")))
    expected["export"] = contents(HOME / "export")


def make_trainer(config: Any) -> tuple[Any, Any]:
    import torch

    from pipeline.mlflow_run import open_run
    from pipeline.mlflow_tracker import MLflowTracker
    from pipeline.parallel import Workers
    from pipeline.storage import open_folder
    from pipeline.tracking import MemoryTracker, Trackers
    from pipeline.trainer import Trainer

    output = open_folder(HOME / config.output)
    output.make()
    run = open_run(tracking_uri=None, experiment="e", folder=output, working_folder=HOME, job="pretrain")
    memory = MemoryTracker()
    tracker = Trackers(MLflowTracker(run, output), memory)
    workers = Workers(rank=0, world_size=1, device=torch.device("cpu"))
    trainer = Trainer(config, data=HOME / config.data, output=output, workers=workers, tracker=tracker)
    if config.output == "unfinished_run":
        trainer._announce()
    return trainer, memory


def hashes(trainer: Any) -> dict[str, str]:
    """sha256 of the bytes of every tensor that a resumed run needs."""
    from pipeline.checkpoint import training_state

    state = training_state(trainer.model, trainer.optimizer)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sorted(state.items())}


def hash_of_batches(trainer: Any, step: int) -> str:
    digest = hashlib.sha256()
    for batch in trainer.loader.step(step):
        digest.update(batch.inputs.numpy().astype("<i8").tobytes() + batch.targets.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forget_locks() -> None:
    for path in HOME.rglob("*.lock"):
        path.unlink()


def processor() -> str:
    """Vendor, family, model of this machine's processor."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    return " ".join(values[name] for name in ("vendor_id", "cpu family", "model"))


def main() -> None:
    import torch

    HOME.mkdir(parents=True)
    os.chdir(HOME)
    write_corpus()
    connect()
    make_tokenizer()
    num_items = tokenize("shards")
    import ray

    ray.shutdown()
    make_unfinished_shards()
    done = len(list((HOME / "unfinished_shards/items").glob("0*.json")))
    assert done == ITEMS_DONE < num_items, (done, num_items)
    expected: dict[str, Any] = {
        "made_by": {"torch": torch.__version__, "processor": processor()},
        "configs": {"tokenizer": TOKENIZER, "shards": SHARDS, "run": RUN},
        "items": {"all": num_items, "done": done},
        "shards": contents(HOME / "shards"),
        "tokenizer": contents(HOME / "tokenizer"),
    }
    make_runs(expected)
    for name in ("report.html", "curves.png"):
        (HOME / "finished_run" / name).unlink()
    shutil.rmtree(HOME / "unfinished_run/checkpoints/step-000010")
    (HOME / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    tokenize_and_die() if sys.argv[2:] == ["tokenize_and_die"] else main()
