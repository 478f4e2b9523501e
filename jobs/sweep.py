"""Train many networks with different settings: ``python jobs/sweep.py --config FILE --vary lr=1e-3,3e-3``; see --help.

Takes the flags of jobs/pretrain.py, too. The same command again goes on: trials that have ended stay as they are,
others resume from their newest checkpoint, and those that failed are tried again.
"""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import guarded, print_table
from pipeline.config.command_line import resolve_with_rest
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.sweep.trials import PROGRAM, plan_trials


def main() -> None:
    config, shared = resolve_with_rest(
        SweepConfig, "sweep", sys.argv[1:], rest=(PretrainConfig, "pretrain"), program=PROGRAM
    )
    trials = plan_trials(config, shared)
    if config.dry_run:
        print_table(f"sweep: {len(trials)} trials", [_settings(trial.name, trial.varied) for trial in trials])
        return
    print(f"sweep: starting, {len(trials)} trials", file=sys.stderr, flush=True)
    from pipeline.paths import resolve_output
    from pipeline.run_files import REPORT_FILE
    from pipeline.sweep import sweep_job
    from pipeline.sweep.results import TABLE_FILE, best_of, table

    results, mlflow_run = sweep_job.sweep(config, trials)
    print("\n" + "\n".join(table(results)))
    output = resolve_output(config.output)
    best = best_of(results)
    rows = [("trials", f"{len(results)}, {sum(result.has_ended for result in results)} with a result")]
    if best is not None:
        rows.append(("best", f"{best.name}, val loss {best.val_loss:.4f}, {_settings('', best.varied)[1]}"))
    rows += [("failed", f"{result.name}: {result.error}") for result in results if result.error]
    rows += [
        ("report", f"{output}/{REPORT_FILE}"),
        ("table", f"{output}/{TABLE_FILE}"),
        ("MLflow", mlflow_run.location),
    ]
    print_table("sweep: done", rows)


def _settings(name: str, varied: dict[str, str]) -> tuple[str, str]:
    return name, ", ".join(f"{setting} {value}" for setting, value in varied.items())


if __name__ == "__main__":
    guarded(main, resume="goes on with the trials that have not ended")
