"""What a run reads and writes: prompt files and result files, a JSON object per line."""
