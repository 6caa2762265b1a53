"""`python -m warmfront.coordinator.harness ...`: lm-eval's command line with `--model warmfront` beside its own models.

lm-eval has no way yet to find a model in a package that is installed beside it. What is wrong with the model or its
arguments is one line, and the exit codes are those of `warmfront`.
"""

import sys

import lm_eval.models  # noqa: F401  Its own, which it looks for only while it knows no model.
from lm_eval.__main__ import cli_evaluate

import warmfront.coordinator.harness.lm_eval_model  # noqa: F401
from warmfront.shared.errors import WarmfrontError


def _run() -> int:
    try:
        cli_evaluate()
    except WarmfrontError as error:
        print(f"warmfront: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(_run())
