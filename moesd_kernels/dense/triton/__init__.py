"""Triton implementations for CUDA of the operators around the experts, one file each.

Arguments, results and rounding are those of ``torch.ops.moesd``; a row is computed from that row
alone, and nothing waits for the device, so that all of it may be captured in graphs. Importing this
package needs neither Triton nor a GPU; importing a kernel's file needs Triton.
"""
