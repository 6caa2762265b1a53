"""`python -m warmfront` is the command `warmfront`."""

from warmfront.coordinator.cli.main import main

main()
