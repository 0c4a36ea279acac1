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
# # 2 · What is the model without the rest?
#
# This notebook writes a complete checkpoint with fewer experts per layer. Experts are cut **in the stored format**: MXFP4 bytes are
# sliced, never decoded, so what stays is bit for bit what was there. Router rows go with their experts; the number of experts a
# token is sent to does not change.
#
# A prune can be judged before it is written: `03_evaluate` takes the same parameters as `keep_set`.

# %% tags=["parameters"]
# Parameters
model = "demo/model"
ranking = "outputs/by-hand/rank/ranking.json"
criterion = "reap_mass"
keep_frac = None  # share of the experts that stay; give this or keep_n
keep_n = 24
multiple_of = 4  # fused routing kernels want multiples of 4
core_top_m = 0  # per layer, this many experts with the largest positive mass always stay
keep_super = False  # experts with outlier activations always stay
publish_to = None  # owner/name on the Hugging Face hub: the checkpoint goes there, for its owner alone
out_dir = "outputs/by-hand/pruned-24"  # never overwritten: remove it, or choose another name

# %%
from pathlib import Path

from IPython import get_ipython

from eaftlib import params, project, publish
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets, slicing
from eaftlib.report import figures

project.enter()
p = params.Prune.from_notebook(get_ipython())
if p.publish_to:
    publish.require_place(p.publish_to)

# %% [markdown]
# ## Who stays

# %%
checkpoint = Checkpoint(p.model)
keep = keepsets.from_ranking(checkpoint, **p.keep_set)
print(
    f"keep {keep.keep_n} of {checkpoint.num_experts} experts in each of {checkpoint.num_layers} layers, by {p.criterion}"
)

# %%
for layer in sorted({0, checkpoint.num_layers // 2, checkpoint.num_layers - 1}):
    gone = sorted(set(range(checkpoint.num_experts)) - set(keep.ids[layer].tolist()))
    print(f"layer {layer:2}: without experts {gone}")

# %% [markdown]
# ## Write it
#
# Bytes are copied straight from the source, a few megabytes in memory at a time. They go to a temporary folder that is renamed when everything, the manifest with
# the SHA-256 of every file included, is there. An existing folder is never overwritten.

# %%
manifest = slicing.prune(checkpoint, keep, p.out_dir)
print(f"wrote {p.out_dir}: {len(manifest['sha256'])} files, {manifest['bytes_after']:,} bytes of tensors")

# %%
before, after = slicing.checkpoint_sizes(checkpoint), slicing.checkpoint_sizes(Checkpoint(p.out_dir))
print(
    f"{1 - keep.keep_n / checkpoint.num_experts:.1%} of the experts are {1 - after.total / before.total:.1%} of the bytes"
)
figures.sizes(vars(before), vars(after))

# %% [markdown]
# **Read from it:** attention, embeddings and the LM head stay whole, so bytes shrink more slowly than experts. Opening the new
# checkpoint above has checked the header of every shard against its configuration.

# %% [markdown]
# ## Publish it
#
# With a card that says that nobody has judged it yet; `python -m eaftlib publish` puts the verdict into it once it was evaluated.

# %%
print(publish.publish_unjudged(Path(p.out_dir), p.publish_to) if p.publish_to else "it stays here: publish_to is None")
