"""The ``qnext`` command. :mod:`qnext_plugins.cli.app` names its subcommands; each lies in a package of its own."""
