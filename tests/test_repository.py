"""What README and file headers promise, held against the files: imports, sizes, commands, deviations."""
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
OURS = {file.stem for file in FILES}
PACKAGES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "h5py": "h5py", "tqdm": "tqdm"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_only_the_seven_scripts_are_there():
    assert OURS == {"model", "diffusion", "vae", "encoder", "data", "train", "evaluate"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_docstrings_sizes_and_imports(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= (600 if file.stem == "evaluate" else 500)
    assert max(map(len, text.splitlines())) <= 120
    assert ".cuda(" not in text and "TODO" not in text
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 55, node.name
            if node in tree.body:
                assert ast.get_docstring(node), node.name
    used = set(imports(tree)) - set(sys.stdlib_module_names)
    if file.stem in ("model", "diffusion", "encoder", "vae"):
        assert used == {"torch"}                                    # so that one file can be taken away and used
    wanted = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert {PACKAGES[name] for name in used - OURS} <= wanted and wanted == set(PACKAGES.values())


def test_every_deviation_has_its_row():
    rows = README.split("\n## Deviations")[1].split("\n## ")[0]
    for file in FILES:
        tagged = file.read_text().count("DEVIATION:")
        assert len(re.findall(rf"^\| {file.name} \|", rows, re.M)) == tagged, file.name


def test_readme_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def commands():
    """Every command line that the README shows in an indented or fenced block."""
    for line in README.splitlines():
        if line.startswith("    "):
            yield from (re.sub(r"\$\w+", "1", part.split("#")[0]).split() for part in line.split("&&"))


def test_readme_commands_and_flags_exist(capsys):
    found = [c for c in commands() if c and c[0] == "python" and c[1].endswith(".py")]
    assert len(found) >= 6
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for _, script, *rest in found:
        assert (ROOT / script).exists()
        flags = [word for word in rest if word.startswith("--")]
        if script == "train.py":
            train.parse(rest)                                       # ends the program when a flag is unknown
        elif script == "evaluate.py":
            assert set(flags) <= known


def test_readme_paths_exist():
    paths = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"^\| ([a-z_]+\.py) \|", README, re.M)
    assert paths
    for path in paths:
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_readme_file_lengths_are_true():
    for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", README, re.M):
        assert abs((ROOT / name).read_text().count("\n") - int(lines)) <= 10, name
