"""A process that reads remote files through the cache: for tests that kill it, or run several of them side by side.

Arguments: folder, max_bytes, seconds to hold each file, limit of a file's size (0: none), then the files as JSON. For
each file it prints its name and the sha256 of what it read; on a UserError its text.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from pathlib import Path

from pipeline.errors import UserError
from pipeline.remote.download_cache import Cache
from pipeline.remote.remote_file import RemoteFile


def main() -> None:
    folder, max_bytes, hold_seconds, limit_bytes, files = sys.argv[1:]
    if int(limit_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    cache = Cache(Path(folder), int(max_bytes))
    for values in json.loads(files):
        file = RemoteFile(**values)
        try:
            with cache.file(file) as path:
                time.sleep(float(hold_seconds))
                answer = f"{file.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        except UserError as error:
            answer = str(error)
        sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    main()
