"""Processes that begin with torch and transformers loaded: a fork of one that has done nothing else.

Run as a script it is that one: a line of JSON on its input starts a process, its id and then its exit status are answered.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace


class Forks:
    """What the modules read of the environment when they are imported is that of ``environment``, for every process."""

    def __init__(self, environment):
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
        self._server.stdin.close()
        self._server.wait(30)


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
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config  # noqa: F401
    from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: F401

    import eaftlib.publish  # noqa: F401

    for line in sys.stdin:
        if (process := os.fork()) == 0:
            _child(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
