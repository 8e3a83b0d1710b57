"""When speculation pays: the MoESD theory, two fitted models of it, and a machine-only prediction.

``theory`` holds the paper's formulas, ``paper_model`` its ten-parameter model, ``forward_model``
ours (from model structure and rooflines), ``model_spec`` and ``config_spec`` bytes from a config
with ``layers`` for what one layer holds and keeps, ``presets`` those configs by name, ``hardware``
rooflines by name or measured, ``parallel`` experts over many ranks, ``planning`` the answer over a
grid, ``profile`` the JSON in which fits are kept. All of it forecasts; what decides while decoding
is ``decoder.gamma``, which takes a forecast as a function and imports nothing from here. Importing
this package loads nothing; its files import numpy, and load scipy and transformers where they use
them.
"""
