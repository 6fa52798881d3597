"""An encoder-decoder transformer that translates Middle English to modern English: the expand setting."""
