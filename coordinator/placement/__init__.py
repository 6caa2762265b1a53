"""Where neurons start: homes, expected load, the solver and its plan files. Nothing here runs while a model decodes."""
