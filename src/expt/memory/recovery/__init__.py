"""Going on after memory has run out, with the same batch and one technique more."""
