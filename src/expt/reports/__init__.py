"""Tables, figures and pages over many runs; everything is read from what runs left behind."""
