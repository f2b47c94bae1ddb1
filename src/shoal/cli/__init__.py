"""The command line: ``shoal demo`` and ``shoal peer``. Uses the public API of Shoal alone."""
