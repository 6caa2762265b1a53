"""`python -m warmfront` is the command `warmfront`."""

from warmfront.coordinator.cli import main

main()
