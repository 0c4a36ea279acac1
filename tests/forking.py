"""Processes that begin with torch and transformers loaded: a fork of one that has done nothing else.

Run as a script it is that one: a line of JSON on its input starts a process, its id and then its exit status are answered.
"""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

MODULES = ("torch", "transformers", "transformers.models.gpt_oss.modeling_gpt_oss")


class Forks:
    """What the modules read of the environment when they are imported is that of ``environment``, for every process.

    modules: what is loaded besides MODULES, by the interpreter ``python``.
    """

    def __init__(self, environment, modules=("eaftlib.publish",), python=sys.executable):
        command = [python, __file__, *MODULES, *modules]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, code, words=(), *, cwd, **environment):
        """The id of a process that executes ``code`` with these arguments; what it prints goes to files in ``cwd``."""
        wanted = {"code": code, "words": list(map(str, words)), "cwd": str(cwd), "env": environment}
        self._server.stdin.write(json.dumps(wanted) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self):
        return int(self._server.stdout.readline())

    def run(self, code, words=(), *, cwd, **environment):
        self.start(code, words, cwd=cwd, **environment)
        return SimpleNamespace(
            returncode=self.wait(), output=(cwd / "stdout").read_text(), errors=(cwd / "stderr").read_text()
        )

    def close(self):
        self._server.kill()
        self._server.communicate()


def _child(wanted):
    os.chdir(wanted["cwd"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(wanted["env"])
    sys.argv = ["-c", *wanted["words"]]
    try:
        exec(compile(wanted["code"], "code", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def main():
    for name in sys.argv[1:]:
        importlib.import_module(name)
    transformers = sys.modules["transformers"]  # loads what it is asked for, when it is
    assert transformers.AutoModelForCausalLM and transformers.AutoTokenizer and transformers.Mxfp4Config
    for line in sys.stdin:
        if (process := os.fork()) == 0:
            _child(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
