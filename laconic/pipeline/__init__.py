"""Load, measure, plan, solve, apply, verify, save: the road that `compress` takes."""
