"""One run: what it is built of, predicted, trained and recorded."""
