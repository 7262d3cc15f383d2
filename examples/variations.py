"""What else was tried, each as the few lines that it changes in the three files.

    python examples/variations.py weighting --show          # the lines
    python examples/variations.py weighting --s 8 --r 0.2   # a run; the flags are train_tst.py's
    torchrun --nproc_per_node=8 -- examples/variations.py weighting --s 8

They are exercises too: read the two sentences, write the lines yourself, and compare. A run trains
on changed copies of the files, and the name of its folder begins with the variation's. (Where it
skips tokens of its rows the log counts them all the same.)
"""
import argparse
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (what it is and what came out, {file: its old lines (-) and the new ones (+)})
VARIATIONS = {
    "halves": ("""
Half of the method alone: bags in and one token out or, with --half output, one token in and a bag
out. In the paper (figure 6) each half gains, and both together more; on C, here, each alone lost
(one seed).
""", {"train_tst.py": """
-    flag("--r", type=fraction, help="fraction of the steps in the superposition phase")
+    flag("--r", type=fraction, help="fraction of the steps in the superposition phase")
+    flag("--half", choices=("input", "output"), default="input", help="the half that has bags")

-            inputs, targets = bags[:, :-1], bags[:, 1:]                 # bag j predicts bag j + 1
+            if args.half == "input":
+                inputs, targets = bags[:, :-1], bags[:, 1:, :1]
+            else:                       # of a row it reads the first l tokens, and skips the rest
+                tokens = bags.flatten(1)                                # (micro, (l + 1) * s)
+                inputs = tokens[:, :l].unsqueeze(2)                     # (micro, l, 1)
+                targets = tokens[:, 1:l + s].unfold(1, s, 1)            # (micro, l, s)
"""}),
    "weighting": ("""
The i-th token of the target bag weighs 1 / i (the paper's appendix D). There it is slightly better
from s = 8 on, and equal weights are better for smaller bags.
""", {"model.py": """
-    return -at_least_float32(logits).log_softmax(-1).gather(-1, targets).mean()
+    g = 1 / torch.arange(1, targets.size(-1) + 1, device=targets.device)        # or exp(-i)
+    log_p = at_least_float32(logits).log_softmax(-1).gather(-1, targets)        # (B, l, s)
+    return -(log_p * g / g.sum()).sum(-1).mean()
"""}),
    "shrinking": ("""
Bags of s, then s / 2, then s / 4 tokens, a third of the superposition phase each. The paper leaves
smooth transitions open; here none of twelve was better than the best single s.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = max(1, args.s >> 3 * step // switch) if step < switch else 1

-            bags = rows.to(device, non_blocking=True).view(micro, l + 1, s)
+            rows = rows[:, :(l + 1) * s]        # of a row of bags of --s it skips the rest
+            bags = rows.to(device, non_blocking=True).reshape(micro, l + 1, s)
"""}),
    "tables": ("""
New embeddings and a new head at the switch. In the paper this loses all of the gain: 3B ends at
2.938 instead of 2.676, and its baseline at 2.808.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = args.s if step < switch else 1
+        if 0 < step == switch:
+            torch.nn.init.normal_(model.embedding.weight, std=0.02)
+            torch.nn.init.normal_(model.head.weight, std=0.02)
"""}),
    "optimizer": ("""
AdamW forgets its moments at the switch. A public replication (AOMTS) ended at 2.303 with that, at
2.214 without, and at 2.287 without superposition.
""", {"train_tst.py": """
-        s = args.s if step < switch else 1
+        s = args.s if step < switch else 1
+        if 0 < step == switch:
+            optimizer.state.clear()
"""}),
    "tied": ("""
One table for embedding and head, as in many small models. The paper's models and ours have two, and
how superposition does with one was not measured here.
""", {"model.py": """
-        self.head = nn.Linear(config.n_embd, padded, bias=False)
+        self.head = nn.Linear(config.n_embd, padded, bias=False)
+        self.head.weight = self.embedding.weight

-        weights -= self.embedding.weight.numel()                        # it is looked up
"""}),
}


def apply(name):
    """{file: its text with the variation} of the three files.

    SystemExit if old lines are not there exactly once: the core has changed, and so must they.
    """
    texts = {file: (ROOT / file).read_text() for file in ("train_tst.py", "model.py", "data.py")}
    for file, edit in VARIATIONS[name][1].items():
        for pair in edit.strip("\n").split("\n\n"):
            old, new = ("".join(f"{line[1:]}\n" for line in pair.split("\n") if line[0] == sign)
                        for sign in "-+")
            if texts[file].count(old) != 1:
                raise SystemExit(f"{name}: {file} has not exactly once the lines\n{old}")
            texts[file] = texts[file].replace(old, new)
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=VARIATIONS)
    parser.add_argument("--show", action="store_true", help="print the lines and train nothing")
    args, flags = parser.parse_known_args()
    texts = apply(args.name)
    if args.show:
        what, edits = VARIATIONS[args.name]
        return print(what + "".join(f"\n{file}\n{edit}" for file, edit in edits.items()), end="")
    texts["train_tst.py"] = texts["train_tst.py"].replace('f"runs/', f'f"runs/{args.name}-')
    with tempfile.TemporaryDirectory() as folder:
        for file, text in texts.items():
            Path(folder, file).write_text(text)
        sys.argv = [str(Path(folder, "train_tst.py")), *flags]
        sys.path[:0] = [folder, str(ROOT)]                      # tools/ are not copied
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
