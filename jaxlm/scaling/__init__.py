"""Scaling laws: budgets, rows of sweeps, fits, and what carries over between sizes.

budget.py    FLOPs, memory, time and cost of a model before it is trained
store.py     the rows of a sweep on disk, one file a run
surfaces.py  points, and loss as a function of parameters and tokens
fit.py       such surfaces fitted to points
isoflop.py   the best size at each budget, from valleys or from training curves
powers.py    power laws: learning rate, batch size, and the like
intervals.py  bootstrap intervals, predictions, backtests
transfer.py  rules by which settings of a narrow model serve a wide one (muP)
study.py     from the rows of a sweep to its laws
plots.py     pictures of all these

    made = study(Store("runs/laws/rows").rows(), samples=1000, seed=0)
    print(made.describe())
"""
