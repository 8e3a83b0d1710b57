"""Measurements: kernels launch by launch, decoding end to end, the fitted model, pictures.

Every measurement is one JSON line that carries its environment; every table and picture is made
from such lines. Letters: ``B`` sequences, ``T`` tokens entering the MoE layer, ``E`` experts,
``K`` experts per token, ``H`` hidden, ``I`` expert intermediate, ``gamma`` draft length.

The folders, each importing only from those below it:

- ``commands``: a module per sub-command of ``python -m bench``: its flags, the loop over cells,
  the table.
- ``suite``: the pieces of ``bench suite``, for a GPU lent for minutes.
- ``page``: the HTML page of a folder of results: numbers, questions, tables.
- ``pictures``: pictures from lines alone.
- ``paper``: the paper's tables in kind: its rows with ours beside them, and its data sets whole.
- ``tuning``: tiles of the expert kernels: candidates, search, the table.
- ``runs``: what is measured: one point of the layer, one batch of the decoder, fits.
- ``peers``: transformers, vLLM on a CPU, vLLM's Triton kernel, llama.cpp.
- ``measure``: clocks, CUDA graphs, ceilings, the machine's description, lines.
- ``workloads``: shapes, routings, random models, prompts, the paper's rows.
- ``gguf``: files of our models for llama.cpp, written and read.

``results`` holds lines worth keeping, a folder per device. A new measurement is a function in
``runs`` that returns a line's fields, a module in ``commands`` that writes it with
``bench.measure.record.Recorder``, and, if it is to be seen, a column list in ``page/tables.py`` and
a picture in ``pictures/gallery.py``.
"""
