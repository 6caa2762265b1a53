"""The commands of `warmfront`: options, output, advice. Nothing here is for other programs to call."""
