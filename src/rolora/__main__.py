"""``python -m rolora`` is the ``rolora`` command."""

from rolora.cli.main import main

main()
