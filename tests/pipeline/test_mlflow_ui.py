"""What a person sees of a run: the MLflow UI in a real headless browser."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from pipeline.storage import open_folder
from pipeline.tracking import MLflowTracker, RunInput, open_run

# Chromium would look up its maker's hosts at every start; a test needs this machine only.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture
def chromium() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in CHROMIUM")
    return path


def test_the_run_its_curves_and_its_lineage_are_on_the_page(
    mlflow_server: tuple[str, subprocess.Popen[bytes]], chromium: str, tmp_path: Path
) -> None:
    url, _ = mlflow_server
    run = open_run(
        tracking_uri=url,
        experiment="gpt-2.5",
        folder=open_folder(tmp_path / "my-run"),
        working_folder=tmp_path,
        job="pretrain",
    )
    tracker = MLflowTracker(run)
    tracker.log_params({"d_model": 128})
    tracker.log_inputs([RunInput(name="my-data", fingerprint="f" * 64, source="data/my-data", context="training")])
    for step in range(1, 6):
        tracker.log_metrics({"train/loss": 8 - step, "val/loss": 8.5 - step}, step)
    tracker.log_checkpoint(5, tmp_path / "step-000005", {"train_loss": 3.0})
    tracker.finish("FINISHED")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *QUIET])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        check_run_page(page, run.location)
        browser.close()


def check_run_page(page: Page, location: str) -> None:
    page.goto(location)
    expect(page.get_by_text("my-run").first).to_be_visible(timeout=60_000)
    for text in ("d_model", "train/loss", "val/loss", "my-data", "step-000005"):
        expect(page.get_by_text(text).first).to_be_visible(timeout=30_000)
    page.goto(f"{location}/model-metrics")
    expect(page.locator(".js-plotly-plot").first).to_be_visible(timeout=60_000)
