"""What a person sees of a run: the MLflow UI in a real headless browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from pipeline.storage.folders import open_folder
from pipeline.tracking.mlflow_run import MLflowRun, open_run
from pipeline.tracking.mlflow_tracker import MLflowTracker
from pipeline.tracking.tracker import RunInput

# Chromium would look up its maker's hosts at every start; a test needs this machine only.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture
def chromium() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    return path


def finished_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MLflowRun:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    folder = open_folder(tmp_path / "my-run")
    run = open_run(tracking_uri=url, experiment="gpt-2.5", folder=folder, working_folder=tmp_path, job="pretrain")
    tracker = MLflowTracker(run, folder, registered_model="my-model", sample_system=True)
    tracker.log_params({"d_model": 128})
    tracker.log_tags({"commit": "c0ffee", "workers": "4"})
    tracker.log_inputs([RunInput(name="my-data", fingerprint="f" * 64, source="data/my-data", context="training")])
    for step in range(1, 6):
        tracker.log_metrics({"train/loss": 8 - step, "val/loss": 8.5 - step, "perf/tokens_per_second": 1e5}, step)
    tracker.log_sample(5, "Once", "Once upon a time")
    checkpoint = tmp_path / "step-000005"
    tracker.log_checkpoint(5, checkpoint, {"train_loss": 3.0})
    tracker.log_checkpoint(5, checkpoint, {"val_loss": 3.5}, best=True)
    while tracker.journal.last_step["system/cpu_utilization_percentage"] < 0:
        time.sleep(0.05)
    tracker.finish("FINISHED")
    return run


def test_the_run_its_curves_its_lineage_and_its_report_are_on_the_pages(
    mlflow_server: tuple[str, subprocess.Popen[bytes]], chromium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = mlflow_server
    run = finished_run(url, tmp_path, monkeypatch)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *QUIET])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(run.location)
        expect(page.get_by_text("my-run").first).to_be_visible(timeout=300_000)
        expect(page.get_by_text("Agent versions")).to_have_count(0)  # what MLflow shows first is for agents
        location = run.location.partition("?")[0]
        check_run_page(page, location)
        check_report(page, location)
        check_view(page, url, run)
        check_registered_model(page, url)
        browser.close()


def check_run_page(page: Page, location: str) -> None:
    page.goto(location)
    expect(page.get_by_text("my-run").first).to_be_visible(timeout=300_000)
    for text in ("d_model", "train/loss", "val/loss", "my-data", "step-000005", "my-model"):
        expect(page.get_by_text(text).first).to_be_visible(timeout=300_000)
    picture = page.locator("img[src*='curves.png']").first  # MLflow drops its alternative text
    expect(picture).to_be_visible(timeout=300_000)
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 300, "the picture of the curves is there"
    page.goto(f"{location}/model-metrics")
    expect(page.locator(".js-plotly-plot").first).to_be_visible(timeout=300_000)
    page.goto(f"{location}/system-metrics")
    expect(page.get_by_text("cpu_utilization_percentage").first).to_be_visible(timeout=300_000)


def check_view(page: Page, url: str, run: MLflowRun) -> None:
    """Losses and speed are columns of the list, and train and val loss are one chart."""
    page.goto(f"{url}/{run.view}")
    for column in ("train/loss", "val/loss", "perf/tokens_per_second"):
        expect(page.get_by_role("columnheader", name=column).first).to_be_attached(timeout=300_000)
    expect(page.get_by_text("pretrain my-run").first).to_be_visible()
    page.goto(f"{url}/{run.view}&compareRunsMode=CHART")
    expect(page.get_by_text("train/loss vs val/loss")).to_be_visible(timeout=300_000)
    curves = page.locator(".js-plotly-plot").first.locator(".scatterlayer .trace")
    expect(curves).to_have_count(2, timeout=300_000)


def check_report(page: Page, location: str) -> None:
    page.goto(f"{location}/artifacts/report.html")
    report = page.frame_locator("iframe").first
    expect(report.get_by_role("heading", name="Speed and cost")).to_be_visible(timeout=300_000)
    expect(report.get_by_text("c0ffee")).to_be_visible()
    expect(report.get_by_role("img")).to_be_visible()


def check_registered_model(page: Page, url: str) -> None:
    page.goto(f"{url}/#/models/my-model")
    expect(page.get_by_text("@ best").first).to_be_visible(timeout=300_000)
