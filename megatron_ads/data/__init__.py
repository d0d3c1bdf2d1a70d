"""From files and generators to the batches of one replica: chat rows, tokens, loss masks, packing, mixing."""
