"""``ray up -y cluster.onprem.yaml`` on three machines of our own making, from the first command to ``ray down``.

The tests share one cluster and run in the order in which they stand here. Figures go to docs/cluster.md (pytest -s).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import Host, missing_programs, running_hosts, wait_until
from tests.support.planted_corpus import FLAGS, planted_corpus
from tests.support.rented import HEAD, ROOT, SECRETS, WORKERS, Rented, bucket, finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PRESET = """
tokenize:
  {{source: 'raw/{name}/*.jsonl', output: data/{name}, vocab_size: 1024, sample_bytes: 2000000, val_fraction: 0.02,
   item_bytes: {item_bytes}}}
pretrain:
  {{data: data/small, output: runs/{name}, num_layers: 2, num_heads: 2, d_model: 64, d_ff: 128, context_length: 64,
   tokens_per_step: 2048, batch_size: 8, train_steps: {steps}, lr: 3.0e-3, num_workers: 4, device: cpu, val_every: 50,
   val_tokens: 4096, sample_every: 1000, checkpoint_every: 10}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Rented]:
    if os.geteuid() != 0 or missing_programs():
        pytest.skip(f"needs root and these programs: {', '.join(missing_programs())}")
    with running_hosts([HEAD, *WORKERS, "outside"]) as hosts, bucket() as client:
        rented = Rented(hosts)
        rented.bucket = client
        put_text(client, "small", files=8, megabytes=1)
        started = time.monotonic()
        rented.up()
        up_seconds = time.monotonic() - started
        try:
            rented.open_tunnel()
            report(f"ray up: {up_seconds:.0f} s; both workers there {rented.await_nodes(3):.0f} s later")
            yield rented
        finally:
            rented.close_tunnel()


def report(line: str) -> None:
    """A figure for the documentation."""
    sys.stdout.write(f"[cluster] {line}\n")


def put_text(client: Any, name: str, *, files: int, megabytes: float) -> None:
    """Sources of the standard library as documents, in ``files`` JSON lines files."""
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in Path(os.__file__).parent.glob("*.py")]
    documents = [source[start : start + 4000] for source in sources for start in range(0, len(source), 4000)]
    position = 0
    for number in range(files):
        lines, size = [], 0
        while size < megabytes * 1e6:
            text = f"{number} {position}\n{documents[position % len(documents)]}"
            lines.append(json.dumps({"text": text}))
            size, position = size + len(text), position + 1
        body = "\n".join(lines).encode()
        client.put_object(Bucket="gpt25", Key=f"home/raw/{name}/{number:03d}.jsonl", Body=body)


def write_preset(cluster: Rented, name: str, *, steps: int = 30, item_bytes: int = 500_000) -> str:
    path = cluster.hosts.base / f"{name}.yaml"
    path.write_text(PRESET.format(name=name, steps=steps, item_bytes=item_bytes))
    return str(path)


def read_json(cluster: Rented, key: str) -> Any:
    return json.loads(cluster.bucket.get_object(Bucket="gpt25", Key=f"home/{key}")["Body"].read())


def test_both_jobs_run_on_all_machines(cluster: Rented) -> None:
    preset = write_preset(cluster, "small")
    assert "tokenize: done" in cluster.submit("tokenize", preset=preset)
    workers = {cluster.hosts[name].address for name in WORKERS}
    places = cluster.addresses("tasks", "in_turn")
    report(f"tokenization tasks ran on {sorted(places)}")
    assert workers & places and len(places) >= 2
    log = cluster.submit("pretrain", preset=preset)
    assert "4 workers on cpu" in log and "pretrain: done" in log
    places = cluster.addresses("actors", "TrainWorker")
    report(f"training workers ran on {sorted(places)}")
    assert len(places) >= 2
    summary = read_json(cluster, "runs/small/summary.json")
    assert summary["steps"] == 30 and summary["last_loss"] < summary["first_loss"]


def test_mlflow_on_the_head_has_both_runs(cluster: Rented) -> None:
    from mlflow import MlflowClient

    with cluster.mlflow() as address:
        client = MlflowClient(address)
        (experiment,) = [found for found in client.search_experiments() if found.name == "gpt-2.5"]
        runs = {run.data.tags["job"]: run for run in client.search_runs([experiment.experiment_id])}
        artifacts = [entry.path for entry in client.list_artifacts(runs["tokenize"].info.run_id)]
    assert {job: run.info.status for job, run in runs.items()} == {"tokenize": "FINISHED", "pretrain": "FINISHED"}
    summary = read_json(cluster, "runs/small/summary.json")
    assert runs["pretrain"].data.metrics["train/loss"] == pytest.approx(summary["last_loss"])
    assert "manifest.json" in artifacts and experiment.artifact_location.startswith("mlflow-artifacts:")


