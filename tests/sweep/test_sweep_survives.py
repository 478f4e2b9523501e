"""A sweep of 8 trials on two cores: a killed trial, a killed worker and a killed driver, and MLflow in a browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from playwright.sync_api import expect, sync_playwright

from pipeline.storage.folders import open_folder
from pipeline.tracking.journal import read_journal
from pipeline.tracking.run_history import RunHistory
from tests.support.mlflow_server import serve
from tests.support.ray_environment import own_environment

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STEPS = 400
WAIT_SECONDS = 3000  # a guard against hangs; Ray gives its workers little of a busy machine
TRAINING = {
    **{"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 64, "context_length": 32, "tokens_per_step": 512},
    **{
        "batch_size": 4,
        "train_steps": STEPS,
        "log_every": 1,
        "val_tokens": 200,
        "val_every": 50,
        "sample_every": STEPS,
    },
    **{"sample_tokens": 8, "checkpoint_every": 10, "num_workers": 1, "device": "cpu"},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(9000)]


class Job:
    """The command of a sweep, as a user gives it, a first time and again."""

    def __init__(self, home: Path, data: Path, uri: str) -> None:
        self.home, self.output, self.log_path = home, home / "sweep", home / "log"
        flags = [f"--{name}={value}" for name, value in {**TRAINING, "data": data, "tracking_uri": uri}.items()]
        self.flags = flags
        vary = ["--vary", "lr=1e-3,2e-3,5e-3,1e-2", "beta2=0.95,0.99", "--output", "sweep"]
        self.command = [sys.executable, str(ROOT / "jobs/sweep.py"), *flags, *vary]
        own = {name: value for name, value in own_environment().items() if not name.startswith("MLFLOW_")}
        self.environment = {**own, "GPT25_HOME": str(home)}
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            self.driver = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.driver

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of this sweep's cluster by the name that Ray gives them."""
        children = psutil.Process(self.driver.pid).children(recursive=True)
        return [child for child in children if child.is_running() and name in " ".join(child.cmdline())]

    def results(self) -> list[dict[str, Any]]:
        path = self.output / "results.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def statuses(self) -> list[str]:
        return [result["status"] for result in self.results()]

    def steps(self, index: int) -> int:
        """Steps that the trial has logged."""
        history = RunHistory.from_journal(read_journal(open_folder(self.output / f"trial-{index:03d}")))
        return max(history.metrics.get("train/loss", {0: 0.0}))

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert self.driver.poll() is None, f"ended before {what}\n{self.log()[-5000:]}"
            assert time.monotonic() < deadline, f"no {what}\n{self.log()[-5000:]}"
            time.sleep(0.05)
        return found

    def running(self, least: int) -> int | None:
        """A trial that has done ``least`` steps and has some left."""
        for index, status in enumerate(self.statuses()):
            if status == "running" and least <= self.steps(index) < STEPS // 2:
                return index
        return None


def lives(job: Job, index: int) -> int:
    """How often a rank 0 of the trial began."""
    journal = (job.output / f"trial-{index:03d}/tracking.jsonl").read_text().splitlines()
    return sum(json.loads(line)["kind"] == "start" for line in journal)


def kill(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        process.kill()


def survive(job: Job) -> None:
    """Kill the processes of the trials, the workers, the driver, while they train; the same command ends the sweep."""
    job.wait_for(lambda: job.running(20) is not None, "a trial that trains")
    kill(job.processes("TrialProcess"))
    job.wait_for(lambda: "lost: the process of" in job.log(), "a notice of the lost process")
    job.wait_for(lambda: job.statuses().count("finished") >= 2 and job.running(20) is not None, "two finished trials")
    kill(job.processes("RayTrainWorker"))
    job.wait_for(lambda: job.statuses().count("finished") >= 4 and job.running(20) is not None, "four finished trials")
    finished = [result["name"] for result in job.results() if result["status"] == "finished"]
    ended = {name: (job.output / name / "summary.json").stat().st_mtime_ns for name in finished}
    of_the_cluster = psutil.Process(job.driver.pid).children(recursive=True)
    job.driver.send_signal(signal.SIGKILL)
    job.driver.wait()
    _, alive = psutil.wait_procs(of_the_cluster, timeout=180)
    assert not [process for process in alive if "ray::" in " ".join(process.cmdline())], "Ray ends with its driver"
    job.start()
    assert job.driver.wait(WAIT_SECONDS) == 0, job.log()[-5000:]
    assert {name: (job.output / name / "summary.json").stat().st_mtime_ns for name in ended} == ended
    assert job.statuses() == ["finished"] * 8


def test_eight_trials_survive_a_killed_trial_and_a_killed_driver(tiny_data: Path, tmp_path: Path) -> None:
    with serve(f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "artifacts") as (url, _):
        job = Job(tmp_path, tiny_data, url)
        try:
            survive(job)
        finally:
            if job.driver.poll() is None:
                job.driver.kill()
                job.driver.wait()
        again = [index for index in range(8) if lives(job, index) > 1]
        assert sum(lives(job, index) - 1 for index in again) >= 3, "each kill met a trial that trained"
        check_bits(job, again, tiny_data)
        check_mlflow(job, url, tmp_path)


def check_bits(job: Job, indexes: list[int], data: Path) -> None:
    """Trials that were killed have the losses of runs that nobody disturbed."""
    for index in indexes[:3]:
        varied = [f"--{name}={value}" for name, value in job.results()[index]["varied"].items()]
        output = f"clean-{index}"
        command = [sys.executable, str(ROOT / "jobs/pretrain.py"), *job.flags, *varied, f"--output={output}"]
        subprocess.run([*command, "--experiment=clean"], env=job.environment, check=True, capture_output=True)
        ours = RunHistory.from_journal(read_journal(open_folder(job.output / f"trial-{index:03d}"))).metrics
        clean = RunHistory.from_journal(read_journal(open_folder(job.home / output))).metrics
        assert len(clean["train/loss"]) == STEPS
        for name in ("train/loss", "val/loss", "train/grad_norm"):
            assert ours[name] == clean[name], (index, name)


def check_mlflow(job: Job, url: str, folder: Path) -> None:
    """One parent and eight children in the store, and both on MLflow's page in a browser."""
    client = MlflowClient(url)
    record = json.loads((job.output / "mlflow_run.json").read_text())
    children = client.search_runs(
        [record["experiment_id"]], f"tags.`mlflow.parentRunId` = '{record['run_id']}'", order_by=["tag.mlflow.runName"]
    )
    assert sorted(child.info.run_name for child in children) == [f"pretrain trial-{index:03d}" for index in range(8)]
    assert {child.info.status for child in children} == {"FINISHED"}
    for child in children:
        points = client.get_metric_history(child.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1)), "no point is missing or doubled"
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{url}/#/experiments/{record['experiment_id']}/runs?workflowType=machine_learning")
        parent = page.get_by_role("row").filter(has=page.get_by_text("sweep sweep", exact=True)).first
        parent.get_by_role("button").first.click(timeout=300_000)  # the page shows children once their parent is opened
        for index in range(8):
            expect(page.get_by_text(f"pretrain trial-{index:03d}", exact=True).first).to_be_visible(timeout=300_000)
        page.screenshot(path=str(folder / "runs.png"))
        page.goto(f"{url}/#/experiments/{record['experiment_id']}/runs/{record['run_id']}/artifacts/report.html")
        report = page.frame_locator("iframe").first
        expect(report.get_by_role("heading", name="Trials", exact=True)).to_be_visible(timeout=300_000)
        page.screenshot(path=str(folder / "report.png"))
        browser.close()
