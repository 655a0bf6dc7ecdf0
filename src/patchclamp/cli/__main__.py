"""`python -m patchclamp.cli`, for where the script is not on the path."""

from patchclamp.cli.app import main

main()
