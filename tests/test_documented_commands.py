"""Commands in README and docs: every block says whether it is run or why not, and no command has a flag too many.

A block with a command for a shell has an HTML comment in front of it, which no reader sees:

    <!-- run: NAME -->           the slow test below runs it, in a clean clone; NAME says what it needs first
    <!-- not run: REASON -->     it needs a cloud, the hub, a GPU, hours, or is a form to fill in

Run or not, the flags go through the real parsers: those of the jobs, of ray, of mlflow, and the Makefile.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from pipeline.config.command_line import resolve, resolve_with_rest
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import PretrainConfig
from pipeline.errors import UserError
from tests.config.test_help import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (run|not run): (.+?) -->")
COMMAND = re.compile(r"(?:\$ )?((?:\w+=\S* )*(?:python|ray|mlflow|make|curl|gcloud|kubectl|lm_eval|export|\.) .+)")
FORMS = {"FILE": "configs/demo.yaml"}
"""What stands for a value that has to be there to be parsed."""


@dataclass(frozen=True)
class Block:
    """A block of code with a command for a shell."""

    page: str
    line: int
    mark: str
    reason: str
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page, indented by four columns or fenced, that have a command for a shell."""
    found: list[Block] = []
    current: list[str] = []
    start, is_fenced = 0, False
    lines = [*text.split("\n"), "end"]
    for number, line in enumerate(lines, 1):
        is_fence = line.startswith("```")
        is_code = (is_fenced and not is_fence) or (not is_fenced and line.startswith("    "))
        is_fenced ^= is_fence
        if is_code or (current and not line.strip() and not is_fence):
            start = start if current else number
            current.append(line[4:] if line.startswith("    ") else line)
        elif current:
            commands = commands_of(current)
            before = next((each for each in reversed(lines[: start - 1]) if each.strip() and each[:3] != "```"), "")
            mark = MARK.fullmatch(before.strip())
            if commands:
                found.append(Block(page, start, mark[1] if mark else "", mark[2] if mark else "", tuple(commands)))
            current = []
    return found


