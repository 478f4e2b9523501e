"""The conversations of the chat demo: a user asks for a story, and perhaps for the friends in it; the assistant tells.

The n-th conversation is a function of the seed and n alone, on every machine.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from pipeline.demo.stories import stories
from pipeline.storage.folders import open_folder

SYSTEM = "You tell short stories."
_HERO = re.compile(r"a (\w+ \w+ named \w+)\.")
_FRIENDS = re.compile(r"(\w+ the \w+ and \w+ the \w+) were friends\.$")


def conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """Every conversation of this seed, without an end: messages of role and content."""
    for number, (story, _) in enumerate(stories(seed)):
        random = Random(f"{seed}:{number}:chat")
        hero, friends = _HERO.search(story), _FRIENDS.search(story)
        assert hero is not None and friends is not None
        messages = [{"role": "system", "content": SYSTEM}] if random.random() < 0.2 else []
        messages.append({"role": "user", "content": f"Tell me a story about a {hero[1]}."})
        messages.append({"role": "assistant", "content": story})
        if random.random() < 0.5:
            messages.append({"role": "user", "content": "Who were friends?"})
            messages.append({"role": "assistant", "content": f"{friends[1]}."})
        yield messages


def write_conversations(path: Path, *, count: int, seed: int) -> bool:
    """Write the first conversations, a JSON line {"messages": ...} each; False if the file is there."""
    if path.exists():
        return False
    folder = open_folder(path.parent)
    folder.make()
    lines = (json.dumps({"messages": messages}).encode() + b"\n" for messages in conversations(seed))
    folder.write(path.name, itertools.islice(lines, count))
    return True
