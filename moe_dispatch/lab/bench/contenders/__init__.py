"""What ``bench`` times: this library, the usual implementations, and the floors below both."""
