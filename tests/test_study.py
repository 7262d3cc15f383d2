"""The study: its runs, and the table of its rows."""
import sys

import pytest
from conftest import ROOT, log

sys.path.insert(0, str(ROOT / "study"))
import run
import table


def test_a_run_is_made_once_and_has_a_row_with_every_column(tmp_path, flags, monkeypatch):
    text = " ".join(flags)
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(run, "EXPERIMENTS", {"mine": [text]})
    monkeypatch.setattr(sys, "argv", ["study/run.py", "mine"])
    run.RESULTS.write_text(",".join(run.COLUMNS) + "\n")
    for _ in range(2):                  # the second time nothing is trained or appended
        run.main()
        row, = run.read_rows()
    assert tuple(row) == run.COLUMNS and all(row.values())
    assert row["command"] == f"python train_tst.py {text}" and row["commit"] == run.commit()
    assert row["tokens"] == str(12 * 8 * 16 * 2)        # 6 steps on bags of 3, 6 on single tokens
    assert row["val_loss"] == f"{log(run.folder(text))[-1]['val_loss']:.4f}"


def test_pairs_differ_only_in_the_method_and_read_no_token_twice():
    def row(s, loss, data_hash="aaa", lr="0.003", epochs="0.5", others=""):
        method = f"--s {s}" + (" --r 0.2" if s > 1 else "")
        return {"s": str(s), "r": "0.2", "lr": lr, "tokens": "2000" if s > 1 else "1000",
                "epochs": epochs, "vocab_size": "1024", "parameters": "500000", "val_loss": loss,
                "data_hash": data_hash, "command": f"python x.py {method} --lr {lr}{others}"}

    rows = [row(1, 3.0), row(6, 2.9), row(1, 2.8, lr="0.001"), row(6, 3.0, lr="0.001"),
            row(6, 2.0, "bbb"), row(6, 2.0, others=" --seed 1"), row(6, 2.0, others=" --n-head 4"),
            row(4, 2.0, epochs="1.01")]                         # the last four have no pair
    (setting, by_rate), = table.settings(rows).items()
    assert setting == (1000, "Python", 1024, 500_000, 6, 0.2)
    assert by_rate == {"0.003": [(3.0, 2.9)], "0.001": [(2.8, 3.0)]}
    # The learning rate with the best baseline counts, although TST is better at the other one
    assert table.best(by_rate) == [pytest.approx(0.2)]


def test_the_published_table_is_made_from_results_csv(capsys):
    table.main()
    head, rows = capsys.readouterr().out.split("\n\n")[:2]
    assert rows.count("\n") == 9 and rows in ROOT.joinpath("study/README.md").read_text()
