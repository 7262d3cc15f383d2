"""Variations of the method. Each is a few changed lines in the three core files.

    python examples/variations.py weighting --show          # print the changed lines
    python examples/variations.py weighting --s 8 --r 0.2   # train; the flags are train_tst.py's
    torchrun --nproc_per_node=8 -- examples/variations.py weighting --s 8

The variations are also exercises: read the description, write the lines yourself, and compare. A
run uses changed copies of the files, and the name of its folder begins with the variation's name.
If a variation does not read all tokens of its rows, the log counts the unread tokens too.
"""
import argparse
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# {name: (what the variation is and what came out, {file: old lines (-) and new lines (+)})}
VARIATIONS = {
    "halves": ("""
One half of the method alone. By default the inputs are bags, and the target is one token. With
--half output, the inputs are single tokens, and the target is a bag. In the paper (figure 6) each
half is better than the baseline, and both halves together are better still. Here, on C source code
and with one seed, each half alone was worse than the baseline.
""", {"train_tst.py": """
-    method("--r", type=fraction, help="fraction of the steps that form the superposition phase")
+    method("--r", type=fraction, help="fraction of the steps that form the superposition phase")
+    method("--half", choices=("input", "output"), default="input", help="the half that has bags")

-            inputs, targets = bags[:, :-1], bags[:, 1:]                 # bag j predicts bag j + 1
+            if args.half == "input":
+                inputs, targets = bags[:, :-1], bags[:, 1:, :1]
+            else:                       # reads only the first l + s tokens of each row
+                tokens = bags.flatten(1)                                # (micro, (l + 1) * s)
+                inputs = tokens[:, :l].unsqueeze(2)                     # (micro, l, 1)
+                targets = tokens[:, 1:l + s].unfold(1, s, 1)            # (micro, l, s)
"""}),
    "weighting": ("""
Token i of the target bag has the weight 1 / i (paper, appendix D). In the paper this is slightly
better than equal weights from s = 8 on. For smaller bags equal weights are better.
""", {"model.py": """
-    return -at_least_float32(logits).log_softmax(-1).gather(-1, targets).mean()
+    g = 1 / torch.arange(1, targets.size(-1) + 1, device=targets.device)        # or exp(-i)
+    log_p = at_least_float32(logits).log_softmax(-1).gather(-1, targets)        # (B, l, s)
+    return -(log_p * g / g.sum()).sum(-1).mean()
"""}),
    "shrinking": ("""
Bags of s tokens, then of s / 2, then of s / 4, each for a third of the superposition phase. The
paper leaves gradual transitions open. On Python none of six schedules was better than the best
constant s.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = max(1, args.s >> 3 * step // switch) if step < switch else 1

-            bags = rows.to(device, non_blocking=True).view(micro, l + 1, s)
+            rows = rows[:, :(l + 1) * s]        # a row is long enough for bags of --s tokens
+            bags = rows.to(device, non_blocking=True).reshape(micro, l + 1, s)
"""}),
    "tables": ("""
The embedding and the head are initialised again at the switch. In the paper this loses all of the
gain: the 3B model ends at 2.938 instead of 2.676, and its baseline at 2.808.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = args.s if step < switch else 1
+        if 0 < step == switch:
+            torch.nn.init.normal_(model.embedding.weight, std=0.02)
+            torch.nn.init.normal_(model.head.weight, std=0.02)
"""}),
    "optimizer": ("""
The optimizer state is reset at the switch. A public replication (AOMTS) ended at 2.303 with the
reset and at 2.214 without it. Its baseline ended at 2.287.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = args.s if step < switch else 1
+        if 0 < step == switch:
+            optimizer.state.clear()
"""}),
    "tied": ("""
The embedding and the head share one table, as in many small models. The models of the paper and of
this project have two tables. How TST does with one table was not measured here.
""", {"model.py": """
-        self.head = nn.Linear(config.n_embd, padded, bias=False)
+        self.head = nn.Linear(config.n_embd, padded, bias=False)
+        self.head.weight = self.embedding.weight

-        weights -= self.embedding.weight.numel()        # an embedding lookup is no matrix product
"""}),
}


def apply(name):
    """{file: its text with the variation}, for the three core files.

    SystemExit if the old lines do not occur exactly once, because the core has been changed.
    """
    texts = {file: (ROOT / file).read_text() for file in ("train_tst.py", "model.py", "data.py")}
    for file, edit in VARIATIONS[name][1].items():
        for pair in edit.strip("\n").split("\n\n"):
            old, new = ("".join(f"{line[1:]}\n" for line in pair.split("\n") if line[0] == sign)
                        for sign in "-+")
            if texts[file].count(old) != 1:
                raise SystemExit(f"{file} does not have these lines of {name} exactly once. "
                                 f"Restore them.\n{old}")
            texts[file] = texts[file].replace(old, new)
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"variations.py: {message}\n")
    parser.add_argument("name", choices=VARIATIONS, help="the variation")
    parser.add_argument("--show", action="store_true", help="print the lines, and do not train")
    args, flags = parser.parse_known_args()
    texts = apply(args.name)
    if args.show:
        text, edits = VARIATIONS[args.name]
        return print(text + "".join(f"\n{file}\n{edit}" for file, edit in edits.items()), end="")
    texts["train_tst.py"] = texts["train_tst.py"].replace('f"runs/', f'f"runs/{args.name}-')
    with tempfile.TemporaryDirectory() as folder:
        for file, text in texts.items():
            Path(folder, file).write_text(text)
        sys.argv = [str(Path(folder, "train_tst.py")), *flags]
        sys.path[:0] = [folder, str(ROOT)]                      # tools/ is not copied
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
