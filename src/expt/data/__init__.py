"""Data sets and the readers behind them; `files/` holds the series that ship with the package."""
