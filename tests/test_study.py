"""The study's instruments: what they measure, and that their tables mix nothing."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train_tst
from model import load_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "study"))
import branch
import draw
import edit
import experts
import patched
import rarity
import run
import split
import table
from worth import PAPER, worth


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RUNS", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(train_tst, "save", train_tst.save)      # study/branch.py wraps it
    return tmp_path


def test_a_target_is_a_hit_or_seen_or_unseen_as_a_slow_reader_says():
    rows = torch.randint(0, 6, (50, 13), generator=torch.Generator().manual_seed(0))
    rows[0, :4] = torch.tensor([5, 5, 5, 2])            # a pair may overlap the one before it
    for row, found in zip(rows.tolist(), split.kinds(rows).tolist()):
        for i, kind in enumerate(found):
            target, before = row[i + 1], row[:i + 1]
            hit = (row[i], target) in zip(before, before[1:])
            assert split.KINDS[kind] == ("hit" if hit else "seen" if target in before else "unseen")


def test_again_are_the_losses_whose_predecessor_was_read_twice():
    class Reader(torch.nn.Module):                      # that remembers what it read
        def forward(self, bags):
            self.inputs = bags[:, :, 0]
            return torch.zeros(*self.inputs.shape, 8)

    model, rows = Reader(), torch.arange(97)[None] % 8
    assert split.losses_again(model, rows).shape == (1, 47)
    assert model.inputs[0].tolist() == [*rows[0, :48].tolist(), *rows[0, :47].tolist()]
    assert split.losses_again(model, rows[:, :12]).shape == (1, 4)      # l = 11: 5 tokens twice


def test_every_byte_of_the_validation_split_is_read_once_whatever_the_context(corpus):
    _, tokens, _, _ = data.load(corpus)
    for l in (7, 96, 2998, 2999):
        targets = torch.cat([rows[:, 1:].flatten() for rows in split.batches(tokens, l)])
        assert targets.tolist() == tokens.read(1, len(tokens) - 1).tolist()


def test_a_superposed_step_of_the_paper_is_worth_what_its_tables_say():
    expected = {("270M", 20_000): (6.19, ""), ("270M", 100_000): (1.0, ">"),
                ("600M", 20_000): (1.0, ">"), ("3B", 20_000): (3.72, ""),
                ("10B-A1B", 49_983): (7.0, ">")}
    for model, n, _, r, loss, baselines in PAPER:
        w, bound = expected.pop((model, n))
        assert worth(loss, baselines, n, r) == (pytest.approx(w, abs=0.01), bound)
    assert not expected
    three = {20_000: 2.808, 36_000: 2.677, 50_000: 2.640}
    assert worth(2.9, three, 20_000, 0.3) == (pytest.approx(1.0), "<")


def test_a_run_has_a_row_with_every_column(study, flags):
    text = " ".join(flags)
    out = run.folder(text)
    run.note_commit(out)
    train_tst.main([*flags, *run.way(out)])
    found = split.measured(out)
    row = run.row("mine", text, *run.finished(out), None)
    assert set(row) == set(run.COLUMNS)
    assert [name for name, value in row.items() if value == ""] == ["test_loss"]
    assert row["commit"] == run.commit() and row["vocab_size"] == 300
    parts = found["hit_share"] * found["hit"] + found["seen_share"] * found["seen"] + (
        1 - found["hit_share"] - found["seen_share"]) * found["unseen"]
    assert parts == pytest.approx(found["loss"])
    assert found["loss"] == pytest.approx(run.finished(out)[1]["val_loss"], abs=0.01)   # all rows


def test_a_patched_run_is_read_with_its_patch(study, flags):
    out = run.folder(f"--patch kv-shift {' '.join(flags)}")
    with patched.patched("kv-shift"):
        train_tst.main([*flags, *run.way(out)])
    model, _ = patched.load(out)
    assert isinstance(model.blocks[0].attention, patched.ShiftedAttention)


def test_a_band_holds_the_tokens_that_begin_within_its_share_of_the_text():
    tokens = np.repeat([3, 0, 2, 4, 1], [8, 4, 2, 1, 1])                # begin at 0, 8 and so on
    assert rarity.bands(tokens, 6).tolist() == [2, 3, 3, 0, 4, 5]       # 5 never occurs


def test_the_bands_together_lose_what_the_kinds_lose(study, flags, monkeypatch):
    monkeypatch.setattr(rarity, "EVERY", 1)
    text = " ".join(flags)
    train_tst.main([*flags, *run.way(run.folder(text))])
    found, (args, _) = split.measured(run.folder(text)), run.finished(run.folder(text))
    train, tokens, _, _ = data.load(args["data"])
    band = rarity.bands(train.read(0, len(train)), train.vocab_size)
    nats, counts = rarity.measure(run.folder(text), tokens, band)
    targets = torch.from_numpy(tokens.read(1, found["targets"]))
    assert counts.sum(0).tolist() == torch.bincount(band[targets], minlength=6).tolist()
    for kind, loss in zip(split.KINDS, nats.sum(1) / counts.sum(1)):
        assert loss.item() == pytest.approx(found[kind])


def test_a_branched_baseline_is_the_one_trained_from_its_start(study, flags):
    common = f"--s 1 {' '.join(flags)} --warmup-steps 2".replace("--s 3 --r 0.5 ", "")
    longest, shorter = (common.replace("--steps 12", f"--steps {n}") for n in (20, 10))
    assert run.chains([shorter, longest]) == [[longest, shorter]]
    branch.main(longest, shorter)
    out = run.folder(shorter)
    assert load_checkpoint(out)["step"] == 6                            # 0.4 of 10 are decay
    train_tst.main([*shorter.split(), *run.way(out)])
    train_tst.main([*shorter.split(), "--out", str(study / "plain"), "--eval-every", "250"])
    for name, weight in load_checkpoint(out)["model"].items():
        assert torch.equal(weight, load_checkpoint(study / "plain")["model"][name]), name
    logs = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
            for folder in (out, study / "plain")]
    assert logs[0] == logs[1]


def test_an_edit_changes_what_it_says_and_trains_on(study, flags, monkeypatch):
    train_tst.main([*flags, *run.way(run.folder(" ".join(flags)))])

    def losses(words):
        path = run.folder(" ".join(words)) / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in path.open()]

    for name, same_at_first in (("moments", True), ("tables", False)):
        words = ["--edit", name, *flags]
        monkeypatch.setattr(sys, "argv", ["study/edit.py", *words])
        edit.main()
        ours, theirs = losses(words), losses(flags)
        assert len(ours) == 12 and ours[:6] == theirs[:6] and ours[7:] != theirs[7:]
        assert (ours[6] == theirs[6]) == same_at_first          # the first loss after the switch


def test_the_load_of_experts_is_that_of_their_slots(study, flags, monkeypatch):
    chosen = torch.tensor([[[0, 1], [0, 2]], [[3, 1], [1, 3]]])         # 2 layers, 2 tokens, k = 2
    load = experts.load(chosen, 4)
    assert load.tolist() == [[0.5, 0.25, 0.25, 0], [0, 0.5, 0, 0.5]]
    assert experts.moved(load, load) == 0
    assert experts.moved(load, load.flip(0)) == 0.75        # 0.5 of 0, 0.25 of 2
    assert experts.kept(chosen, chosen.flip(-1)) == 1
    assert experts.kept(chosen, chosen.flip(0)) == 0.25

    words = [*flags, "--n-expert", "4"]
    train_tst.main([*words, *run.way(run.folder(" ".join(words)))])
    models, load_model = [], experts.load_model
    monkeypatch.setattr(experts, "ROWS", 10)                            # one batch
    monkeypatch.setattr(experts, "load_model", lambda path: models.append(load_model(path))
                        or models[-1])
    n_expert, found = experts.readings(" ".join(words))
    assert n_expert == 4 and list(found) == list(experts.READINGS)
    bags, before, end = found.values()
    assert bags.shape == before.shape == end.shape == (2, experts.ROWS * 16, 2)
    assert not torch.equal(bags, before) and not torch.equal(before, end)
    counts = run.log(" ".join(words))[-1]["largest_share"]
    assert abs(experts.load(end, 4).amax(1).mean().item() - counts) < 0.1
    for (model, _), chosen in zip(models, (end, bags, before)):         # in the order of reading
        assert experts.load(chosen, 4).amax(1).mean() == pytest.approx(model.load[1].item())


def test_no_table_mixes_data(study, capsys):
    def line(s, r, steps, loss, data_hash):
        method = "--s 1" if s == 1 else f"--s {s} --r {r}"
        length = "" if steps == 2400 else f" --steps {steps}"
        return {**dict.fromkeys(run.COLUMNS, ""), "experiment": "seeds", "seed": "0", "s": s,
                "r": r, "steps": steps, "val_loss": loss, "data_hash": data_hash,
                "commit": "abc" if data_hash else "", "vocab_size": 1024,
                "command": f"python train_tst.py {method}{length}"}

    run.write_rows([
        line(1, 0.0, 2400, 3.0, "aaa"), line(1, 0.0, 4800, 2.8, "aaa"),
        line(6, 0.2, 2400, 2.9, "aaa"), line(6, 0.2, 2400, 2.7, "bbb"),
        line(1, 0.0, 2400, 2.5, ""), line(6, 0.2, 2400, 2.4, "")])
    table.main([])
    first, second = capsys.readouterr().out.split("seeds, data ")[1:]
    # It is worth a baseline of 2400 * 2 ** 0.5 steps
    assert "`--s 6 --r 0.2` | 1 | 2.9000 | -0.1000, 1 of 1 lower | 3.07 |" in first
    assert second.splitlines()[-1] == "| `--s 6 --r 0.2` | 1 | 2.7000 |  |  |"
    assert "2.5" not in first + second
    (name, by_steps), = draw.gains(run.read_rows()).items()            # "bbb" has no baseline
    assert name == ("Python, vocabulary 1,024", "aaa")
    assert by_steps == {2400: [pytest.approx(-0.1)]}

    # The larger model, and a table in which the learning rate is a part of the method
    rates = [{**line(s, r, 2400, loss, "ccc"), "experiment": "wide", "s": str(s),
              "command": f"python train_tst.py {method} --lr {lr} --data data/c-4096"}
             for s, r, loss, method, lr in (
                 (1, 0.0, 2.0, "--s 1", 0.001), (1, 0.0, 1.9, "--s 1", 0.002),
                 (6, 0.2, 1.7, "--s 6 --r 0.2", 0.002))]
    others = [{**row, "experiment": "lr", "val_loss": 1.0} for row in rates]     # not on the map
    _, (name, by_steps) = draw.gains([*run.read_rows(), *rates, *others]).items()
    assert name == ("6.9M parameters, C, vocabulary 1,024", "ccc")
    assert by_steps == {2400: [pytest.approx(-0.2)]}
    run.write_rows([*run.read_rows(), *rates])
    table.main(["wide", "--minus", "--s 1 --lr 0.001"])
    assert "| 1.7000 | -0.3000, 1 of 1 lower |" in capsys.readouterr().out
    table.main(["--old"])
    old = capsys.readouterr().out
    assert "seeds, old rows" in old and "2.5000" in old and "2.9" not in old


def test_experiments_together_are_one_table_whose_pairs_are_of_one_device(study, capsys):
    def line(s, device, loss, experiment, seed="3"):
        method = "--s 1" if s == 1 else f"--s {s} --r 0.2"
        return {**dict.fromkeys(run.COLUMNS, ""), "experiment": experiment, "seed": seed, "s": s,
                "r": "0.0" if s == 1 else "0.2", "steps": 2400, "val_loss": loss,
                "data_hash": "aaa", "commit": "abc", "vocab_size": 4096,
                "command": f"python train_tst.py {method} --data data/c-4096{device}"}

    cuda = " --device cuda"
    run.write_rows([line(1, "", 3.0, "confirm"), line(6, "", 2.9, "confirm"),
                    line(1, cuda, 2.0, "confirm-gpu"), line(6, cuda, 2.3, "confirm-gpu"),
                    line(1, cuda, 2.0, "confirm-gpu", "4"), line(6, cuda, 1.7, "confirm-gpu", "4")])
    table.main(["confirm", "confirm-gpu", "--together"])
    printed = capsys.readouterr().out
    assert "confirm and confirm-gpu, data aaa" in printed
    assert ("| `--s 6 --r 0.2 --data data/c-4096` | 3 | 2.3000 ± 0.6000 (2.9000, 2.3000, 1.7000) "
            "| -0.0333 ± 0.3055, 2 of 3 lower |") in printed
    table.main(["confirm", "confirm-gpu"])
    apart = capsys.readouterr().out
    assert " and " not in apart and "--data data/c-4096 --device cuda` | 2 |" in apart


def test_signed_ranks_are_wilcoxons():
    assert table.signed_ranks([-1, -2, -3, -4, -5, -6]) == 2 / 64
    assert table.signed_ranks([6, 5, -1, 4, 3, 2]) == 4 / 64       # the sum 1, by {1}, or none
    assert table.signed_ranks([3, -1, 2, -4]) == 1                  # 5 and 5
    assert table.summary([-1, -2, -3, -4, -5, 6]).endswith("5 of 6 lower, median -2.5000, p = 0.44")
    assert table.summary([-1.0, -3.0]) == "-2.0000 ± 1.4142, 2 of 2 lower"


def test_the_map_says_what_a_step_is_worth_for_a_kind_of_target():
    def line(flags, steps, hit, experiment="map"):
        return {"experiment": experiment, "seed": "0", "steps": str(steps), "hit": str(hit),
                "r": "0.2" if "--r" in flags else "0.0", "data_hash": "aaa",
                "command": f"python train_tst.py {flags} --steps {steps}"}

    c, tst = "--data data/c-1024", "--s 6 --r 0.2"
    rows = [line(f"--s 1 {c}", 2400, 1.0), line(f"--s 1 {c}", 4800, 0.8),
            line(f"{tst} {c}", 2400, 0.9), line(f"{tst} {c}", 4800, 0.7),
            line(f"--s 2 --r 0.2 {c}", 2400, 0.9), line(f"{tst} {c}", 2400, 0.9, "other"),
            line(f"{tst} --data data/prose-4096", 2400, 0.9)]
    assert draw.worths(rows, "hit", 2400) == [(pytest.approx(1 + 5 * (2 ** 0.5 - 1)), "")]


def test_old_rows_of_results_csv_are_marked_and_no_row_is_there_twice():
    with open(run.HERE / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert all((row["commit"] == "") == (row["data_hash"] == "") for row in rows)
    assert len({run.key(row) for row in rows}) == len(rows)
