"""What the documents say of the code: its lines, its files, its flags."""
import ast
import doctest
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT

import train_tst

README, GUIDE, STUDY = (ROOT.joinpath(name).read_text() for name in (
    "README.md", "docs/guide.md", "study/README.md"))


def test_the_readme_shows_the_lines_that_run():
    method, port = re.findall("```python\n(.*?)```", README, re.S)
    code = "".join(re.sub(" *#.*", "", ROOT.joinpath(name).read_text()) for name in (
        "model.py", "train_tst.py"))
    lines = [re.sub(" *#.*", "", line) for line in method.splitlines() if line]
    assert len(lines) < 11 and all(line in code for line in lines)
    example = ROOT.joinpath("examples/hf_trainer.py").read_text()
    assert port.split("\n\n")[0] in example


def test_the_worked_example_of_the_readme_is_right():
    example, = re.findall("```pycon\n(.*?)```", README, re.S)
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, None)
    assert doctest.DocTestRunner().run(test) == (0, 6)


def test_links_lead_somewhere_and_flags_and_presets_are_there():
    anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(
        "^#+ (.*)", README + GUIDE + STUDY, re.M)}
    for folder, text in ((ROOT, README), (ROOT / "docs", GUIDE), (ROOT / "study", STUDY),
                         (ROOT / "docs", ROOT.joinpath("docs/related.md").read_text())):
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            assert not path or Path(folder, path).exists(), path
            assert not anchor or anchor in anchors, anchor
        for command in re.findall(r"python (?:[\w./]*/)?train_tst\.py([^\n`|#]*)", text):
            words = [word for word in command.split() if word not in ("--", "--help", "\\")]
            train_tst.parse(["--device", "cpu", *words])
    assert all(f"`{name}`" in GUIDE for name in train_tst.PRESETS)


# The exercises

EXERCISES = ROOT.joinpath("docs/exercises.md").read_text()
CORE = ("model.py", "train_tst.py", "data.py", "test_tst.py")


def blank(file, names):
    """The text of a core file without the body of a function, or without lines that begin so."""
    text = ROOT.joinpath(file).read_text()
    if names[0].isidentifier():
        function = next(node for node in ast.walk(ast.parse(text)) if isinstance(
            node, ast.FunctionDef) and node.name == names[0])
        lines = text.splitlines(keepends=True)
        first, last = function.body[0].end_lineno, function.end_lineno      # after the docstring
        indent = " " * function.body[0].col_offset
        return "".join([*lines[:first], f"{indent}raise NotImplementedError\n", *lines[last:]])
    for name in names:
        text, n = re.subn(rf"(?m)^ {{8,}}{re.escape(name)} .*\n", "", text, count=1)
        assert n == 1, name             # the loop comes first in its file
    return text


def change(diff):
    """{file: text} of a core file in which the lines with - are replaced by those with +."""
    old, new = ("".join(f"{line[5:]}\n" for line in diff.splitlines() if line.startswith(f"    {sign}"))
                for sign in "-+")
    file, = [file for file in CORE if old in ROOT.joinpath(file).read_text()]
    return {file: ROOT.joinpath(file).read_text().replace(old, new)}


def outcome(selection, changed, folder):
    """Run the selected tests of test_tst.py on changed files -> (exit status, failed tests)."""
    shutil.copytree(ROOT / "tools", folder / "tools")
    for file in CORE:
        folder.joinpath(file).write_text(changed.get(file, ROOT.joinpath(file).read_text()))
    done = subprocess.run([sys.executable, "-m", "pytest", "-qrfE", "-p", "no:cacheprovider",
                           "test_tst.py", "-k", selection], cwd=folder, capture_output=True, text=True)
    return done.returncode, set(re.findall(r"(?m)^(?:FAILED|ERROR) .*::(\w+)", done.stdout))


def test_the_checks_of_the_exercises_notice_blanks_and_mistakes(tmp_path):
    jobs = []                           # (selection, changed files, the tests that must fail or None)
    for what, file, check in re.findall(
            r"(?m)^\| (.*) \| (\w+\.py) \| \d+ \| `-k \"(.*)\"` \|$", EXERCISES):
        jobs.append((check, {file: blank(file, re.findall("`(.*?)`", what))}, None))
    answers = dict(re.findall(r"(?m)^- (\w): `(\w+)`", EXERCISES))
    for name, diff in re.findall(r"(?ms)^(\w)\. In .*?:\n\n(.*?)\n\n", EXERCISES):
        jobs.append((answers[name], change(diff), {answers[name]}))
    assert len(jobs) == 9
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(outcome, *zip(*[(selection, changed, tmp_path / str(k))
                                            for k, (selection, changed, _) in enumerate(jobs)]))
    for (selection, _, expected), (status, failed) in zip(jobs, outcomes):
        assert status == 1 and failed and failed == (expected or failed), selection
