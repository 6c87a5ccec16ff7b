"""`python -m zerank_integrations` is the `zerank` command."""

from zerank_integrations.cli import main

main()
