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
# # 5 · How much of the loss can be won back?
#
# A pruned model has lost experts, and the rest were never told. Here the whole model teaches the pruned one: on every token, the
# pruned model is to give the same distribution of the next token. Only **small tensors** are trained (routers, expert biases, norms,
# attention; the LM head if asked for). Every expert matrix that stays is, byte for byte, what it was.
#
# Teacher and student are one set of weights in memory; where those do not fit, layers are streamed, forward and back. The last blocks
# of the text are held back: how well the student does there decides when to stop, and which step's tensors are written.
#
# `out_dir` becomes a complete checkpoint that `03_evaluate` and `04_report` take like any other. A run that was stopped goes on where
# it was.

# %% tags=["parameters"]
# Parameters
model = "demo/model"
ranking = "outputs/by-hand/rank/ranking.json"
criterion = "recon"
keep_frac = None  # share of the experts that stay; give this or keep_n
keep_n = 16
multiple_of = 4
core_top_m = 0
keep_super = False
trained = ["routers", "expert_biases", "norms", "attention"]  # and lm_head; expert matrices never are
attention_rank = None  # None: attention matrices whole; else a low-rank update of each, merged at the end
packs = "demo/packs"
pack_files = None
rows = "calib"  # never the rows that the model is judged on
seq_len = 1024
num_blocks = 256  # those held back included
held_out_blocks = 8  # not trained on: they say when to stop
batch_blocks = 4  # blocks per step
steps = 60
learning_rate = 2e-3
check_every = 20  # steps between two looks at the blocks that are held back
patience = 5  # looks without a better one, and training stops
other_weight = 0.15  # in the loss, of tokens that are not the assistant's
entropy_topk = 20
cc_quantile = 0.15
w_good = (
    1.0  # weights in the loss by EAFT region; conflict 0: what the whole model is sure and wrong about is not taught
)
w_uncertain = 1.0
w_conflict = 1.0
seed = 0
init = None  # trained.safetensors of an earlier run, to begin with
device = "auto"
dtype = "auto"
max_gpu_memory = None  # GB; None: all that is free. Layers that do not fit are streamed
publish_to = None  # owner/name on the Hugging Face hub: the checkpoint goes there, for its owner alone
out_dir = "outputs/by-hand/recovered-16"  # never overwritten: remove it, or choose another name

# %%
import json
from pathlib import Path

from IPython import get_ipython

from eaftlib import params, project, publish
from eaftlib.engine.placement import place
from eaftlib.model.checkpoint import Checkpoint
from eaftlib.pruning import keepsets
from eaftlib.recovery import RECORD
from eaftlib.recovery.loop import Objective, Schedule
from eaftlib.recovery.recover import recover, training_folder
from eaftlib.report import figures
from eaftlib.text.packs import UNION, PackSource, pack_blocks

project.enter()
p = params.Recover.from_notebook(get_ipython())
if p.publish_to:
    publish.require_place(p.publish_to)

# %% [markdown]
# ## The student, and the text that it learns from

# %%
checkpoint = Checkpoint(p.model)
placement = place(p.device, p.dtype, p.max_gpu_memory, training=True)
keep = keepsets.from_ranking(checkpoint, **p.keep_set)
print(
    f"{keep.keep_n} of {checkpoint.num_experts} experts in each of {checkpoint.num_layers} layers, by {p.criterion}, on {placement}"
)

# %%
source, spans = PackSource(p.packs, p.pack_files), checkpoint.family.completion_spans
blocks = pack_blocks(
    source, UNION, checkpoint.tokenizer, spans, seq_len=p.seq_len, num_blocks=p.num_blocks, rows=p.rows
)
text_tokens = blocks.tokens[: -p.held_out_blocks].size
print(
    f"{text_tokens:,} tokens to train on ({p.rows} rows), {p.steps * p.batch_blocks * p.seq_len / text_tokens:.1f} times; "
    f"{p.held_out_blocks} blocks held back"
)

# %% [markdown]
# ## Training
#
# The curve is drawn anew at every look at the blocks that are held back. The star is the best so far: its tensors are written.

# %%
manifest = recover(
    checkpoint, keep, blocks, placement,
    parts=p.trained, attention_rank=p.attention_rank, held_out_blocks=p.held_out_blocks,
    schedule=Schedule(p.steps, p.batch_blocks, p.learning_rate, p.check_every, p.patience, p.seed),
    objective=Objective(p.other_weight, p.w_good, p.w_uncertain, p.w_conflict, p.cc_quantile, p.entropy_topk),
    settings=p.settings, init=p.init, out_dir=p.out_dir, on_look=figures.RecoveryCurve(),
)  # fmt: skip

# %%
about, record = manifest["recovered"], json.loads((training_folder(p.out_dir) / RECORD).read_text())
first, best = record["curve"][0], next(look for look in record["curve"] if look["step"] == record["best_step"])
print(
    f"{about['parameters']:,} numbers trained, {about['parameters_share']:.1%} of the whole model's, on {about['tokens']:,} tokens\n"
    f"perplexity of the text held back: {first['held_out_ppl']:.3f} at first, {best['held_out_ppl']:.3f} recovered, "
    f"{record['held_out_ppl_whole']:.3f} whole\nwrote {p.out_dir}"
)

# %% [markdown]
# **Read from it:** the text held back is of the same kind as the text trained on, and few blocks; what counts is `03_evaluate` on rows
# that nothing was chosen or trained by. A curve that falls in training but rises here has learnt the text by heart: give it more rows.

# %% [markdown]
# ## Publish it
#
# With a card that says that nobody has judged it yet; `python -m eaftlib publish` puts the verdict into it once it was evaluated.

# %%
print(publish.publish_unjudged(Path(p.out_dir), p.publish_to) if p.publish_to else "it stays here: publish_to is None")
