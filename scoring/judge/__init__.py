"""From evaluations to targets reached, medians, scores and reasons: tables in, tables out."""
