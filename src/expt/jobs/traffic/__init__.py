"""Traffic forecasting: speed series, windows, masked errors, and the models for them."""
