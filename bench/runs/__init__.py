"""What sub-commands measure: a point of the layer, a batch of the decoder, fits."""
