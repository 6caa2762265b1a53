"""Where neurons go while a model runs: policies without I/O, and the table of owners that carries them out."""
