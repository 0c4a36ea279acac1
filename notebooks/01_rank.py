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
# # 1 · Which experts matter, per layer?
#
# A Mixture-of-Experts model sends every token to a few of its experts. Some experts are asked often and loudly, some
# hardly at all. This notebook lets the model read calibration text once, writes down what every expert did for every token,
# and scores the experts by several criteria. The project's own, **EAFT-REAP**, sums `w · g · ‖f(x)‖` over the tokens
# routed to an expert: router weight times the size of its output, weighted by whether the model was *sure and right* (+1),
# *unsure* (+0.25) or *sure and wrong* (−2).
#
# It writes `ranking.json`, `saliency.parquet` and `trace.safetensors` to `out_dir`.

# %% tags=["parameters"]
# Parameters
model = "demo/model"  # folder, or an id on the Hugging Face hub
packs = "demo/packs"  # folder, Kaggle data set, or data set id on the hub
pack_files = None  # None: every parquet file, sorted
rows = "all"  # all, calib or eval: choose experts on calib and judge them on eval
seq_len = 2048
num_blocks = 32
criteria = ["eaft_reap", "reap_mass", "reap", "ean", "frequency", "random"]
entropy_topk = 20
cc_quantile = 0.15
w_good = 1.0
w_uncertain = 0.25
w_conflict = -2.0
align = "predictor"  # a token's weight goes to the experts that predicted it (position t-1)
recon_tokens = 4096  # for the criterion recon: positions at which all experts are run
device = "auto"
dtype = "auto"
max_gpu_memory = None  # GB; None: all that is free. Layers that do not fit are streamed
seed = 0
out_dir = "outputs/by-hand/rank"

# %%
from pathlib import Path

import numpy as np
from IPython import get_ipython

from eaftlib import params, project
from eaftlib.engine.placement import place
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning.criteria import RegionWeights, expert_sums, token_weights
from eaftlib.pruning.ranking import ranking_of, write_ranking
from eaftlib.pruning.trace import record
from eaftlib.report import figures
from eaftlib.text.packs import UNION, PackSource, pack_blocks

project.enter()
p = params.Rank.from_notebook(get_ipython())

# %% [markdown]
# ## The model and the text
#
# Opening a checkpoint checks every header before any weight is read. The calibration text is UNION: rows of all packs in turn.

# %%
checkpoint = Checkpoint(p.model)
source = PackSource(p.packs, p.pack_files)
placement = place(p.device, p.dtype, p.max_gpu_memory)
print(f"{checkpoint.num_layers} layers x {checkpoint.num_experts} experts, top {checkpoint.top_k}, on {placement}")

# %%
spans = checkpoint.family.completion_spans  # of the chat format: what the assistant says
blocks = pack_blocks(
    source, UNION, checkpoint.tokenizer, spans, seq_len=p.seq_len, num_blocks=p.num_blocks, rows=p.rows
)
print(
    f"{len(blocks.tokens)} blocks of {p.seq_len} from {blocks.rows_seen} rows ({p.rows}): {blocks.kept.sum():,} tokens kept"
)

# %% [markdown]
# ## One pass records everything
#
# Per kept token its probability and entropy; per routed pair the expert, its router weight and the norm of its output.
# Criteria, weights and quantiles can be changed afterwards without the model: `Trace.load(...)`. For `recon`, the same pass runs
# all experts on a sample of tokens. A run that was killed goes on from its last minute.

# %%
recon_tokens = p.recon_tokens if "recon" in p.criteria else 0
trace, run = record(
    checkpoint, blocks, placement, entropy_topk=p.entropy_topk, recon_tokens=recon_tokens, out_dir=Path(p.out_dir)
)
print(f"{run.seconds:.1f} s, {run.tokens_per_second:,.0f} tokens/s; {trace.expert.size:,} routed pairs")

# %%
weight = token_weights(trace, p.cc_quantile, RegionWeights(p.w_good, p.w_uncertain, p.w_conflict))
sums = expert_sums(trace, weight, p.align)
for value in np.unique(weight):
    print(f"weight {value:+.2f}   {(weight == value).mean():8.3%} of tokens")

# %% [markdown]
# **Read from it:** conflicts are rare, so the negative weight can hardly move a rank by itself; what EAFT weighting mostly does is
# to let the confident tokens count four times as much as the unsure ones.
#
# ## The ranking

# %%
settings = p.model_dump(include={"packs", "pack_files", "cc_quantile", "w_good", "w_uncertain", "w_conflict", "align"})
ranking = ranking_of(trace, sums, p.criteria, settings=settings, seed=p.seed)
write_ranking(Path(p.out_dir), ranking, sums)
scores = {name: np.array(c["scores"], float) for name, c in ranking["criteria"].items()}
print(f"wrote {p.out_dir}/ranking.json  sha256 {ranking['provenance']['sha256'][:16]}")

# %%
keep_n = checkpoint.num_experts // 2
figures.saliency_map(scores[p.criteria[0]], p.criteria[0], keep_n)

# %% [markdown]
# **Read from it:** a layer that is dark on the right has experts that hardly contribute (white: never routed, or negative); a layer of
# one colour needs them all.

# %%
masses = {name: s for name, s in scores.items() if name not in ("random", "recon")}
figures.mass_concentration(masses) if masses else None

# %% [markdown]
# **Read from it:** the further a line bows above the diagonal, the more of that criterion's mass survives when few experts stay. Only
# `03_evaluate` shows what it costs.

# %%
figures.criteria_agreement({name: np.array(c["ranking"]) for name, c in ranking["criteria"].items()}, keep_n)

# %% [markdown]
# **Read from it:** two criteria that keep the same experts cannot differ in quality. The `random` row shows what chance agrees on.

# %%
figures.reconstruction_loss(ranking["criteria"]["recon"]["losses"]) if "recon" in p.criteria else None

# %% [markdown]
# **Read from it** (with `recon` among the criteria): what share of its experts' output (squared) each layer loses at a count, with the
# tokens of removed experts sent to the next ones. Layers are looked at one by one: errors that add up over layers are not in it.
