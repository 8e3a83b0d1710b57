"""Upcycling: SmolLM2-135M-Instruct, dense, becomes a sparse MoE; an EAGLE-3 head is trained for it.

``python -m training.upcycle all --minutes N`` repeats it. What it makes is installed in
``decoder/smol/assets``; nothing here is needed to use the decoder.
"""
