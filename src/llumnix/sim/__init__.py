"""`llumnix simulate` and `llumnix profile`: the commands, and a simulator behind them."""
