#!/usr/bin/env bash
# What the optimized kernels' arithmetic costs: the run of d = 256 with the same seeds on TRAIN_GDN, on the float kernels of
# dev/readable (READABLE: a train_gdn_readable; the last commit that makes it is cb0b095) and on TRAIN_GDN with micro-batches of
# half the size, whose sums are in another order: the difference that a change of rounding makes by itself. 20 s a fast run of
# an H200.
# shellcheck source=dev/results/common.sh
. "$(dirname "$0")/../common.sh"
begin 'books_train_*.bin' 'books_val_*.bin' -- "$@"
fast=$TRAIN_GDN readable=${READABLE:-$(dirname "$TRAIN_GDN")/train_gdn_readable}
[ -x "$readable" ] || { echo "run.sh: READABLE $readable: no such program; make train_gdn_readable in a checkout of cb0b095" >&2; exit 1; }
grid="--optimizers adamw --params mup --widths 256 --lrs ${LRS:-4e-3} --seeds 42,43,44,45"
sweep fast "$grid" "$GPT2_ADAMW -b 64"
TRAIN_GDN=$readable
sweep readable "$grid" "$GPT2_ADAMW -b 64"
TRAIN_GDN=$fast
sweep halves "$grid" "$GPT2_ADAMW -b 32"
[ -z "${DRY_RUN:-}" ] || exit 0
"$PYTHON" - "$OUT" <<'P' | tee "$OUT/losses.md"
import csv, pathlib, statistics, sys

runs = {}
for name in ("fast", "readable", "halves"):
    path = pathlib.Path(sys.argv[1]) / f"{name}.csv"
    rows = csv.DictReader(path.open()) if path.exists() else []
    runs[name] = {(float(r["lr"]), r["seed"]): float(r["val_loss"]) for r in rows if r["status"] == "ok"}
print("| lr | seed | fast | readable | halves |\n|---|---|---|---|---|")
for key in sorted(runs["fast"]):
    print(f"| {key[0]:g} | {key[1]} | " + " | ".join(f"{r[key]:.4f}" if key in r else "" for r in runs.values()) + " |")
print()
for a, b in (("fast", "readable"), ("halves", "fast")):
    d = [runs[a][key] - runs[b][key] for key in runs[a].keys() & runs[b].keys()]
    if len(d) > 1:
        print(f"{a} - {b}: {statistics.mean(d):+.4f} +- {statistics.stdev(d) / len(d) ** 0.5:.4f} (standard error, {len(d)} pairs)")
P
