"""The strategy of both of Lightning's packages, ``lightning`` and ``pytorch_lightning``; it imports neither."""
