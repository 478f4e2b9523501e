"""``make ui``: MLflow's pages on this machine, opened at the newest run of the store.

The server gets the store's address by its environment: a command line shows its passwords to every user.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

from pipeline.console import log_plainly
from pipeline.paths import working_folder
from pipeline.redaction import redact
from pipeline.tracking.mlflow_run import MLflowRun, mlflow_client, mlflow_errors, mlflow_uri
from pipeline.tracking.store_errors import trouble_of

logger = logging.getLogger("pipeline.tracking.mlflow_ui")  # __name__ is __main__ under python -m

PORT = 5000
_START_SECONDS = 120


def newest_run(uri: str) -> MLflowRun | None:
    """The run of this project in the store that began last, one of training if there is any; None in an empty store."""
    client = mlflow_client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for job in ("pretrain", "%"):
        runs = client.search_runs(
            experiments, f"tags.job LIKE '{job}'", max_results=1, order_by=["attributes.start_time DESC"]
        )
        if runs:
            return MLflowRun(tracking_uri=uri, experiment_id=runs[0].info.experiment_id, run_id=runs[0].info.run_id)
    return None


def page_of(run: MLflowRun | None, server: str) -> str:
    """The address of the run's page on a server; of its first page where there is no run."""
    if run is None:
        return server
    return MLflowRun(tracking_uri=server, experiment_id=run.experiment_id, run_id=run.run_id).location


def main() -> None:
    log_plainly()
    logger.setLevel(logging.INFO)
    uri = mlflow_uri(None, working_folder())
    try:
        run = newest_run(uri)
    except mlflow_errors() as error:
        sys.exit(f"error: {trouble_of(error, uri)}")
    if uri.startswith("http"):
        logger.info("the newest run: %s", page_of(run, redact(uri)))
        return
    if run is None:
        logger.info("nothing is tracked in %s yet; make demo does it", redact(uri))
    server = f"http://127.0.0.1:{PORT}"
    process = _start_server(uri)
    try:
        if _answers(process):
            logger.info("MLflow on %s (Ctrl-C stops it); the newest run: %s", server, page_of(run, server))
            if run is not None:
                charts = f"{server}/{run.view}&compareRunsMode=CHART"
                logger.info("all runs, train and val loss in one chart: %s", charts)
            if sys.stderr.isatty() and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
                webbrowser.open(page_of(run, server))
        sys.exit(process.wait())
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()


def _start_server(uri: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("mlflow")), "ui", "--host", "127.0.0.1", "--port", str(PORT)]
    return subprocess.Popen(
        [*command, "--workers", "1"],
        env=os.environ | {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )


def _answers(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server takes connections; False if it has ended instead."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", PORT), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False


if __name__ == "__main__":
    main()
