"""What README and file headers promise, held against the files: imports, commands, deviations."""
import ast
import re
import sys
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / ".github" / "results" / "README.md").read_text()
SCRIPTS = {"model", "diffusion", "vae", "encoder", "data", "train", "evaluate"}
PACKAGES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "h5py": "h5py", "tqdm": "tqdm"}


def imports(tree):
    """The top names of everything that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_imports_what_its_room_allows(file):
    tree = ast.parse(file.read_text())
    names = imports(tree)
    allowed = {
        "data": set(),
        "train": {"data", "diffusion", "encoder", "model", "vae", "evaluate"},
        "evaluate": {"data", "diffusion", "encoder", "model", "vae", "train"},
    }
    assert names & SCRIPTS <= allowed.get(file.stem, set())
    packages = names - SCRIPTS - set(sys.stdlib_module_names)
    if file.stem in ("model", "diffusion", "encoder", "vae"):
        assert packages == {"torch"}                            # so that one file can be copied
    required = re.findall(r"^[a-z0-9]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert {PACKAGES[name] for name in packages} <= set(required)


def test_only_the_seven_scripts_are_there():
    assert {file.stem for file in FILES} == SCRIPTS


def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".github").symlink_to(ROOT / ".github")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_commands_and_their_flags_exist(capsys, monkeypatch):
    monkeypatch.setattr(train, "first_stage_of", lambda folder, given: {})
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = re.findall(r"python ((?:train|evaluate)\.py[^#\n`|]*)", README + RESULTS)
    assert len(commands) > 10
    for command in commands:
        command = command.replace("$flags", "--encoder vector")     # of the loop over ablations
        script, *words = re.sub(r"\$\w+", "1", command).split()
        flags = {word for word in words if word.startswith("--")}
        if script == "evaluate.py":
            assert flags <= known, command
        elif not flags & {"--resume", "--help"}:
            train.parse(words)                                  # ends the test if one is unknown


def test_paths_exist():
    for text, folder in ((README, ROOT), (RESULTS, ROOT / ".github" / "results")):
        for path in re.findall(r"\]\(([^)#]+)\)", text):
            assert path.startswith("http") or (folder / path).exists(), path
