"""Text from a checkpoint: ``python jobs/generate.py --checkpoint runs/demo --prompt "..."``; --help lists the flags."""

import os
import sys

# Python puts jobs/ first on the path, where tokenize.py would shadow the standard library's module of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from jobs._run import run
from pipeline.config import GenerateConfig


def main(config: GenerateConfig) -> None:
    from pipeline import cluster, sampling

    for number, text in enumerate(sampling.generate_texts(config, cluster.resolve_path(config.checkpoint)), 1):
        if config.num_samples > 1:
            print(f"--- sample {number} of {config.num_samples}")
        print(text)


if __name__ == "__main__":
    run(GenerateConfig, main, section="generate", resume="begins again")
