"""Where neurons begin: homes, expected load, the solver and its plan files. Moves nothing while a model runs."""
