"""What crosses between ranks: the one all-to-all, the words that make one rank's mistake everyone's error, tokens
into and out of regions. Knows no expert."""
