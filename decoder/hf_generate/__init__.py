"""Batched speculative decoding behind transformers' own ``generate``.

``model.generate(**inputs, custom_generate=speculative(draft_model), max_new_tokens=64)`` returns
what ``generate`` returns for the same arguments, for any batch size, which ``assistant_model=``
refuses above one. An argument that this is not so for is refused by its name.
"""

from .method import speculative

__all__ = ["speculative"]
