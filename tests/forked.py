"""Runs a command several times, as copies of one process that has imported JAX but not used it.

    python -m tests.forked MODULE CASES     CASES is JSON: the arguments of each case

Writes JSON: the [exit code, output, errors] of each case.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile

import flax_cnns.runs.train  # noqa: F401  imports JAX and what commands need

if __name__ == "__main__":
    module, cases = sys.argv[1], json.loads(sys.argv[2])
    results = []
    for arguments in cases:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if not child:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv[1:] = arguments
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                sys.exit()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in (output, errors):
                file.seek(0)
            results.append([code, output.read(), errors.read()])
    json.dump(results, sys.stdout)
