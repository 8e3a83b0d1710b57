"""What sub-commands measure: one layer, one batch of the decoder, tiles."""
