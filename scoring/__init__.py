"""Scores of AlgoPerf runs: logs -> one tidy table -> time and steps to target -> profiles, scores, reports.

The steps are pure functions on pandas tables, to be used one by one:

    from scoring.judge import targets, trials, score
    from scoring.read import logs
    runs = logs.read(["runs/kfac_reduce", "runs/nadamw"])       # runs.evals, runs.trials, runs.oddities
    rules = targets.rules_for(runs.trials)                      # targets, budgets, held-out sets
    reached = trials.reach(runs, rules)                         # one row per trial
    cells = trials.cells(trials.studies(reached), rules)        # one row per submission and workload
    print(score.scores(cells, rules))

``python -m scoring --help`` lists the commands. The rules are in docs/scoring.md.
"""
