"""python -m eaftlib: what is useful outside a notebook."""

import argparse
import json
import sys
from pathlib import Path

from .errors import EaftError
from .params import BASE, NOTEBOOKS, check_file

GATES = Path("params/gates/near-lossless-v1.json")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m eaftlib", description=__doc__)
    commands = whole.add_subparsers(required=True)
    summary = commands.add_parser("summary", help="print a report's verdicts: criteria by keep counts")
    summary.add_argument("verdicts", type=Path, nargs="+", help="verdict.json of a report; of several, in one table")
    summary.set_defaults(run=_summary)
    notebooks = commands.add_parser("notebooks", help="generate every .ipynb from its percent script")
    notebooks.add_argument("--check", action="store_true", help="write nothing; fail if one differs from its source")
    notebooks.set_defaults(run=_notebooks)
    check = commands.add_parser("check", help="see whether a notebook takes a file of parameters, before it is run")
    check.add_argument("notebook", choices=NOTEBOOKS)
    check.add_argument("params", type=Path, help="one file of params/")
    check.set_defaults(run=_check)
    verify = commands.add_parser("verify", help="read a whole checkpoint and name whatever is wrong with it")
    verify.add_argument("model", help="its folder, or owner/name on the hub")
    verify.set_defaults(run=_verify)
    _add_results(commands)
    _add_hub(commands)
    _add_snapshot(commands)
    _add_kaggle(commands)
    return whole


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on", file=sys.stderr)
        return 130
    except (EaftError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _add_results(commands) -> None:
    actions = commands.add_parser("results", help="results outside their run").add_subparsers(required=True)
    extract = actions.add_parser("from-notebook", help="write the result JSONs that an executed notebook carries")
    extract.add_argument("notebook", type=Path, help="any executed copy, with its outputs, of a built notebook")
    extract.add_argument(
        "--out-dir", type=Path, help="where to write them; if not given, a folder beside it, named after the run"
    )
    extract.set_defaults(run=_from_notebook)


def _add_hub(commands) -> None:
    card = commands.add_parser("card", help="write the model card of a pruned checkpoint, README.md beside it")
    publish = commands.add_parser("publish", help="send a pruned checkpoint and its card to the Hugging Face hub")
    for action in (card, publish):
        action.add_argument("folder", type=Path, help="a checkpoint of 02_prune or 05_recover")
    publish.add_argument("name", help="owner/name on the hub; a new repository is private")
    for action in (card, publish):
        action.add_argument("--result", type=Path, required=True, help="what 03_evaluate wrote for this checkpoint")
        action.add_argument("--baseline", type=Path, required=True, help="the same for the model it was cut from")
        action.add_argument("--gates", type=Path, default=GATES, help=f"{GATES} if not given")
    publish.add_argument("--public", action="store_true", help="let everybody see it")
    card.set_defaults(run=_card)
    publish.set_defaults(run=_publish)


def _add_snapshot(commands) -> None:
    snapshot = commands.add_parser("snapshot", help="write the tables of the quality snapshot from results")
    snapshot.add_argument("results", nargs="+", help="result JSONs, or folders of them; rows in this order")
    snapshot.add_argument("--baseline", default=BASE, help="label of the whole model")
    snapshot.add_argument("--gates", type=Path, default=GATES, help=f"{GATES} if not given")
    snapshot.add_argument("--published", type=Path, help="figures of others, to stand beside those of equal labels")
    snapshot.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    snapshot.set_defaults(run=_snapshot)


def _add_kaggle(commands) -> None:
    actions = commands.add_parser("kaggle", help="runs on Kaggle's GPUs").add_subparsers(required=True)
    build = actions.add_parser("build", help="only build the notebook of a run, to read it or to open it in Colab")
    build.add_argument("params", type=Path, help="one file of params/")
    build.add_argument("folder", type=Path, help="new folder for the notebook and its metadata")
    build.set_defaults(run=_kaggle_build)
    push = actions.add_parser("push", help="queue runs, submit them and stay until they are verified")
    push.add_argument("params", type=Path, nargs="+", help="files of params/, one run each")
    push.add_argument("--at-limit", choices=("wait", "stop"), default="wait", help="no session or no quota left")
    push.add_argument("--resume", action="store_true", help="push failed runs again, with the results they have")
    push.add_argument("--until", choices=("verified", "submitted"), default="verified", help="when it returns")
    push.set_defaults(run=_kaggle_push)
    follow = actions.add_parser("follow", help="stay until runs are verified, over as many sessions as they take")
    follow.add_argument("runs", nargs="*", help="names in kaggle_runs/; if none is given, all that are not settled")
    follow.add_argument("--at-limit", choices=("wait", "stop"), default="wait", help="no session or no quota left")
    follow.set_defaults(run=_kaggle_follow)
    for name, what in (("status", "ask how runs are getting on"), ("pull", "bring results back and check them")):
        action = actions.add_parser(name, help=what)
        action.add_argument("runs", nargs="*", help="names in kaggle_runs/; all if none is given")
        action.set_defaults(run=_kaggle_status if name == "status" else _kaggle_pull)


def _from_notebook(options) -> int:
    from .kaggle import outcome

    found, written = outcome.from_notebook(options.notebook, options.out_dir)
    why = f": {outcome.last_line(found.error)}" if found.error else ""
    print(f"{found.run}, attempt {found.attempt}, {found.status}{why}", *written, sep="\n  ")
    return int(found.status != "complete")


def _kaggle_build(options) -> int:
    from .kaggle import build

    settings = build.read_settings()
    plan = build.plan(options.params, settings)
    build.build(plan, settings, options.folder, "INSERT_OWNER")
    print(f"{options.folder}/{build.NOTEBOOK_FILE}  {plan.run}")
    data_sets = sorted(file.parent for file in options.folder.glob("*/dataset-metadata.json"))
    print("To push it by hand, replace INSERT_OWNER in each *-metadata.json by your Kaggle user name, then")
    for folder in data_sets:
        print(f"    .venv/bin/kaggle datasets create -p {folder}    # wait until its page says that it is ready")
    print(f"    .venv/bin/kaggle kernels push -p {options.folder} --timeout {build.session_seconds(settings)}")
    return 0


def _kaggle_push(options) -> int:
    from .kaggle import finishing, pushing
    from .kaggle.service import Service

    service = Service()
    runs = pushing.queue(options.params, service, resume=options.resume)
    see_to = {"verified": finishing.follow, "submitted": pushing.submit}[options.until]
    return int(any(entry.state == "failed" for entry in see_to(service, runs, at_limit=options.at_limit)))


def _kaggle_follow(options) -> int:
    from .kaggle import finishing
    from .kaggle.service import Service

    followed = finishing.follow(Service(), options.runs, at_limit=options.at_limit)
    return int(any(entry.state == "failed" for entry in followed))


def _kaggle_status(options) -> int:
    from .kaggle import following
    from .kaggle.service import Service

    service = Service()
    for entry in following.follow(service, options.runs):
        print(following.describe(entry))
    print(service.quota() or "Kaggle does not say how many GPU hours are left")
    return 0


def _kaggle_pull(options) -> int:
    from .kaggle import pulling
    from .kaggle.service import Service

    pulled = pulling.pull(Service(), options.runs)
    return int(any(entry.state in ("failed", "unfinished") for entry in pulled))


def _summary(options) -> int:
    from .report.tables import summary

    print(summary(*(json.loads(path.read_text()) for path in options.verdicts)))
    return 0


def _card(options) -> int:
    from .evaluation import gates, results
    from .model.checkpoint import Checkpoint
    from .report import card

    scored = results.read(options.result), results.read(options.baseline)
    made = card.build(Checkpoint(str(options.folder)), *scored, gates.read_gates(options.gates))
    print(card.write(made, options.folder))
    return 0


def _publish(options) -> int:
    from .evaluation import gates, results
    from .publish import publish

    scored = results.read(options.result), results.read(options.baseline)
    print(publish(options.folder, options.name, *scored, gates.read_gates(options.gates), public=options.public))
    return 0


def _snapshot(options) -> int:
    from .evaluation import gates, results
    from .files import write_atomically
    from .report import snapshot

    published = snapshot.read_published(options.published) if options.published else None
    found = results.read_all(options.results)
    text = snapshot.markdown(found, options.baseline, gates.read_gates(options.gates), published)
    write_atomically(options.out, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    print(options.out)
    return 0


def _check(options) -> int:
    check_file(options.notebook, options.params)
    return 0


def _verify(options) -> int:
    from .pruning.verify import verify

    print(verify(options.model))
    return 0


def _notebooks(options) -> int:
    from . import notebooks

    sources = notebooks.stale() if options.check else notebooks.regenerate()
    for source in sources:
        print(
            f"{source.with_suffix('.ipynb')} "
            + ("differs from its source; run make notebooks" if options.check else "written")
        )
    return int(options.check and bool(sources))


if __name__ == "__main__":
    sys.exit(main())
