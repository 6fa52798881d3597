"""How often statistics and refreshes (open question 4 of arXiv 2311.00636): steps, time, the cost model's time."""
