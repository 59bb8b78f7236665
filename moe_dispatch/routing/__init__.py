"""The experts of every token, recorded and replayed in any layout. It knows names, tokens and ids, and no layer."""
