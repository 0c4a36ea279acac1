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
# It writes `report.html`, `report.md`, `results.csv` and `verdict.json` to `out_dir`.

# %% tags=["parameters"]
# Parameters
results = ["outputs/by-hand/evaluate"]  # result files or folders
baseline = "base"  # label of the unpruned model's result
gates = "params/gates/near-lossless-v1.json"
out_dir = "outputs/by-hand/report"

# %%
from IPython import get_ipython
from IPython.display import Markdown, display

from eaftlib import params, project
from eaftlib.evaluation.gates import read_gates
from eaftlib.evaluation.results import read_all
from eaftlib.report import figures, folder, model, tables

project.enter()
p = params.Report.from_notebook(get_ipython())

# %% [markdown]
# ## Compare and judge
#
# Results of other rows, blocks or another tokenizer are refused. Intervals come from a paired bootstrap over blocks.

# %%
found = model.build(read_all(p.results), p.baseline, read_gates(p.gates))
files = folder.write(found, p.out_dir)
print(found.headline)

# %%
if found.curve:
    display(figures.keep_curve(found.curve))

# %% [markdown]
# **Read from it:** inside the green band a keep-set passes the perplexity gate. Where a line crosses it is how many experts that
# criterion can spare. A star is a recovered model: pruned, then trained in its small tensors, so it stands on no criterion's line. Bars
# are 95 % intervals.

# %%
display(Markdown(tables.markdown(found)))

# %% [markdown]
# **Read from it:** a FAIL names its gate, the value and the limit. UNDECIDED means that the evaluation is too small for the JS2D gate: use
# more blocks. A pass whose interval reaches past the limit says so, and deserves more blocks too.
