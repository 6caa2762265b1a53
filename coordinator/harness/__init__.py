"""The engine as a model of lm-eval, EleutherAI's harness; needs the extra `lm-eval`."""
