"""`python -m warmfront.coordinator.harness ...`: lm-eval's command line with `--model warmfront` beside its own models.

lm-eval has no way yet to find a model in a package that is installed beside it.
"""

import lm_eval.models  # noqa: F401  Its own, which it looks for only while it knows no model.
from lm_eval.__main__ import cli_evaluate

import warmfront.coordinator.harness.lm_eval_model  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
