"""A process of test_local_ports.py: every rank of ``listening_process.py FOLDER`` writes where it listens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.distributed.process_group import init_distributed
from tests.support.listening import listening


def main() -> None:
    group = init_distributed("cpu")
    dist.all_reduce(torch.ones(1))  # now every rank has connected to every other
    Path(sys.argv[1], str(group.rank)).write_text(json.dumps(listening(os.getpid())))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
