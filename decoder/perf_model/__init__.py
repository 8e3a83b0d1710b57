"""When speculation pays: the MoESD theory, two fitted models of it, and a machine-only prediction.

``theory`` holds the paper's formulas, ``paper_model`` its ten-parameter model, ``forward_model``
ours (from model structure and rooflines), ``model_spec`` and ``config_spec`` bytes from a config,
``machine`` rooflines by name or measured, ``profile`` the JSON in which fits are kept. Importing
this package imports numpy and nothing else; scipy and transformers load where they are used.
"""
