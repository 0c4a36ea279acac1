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
# # 4 · Is it near-lossless?
#
# Results are compared with a baseline on the same tokens and put before strict gates: perplexity, confident conflicts, mean
# probability and the shape of the whole (p, H) landscape, at every primary sequence length. All must pass.
#
# It writes `report.html`, `report.md`, `results.csv`, `verdict.json` and `figures/` to `out_dir`. The page is one file that needs no
# network: send it as it is. docs/report.md says what each part of it shows.

# %% tags=["parameters"]
# Parameters
results = ["outputs/by-hand/evaluate"]  # result files or folders
baseline = "base"  # label of the unpruned model's result
gates = "params/gates/near-lossless-v1.json"
rankings = None  # ranking.json files or their folders, shown expert by expert; None: none
conflict_texts = (
    False  # show the text of the worst new conflicts: needs model and packs, and puts their text into the page
)
out_dir = "outputs/by-hand/report"

# %%
from IPython import get_ipython
from IPython.display import Markdown, display

from eaftlib import params, project
from eaftlib.evaluation.gates import read_gates
from eaftlib.evaluation.results import read_all
from eaftlib.report import charts, figures, folder, model, tables
from eaftlib.report.conflicts import worst_conflicts
from eaftlib.report.saliency import read_saliencies

project.enter()
p = params.Report.from_notebook(get_ipython())

# %% [markdown]
# ## Compare and judge
#
# Results of other rows, blocks or another tokenizer are refused. Intervals come from a paired bootstrap over conversations.

# %%
scored, limits = read_all(p.results), read_gates(p.gates)
conflicts = worst_conflicts(scored, p.baseline, limits) if p.conflict_texts else ()
found = model.build(scored, p.baseline, limits, read_saliencies(p.rankings or ()), conflicts)
files = folder.write(found, p.out_dir)
print(found.headline, *files, sep="\n")

# %%
if shown := found.best or found.nearest:
    display(charts.gates(shown))

# %% [markdown]
# **Read from it:** a gate passes where its bar ends in the shaded band. It is shown to hold where the whole line, the 90 % interval, lies
# there too. Of JS2D the line is the estimate without bias, so it may lie beside the bar's end.

# %%
if found.curve:
    display(figures.keep_curve(found.curve))

# %% [markdown]
# **Read from it:** inside the green band a keep-set passes the perplexity gate. Where a line crosses it is how many experts that
# criterion can spare. A star is a recovered model: pruned, then trained in its small tensors, so it stands on no criterion's line. Bars
# are 90 % intervals.

# %%
display(Markdown(tables.markdown(found)))

# %% [markdown]
# **Read from it:** PASS and FAIL hold the values against the limits. EQUIVALENT and DIFFERENT are about the whole interval, inside the
# limits or outside; UNDECIDED says how many blocks would decide. `report.html` has all of it as bars, and compares any two models.
