"""What the documents say of the code: its lines, its files, its flags."""
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
    first, trainer = int(re.search(r"lines\s+(\d+)", README)[1]), ROOT / "train_tst.py"
    assert trainer.read_text().splitlines()[first + 1].startswith("    for step in ")
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


def test_the_command_that_restarts_processes_turns_the_shared_store_off():
    """torchrun reads the variable before our program starts, so that only the guide can set it."""
    commands = [line for line in GUIDE.splitlines() if "--max-restarts=" in line]
    assert commands and all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun " in command
                            for command in commands)


# The exercises

EXERCISES = ROOT.joinpath("docs/exercises.md").read_text()
CORE = {name: ROOT.joinpath(name).read_text() for name in (
    "model.py", "train_tst.py", "data.py", "test_tst.py")}


def blank(text, names):
    """The text without the body of a function, or without the lines that assign to some names."""
    if names[0].isidentifier():
        docstring = '""".*?"""\n'
        return re.sub(rf"(?s)( *)(def {names[0]}\(.*?{docstring})",
                      r"\1\2\1    raise NotImplementedError\n", text, count=1)
    lines = "|".join(map(re.escape, names))
    return re.sub(rf"(?m)^ {{8,}}(?:{lines}) .*\n", "", text, count=len(names))


def exercises():
    """Yield (the tests that must fail, a core file, its text with a blank or with a mistake)."""
    for what, file, tests in re.findall(
            r"(?m)^\| (.*) \| (\w+\.py) \| \d+ \| `-k \"(.*)\"` \|$", EXERCISES):
        yield tests, file, blank(CORE[file], re.findall("`(.*?)`", what))
    answers = dict(re.findall(r"(?m)^- (\w): `(\w+)`", EXERCISES))
    for letter, file, diff in re.findall(r"(?ms)^(\w)\. In (\S+),.*?:\n\n(.*?)\n\n", EXERCISES):
        old, new = ("".join(re.findall(rf"(?m)^    [{sign}](.*\n)", f"{diff}\n")) for sign in "-+")
        yield answers[letter], file, CORE[file].replace(old, new)


def status(tests, file, text, folder):
    """The status of the selected tests of test_tst.py after the change of a core file."""
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name in CORE:
        folder.joinpath(name).write_text(text if name == file else CORE[name])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_tst.py", "-k"]
    return subprocess.run([*command, tests], cwd=folder, capture_output=True).returncode


def test_the_tests_that_the_exercises_name_notice_blanks_and_mistakes(tmp_path):
    tests, files, texts = zip(*exercises())
    assert len(tests) == 9
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(status, tests, files, texts, [tmp_path / str(k) for k in range(9)]))
    assert found == 9 * [1]             # pytest's status is 1 if a test has failed
