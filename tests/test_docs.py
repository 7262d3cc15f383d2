"""What the documents say of the code: its lines, its files, its flags."""
import re
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
