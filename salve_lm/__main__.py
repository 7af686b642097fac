"""`python -m salve_lm`."""

from salve_lm.cli import main

main()
