"""Training of the embedded pair: corpus, tokenizer, MoE target, distilled draft, EAGLE head.

Run ``python -m training all --minutes N`` to repeat it, ``python -m training evaluate`` to print
the numbers of ``decoder/embedded/MODEL_CARD.md``. Nothing here is needed to use the decoder.
"""
