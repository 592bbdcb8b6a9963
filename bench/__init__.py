"""``python -m bench``: normops against torch on the norm calls of real models. ``bench.report``, ``.accuracy``, ``.nnunet`` fill the README."""