def test_mlflow_answers_to_its_own_names_only(cluster: Rented) -> None:
    head = cluster.hosts[HEAD]
    ask = "curl -s -o /dev/null -w '%{http_code}' -H 'Host: NAME' http://ADDRESS:5000/"

    def code(name: str, address: str) -> str:
        return head.run(ask.replace("NAME", name).replace("ADDRESS", address)).strip()

    assert code(f"{head.address}:5000", head.address) == "200"
    assert code("localhost:5000", "127.0.0.1") == "200"  # through a tunnel
    assert code("evil.example", head.address) == "403"


def test_outside_only_ssh_answers(cluster: Rented) -> None:
    """Every TCP port, from a machine that is not in the cluster file; then without the firewall, for the record."""
    outside = cluster.hosts["outside"]
    machines = {name: cluster.hosts[name] for name in (HEAD, *WORKERS)}
    assert scan(outside, machines[HEAD].address, machines[WORKERS[0]].address) == {
        machines[HEAD].address: {"22": "ssh"},
        machines[WORKERS[0]].address: {"22": "ssh"},
    }
    ports = {name: set(machine.listening()) for name, machine in machines.items()}
    for name, machine in machines.items():
        rules = machine.run("nft list table inet gpt25")
        machine.run("nft delete table inet gpt25")
        found = scan(outside, machine.address, ports=ports[name])[machine.address]
        (machine.base / "rules.nft").write_text(rules)
        machine.run(f"nft -f {machine.base}/rules.nft")
        programs = machine.listening()
        for port, answer in found.items():
            report(f"{name}:{port} {programs.get(int(port), 'sshd')}: {answer}")
        talkative = {programs.get(int(port), "") for port, answer in found.items() if answer.startswith("http 200")}
        assert len(talkative) <= (4 if name == HEAD else 1), talkative  # MLflow, and pages of metrics
        assert not [answer for answer in found.values() if "=OK" in answer]  # no call of Ray's goes without a token
        assert "8265" not in found  # the dashboard and its job API


def scan(outside: Host, *addresses: str, ports: Collection[int] = ()) -> dict[str, dict[str, str]]:
    """What answers at ``addresses``, at ``ports`` or at any."""
    chosen = f"--ports={','.join(map(str, ports))}" if ports else ""
    script = ROOT / "tests/support/scan.py"
    return dict(json.loads(outside.run(f"{sys.executable} {script} {' '.join(addresses)} {chosen}", seconds=900)))


def test_a_second_ray_up_disturbs_neither_mlflow_nor_the_bucket_and_sets_the_firewall(cluster: Rented) -> None:
    """The file is unchanged, so Ray's updater skips the setup commands; what starts Ray sets the rules."""
    head = cluster.hosts[HEAD]
    before = head.run("pgrep -f 'mlflow server'").split()
    head.run("nft delete table inet gpt25")
    started = time.monotonic()
    cluster.up()
    report(f"second ray up: {time.monotonic() - started:.0f} s")
    assert scan(cluster.hosts["outside"], head.address) == {head.address: {"22": "ssh"}}
    cluster.open_tunnel()
    report(f"both workers there {cluster.await_nodes(3):.0f} s later")
    assert head.run("pgrep -f 'mlflow server'").split() == before
    assert "tokenize: done before" in cluster.submit("tokenize", preset=write_preset(cluster, "small"))


def test_raw_parquet_through_all_stages_on_all_machines(cluster: Rented) -> None:
    """Rules, near-duplicates and decontamination in one command; source, questions and output are in the bucket."""
    corpus = planted_corpus()
    for name, body in corpus.parquet(8).items():
        cluster.bucket.put_object(Bucket="gpt25", Key=f"home/raw/planted/{name}", Body=body)
    cluster.bucket.put_object(Bucket="gpt25", Key="home/questions.jsonl", Body=corpus.question_lines())
    preset = write_preset(cluster, "planted", item_bytes=20_000)
    places = ["--source=raw/planted/*.parquet", "--decontaminate=questions.jsonl"]
    flags = [*FLAGS, *places, "--vocab_size=300", "--val_fraction=0.1"]
    before = {row["task_id"] for row in cluster.listed("tasks")}
    started = time.monotonic()
    assert "tokenize: done\n" in cluster.submit("tokenize", *flags, preset=preset)
    report(
        f"all stages on {len(corpus.texts)} documents, from submission to the end: {time.monotonic() - started:.0f} s"
    )
    names = {row["node_id"]: row["node_ip"] for row in cluster.listed("nodes")}
    rows = [row for row in cluster.listed("tasks") if row["task_id"] not in before and row.get("node_id")]
    machines = {names[row["node_id"]] for row in rows if "in_turn" in str(row.get("name"))}
    report(f"its tasks ran on {sorted(machines)}")
    assert len(machines) >= 2
    manifest = read_json(cluster, "data/planted/manifest.json")
    assert manifest["skipped"] == corpus.skipped
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(corpus.kept)
    assert manifest["settings"]["dedup"] == "minhash" and len(manifest["inputs"]) == 8
    assert manifest["settings"]["evaluation_sets"][0].startswith("questions.jsonl ")
    body = cluster.bucket.get_object(Bucket="gpt25", Key="home/data/planted/contaminated.jsonl")["Body"].read()
    found = [json.loads(line)["question"] for line in body.splitlines()]
    assert found == [question for _, question in corpus.listed]
    assert "tokenize: done before\n" in cluster.submit("tokenize", *flags, preset=preset)
    assert "nothing is wrong" in cluster.submit("tokenize", *flags, "--verify", preset=preset)


