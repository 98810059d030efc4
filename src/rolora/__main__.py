"""``python -m rolora`` is the ``rolora`` command."""

from rolora.cli import main

main()
