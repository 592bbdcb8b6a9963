"""``python -m bench``: normops against torch on the norm calls of real models. ``bench.report`` and ``bench.accuracy`` fill the README."""
