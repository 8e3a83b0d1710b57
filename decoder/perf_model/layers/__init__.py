"""What a layer holds and keeps, read from a config: attention, recurrent mixers, feed-forward."""