def test_a_machine_that_dies_while_tokenizing(cluster: Rented) -> None:
    put_text(cluster.bucket, "large", files=24, megabytes=8)
    preset = write_preset(cluster, "large", item_bytes=8_000_000)
    job = cluster.start("tokenize", preset=preset)
    victim = cluster.hosts[WORKERS[1]]
    wait_until(lambda: works(victim, "in_turn"), 300, "no task came to the machine")
    victim.switch_off()
    died = time.monotonic()
    log = finish(job)
    assert "tokenize: done" in log
    report(f"tokenization done {time.monotonic() - died:.0f} s after a machine died")
    assert "nothing is wrong" in cluster.submit("tokenize", "--verify", preset=preset)


def works(host: Host, name: str) -> bool:
    return any(line.startswith("ray::") and name in line for line in host.processes())


def test_a_machine_that_comes_back_joins_again(cluster: Rented) -> None:
    cluster.hosts.switch_on(WORKERS[1])
    report(f"a machine that was switched on again joined after {cluster.await_nodes(3, 600):.0f} s")
    address = cluster.hosts[WORKERS[1]].address
    assert scan(cluster.hosts["outside"], address) == {address: {"22": "ssh"}}, "the restart has forgotten the firewall"


def test_a_machine_that_dies_while_training(cluster: Rented) -> None:
    preset = write_preset(cluster, "long", steps=400)
    job = cluster.start("pretrain", preset=preset)
    wait_until(lambda: len(checkpoints(cluster)) > 0, 400, "no checkpoint came")
    # Four workers may find room on two of the three machines.
    victim = next(cluster.hosts[name] for name in WORKERS if works(cluster.hosts[name], "TrainWorker"))
    victim.switch_off()
    died, newest = time.monotonic(), max(checkpoints(cluster))
    recovered = wait_until(lambda: max(checkpoints(cluster)) > newest + 10, 600, "no further checkpoint came")
    report(f"a new checkpoint {recovered:.0f} s after a machine died")
    assert "pretrain: done" in finish(job, 1500)
    report(f"training done {time.monotonic() - died:.0f} s after a machine died")
    assert read_json(cluster, "runs/long/summary.json")["steps"] == 400


def checkpoints(cluster: Rented) -> list[int]:
    """Steps of the checkpoints that are whole."""
    answer = cluster.bucket.list_objects_v2(Bucket="gpt25", Prefix="home/runs/long/checkpoints/")
    names = [entry["Key"] for entry in answer.get("Contents", [])]
    return [int(name.split("/")[-2].rpartition("-")[2]) for name in names if name.endswith("/checkpoint.json")]


def test_no_secret_is_written_anywhere(cluster: Rented) -> None:
    """What the runs above wrote: the bucket, every file of every machine, and what the dashboard tells."""
    entries = {
        key["Key"]: cluster.bucket.get_object(Bucket="gpt25", Key=key["Key"])["Body"].read()
        for page in cluster.bucket.get_paginator("list_objects_v2").paginate(Bucket="gpt25")
        for key in page.get("Contents", [])
    }
    shown = ("/api/jobs/", "/api/v0/tasks?detail=1&limit=10000", "/api/v0/actors?detail=1&limit=10000")
    entries |= {path: cluster.page(path) for path in (*shown, "/api/train/v2/runs/v1", "/nodes?view=details")}
    for name in (HEAD, *WORKERS):
        base = cluster.hosts[name].base
        for path in (path for path in base.rglob("*") if path.is_file() and not path.is_symlink()):
            if path.name != ".gpt-2.5.env":
                entries[str(path.relative_to(base.parent))] = path.read_bytes()
    assert len(entries) > 100
    assert b"jobs/pretrain.py" in entries["/api/jobs/"]
    leaks = [
        f"{name} in {place}"
        for name, secret in SECRETS.items()
        for place, content in entries.items()
        if secret.encode() in content
    ]
    assert not leaks


def is_idle(host: Host) -> bool:
    return not host.processes()


def test_ray_down_leaves_nothing(cluster: Rented) -> None:
    cluster.close_tunnel()
    log = cluster.command("ray", "down", "-y", str(cluster.file))
    assert "No nodes remaining" in log
    hosts = {name: host for name, host in cluster.hosts.hosts.items() if name in (HEAD, *WORKERS) and host.is_on}
    assert len(hosts) == 2  # one died in training
    for name, host in hosts.items():
        seconds = wait_until(functools.partial(is_idle, host), 240, f"{name}: {host.processes()}")
        report(f"{name}: nothing runs {seconds:.0f} s after ray down")
        assert not host.listening()
