"""A checkpoint as a Hugging Face folder: ``python jobs/export.py runs/demo --output export/demo``; see --help.

transformers, vLLM and lm-evaluation-harness read the folder, and every job here takes it back as its --checkpoint.
``--format gguf`` writes a file for llama.cpp and ollama instead. The same command again writes it anew.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import print_table, run
from pipeline.config.inference import ExportConfig


def main(config: ExportConfig) -> None:
    from pipeline.pretrained import export_job

    report = export_job.export(config)
    files = f"{len(report.files)} file{'s' if len(report.files) > 1 else ''}"
    print_table(
        "export: done",
        [
            ("checkpoint", report.source),
            ("parameters", f"{report.parameters:,}, {report.dtype}"),
            ("weights", f"{report.weight_bytes / 1e6:,.1f} MB in {files}"),
            ("output", report.output),
            *([("hub", report.hub)] if report.hub else []),
            *([("MLflow model", report.mlflow_model)] if report.mlflow_model else []),
        ],
    )


if __name__ == "__main__":
    run(ExportConfig, main, section="export", resume="begins again")
