"""Documentation that can be checked: pages that are mentioned exist, every command and each of its options is described, exit codes are stated."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from densemoe.runtime import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (ROOT / "docs" / "commands.md").read_text()


def tracked() -> list[Path]:
    """Text files of the repository: git's list, or what lies in the folders of a source tree without git."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ("compile", "runtime", "artifacts", "tests", "docs", "scripts")
    return [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())]


def parsers() -> dict[str, argparse.ArgumentParser]:
    (actions,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions.choices)


def test_every_page_that_is_mentioned_exists() -> None:
    missing = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json") or path.name == "Makefile":
            for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(errors="replace")):
                if not (ROOT / name).is_file():
                    missing.append(f"{path.relative_to(ROOT)} mentions {name}")
    assert missing == []


def anchors(text: str) -> set[str]:
    """Of a Markdown page's headings, as GitHub makes them: lower case, hyphens for spaces, no punctuation."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def section(name: str) -> str:
    """The section of one command, to the next heading."""
    match = re.search(rf"^## densemoe {name}\n(.*?)(?=^## |\Z)", COMMANDS, re.MULTILINE | re.DOTALL)
    assert match, f"docs/commands.md has no section for {name}"
    return match[1]


@pytest.mark.parametrize("name", sorted(parsers()))
def test_every_command_and_option_is_described(name: str) -> None:
    """The section shows how it is called, with each of the parser's options and no other."""
    text = section(name)
    (synopsis,) = re.findall(rf"`(densemoe {name}\b[^`]*)`", text.replace("*build.* ", ""))[:1]
    described = {f"--{option}" for option in re.findall(r"--(?:\[no-\])?([a-z0-9-]+)", synopsis)}
    options = {
        option
        for action in parsers()[name]._actions
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-") and option != "--help"
    } | {option for action in parsers()[name]._actions for option in action.option_strings[:1] if option.startswith("--no-")}
    assert described == options


def test_no_section_describes_a_command_that_is_gone() -> None:
    assert set(re.findall(r"^## densemoe (\S+)$", COMMANDS, re.MULTILINE)) == set(parsers())


@pytest.mark.parametrize("name", sorted(parsers()))
def test_help_has_an_example_and_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    (example,) = re.findall(r"^example: densemoe (.*)$", said, re.MULTILINE)
    assert example.split()[0] == name
    assert cli._parser().parse_args(example.split()).command == name
    assert "exit codes: 0 done, 1 something failed, 2 wrong usage or input, 3 this machine cannot do it" in said


def test_the_table_of_exit_codes_is_the_programs() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", COMMANDS, re.MULTILINE)]
    assert codes == [cli.OK, cli.FAILED, cli.USAGE, cli.UNAVAILABLE, 130]
