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
# # 0 · What if it were weighted otherwise?
#
# `01_rank` runs the model once and stores what every expert did for every token. Whatever is computed from that can be tried out
# here without the model: other weights of the three regions, another quantile between them, another criterion, more or
# fewer experts. Who stays, what they have in common with another choice, and what the layers would lose move with the sliders.
#
# It reads `ranking.json` and the `trace.safetensors` beside it. It writes nothing, unless you press the button: then the
# parameters of what is shown go to `out_dir`.

# %% tags=["parameters"]
# Parameters
ranking = "outputs/demo/rank/ranking.json"
criterion = "eaft_reap"  # at first; any of 01_rank's, recon where the ranking has it
keep_n = 16  # experts per layer, at first
out_dir = "outputs/by-hand/explore"

# %%
from pathlib import Path

from IPython import get_ipython

from eaftlib import params, project
from eaftlib.pruning.explore import Explorer
from eaftlib.pruning.ranking import read_ranking
from eaftlib.pruning.trace import Trace
from eaftlib.report.explorer import Panel

project.enter()
p = params.Explore.from_notebook(get_ipython())

# %%
trace = Trace.load(Path(p.ranking).with_name("trace.safetensors"))
explorer = Explorer(trace, read_ranking(p.ranking))
print(f"{len(trace.expert)} layers x {trace.num_experts} experts, top {explorer.top_k}; {len(trace.nll):,} tokens")

# %%
panel = Panel(explorer, ranking=p.ranking, keep_n=p.keep_n, criterion=p.criterion, out_dir=p.out_dir)
panel.show()

# %% [markdown]
# **Read from it:** above, each layer's experts from best to worst, those that stay marked; where the marks have gaps, keep-sets after
# swaps differ from the ranking (`recon`). Below, in bars, how many of them the other criterion would keep too, which share of
# the layer's weighted output sum(g n) they make, and what the layer would lose once the tokens of those that go are sent to the next
# ones; dashes are the other criterion's. The predicted loss is exact for each layer on the sampled tokens with the whole
# model's inputs: errors that add up over layers are not in it. Only `03_evaluate` shows what a keep-set costs.
#
# ## Take it further
#
# The parameters of what is shown now: for `03_evaluate`, and for `01_rank` before it where the ranking that was read does not
# have these settings. Run the cell again after moving a slider, or press the button for files.

# %%
print(panel.yaml())
panel.write_button()
