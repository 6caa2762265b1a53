"""The commands of `warmfront`: options, output, advice. Nothing here that another program could want to call."""
