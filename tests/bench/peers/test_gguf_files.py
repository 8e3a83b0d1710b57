"""The command that writes files for llama.cpp, with a script in the place of llama-quantize."""

from __future__ import annotations

import pytest

from bench.peers.gguf_files import main, quantised_file

pytest.importorskip("gguf")


def test_the_command_names_the_files_and_what_failed(tmp_path, capsys):
    assert quantised_file(tmp_path / "smol-bf16.gguf", "Q4_0") == tmp_path / "smol-q4_0.gguf"
    file = tmp_path / "embedded-bf16.gguf"
    broken = tmp_path / "llama-quantize"
    broken.write_text("#!/bin/sh\necho no such type\nexit 3\n")
    broken.chmod(0o755)
    flags = ["--types=Q8_0", f"--llama-cpp={tmp_path}"]
    assert main(["embedded", str(file), *flags]) == 2
    said = capsys.readouterr()
    assert f"{file}: 0.02 GB, token ids only" in said.out
    assert "llama-quantize ended with exit code 3: no such type" in said.err
