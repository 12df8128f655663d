#!/usr/bin/env python3
"""Checks the documents: that what they point to exists, and that every record of a result says where it comes from.

    python3 dev/test_links.py

1. In every *.md: relative links and images, and paths in backticks that begin with a folder of the repository.
2. In every *.md, *.h, *.cuh, *.cu, *.cpp, *.py and *.sh: dev/results/NAME and dev/doc/NAME.
3. dev/results: under 2 MB; every folder has a README.md with device, date, commit and command, is in the index
   dev/results/README.md, and holds no path of a machine; run.sh, where there is one, is bash. A folder whose runs are
   prepared and not made says so with the line NOT_RUN, a prediction and the command, is in the index's section
   "Prepared, not run", and holds no CSV.

Files are those that git tracks or would track. Exit code 1, after a line a fault; 0 else. Needs git and bash, no packages.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "dev" / "results"
LIMIT = 2_000_000  # bytes of dev/results
SOURCES = {".md", ".h", ".cuh", ".cu", ".cpp", ".py", ".sh"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = r"(?:dev|gdn|scripts|\.ci)"
PATH = re.compile(rf"(?:^|(?<=[\s(]))(?:\./)?({FOLDERS}/[\w./*{{}},+-]*[\w/*}}])")
RECORD = re.compile(r"(?<!\]\()(?<![\w/])dev/(?:results|doc)/[\w./-]*\w")  # not in a URL, not a link's target
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|mnt|data|scratch|Users)/[\w.-]")
REQUIRED = {  # of a README in dev/results
    "device": r"(?i)\bdevices?: *(?!not run yet)[^\s@]",
    "date": r"(?i)\bdates?: *20\d\d-\d\d-\d\d",
    "commit": r"(?i)\bcommits?: *(?:.*?\b[0-9a-f]{7,40}\b|as the |not recorded)",
    "command": r"(?i)\bcommands?:[^\n]*`|\bcommand \|",
}
NOT_RUN = "Device: not run yet. Date: not run yet. Commit: not run yet."  # a line's beginning
PREPARED = {"prediction": r"(?m)^Prediction\b[^:\n]*: *\S", "command": REQUIRED["command"]}
PREPARED_SECTION = "## Prepared, not run\n"
# Built by make, written by a program's run, or named as an example
MADE = re.compile(r"^(?:dev/bench_\w+|dev/delta_rule_file|dev/test_\w+|scripts/\.venv(?:/.*)?|build/.*)$")


def tracked() -> list[Path]:
    git = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    if git.returncode:
        sys.exit(f"test_links.py: git ls-files in {ROOT.name}: {git.stderr.strip()}")
    names = git.stdout.split("\0")
    return [path for path in (ROOT / name for name in sorted(set(names)) if name) if path.is_file()]


def without_blocks(text: str) -> str:
    """Markdown with fenced blocks emptied, line numbers kept."""
    return re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)


def exists(path: str, folder: Path) -> bool:
    if "{" in path:  # dev/{a,b}
        head, choices, tail = re.match(r"(.*?)\{([^}]*)\}(.*)", path).groups()
        return all(exists(head + choice + tail, folder) for choice in choices.split(","))
    path = path.rstrip("/")
    return any(folder.glob(path)) if "*" in path else (folder / path).exists()


def faults_of(path: Path, text: str) -> list[tuple[int, str]]:
    """(line, what is wrong) of one file."""
    found = []

    def say(start: int, what: str) -> None:
        found.append((text.count("\n", 0, start) + 1, what))

    if path.suffix == ".md":
        text = without_blocks(text)
        for m in LINK.finditer(text):
            target = m[1].split("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not exists(target, path.parent):
                say(m.start(), f"link to {m[1]}: no such file")
        for code in CODE.finditer(text):
            for m in PATH.finditer(code[1]):
                name = m[1]
                if re.search(r"[A-Z]{3,}", name) and not exists(name, ROOT):
                    continue  # dev/results/TOPIC/run.sh: a placeholder
                if not MADE.match(name) and not exists(name, ROOT):
                    say(code.start(), f"`{name}`: no such file")
    for m in RECORD.finditer(text):
        if not re.search(r"TOPIC|NAME", m[0]) and not exists(m[0], ROOT):
            say(m.start(), f"{m[0]}: no such file or folder")
    return list(dict.fromkeys(found))


def faults_of_readme(text: str) -> list[str]:
    """Of the README.md of a folder in dev/results."""
    required = PREPARED if is_prepared(text) else REQUIRED
    return [f"no {what} (expected '{what.capitalize()}: ...')" for what, pattern in required.items() if not re.search(pattern, text)]


def is_prepared(text: str) -> bool:
    return any(line.startswith(NOT_RUN) for line in text.splitlines())


def links_to_folders(text: str) -> set[str]:
    return {name for name in re.findall(r"\]\(([\w.-]+)/?(?:README\.md)?\)", text) if "." not in name}


def faults_of_results(files: list[Path]) -> list[str]:
    found = []
    records = [path for path in files if RESULTS in path.parents]
    size = sum(path.stat().st_size for path in records)
    if size >= LIMIT:
        found.append(f"dev/results: {size:,} bytes: expected less than {LIMIT:,}")
    index = RESULTS / "README.md"
    made, _, prepared = (index.read_text() if index.is_file() else "").partition(PREPARED_SECTION)
    made, prepared = links_to_folders(made), links_to_folders(prepared)
    for folder in sorted({RESULTS / path.relative_to(RESULTS).parts[0] for path in records if path.parent != RESULTS}):
        name = folder.relative_to(ROOT)
        script = folder / "run.sh"
        if script.is_file() and subprocess.run(["bash", "-n", script]).returncode:
            found.append(f"{name}/run.sh: bash does not read it")
        readme = folder / "README.md"
        if not readme.is_file():
            found.append(f"{name}: no README.md")
            continue
        text = readme.read_text()
        found += [f"{name}/README.md: {what}" for what in faults_of_readme(text)]
        here, there, section = (prepared, made, "under 'Prepared, not run'") if is_prepared(text) else (made, prepared, "of what was run")
        if folder.name not in here or folder.name in there:
            found.append(f"{name}: not in the index dev/results/README.md, {section}, alone")
        if is_prepared(text):
            found += [f"{path.relative_to(ROOT)}: data of a folder that is not run yet" for path in records
                      if folder in path.parents and ".csv" in path.suffixes]  # fmt: skip
    found += [f"dev/results/README.md: {name}: no such folder" for name in sorted(made | prepared) if not (RESULTS / name).is_dir()]
    for path in records:
        if path.suffix in {".md", ".csv", ".txt", ".json", ".gz"} and not path.name.endswith(".tar.gz"):
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            m = MACHINE.search(data.decode(errors="replace"))
            if m:
                found.append(f"{path.relative_to(ROOT)}: holds a path of a machine, '{m[0]}...'")
    return found


def self_test() -> None:
    """The checks find what they are for."""
    readme = ROOT / "README.md"
    bad = "[a](no_such_file.md)\n`dev/no_such.sh X`\nsee dev/results/no_such_topic\n```\n[b](in_a_block.md)\n```\n"
    assert [line for line, _ in faults_of(readme, bad)] == [1, 2, 3], faults_of(readme, bad)
    good = "[a](README.md#x) `dev/results/TOPIC/run.sh` `make dev/bench_step` https://x.org/dev/no [c](https://x.org/y)\n"
    assert not faults_of(readme, good), faults_of(readme, good)
    assert faults_of(ROOT / "mup.h", "// dev/results/no_such_topic\n") and not faults_of(ROOT / "mup.h", "// [x](y.md)\n")
    made = "Device: H200. Date: 2026-12-01. Commit: a5feecd. Command: `run.sh`\n"
    assert not faults_of_readme(made) and len(faults_of_readme("Device: @DEVICE@. Command: `run.sh`\n")) == 3
    waits = f"{NOT_RUN}\nCommand: `run.sh`\nPrediction: none\n"
    assert not faults_of_readme(waits) and faults_of_readme(waits.replace("Prediction", "It")) and faults_of_readme(NOT_RUN)
    assert len(faults_of_readme(waits.replace("Commit: not run yet", "Commit: a5feecd"))) == 2  # half of it filled in
    assert MACHINE.search("-i /home/x/books.bin") and not MACHINE.search("scripts/data/x, -o out/tmp/y")


def main() -> int:
    self_test()
    files = tracked()
    faults = []
    for path in files:
        if path.suffix in SOURCES and path.resolve() != Path(__file__).resolve():
            name = path.relative_to(ROOT)
            faults += [f"{name}:{line}: {what}" for line, what in faults_of(path, path.read_text(errors="replace"))]
    faults += faults_of_results(files)
    print("\n".join(faults) if faults else f"{len(files)} files: every link and every record is as it should be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