def commands_of(lines: list[str]) -> list[str]:
    """The commands among the lines of a block: continued lines joined, prompts, comments and explanations cut off."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n")
    matches = [COMMAND.fullmatch(line.strip()) for line in joined if not line.startswith((" ", ">", "#"))]
    return [re.split(r"\s{2,}#|\s{3,}| # |;  ", match[1])[0].strip() for match in matches if match]


BLOCKS = [block for page in PAGES for block in blocks_of(page, (ROOT / page).read_text())]
COMMANDS = [pytest.param(command, id=f"{block}: {command[:60]}") for block in BLOCKS for command in block.commands]


def check(command: str) -> None:
    """Parse a command as what it calls would; AssertionError or UserError for what that would refuse."""
    words = [FORMS.get(word, word) for word in shlex.split(command) if word != "..."]
    while words and re.fullmatch(r"\w+=.*", words[0], flags=re.DOTALL):
        words.pop(0)  # environment variables
    match words:
        case ["python", script, *flags]:
            check_script(script, flags)
        case ["ray", *arguments]:
            if "--" in arguments:
                cut = arguments.index("--")
                check(shlex.join(arguments[cut + 1 :]))
                arguments = arguments[:cut]
            from ray.scripts.scripts import cli

            check_click(cli, arguments)
        case ["mlflow", *arguments]:
            from mlflow.cli import cli as mlflow_cli

            check_click(mlflow_cli, arguments)
        case ["make", *targets]:
            named = [target for target in targets if "=" not in target]
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named), named


def check_script(script: str, flags: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), script
    section = path.stem
    if not script.startswith("jobs/"):
        source = path.read_text()
        named = [flag for flag in flags if flag.startswith("--")]
        missing = [flag for flag in named if not re.search(rf'"{flag}"|^    {flag[2:]}: ', source, re.MULTILINE)]
        assert not missing, f"{script} has no {missing}"
    elif section == "sweep":
        resolve_with_rest(SweepConfig, section, flags, rest=(PretrainConfig, "pretrain"), program=script)
    elif section != "demo":
        resolve(CONFIGS[section], section, flags, program=script)


def check_click(command: click.Command, arguments: list[str]) -> None:
    """Parse the arguments of a command of ray's or mlflow's, without running it."""
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, [*arguments])
        assert found is not None, name
        command, context = found, click.Context(found, parent=context)
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in arguments if word.startswith("-") and word.split("=")[0] not in known]
    assert not unknown, f"{command.name} has no {unknown}"
    for word in arguments:
        if re.fullmatch(r"[\w./-]+\.yaml", word) and word != "pretrain.yaml":
            assert (ROOT / word).is_file(), word


def test_the_blocks_are_found() -> None:
    pages = {block.page for block in BLOCKS}
    assert {"README.md", "docs/cluster.md", "docs/using_the_model.md"} <= pages and len(COMMANDS) > 60


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_whether_it_is_run(block: Block) -> None:
    assert block.mark, f"{block} needs <!-- run: NAME --> or <!-- not run: REASON --> in front of it"
    assert block.mark == "not run" or block.reason in PREPARED, f"{block}: {block.reason} is not known here"
    assert block.mark == "run" or len(block.reason) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_every_command_are_known(command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python jobs/pretrain.py --num_layer 3",
        "python jobs/nothing.py",
        "python benchmarks/gpu.py --nothing",
        "ray job submit --working-dirs . -- python jobs/pretrain.py",
        "ray job submit --working-dir . -- python jobs/pretrain.py --nothing 1",
        "ray up no-such-file.yaml",
        "make nothing",
        "mlflow ui --nothing",
    ],
)
def test_a_wrong_flag_would_be_seen(command: str) -> None:
    with pytest.raises((AssertionError, UserError, click.UsageError)):
        check(command)


def test_blocks_are_read_as_a_person_reads_them() -> None:
    text = "<!-- run: a -->\n    $ make a   does a\n    output\n\n    python b.py \\\n        --c 1  # why\n\nend\n"
    (block,) = blocks_of("page", text)
    assert block.commands == ("make a", "python b.py --c 1") and (block.mark, block.reason) == ("run", "a")
    (fenced,) = blocks_of("page", "<!-- not run: it costs money -->\n```sh\nray up cluster.yaml\n```\nmake x y\n")
    assert fenced.commands == ("ray up cluster.yaml",) and fenced.mark == "not run"


def own_text(clone: Path) -> None:
    """The texts that README's section on one's own text reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    names = [first + second for first, second in itertools.product(parts, parts)]  # words enough for 1,000 ids
    stories = [
        f"Once there was a cat called {name} with {len(name)} hats. It liked fish and slept." for name in names[:900]
    ]
    (clone / "stories-train.txt").write_text("\n<|endoftext|>\n".join(stories))
    (clone / "input.txt").write_text("\n".join(stories))
    (clone / "spark").mkdir()
    pq.write_table(pa.table({"text": stories}), clone / "spark/part-00000.parquet")
    (clone / "spark/_SUCCESS").touch()


PREPARED = {"own text": own_text}
"""What a block needs before it, by the name in its comment."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark == "run"], ids=str)
def test_the_commands_run_in_a_clean_clone_as_printed(block: Block, tmp_path: Path) -> None:
    """With a fresh home, and the environment activated as README says; each ends with the table of a done job."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    home.mkdir()
    PREPARED[block.reason](clone)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "GPT25_"))}
    environment = kept | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert shutil.which("python", path=environment["PATH"]) == sys.executable
    for command in block.commands:
        done = subprocess.run(
            command, check=False, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=1800
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        job = re.search(r"jobs/(\w+)\.py", command)
        assert job is None or f"\n{job[1]}: done\n" in done.stdout, said[-3000:]
        assert "Traceback" not in said
