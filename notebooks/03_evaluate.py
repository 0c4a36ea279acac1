# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · What did that cost?
#
# The model reads packed conversations and is scored on the assistant's tokens only: how probable was the token that came (p), how
# unsure was the model (H, the entropy of its top 20 candidates), and how often was it *sure and wrong* (confident conflicts).
#
# `keep_set` scores a pruned model **without writing it**: the removed experts' router logits become minus infinity, which gives the same
# logits. A list of keep-sets is scored in one pass over the weights, and an entry with a label alone is the whole model.

# %% tags=["parameters"]
# Parameters
model = "demo/model"
label = None  # name of the result; None: "base", for the whole model
keep_set = None  # {ranking, criterion, keep_n or keep_frac, ...}, or a list of those, each with its label
packs = "demo/packs"
pack_files = None
only = None  # every pack and UNION; or a list of those names
rows = "all"
seq_lens = [1024, 2048]
num_blocks = 16  # of each length; or a list, one for each of seq_lens
entropy_topk = 20
cc_quantile = 0.15
device = "auto"
dtype = "auto"
max_gpu_memory = None  # GB; None: all that is free. Layers that do not fit are streamed
out_dir = "outputs/by-hand/evaluate"

# %%
import pandas as pd
from IPython import get_ipython
from IPython.display import display

from eaftlib import params, project
from eaftlib.engine.placement import place
from eaftlib.evaluation import results
from eaftlib.evaluation.evaluate import evaluate
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets
from eaftlib.report import figures
from eaftlib.text.packs import PackSource

project.enter()
p = params.Evaluate.from_notebook(get_ipython())

# %% [markdown]
# ## The model, the text, the keep-sets

# %%
checkpoint = Checkpoint(p.model)
source = PackSource(p.packs, p.pack_files)
placement = place(p.device, p.dtype, p.max_gpu_memory)
keep_sets = {label: how and keepsets.from_ranking(checkpoint, **how) for label, how in p.keep_sets.items()}
print(f"{len(keep_sets)} model(s) on {', '.join(p.only or source.names)} at {p.seq_lens}, on {placement}")

# %% [markdown]
# ## One pass per pack and sequence length

# %%
written = evaluate(
    checkpoint, source, placement, keep_sets,
    seq_lens=p.seq_lens, num_blocks=p.blocks_by_length, only=p.only, rows=p.rows,
    entropy_topk=p.entropy_topk, cc_quantile=p.cc_quantile, out_dir=p.out_dir,
)  # fmt: skip
print(f"wrote {len(written)} result(s) to {p.out_dir}")

# %% [markdown]
# ## What came out

# %%
scored = [results.read(path) for path in written]
columns = ["ppl", "mean_prob", "mean_entropy", "cc_rate", "kl_to_base", "top1_agreement", "kept_tokens", "tok_s_pred"]
table = pd.DataFrame(
    {"model": r.label, "pack": pack, "seq_len": length} | {c: entry["model"].get(c) for c in columns}
    for r in scored for (pack, length), entry in r.entries.items()
)  # fmt: skip
display(table.style.format(precision=4, thousands=",").hide())

# %% [markdown]
# **Read from it:** compare models on one pack and one sequence length only. `cc_rate` is taken at each model's own thresholds here; the
# gates take it at the baseline's.

# %%
for (pack, length), entry in scored[0].entries.items():
    display(figures.landscape(entry["model"], f"{scored[0].label}, {pack}, {length} tokens"))

# %% [markdown]
# **Read from it:** a healthy model has its mass at the right (sure and right) and along the falling edge (honestly unsure). Tokens left
# of the vertical and under the horizontal line are confident conflicts: the model was sure of something else.
