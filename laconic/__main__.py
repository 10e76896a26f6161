"""`python -m laconic`: the same as the command `laconic`."""

from laconic.cli import main

main()
